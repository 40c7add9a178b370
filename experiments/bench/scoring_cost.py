"""What scoring costs: its share of a run's FLOPs and seconds, counted and clocked in the same run.

``python experiments/bench/scoring_cost.py [CONFIG [key=value ...]]``; FLOPs are counted by torch's FlopCounterMode, which
misses CPU flash attention, so the run uses eager attention.
"""

import json
import sys
import tempfile

from torch.utils.flop_counter import FlopCounterMode

from safe_lab import config as configuration
from safe_lab.console import Console
from safe_lab.run import build
from safe_lab.run_folder import claim


def main() -> None:
    """Run the configuration once under the counter, and print the shares."""
    path, *overrides = sys.argv[1:] or ["experiments/quickstart.yaml"]
    with tempfile.TemporaryDirectory() as folder:
        fixed = [
            f"output_dir={folder}",
            "model.attention=eager",
            "tracking.wandb=disabled",
            "training.save_every=never",
        ]
        config = configuration.load(path, [*overrides, *fixed])
        with claim(config, resume=False, overwrite=False) as run_folder, FlopCounterMode(display=False) as everything:
            parts = build(config, run_folder, Console(quiet=True))
            # The reference of the metric is a part of what scoring costs, and was computed while building.
            scoring = everything.get_total_flops()
            for owner, name in ((parts.freezer, "step"), (parts.trainer, "evaluate")):
                setattr(owner, name, counted(getattr(owner, name), owner))
            parts.trainer.fit()
            scoring += parts.freezer.flops
            training = everything.get_total_flops() - scoring - parts.trainer.flops
    seconds = parts.trainer.progress.seconds
    shares = {
        "config": path,
        "training_flops": training,
        "scoring_flops": scoring,
        "scoring_share_of_flops": round(scoring / training, 4),
        "scoring_share_of_seconds": round(seconds["scoring"] / seconds["training"], 4),
        "seconds": {activity: round(value, 2) for activity, value in seconds.items()},
    }
    print(json.dumps(shares, indent=1))


def counted(method, owner):
    """The method, adding its FLOPs to ``owner.flops``."""
    owner.flops = 0

    def call(*arguments):
        with FlopCounterMode(display=False) as counter:
            result = method(*arguments)
        owner.flops += counter.get_total_flops()
        return result

    return call


if __name__ == "__main__":
    main()
