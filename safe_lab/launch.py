"""How this process was started, as its environment says: by itself, or as one of several, by torchrun or Accelerate.

Nothing heavy is imported, so that what cannot work is refused before anything loads.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

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
}
# What of FSDP has no counterpart here -> what to write instead.
_REFUSED_OF_FSDP = {
    "FSDP_OFFLOAD_PARAMS": "fsdp_offload_params is not supported: leave it out; model.dtype: bfloat16 halves the bytes",
    "FSDP_ACTIVATION_CHECKPOINTING": "fsdp_activation_checkpointing is not supported: leave it out, and set "
    "model.gradient_checkpointing: true",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config is not supported: leave it out, and weights are spread over all",
}
# What has no effect here, and is not there unless somebody has set it.
_WITHOUT_EFFECT = ("FSDP_IGNORED_MODULES", "FSDP_AUTO_WRAP_POLICY", "FSDP_TRANSFORMER_CLS_TO_WRAP")


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


def is_sharded(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the launcher was told to spread the weights over the processes (FSDP)."""
    return _is_on(environment, "ACCELERATE_USE_FSDP")


def reshards_after_forward(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a sharded layer is given up after its forward pass, to be gathered anew for the backward pass."""
    return environment.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() not in ("false", "no", "0")


def without_effect(environment: Mapping[str, str] = os.environ) -> list[str]:
    """What the launcher was told about FSDP that is decided otherwise here, by the names of Accelerate's settings."""
    return [name.lower() for name in _WITHOUT_EFFECT if environment.get(name)]


@contextmanager
def without_fsdp() -> Iterator[None]:
    """Inside, Accelerate and transformers are not told of FSDP.

    They would shard what trains too, and leave the weights to process 0; :func:`safe_lab.sharding.shard` does otherwise.
    """
    before = os.environ.pop("ACCELERATE_USE_FSDP", None)
    try:
        yield
    finally:
        if before is not None:
            os.environ["ACCELERATE_USE_FSDP"] = before


def check(environment: Mapping[str, str] = os.environ) -> None:
    """Whether safe_lab works the way it was started.

    Raises:
        ConfigError: It does not; the message says what does.
    """
    for variable, (name, reason) in _REFUSED.items():
        if _is_on(environment, variable):
            raise ConfigError(
                f"accelerate launch was told to use {name}, which is not supported: {reason}. Use accelerate launch --multi_gpu, "
                "with a copy of the model on each GPU (memory.budget and bfloat16 make large models fit), or FSDP2, with the "
                "base weights spread over them (experiments/accelerate/fsdp2.yaml)"
            )
    if not is_sharded(environment):
        return
    version = environment.get("FSDP_VERSION", "1")
    if version != "2":
        raise ConfigError(
            f"the launcher was told to use FSDP {version}, which puts what trains and what does not into one; use FSDP2: "
            "fsdp_version: 2, as in experiments/accelerate/fsdp2.yaml"
        )
    for variable, instead in _REFUSED_OF_FSDP.items():
        if _is_on(environment, variable):
            raise ConfigError(instead)


def _is_on(environment: Mapping[str, str], variable: str) -> bool:
    return environment.get(variable, "").lower() in ("true", "1", "yes")


def _read(environment: Mapping[str, str], names: tuple[str, ...], default: int) -> int:
    return next((int(environment[name]) for name in names if environment.get(name, "").isdigit()), default)
