from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel
from tiny import FAMILIES, tiny_batch, tiny_model

from safe_lab.adapters import attach, build_peft_config, find_units, save_adapter, tuner_layers
from safe_lab.importance import METRICS
from safe_lab.importance.probe import Probe
from safe_lab.model import checkpoint_gradients, head_modules
from safe_lab.units import switched_off


def build(family="bert", *, granularity="layer", method="lora", **settings):
    base = tiny_model(family)
    settings.setdefault("target_modules", FAMILIES[family][2])
    attached = attach(base, build_peft_config(method, head_modules=head_modules(base), **settings))
    attached.model.eval()
    batch = tiny_batch()
    return attached, find_units(attached.model, lambda: attached.model(**batch), granularity)


def test_every_family_has_one_unit_a_layer_in_order_of_execution(family):
    attached, units = build(family)
    assert [unit.depth for unit in units] == [0, 1, 2]
    assert [int(unit.name.rsplit(".", 1)[1]) for unit in units] == [0, 1, 2]
    trained = {id(p) for unit in units for p in unit.parameters.values()}
    adapters = {id(p) for layer in tuner_layers(attached.model).values() for p in layer.parameters() if p.requires_grad}
    assert trained == adapters


def test_every_new_module_outside_the_body_trains(family):
    attached, units = build(family)
    in_units = {id(p) for unit in units for p in unit.parameters.values()}
    others = {name for name, p in attached.model.named_parameters() if p.requires_grad and id(p) not in in_units}
    assert others
    assert all("modules_to_save" in name for name in others)
    body = attached.model.base_model.model.base_model
    assert not {id(p) for p in body.parameters() if p.requires_grad} - in_units


def test_order_is_that_of_the_forward_pass_and_not_of_names():
    base = tiny_model("bert")
    layers = base.bert.encoder.layer
    attached = attach(base, LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    batch = tiny_batch()

    def run_backwards():
        hidden = attached.model.base_model.model.bert.embeddings(batch["input_ids"])
        for layer in reversed(layers):
            output = layer(hidden)
            hidden = output[0] if isinstance(output, tuple) else output

    units = find_units(attached.model, run_backwards)
    assert [unit.name.rsplit(".", 1)[1] for unit in units] == ["2", "1", "0"]


def test_finer_units_cover_the_same_weights():
    _, layers = build()
    _, modules = build(granularity="module")
    _, matrices = build(granularity="matrix")
    assert (len(layers), len(modules), len(matrices)) == (3, 6, 12)
    assert (
        sum(u.num_parameters for u in layers)
        == sum(u.num_parameters for u in modules)
        == sum(u.num_parameters for u in matrices)
    )
    assert all(len(unit.parameters) == 1 for unit in matrices)
    assert [unit.depth for unit in matrices] == list(range(12))


def test_switched_off_units_leave_the_pretrained_function_and_requires_grad():
    attached, units = build()
    batch = tiny_batch()
    with torch.no_grad():
        for unit in units:
            for parameter in unit.parameters.values():
                parameter.normal_()
        units[0].parameters[next(iter(units[0].parameters))].requires_grad = False
        flags = [p.requires_grad for p in attached.model.parameters()]
        with switched_off(units):
            off = attached.model(**batch).logits
        on = attached.model(**batch).logits
    torch.testing.assert_close(off, tiny_model("bert").eval()(**batch).logits)
    assert not torch.allclose(on, off)
    assert flags == [p.requires_grad for p in attached.model.parameters()]


def test_with_gradient_checkpointing_the_backward_pass_ends_above_a_frozen_prefix(family):
    attached, units = build(family)
    base = attached.model.base_model.model
    checkpoint_gradients(base)
    for unit in units[:2]:
        for parameter in unit.parameters.values():
            parameter.requires_grad = False
    needs_gradient = {}
    for unit in units:
        unit.site.register_forward_hook(
            lambda module, inputs, output, name=unit.depth: needs_gradient.__setitem__(
                name, (output if isinstance(output, torch.Tensor) else output[0]).requires_grad
            )
        )
    attached.model.train()
    attached.model(**tiny_batch()).loss.backward()
    assert needs_gradient == {0: False, 1: False, 2: True}
    assert base.is_gradient_checkpointing


def test_delta_weights_of_lora_are_scaling_b_a():
    attached, units = build(rank=2, alpha=6)
    layer = next(iter(tuner_layers(attached.model).values()))
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    expected = 3 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(next(units[0].delta_weights()), expected)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("lora", {"target_modules": "all-linear"}),
        ("lora", {"options": {"use_rslora": True}}),
        ("lora", {"options": {"use_dora": True}}),
        ("loha", {"rank": 2}),
        ("lokr", {"rank": 2}),
        ("ia3", {"options": {"feedforward_modules": []}}),
        ("vera", {"rank": 2}),
        ("oft", {"options": {"oft_block_size": 4}}),
        ("boft", {"options": {"boft_block_size": 4}}),
        ("hra", {"rank": 2}),
        ("ln_tuning", {"target_modules": ["LayerNorm"]}),
        ("fourierft", {"options": {"n_frequency": 8}}),
    ],
)
def test_peft_methods_become_units_that_train(method, settings):
    attached, units = build(method=method, **settings)
    attached.model(**tiny_batch()).loss.backward()
    assert all(p.grad is not None for unit in units for p in unit.parameters.values())
    probe = Probe(attached.model, units, [tiny_batch()], lambda m, b: m(**b).loss)
    start = METRICS["update_norm"].prepare(probe)
    with torch.no_grad():
        for unit in units:
            for p in unit.parameters.values():
                p.add_(0.1)
    assert all(norm > 0 for norm in METRICS["update_norm"].score(replace(probe, reference=start)))


def test_the_saved_adapter_loads_in_plain_peft_also_where_the_base_was_changed(tmp_path):
    for name, options in {
        "lora": {},
        "dora": {"use_dora": True},
        "pissa": {"init_lora_weights": "pissa"},
        "pissa-rslora": {"init_lora_weights": "pissa", "use_rslora": True},
    }.items():
        attached, units = build(options=options)
        assert (attached.initial is not None) == ("pissa" in name)
        optimizer = torch.optim.AdamW([p for p in attached.model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            attached.model(**tiny_batch()).loss.backward()
            optimizer.step()
        expected = attached.model(**tiny_batch()).logits
        save_adapter(attached.model, tmp_path / name, initial=attached.initial)
        loaded = PeftModel.from_pretrained(tiny_model("bert"), str(tmp_path / name)).eval()
        torch.testing.assert_close(loaded(**tiny_batch()).logits, expected, atol=1e-6, rtol=0)


def test_an_unknown_method_option_or_setting_is_named_with_the_near_name():
    with pytest.raises(ValueError, match="no method 'lorra'; did you mean lora"):
        build(method="lorra")
    with pytest.raises(ValueError, match="options.use_rslra: LoraConfig has no such argument; did you mean use_rslora"):
        build(options={"use_rslra": True})
    with pytest.raises(ValueError, match="adapter.rank: method ia3 has no such setting"):
        build(method="ia3", rank=4)
    with pytest.raises(ValueError, match="options.r: already set"):
        build(rank=4, options={"r": 8})


def test_a_magnitude_that_moves_is_an_update():
    attached, units = build(options={"use_dora": True})
    probe = Probe(attached.model, units, [tiny_batch()], lambda m, b: m(**b).loss)
    start = METRICS["update_norm"].prepare(probe)
    with torch.no_grad():
        for name, p in units[1].parameters.items():
            if "magnitude" in name:
                p.mul_(3)
    norms = METRICS["update_norm"].score(replace(probe, reference=start))
    assert norms[0] == norms[2] == 0
    assert norms[1] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"options": {"bias": "all"}}, "bias to none"),
        ({"options": {"bias": "foo"}}, "adapter: "),
        ({"options": {"init_lora_weights": "eva"}}, "computed from data"),
        ({"options": {"rank_pattern": 3}}, "adapter: "),
        ({"target_modules": "*query"}, "adapter: "),
        ({"target_modules": "["}, "adapter: "),
        ({"options": {"task_type": "X"}}, "already set"),
        ({"method": "xlora", "target_modules": None}, "adapter"),
        ({"method": "trainable_tokens"}, "adapter"),
    ],
)
def test_what_peft_cannot_take_is_told_as_bad_input(settings, message):
    with pytest.raises(ValueError, match=message):
        build(**settings)


def test_a_target_that_matches_nothing_is_named_with_what_there_is():
    with pytest.raises(
        ValueError, match=r"'querry'.* matches no module .*did you mean query.* linear modules are .*value"
    ):
        build(target_modules=["querry"])


def test_adapters_attach_to_a_model_without_weights(family):
    with torch.device("meta"):
        base = tiny_model(family)
        config = build_peft_config("lora", head_modules=head_modules(base), target_modules=FAMILIES[family][2])
        attached = attach(base, config)
    assert all(parameter.is_meta for parameter in attached.model.parameters())
    assert attached.initial is None
    weights, _ = build(family)
    shapes = {name: (p.shape, p.requires_grad) for name, p in weights.model.named_parameters()}
    assert {name: (p.shape, p.requires_grad) for name, p in attached.model.named_parameters()} == shapes


def test_prompt_methods_are_refused():
    with pytest.raises(ValueError, match="prompt_tuning"):
        build(method="prompt_tuning", target_modules=None, options={"num_virtual_tokens": 4})
