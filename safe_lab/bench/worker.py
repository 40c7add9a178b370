"""One training of a bench in its own process: ``python -m safe_lab.bench.worker TRAINER DEVICE CONFIG ANSWER``.

TRAINER is ``safe_lab`` or ``transformers``, DEVICE ``cpu``, ``cuda`` or ``any``, CONFIG a run's YAML, ANSWER the JSON file to
write.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safe_lab import config as configuration
from safe_lab.child import end_with_parent
from safe_lab.config import Config
from safe_lab.run_folder import RunFolder, to_json
from safe_lab.section import ConfigError


def main(arguments: Sequence[str]) -> int:
    """Train and answer; returns the exit code."""
    trainer, device, config_file, answer_file = arguments
    end_with_parent()
    try:
        _require(device)
        config = configuration.load(config_file)
        answer = {"transformers": train_baseline, "safe_lab": train}[trainer](config)
    except (ConfigError, ValueError, FloatingPointError) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    from safe_lab.environment import describe_environment

    answer["environment"] = describe_environment()
    answer_path = Path(answer_file)
    RunFolder(answer_path.parent).write(answer_path.name, to_json(answer))
    return 0


def train(config: Config) -> dict[str, Any]:
    """Train with safe_lab.

    Returns:
        The same as :func:`safe_lab.bench.baseline.train`.
    """
    from safe_lab import tracking
    from safe_lab.console import Console, log_to
    from safe_lab.run import run

    console = Console()
    log_to(console)
    result = run(config, console=console)
    rows = RunFolder(config.run_folder).rows("metrics.jsonl")
    return {
        "metric": result.metrics[result.main_metric],
        "losses": [(row[tracking.STEP], row[tracking.LOSS]) for row in rows if tracking.LOSS in row],
        "tokens": result.tokens,
        "resources": result.resources,
    }


def train_baseline(config: Config) -> dict[str, Any]:
    """Train with transformers, which is imported only now."""
    from safe_lab.bench.baseline import train

    return train(config)


def _require(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda, and torch finds no GPU here")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
