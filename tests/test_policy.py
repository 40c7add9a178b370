import math

import pytest

from safe_lab.policy import POLICIES, State, frozen_depth, normalize


def state(scores=(0.3, 0.1, 0.5, 0.2), level=0.25, frozen=(), warm=True, seed=0):
    return State(list(scores), level, set(frozen), len(scores), warm, seed)


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
