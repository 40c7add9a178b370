"""How this process was started, as its environment says: by itself, or as one of several, by torchrun or Accelerate.

Nothing heavy is imported, so that what cannot work is refused before anything loads.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

from safe_lab.section import ConfigError

_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")

# Set by `accelerate launch` -> what it stands for, and why it is refused.
_REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": (
        "DeepSpeed",
        "ZeRO fixes which weights train when it starts, and freezing some of them later would free nothing",
    ),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", "it brings models of its own, without PEFT's adapters"),
    "ACCELERATE_USE_FSDP": ("FSDP", "scores, folding and checkpoints of sharded weights are not there yet"),
}


def is_one_of_several(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the launcher started more processes than this one."""
    return _read(environment, _COUNTS, 1) > 1


def rank(environment: Mapping[str, str] = os.environ) -> int:
    """Number of this process among all, from 0."""
    return _read(environment, _RANKS, 0)


def num_on_node(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes the launcher started on this machine."""
    return _read(environment, ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE"), 1)


def node(environment: Mapping[str, str] = os.environ) -> str:
    """A name for this machine: torchrun's number for it, or else its own."""
    return environment.get("GROUP_RANK") or socket.gethostname()


def check(environment: Mapping[str, str] = os.environ) -> None:
    """Whether safe_lab works the way it was started.

    Raises:
        ConfigError: It does not; the message says what does.
    """
    for variable, (name, reason) in _REFUSED.items():
        if environment.get(variable, "").lower() in ("true", "1", "yes"):
            raise ConfigError(
                f"accelerate launch was told to use {name}, which is not supported: {reason}. Use accelerate launch --multi_gpu, "
                "with a copy of the model on each GPU; memory.budget and bfloat16 make large models fit"
            )


def _read(environment: Mapping[str, str], names: tuple[str, ...], default: int) -> int:
    return next((int(environment[name]) for name in names if environment.get(name, "").isdigit()), default)
