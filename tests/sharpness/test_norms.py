"""Sizes of adapters against values worked by hand."""

from __future__ import annotations

import pytest
import torch
from problems import seeded, transformer
from tiny import tiny_batch, tiny_model
from torch import nn

from safe_lab.adapters import attach, build_peft_config, find_units
from safe_lab.sharpness.norms import Norms, unit_norms
from safe_lab.units import Unit


def norms_of(*deltas, weights=(3.0, 4.0)) -> Norms:
    """Of a unit with these weights and updates."""
    parameter = nn.Parameter(torch.tensor(weights))
    unit = Unit("unit", 0, {"theta": parameter}, delta_weights=lambda: iter(deltas))
    return unit_norms([unit])["unit"]


def units_of(method, **settings):
    model = attach(tiny_model(), build_peft_config(method, **settings)).model
    return find_units(model, lambda: model(**tiny_batch()))


def test_worked_value_of_one_update():
    """Singular values 4 and 3: the norm is 5, and 25 / 16 directions act."""
    assert norms_of(torch.diag(torch.tensor([3.0, 4.0]))) == Norms(5, 5, 4, 25 / 16)


def test_worked_value_of_several_updates():
    """Squares 25 + 144, of which the largest of each 16 + 144."""
    norms = norms_of(torch.diag(torch.tensor([3.0, 4.0])), torch.diag(torch.tensor([0.0, 12.0])))
    assert norms.update == pytest.approx(13)
    assert norms.spectral == pytest.approx(12)
    assert norms.stable_rank == pytest.approx(169 / 160)


def test_update_of_lora_is_its_product_times_its_scale():
    """B = (3, 4)^T, A = (1, 0, ...), scale 4 / 2: 2 (3, 4)^T, whose norm is 10."""
    unit = units_of("lora", rank=2, alpha=4, target_modules=["query"])[0]
    with torch.no_grad():
        for name, parameter in unit.parameters.items():
            parameter.zero_()
            if "lora_A" in name:
                parameter[0, 0] = 1
            else:
                parameter[0, 0], parameter[1, 0] = 3, 4
    norms = unit_norms([unit])[unit.name]
    assert norms.weights == pytest.approx(26**0.5)
    assert (norms.update, norms.spectral, norms.stable_rank) == pytest.approx((10, 10, 1))


@pytest.mark.parametrize("shape", [(64, 100), (65, 65), (100, 80)])
@pytest.mark.parametrize("rank", [1, 4, 60])
def test_spectral_norm_of_large_updates_is_the_dense_one(shape, rank):
    update = torch.randn(shape[0], rank, generator=seeded()) @ torch.randn(rank, shape[1], generator=seeded(1))
    assert norms_of(update).spectral == pytest.approx(float(torch.linalg.matrix_norm(update, 2)), rel=1e-5)


def test_spectral_norm_of_an_update_that_takes_nothing_from_ones():
    """Its rows sum to zero, to the bit."""
    update = torch.zeros(80, 80)
    update[:, 0], update[:, 1] = 1, -1
    assert norms_of(update).spectral == pytest.approx(160**0.5)


def test_update_of_a_convolution_is_one_row_for_each_filter():
    """Of two filters, 2 high and 1 wide, over one channel."""
    assert norms_of(torch.tensor([[3.0, 0.0], [0.0, 4.0]]).view(2, 1, 2, 1)) == Norms(5, 5, 4, 25 / 16)


def test_update_of_a_vector_is_one_row():
    assert norms_of(torch.tensor([3.0, 4.0])) == Norms(5, 5, 5, 1)


def test_updates_norms_do_not_change_when_lora_is_rescaled():
    plain, rescaled = transformer(), transformer()
    with torch.no_grad():
        for name, parameter in rescaled.model.named_parameters():
            if "lora_A" in name:
                parameter.div_(3)
            elif "lora_B" in name:
                parameter.mul_(3)
    before, after = unit_norms(plain.units), unit_norms(rescaled.units)
    for name, norms in before.items():
        assert after[name].weights != pytest.approx(norms.weights, rel=0.1)
        for figure in ("update", "spectral", "stable_rank"):
            assert getattr(after[name], figure) == pytest.approx(getattr(norms, figure), rel=1e-10)


def test_zero_update_has_no_rank():
    assert norms_of(torch.zeros(3, 3)) == Norms(5, 0, 0, None)


def test_fresh_lora_has_weights_and_no_update():
    for norms in unit_norms(units_of("lora", rank=2, target_modules=["query", "value"])).values():
        assert norms.weights > 0
        assert (norms.update, norms.spectral, norms.stable_rank) == (0, 0, None)


def test_method_without_updates_has_weights_alone():
    units = units_of("ia3", target_modules=["key", "value"], options={"feedforward_modules": []})
    for norms in unit_norms(units).values():
        # Two vectors of 16 ones.
        assert norms == Norms(pytest.approx(32**0.5), None, None, None)


def test_half_precision_is_summed_in_float32():
    """In bfloat16, 1003 is 1004."""
    parameter = nn.Parameter(torch.ones(1003, dtype=torch.bfloat16))
    unit = Unit("unit", 0, {"theta": parameter}, delta_weights=lambda: iter([parameter.detach()[None]]))
    norms = unit_norms([unit])["unit"]
    assert (norms.weights, norms.update, norms.spectral) == pytest.approx((1003**0.5,) * 3, rel=1e-5)
