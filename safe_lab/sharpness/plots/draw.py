"""From slices and spectra to files: which panels there are, what is written on them, which scales they share."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from safe_lab.sharpness.landscape import Slice1D, Slice2D, barrier
from safe_lab.sharpness.plots import page, png
from safe_lab.sharpness.plots.panels import (
    COLOURS,
    GREY,
    Chart,
    Curve,
    Map,
    Scale,
    Sheet,
    format_number,
    make_scale,
    plain,
    shortened,
    told_apart,
)
from safe_lab.whole_file import whole_file

Panel = TypeVar("Panel", Chart, Map)
Panels = Sequence[Panel | None]

# A page shows so many surfaces at most: browsers allow few WebGL contexts. With more it shows contours.
_MAX_SURFACES = 8
_MAX_COLUMNS = 4


@dataclass(frozen=True)
class Spectrum:
    """Spectral density of a run's curvature.

    Attributes:
        eigenvalues: Where the density is known, ascending.
        density: One for each.
        top_eigenvalues: The largest eigenvalues, from the largest down.
    """

    eigenvalues: Sequence[float]
    density: Sequence[float]
    top_eigenvalues: Sequence[float] = ()


def check_installed() -> None:
    """See before anything is measured whether it can be drawn.

    Raises:
        ValueError: matplotlib or plotly is not installed.
    """
    for library in ("matplotlib", "plotly"):
        if importlib.util.find_spec(library) is None:
            raise ValueError(f'{library}, which draws landscapes, is not installed: pip install "safe-lab[sharpness]"')


def draw_slices_1d(runs: Mapping[str, Sequence[Slice1D]], path: Path, *, title: str) -> list[Path]:
    """Draw slices along directions that are as long as the weights; those of one name have equal scales in all runs.

    Args:
        runs: Slices by the run's name.
        path: Where to write, without the suffix.
        title: Of the picture.

    Returns:
        The PNG and the page.

    Raises:
        ValueError: There is nothing to draw, or matplotlib or plotly is not installed.
    """
    names = list(dict.fromkeys(one.name for slices in runs.values() for one in slices))
    by_run = {run: {one.name: one for one in slices} for run, slices in runs.items()}
    num_columns = _num_columns(runs, names)
    panels: list[Chart | None] = []
    for name in names:
        same = [slices[name] for slices in by_run.values() if name in slices]
        x_scale = make_scale((t for one in same for t in one.positions), margin=0.02)
        y_scale = make_scale(_losses(same), may_be_logarithmic=True)
        for run, slices in by_run.items():
            curves = _curves(slices[name]) if name in slices else []
            panels.append(Chart(_varying(runs, run, names, name), curves, x_scale, y_scale))
        panels += _rest_of_row(runs, panels, num_columns)
    sheet = Sheet(_title(title, runs, []), "step (1 = norm of the weights)", "mean loss", num_columns)
    return _write(path, sheet, panels, png.draw_charts, page.draw_charts)


def draw_lines(lines: Sequence[Slice1D], path: Path, *, title: str) -> list[Path]:
    """Draw lines between two runs, with the barrier between them; all with equal scales.

    Args:
        lines: Of :func:`~safe_lab.sharpness.landscape.measure_line`, or the sides of a plane.
        path: Where to write, without the suffix.
        title: Of the picture.

    Returns:
        The PNG and the page.

    Raises:
        ValueError: There is nothing to draw, or matplotlib or plotly is not installed.
    """
    x_scale = make_scale((t for line in lines for t in line.positions), margin=0.02)
    y_scale = make_scale(_losses(lines), may_be_logarithmic=True)
    panels = []
    for line in lines:
        first, second = told_apart(list(line.marks)).values()
        ticks = {
            0.0: f"0\n{shortened(first, 18)}",
            0.25: "0.25",
            0.5: "0.5",
            0.75: "0.75",
            1.0: f"1\n{shortened(second, 18)}",
        }
        heights = ", ".join(f"{sample} {format_number(height)}" for sample, height in line.barriers.items())
        curves = [*_curves(line), *_barriers(line)]
        panels.append(Chart([line.name, f"barrier: {heights}"], curves, x_scale, y_scale, ticks))
    sheet = Sheet(title, "share of the way to the second run", "mean loss", min(len(lines), 3))
    return _write(path, sheet, panels, png.draw_charts, page.draw_charts)


def draw_spectra(runs: Mapping[str, Spectrum], path: Path, *, title: str) -> list[Path]:
    """Draw spectral densities, with ticks at the top eigenvalues; all with equal scales.

    Args:
        runs: Spectra by the run's name.
        path: Where to write, without the suffix.
        title: Of the picture.

    Returns:
        The PNG and the page.

    Raises:
        ValueError: There is nothing to draw, or matplotlib or plotly is not installed.
    """
    x_scale = make_scale(
        (value for one in runs.values() for value in (*one.eigenvalues, *one.top_eigenvalues)), margin=0.02
    )
    y_scale = _density_scale(list(runs.values()))
    panels = []
    for run, one in runs.items():
        lines = [run] if len(runs) > 1 else []
        if one.top_eigenvalues:
            lines.append(f"largest eigenvalue {format_number(one.top_eigenvalues[0])}")
        # A density of zero has no place on a logarithmic axis: below its edge the curve just leaves the panel.
        density = [max(plain(value), y_scale.low / 1e3) for value in one.density]
        curve = Curve("spectral density", list(one.eigenvalues), density, COLOURS[0])
        rug = [value for value in one.top_eigenvalues if math.isfinite(value)]
        panels.append(Chart(lines, [curve], x_scale, y_scale, rug=rug, rug_label="top eigenvalues"))
    sheet = Sheet(_title(title, runs, []), "eigenvalue", "density (per unit of eigenvalue)", min(len(runs), 3))
    return _write(path, sheet, panels, png.draw_charts, page.draw_charts)


def draw_slices_2d(runs: Mapping[str, Slice2D], path: Path, *, title: str) -> list[Path]:
    """Draw slices along two directions that are as long as the weights; all with equal scales and colours.

    The page shows surfaces, or contours where there are more panels than a browser can turn.

    Args:
        runs: The slice by the run's name.
        path: Where to write, without the suffix.
        title: Of the picture.

    Returns:
        The PNG and the page.

    Raises:
        ValueError: There is nothing to draw, or matplotlib or plotly is not installed.
    """
    samples = list(dict.fromkeys(sample for one in runs.values() for sample in one.losses))
    num_columns = _num_columns(runs, samples)
    panels: list[Map | None] = []
    for sample in samples:
        for run, one in runs.items():
            panels.append(_map(one, sample, _varying(runs, run, samples, sample), {"solution": (0.0, 0.0)}))
        panels += _rest_of_row(runs, panels, num_columns)
    sheet = Sheet(
        _title(title, runs, samples),
        "first direction (1 = norm of the weights)",
        "second direction",
        num_columns,
    )
    few = len(samples) * len(runs) <= _MAX_SURFACES
    return _write(path, sheet, panels, png.draw_maps, page.draw_surfaces if few else page.draw_maps)


def draw_plane(plane: Slice2D, path: Path, *, title: str) -> list[Path]:
    """Draw the plane through three runs, a panel for each sample, with the barriers between each two of them.

    Args:
        plane: Of :func:`~safe_lab.sharpness.landscape.measure_plane`.
        path: Where to write, without the suffix.
        title: Of the picture.

    Returns:
        The PNG and the page.

    Raises:
        ValueError: There is nothing to draw, or matplotlib or plotly is not installed.
    """
    letters = dict(zip(plane.marks, "ABC", strict=True))
    names = told_apart(list(plane.marks))
    marks = {f"{letters[run]}: {shortened(names[run], 48)}": place for run, place in plane.marks.items()}
    panels = []
    for sample in plane.losses:
        heights = ", ".join(
            f"{'-'.join(letters[run] for run in side.marks)} {format_number(side.barriers.get(sample))}"
            for side in plane.sides
        )
        lines = [sample] if len(plane.losses) > 1 else []
        panels.append(_map(plane, sample, [*lines, f"barrier: {heights}"], marks))
    sheet = Sheet(
        title,
        "distance in the weights, along A-B",
        "distance from that line, towards C",
        min(len(panels), _MAX_COLUMNS),
    )
    return _write(path, sheet, panels, png.draw_maps, page.draw_maps)


def _num_columns(runs: Mapping[str, object], others: Sequence[str]) -> int:
    """A column for each run; a single run's panels lie side by side."""
    return max(min(len(others) if len(runs) == 1 else len(runs), _MAX_COLUMNS), 1)


def _rest_of_row(runs: Mapping[str, object], panels: Panels[Panel], num_columns: int) -> list[None]:
    """Empty places, so that the next direction or sample begins a row."""
    return [None] * (-len(panels) % num_columns) if len(runs) > 1 else []


def _varying(runs: Mapping[str, object], run: str, others: Sequence[str], other: str) -> list[str]:
    """What tells a panel from the next: what all have in common is in the title of the picture."""
    return ([run] if len(runs) > 1 else []) + ([other] if len(others) > 1 else [])


def _title(title: str, runs: Mapping[str, object], others: Sequence[str]) -> str:
    common = [shortened(name, 60) for names in (list(runs), others) if len(names) == 1 for name in names]
    return ": ".join([title, ", ".join(common)] if common else [title])


def _density_scale(spectra: Sequence[Spectrum]) -> Scale:
    """From below the lowest peak to above the highest: between peaks the density falls to nothing."""
    peaks = []
    for one in spectra:
        density = [plain(value) for value in one.density]
        beside = zip([0.0, *density], density, [*density[1:], 0.0], strict=False)
        peaks += [here for before, here, after in beside if here > 0 and here >= before and here >= after]
    if not peaks:
        return Scale(1e-3, 1.0, logarithmic=True)
    # Lanczos also gives peaks that are nothing but rounding; one eigenvalue of a billion lies higher.
    return Scale(max(min(peaks), 1e-10 * max(peaks)) / 10, 3 * max(peaks), logarithmic=True)


def _losses(slices: Iterable[Slice1D]) -> list[float | None]:
    return [loss for one in slices for losses in one.losses.values() for loss in losses]


def _curves(one: Slice1D) -> list[Curve]:
    return [
        Curve(sample, one.positions, [plain(loss) for loss in losses], COLOURS[i % len(COLOURS)], marker=i)
        for i, (sample, losses) in enumerate(one.losses.items())
    ]


def _barriers(line: Slice1D) -> list[Curve]:
    """The straight line between the ends' losses, and the highest rise above it."""
    curves = []
    for i, (sample, losses) in enumerate(line.losses.items()):
        highest = barrier(line.positions, losses)
        if highest is None:
            continue
        taken = dict(zip(line.positions, losses, strict=True))
        start, end = plain(taken[0.0]), plain(taken[1.0])
        between = [t for t in line.positions if 0 <= t <= 1]
        even = [(1 - t) * start + t * end for t in between]
        curves.append(Curve("straight between the ends' losses", between, even, GREY, dash="dashed"))
        height, at = plain(line.barriers.get(sample)), highest[1]
        if height > 0:
            foot = (1 - at) * start + at * end
            curves.append(Curve("barrier", [at, at], [foot, foot + height], COLOURS[i % len(COLOURS)], dash="dotted"))
    return curves


def _map(one: Slice2D, sample: str, title: Sequence[str], marks: Mapping[str, Sequence[float]]) -> Map:
    x, y, losses = one.whole_grid(sample) if sample in one.losses else ([], [], [])
    return Map(title, x, y, [[plain(loss) for loss in row] for row in losses], marks)


def _write(
    path: Path,
    sheet: Sheet,
    panels: Panels[Panel],
    draw_png: Callable[[Sheet, Panels[Panel]], bytes],
    draw_page: Callable[[Sheet, Panels[Panel]], str],
) -> list[Path]:
    """Draw a picture twice, and write both files whole or not at all."""
    if not panels:
        raise ValueError("there is nothing to draw: no run was given")
    check_installed()
    files = {path.name + ".png": draw_png(sheet, panels), path.name + ".html": draw_page(sheet, panels).encode()}
    script = page.library().encode()
    beside = path.with_name(page.LIBRARY)
    # Of another version of plotly it may not know what this page asks of it.
    if not beside.exists() or beside.stat().st_size != len(script):
        files = {page.LIBRARY: script} | files
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        with whole_file(path.with_name(name)) as stream:
            stream.write(content)
    return [path.with_name(path.name + ".png"), path.with_name(path.name + ".html")]
