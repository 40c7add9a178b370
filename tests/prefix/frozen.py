"""A tiny model whose lower layers a Freezer has frozen, with its prefix; and batches of which each row is known."""

import logging
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from tiny import FAMILIES, VOCABULARY, tiny_model
from torch import nn

from safe_lab.adapters import attach, build_peft_config, find_units
from safe_lab.decision import FreezingRule
from safe_lab.freezing import Freezer
from safe_lab.model import head_modules, loss_function
from safe_lab.prefix import Prefix

NUM_LAYERS = 3
# A third of the units at each scoring.
A_LAYER_AT_A_TIME = FreezingRule(policy="prefix", warmup=0, final=NUM_LAYERS, curve="linear", final_share=1.0)


@dataclass
class Case:
    """A model in evaluation mode, its Freezer, its prefix."""

    model: nn.Module
    freezer: Freezer
    prefix: Prefix

    @property
    def cache(self):
        return self.prefix.cache

    def freeze(self, layers):
        """Freeze so many layers from the input; nobody is told."""
        while sum(self.freezer.frozen) * NUM_LAYERS < layers * len(self.freezer.units):
            self.freezer.step(0)
        return self

    def read(self, batch):
        """The prefix's output, from a cache that has not been dropped by then."""
        hidden = self.prefix.hidden(batch)
        assert self.cache.usable and self.cache.depth
        return hidden

    def compute(self, batch):
        """The prefix's output without the cache."""
        self.prefix.cache, cache = None, self.prefix.cache
        try:
            return self.prefix.hidden(batch)
        finally:
            self.prefix.cache = cache

    def gradients(self, batch, *, skip=False):
        """The loss, and the gradient of each weight that has one."""
        self.model.zero_grad()
        loss = (self.prefix.loss if skip else self.prefix._loss_function)(self.model, batch)
        loss.backward()
        found = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad()
        return {"loss": loss.detach(), **found}


def build(
    family="bert",
    *,
    layers=0,
    cache=None,
    base=None,
    attention="eager",
    target_modules=None,
    unit="layer",
    rule=A_LAYER_AT_A_TIME,
    score_with_prefix=False,
    loss=loss_function,
    autocast=nullcontext,
    dtype=torch.float32,
    probe=None,
    **changes,
):
    """A case whose adapters do something, with so many layers frozen."""
    base = tiny_model(family, **changes) if base is None else base
    base.set_attn_implementation(attention)
    peft_config = build_peft_config(
        "lora",
        rank=4,
        target_modules=target_modules or FAMILIES[family][2],
        head_modules=head_modules(base),
    )
    model = attach(base, peft_config).model.to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 5)
    probe = make_batch([16, 9, 12, 3, 7], seed=7) if probe is None else probe
    units = find_units(model, lambda: model(**probe), unit)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    prefix = Prefix(model, units, probe, loss, cache=cache, autocast=autocast)
    freezer = Freezer(model, units, optimizer, [probe], prefix.loss if score_with_prefix else loss, rule)
    return Case(model, freezer, prefix).freeze(layers)


def make_batch(lengths, *, width=None, seed=0, padding="right"):
    """Rows of random tokens, as many as there are lengths."""
    width, generator = width or max(lengths), torch.Generator().manual_seed(seed)
    input_ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width).long()
    for row, length in enumerate(lengths):
        place = slice(0, length) if padding == "right" else slice(width - length, width)
        input_ids[row, place] = torch.randint(4, VOCABULARY, (length,), generator=generator)
        mask[row, place] = 1
    labels = torch.randint(0, 2, (len(lengths),), generator=generator)
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


# All examples, the longest first, as a cache is filled with them.
LENGTHS = [[33, 33, 29, 26, 24, 21], [20, 19, 17, 16, 14, 13], [12, 9, 5, 3, 2, 1]]


def make_blocks():
    return [make_batch(lengths, seed=seed) for seed, lengths in enumerate(LENGTHS, start=100)]


def pick(batches, places, *, width=None):
    """A batch of single rows of others: ``places`` are pairs of batch and row."""
    width = width or max(int(batches[b]["attention_mask"][row].sum()) for b, row in places)
    picked = {}
    for name in batches[0]:
        rows = [batches[b][name][row] for b, row in places]
        if rows[0].dim():
            rows = [nn.functional.pad(row, (0, width - len(row)))[:width] for row in rows]
        picked[name] = torch.stack(rows)
    return picked


# Rows of every block, in another order; the longest has 33 tokens.
MIXED = [(2, 1), (0, 3), (1, 5), (0, 0), (2, 5), (1, 0), (0, 5)]


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def warnings_in(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
