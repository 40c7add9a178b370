import random
import weakref
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import transformers
from frozen import MIXED, Case, build, equal, make_batch, make_blocks, pick, warnings_in
from tiny import VOCABULARY
from torch import nn
from transformers import AutoModelForSequenceClassification

from safe_lab.decision import FreezingRule
from safe_lab.freezing import Freezer
from safe_lab.memory import Ledger
from safe_lab.model import checkpoint_gradients, loss_function
from safe_lab.prefix import ActivationCache, Prefix
from safe_lab.units import Unit

WIDE = [32, 20, 5, 17]


@pytest.fixture(params=["eager", "sdpa"])
def attention(request, family):
    """Each attention that the family has."""
    if request.param == "sdpa" and family == "deberta-v2":
        pytest.skip("DeBERTa has an attention of its own")
    return request.param


def assert_close(one, other, *, rtol=1e-4, atol=1e-6):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=rtol, atol=atol, msg=name)


# Prefix and cache against the plain frozen run.


@pytest.mark.parametrize("layers", [1, 2])
def test_the_gradients_of_the_plain_frozen_run_to_the_bit(family, attention, layers):
    case = build(family, layers=layers, attention=attention)
    assert case.prefix.update() == layers
    batch = make_batch(WIDE)
    plain = case.gradients(batch)
    assert any("lora_B" in name for name in plain)
    assert equal(case.gradients(batch, skip=True), plain)


@pytest.mark.parametrize("lengths", [[7, 5, 2, 1], [33, 20, 7]])
def test_at_other_widths_the_gradients_are_the_same_but_for_rounding(family, attention, lengths):
    case = build(family, layers=2, attention=attention)
    case.prefix.update()
    batch = make_batch(lengths)
    assert_close(case.gradients(batch, skip=True), case.gradients(batch))


def test_cached_rows_of_several_blocks_are_the_computed_ones_to_the_bit(family, attention):
    case = build(family, layers=2, attention=attention, cache=ActivationCache())
    blocks = make_blocks()
    case.prefix.update(blocks)
    for width in (33, 40 - 2):
        batch = pick(blocks, MIXED, width=width)
        plain = case.gradients(batch)
        assert case.cache.find(case.prefix._stack.inputs_of(batch)) == [True] * len(MIXED)
        assert torch.equal(case.read(batch), case.compute(batch))
        cached = case.gradients(batch, skip=True)
        case.prefix.cache, cache = None, case.cache
        assert equal(case.gradients(batch, skip=True), cached)
        case.prefix.cache = cache
        assert_close(cached, plain)


def test_rows_that_are_kept_and_rows_that_are_not_make_one_batch(family):
    case = build(family, layers=2, cache=ActivationCache())
    blocks = make_blocks()
    case.prefix.update([blocks[0], blocks[2]])
    batch = pick(blocks, MIXED)
    assert set(case.cache.find(case.prefix._stack.inputs_of(batch))) == {True, False}
    assert torch.equal(case.read(batch), case.compute(batch))


@pytest.mark.parametrize("layers", [2, 3])
def test_a_cache_that_grew_has_the_bits_of_one_built_at_once(family, attention, layers):
    blocks = make_blocks()
    at_once = build(family, layers=layers, attention=attention, cache=ActivationCache())
    at_once.prefix.update(blocks)
    grown = build(family, layers=1, attention=attention, cache=ActivationCache())
    grown.prefix.update(blocks)
    for more in range(2, layers + 1):
        assert grown.freeze(more).prefix.update(blocks) == more
    assert (grown.cache.path, at_once.cache.path) == ([*range(1, layers + 1)], [layers])
    batch = pick(blocks, MIXED)
    assert torch.equal(grown.read(batch), at_once.prefix.hidden(batch))


def test_a_cache_that_is_behind_is_read_and_the_rest_computed(family):
    blocks = make_blocks()
    case = build(family, layers=1, cache=ActivationCache())
    case.prefix.update(blocks)
    assert case.freeze(2).prefix.update() == 2
    assert case.cache.depth == 1
    batch, passes = pick(blocks, MIXED), []

    def around(inputs, first_layer):
        passes.append((len(inputs["input_ids"]), first_layer))
        return nullcontext()

    assert torch.equal(case.prefix.hidden(batch, around=around), case.compute(batch))
    assert passes == [(len(MIXED), 1)]


def test_the_head_trains_alone_on_all_layers(family):
    blocks = make_blocks()
    case = build(family, layers=3, cache=ActivationCache())
    assert case.prefix.update(blocks) == case.prefix.num_layers == 3
    batch = pick(blocks, MIXED)
    plain = case.gradients(batch)
    assert not any("lora" in name for name in plain)
    assert_close(case.gradients(batch, skip=True), plain)


def test_an_evaluation_without_gradients_reads_the_cache_too(family):
    blocks = make_blocks()
    case = build(family, layers=2, cache=ActivationCache())
    case.prefix.update(blocks)
    batch = pick(blocks, MIXED)
    with torch.no_grad():
        plain = case.model(**batch).logits
        with case.prefix.skipping(batch):
            skipped = case.model(**batch).logits
    torch.testing.assert_close(skipped, plain, rtol=1e-4, atol=1e-6)


def test_where_the_model_runs_once_the_output_is_let_go_of(family):
    case = build(family, layers=2)
    case.prefix.update()
    batch, alive = make_batch(WIDE), []
    first, second = case.prefix._stack.layers[2], case.prefix._stack.backbone
    with torch.no_grad(), case.prefix.skipping(batch):
        kept = case.model(**batch).logits
        assert torch.equal(case.model(**batch).logits, kept)
    taken = []
    hooks = [
        first.register_forward_pre_hook(lambda module, args: taken.append(weakref.ref(args[0]))),
        second.register_forward_hook(lambda *_: alive.append(taken[0]() is not None)),
    ]
    with torch.no_grad(), case.prefix.skipping(batch, once=True):
        assert torch.equal(case.model(**batch).logits, kept)
        assert alive == [False]
        with pytest.raises(IndexError):
            case.model(**batch)
    for hook in hooks:
        hook.remove()


# What a batch may look like.


def test_padding_on_the_left_is_never_cached_and_right(family):
    case = build(family, layers=2, cache=ActivationCache())
    case.prefix.update([make_batch([9, 6, 4]), make_batch([9, 6, 4], padding="left")])
    batch = make_batch([9, 6, 4], padding="left")
    case.prefix.ahead(batch)
    assert not case.cache._ahead
    assert equal(case.gradients(batch, skip=True), case.gradients(batch))


def test_a_batch_without_a_mask_is_all_tokens(family):
    case = build(family, layers=2, cache=ActivationCache())
    batch = make_batch([9, 9])
    del batch["attention_mask"]
    case.prefix.update([make_batch([9, 9])])
    assert case.cache.find(case.prefix._stack.inputs_of(batch)) == [True, True]
    assert_close(case.gradients(batch, skip=True), case.gradients(batch))


def test_token_types_count(family):
    case = build(family, layers=2, cache=ActivationCache(), type_vocab_size=2)
    batch = make_batch([12, 7])
    if "token_type_ids" not in case.prefix._stack._inputs:
        pytest.skip("the family has no token types")
    typed = batch | {"token_type_ids": (torch.arange(12) > 4).long().expand(2, 12)}
    case.prefix.update([batch, typed])
    assert case.cache.num_examples == 4
    for one in (batch, typed):
        assert torch.equal(case.read(one), case.compute(one))
        assert_close(case.gradients(one, skip=True), case.gradients(one))
    assert case.gradients(typed, skip=True)["loss"] != case.gradients(batch, skip=True)["loss"]


def test_positions_count():
    case = build("bert", layers=2, cache=ActivationCache())
    batch = make_batch([12, 7])
    moved = batch | {"position_ids": torch.arange(3, 15).expand(2, 12)}
    case.prefix.update([batch, moved])
    for one in (batch, moved):
        assert torch.equal(case.read(one), case.compute(one))
        assert_close(case.gradients(one, skip=True), case.gradients(one))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_row_without_tokens_is_not_kept_and_does_no_harm(attention):
    # What an empty text is to a tokenizer that adds no token of its own.
    batch = make_batch([9, 1, 4], width=9)
    batch["input_ids"][1], batch["attention_mask"][1] = 0, 0
    case = build("gpt2", layers=2, cache=ActivationCache(), attention=attention)
    case.prefix.update([batch])
    assert case.cache.num_examples == 2
    assert torch.equal(case.read(batch), case.compute(batch))
    alone = {name: tensor[1:2] for name, tensor in batch.items()}
    assert case.prefix.hidden(alone).shape == (1, 9, 16)
    case.freeze(3).prefix.update([batch])
    assert torch.equal(case.read(batch), case.compute(batch))


@pytest.mark.parametrize("family", ["llama", "qwen2", "modernbert"])
def test_a_text_longer_than_the_config_says_is_not_cut_where_positions_rotate(family):
    batch = make_batch([45, 20])
    case = build(family, layers=2, cache=ActivationCache())
    case.prefix.update([batch])
    assert_close(case.gradients(batch, skip=True), case.gradients(batch))


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "distilbert"])
def test_the_longest_text_has_a_position_for_every_token(family):
    longest = 38 if family == "roberta" else 40
    batch = make_batch([longest, 3])
    case = build(family, layers=2, cache=ActivationCache())
    case.prefix.update([batch])
    assert case.cache.num_examples == 2
    assert_close(case.gradients(batch, skip=True), case.gradients(batch))


# Models on which it does not work.


def leaves_alone(case, batch, caplog, reason):
    """Frozen and told so, the model runs as before, and one warning says why."""
    plain = case.gradients(batch)
    for _ in range(3):
        assert case.prefix.update([batch]) == 0
        assert case.freezer.frozen_depth or case.freezer.step(0)
    assert case.prefix.num_layers == 0
    assert case.prefix.hidden(batch) is None
    assert equal(case.gradients(batch, skip=True), plain)
    (warning,) = warnings_in(caplog)
    assert warning.startswith("the frozen layers of this model cannot be skipped")
    assert reason in warning
    case.prefix.restore([1], lambda: pytest.fail("there is nothing to restore"))
    case.prefix.ahead(batch)
    case.prefix.close()


def test_albert_whose_layers_are_one_is_left_alone(caplog):
    config = transformers.AlbertConfig(
        vocab_size=VOCABULARY,
        embedding_size=16,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
    )
    base = AutoModelForSequenceClassification.from_config(config)
    case = build(base=base, target_modules=["query", "value"], cache=ActivationCache())
    while not all(case.freezer.frozen):
        case.freezer.step(0)
    leaves_alone(case, make_batch([9, 4]), caplog, "do not each run once")


def seq2seq(name, **changes):
    torch.manual_seed(0)
    config = getattr(transformers, name)(
        vocab_size=VOCABULARY,
        d_model=16,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        num_labels=2,
        **changes,
    )
    return AutoModelForSequenceClassification.from_config(config)


def ending(batch):
    """The batch with the one end-of-text token that the classifiers of BART and T5 look for."""
    last = batch["attention_mask"].sum(1) - 1
    batch["input_ids"][torch.arange(len(last)), last] = 1
    return batch


def test_t5_whose_layers_hand_on_a_position_bias_is_left_alone(caplog):
    base = seq2seq("T5Config", d_kv=8, d_ff=32, num_layers=3, num_decoder_layers=1, num_heads=2)
    batch = ending(make_batch([9, 4]))
    case = build(base=base, target_modules=["q", "v"], probe=batch, cache=ActivationCache())
    case.freezer.step(0)
    leaves_alone(case, batch, caplog, "hand on more than hidden states")


def test_of_bart_the_encoders_layers_are_skipped(caplog):
    base = seq2seq(
        "BartConfig",
        encoder_layers=3,
        decoder_layers=3,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=40,
        forced_eos_token_id=1,
    )
    batch = ending(make_batch([32, 20]))
    case = build(base=base, target_modules=["q_proj", "v_proj"], probe=batch, cache=ActivationCache())
    # A third of the adapters: two of the encoder's three layers.
    case.freezer.step(0)
    assert case.prefix.update([batch]) == 2
    assert equal(case.gradients(batch, skip=True), case.gradients(batch))
    # The decoder's layers freeze as well, and there is no more to skip.
    for _ in range(2):
        case.freezer.step(0)
    assert all(case.freezer.frozen)
    assert case.prefix.update([batch]) == 3
    assert_close(case.gradients(batch, skip=True), case.gradients(batch))
    assert not warnings_in(caplog)


@pytest.mark.parametrize("layers", [1, 2])
def test_deberta_with_a_convolution_is_right_or_left_alone(layers, caplog):
    case = build("deberta-v2", layers=layers, cache=ActivationCache(), conv_kernel_size=3)
    blocks = make_blocks()
    case.prefix.update(blocks)
    for batch in (make_batch(WIDE), pick(blocks, MIXED)):
        assert_close(case.gradients(batch, skip=True), case.gradients(batch))
    assert (case.prefix.num_layers == 0) == bool(warnings_in(caplog))


class Layer(nn.Module):
    """A frozen layer with an adapter."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(8, 8).requires_grad_(False)
        self.adapter = nn.Linear(8, 8)

    def forward(self, x, *_):
        return x + torch.tanh(self.base(x) + self.adapter(x))


class Encoder(nn.Module):
    """The plainest stack that takes ``input_ids``; ``step`` runs a layer."""

    def __init__(self, layers, step):
        super().__init__()
        self.embeddings = nn.Embedding(VOCABULARY, 8).requires_grad_(False)
        self.layers, self.step = layers, step

    def forward(self, input_ids, attention_mask):
        x = self.embeddings(input_ids)
        for layer in self.layers:
            x = self.step(layer, x)
        return x


def sum_tokens(x, mask):
    return (x * mask[..., None]).sum(1)


class Classifier(nn.Module):
    """A stack and a head on what is pooled of it; what is odd about a model is put in the place of one of them."""

    def __init__(self, layers=None, step=lambda layer, x: layer(x), pool=sum_tokens):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = Encoder(nn.ModuleList(Layer() for _ in range(3)) if layers is None else layers, step)
        self.pool, self.head = pool, nn.Linear(8, 2)

    def forward(self, input_ids, attention_mask):
        return self.head(self.pool(self.encoder(input_ids, attention_mask), attention_mask))


def toy_loss(model, batch):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return nn.functional.cross_entropy(logits, batch["labels"])


def toy_case(model):
    units = [
        Unit(f"layer{i}", i, {f"{i}.{name}": p for name, p in layer.adapter.named_parameters()}, layer)
        for i, layer in enumerate(model.encoder.layers)
    ]
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    probe, rule = make_batch([9, 6, 3]), FreezingRule(policy="prefix", warmup=0, final=1, final_share=0.67)
    prefix = Prefix(model, units, probe, toy_loss, cache=ActivationCache())
    freezer = Freezer(model, units, optimizer, [probe], toy_loss, rule)
    freezer.step(0)
    return Case(model, freezer, prefix)


def test_the_plainest_stack_is_skipped(caplog):
    case, batch = toy_case(Classifier()), make_batch(WIDE)
    assert case.prefix.update([batch]) == 2
    assert_close(case.gradients(batch, skip=True), case.gradients(batch))
    assert not warnings_in(caplog)


class Telling(Layer):
    """Returns more than hidden states, and the model uses it."""

    def forward(self, x, *_):
        return super().forward(x), x.mean()


def needs_more(layer, x):
    assert torch.is_grad_enabled(), "a pass without gradients"
    return layer(x)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            lambda: Classifier(nn.ModuleList(Telling() for _ in range(3)), step=lambda layer, x: sum(layer(x))),
            "hand on more",
        ),
        (lambda: Classifier(step=lambda layer, x: layer(layer(x))), "do not each run once"),
        (lambda: Classifier(step=lambda layer, x: layer(x) + x.mean(1, keepdim=True)), "its output changes by"),
        (lambda: Classifier(pool=lambda x, mask: x.sum(1)), "its output changes by 0 of itself, and its loss by"),
        (lambda: Classifier(step=needs_more), "run in part it raises AssertionError: a pass without gradients"),
        (lambda: Classifier(nn.Sequential(Layer(), Layer(), Layer())), "no adapter lies in a list of layers"),
    ],
    ids=["tuple", "twice", "around the layers", "padding in the head", "raises", "no list"],
)
def test_an_odd_model_is_left_alone(model, reason, caplog):
    leaves_alone(toy_case(model()), make_batch([9, 6, 3]), caplog, reason)


def test_a_head_that_is_zero_does_not_hide_that_hidden_states_change(caplog):
    model = Classifier(step=lambda layer, x: layer(x) + x.mean(1, keepdim=True))
    nn.init.zeros_(model.head.weight)
    leaves_alone(toy_case(model), make_batch([9, 6, 3]), caplog, "and its loss by 0)")


def test_layers_that_no_module_feeds_from_token_ids_are_left_alone(caplog):
    model = Classifier()
    encoder = model.encoder
    # Neither says that it takes token ids.
    encoder.forward = lambda *inputs, forward=encoder.forward: forward(*inputs)
    model.forward = lambda forward=model.forward, **inputs: forward(**inputs)
    leaves_alone(toy_case(model), make_batch([9, 6, 3]), caplog, "no module around its layers takes input_ids")


def test_a_model_that_does_not_run_at_all_says_so_itself():
    model = Classifier()
    case = toy_case(model)
    model.pool = lambda x, mask: x.sum(1)[:, :1]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        case.prefix.update()


# How deep it is.


def test_nothing_is_skipped_before_something_is_frozen_or_where_something_below_trains(family):
    case = build(family, layers=0)
    assert case.prefix.update() == 0
    case.freeze(2)
    case.model.get_input_embeddings().weight.requires_grad_(True)
    assert case.prefix.update() == 0
    case.model.get_input_embeddings().weight.requires_grad_(False)
    assert case.prefix.update() == 2
    assert case.prefix.num_layers == 3


@pytest.mark.parametrize("unit", ["module", "matrix"])
def test_a_layer_that_is_half_frozen_is_live(unit):
    case = build("bert", unit=unit)
    per_layer = len(case.freezer.units) // 3
    state = case.freezer.state_dict()
    for count in range(1, 2 * per_layer + 1):
        case.freezer.load_state_dict(state | {"frozen": [*range(count)]})
        assert case.prefix.update() == count // per_layer
        batch = make_batch(WIDE)
        assert equal(case.gradients(batch, skip=True), case.gradients(batch))


def test_a_frozen_layer_above_a_live_one_is_not_skipped():
    case = build("bert")
    case.freezer.load_state_dict(case.freezer.state_dict() | {"frozen": [0, 2]})
    assert case.prefix.update() == 1


def test_a_cache_deeper_than_what_is_frozen_is_not_read():
    # PEFT's set_adapter makes every adapter trainable again.
    blocks = make_blocks()
    case = build("bert", layers=2, cache=ActivationCache())
    case.prefix.update(blocks)
    for parameter in case.freezer.units[1].parameters.values():
        parameter.requires_grad_(True)
    assert case.prefix.update(blocks) == 1
    batch = pick(blocks, MIXED)
    case.prefix.ahead(batch)
    assert_close(case.gradients(batch, skip=True), case.gradients(batch))


# Gradient checkpointing, dropout, precision.


def kept_for_backward(case, batch):
    """Bytes that a forward pass leaves behind."""
    with Ledger(case.model) as ledger:
        loss = case.prefix.loss(case.model, batch)
    del loss
    return ledger.trace.left["temporary"]


@pytest.mark.parametrize("recompute", [False, True])
def test_frozen_layers_keep_nothing_for_the_backward_pass(family, recompute):
    batch, kept, peak = make_batch([32] * 8), [], []
    for layers in range(3):
        case = build(family, layers=layers)
        if recompute:
            checkpoint_gradients(case.model.get_base_model())
        assert case.prefix.update() == layers
        case.model.train()
        kept.append(kept_for_backward(case, batch))
        with Ledger(case.model) as ledger:
            case.prefix.loss(case.model, batch).backward()
        peak.append(ledger.trace.peak["activations"])
    # Recomputed, a layer keeps its input; and the gain of the second layer is as large as that of the first.
    least = 8 * 32 * 16 * 4 * 0.85 if recompute else 0.3 * kept[0]
    assert kept[0] - kept[1] > least
    assert kept[1] - kept[2] > least
    assert peak[0] > peak[1] > peak[2]


def test_gradient_checkpointing_leaves_the_gradients_as_they_are(family):
    case = build(family, layers=2)
    case.prefix.update()
    batch = make_batch(WIDE)
    plain = case.gradients(batch)
    checkpoint_gradients(case.model.get_base_model())
    assert case.prefix.update() == 2
    case.model.train()
    for module in case.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert_close(case.gradients(batch, skip=True), plain)


DROPOUT = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}


def test_the_prefix_does_not_drop_and_the_live_layers_do():
    case = build("bert", layers=2, **DROPOUT)
    case.prefix.update()
    case.model.train()
    batch = make_batch(WIDE)
    hidden = case.prefix.hidden(batch)
    assert torch.equal(case.prefix.hidden(batch), hidden)
    case.model.eval()
    assert torch.equal(case.prefix.hidden(batch), hidden)
    case.model.train()
    assert case.gradients(batch, skip=True)["loss"] != case.gradients(batch, skip=True)["loss"]


def test_the_model_is_as_before_also_after_an_exception():
    case = build("bert", layers=2, cache=ActivationCache())
    case.model.train()
    case.model.base_model.model.classifier.eval()
    replaced = case.prefix._stack.layers[0]
    replaced.forward = replaced.forward

    def look():
        return [
            (name, module.training, module.__dict__.get("forward"), len(module._forward_hooks))
            for name, module in case.model.named_modules()
        ]

    before, batch = look(), make_batch(WIDE)
    case.prefix.update([batch])
    case.prefix.loss(case.model, batch)
    assert look() == before
    with pytest.raises(ZeroDivisionError), case.prefix.skipping(batch):
        assert look() != before
        raise ZeroDivisionError
    assert look() == before
    hook = case.prefix._stack.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        case.prefix.hidden(make_batch([3]))
    hook.remove()
    assert look() == before
    with case.prefix.skipping(batch), case.prefix.skipping(batch):
        pass
    assert look() == before


def test_after_the_end_all_layers_run():
    case = build("bert", layers=2, cache=ActivationCache())
    batch, ran = make_batch(WIDE), []
    case.prefix.update([batch])
    for layer in case.prefix._stack.layers[:2]:
        layer.attention.register_forward_hook(lambda *_: ran.append(1))
    case.prefix.loss(case.model, batch)
    assert not ran
    case.prefix.close()
    assert case.prefix.hidden(batch) is None
    case.prefix.loss(case.model, batch)
    assert len(ran) == 2


def bf16():
    return torch.autocast("cpu", torch.bfloat16)


def autocast_loss(model, batch):
    with bf16():
        return loss_function(model, batch)


def test_under_autocast_the_prefix_has_the_models_precision(family):
    blocks = make_blocks()
    case = build(family, layers=2, loss=autocast_loss, autocast=bf16, cache=ActivationCache())
    assert case.prefix.update(blocks) == 2
    batch = pick(blocks, MIXED)
    assert torch.equal(case.read(batch), case.compute(batch))
    assert_close(case.gradients(batch, skip=True), case.gradients(batch), rtol=0.1, atol=0.02)
    # Not that of float32, of which bfloat16 is far off.
    float32 = build(family, layers=2)
    float32.prefix.update()
    assert not torch.allclose(float32.prefix.hidden(batch), case.prefix.hidden(batch).float(), atol=1e-5)


def test_rounding_under_autocast_is_not_taken_for_a_model_that_does_not_work(caplog):
    # Rows of 13 tokens have other bits than the same padded to 16, and hidden states are float32 at the end.
    options = {"attention": "sdpa", "probe": make_batch([13] * 4), "initializer_range": 0.2}
    case = build("bert", layers=2, loss=autocast_loss, autocast=bf16, **options)
    assert case.prefix.update() == 2
    assert not warnings_in(caplog)


def test_a_bfloat16_model(family):
    blocks = make_blocks()
    case = build(family, layers=2, dtype=torch.bfloat16, cache=ActivationCache())
    assert case.prefix.update(blocks) == 2
    batch = pick(blocks, MIXED)
    assert case.prefix.hidden(batch).dtype == torch.bfloat16
    assert torch.equal(case.read(batch), case.compute(batch))
    assert_close(case.gradients(batch, skip=True), case.gradients(batch), rtol=0.1, atol=0.05)


# Scoring and random streams.


@pytest.mark.parametrize("metric", ["cka", "sensitivity", "contribution", "fisher", "gradient_ratio"])
def test_live_units_score_as_with_the_plain_loss(metric):
    scores = []
    for score_with_prefix in (False, True):
        rule = FreezingRule(metric=metric, warmup=0, final=1, final_threshold=-1e9)
        case = build("bert", rule=rule, score_with_prefix=score_with_prefix, cache=ActivationCache())
        with torch.no_grad():
            for parameter in case.freezer.units[2].parameters.values():
                parameter.add_(0.1)
        first = case.freezer.step(0).scores
        case.freezer.load_state_dict(case.freezer.state_dict() | {"frozen": [0, 1]})
        assert case.prefix.update(case.freezer.batches) == 2
        ran = []
        case.prefix._stack.layers[0].attention.register_forward_hook(lambda *_: ran.append(1))
        second = case.freezer.step(1).scores
        assert bool(ran) != score_with_prefix
        assert second[:2] == first[:2]
        scores.append(second)
    assert scores[1] == pytest.approx(scores[0], rel=1e-4)


def random_states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()


def test_the_prefix_draws_nothing():
    case = build("bert", layers=1, cache=ActivationCache(), **DROPOUT)
    blocks, batch = make_blocks(), make_batch(WIDE)
    case.model.train()
    before = random_states()
    case.prefix.update(blocks)
    case.prefix.ahead(blocks[0])
    case.prefix.hidden(blocks[0])
    case.prefix.hidden(batch)
    case.freeze(2).prefix.update()
    case.prefix.hidden(blocks[0])
    case.prefix.update(blocks)
    case.prefix.cache = ActivationCache()
    case.prefix.restore([1, 2], lambda: blocks)
    assert random_states() == before


def test_what_a_pass_costs_is_told():
    told = []

    class Around:
        def __init__(self, inputs, first_layer):
            told.append((tuple(inputs["input_ids"].shape), first_layer))

        __enter__ = __exit__ = lambda *_: None

    blocks = make_blocks()
    case = build("bert", layers=1, cache=ActivationCache())
    case.prefix.update(blocks, around=Around)
    # 33 tokens are padded to 48, or to as many as the model takes.
    assert told == [((6, 40), 0), ((6, 32), 0), ((6, 16), 0)]
    told.clear()
    case.prefix.hidden(blocks[0], around=Around)
    assert told == []
    case.prefix.hidden(make_batch([5, 5]), around=Around)
    assert told == [((2, 16), 0)]
    told.clear()
    case.freeze(2).prefix.update(blocks, around=Around)
    assert [first for _, first in told] == [1, 1, 1]


def test_adapters_switched_off_are_off_in_the_prefix_too():
    case = build("bert").freeze(2)
    case.prefix.update()
    batch = make_batch([9, 5, 7])
    with case.model.disable_adapter():
        plain = case.prefix._loss_function(case.model, batch)
        assert torch.equal(case.prefix.loss(case.model, batch), plain)


def test_gradients_from_below_are_told_with_their_cause(caplog):
    case = build("bert").freeze(2)
    case.model.enable_input_require_grads()
    assert case.prefix.update() == 0
    case.prefix.update()
    assert sum("enable_input_require_grads" in record.message for record in caplog.records) == 1


def test_a_model_is_tried_on_rows_of_unequal_length_even_if_the_probe_has_none():
    case = build("bert")
    lengths = case.prefix._examples["attention_mask"].sum(1).tolist()
    assert len(set(lengths)) > 1
    assert case.prefix._examples["input_ids"].shape[1] % 16
