import pytest

from safe_lab.schedule import CURVES, is_settled, threshold


@pytest.mark.parametrize("curve", CURVES)
def test_every_curve_rises_from_nothing_to_the_final_threshold(curve):
    values = [threshold(t, start=2, end=10, final=0.5, curve=curve) for t in range(13)]
    assert values[:2] == [0.0, 0.0]
    assert values[10:] == [0.5] * 3
    assert values == sorted(values)


def test_cubic_threshold_follows_the_formula():
    assert threshold(3, start=1, end=6, final=0.05) == pytest.approx(0.05 * (1 - (1 - 2 / 5) ** 3))


def test_worked_values_of_the_other_curves():
    def at(t, curve, stairs=4):
        return threshold(t, start=0, end=8, final=1.0, curve=curve, stairs=stairs)

    assert at(2, "linear") == 0.25
    assert [at(t, "step") for t in (1, 2, 3, 7)] == [0.0, 0.25, 0.25, 0.75]
    assert [at(t, "step", stairs=1) for t in (7, 8)] == [0.0, 1.0]
    assert at(0, "constant") == 1.0


def test_threshold_is_zero_while_warm_up_has_not_ended():
    assert threshold(100, start=None, end=6, final=0.5) == 0.0


def test_a_warm_up_that_ends_after_t_f_goes_to_the_final_threshold_at_once():
    assert threshold(9, start=9, end=6, final=0.5) == 0.5
    assert threshold(8, start=9, end=6, final=0.5) == 0.0


def test_settled_is_relative_to_each_score_with_a_floor_for_the_smallest():
    assert is_settled([1.0, 1e-6], [1.04, 2e-6], share=0.05)
    assert not is_settled([1.0, 0.1], [1.0, 0.106], share=0.05)
