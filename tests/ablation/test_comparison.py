"""Variants held against a baseline: worked cases, and what is said where little can be said."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from safe_lab import config as configuration
from safe_lab.ablation.claims import Outcome
from safe_lab.ablation.comparison import Verdict, compare
from safe_lab.ablation.records import Record
from safe_lab.ablation.rules import Claim, Rules
from safe_lab.ablation.words import describe_claims, describe_rules
from safe_lab.statistics import mean_interval, p_value

ACCURACY, FLOPS = "validation/accuracy", "resources/flops"
RULES = Rules(ACCURACY, (FLOPS, "frozen_share"))
MARGIN = Rules(ACCURACY, (), margin=0.05)
ENVIRONMENT = {"processor": "a processor", "threads": 2, "packages": {"torch": "2.13"}}


def record(variant, seed, accuracy, flops=1e12, *, fault="", rows="same", **environment):
    result = {
        "metrics": {ACCURACY: accuracy},
        "resources": {"flops": flops, "joules": None},
        "frozen_share": 0.5,
        "fingerprints": {"base": "same", "training": rows},
    }
    return Record(variant, seed, Path("nowhere"), None, result, fault, ENVIRONMENT | environment)


def records(variant, accuracies, flops=1e12):
    return [record(variant, seed, value, flops) for seed, value in enumerate(accuracies)]


def judge(differences, **rules):
    """What is said of a variant that differs from the baseline so at each seed."""
    base = [0.8 + 0.01 * seed for seed in range(len(differences))]
    ours = [value + difference for value, difference in zip(base, differences, strict=True)]
    chosen = Rules(ACCURACY, (), **rules)
    return compare([*records("none", base), *records("cka", ours)], chosen, "none").row("cka")


def test_means_spreads_and_paired_differences_are_worked_ones():
    found = compare([*records("none", [0.8, 0.9]), *records("cka", [0.83, 0.91], 5e11)], RULES, "none")
    cell = found.row("cka").cells[ACCURACY]
    assert cell.mean == pytest.approx(0.87)
    assert cell.spread == pytest.approx(0.08 / math.sqrt(2))
    assert list(cell.difference.by_seed.values()) == pytest.approx([0.03, 0.01])
    assert cell.difference.mean == pytest.approx(0.02)
    interval = mean_interval([0.03, 0.01])
    assert (cell.difference.low, cell.difference.high) == pytest.approx((interval.low, interval.high))
    assert cell.difference.p == pytest.approx(p_value([0.03, 0.01])) == 0.5
    assert not cell.difference.is_relative
    assert found.row("none").cells[ACCURACY].difference is None
    assert found.row("none").verdict == Verdict.BASELINE


def test_costs_are_compared_by_factors():
    base = [record("none", seed, 0.8, flops) for seed, flops in enumerate((1e12, 2e12))]
    ours = [record("cka", seed, 0.8, flops) for seed, flops in enumerate((5e11, 4e12))]
    cell = compare([*base, *ours], RULES, "none").row("cka").cells[FLOPS]
    assert cell.difference.is_relative
    assert list(cell.difference.by_seed.values()) == pytest.approx([-0.5, 1.0])
    # To a half and to the double: no difference on average.
    assert cell.difference.mean == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("claimed", "factors", "outcome"),
    [
        (-0.2, (0.5, 0.55, 0.52), Outcome.REACHED),
        (-0.6, (0.5, 0.55, 0.52), Outcome.MISSED),
        (-0.5, (0.5, 0.55, 0.49), Outcome.HELD),
        (-0.5, (0.1,), Outcome.UNKNOWN),
        # A cost of nothing has no factor.
        (-0.5, (0.0, 0.0, 0.0), Outcome.NO_SHARES),
        (-0.5, (), Outcome.NO_RUNS),
    ],
)
def test_a_claim_is_reached_missed_or_held_by_the_interval(claimed, factors, outcome):
    base = [record("none", seed, 0.8, 1e12 * (seed + 1)) for seed in range(3)]
    ours = [record("cka", seed, 0.8, 1e12 * (seed + 1) * factor) for seed, factor in enumerate(factors)]
    lost = [record("cka", seed, 0.8, fault="it is missing") for seed in range(len(factors), 3)]
    rules = Rules(ACCURACY, (), claims=(Claim("cka", FLOPS, claimed, "a paper"),))
    found = compare([*base, *ours, *lost], rules, "none")
    assert list(found.claims) == [outcome]
    (line,) = describe_claims(found)
    assert line.startswith(f"a paper claims \N{MINUS SIGN}{-claimed:.1%}".replace("%", " %"))
    assert str(outcome) in line


def test_of_an_accuracy_a_claim_is_absolute_and_more_is_better():
    rules = Rules(
        ACCURACY, (), claims=(Claim("cka", ACCURACY, 0.01, "a paper"), Claim("cka", ACCURACY, 0.1, "another"))
    )
    found = compare([*records("none", [0.8, 0.8, 0.8]), *records("cka", [0.85, 0.86, 0.85])], rules, "none")
    assert list(found.claims) == [Outcome.REACHED, Outcome.MISSED]


def test_a_claim_of_a_metric_is_not_reached_by_differences_that_tell_no_spread():
    rules = Rules(ACCURACY, (), claims=(Claim("cka", ACCURACY, 0.005, "a paper"),))
    found = compare([*records("none", [0.5, 0.75]), *records("cka", [0.5625, 0.8125])], rules, "none")
    assert list(found.claims) == [Outcome.UNKNOWN]


def test_shares_are_tested_as_the_logarithms_that_their_mean_is_of():
    # Seven seeds cost a twentieth, one twelve times as much; as shares, that one would outweigh them.
    logs = [-3.0 - 0.01 * seed for seed in range(7)] + [2.5]
    base = [record("none", seed, 0.8, 1e12) for seed in range(8)]
    ours = [record("cka", seed, 0.8, 1e12 * math.exp(log)) for seed, log in enumerate(logs)]
    row = compare([*base, *ours], Rules(FLOPS, ()), "none").row("cka")
    assert row.verdict == Verdict.BETTER
    # Nothing is lost of a share that is next to all of it.
    gone = [record("cka", seed, 0.8, 1e-9) for seed in range(8)]
    assert compare([*base, *gone], Rules(FLOPS, (), margin=0.1), "none").row("cka").p_worse == 1 / 2**8


def test_only_seeds_that_both_have_are_compared_and_what_is_left_out_is_told():
    runs = [*records("none", [0.8, 0.8, 0.8]), *records("cka", [0.9, 0.9])]
    runs += [record("cka", 2, 0.0, fault="stopped: NaN"), record("cka", 3, 0.7)]
    row = compare(runs, RULES, "none").row("cka")
    assert list(row.cells[ACCURACY].difference.by_seed) == [0, 1]
    assert list(row.cells[ACCURACY].by_seed) == [0, 1, 3]
    assert row.faults == {2: "stopped: NaN"}


def test_a_figure_that_no_run_has_is_left_out():
    rules = Rules(ACCURACY, ("resources/joules",))
    found = compare([*records("none", [0.8]), *records("cka", [0.9])], rules, "none")
    assert list(found.row("cka").cells) == [ACCURACY]


def test_p_is_corrected_over_the_variants():
    base = records("none", [0.5] * 6)
    rising = [0.51 + 0.001 * seed for seed in range(6)]
    runs = [*base, *records("cka", rising), *records("fisher", rising), *records("depth", [0.5, 0.52, 0.48] * 2)]
    found = compare(runs, RULES, "none")
    differences = [found.row(name).cells[ACCURACY].difference for name in ("cka", "fisher", "depth")]
    assert [difference.p for difference in differences[:2]] == [2 / 64] * 2
    assert [difference.p_corrected for difference in differences[:2]] == [pytest.approx(6 / 64)] * 2
    assert differences[2].p_corrected == differences[2].p == 1.0


def test_better_and_worse_are_said_where_p_says_so():
    up = [0.01 + 0.001 * seed for seed in range(8)]
    assert judge(up).verdict == Verdict.BETTER
    assert judge([-value for value in up]).verdict == Verdict.WORSE
    assert judge([-value for value in up], margin=0.005).verdict == Verdict.WORSE
    # Worse beyond chance, but by less than anybody asked.
    small = judge([-value / 10 for value in up], margin=0.01)
    assert small.verdict == Verdict.NO_WORSE
    assert "within the margin" in small.reason


def test_no_worse_is_said_where_the_interval_lies_within_the_margin():
    even = [0.001, -0.002, 0.002, -0.001, 0.0]
    found = judge(even, margin=0.01)
    assert found.verdict == Verdict.NO_WORSE
    assert found.p_worse == 1 / 32
    assert judge(even, margin=0.001).verdict == Verdict.NOT_ENOUGH_SEEDS
    assert judge(even).verdict == Verdict.NOT_ENOUGH_SEEDS
    assert judge([*even, 0.001, -0.001, 0.0]).verdict == Verdict.NO_DIFFERENCE_FOUND


def test_a_variant_that_is_far_worse_is_worse_however_few_the_seeds():
    found = judge([-0.2, -0.21, -0.19, -0.2, -0.205], margin=0.01)
    assert (found.verdict, found.reason) == (Verdict.WORSE, "the whole interval is beyond the margin of 0.01")


def test_differences_that_are_all_alike_tell_no_spread():
    assert judge([0.0, 0.0], margin=0.01).verdict == Verdict.NOT_ENOUGH_SEEDS
    assert judge([-1 / 128] * 3, margin=0.01).verdict == Verdict.NOT_ENOUGH_SEEDS
    # Six of them do, by a p of 1/64 where an interval would leave 1/40 on either side; five have 1/32.
    assert judge([0.0] * 5, margin=0.01).verdict == Verdict.NOT_ENOUGH_SEEDS
    assert judge([0.0] * 6, margin=0.01).verdict == Verdict.NO_WORSE


def test_no_worse_says_by_how_much_and_against_what():
    even = [0.001, -0.002, 0.002, -0.001, 0.0]
    reason = judge(even, margin=0.01).reason
    assert reason.startswith("at worst 0.00")
    # With five seeds p is 1 / 32 at best, more than the interval leaves on a side: beside it, it would read as a contradiction.
    assert reason.endswith(" worse, within the margin of 0.01")
    assert judge([*even, 0.001], margin=0.01).reason.endswith("of 0.01; p = 0.016 against being worse by that much")
    assert judge([0.002, 0.001, 0.003, 0.002, 0.001], margin=0.01).reason.startswith(
        "nowhere in its interval worse, within"
    )


def test_a_test_against_the_margin_is_told_where_it_could_tell_something():
    few = compare([*records("none", [0.8] * 5), *records("cka", [0.8, 0.81, 0.79, 0.8, 0.8])], MARGIN, "none")
    assert "with so few seeds p cannot come below 0.031." in describe_rules(few)
    many = compare([*records("none", [0.8] * 6), *records("cka", [0.8, 0.81, 0.79, 0.8, 0.8, 0.8])], MARGIN, "none")
    assert "cannot come below 0.016" not in describe_rules(many)


def test_a_margin_of_a_cost_is_a_share_for_interval_and_p_alike():
    base = [record("none", seed, 0.8, 1e12 * (seed + 1)) for seed in range(8)]
    # A tenth more, and a little noise.
    ours = [record("cka", seed, 0.8, 1e12 * (seed + 1) * (1.1 + 0.001 * (-1) ** seed)) for seed in range(8)]
    rows = {
        margin: compare([*base, *ours], Rules(FLOPS, (), margin=margin), "none").row("cka") for margin in (0.09, 0.11)
    }
    assert [row.verdict for row in rows.values()] == [Verdict.WORSE, Verdict.NO_WORSE]
    assert rows[0.11].p_worse == pytest.approx(1 / 2**8) and rows[0.09].p_worse == 1.0


def test_no_margin_is_asked_of_differences_that_are_no_shares():
    base, ours = (
        [record(name, seed, 0.8, flops) for seed in range(8)] for name, flops in (("none", 0.0), ("cka", 1e12))
    )
    found = compare([*base, *ours], Rules(FLOPS, (), margin=0.05), "none")
    assert found.row("cka").verdict == Verdict.WORSE
    assert found.row("cka").p_worse is None
    assert "differences are no shares" in found.warnings[0]


def test_sharpness_that_does_not_compare_is_told():
    runs = [record(name, 0, 0.8) for name in ("none", "cka")]
    for run, fingerprint, converged in zip(runs, "ab", (True, False), strict=True):
        trace = {"value": 1.0, "standard_error": 0.1, "converged": converged}
        validation = {"gauss_newton_trace": trace, "adaptive_gauss_newton_trace": trace}
        run.result["sharpness"] = {"fingerprint": fingerprint, "settings": {"samples": 4}, "validation": validation}
    # Of what is compared, and nothing else.
    rules = Rules(ACCURACY, ("sharpness/validation_gauss_newton_trace",))
    assert compare(runs, rules, "none").warnings == [
        "cka: sharpness (validation_gauss_newton_trace) was not within its tolerance when its budget was spent: seed 0",
        "cka: sharpness was measured over other examples than that of none: seed 0",
    ]


def test_ranks_and_mean_must_be_on_one_side():
    eleven_up = [0.010 + 0.001 * seed for seed in range(11)]
    assert judge([*eleven_up, 0.03], test="wilcoxon").verdict == Verdict.BETTER
    assert judge([*eleven_up, -0.4], test="wilcoxon").verdict == Verdict.NO_DIFFERENCE_FOUND


def test_a_run_without_the_metric_is_told():
    runs = [*records("none", [0.8, 0.8]), *records("cka", [0.9, float("nan")])]
    assert compare(runs, RULES, "none").row("cka").faults == {1: f"its result.json has no finite {ACCURACY}"}


def test_the_margin_of_a_cost_is_a_share():
    base = [record("none", seed, 0.8, 1e12 + 1e10 * seed) for seed in range(6)]
    for factor, verdict in ((1.02, Verdict.NO_WORSE), (1.2, Verdict.WORSE)):
        ours = [record("cka", seed, 0.8, factor * (1e12 + 1e10 * seed) + 1e9 * (seed % 2)) for seed in range(6)]
        rules = Rules(FLOPS, (), margin=0.05)
        assert compare([*base, *ours], rules, "none").row("cka").verdict == verdict


def test_of_a_loss_less_is_better():
    base = [record("none", seed, 0.5) for seed in range(8)]
    ours = [record("cka", seed, 0.4 - 0.001 * seed) for seed in range(8)]
    for entry in (*base, *ours):
        entry.result["metrics"]["validation/loss"] = entry.result["metrics"][ACCURACY]
    for margin in (None, 0.01):
        rules = Rules("validation/loss", (), margin=margin)
        assert compare([*base, *ours], rules, "none").row("cka").verdict == Verdict.BETTER
        assert compare([*base, *ours], rules, "cka").row("none").verdict == Verdict.WORSE


def test_a_single_seed_and_no_common_seed_say_so():
    assert judge([0.1]).verdict == Verdict.NOT_ENOUGH_SEEDS
    assert "one seed" in judge([0.1], margin=0.01).reason
    row = compare([record("none", 0, 0.8), record("cka", 1, 0.9)], RULES, "none").row("cka")
    assert row.verdict == Verdict.NO_RUNS


def test_how_many_seeds_would_do_is_told():
    said = judge([0.02, -0.03, 0.01, -0.02], margin=0.01).reason
    assert "0.01 is the margin; some " in said
    reason = judge([-0.02, -0.06, 0.03], margin=0.01).reason
    assert reason.endswith(" worse, its mean is 0.0167 worse, and 0.01 is the margin")


def test_runs_that_are_no_pairs_or_of_other_machines_are_told():
    runs = [record("none", 0, 0.8), record("cka", 0, 0.8, rows="others", threads=1)]
    first, second = compare(runs, RULES, "none").warnings
    assert "cka, seed 0: other training than none" in first
    assert "a processor, 1 threads" in second
    assert not compare(runs[:1], RULES, "none").warnings


def test_a_comparison_is_plain_values():
    found = compare([*records("none", [0.8, 0.9]), *records("cka", [0.83, 0.91])], RULES, "none").to_dict()
    assert found["rows"][1]["verdict"] == Verdict.NOT_ENOUGH_SEEDS
    assert SimpleNamespace(**found).baseline == "none"


def froze_at(folder, variant, steps):
    """Runs in which one layer froze at a step, which differs by seed."""
    runs = []
    for seed, step in enumerate(steps):
        path = folder / variant / f"seed-{seed}"
        path.mkdir(parents=True)
        (path / "events.jsonl").write_text(json.dumps({"step": step, "units": ["layer.0"]}) + "\n")
        runs.append(replace(record(variant, seed, 0.8), path=path))
    return runs


def test_variants_that_are_one_training_in_some_seeds_or_all_are_told_apart(tmp_path):
    steps = {"cka": (20, 20), "fisher": (20, 30), "depth": (20, 20), "random": (30, 30)}
    runs = [run for variant, those in steps.items() for run in froze_at(tmp_path, variant, those)]
    always, sometimes = compare(runs, RULES, "cka").warnings
    assert always.startswith("cka and depth are one training in every seed: ")
    assert sometimes.endswith(" metrics: cka, depth and fisher in seed 0; fisher and random in seed 1")
    # One that has only begun is like each of two that are not like each other.
    runs = [run for run in runs if (run.variant, run.seed) != ("depth", 1) and run.variant != "random"]
    (sometimes,) = compare(runs, RULES, "cka").warnings
    assert sometimes.endswith(" metrics: cka, fisher and depth in seed 0")


def test_variants_that_save_otherwise_are_one_training_as_they_should_be(tmp_path, tiny_tree):
    runs = [*froze_at(tmp_path, "none", (20,)), *froze_at(tmp_path, "cka", (20,))]
    configs = [configuration.build(tiny_tree | {"savings": {"fold": fold}}) for fold in (True, False)]
    runs = [replace(run, config=config) for run, config in zip(runs, configs, strict=True)]
    assert not compare(runs, RULES, "none").warnings
    assert compare([runs[0], replace(runs[1], config=None)], RULES, "none").warnings


def test_what_runs_have_warned_of_is_told_once_with_the_variants_that_say_it():
    runs = [
        replace(record("none", 0, 0.8), warnings=("2 layers stay unfolded",)),
        replace(record("none", 1, 0.9), warnings=("3 layers stay unfolded", "memory ran out")),
        replace(record("none", 2, 0.9, fault="it is missing"), warnings=("the disk is full",)),
        replace(record("cka", 0, 0.7), warnings=("1 layers stay unfolded",)),
    ]
    assert compare(runs, RULES, "none").warnings == [
        "none and cka warned: 2 layers stay unfolded (none, seed 0)",
        "none warned: memory ran out (none, seed 1)",
    ]


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (
            (20, 20),
            [
                "cka and fisher are one training in every seed: the same units froze at the same steps, "
                "and all metrics are alike; their costs may differ"
            ],
        ),
        (
            (20, 30),
            ["one training in some seeds, by what froze when and all metrics: cka and fisher in seed 0"],
        ),
        ((30, 30), []),
    ],
)
def test_variants_that_came_to_one_training_are_told(steps, said, tmp_path):
    runs = [*froze_at(tmp_path, "cka", (20, 20)), *froze_at(tmp_path, "fisher", steps)]
    assert compare(runs, RULES, "cka").warnings == said
    (tmp_path / "cka" / "seed-0" / "events.jsonl").write_text("damaged\n")
    (tmp_path / "cka" / "seed-1" / "events.jsonl").unlink()
    assert not compare(runs, RULES, "cka").warnings


def test_variants_in_which_nothing_froze_are_one_training():
    runs = records("none", [0.8, 0.9]) + records("cka", [0.8, 0.9])
    runs = [replace(run, result=run.result | {"frozen_share": 0}) for run in runs]
    (said,) = compare(runs, RULES, "none").warnings
    assert (
        said
        == "none and cka are one training in every seed: nothing froze, and all metrics are alike; their costs may differ"
    )
