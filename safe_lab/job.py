"""How the processes of a job come together: by Accelerate, over copies of the model or parts of it, with the same in hand."""

from __future__ import annotations

import logging

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType

from safe_lab import launch
from safe_lab.adapters import Attached
from safe_lab.config import Config, TrainingSection
from safe_lab.data import Data
from safe_lab.data.loaders import hash_rows
from safe_lab.processes import Processes
from safe_lab.run_folder import to_json

log = logging.getLogger(__name__)


def build_accelerator(settings: TrainingSection) -> Accelerator:
    """Accelerate, on as many processes as were started.

    Raises:
        ValueError: It was set up for a way of sharing the work that safe_lab does not have.
    """
    # Accelerate keeps its state for the life of the process; a second run would inherit precision and accumulation.
    AcceleratorState._reset_state()
    GradientState._reset_state()
    with launch.without_fsdp():
        accelerator = Accelerator(
            mixed_precision=settings.mixed_precision.replace("none", "no"),
            gradient_accumulation_steps=settings.gradient_accumulation,
            step_scheduler_with_optimizer=False,
            # Without it torchrun's processes on a machine that has no GPU would each believe to be alone (accelerate 1.15).
            cpu=launch.is_one_of_several() and not torch.accelerator.is_available(),
        )
    if accelerator.distributed_type not in (
        DistributedType.NO,
        DistributedType.MULTI_CPU,
        DistributedType.MULTI_GPU,
    ):
        raise ValueError(
            f"{accelerator.distributed_type.value} is not supported; safe_lab trains on one process, or on several with a copy "
            "of the model each: accelerate launch --multi_gpu"
        )
    if accelerator.device.type == "cuda" and launch.num_on_node() > torch.cuda.device_count():
        raise ValueError(
            f"{launch.num_on_node()} processes on this machine, and it has {torch.cuda.device_count()} GPUs: start as many "
            "(accelerate launch --num_processes N)"
        )
    return accelerator


def is_to_shard(config: Config, processes: Processes) -> bool:
    """Whether the base weights are to be spread over the processes, as the launcher was told.

    Raises:
        ValueError: A setting does not go with it.
    """
    if not launch.is_sharded():
        return False
    if processes.count == 1:
        log.warning("FSDP has no effect on a single process: there is no other to keep a part of the weights")
        return False
    if config.sharpness.when != "never" or config.sharpness.every != "never":
        raise ValueError(
            "sharpness needs the whole model on each device, and FSDP keeps a part of it there: leave sharpness.when and "
            "sharpness.every out, and measure the finished run with safe-lab sharpness"
        )
    if config.memory.budget is not None:
        raise ValueError(
            "memory.budget plans with the whole model on each device, and FSDP keeps a part of it there: leave one of them out"
        )
    for setting in launch.without_effect():
        log.warning("%s has no effect: docs/multi-gpu.md tells what of FSDP has", setting)
    if config.savings.fold and config.freezing.policy != "none":
        log.warning(
            "savings.fold has no effect with FSDP, as no process has the whole base weight into which a frozen adapter's update "
            "would go: frozen adapters run beside it (savings.fold: false ends this warning)"
        )
    return True


def check_alike(config: Config, attached: Attached, data: Data, processes: Processes) -> None:
    """Hold what each process has read by itself against what process 0 has.

    Raises:
        ValueError: It is something else.
    """
    if processes.count == 1:
        return
    settings = config.model_dump(mode="json", exclude={"output_dir": True, "model": {"path"}, "data": {"path"}})
    # A hash of what the rows hold, and not the library's own, which is of how they came to be.
    read = {
        "the configuration": to_json(settings),
        "how the launcher was told to use FSDP": to_json([launch.is_sharded(), launch.reshards_after_forward()]),
        f"the weights behind model.path, {config.model.path},": attached.base_fingerprint,
        **{
            f"the {split} split": hash_rows(rows) for split, rows in {"training": data.train, **data.validation}.items()
        },
    }
    for rank, other in enumerate(processes.gather(read)):
        for what, found in other.items():
            if found != read.get(what):
                raise ValueError(f"{what} is not on process {rank} what it is on process {processes.rank}")
