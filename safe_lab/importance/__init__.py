"""Importance metrics: what each is called, where it lives, which options it takes.

The table is data and imports no torch, so that a configuration can be checked in an instant; the metric's module is
loaded when it is first used. A new metric is one file with a function ``score`` (and ``prepare``, if it must see the
model before training) and one entry in :data:`METRICS`. Higher always means more important.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from safe_lab.suggest import did_you_mean

if TYPE_CHECKING:
    from safe_lab.importance.probe import Probe


@dataclass(frozen=True)
class Metric:
    """One row of :data:`METRICS`.

    Attributes:
        module: File in this package.
        summary: One line for ``--help``.
        options: Name -> allowed values, default first. A float's allowed values are ``(default, low, high)`` with
            open ends.
    """

    module: str
    summary: str
    options: Mapping[str, tuple[Any, ...]] = field(default_factory=lambda: MappingProxyType({}))

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Hold options against :attr:`options`.

        Raises:
            ValueError: There is no such option, or not with this value.
        """
        for name, value in options.items():
            if name not in self.options:
                takes = ", ".join(self.options) or "none"
                raise ValueError(
                    f"metric {self.module} has no option {name}{did_you_mean(name, self.options)}; it takes {takes}"
                )
            allowed = self.options[name]
            if isinstance(allowed[0], float):
                _, low, high = allowed
                if not (isinstance(value, int | float) and low < value < high):
                    raise ValueError(
                        f"metric {self.module}, option {name}: must lie between {low} and {high}, got {value}"
                    )
            elif value not in allowed:
                raise ValueError(
                    f"metric {self.module}, option {name}: must be one of {', '.join(map(str, allowed))}, got {value}"
                )

    def prepare(self, probe: Probe, **options: Any) -> Any:
        """What the metric must see before the first training step, or None."""
        self.check_options(options)
        prepare = getattr(import_module(f"{__name__}.{self.module}"), "prepare", None)
        return prepare(probe, **options) if prepare else None

    def score(self, probe: Probe, **options: Any) -> list[float]:
        """One score for each of ``probe.units``, in their order; NaN and infinity are returned as they are."""
        self.check_options(options)
        if not probe.units:
            return []
        scores: list[float] = import_module(f"{__name__}.{self.module}").score(probe, **options)
        return scores


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "cka": Metric(
            "cka",
            "1 - CKA between a layer's output and the reference's (the paper's metric)",
            {
                "pooling": ("tokens", "first"),
                "hsic": ("biased", "debiased"),
                "reference": ("pretrained", "without_adapter"),
            },
        ),
        "sensitivity": Metric(
            "sensitivity",
            "mean |theta * dL/dtheta|; smoothed as in AdaLoRA on request",
            {"smoothing": (False, True), "beta1": (0.85, 0.0, 1.0), "beta2": (0.85, 0.0, 1.0)},
        ),
        "fisher": Metric(
            "fisher",
            "empirical Fisher, mean g^2 (weighted: mean g^2 theta^2)",
            {"source": ("probe", "adam"), "weighted": (False, True)},
        ),
        "contribution": Metric("contribution", "rise of the probe loss with that one adapter switched off"),
        "update_norm": Metric("update_norm", "Frobenius norm of the update since the start, ||Delta W||"),
        "gradient_ratio": Metric("gradient_ratio", "relative gradient norm, ||g|| / ||theta||"),
        "depth": Metric("depth", "control: the nearer to the output, the more important"),
        "random": Metric("random", "control: uniform noise, drawn anew at each scoring"),
    }
)
