"""The single numbers of a ``result.json``, each by one name: what studies aim at and comparisons are made of.

``validation/accuracy`` is a task metric, ``resources/memory_mean_bytes``, ``seconds/training`` or ``frozen_share`` lie where the
name says, and ``sharpness/trace`` is the value of an estimate. Figures of a test split have no name here: they are looked at
once, at the very end, and nothing is to be chosen by them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from safe_lab.byte_size import byte_unit, format_bytes, parse_bytes
from safe_lab.config import Config
from safe_lab.data.tasks import TASKS, metric_key
from safe_lab.suggest import did_you_mean

_GROUPS = {
    "seconds": ("training", "evaluation", "scoring", "checkpoint"),
    "resources": (
        *("wall_seconds", "cpu_seconds", "joules", "flops", "tokens_per_second", "tokens_computed"),
        *("memory_peak_bytes", "memory_mean_bytes", "memory_mean_step_peak_bytes", "host_memory_peak_bytes"),
        *("device_allocated_peak_bytes", "device_reserved_peak_bytes"),
    ),
    "resources/seconds": (
        *("setup", "data", "forward", "backward", "optimizer", "scoring", "freezing", "cache", "checkpoint"),
        *("evaluation", "sharpness", "tracking", "other"),
    ),
    "resources/flops_by_phase": ("forward", "backward", "scoring", "evaluation", "cache"),
    "parameters": ("total", "adapters", "trainable_at_start", "trainable_at_end"),
    "savings": ("folded_layers", "prefix_depth", "cached_depth", "cached_examples", "cache_bytes"),
}
_KINDS = ("parameters", "buffers", "gradients", "optimizer", "activations", "temporary", "cache")
_TOP = ("selected_step", "steps", "epochs", "tokens", "frozen_share", "frozen_depth")
_BYTES = re.compile(r"_bytes$|_by_kind/")
_FLOPS = re.compile(r"flops(_by_phase/\w+)?$")
_SECONDS = re.compile(r"(^|[/_])seconds(/\w+)?$")
_FLOP_UNITS = {"GFLOP": 1e9, "TFLOP": 1e12, "PFLOP": 1e15}
_SECOND_UNITS = {"min": 60.0, "s": 1.0, "h": 3600.0}
# Of every sample, and by measure.
_ALWAYS_MEASURED = ("loss", "gradient_norm")
_BY_MEASURE = {
    "effective_weights": ("effective_weight_trace",),
    "ball": ("ball_rise", "ball_adaptive_rise"),
    "average": ("average_rise", "average_adaptive_rise"),
    "spectrum": ("smallest_eigenvalue",),
    "eigenvalues": ("top_eigenvalue",),
    "gauss_newton": ("gauss_newton_trace", "adaptive_gauss_newton_trace"),
    "trace": ("trace", "adaptive_trace"),
}

FIGURES = (
    *_TOP,
    *(f"{group}/{name}" for group, names in _GROUPS.items() for name in names),
    *(f"resources/memory_{when}_by_kind/{kind}" for when in ("peak", "mean") for kind in _KINDS),
)


# Those that a replay forecasts.
FORECAST = (
    *("resources/memory_mean_bytes", "resources/memory_peak_bytes", "resources/flops", "resources/wall_seconds"),
    *("frozen_share", "frozen_depth"),
)


def known_figures(config: Config) -> tuple[str, ...]:
    """Names of the figures that a run of this configuration reports."""
    task = TASKS[config.data.task]
    metrics = (metric_key(split, name) for split in task.validation_splits for name in ("loss", *task.metrics))
    sharpness = config.sharpness
    samples = {"": sharpness.measures}
    if sharpness.validation_samples:
        samples["validation_"] = sharpness.validation_measures
    measured = (
        f"sharpness/{sample}{name}"
        for sample, measures in samples.items()
        for name in (*_ALWAYS_MEASURED, *(name for measure in measures for name in _BY_MEASURE.get(measure, ())))
    )
    return (*metrics, *FIGURES, *(measured if sharpness.when == "end" else ()))


def check_figure(name: str, config: Config) -> None:
    """Whether runs of a configuration report a figure.

    Raises:
        ValueError: They do not, or it is one of a test split.
    """
    if re.match(r"test(_\w+)?/", name):
        raise ValueError(
            f"{name!r} is of a test split, and what is chosen by it would no longer be tested by it: "
            "take one of the validation split"
        )
    known = known_figures(config)
    if name not in known:
        hint = did_you_mean(name, known)
        if name.startswith("sharpness/") and config.sharpness.when == "never":
            hint = "; sharpness is measured with sharpness.when: end"
        raise ValueError(f"{name!r} is no figure of a run's result.json{hint}")


def read_figure(result: Mapping[str, Any], name: str) -> float:
    """A figure of a run.

    Args:
        result: What ``result.json`` holds.
        name: Its name.

    Raises:
        ValueError: The run has no such figure, or there was no meter for it.

    >>> read_figure({"metrics": {"validation/f1": 0.9}, "seconds": {"training": 3}}, "seconds/training")
    3.0
    """
    value: Any = result["metrics"].get(name)
    if value is None and name.startswith("sharpness/"):
        value = _of_sharpness(result, name.removeprefix("sharpness/"))
    elif value is None:
        value = result
        for key in name.split("/"):
            value = value.get(key) if isinstance(value, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"the run's result.json has no figure {name!r}, or nothing on this machine that measures it")
    return float(value)


def _of_sharpness(result: Mapping[str, Any], name: str) -> float | None:
    measured = result.get("sharpness")
    if measured is None:
        return None
    # It loads torch.
    from safe_lab.gauging import summarize_all

    return summarize_all(measured).get(name)


def is_cost(name: str) -> bool:
    """Whether a figure is an amount that is spent.

    >>> is_cost("resources/flops"), is_cost("validation/accuracy")
    (True, False)
    """
    return name.startswith(("resources/", "seconds/", "parameters/"))


def differs_by_factor(name: str) -> bool:
    """Whether what counts is by which factor a figure differs, where it is positive: a cost, or a curvature.

    >>> differs_by_factor("sharpness/trace"), differs_by_factor("validation/loss")
    (True, False)
    """
    return is_cost(name) or name.startswith("sharpness/")


def direction_of(name: str) -> int:
    """1 if more of a figure is better, -1 if less is, 0 if it is neither good nor bad by itself.

    >>> direction_of("validation/f1"), direction_of("validation/loss"), direction_of("frozen_share")
    (1, -1, 0)
    """
    if name.startswith("validation"):
        return -1 if name.endswith("/loss") else 1
    if name == "resources/tokens_per_second":
        return 1
    return -1 if is_cost(name) or name.startswith("sharpness/") else 0


def format_figure(name: str, value: float) -> str:
    """A figure as a person reads it, in the unit that its name tells.

    >>> format_figure("resources/flops", 2.5e11), format_figure("seconds/training", 61.237)
    ('0.25 TFLOP', '61.24 s')
    """
    if _BYTES.search(name):
        return format_bytes(value)
    if _FLOPS.search(name):
        return f"{value / 1e12:.4g} TFLOP"
    return f"{value:.4g} s" if _SECONDS.search(name) else f"{value:.4g}"


def unit_of(name: str, value: float) -> tuple[str, float]:
    """The unit in which an amount of a figure is written, and how much one of it is; empty and 1 where it has none.

    >>> unit_of("resources/memory_mean_bytes", 2.5e8), unit_of("resources/flops", 2e15), unit_of("validation/f1", 0.9)
    (('MiB', 1048576), ('PFLOP', 1000000000000000.0), ('', 1))
    """
    if _BYTES.search(name):
        return byte_unit(value)
    if _FLOPS.search(name):
        return next((one for one in reversed(_FLOP_UNITS.items()) if value >= one[1]), ("GFLOP", 1e9))
    return ("s", 1) if _SECONDS.search(name) else ("J", 1) if name.endswith("joules") else ("", 1)


def parse_amount(name: str, text: str) -> float:
    """An amount of a figure: a number, and where the figure has a unit also one with it: ``6GiB``, ``1.5TFLOP``, ``90s``.

    Raises:
        ValueError: None of them.

    >>> parse_amount("frozen_share", "0.25"), parse_amount("resources/flops", "2TFLOP"), parse_amount("seconds/training", "90 s")
    (0.25, 2000000000000.0, 90.0)
    """
    units = _FLOP_UNITS if _FLOPS.search(name) else _SECOND_UNITS if _SECONDS.search(name) else {}
    unit = next((unit for unit in units if text.rstrip().endswith(unit)), "")
    try:
        amount = float(text.rstrip().removesuffix(unit)) * units.get(unit, 1.0)
        if not math.isfinite(amount):
            raise ValueError
        return amount
    except ValueError:
        if _BYTES.search(name):
            return float(parse_bytes(text))
        known = f" and a unit, {' or '.join(units)}" if units else ""
        raise ValueError(f"{text!r} is no amount of {name}: a number{known} is needed") from None
