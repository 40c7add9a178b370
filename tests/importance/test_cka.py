"""CKA on models: the pre-trained reference, the reference without one adapter, sites, padding, memory."""

from __future__ import annotations

import copy
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import LlamaConfig, LlamaForCausalLM

from safe_lab.importance import METRICS
from safe_lab.importance.probe import Probe, undisturbed
from safe_lab.units import Unit, switched_off

CKA = METRICS["cka"]
both_references = pytest.mark.parametrize("reference", ["pretrained", "without_adapter"])


def importance(case, **options):
    """Scores of a case after some training."""
    with undisturbed(case.model):
        prepared = CKA.prepare(case.probe(), **options)
    case.train()
    with undisturbed(case.model):
        return CKA.score(case.probe(reference=prepared), **options)


def dense_importance(x, y):
    x, y = (z.double() - z.double().mean(0) for z in (x, y))
    return 1 - ((y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())).item()


def outputs(case, site, *, off=()):
    """Rows of a site's output over the probe, without padding, by a hook of the test's own."""
    rows = []
    handle = site.register_forward_hook(lambda module, inputs, output: rows.append(output.detach()))
    with undisturbed(case.model), torch.no_grad(), switched_off(off):
        for batch in case.batches:
            case.loss_function(case.model, batch)
    handle.remove()
    masks = [batch["attention_mask"].bool() if "attention_mask" in batch else slice(None) for batch in case.batches]
    return torch.cat([x[mask] for x, mask in zip(rows, masks, strict=True)])


@both_references
@pytest.mark.parametrize("hsic", ["biased", "debiased"])
def test_nothing_has_changed_before_training(case, reference, hsic):
    with undisturbed(case.model):
        prepared = CKA.prepare(case.probe(), reference=reference, hsic=hsic)
        assert CKA.score(case.probe(reference=prepared), reference=reference, hsic=hsic) == [0, 0, 0]


def test_score_is_one_minus_cka_with_the_model_whose_adapters_are_off(case):
    scores = importance(case)
    dense = [
        dense_importance(outputs(case, unit.site), outputs(case, unit.site, off=case.units)) for unit in case.units
    ]
    assert scores == pytest.approx(dense, abs=1e-6)
    assert min(scores) > 0


def test_without_adapter_compares_with_the_layer_run_again_on_the_same_input(bare):
    scores = importance(bare, reference="without_adapter")
    x = torch.cat([batch["x"] for batch in bare.batches])
    bare.model.eval()
    for layer, score in zip(bare.model, scores, strict=True):
        after = layer(x).detach()
        with layer.off():
            assert score == pytest.approx(dense_importance(after, layer(x).detach()), abs=1e-6)
        x = after


def test_change_below_counts_against_the_pretrained_model_but_not_without_the_adapter(bare):
    with undisturbed(bare.model):
        prepared = CKA.prepare(bare.probe())
    with torch.no_grad():
        bare.model[0].adapter.weight.add_(torch.randn(4, 4))
    with undisturbed(bare.model):
        pretrained = CKA.score(bare.probe(reference=prepared))
        without_adapter = CKA.score(bare.probe(), reference="without_adapter")
    assert min(pretrained) > 1e-3
    assert without_adapter[0] > 1e-3
    assert without_adapter[1:] == [0, 0]


@both_references
@pytest.mark.parametrize("pooling", ["tokens", "first"])
def test_padding_tokens_do_not_matter(bert, reference, pooling):
    other = copy.copy(bert)
    other.batches = []
    for batch in bert.batches:
        padding = 3 * torch.ones(len(batch["labels"]), 2, dtype=torch.long)
        changed = batch["input_ids"].where(batch["attention_mask"].bool(), torch.tensor(7))
        other.batches.append(
            {
                "input_ids": torch.cat([changed, padding], dim=1),
                "attention_mask": torch.cat([batch["attention_mask"], 0 * padding], dim=1),
                "labels": batch["labels"],
            }
        )
    options = {"reference": reference, "pooling": pooling}
    with undisturbed(bert.model):
        prepared = [CKA.prepare(case.probe(), **options) for case in (bert, other)]
    bert.train()
    with undisturbed(bert.model):
        plain, padded = (
            CKA.score(case.probe(reference=y), **options) for case, y in zip((bert, other), prepared, strict=True)
        )
    assert padded == pytest.approx(plain, rel=1e-3)


@both_references
def test_units_at_one_site_read_it_once(bare, reference):
    weight, bias = bare.units[2].parameters.items()
    halves = [replace(bare.units[2], name=name, parameters=dict([item])) for name, item in (("w", weight), ("b", bias))]
    whole = importance(bare, reference=reference)
    bare.units = [*bare.units[:2], *halves]
    with undisturbed(bare.model), switched_off(bare.units):
        prepared = CKA.prepare(bare.probe(reference_is_current=True), reference=reference)
    with undisturbed(bare.model):
        scores = CKA.score(bare.probe(reference=prepared), reference=reference)
    assert scores == pytest.approx([*whole, whole[2]], abs=1e-9)
    if reference == "pretrained":
        assert prepared.num_blocks(bare.model[2]) == len(bare.batches)


def test_site_inside_another_site_is_not_read_when_the_outer_one_runs_again(bare):
    inner = replace(bare.units[2], name="inner", site=bare.model[2].base)
    alone = importance(bare, reference="without_adapter")
    bare.units = [*bare.units, inner]
    with undisturbed(bare.model):
        nested = CKA.score(bare.probe(), reference="without_adapter")
    assert nested[:3] == alone
    assert nested[3] == 0


def test_hook_that_adapts_an_output_counts_in_both_runs_of_a_site(bare):
    bare.model[1].register_forward_hook(lambda module, inputs, output: output**3)
    bare.train()
    with undisturbed(bare.model):
        scores = CKA.score(bare.probe(), reference="without_adapter")
        with switched_off(bare.units[1:2]):
            again = CKA.score(bare.probe(), reference="without_adapter")
    assert scores[1] > 0
    assert again[1] == 0


def test_decoder_layer_run_again_does_not_see_its_own_keys_twice():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        use_cache=True,
    )
    model = LlamaForCausalLM(config)

    @contextmanager
    def nothing():
        yield

    units = [Unit(f"{i}", i, {}, site=layer, switch_off=nothing) for i, layer in enumerate(model.model.layers)]
    ids = torch.randint(0, 20, (2, 6))
    # With padding the attention mask is a tensor, whose shape doubled keys would not fit.
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    batch = {"input_ids": ids, "attention_mask": mask}
    probe = Probe(model, units, [batch], lambda model, batch: model(**batch, labels=ids).loss)
    with undisturbed(model):
        assert CKA.score(probe, reference="without_adapter") == [0, 0]


def test_reference_is_taken_as_the_model_stands_where_switching_off_does_not_give_it(bare):
    with torch.no_grad():
        bare.model[0].adapter.weight.normal_()
    with undisturbed(bare.model):
        off = CKA.prepare(bare.probe())
        current = CKA.prepare(bare.probe(reference_is_current=True))
        assert CKA.score(bare.probe(reference=off))[0] > 1e-3
        assert CKA.score(bare.probe(reference=current)) == [0, 0, 0]


@both_references
@pytest.mark.parametrize("hsic", ["biased", "debiased"])
def test_bfloat16_model_is_scored_as_its_activations_in_float64_are(bare, reference, hsic):
    bare.model.to(torch.bfloat16)
    bare.batches = [{name: tensor.bfloat16() for name, tensor in batch.items()} for batch in bare.batches]
    with undisturbed(bare.model):
        prepared = CKA.prepare(bare.probe(), reference=reference, hsic=hsic)
        assert CKA.score(bare.probe(reference=prepared), reference=reference, hsic=hsic) == [0, 0, 0]
    bare.train()
    with undisturbed(bare.model):
        scores = CKA.score(bare.probe(reference=prepared), reference=reference, hsic=hsic)
    if (reference, hsic) == ("pretrained", "biased"):
        dense = [dense_importance(outputs(bare, u.site), outputs(bare, u.site, off=bare.units)) for u in bare.units]
        assert scores == pytest.approx(dense, abs=1e-9)
    assert min(scores) > 0


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor made inside."""

    num_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() for x in tree_iter(result) if isinstance(x, torch.Tensor)]
        self.num_bytes = max([self.num_bytes, *sizes])
        return result


@both_references
@pytest.mark.parametrize("hsic", ["biased", "debiased"])
@pytest.mark.parametrize("num_batches", [1, 20])
def test_no_tensor_grows_with_the_number_of_probe_rows(bare_of_size, reference, hsic, num_batches):
    num_features, batch_rows = 4, 50
    case = bare_of_size(num_features, num_rows=[batch_rows] * num_batches)
    with LargestTensor() as largest:
        importance(case, reference=reference, hsic=hsic)
    assert largest.num_bytes == batch_rows * num_features * torch.float64.itemsize


def test_site_that_runs_twice_in_a_pass_gives_the_rows_of_both_calls(bare):
    shared = bare.model[0]
    bare.model.append(shared)
    scores = importance(bare)
    assert scores[0] > 0
    bare.model[0].adapter.weight.data.zero_()
    bare.model[0].adapter.bias.data.zero_()
    with undisturbed(bare.model):
        prepared = CKA.prepare(bare.probe())
    assert prepared.num_blocks(shared) == 2 * len(bare.batches)


@both_references
def test_probe_runs_without_a_graph(bare, reference):
    def loss_function(model, batch):
        assert not torch.is_grad_enabled()
        return model(batch["x"]).mean()

    probe = bare.probe(loss_function=loss_function)
    CKA.score(replace(probe, reference=CKA.prepare(probe)), reference=reference)


def test_reference_that_does_not_fit_on_the_disk_is_an_error_before_training(bare, monkeypatch):
    def fail(data):
        raise OSError(28, "No space left on device")

    disk = SimpleNamespace(write=fail, close=lambda: None)
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: disk)
    with pytest.raises(OSError, match="No space left"):
        CKA.prepare(bare.probe())


def test_unit_without_a_site_is_refused(bare):
    bare.units = [bare.units[0], replace(bare.units[1], site=None)]
    with pytest.raises(ValueError, match="unit 1 has no site"):
        CKA.prepare(bare.probe())


def test_unit_that_cannot_be_switched_off_is_refused(bare):
    bare.units = [bare.units[0], replace(bare.units[1], switch_off=None)]
    for call in (CKA.prepare, CKA.score):
        with pytest.raises(ValueError, match="unit 1 cannot be switched off"):
            call(bare.probe(), reference="pretrained" if call == CKA.prepare else "without_adapter")
    assert not any(module._forward_hooks for module in bare.model.modules())


def test_site_that_never_runs_is_refused(bare):
    bare.units = [*bare.units, Unit("idle", 3, {}, site=nn.Identity(), switch_off=bare.model[0].off)]
    for reference in ("pretrained", "without_adapter"):
        with pytest.raises(ValueError, match="unit idle"):
            importance(bare, reference=reference)


def test_score_without_a_prepared_reference_is_refused(bare):
    with pytest.raises(ValueError, match="before training"):
        CKA.score(bare.probe())


def test_probe_that_has_changed_since_is_refused(bare):
    prepared = CKA.prepare(bare.probe())
    for batches in ([*bare.batches, bare.batches[0]], list(reversed(bare.batches)), bare.batches[:1]):
        with pytest.raises(RuntimeError, match="probe changed"):
            CKA.score(bare.probe(reference=prepared, batches=batches))
