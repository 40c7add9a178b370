"""What the accounts of bytes and FLOPs cost: the same run with and without tracing, in turn, in CPU seconds.

``python experiments/bench/metering_cost.py [CONFIG [key=value ...]]``; prints the ratio of each pair, and their median.
"""

import json
import statistics
import sys
import tempfile

from safe_lab import config as configuration
from safe_lab.memory import KINDS, Trace
from safe_lab.resources import meter
from safe_lab.run import run

REPETITIONS = 3


class NoLedger:
    """In the place of the ledger: sees nothing, costs nothing."""

    nothing = dict.fromkeys(KINDS, 0)
    trace = Trace(0, nothing, nothing, nothing, nothing, {"forward": 0, "backward": 0}, 0.0)

    def __init__(self, *arguments, **options):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass


def main() -> None:
    """Run pairs and print them."""
    path, *overrides = sys.argv[1:] or ["experiments/quickstart.yaml", "training.epochs=4", "freezing.final=3"]
    ratios = []
    ledger = meter.Ledger
    for repetition in range(REPETITIONS):
        seconds = {}
        for traced in (True, False) if repetition % 2 else (False, True):
            meter.Ledger = ledger if traced else NoLedger
            with tempfile.TemporaryDirectory() as folder:
                fixed = [f"output_dir={folder}", "tracking.wandb=disabled", "training.save_every=never"]
                config = configuration.load(path, [*overrides, *fixed])
                result = run(config)
                seconds[traced] = result.resources["cpu_seconds"]
                steps = result.resources["traced_micro_steps"], result.steps
        ratios.append(seconds[True] / seconds[False])
        print(f"{seconds[True]:.2f} s traced, {seconds[False]:.2f} s not: {ratios[-1]:.4f}", file=sys.stderr)
    print(json.dumps({"ratios": ratios, "median": statistics.median(ratios), "traced_steps_of": steps}))


if __name__ == "__main__":
    main()
