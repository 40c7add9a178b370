"""The random streams of a process as plain values: what a checkpoint keeps and a resumed run sets."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


class RandomStreams:
    """The streams as a part of a checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """As they are."""
        return get_rng_state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As they were."""
        set_rng_state(state)


def get_rng_state() -> dict[str, Any]:
    """State of Python's, NumPy's and torch's streams (CPU and the current CUDA device), as values ``weights_only`` loads."""
    numpy_state: Any = np.random.get_state(legacy=True)
    algorithm, keys, position, has_gauss, gauss = numpy_state
    return {
        "python": random.getstate(),
        "numpy": (algorithm, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        # Of this process's device alone: a resumed run may see others, or fewer.
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Set the streams to what :func:`get_rng_state` gave."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    algorithm, keys, *rest = state["numpy"]
    np.random.set_state((algorithm, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
