"""What every metric promises, whatever it computes."""

from __future__ import annotations

import copy
import itertools
import math
import random

import numpy as np
import pytest
import torch
from parallel import in_processes

from safe_lab.importance import METRICS
from safe_lab.importance.probe import Probe, share_of, undisturbed


def all_variants():
    for name, metric in METRICS.items():
        choices = [values[:1] if isinstance(values[0], float) else values for values in metric.options.values()]
        for combination in itertools.product(*choices):
            options = dict(zip(metric.options, combination, strict=True))
            yield pytest.param(name, options, id="-".join([name, *map(str, combination)]))


every_metric = pytest.mark.parametrize(("name", "options"), list(all_variants()))


def trained_probe(case, name, options) -> Probe:
    with undisturbed(case.model):
        reference = METRICS[name].prepare(case.probe(), **options)
    case.train()
    return case.probe(reference=reference, scoring=1)


def score(probe, name, options, **changes):
    """Scores from a copy of the memory, so that it can be done again from the same state."""
    arguments = vars(probe) | {"memory": copy.deepcopy(probe.memory)} | changes
    with undisturbed(probe.model):
        return METRICS[name].score(Probe(**arguments), **options)


@every_metric
def test_scores_are_finite_and_one_for_each_unit(case, name, options):
    scores = score(trained_probe(case, name, options), name, options)
    assert len(scores) == len(case.units)
    assert all(type(value) is float and math.isfinite(value) for value in scores)


@every_metric
def test_same_state_gives_same_scores(case, name, options):
    probe = trained_probe(case, name, options)
    assert score(probe, name, options) == score(probe, name, options)


@every_metric
def test_units_are_told_apart(case, name, options):
    scores = score(trained_probe(case, name, options), name, options)
    assert len(set(scores)) == len(scores)


@every_metric
def test_scores_follow_the_order_of_units(case, name, options):
    probe = trained_probe(case, name, options)
    reverse = score(probe, name, options, units=list(reversed(case.units)))
    assert reverse[::-1] == pytest.approx(score(probe, name, options), rel=1e-6)


@every_metric
def test_score_of_a_unit_does_not_depend_on_which_others_are_asked_for(case, name, options):
    probe = trained_probe(case, name, options)
    everyone = score(probe, name, options)
    assert score(probe, name, options, units=case.units[1:2]) == pytest.approx(everyone[1:2], rel=1e-6)


@every_metric
def test_no_unit_no_score(case, name, options):
    assert score(trained_probe(case, name, options), name, options, units=[]) == []


@every_metric
def test_frozen_unit_scores_as_a_live_one(case, name, options):
    probe = trained_probe(case, name, options)
    live = score(probe, name, options)
    for parameter in case.units[0].parameters.values():
        parameter.requires_grad_(False)
    assert score(probe, name, options) == pytest.approx(live, rel=1e-6)


@every_metric
def test_model_is_as_it_was(case, name, options):
    probe = trained_probe(case, name, options)
    case.model.train()
    case.model.get_submodule("0" if hasattr(case.model, "0") else "base_model").eval()
    case.loss_function(case.model, case.batches[0]).backward()
    for parameter in case.units[0].parameters.values():
        parameter.requires_grad_(False)
    state = {key: value.clone() for key, value in case.model.state_dict().items()}
    gradients = [
        (p, p.requires_grad, p.grad, None if p.grad is None else p.grad.clone()) for p in case.model.parameters()
    ]
    modes = [module.training for module in case.model.modules()]

    score(probe, name, options)

    assert all(torch.equal(value, state[key]) for key, value in case.model.state_dict().items())
    for parameter, requires_grad, grad, grad_value in gradients:
        assert parameter.requires_grad == requires_grad
        assert parameter.grad is grad
        assert grad is None or torch.equal(grad, grad_value)
    assert [module.training for module in case.model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in case.model.modules())


@every_metric
def test_random_streams_are_as_they_were(case, name, options):
    probe = trained_probe(case, name, options)
    before = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
    score(probe, name, options)
    assert random.getstate() == before[0]
    assert str(np.random.get_state()) == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


@every_metric
def test_optimizer_is_as_it_was(case, name, options):
    probe = trained_probe(case, name, options)
    before = copy.deepcopy(case.optimizer.state_dict())
    score(probe, name, options)
    torch.testing.assert_close(case.optimizer.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["cka", "sensitivity", "contribution", "update_norm", "gradient_ratio"])
def test_nan_is_not_hidden(bare, name):
    probe = trained_probe(bare, name, {})
    with torch.no_grad():
        for parameter in bare.units[0].parameters.values():
            parameter.fill_(math.nan)
    assert math.isnan(score(probe, name, {})[0])


@pytest.mark.parametrize("name", list(METRICS))
def test_defaults_are_those_of_the_table(case, name):
    metric = METRICS[name]
    defaults = {key: values[0] for key, values in metric.options.items()}
    probe = trained_probe(case, name, {})
    assert score(probe, name, {}) == score(probe, name, defaults)


def test_unknown_option_is_answered_with_the_near_name(bare):
    with pytest.raises(ValueError, match="did you mean pooling"):
        METRICS["cka"].prepare(bare.probe(), poling="first")


def test_value_that_is_not_allowed_is_answered_with_those_that_are(bare):
    with pytest.raises(ValueError, match="one of tokens, first, got cls"):
        METRICS["cka"].prepare(bare.probe(), pooling="cls")
    with pytest.raises(ValueError, match=r"beta1: must lie between 0.0 and 1.0, got 1"):
        METRICS["sensitivity"].score(bare.probe(), smoothing=True, beta1=1)


@every_metric
def test_processes_together_score_as_one_does(case, name, options):
    """Batches of 3 and 2, or 5 and 3 examples, so that of four processes some have none."""

    def score_together(processes):
        shares = {"batches": [share_of(batch, processes) for batch in case.batches], "processes": processes}
        with undisturbed(case.model):
            reference = METRICS[name].prepare(case.probe(**shares), **options)
        case.train()
        return score(case.probe(**shares, reference=reference, scoring=1), name, options)

    scores = in_processes(score_together, count=4)
    assert scores[1:] == scores[:-1]
    # Only now, as each of them was forked with an untrained case.
    alone = score(trained_probe(case, name, options), name, options)
    # A rise of the loss is no more exact than the loss, nor 1 - CKA, of activations in float32, than a CKA near one.
    exact = {"contribution": 1e-6, "cka": 1e-8}.get(name, 1e-12)
    assert scores[0] == pytest.approx(alone, rel=1e-6, abs=exact)
