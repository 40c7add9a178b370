"""Sharpness of two variants held together: for each figure the paired difference over the seeds, with its interval.

python experiments/sharpness/compare.py RUNS [BASELINE [VARIANT]]

RUNS is the folder of an experiment, such as runs/flatness-sst2, with runs that were measured (safe-lab sharpness); the variants
are lora and safe by themselves. Both runs of a seed must have been measured in the same way, on the same examples.

Where all values are positive, differences are of logarithms, the effect is the ratio VARIANT / BASELINE and the columns are
geometric means; else differences and means are of the values themselves. Interval: 95 %, of Student's t over the seeds, for each
figure by itself: of twenty figures without any difference one would be marked "*". Where all seeds were measured on the same
examples, the interval holds nothing of how other examples would differ. "!": some run of the row had not reached its tolerance.
"""

import json
import sys
from pathlib import Path

import numpy as np
from scipy import stats

from safe_lab.gauging import VALIDATION, summarize_all


def read(folder):
    """What was measured, by seed: settings and samples, figures, and the names of those that did not reach their tolerance."""
    found = {}
    for path in sorted(folder.glob("seed-*/result.json")):
        result = json.loads(path.read_text())
        measured = result.get("sharpness")
        if measured is None:
            continue
        figures = {
            "task metric": result["metrics"][result["main_metric"]],
            "update norm": sum(norms["update"] ** 2 for norms in measured["norms"].values()) ** 0.5,
            "weight norm": sum(norms["weights"] ** 2 for norms in measured["norms"].values()) ** 0.5,
            "frozen share": result["frozen_share"],
        }
        summary = summarize_all(measured)
        samples = {"training": measured["fingerprint"], "validation": measured.get(VALIDATION, {}).get("fingerprint")}
        found[path.parent.name] = {
            "settings": measured["settings"],
            "samples": samples,
            "figures": figures | {name: value for name, value in summary.items() if not is_about(name)},
            "rough": {name.removesuffix("_converged") for name in summary if name.endswith("_converged")},
        }
    return found


def is_about(name):
    """Whether a figure is about another one."""
    return name.endswith(("_standard_error", "_converged"))


def check_pairs(baseline, variant, seeds):
    """End if the runs of a seed were not measured alike."""
    for seed in seeds:
        for what in ("settings", "samples"):
            if baseline[seed][what] != variant[seed][what]:
                theirs, ours = baseline[seed][what], variant[seed][what]
                changed = [key for key in theirs if theirs[key] != ours.get(key)]
                sys.exit(f"{seed}: the two runs were measured with other {what}: {', '.join(changed)}")


def compare(baseline, variant, seeds):
    """Mean of each, paired effect and its interval, and in how many pairs the variant's is lower; by figure."""
    names = dict.fromkeys(name for seed in seeds for run in (baseline, variant) for name in run[seed]["figures"])
    for name in names:
        pairs = [(baseline[seed]["figures"].get(name), variant[seed]["figures"].get(name)) for seed in seeds]
        pairs = [pair for pair in pairs if None not in pair]
        if len(pairs) < 2:
            print(f"left out: {name}, which {len(pairs)} of {len(seeds)} pairs have", file=sys.stderr)
            continue
        before, after = np.array(pairs, dtype=float).T
        logarithmic = bool((before > 0).all() and (after > 0).all())
        means = [np.exp(np.log(values).mean()) if logarithmic else values.mean() for values in (before, after)]
        differences = np.log(after) - np.log(before) if logarithmic else after - before
        # Equal differences, such as those of a share of six units, have no spread to make an interval of.
        spread = np.ptp(differences) > 1e-12 * max(1.0, abs(differences).max())
        low, high = stats.ttest_1samp(differences, 0).confidence_interval(0.95) if spread else (np.nan, np.nan)
        shown = np.exp if logarithmic else float
        yield {
            "figure": name,
            "baseline": means[0],
            "variant": means[1],
            "kind": "ratio" if logarithmic else "difference",
            "effect": shown(differences.mean()),
            "interval": f"{shown(low):.3g} to {shown(high):.3g}" if spread else "-",
            "lower_in": int((after < before).sum()),
            "pairs": len(pairs),
            "clear": bool(low > 0 or high < 0),
            "rough": any(name in run[seed]["rough"] for seed in seeds for run in (baseline, variant)),
        }


def main():
    folder = Path(sys.argv[1])
    one, other = (sys.argv[2:4] + ["lora", "safe"][len(sys.argv) - 2 :])[:2]
    baseline, variant = read(folder / one), read(folder / other)
    seeds = [seed for seed in baseline if seed in variant]
    if len(seeds) < 2:
        sys.exit(f"{folder}: fewer than two seeds of {one} and {other} were measured")
    for seed in sorted(baseline.keys() ^ variant.keys()):
        print(f"left out: {seed}, which only one of the two has", file=sys.stderr)
    check_pairs(baseline, variant, seeds)
    print(f"{folder.name}: {other} beside {one}, {len(seeds)} seeds\n")
    print(f"| figure | {one} | {other} | {other} / {one} (difference: d) | 95 % interval | lower in | |")
    print("|---|---|---|---|---|---|---|")
    for row in compare(baseline, variant, seeds):
        kind = "" if row["kind"] == "ratio" else "d "
        marks = " ".join(mark for mark, holds in (("*", row["clear"]), ("!", row["rough"])) if holds)
        print(
            f"| {row['figure'].replace('_', ' ')} | {row['baseline']:.4g} | {row['variant']:.4g} | {kind}{row['effect']:.3g} | "
            f"{row['interval']} | {row['lower_in']} of {row['pairs']} | {marks} |"
        )
    for sample in ("training", "validation"):
        if len({run[seed]["samples"][sample] for seed in seeds for run in (baseline, variant)}) == 1:
            print(f"\nThe {sample} figures of all seeds are over the same examples.")


if __name__ == "__main__":
    main()
