"""A worker in its own process: ``python -m safe_lab.sweep.worker_process STUDY TRIALS DEADLINE``.

TRIALS is how many the study is to have, DEADLINE the time (since the epoch) after which none is begun, or ``none``; the storage's
address is in the environment.

It ends with the process that started it, and so does the training that it has going.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from safe_lab.child import end_with_parent
from safe_lab.nursery import Nursery, start_afresh
from safe_lab.section import ConfigError


def main(arguments: Sequence[str]) -> int:
    """Work; returns the exit code."""
    study_path, num_trials, deadline = arguments
    end_with_parent()
    from safe_lab.hardware import find_gpus
    from safe_lab.sweep.joining import open_study
    from safe_lab.sweep.storage import open_storage
    from safe_lab.sweep.study_file import load
    from safe_lab.sweep.supervisor import STORAGE_VARIABLE
    from safe_lab.sweep.worker import Worker

    # Not left for the trainings to see: it may hold a password.
    address = os.environ.pop(STORAGE_VARIABLE)
    try:
        study_file = load(study_path, num_trials=int(num_trials))
        study = open_study(study_file, open_storage(address))
        start = start_afresh if find_gpus() else Nursery().start
        Worker(study_file, study, start, None if deadline == "none" else float(deadline)).work()
    except (ConfigError, OSError) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
