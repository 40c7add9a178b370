"""What this machine has for trainings side by side: a GPU for each of them, or a share of the cores."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from safe_lab.child import num_threads
from safe_lab.section import ConfigError


def find_gpus(environment: Mapping[str, str] = os.environ) -> list[str]:
    """GPUs that may be used here, as CUDA_VISIBLE_DEVICES names them."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    # Below a GPU that is divided its parts are listed too.
    gpus = [line for line in listed.stdout.splitlines() if line.startswith("GPU ")]
    return [str(i) for i in range(len(gpus))]


def environments(workers: int, gpus: Sequence[str]) -> list[dict[str, str]]:
    """What each worker's processes are told: one GPU, or its share of the cores; fewer threads where OMP_NUM_THREADS says so.

    Raises:
        ConfigError: There are GPUs, and not one for each worker.
    """
    if gpus and workers > len(gpus):
        raise ConfigError(f"--workers {workers}: there are {len(gpus)} GPUs, and each worker needs one of its own")
    threads, wanted = max(1, (os.cpu_count() or 1) // workers), os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdecimal() and int(wanted) > 0:
        threads = min(threads, int(wanted))
    share = {} if workers == 1 else num_threads(threads)
    return [share | ({"CUDA_VISIBLE_DEVICES": gpus[i]} if gpus else {}) for i in range(workers)]
