import copy
import gc
import warnings

import peft
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from tiny import FAMILIES, tiny_batch, tiny_model
from torch import nn

from safe_lab.adapters import attach, find_units, tuner_layers
from safe_lab.decision import FreezingRule
from safe_lab.folding import (
    MAX_ROWS,
    Folding,
    fold,
    folded_layers,
    folding_state,
    kept_tensors,
    restore_folding,
    unfold,
)
from safe_lab.freezing import Freezer

LINEAR = ["query", "key", "value", "dense"]
METHODS = {
    "lora": LoraConfig(target_modules=LINEAR, r=4, lora_dropout=0.1),
    "dora": LoraConfig(target_modules=LINEAR, r=4, use_dora=True),
    "rslora": LoraConfig(target_modules=LINEAR, r=4, use_rslora=True),
    "lora_bias": LoraConfig(target_modules=LINEAR, r=4, lora_bias=True),
    "loha": peft.LoHaConfig(target_modules=LINEAR, r=4),
    "lokr": peft.LoKrConfig(target_modules=LINEAR, r=4),
    "ia3": peft.IA3Config(target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]),
    "vera": peft.VeraConfig(target_modules=["query", "value"], r=4, save_projection=True),
    "oft": peft.OFTConfig(target_modules=LINEAR, oft_block_size=4, r=0),
    "boft": peft.BOFTConfig(target_modules=["query", "value"], boft_block_size=4),
    "hra": peft.HRAConfig(target_modules=["query", "value"], r=4),
    # Merges in place.
    "hira": peft.HiraConfig(target_modules=["query", "value"], r=4),
    # Their update depends on the base weight.
    "deft": peft.DeftConfig(target_modules=["query", "value"], r=4),
    "peanut": peft.PeanutConfig(target_modules=["query", "value"], r=4),
    # Adapts the bias alone.
    "beft": peft.BeftConfig(target_modules=["value"]),
}


def loss_of(model, batch):
    return model(**batch).loss


def prepared(
    config=METHODS["lora"], *, base=None, frozen=(0, 1), unit="layer", rule=FreezingRule(), loss_function=loss_of
):
    """A model whose adapters do something, and a Freezer that has frozen some of them."""
    model = attach(tiny_model() if base is None else base, copy.deepcopy(config)).model
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=0.1)
    batch = tiny_batch(examples=6)
    units = find_units(model, lambda: model(**batch), unit)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    freezer = Freezer(model, units, optimizer, [batch], loss_function, rule)
    freeze(freezer, frozen)
    return model.eval(), freezer


def freeze(freezer, indices):
    freezer.load_state_dict(freezer.state_dict() | {"frozen": sorted(indices)})


@torch.no_grad()
def logits(model):
    return model(**tiny_batch(examples=5, seed=3)).logits


def base_weights(model):
    """The weights that adapters are beside, as copies."""
    return {
        f"{name}.{key}": weight.detach().clone()
        for name, layer in tuner_layers(model).items()
        for key, weight in layer.base_layer.named_parameters(recurse=False)
    }


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def layers_of(freezer):
    """Adapter layers of the frozen units."""
    frozen = {id(p) for p in freezer.frozen_parameters}
    return [name for name, layer in tuner_layers(freezer.model).items() if frozen & set(map(id, layer.parameters()))]


def test_a_folded_model_of_every_family_computes_what_the_unfolded_one_does(family):
    config = LoraConfig(target_modules=FAMILIES[family][2], r=4)
    model, freezer = prepared(config, base=tiny_model(family))
    before, weights = logits(model), base_weights(model)
    folding = fold(freezer)
    assert list(folding.folded) == folded_layers(model) == layers_of(freezer)
    assert folding.folded and not folding.refused
    assert torch.allclose(logits(model), before, atol=1e-5)
    unfold(model)
    assert equal(base_weights(model), weights)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_that_peft_can_merge_folds(method):
    model, freezer = prepared(METHODS[method])
    before, weights, state = logits(model), base_weights(model), copy.deepcopy(model.state_dict())
    updates = [unit.delta_weights and [delta.clone() for delta in unit.delta_weights()] for unit in freezer.units]
    with model.disable_adapter():
        pretrained = logits(model)
    folding = fold(freezer)
    assert folded_layers(model) == layers_of(freezer)
    assert not folding.refused
    assert not equal(base_weights(model), weights)
    assert torch.allclose(logits(model), before, atol=1e-5)
    for unit, update in zip(freezer.units, updates, strict=True):
        assert update is None or all(map(torch.equal, unit.delta_weights(), update))
    assert equal(model.state_dict(), state)
    for layer in tuner_layers(model).values():
        layer._disable_adapters = True
    assert torch.equal(logits(model), pretrained)
    for layer in tuner_layers(model).values():
        layer._disable_adapters = False
    assert folded_layers(model) == layers_of(freezer)
    unfold(model)
    assert equal(base_weights(model), weights)
    assert equal(model.state_dict(), state)
    assert torch.equal(logits(model), before)


def test_a_folded_layer_runs_its_base_layer_alone():
    model, freezer = prepared()
    fold(freezer)
    ran = []
    for name, module in model.named_modules():
        if ".lora_A." in name or ".lora_dropout." in name:
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    model.train()(**tiny_batch())
    assert ran
    assert not any(".layer.0." in name or ".layer.1." in name for name in ran)


def test_folding_twice_in_two_events_and_unfolding_twice_restores_every_bit():
    model, freezer = prepared(frozen=(1,))
    weights, before = base_weights(model), logits(model)
    looks = [(type(layer), set(vars(layer))) for layer in tuner_layers(model).values()]
    first = fold(freezer)
    assert fold(freezer).folded == ()
    freeze(freezer, (0, 1))
    second = fold(freezer)
    assert {".layer.1." in name for name in first.folded} == {True}
    assert {".layer.0." in name for name in second.folded} == {True}
    assert torch.allclose(logits(model), before, atol=1e-5)
    unfold(model)
    unfold(model)
    assert equal(base_weights(model), weights)
    assert torch.equal(logits(model), before)
    assert [(type(layer), set(vars(layer))) for layer in tuner_layers(model).values()] == looks
    assert fold(freezer).folded == (*second.folded, *first.folded)


def test_disable_adapter_sees_through_a_fold_to_the_bit_and_leaves_it():
    model, freezer = prepared()
    with model.disable_adapter():
        pretrained = logits(model)
    fold(freezer)
    folded, there = logits(model), folded_layers(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), pretrained)
    assert folded_layers(model) == there
    assert torch.equal(logits(model), folded)


def test_a_graph_built_with_the_adapters_off_is_that_of_the_original_weights():
    def embedding_gradient(model):
        embeddings = model.get_input_embeddings().weight.requires_grad_()
        with model.disable_adapter():
            loss = model(**tiny_batch()).loss
        return torch.autograd.grad(loss, embeddings)[0]

    # GPT-2's Conv1D keeps the parameter itself for the backward pass, and nn.Linear a view.
    config = LoraConfig(target_modules=["c_attn", "c_fc"], r=4, fan_in_fan_out=True)
    model, freezer = prepared(config, base=tiny_model("gpt2"))
    plain = embedding_gradient(model)
    assert fold(freezer).folded
    assert torch.equal(embedding_gradient(model), plain)


@pytest.mark.parametrize(
    "rule",
    [
        FreezingRule(metric="contribution"),
        FreezingRule(metric="cka"),
        FreezingRule(metric="cka", metric_options={"reference": "without_adapter"}),
        FreezingRule(metric="sensitivity"),
        FreezingRule(metric="update_norm"),
    ],
    ids=lambda rule: "-".join([rule.metric, *rule.metric_options.values()]),
)
def test_scores_are_those_without_a_fold_and_the_fold_survives_them(rule):
    _, plain = prepared(rule=rule, frozen=(1,))
    model, freezer = prepared(rule=rule, frozen=(1,))
    there = fold(freezer).folded
    expected, scoring = plain.step(1), freezer.step(1)
    for i in (0, 2):
        assert scoring.scores[i] == pytest.approx(expected.scores[i], rel=1e-3, abs=1e-6)
    assert scoring.update_norms == expected.update_norms
    assert folded_layers(model) == list(there)


def test_gradients_of_live_adapters_are_those_without_a_fold():
    model, freezer = prepared(frozen=(1,))
    live = [p for p in model.parameters() if p.requires_grad]

    def gradients():
        return torch.autograd.grad(model(**tiny_batch()).loss, live)

    plain = gradients()
    fold(freezer)
    for gradient, expected in zip(gradients(), plain, strict=True):
        assert torch.allclose(gradient, expected, atol=1e-5)


def test_folding_leaves_requires_grad_modes_gradients_and_random_streams_alone():
    model, freezer = prepared()
    model.train()
    model(**tiny_batch()).loss.backward()
    parameters = list(model.parameters())

    def trace():
        state = [(id(p), p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
        return state, [module.training for module in model.modules()], torch.get_rng_state()

    before = trace()
    fold(freezer)
    for was, now in zip(before[0], trace()[0], strict=True):
        assert was[:2] == now[:2]
        assert was[2] is now[2] is None or torch.equal(was[2], now[2])
    assert before[1] == trace()[1]
    assert torch.equal(before[2], trace()[2])
    assert all(not module._forward_hooks for module in model.modules())
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))


def test_a_layer_of_which_one_matrix_still_trains_is_left_alone():
    model, freezer = prepared(unit="matrix", frozen=(0, 2))
    assert [unit.name.rsplit(".", 3)[-3] for unit in freezer.units[:4]] == ["lora_A", "lora_B"] * 2
    assert fold(freezer) == fold(freezer)
    assert folded_layers(model) == []
    freeze(freezer, (0, 1, 2))
    assert fold(freezer).folded == (next(iter(tuner_layers(model))),)


def test_modules_fold_one_by_one():
    model, freezer = prepared(unit="module", frozen=(3,))
    before = logits(model)
    assert len(fold(freezer).folded) == 1
    assert torch.allclose(logits(model), before, atol=1e-5)


def test_a_layer_on_which_another_adapter_trains_is_left_alone():
    model, freezer = prepared()
    with warnings.catch_warnings(action="ignore"):
        model.add_adapter("other", LoraConfig(target_modules=["query"], r=2))
        model.base_model.set_adapter(["default", "other"])
    freeze(freezer, (0, 1))
    folding = fold(freezer)
    assert folding.folded and not folding.refused
    assert not any(name.endswith("query") for name in folding.folded)


def test_a_live_matrix_whose_gradient_is_off_for_now_counts_as_live():
    model, freezer = prepared(unit="matrix", frozen=(0,))
    model.requires_grad_(False)
    assert fold(freezer) == Folding((), {})


def test_an_adapter_that_the_freezer_does_not_know_is_left_alone():
    model = attach(tiny_model(), copy.deepcopy(METHODS["lora"])).model
    unknown = [name for name in tuner_layers(model) if ".layer.0." in name]
    for name in unknown:
        model.get_submodule(name).requires_grad_(False)
    batch = tiny_batch()
    units = find_units(model, lambda: model(**batch))
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    freezer = Freezer(model, units, optimizer, [batch], loss_of)
    freeze(freezer, (0, 1))
    folding = fold(freezer)
    assert folding.folded and not folding.refused
    assert not set(folding.folded) & set(unknown)


def test_a_layer_that_is_switched_off_is_left_alone():
    model, freezer = prepared()
    with model.disable_adapter():
        assert fold(freezer).folded == ()
    freeze(freezer, (0, 1))
    assert fold(freezer).folded


def test_an_adapter_that_is_not_finite_stays_and_the_others_fold():
    model, freezer = prepared()
    weights = base_weights(model)
    # The last frozen one, as all that comes after it is not finite either.
    broken = layers_of(freezer)[-1]
    layer = model.get_submodule(broken)
    with torch.no_grad():
        layer.lora_A["default"].weight[0, 0] = torch.nan
    folding = fold(freezer)
    assert list(folding.refused) == [broken]
    assert "NaNs detected in the merged weights" in folding.refused[broken]
    assert broken not in folding.folded and len(folding.folded) == 11
    assert fold(freezer).refused == {}
    unfold(model)
    assert equal(base_weights(model), weights)


def test_a_layer_whose_input_is_not_finite_stays():
    model, freezer = prepared()
    broken, after, *_ = layers_of(freezer)[-2:]
    with torch.no_grad():
        model.get_submodule(broken).lora_A["default"].weight[0, 0] = torch.nan
    assert fold(freezer).refused[after] == "its output is not finite"


@pytest.mark.parametrize(
    "config",
    [
        peft.LilyConfig(target_modules=["query", "value"], r=4, stride_A=1),
        peft.LNTuningConfig(target_modules=["LayerNorm"]),
        LoraConfig(target_modules=["query"], alora_invocation_tokens=[7]),
    ],
    ids=["lily", "ln_tuning", "alora"],
)
def test_a_method_that_cannot_merge_stays(config):
    model, freezer = prepared(config, frozen=range(3))
    weights, before = base_weights(model), logits(model)
    folding = fold(freezer)
    assert folding.folded == ()
    assert list(folding.refused) == layers_of(freezer)
    assert {reason.startswith("PEFT cannot merge") for reason in folding.refused.values()} == {True}
    assert equal(base_weights(model), weights)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("tied", ["weight", "layer"])
def test_a_tied_base_weight_stays(tied):
    base = tiny_model()
    first, last = base.bert.encoder.layer[0].attention.self, base.bert.encoder.layer[2].attention.self
    if tied == "weight":
        last.key.weight = first.query.weight
    else:
        last.key = first.query
    _, freezer = prepared(LoraConfig(target_modules=["query", "value"], r=4), base=base)
    folding = fold(freezer)
    assert [name.rsplit("layer.", 1)[1] for name in folding.refused] == ["0.attention.self.query"]
    assert "used elsewhere" in next(iter(folding.refused.values()))


def test_a_weight_that_is_not_a_plain_tensor_stays():
    class Quantised(nn.Parameter):
        pass

    model, freezer = prepared()
    name, layer = next(iter(tuner_layers(model).items()))
    layer.base_layer.weight = Quantised(layer.base_layer.weight.detach(), requires_grad=False)
    folding = fold(freezer)
    assert "quantised" in folding.refused[name]
    assert len(folding.refused) == 1


def test_a_parameter_that_is_adapted_stays():
    config = LoraConfig(target_modules=[], target_parameters=["query.weight"], r=4)
    _, freezer = prepared(config)
    assert {"not a plain layer" in reason for reason in fold(freezer).refused.values()} == {True}


def test_an_attention_module_of_torch_stays():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x, x, x)[0]
            return x

    model = peft.get_peft_model(Attention(), LoraConfig(target_modules=["layers.0", "layers.1"], r=2))
    batch = {"x": torch.randn(4, 3, 8)}
    units = find_units(model, lambda: model(**batch))
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    freezer = Freezer(model, units, optimizer, [batch], lambda model, batch: model(**batch).square().mean())
    weights, before = copy.deepcopy(model.state_dict()), model(**batch)
    freeze(freezer, (0, 1))
    folding = fold(freezer)
    assert not folding.folded and folding.refused
    assert equal(model.state_dict(), weights)
    assert torch.equal(model(**batch), before)


def test_a_layer_that_peft_has_merged_stays():
    model, freezer = prepared()
    name, layer = next(iter(tuner_layers(model).items()))
    layer.merge()
    assert fold(freezer).refused == {name: "it is merged already"}


def test_a_layer_whose_forward_is_replaced_stays():
    model, freezer = prepared()
    name, layer = next(iter(tuner_layers(model).items()))
    layer.forward = layer.forward
    assert list(fold(freezer).refused) == [name]


def test_a_layer_that_does_not_run_stays():
    model, freezer = prepared()
    name, layer = next(iter(tuner_layers(model).items()))
    attention = model.get_submodule(name.rpartition(".")[0])
    attention.spare, attention.query = layer, nn.Linear(16, 16)
    refused = fold(freezer).refused
    assert {key.rpartition(".")[2]: reason for key, reason in refused.items()} == {
        "spare": "it does not run in the model's forward pass"
    }


def test_bfloat16_rounds_too_much_unless_the_tolerance_says_otherwise():
    model, freezer = prepared(base=tiny_model().to(torch.bfloat16))
    weights = base_weights(model)
    folding = fold(freezer)
    assert folding.folded == ()
    assert list(folding.refused) == layers_of(freezer)
    (reason,) = set(folding.refused.values())
    assert "bfloat16" in reason and "the tolerance is 1.0e-04" in reason
    assert fold(freezer).refused == {}
    assert len(fold(freezer, tolerance=0.05).folded) == 12
    unfold(model)
    assert equal(base_weights(model), weights)
    assert fold(freezer).refused == folding.refused


def test_the_precision_of_the_pass_counts():
    def autocast_loss(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return model(**batch).loss

    model, freezer = prepared(loss_function=autocast_loss)
    assert fold(freezer).folded == ()
    assert fold(freezer, tolerance=0.05).folded
    with torch.autocast("cpu", torch.bfloat16):
        assert logits(model).isfinite().all()


@pytest.mark.parametrize("tolerance", [0.0, -1.0, float("nan")])
def test_a_tolerance_must_be_positive(tolerance):
    _, freezer = prepared()
    with pytest.raises(ValueError, match="fold tolerance: must be positive"):
        fold(freezer, tolerance=tolerance)


def test_adapted_embeddings_fold():
    model, freezer = prepared(LoraConfig(target_modules=["word_embeddings", "query"], r=4), frozen=(0, 1, 2, 3))
    before = logits(model)
    assert any(name.endswith("word_embeddings") for name in fold(freezer).folded)
    assert torch.allclose(logits(model), before, atol=1e-5)


def test_the_check_runs_once_on_a_few_rows_without_a_graph():
    passes = []

    def counted_loss(model, batch):
        passes.append((len(batch["input_ids"]), torch.is_grad_enabled(), model.training))
        return model(**batch).loss

    model, freezer = prepared(loss_function=counted_loss)
    model.train()
    passes.clear()
    fold(freezer)
    fold(freezer)
    assert passes == [(MAX_ROWS, False, False)]


def test_a_layer_that_runs_several_times_is_judged_by_all_of_them():
    def loss_of_two_passes(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(**batch).loss
        return rounded + model(**batch).loss

    _, freezer = prepared(loss_function=loss_of_two_passes)
    assert fold(freezer).folded == ()


def test_hooks_on_a_layer_stay_where_they_are():
    class Counter:
        def __init__(self):
            self.count = 0

        def __deepcopy__(self, memo):
            raise AssertionError("copied")

        def on_forward(self, *_):
            self.count += 1

    model, freezer = prepared()
    counter = Counter()
    for layer in tuner_layers(model).values():
        layer.register_forward_hook(counter.on_forward)
    assert fold(freezer).folded and counter.count == 19
    logits(model)
    assert counter.count == 38


def test_a_check_that_fails_leaves_everything_as_it_was():
    def failing_loss(model, batch):
        if failing:
            raise MemoryError
        return model(**batch).loss

    failing = False
    model, freezer = prepared(loss_function=failing_loss, frozen=(1,))
    weights, before = base_weights(model), logits(model)
    fold(freezer)
    there = folded_layers(model)
    freeze(freezer, (0, 1))
    failing = True
    with pytest.raises(MemoryError):
        fold(freezer)
    assert folded_layers(model) == there
    unfold(model)
    assert equal(base_weights(model), weights)
    assert torch.equal(logits(model), before)


def test_nothing_but_the_originals_is_kept():
    def num_bytes():
        gc.collect()
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in gc.get_objects()
            if issubclass(type(tensor), torch.Tensor)
        }
        return sum(storages.values())

    for method in ("lora", "hira"):
        model, freezer = prepared(METHODS[method])
        originals = {model.get_submodule(name).base_layer.weight.data_ptr() for name in layers_of(freezer)}
        logits(model)
        before = num_bytes()
        fold(freezer)
        assert {tensor.data_ptr() for tensor in kept_tensors(model)} == originals
        assert num_bytes() - before == sum(tensor.nbytes for tensor in kept_tensors(model))
        unfold(model)
        assert kept_tensors(model) == []
        assert num_bytes() == before


def test_a_resumed_run_folds_what_was_folded_without_another_check():
    def counted_loss(model, batch):
        passes.append(model)
        return model(**batch).loss

    passes = []
    model, freezer = prepared(base=tiny_model().to(torch.bfloat16), frozen=(0, 1))
    fold(freezer)
    change = sorted(folding_state(model)["changes"].values())[5]
    folding = fold(freezer, tolerance=change)
    assert len(folding.folded) == 6
    resumed, its_freezer = prepared(base=tiny_model().to(torch.bfloat16), frozen=(0, 1), loss_function=counted_loss)
    passes.clear()
    restore_folding(resumed, folding_state(model))
    assert fold(its_freezer, tolerance=change) == Folding((), {})
    assert not passes
    assert folded_layers(resumed) == folded_layers(model)
    assert equal(base_weights(resumed), base_weights(model))
    assert torch.equal(logits(resumed), logits(model))


def test_a_folding_state_of_other_layers_is_refused():
    model, freezer = prepared()
    fold(freezer)
    other, _ = prepared(METHODS["vera"])
    with pytest.raises(ValueError, match="other adapter layers"):
        restore_folding(other, folding_state(model))


def test_a_copy_of_a_folded_model_is_folded_by_itself():
    model, freezer = prepared()
    weights, before = base_weights(model), logits(model)
    fold(freezer)
    twin = copy.deepcopy(model)
    folded = logits(model)
    unfold(model)
    assert torch.equal(logits(twin), folded)
    assert folded_layers(twin) and not folded_layers(model)
    unfold(twin)
    assert equal(base_weights(twin), weights)
    assert torch.equal(logits(twin), before)


@pytest.mark.parametrize("method", ["lora", "dora", "loha", "ia3", "vera", "oft"])
@pytest.mark.parametrize("ending", ["merge_and_unload", "unload"])
def test_a_folded_model_ends_as_an_unfolded_one(method, ending):
    plain, _ = prepared(METHODS[method])
    model, freezer = prepared(METHODS[method])
    fold(freezer)
    with warnings.catch_warnings(action="error"):
        assert equal(getattr(model, ending)().state_dict(), getattr(plain, ending)().state_dict())


def test_merging_by_peft_does_not_add_the_update_twice():
    model, freezer = prepared()
    before = logits(model)
    fold(freezer)
    model.merge_adapter()
    assert folded_layers(model) == []
    assert torch.allclose(logits(model), before, atol=1e-5)


def test_unmerging_by_peft_restores_the_bits():
    model, freezer = prepared(frozen=(0, 1, 2))
    weights = base_weights(model)
    fold(freezer)
    with warnings.catch_warnings(action="ignore"):
        model.unmerge_adapter()
    assert folded_layers(model) == []
    assert equal(base_weights(model), weights)


@pytest.mark.parametrize("targets", [LINEAR, ["word_embeddings", "query"]], ids=["linear", "embeddings"])
def test_what_is_saved_is_what_is_saved_without_a_fold(tmp_path, targets):
    model, freezer = prepared(LoraConfig(target_modules=targets, r=4))
    model.save_pretrained(tmp_path / "plain", save_embedding_layers=True)
    fold(freezer)
    model.save_pretrained(tmp_path / "folded", save_embedding_layers=True)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "folded" / file).read_bytes()
    assert load_file(tmp_path / "folded" / "adapter_model.safetensors")


def test_loading_weights_unfolds_the_layers_they_are_of():
    model, freezer = prepared()
    plain, _ = prepared()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "lora_B" in name:
                parameter.mul_(2)
    fold(freezer)
    model.load_state_dict({n: t for n, t in plain.state_dict().items() if "classifier" in n}, strict=False)
    assert len(folded_layers(model)) == 12
    model.load_state_dict({n: t for n, t in plain.state_dict().items() if ".layer.0." in n}, strict=False)
    assert len(folded_layers(model)) == 6
    model.load_state_dict(plain.state_dict())
    assert folded_layers(model) == []
    assert torch.equal(logits(model), logits(plain))


def test_another_adapter_is_added_to_the_original_weight():
    model, freezer = prepared()
    plain, _ = prepared()
    fold(freezer)
    for one in (model, plain):
        with warnings.catch_warnings(action="ignore"):
            # Takes its start out of the base weight.
            one.add_adapter("other", LoraConfig(target_modules=LINEAR, r=2, init_lora_weights="pissa"))
    assert folded_layers(model) == []
    assert equal(base_weights(model), base_weights(plain))


def test_setting_another_adapter_unfolds():
    model, freezer = prepared()
    model.add_adapter("other", LoraConfig(target_modules=["query"], r=2))
    freeze(freezer, (0, 1))
    weights, before = base_weights(model), logits(model)
    assert fold(freezer).folded
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("other")
    assert folded_layers(model) == []
    assert equal(base_weights(model), weights)
    model.set_adapter("default")
    assert torch.equal(logits(model), before)


def test_a_folded_adapter_is_deleted_once_it_is_unfolded():
    model, freezer = prepared()
    weights = base_weights(model)
    fold(freezer)
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("default")
    unfold(model)
    model.delete_adapter("default")
    assert equal(base_weights(model), weights)


@pytest.mark.parametrize(
    ("change", "arguments"),
    [
        ("delete_adapter", ["default"]),
        ("set_scale", ["default", 2.0]),
        ("scale_layer", [2.0]),
        ("unscale_layer", [2.0]),
    ],
)
def test_what_changes_an_adapter_unfolds_its_layer(change, arguments):
    model, freezer = prepared()
    plain, _ = prepared()
    fold(freezer)
    for one in (model, plain):
        getattr(next(iter(tuner_layers(one).values())), change)(*arguments)
    assert len(folded_layers(model)) == 11
    unfold(model)
    assert torch.equal(logits(model), logits(plain))


def test_adapters_cannot_be_mixed_in_a_batch_over_a_fold():
    model, freezer = prepared()
    fold(freezer)
    with pytest.raises(ValueError, match="adapter_names"):
        model(**tiny_batch(), adapter_names=["default", "default", "__base__", "__base__"])


def test_a_model_that_changes_its_dtype_unfolds_to_what_it_would_be():
    model, freezer = prepared()
    plain, _ = prepared()
    fold(freezer)
    model.to(torch.bfloat16)
    unfold(model)
    assert equal(base_weights(model), base_weights(plain.to(torch.bfloat16)))


@pytest.mark.slow
def test_a_compiled_model_folds():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    model, freezer = prepared()
    compiled = torch.compile(model, backend=backend)
    before = logits(compiled)
    num_graphs = len(graphs)
    freezer.model = compiled
    assert fold(freezer).folded
    # The check itself compiles nothing; the next pass does.
    assert len(graphs) == num_graphs > 0
    after = logits(compiled)
    assert len(graphs) > num_graphs
    assert torch.allclose(after, before, atol=1e-5)
    assert torch.equal(after, logits(model))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_originals_are_on_the_host():
    model, freezer = prepared(base=tiny_model().cuda())
    weights = base_weights(model)
    fold(freezer)
    assert {tensor.device.type for tensor in kept_tensors(model)} == {"cpu"}
    unfold(model)
    assert equal(base_weights(model), weights)
