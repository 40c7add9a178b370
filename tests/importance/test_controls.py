"""The two controls: depth and random."""

from __future__ import annotations

import torch

from safe_lab.importance import METRICS

DEPTH, RANDOM = METRICS["depth"], METRICS["random"]


def test_deeper_is_more_important_and_the_first_is_not_zero(bare):
    assert DEPTH.score(bare.probe()) == [1, 2, 3]


def test_draws_differ_by_seed_scoring_and_unit(bare):
    draws = [RANDOM.score(bare.probe(seed=seed, scoring=scoring)) for seed in (0, 1) for scoring in (0, 1)]
    assert len({score for scores in draws for score in scores}) == 4 * 3


def test_draws_do_not_depend_on_global_streams_or_live_units(bare):
    everyone = RANDOM.score(bare.probe(seed=3))
    torch.manual_seed(99)
    assert RANDOM.score(bare.probe(seed=3, units=bare.units[1:])) == everyone[1:]


def test_draws_are_uniform(bare):
    draws = torch.tensor([RANDOM.score(bare.probe(scoring=scoring)) for scoring in range(500)])
    assert (draws >= 0).all()
    assert (draws < 1).all()
    histogram = draws.histc(10, 0, 1)
    assert (histogram - 150).abs().max() < 60


def test_draws_are_the_same_on_every_machine(bare):
    # A golden value: another rank, or a resumed run, must come to the same.
    assert RANDOM.score(bare.probe(seed=0, scoring=0))[0] == 0.5013997148167615
