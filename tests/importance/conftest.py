"""Two small trained cases: a BERT with PEFT's LoRA, and a bare module in a plain torch loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from safe_lab.importance.probe import Batch, LossFunction, Probe
from safe_lab.units import Unit

NUM_LAYERS = 3


@dataclass
class Case:
    """A model, its units and a probe; ``train`` takes a few steps of AdamW."""

    model: nn.Module
    units: Sequence[Unit]
    batches: Sequence[Batch]
    loss_function: LossFunction

    def __post_init__(self) -> None:
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=0.05)

    def probe(self, **changes: object) -> Probe:
        probe = Probe(self.model, self.units, self.batches, self.loss_function, optimizer=self.optimizer)
        return replace(probe, **changes)

    def train(self, num_steps: int = 2) -> None:
        self.model.train()
        for step in range(num_steps):
            self.loss_function(self.model, self.batches[step % len(self.batches)]).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def switch_off_lora(layers: Sequence[LoraLayer]) -> Callable[[], AbstractContextManager[None]]:
    @contextmanager
    def off() -> Iterator[None]:
        before = [layer._disable_adapters for layer in layers]
        for layer in layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer, disabled in zip(layers, before, strict=True):
                layer._disable_adapters = disabled

    return off


def lora_unit(name: str, depth: int, site: nn.Module) -> Unit:
    layers = [module for module in site.modules() if isinstance(module, LoraLayer)]
    return Unit(
        name,
        depth,
        {f"{name}.{key}": parameter for key, parameter in site.named_parameters() if "lora_" in key},
        site=site,
        switch_off=switch_off_lora(layers),
        delta_weights=lambda: (layer.get_delta_weight("default") for layer in layers),
    )


def build_bert() -> Case:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    lora = LoraConfig(r=2, target_modules=["query", "value"], lora_dropout=0.1, task_type="SEQ_CLS")
    model = get_peft_model(BertForSequenceClassification(config), lora)
    batches = []
    for lengths in ((6, 8, 5), (7, 4)):
        mask = (torch.arange(8) < torch.tensor(lengths)[:, None]).long()
        batches.append(
            {
                "input_ids": torch.randint(1, 50, mask.shape) * mask,
                "attention_mask": mask,
                "labels": torch.arange(len(lengths)) % 2,
            }
        )
    layers = model.base_model.model.bert.encoder.layer
    units = [lora_unit(f"layer.{i}", i, layer) for i, layer in enumerate(layers)]
    return Case(model, units, batches, lambda model, batch: model(**batch).loss)


class Adapted(nn.Module):
    """A fixed linear layer, and beside it an adapter that can be switched off."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.base = nn.Linear(num_features, num_features).requires_grad_(False)
        self.adapter = nn.Linear(num_features, num_features)
        self.dropout = nn.Dropout(0.1)
        nn.init.zeros_(self.adapter.weight)
        nn.init.zeros_(self.adapter.bias)
        self.on = True

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.base(x) + self.adapter(self.dropout(x)) if self.on else self.base(x))

    @contextmanager
    def off(self) -> Iterator[None]:
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before


def build_bare(num_features: int = 4, num_rows: Sequence[int] = (5, 3)) -> Case:
    torch.manual_seed(0)
    layers = [Adapted(num_features) for _ in range(NUM_LAYERS)]
    model = nn.Sequential(*layers)
    units = [
        Unit(
            f"{i}",
            i,
            {f"{i}.{name}": p for name, p in layer.adapter.named_parameters()},
            site=layer,
            switch_off=layer.off,
        )
        for i, layer in enumerate(layers)
    ]
    batches = [{"x": torch.randn(n, num_features), "y": torch.randn(n, num_features)} for n in num_rows]
    return Case(model, units, batches, lambda model, batch: nn.functional.mse_loss(model(batch["x"]), batch["y"]))


@pytest.fixture
def bert() -> Case:
    """Untrained."""
    return build_bert()


@pytest.fixture
def bare() -> Case:
    """Untrained."""
    return build_bare()


@pytest.fixture
def bare_of_size() -> Callable[..., Case]:
    """Builds a bare case of ``num_features`` with batches of ``num_rows``."""
    return build_bare


@pytest.fixture(params=[build_bert, build_bare], ids=["bert", "bare"])
def case(request: pytest.FixtureRequest) -> Case:
    """Each of the two, untrained."""
    built: Case = request.param()
    return built


def one_weight(theta: list[float], examples: list[tuple[float, ...]]) -> Probe:
    """A unit with weights ``theta`` and the loss ``mean_i x_i . theta``: the gradient of example i is x_i."""
    model = nn.Module()
    model.theta = nn.Parameter(torch.tensor(theta))
    unit = Unit("unit", 0, {"theta": model.theta})
    batches = [{"x": torch.tensor(examples)}]
    return Probe(model, [unit], batches, lambda model, batch: (batch["x"] @ model.theta).mean())


@pytest.fixture
def linear_loss() -> Callable[[list[float], list[tuple[float, ...]]], Probe]:
    """Builds a probe whose gradients can be worked by hand."""
    return one_weight
