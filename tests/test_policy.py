import math
import random
from itertools import accumulate, combinations

import pytest

from safe_lab.policy import (
    POLICIES,
    PredictedSavings,
    State,
    frozen_depth,
    importance_shares,
    normalize,
)
from safe_lab.policy.budget import assume_savings


def state(scores=(0.3, 0.1, 0.5, 0.2), level=0.25, frozen=(), warm=True, seed=0, savings=None, final_level=None):
    return State(list(scores), level, set(frozen), len(scores), warm, seed, savings, final_level)


def budget(scores, level, frozen=(), savings=None, final_level=None):
    return POLICIES["budget"].select(state(scores, level, frozen, savings=savings, final_level=final_level))


def best_saving(scores, level, frozen, savings):
    """The reference: every set of live units is looked at."""
    shares = importance_shares(scores)
    live = [unit for unit in range(len(scores)) if unit not in frozen]
    room = max(level - sum(shares[unit] for unit in frozen), 0) + 1e-12 * len(scores)
    return max(
        savings.of({*frozen, *chosen})
        for size in range(len(live) + 1)
        for chosen in combinations(live, size)
        if sum(shares[unit] for unit in chosen) <= room
    )


def drawn_case(seed, num_units=None):
    """Scores, level, frozen units and savings of every kind: few values and many, ties, zeros and negative scores."""
    draw = random.Random(seed)
    num_units = num_units or draw.randint(1, 9)
    scores = [
        draw.choice([draw.random(), draw.random() ** 2, draw.randint(0, 3), draw.randint(-1, 1)])
        for _ in range(num_units)
    ]
    most = draw.choice([1, 3, 10**12])
    elsewhere = [draw.randint(0, most) for _ in range(num_units)]
    by_depth = [0, *accumulate(draw.randint(0, draw.choice([1, 20]) * most) for _ in range(num_units))]
    frozen = {unit for unit in range(num_units) if draw.random() < draw.choice([0, 0.3])}
    level = draw.choice([0.0, 0.1, 0.25, 0.5, draw.random(), 1.0])
    return scores, level, frozen, PredictedSavings(by_depth, elsewhere)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("level", [0.0, 0.3, 0.5, 1.0])
def test_a_policy_returns_live_units_once_in_order_and_the_same_each_time(name, level):
    select = POLICIES[name].select
    chosen = select(state(level=level, frozen={1}))
    assert chosen == sorted(set(chosen))
    assert not set(chosen) & {1}
    assert set(chosen) <= set(range(4))
    assert chosen == select(state(level=level, frozen={1}))


@pytest.mark.parametrize("name", POLICIES)
def test_nothing_freezes_before_warm_up_has_ended(name):
    assert POLICIES[name].select(state(scores=(-1.0, -2.0, 0.0, 1.0), level=0.0, warm=False)) == []


@pytest.mark.parametrize("name", ["prefix", "random"])
def test_a_growing_share_freezes_a_growing_set_of_that_size(name):
    frozen = set()
    for share in (0.0, 0.2, 0.3, 0.7, 1.0):
        frozen |= set(POLICIES[name].select(state(scores=[0.0] * 10, level=share, frozen=frozen)))
        assert len(frozen) == round(share * 10)


def test_safe_freezes_strictly_below_the_threshold():
    assert POLICIES["safe"].select(state(level=0.2)) == [1]
    assert POLICIES["safe"].select(state(level=0.25)) == [1, 3]


def test_prefix_freezes_from_the_input():
    assert POLICIES["prefix"].select(state(level=0.5)) == [0, 1]


def test_random_order_depends_on_the_seed_alone():
    orders = {tuple(POLICIES["random"].select(state(scores=[0.0] * 12, level=0.25, seed=seed))) for seed in range(20)}
    assert len(orders) > 10


def test_all_freezes_everything_once_warm_and_nothing_before():
    assert POLICIES["all"].select(state(warm=False)) == []
    assert POLICIES["all"].select(state(frozen={2})) == [0, 1, 3]


def test_budget_saves_as_much_as_the_best_of_all_sets_within_it():
    for seed in range(400):
        scores, level, frozen, savings = drawn_case(seed)
        chosen = budget(scores, level, frozen, savings)
        assert savings.of({*frozen, *chosen}) == best_saving(scores, level, frozen, savings), seed


@pytest.mark.parametrize("num_units", [6, 40])
def test_the_importance_frozen_never_exceeds_the_budget(num_units):
    for seed in range(50):
        scores, level, frozen, savings = drawn_case(seed, num_units)
        shares = importance_shares(scores)
        chosen = budget(scores, level, frozen, savings)
        already = sum(shares[unit] for unit in frozen)
        assert already + sum(shares[unit] for unit in chosen) <= max(level, already) + 1e-9


def test_a_larger_budget_never_saves_less():
    for seed in range(50):
        scores, _, frozen, savings = drawn_case(seed, 10)
        found = [savings.of({*frozen, *budget(scores, level / 20, frozen, savings)}) for level in range(21)]
        assert found == sorted(found)


def test_a_unit_over_the_threshold_that_blocks_the_run_freezes():
    scores = [0.06, 0.01, 0.02, 0.31, 0.3, 0.3]
    assert POLICIES["safe"].select(state(scores, level=0.05)) == [1, 2]
    assert budget(scores, 0.1) == [0, 1, 2]


def test_a_cheap_unit_outside_the_run_gives_way_to_a_dear_one_in_it():
    # 0.3 buys the run of one unit, or both cheap units at the output.
    scores = [0.3, 0.45, 0.1, 0.15]
    assert budget(scores, 0.3) == [0]
    assert budget(scores, 0.3, savings=PredictedSavings([0, 10, 20, 30, 40], [1, 1, 6, 6])) == [2, 3]


def test_a_cheap_unit_does_not_freeze_early_where_the_run_needs_the_importance_later():
    scores = [0.3, 0.5, 0.2]
    assert budget(scores, 0.2) == [2]
    assert budget(scores, 0.2, final_level=0.3) == []
    assert budget(scores, 0.3, final_level=0.3) == [0]
    # The run of one unit saves more than either unit at the output, and less than both.
    savings = PredictedSavings([0, 8, 8, 8, 8], [0, 0, 7, 7])
    assert budget([0.26, 0.24, 0.25, 0.25], 0.27, savings=savings) == [0]
    assert budget([0.26, 0.24, 0.25, 0.25], 0.27, savings=savings, final_level=0.5) == [2]


def test_a_growing_budget_ends_with_the_best_set_for_its_final_value():
    for seed in range(200):
        scores, final, _, savings = drawn_case(seed)
        frozen = set()
        for level in (0.0, final / 3, final / 2, final):
            frozen |= set(budget(scores, level, frozen, savings, final_level=final))
        assert savings.of(frozen) == best_saving(scores, final, (), savings), seed


def test_a_frozen_unit_counts_with_its_share_and_a_spent_budget_freezes_only_what_is_free():
    assert budget([0.2, 0.3, 0.5], 0.5) == [0, 1]
    assert budget([0.2, 0.3, 0.5], 0.5, frozen={2}) == []
    assert budget([0.2, 0.0, 0.5, -1.0], 0.1, frozen={2}) == [1, 3]
    assert budget([0.2, 0.0, 0.8], 0.0) == [1]


def test_units_without_any_importance_all_freeze():
    assert budget([0.0, -1.0, 0.0], 0.0) == [0, 1, 2]


def test_a_tenth_of_ten_equal_scores_freezes_one_unit():
    for tenths in range(11):
        assert budget([0.3] * 10, tenths / 10) == list(range(tenths))


def test_of_equal_savings_the_least_important_freeze_and_then_the_first():
    # The first unit is too dear for the run to begin.
    savings = PredictedSavings([0, 9, 18, 27, 36, 45], [1] * 5)
    assert budget([0.6, 0.12, 0.1, 0.1, 0.08], 0.1, savings=savings) == [4]
    assert budget([0.6, 0.1, 0.1, 0.1, 0.1], 0.2, savings=savings) == [1, 2]


def test_a_tie_is_broken_as_it_is_by_trying_all_sets():
    for seed in range(200):
        draw = random.Random(seed)
        scores = [draw.randint(1, 3) for _ in range(draw.randint(1, 7))]
        # Shares of 25 are whole numbers of parts.
        scores.append(25 - sum(scores))
        savings = PredictedSavings(
            by_depth=[0, *accumulate(draw.randint(1, 4) for _ in scores)],
            elsewhere=[draw.randint(1, 2) for _ in scores],
        )
        room = draw.randint(0, 25)
        tried = (
            (-savings.of(chosen), sum(scores[unit] for unit in chosen), chosen)
            for size in range(len(scores) + 1)
            for chosen in combinations(range(len(scores)), size)
        )
        _, _, best = min(choice for choice in tried if choice[1] <= room)
        assert budget(scores, room / 25, savings=savings) == list(best), seed


def test_what_saves_nothing_outside_the_run_does_not_freeze_there():
    assert budget([0.5, 0.1, 0.2, 0.2], 0.3, savings=PredictedSavings([0, 5, 10, 15, 20], [1, 0, 1, 0])) == [2]


def test_a_search_cut_short_loses_less_than_one_unit_saves(monkeypatch):
    # The best for its importance comes first, and leaves no room for the two that are better together.
    cases = [([0.2, 0.3, 0.25, 0.25], 0.5, set(), PredictedSavings([0] * 5, [0, 9, 7, 7]))]
    assert budget(*cases[0]) == [2, 3]
    cases += [drawn_case(seed) for seed in range(200)]
    monkeypatch.setattr("safe_lab.policy.budget._MOST_CHOICES", 0)
    losses = [best_saving(*case) - case[-1].of({*case[2], *budget(*case)}) for case in cases]
    assert any(losses)
    assert all(loss == 0 or loss < max(case[-1].elsewhere) for loss, case in zip(losses, cases, strict=True))


def test_savings_of_a_set_are_those_of_its_run_and_of_each_unit_elsewhere():
    savings = PredictedSavings([0, 20, 45, 70, 100], [1, 2, 3, 4])
    assert [savings.of(frozen) for frozen in ((), {1}, {0}, {0, 1, 3}, {0, 2, 3}, range(4))] == [0, 2, 20, 49, 27, 100]
    assert assume_savings(4).of({0, 1, 3}) == 41


def test_savings_of_lengths_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="3 values, for 0 to all of 3 units"):
        PredictedSavings([0, 1, 2], [1, 1, 1])


def test_normalisations_have_their_worked_values():
    assert normalize([0.2, 0.4, 0.1], "none") == [0.2, 0.4, 0.1]
    assert normalize([0.2, 0.4, 0.1], "max") == pytest.approx([0.5, 1.0, 0.25])
    assert normalize([0.2, 0.4, 0.1], "rank") == pytest.approx([1 / 2, 5 / 6, 1 / 6])
    assert normalize([0.1, 0.1, 0.4], "rank") == pytest.approx([1 / 6, 1 / 6, 5 / 6])
    assert normalize([0.0, 0.0], "max") == [0.0, 0.0]
    assert normalize([-2.0, 1.0], "max") == [-1.0, 0.5]


def test_an_unknown_normalisation_is_refused():
    with pytest.raises(ValueError, match="'ranks'"):
        normalize([1.0], "ranks")


def test_frozen_depth_is_the_run_from_the_input():
    assert frozen_depth({1, 2}, 4) == 0
    assert frozen_depth({0, 1, 3}, 4) == 2
    assert frozen_depth(range(4), 4) == 4
    assert not math.isnan(frozen_depth((), 0))
