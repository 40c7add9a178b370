"""What the machinery of a sweep costs beside its trials, and what a second worker brings.

    OMP_NUM_THREADS=1 python experiments/bench/sweep.py --trials 6 --steps 10 --folder runs

The same study of short trials once with one worker and once, of twice as many trials, with two, one after the other. A trial's
own time is the wall time of its run, from its first line to its result; all else from the first trial's start to the last one's
end is the sweep's: drawing, telling, storage, starting a process, noticing its end.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

import optuna

from safe_lab import yaml_core
from safe_lab.run_folder import RunFolder
from safe_lab.sweep.storage import default_address, open_storage


def main() -> None:
    """Run both studies and print a line for each, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=6, help="of the study with one worker")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps of a trial")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where the studies go")
    chosen = parser.parse_args()
    paces = [measure(chosen.folder, workers, workers * chosen.trials, chosen.steps) for workers in (1, 2)]
    print(f"two workers / one, trials a second: {paces[1] / paces[0]:.2f}")


def measure(folder: Path, workers: int, num_trials: int, steps: int) -> float:
    """Trials a second of a study, from its first trial's start to its last one's end."""
    name = f"bench-sweep-{workers}-{int(time.time())}"
    study_path = folder / f"{name}.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    study = {
        "name": name,
        "base": str(Path(__file__).resolve().parents[1] / "quickstart.yaml"),
        "settings": {
            "training.max_steps": steps,
            "training.eval_every": "never",
            "data.max_validation_samples": 64,
            "tracking.wandb": "disabled",
            "output_dir": str(folder),
        },
        "space": {"freezing.final_threshold": {"low": 0.02, "high": 0.5, "log": True}},
        "objectives": {"validation/accuracy": "maximize"},
        "num_trials": num_trials,
    }
    study_path.write_text(yaml_core.write(study))
    command = [sys.executable, "-m", "safe_lab", "sweep", str(study_path), "--workers", str(workers)]
    subprocess.run(command, check=True, capture_output=True)
    storage = open_storage(default_address(folder / name, several=workers > 1))
    trials = optuna.load_study(study_name=name, storage=storage).trials
    span = max(t.datetime_complete for t in trials) - min(t.datetime_start for t in trials)
    own = {trial.number: own_seconds(folder / name, trial.number) for trial in trials}
    around = [(t.datetime_complete - t.datetime_start).total_seconds() - own[t.number] for t in trials]
    # A worker's first trial waits for what all others are forked from.
    start, later = max(around[:workers]), around[workers:]
    seconds = span.total_seconds()
    between = (workers * (seconds - start) - sum(own.values()) - sum(later)) / len(later)
    print(
        f"{workers} worker(s): {len(trials)} trials in {seconds:.1f} s, {fmean(own.values()):.2f} s of their own each; once at "
        f"the start {start:.1f} s, then {fmean(later):.2f} s around a trial and {between:.2f} s between two (and waiting at the "
        f"end): {(fmean(later) + between) / fmean(own.values()):.1%} of a trial"
    )
    return len(trials) / seconds


def own_seconds(folder: Path, trial: int) -> float:
    """Wall time of a trial's run."""
    result = RunFolder(folder / f"trial-{trial:04d}" / "seed-0").result
    assert result is not None
    seconds: float = result["resources"]["wall_seconds"]
    return seconds


if __name__ == "__main__":
    main()
