"""Measure a model on validation splits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import zip_longest
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from safe_lab import memory
from safe_lab.data import Task, compute_metrics
from safe_lab.data.tasks import metric_key
from safe_lab.importance.probe import Batch
from safe_lab.processes import ALONE, Processes

Output = TypeVar("Output")


def evaluate(
    model: nn.Module,
    validation: Mapping[str, Any],
    task: Task,
    *,
    processes: Processes = ALONE,
    skipping: Callable[[Batch], AbstractContextManager[None]] = lambda batch: nullcontext(),
    most_rows: Callable[[int], int] | None = None,
) -> dict[str, float]:
    """Task metrics and mean loss on every validation split.

    Args:
        model: The model; its train mode is restored.
        validation: Loader by name of the split, of this process's batches (:func:`safe_lab.data.loaders.build_eval_loader`).
        task: Names the metrics.
        processes: Those that measure it together; each example is measured by one of them.
        skipping: ``with skipping(batch): model(**batch)`` runs the model, once (:meth:`safe_lab.savings.Savings.skipping`).
        most_rows: Rows of a given length that go through the model at once; None: a whole batch.

    Returns:
        ``<split>/<metric>`` -> value.

    Raises:
        FloatingPointError: A prediction is NaN or infinite.
    """
    results: dict[str, float] = {}
    training, device = model.training, next(model.parameters()).device
    model.eval()
    for split, batches in validation.items():
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for batch in batches:
            outputs = []
            for part, _ in [(batch, 1.0)] if most_rows is None else memory.split_batch(batch, most_rows):
                with torch.no_grad(), skipping(part):
                    output = model(**{name: tensor.to(device) for name, tensor in part.items()})
                outputs.append((output.logits.float(), part["labels"], output.loss.float().expand(len(part["labels"]))))
            found.append(_join(outputs))
        # What comes after all examples was measured so that all processes had as much to do.
        logits, labels, losses = (part[: len(batches.dataset)] for part in _join(_in_turn(processes.gather(found))))
        if not logits.isfinite().all():
            raise FloatingPointError(
                f"a prediction on split {split} is not finite, with weights that are: they have exploded"
            )
        predictions = logits.squeeze(-1) if task.kind == "regression" else logits.argmax(-1)
        results[metric_key(split, "loss")] = losses.mean().item()
        for name, value in compute_metrics(task.metrics, predictions.numpy(), labels.numpy()).items():
            results[metric_key(split, name)] = value
    model.train(training)
    return results


def _join(outputs: Iterable[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    logits, labels, losses = (torch.cat(parts).cpu() for parts in zip(*outputs, strict=True))
    return logits, labels, losses


def _in_turn(shares: Sequence[Sequence[Output]]) -> Iterator[Output]:
    """What was dealt out in turn, in its order again.

    >>> list(_in_turn([["a", "d"], ["b"], ["c"]]))
    ['a', 'b', 'c', 'd']
    """
    for turn in zip_longest(*shares):
        yield from (output for output in turn if output is not None)
