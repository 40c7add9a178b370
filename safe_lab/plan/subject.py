"""From a run's configuration to a model without weights whose steps can be rehearsed."""

from __future__ import annotations

import logging
import os
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from transformers import PreTrainedModel

from safe_lab.adapters import attach, build_peft_config, find_units
from safe_lab.byte_size import format_bytes
from safe_lab.config import AdapterSection, Config
from safe_lab.data.tasks import TASKS
from safe_lab.memory.predict import Rehearsal, count_bytes, make_full_batch, to_fake
from safe_lab.model import build_skeleton, check_length, checkpoint_gradients, named_shape
from safe_lab.optimizer import build_optimizer
from safe_lab.shapes import find_shape

# Starts of LoRA that are computed from the weights; shapes, and so costs, are those of plain LoRA.
_NEED_WEIGHTS = ("pissa", "olora", "corda", "loftq", "orthogonal")


@dataclass(frozen=True)
class Subject:
    """What is planned for.

    Attributes:
        rehearsal: Traces its steps.
        layers: Transformer layers.
        parameters: Weights in all, adapters and head included.
        num_labels: Size of the head.
        attention: Attention implementation in use.
        kept_bytes: What safe_lab keeps beside the model: every unit as it was at the start (by which its update is
            measured), and the best weights of all that trains.
        checkpoint_weight_bytes: Weights in a checkpoint: the last and the best, and every unit at the start.
        notes: What was done otherwise than the configuration says, in sentences.
    """

    rehearsal: Rehearsal
    layers: int
    parameters: int
    num_labels: int
    attention: str
    kept_bytes: int
    checkpoint_weight_bytes: int
    notes: tuple[str, ...] = ()


def build_subject(config: Config, *, num_labels: int | None = None, fake: bool = True) -> Subject:
    """The model as configured, on fake tensors; on real ones with random weights where it cannot be had on fake ones.

    Args:
        config: The run.
        num_labels: Size of the head, where the data have been read; None: as the configuration or the task says, or else 2.
        fake: False: on real tensors with random weights in any case, whose operators take their time.

    Raises:
        ValueError: The configuration asks for what there is not, or the model can be run in neither way.
    """
    if num_labels is not None:
        names = tuple(map(str, range(num_labels)))
        config = config.model_copy(update={"data": config.data.model_copy(update={"labels": names})})
    if not fake:
        return _build(config, None)
    # It would print a traceback of what is told here in a sentence.
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    try:
        return _build(config, FakeTensorMode())
    except Exception as error:
        root = _root(error)
        if isinstance(root, ValueError | OSError | ImportError):
            raise
        reason = f"{type(root).__name__}: {_first_line(root)}"
    _check_room(config, reason)
    try:
        subject = _build(config, None)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"model.path: {config.model.path} runs neither without weights ({reason}) nor with random ones "
            f"({type(error).__name__}: {_first_line(error)})"
        ) from error
    note = f"Real steps were measured, on the CPU with random weights, as the model does not run without weights ({reason})."
    return replace(subject, notes=(*subject.notes, note))


def _build(config: Config, mode: FakeTensorMode | None) -> Subject:
    """Everything as :func:`safe_lab.build.build` does it, less data and weights; without ``mode`` on real tensors."""
    adapter, notes = _without_weights(config.adapter)
    num_labels = _num_labels(config)
    device = "cpu" if mode is None else "meta"
    base, heads = _build_base(config, device)
    check_length(base, config.data.max_length)
    with torch.device(device):
        model = attach(base, build_peft_config(**adapter.model_dump(), head_modules=heads)).model
    if config.model.gradient_checkpointing:
        checkpoint_gradients(base)
    if mode is not None:
        to_fake(model, mode)

    task = TASKS[config.data.task]
    if task.kind == "classification" and not (config.data.labels or task.labels):
        notes = (*notes, "2 labels are assumed, as only the data tell how many there are: set data.labels.")
    if named_shape(config.model.path) is None and not base.config.name_or_path:
        shape = find_shape(config.model.path)
        notes = (
            *notes,
            f"The shape {shape} stands in for {config.model.path}, whose config.json is not on this machine.",
        )
    text = base.config.get_text_config()

    def make_batch(rows: int, tokens: int) -> dict[str, Tensor]:
        return make_full_batch(rows, tokens=tokens, num_labels=num_labels, vocabulary=text.vocab_size)

    optimizer = build_optimizer(model, config.training)
    model.eval()
    with mode or nullcontext():
        units = find_units(model, lambda: model(**make_batch(1, config.data.max_length)), config.freezing.unit)
    rehearsal = Rehearsal(
        model,
        units,
        optimizer,
        make_batch,
        tokens=config.data.max_length,
        mode=mode,
        mixed_precision=config.training.mixed_precision,
        max_grad_norm=config.training.max_grad_norm,
    )
    trained_bytes = count_bytes(rehearsal.trained)
    start_bytes = sum(count_bytes(unit.parameters.values()) for unit in units)
    # Without evaluations in training there is nothing to choose the best weights by, until it is over.
    best_bytes = trained_bytes if config.training.select == "best" and config.training.eval_every != "never" else 0
    return Subject(
        rehearsal=rehearsal,
        layers=text.num_hidden_layers,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_labels=num_labels,
        attention=base.config._attn_implementation,
        kept_bytes=start_bytes + best_bytes,
        checkpoint_weight_bytes=trained_bytes + best_bytes + start_bytes,
        notes=notes,
    )


def _build_base(config: Config, device: str) -> tuple[PreTrainedModel, list[str]]:
    return build_skeleton(
        **config.model.model_dump(exclude={"gradient_checkpointing"}),
        num_labels=_num_labels(config),
        regression=TASKS[config.data.task].kind == "regression",
        pad_token_id=None,
        device=device,
    )


def _num_labels(config: Config) -> int:
    """Size of the head: 1 for regression; of a classification whose labels only the data tell, 2."""
    task = TASKS[config.data.task]
    return 1 if task.kind == "regression" else len(config.data.labels or task.labels or (0, 1))


def _check_room(config: Config, reason: str) -> None:
    """Refuse real weights that the machine has no memory for.

    Raises:
        ValueError: It has not.
    """
    try:
        needed = count_bytes(_build_base(config, "meta")[0].parameters())
    except ValueError:  # cannot be known before it is built
        return
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise ValueError(
            f"model.path: {config.model.path} does not run without weights ({reason}), and of the {format_bytes(needed)} that "
            f"its weights take this machine has {format_bytes(there)}"
        )


def _without_weights(adapter: AdapterSection) -> tuple[AdapterSection, tuple[str, ...]]:
    start = adapter.options.get("init_lora_weights")
    if not (isinstance(start, str) and start.startswith(_NEED_WEIGHTS)):
        return adapter, ()
    options = {key: value for key, value in adapter.options.items() if key != "init_lora_weights"}
    note = f"Planned as plain LoRA: init_lora_weights: {start} sets other values, and costs the same."
    return adapter.model_copy(update={"options": options}), (note,)


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
