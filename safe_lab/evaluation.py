"""Measure a model on validation splits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn

from safe_lab import memory
from safe_lab.data import Task, compute_metrics
from safe_lab.importance.probe import Batch


def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    validation: Mapping[str, Any],
    task: Task,
    *,
    skipping: Callable[[Batch], AbstractContextManager[None]] = lambda batch: nullcontext(),
    most_rows: Callable[[int], int] | None = None,
) -> dict[str, float]:
    """Task metrics and mean loss on every validation split.

    Args:
        accelerator: Gathers over processes.
        model: The model; its train mode is restored.
        validation: Loader by name of the split.
        task: Names the metrics.
        skipping: ``with skipping(batch): model(**batch)`` runs the model (:meth:`safe_lab.savings.Savings.skipping`).
        most_rows: Rows of a given length that go through the model at once; None: a whole batch.

    Returns:
        ``<split>/<metric>`` -> value.

    Raises:
        FloatingPointError: A prediction is NaN or infinite.
    """
    results: dict[str, float] = {}
    training = model.training
    model.eval()
    for split, batches in validation.items():
        outputs: list[tuple[Tensor, Tensor, Tensor]] = []
        for batch in batches:
            for part, _ in [(batch, 1.0)] if most_rows is None else memory.split_batch(batch, most_rows):
                with torch.no_grad(), skipping(part):
                    output = model(**send_to_device(part, accelerator.device))
                labels = part["labels"].to(accelerator.device)
                found = (output.logits.float(), labels, output.loss.float().expand(len(labels)))
                outputs.append(accelerator.gather_for_metrics(found))
        logits, labels, losses = (torch.cat(parts).cpu() for parts in zip(*outputs, strict=True))
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


def metric_key(split: str, metric: str) -> str:
    """The key of a metric: ``validation/accuracy``, and ``validation_matched/accuracy`` where there are several splits.

    >>> metric_key("validation", "f1"), metric_key("matched", "accuracy")
    ('validation/f1', 'validation_matched/accuracy')
    """
    return f"{split if split == 'validation' else f'validation_{split}'}/{metric}"
