"""Figures of sharpness: spectra of the Hessian, and slices of the loss around a solution, of runs where they were measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from safe_lab.ablation.records import Record
from safe_lab.report.charts import SYMBOLS, Chart, Style, colour_of

if TYPE_CHECKING:
    from safe_lab.sharpness.landscape import Slice1D, Slice2D

# Lanczos also gives peaks that are nothing but rounding: what is lower than this share of the highest is not shown.
_LOWEST = 1e-8


def draw_spectra(records: Sequence[Record], styles: Mapping[str, Style]) -> Chart | None:
    """The density of the Hessian's eigenvalues: of each variant its first run that has one.

    Raises:
        KeyError: A spectrum is damaged.
        TypeError: Likewise.
    """
    measured: dict[str, Record] = {}
    for record in records:
        if not record.fault and "spectrum" in (record.result.get("sharpness") or {}):
            measured.setdefault(record.variant, record)
    if not measured:
        return None
    import plotly.graph_objects as go

    # It loads torch, which nothing else of a report does.
    from safe_lab.gauging import read_spectra

    spectra = read_spectra({variant: record.result["sharpness"] for variant, record in measured.items()})
    highest = max(value for spectrum in spectra.values() for value in spectrum.density)
    figure = go.Figure()
    for variant, spectrum in spectra.items():
        style = styles[variant]
        name = f"{variant}, seed {measured[variant].seed}"
        figure.add_scatter(
            x=list(spectrum.eigenvalues),
            y=list(spectrum.density),
            name=name,
            mode="lines",
            line={"color": style.colour, "dash": style.dash},
            hovertemplate="%{x:.4g}: %{y:.3g}",
        )
        figure.add_scatter(
            x=list(spectrum.top_eigenvalues),
            y=[3 * _LOWEST * highest] * len(spectrum.top_eigenvalues),
            name=f"{name}: largest eigenvalues",
            mode="markers",
            marker={"color": style.colour, "symbol": style.symbol, "size": 9},
            showlegend=False,
            hovertemplate="%{x:.4g}",
        )
    edges = [math.log10(_LOWEST * highest), math.log10(3 * highest)]
    figure.update_layout(
        xaxis_title="eigenvalue", yaxis={"title": "density", "type": "log", "exponentformat": "power", "range": edges}
    )
    note = "Of each variant's first run with one; marks: the largest eigenvalues. Mass far to the right is a sharp minimum."
    return Chart("Spectrum of the Hessian", note, figure)


def draw_slices(record: Record) -> Iterator[Chart]:
    """Slices of the loss around a run's solution.

    Raises:
        ValueError: They cannot be read.
    """
    if not (record.path / "sharpness" / "landscape.json").is_file():
        return
    from safe_lab.gauging import read_slices
    from safe_lab.sharpness import LANDSCAPES

    for kind, slices in read_slices(record.path).items():
        title = f"Loss {LANDSCAPES.get(kind, kind)}"
        if isinstance(slices, list):
            yield _draw_lines(title, slices)
        else:
            yield from _draw_planes(title, slices)


def _draw_lines(title: str, slices: Sequence[Slice1D]) -> Chart:
    import plotly.graph_objects as go

    figure = go.Figure()
    curves = [(one, sample, losses) for one in slices for sample, losses in one.losses.items()]
    for i, (one, sample, losses) in enumerate(curves):
        figure.add_scatter(
            x=one.positions,
            y=losses,
            name=f"{one.name}, {sample}",
            mode="lines+markers",
            line={"color": colour_of(i)},
            marker={"symbol": SYMBOLS[i % len(SYMBOLS)], "size": 4},
        )
    figure.update_layout(xaxis_title="step (1 = norm of the weights)", yaxis_title="mean loss")
    return Chart(title, "The solution lies at 0; a gap is a loss that was not finite, or not taken.", figure)


def _draw_planes(title: str, plane: Slice2D) -> Iterator[Chart]:
    import plotly.graph_objects as go

    for sample in plane.losses:
        x, y, losses = plane.whole_grid(sample)
        if not x:
            continue
        figure = go.Figure()
        figure.add_contour(x=x, y=y, z=losses, colorscale="Cividis", colorbar={"title": "mean loss"})
        figure.add_scatter(
            x=[0], y=[0], mode="markers", marker={"symbol": "x", "size": 10, "color": "#FFFFFF"}, name="solution"
        )
        figure.update_layout(
            xaxis_title="first direction (1 = norm of the weights)", yaxis_title="second direction", showlegend=False
        )
        yield Chart(f"{title}: {sample}", "The cross is the solution.", figure)
