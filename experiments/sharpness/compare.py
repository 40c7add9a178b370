"""Sharpness of two variants held together: for each figure the paired difference over the seeds, with its interval.

python experiments/sharpness/compare.py RUNS [BASELINE [VARIANT]]

RUNS is the folder of an experiment, such as runs/flatness-sst2, with runs that were measured (safe-lab sharpness); the variants
are lora and safe by themselves. Differences are of logarithms where all values are positive, and shown as the ratio VARIANT /
BASELINE; else they are shown as they are. Interval: 95 %, of Student's t over the seeds, for each figure by itself: of twenty
figures without any difference one would be marked.
"""

import json
import sys
from pathlib import Path

import numpy as np
from scipy import stats

from safe_lab.gauging import summarize_all


def read(folder):
    """Figures by seed."""
    found = {}
    for path in sorted(folder.glob("seed-*/result.json")):
        result = json.loads(path.read_text())
        if result["sharpness"] is not None:
            own = {
                "task metric": result["metrics"][result["main_metric"]],
                "update norm": sum(norms["update"] ** 2 for norms in result["sharpness"]["norms"].values()) ** 0.5,
                "weight norm": sum(norms["weights"] ** 2 for norms in result["sharpness"]["norms"].values()) ** 0.5,
                "frozen share": result["frozen_share"],
            }
            found[path.parent.name] = own | summarize_all(result["sharpness"])
    return found


def compare(baseline, variant):
    """Mean of each, mean paired difference (or ratio) and its interval, and in how many pairs the variant's is lower."""
    seeds = [seed for seed in baseline if seed in variant]
    names = [name for name in baseline[seeds[0]] if not name.endswith(("_standard_error", "_converged"))]
    for name in names:
        pairs = [(baseline[seed].get(name), variant[seed].get(name)) for seed in seeds]
        if any(value is None for pair in pairs for value in pair):
            continue
        before, after = np.array(pairs, dtype=float).T
        logarithmic = bool((before > 0).all() and (after > 0).all())
        differences = np.log(after) - np.log(before) if logarithmic else after - before
        if np.ptp(differences) == 0:
            low = high = differences[0]
        else:
            low, high = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
        shown = np.exp if logarithmic else float
        yield {
            "figure": name,
            "baseline": before.mean(),
            "variant": after.mean(),
            "kind": "ratio" if logarithmic else "difference",
            "effect": shown(differences.mean()),
            "low": shown(low),
            "high": shown(high),
            "lower_in": int((after < before).sum()),
            "pairs": len(seeds),
            "clear": bool(low > 0 or high < 0),
        }


def main():
    folder = Path(sys.argv[1])
    one, other = (sys.argv[2:4] + ["lora", "safe"][len(sys.argv) - 2 :])[:2]
    baseline, variant = read(folder / one), read(folder / other)
    if len(baseline.keys() & variant.keys()) < 2:
        sys.exit(f"{folder}: fewer than two seeds of {one} and {other} were measured")
    print(f"{folder.name}: {other} beside {one}, {len(baseline.keys() & variant.keys())} seeds\n")
    print(f"| figure | {one} | {other} | {other} / {one} (difference: d) | 95 % interval | lower in | |")
    print("|---|---|---|---|---|---|---|")
    for row in compare(baseline, variant):
        mark = "" if row["kind"] == "ratio" else "d "
        print(
            f"| {row['figure'].replace('_', ' ')} | {row['baseline']:.4g} | {row['variant']:.4g} | {mark}{row['effect']:.3g} | "
            f"{row['low']:.3g} to {row['high']:.3g} | {row['lower_in']} of {row['pairs']} | {'*' if row['clear'] else ''} |"
        )


if __name__ == "__main__":
    main()
