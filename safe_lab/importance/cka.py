"""1 - CKA: how far an adapter has moved its layer's output from the pre-trained model's. The paper's metric.

Shapes: N rows (tokens or examples), D features.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from safe_lab.importance.activations import Reference, read_sites
from safe_lab.importance.hsic import Moments
from safe_lab.importance.probe import Probe
from safe_lab.processes import Processes
from safe_lab.units import Unit, switched_off


class Comparison:
    """CKA of X with Y while their rows go by.

    Args:
        hsic: Estimator, ``biased`` or ``debiased``.
        self_hsic_y: HSIC(Y, Y) if it is known already.
    """

    def __init__(self, hsic: str, self_hsic_y: float | None = None) -> None:
        self._hsic = hsic
        self._self_hsic_y = self_hsic_y
        self._xx, self._xy, self._yy = Moments(), Moments(), Moments()
        self._identical = True

    def add(self, x_ND: Tensor, y_ND: Tensor) -> None:
        """Take in some rows.

        Raises:
            RuntimeError: X and Y differ in shape.
        """
        if x_ND.shape != y_ND.shape:
            raise RuntimeError(
                f"activations {tuple(x_ND.shape)} do not fit their reference {tuple(y_ND.shape)}: the probe changed"
            )
        self._xx.add(x_ND, x_ND)
        self._xy.add(x_ND, y_ND)
        if self._self_hsic_y is None:
            self._yy.add(y_ND, y_ND)
        self._identical = self._identical and torch.equal(x_ND, y_ND)

    def sum_over(self, processes: Processes) -> None:
        """Take in the rows of all processes, all of which have to call this."""
        for moments in (self._xx, self._xy, self._yy):
            moments.sum_over(processes)
        self._identical = not processes.any(not self._identical)

    def importance(self, unit: Unit) -> float:
        r"""Score of what came by, :math:`1 - \mathrm{HSIC}(X, Y) / \sqrt{\mathrm{HSIC}(X, X)\,\mathrm{HSIC}(Y, Y)}`.

        0 if X and Y are identical. 1 if they are not and one of them is constant, where CKA is undefined. In [0, 1]
        with biased estimates, in [0, 2] with debiased ones, which may be negative; NaN if an activation is not
        finite.

        Args:
            unit: For the message.

        Raises:
            ValueError: No rows came by, or one.
        """
        if self._xx.num_rows == 0:
            raise ValueError(
                f"the probe gave no activations for unit {unit.name}: its site must run in every forward pass"
            )
        if self._xx.num_rows < 2:
            raise ValueError(
                f"the probe gave one row for unit {unit.name}, and CKA compares two or more: take more samples"
            )
        if self._identical:
            return 0.0
        xx, xy = self._xx.self_hsic(self._hsic), self._xy.hsic(self._hsic)
        yy = self._yy.self_hsic(self._hsic) if self._self_hsic_y is None else self._self_hsic_y
        if xx <= 0 or yy <= 0:
            return 1.0
        # np.clip keeps NaN, min and max do not.
        return 1 - float(np.clip(xy / (math.sqrt(xx) * math.sqrt(yy)), -1 if self._hsic == "debiased" else 0, 1))


def prepare(
    probe: Probe, *, pooling: str = "tokens", hsic: str = "biased", reference: str = "pretrained"
) -> Reference | None:
    """Run the probe on the pre-trained model and keep its activations on disk; nothing to do for ``without_adapter``.

    Args:
        probe: All units of the model. They are switched off together, unless ``probe.reference_is_current``.
        pooling: As in :func:`score`.
        hsic: As in :func:`score`.
        reference: As in :func:`score`.

    Raises:
        ValueError: A unit has no site, or cannot be switched off.
        OSError: The temporary folder cannot hold the activations.
    """
    if reference == "without_adapter":
        return None
    stored, moments = Reference(), {unit.site: Moments() for unit in probe.units}

    def store(site: nn.Module, y_ND: Tensor, _: Callable[[], Tensor]) -> None:
        stored.write(site, y_ND)
        moments[site].add(y_ND, y_ND)

    with nullcontext() if probe.reference_is_current else switched_off(probe.units):
        read_sites(probe, pooling=pooling, read=store)
    stored.check_written()
    for m in moments.values():
        m.sum_over(probe.processes)
    stored.self_hsic = {site: m.self_hsic(hsic) for site, m in moments.items() if site is not None and m.num_rows}
    return stored


def score(probe: Probe, *, pooling: str = "tokens", hsic: str = "biased", reference: str = "pretrained") -> list[float]:
    r"""Importance of a unit by centred kernel alignment.

    .. math::
        \mathrm{Imp}(A_i) = 1 - \mathrm{CKA}(X_i, Y_i), \qquad
        \mathrm{CKA}(X, Y) = \frac{\|Y^\top X\|_F^2}{\|X^\top X\|_F \, \|Y^\top Y\|_F}

    with X_i the output at the unit's site, adapters on, and Y_i that of the reference on the same examples, columns
    centred. One forward pass of the probe; 2 D^2 float64 numbers a site while it runs (3 D^2 for
    ``without_adapter``).

    Source: SAFE (Son et al., NAACL 2025). Reconstruction: that columns are centred, and which token rows enter.

    Args:
        probe: With ``probe.reference`` from :func:`prepare`.
        pooling: Rows of X and Y: ``tokens``, all that are not padding, or ``first``, the first one of each example.
        hsic: ``biased`` is the formula above; ``debiased`` puts the unbiased estimator in its place.
        reference: Y from the ``pretrained`` model, so that changes below the unit count too; or ``without_adapter``:
            the site run again on the same input with only this unit switched off.

    Returns:
        One score for each of ``probe.units``. Units that share a site have the same score, unless ``without_adapter``.

    Raises:
        ValueError: A unit has no site, its site does not run, or the reference was not prepared.
        RuntimeError: The activations do not fit those of the reference.
    """
    if reference == "without_adapter":
        return _compare_without_adapter(probe, pooling=pooling, hsic=hsic)
    stored = probe.reference
    if not isinstance(stored, Reference):
        raise ValueError(
            "cka with reference: pretrained needs Probe.reference: what Metric.prepare returned before training"
        )
    comparisons: dict[nn.Module | None, Comparison] = {}
    for unit in probe.units:
        if unit.site is not None and unit.site not in comparisons:
            comparisons[unit.site] = Comparison(hsic, stored.self_hsic.get(unit.site, 0.0))
    calls: Counter[nn.Module] = Counter()

    def compare(site: nn.Module, x_ND: Tensor, _: Callable[[], Tensor]) -> None:
        if calls[site] < stored.num_blocks(site):
            comparisons[site].add(x_ND, stored.read(site, calls[site], x_ND.device))
        calls[site] += 1

    read_sites(probe, pooling=pooling, read=compare)
    for site, num_calls in calls.items():
        if num_calls != stored.num_blocks(site):
            raise RuntimeError(
                f"a site ran {num_calls} times, {stored.num_blocks(site)} in the reference: the probe changed"
            )
    for comparison in comparisons.values():
        comparison.sum_over(probe.processes)
    return [comparisons[unit.site].importance(unit) for unit in probe.units]


def _compare_without_adapter(probe: Probe, *, pooling: str, hsic: str) -> list[float]:
    comparisons = [(unit, Comparison(hsic)) for unit in probe.units]

    def compare(site: nn.Module, x_ND: Tensor, again: Callable[[], Tensor]) -> None:
        for unit, comparison in comparisons:
            if unit.site is site:
                with switched_off([unit]):
                    y_ND = again()
                comparison.add(x_ND, y_ND)

    read_sites(probe, pooling=pooling, read=compare)
    for _, comparison in comparisons:
        comparison.sum_over(probe.processes)
    return [comparison.importance(unit) for unit, comparison in comparisons]
