"""The metrics of the tasks: functions of predictions and labels, higher is better for all of them.

Where a coefficient is not defined, because predictions or labels are constant, it is 0: such predictions tell nothing
about the labels, and a NaN would spoil every mean it enters. scikit-learn does the same for Matthews' coefficient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]


def compute_metrics(names: Iterable[str], predictions: Array, labels: Array) -> dict[str, float]:
    """Compute each named metric.

    Args:
        names: Keys of :data:`METRICS`.
        predictions: Label ids (classification) or numbers (regression), shape (N,).
        labels: The same, shape (N,).

    Raises:
        ValueError: The shapes differ, there is nothing to measure, or a regression value is not finite.

    >>> compute_metrics(["accuracy", "f1"], np.array([1, 1, 0, 1]), np.array([1, 0, 0, 1]))
    {'accuracy': 0.75, 'f1': 0.8}
    """
    if predictions.shape != labels.shape or predictions.ndim != 1 or not len(labels):
        raise ValueError(
            f"metrics need two vectors of one length >= 1, got shapes {predictions.shape} and {labels.shape}"
        )
    return {name: METRICS[name](predictions, labels) for name in names}


def accuracy(predictions: Array, labels: Array) -> float:
    """Share of the predictions that are right."""
    return float(np.mean(predictions == labels))


def f1(predictions: Array, labels: Array) -> float:
    r"""F1 of label 1: :math:`2 tp / (2 tp + fp + fn)`, 0 where there is no positive at all."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, zero_division=0.0))


def macro_f1(predictions: Array, labels: Array) -> float:
    """Mean over the classes of each class's F1."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, average="macro", zero_division=0.0))


def matthews_correlation(predictions: Array, labels: Array) -> float:
    r"""Matthews' coefficient :math:`(tp \cdot tn - fp \cdot fn) / \sqrt{(tp+fp)(tp+fn)(tn+fp)(tn+fn)}`, in [-1, 1]."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predictions))


def pearson(predictions: Array, labels: Array) -> float:
    """Pearson's correlation, in [-1, 1]."""
    from scipy.stats import pearsonr

    return _correlate(pearsonr, predictions, labels)


def spearman(predictions: Array, labels: Array) -> float:
    """Spearman's rank correlation, in [-1, 1]."""
    from scipy.stats import spearmanr

    return _correlate(spearmanr, predictions, labels)


METRICS: Mapping[str, Callable[[Array, Array], float]] = MappingProxyType(
    {
        "accuracy": accuracy,
        "f1": f1,
        "macro_f1": macro_f1,
        "matthews_correlation": matthews_correlation,
        "pearson": pearson,
        "spearman": spearman,
    }
)


def _correlate(coefficient: Callable[..., tuple[float, float]], predictions: Array, labels: Array) -> float:
    values, targets = predictions.astype(np.float64), labels.astype(np.float64)
    if not (np.isfinite(values).all() and np.isfinite(targets).all()):
        raise ValueError("a correlation needs finite predictions and labels, got NaN or infinity")
    if np.ptp(values) == 0 or np.ptp(targets) == 0:
        return 0.0
    return float(coefficient(values, targets)[0])
