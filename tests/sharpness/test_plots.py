"""Pictures: what is in the files, hostile names, missing points, equal scales."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import asdict, replace
from html.parser import HTMLParser

import matplotlib
import pytest
from PIL import Image

from safe_lab.run_folder import to_json
from safe_lab.sharpness import plots
from safe_lab.sharpness.landscape import Slice1D, Slice2D
from safe_lab.sharpness.plots import (
    Spectrum,
    draw,
    draw_lines,
    draw_plane,
    draw_slices_1d,
    draw_slices_2d,
    draw_spectra,
)
from safe_lab.sharpness.plots.panels import Scale, make_scale, shortened, wrapped

HOSTILE = [
    # No formula that matplotlib could read.
    "$\\frac$ <b>&_y_ {0}",
    "_under</script><script>alert(1)</script>",
    "a-very-long-experiment/with-a-long-variant-name/that-goes-on/and-on/seed-1234567",
    "line\nbreak\t\x00 $",
]
T = [i / 4 for i in range(-4, 5)]


def parabola(height=1.0, name="random", bottom=0.1):
    losses = {"training": [bottom + height * t * t for t in T], "validation": [2 * bottom + height * t * t for t in T]}
    return Slice1D(name, T, losses, 1.0, complete=True)


def line(first="first", second="second", height=1.0):
    t = [i / 8 for i in range(-2, 11)]
    losses = {"training": [0.5 + 4 * height * s * (1 - s) if 0 <= s <= 1 else 0.5 for s in t]}
    barriers = {"training": height}
    return Slice1D(f"{first} → {second}", t, losses, 1.0, True, {first: 0.0, second: 1.0}, barriers)


def bowl(height=1.0, bottom=0.1):
    losses = {
        sample: [[bottom + height * (x * x + y * y) for x in T] for y in T] for sample in ("training", "validation")
    }
    return Slice2D("random", T, T, losses, 1)


def plane(runs=("first", "second", "third")):
    marks = dict(zip(runs, [[-0.5, -0.5], [0.5, -0.5], [0.0, 0.5]], strict=True))
    a, b, c = runs
    sides = [line(a, b, 0.125), line(a, c, 0.25), line(b, c, 0.375)]
    return replace(bowl(), marks=marks, sides=sides)


def spectrum(top=4.0):
    grid = [i / 10 for i in range(-10, int(top * 10) + 10)]
    density = [math.exp(-50 * x * x) + 1e-4 * math.exp(-50 * (x - top) ** 2) for x in grid]
    return Spectrum(grid, density, [top, top / 2])


def all_kinds(names):
    """Each picture there is, of runs with these names."""
    return {
        "slices-1d": lambda path: draw_slices_1d({name: [parabola()] for name in names}, path, title=names[0]),
        "lines": lambda path: draw_lines([line(names[0], names[1])], path, title=names[0]),
        "slices-2d": lambda path: draw_slices_2d({name: bowl() for name in names}, path, title=names[0]),
        "plane": lambda path: draw_plane(plane(names[:3]), path, title=names[0]),
        "spectra": lambda path: draw_spectra({name: spectrum() for name in names}, path, title=names[0]),
    }


KINDS = list(all_kinds(HOSTILE))
each_kind = pytest.mark.parametrize("kind", KINDS)


class Page(HTMLParser):
    """What a browser would see: tags, and the figure that plotly is given."""

    def __init__(self, path):
        super().__init__()
        text = path.read_text(encoding="utf-8")
        self.tags = []
        self.feed(text)
        after = text.split("Plotly.newPlot(")[1].split('"figure",', 1)[1].lstrip()
        self.traces, end = json.JSONDecoder().raw_decode(after)
        self.layout, _ = json.JSONDecoder().raw_decode(after[end:].lstrip(" ,\n"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def axes(self, letter):
        """The axes' layouts, in the order of the panels."""
        names = [name for name in self.layout if re.fullmatch(f"{letter}axis\\d*", name)]
        return [self.layout[name] for name in sorted(names, key=lambda name: int(name[5:] or 1))]

    def texts(self):
        return [annotation["text"] for annotation in self.layout.get("annotations", [])]

    def traces_of(self, kind):
        return [trace for trace in self.traces if trace["type"] == kind]


# Files


@each_kind
def test_png_shows_something_at_a_size_to_read(kind, tmp_path):
    png, _ = all_kinds(["a", "b", "c"])[kind](tmp_path / "picture")
    with Image.open(png) as image:
        assert image.format == "PNG"
        assert min(image.size) > 400
        assert len(image.convert("RGB").getcolors(1_000_000)) > 50


@each_kind
def test_page_reads_one_script_beside_it_and_nothing_else(kind, tmp_path):
    _, path = all_kinds(["a", "b", "c"])[kind](tmp_path / "picture")
    found = Page(path)
    assert [attributes["src"] for tag, attributes in found.tags if tag == "script" and "src" in attributes] == [
        "plotly.min.js"
    ]
    assert (tmp_path / "plotly.min.js").stat().st_size > 1_000_000
    assert not [tag for tag, _ in found.tags if tag in ("link", "img", "iframe")]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["picture.html", "picture.png", "plotly.min.js"]


@each_kind
@pytest.mark.filterwarnings("error")
def test_hostile_names_are_read_as_they_are(kind, tmp_path):
    png, path = all_kinds(HOSTILE)[kind](tmp_path / "picture")
    with Image.open(png) as image:
        assert max(image.size) < 4000
    found = Page(path)
    # plotly's own, and ours.
    assert len([tag for tag, _ in found.tags if tag == "script"]) == 3
    assert not [tag for tag, _ in found.tags if tag == "b"]
    words = json.dumps([found.layout, [trace.get("name", "") for trace in found.traces]], ensure_ascii=False)
    assert "$ &lt;b&gt;&amp;_y_ {0}" in words
    assert "<b>" not in words
    assert "<script>" not in words


def test_suffix_is_put_behind_a_name_with_dots(tmp_path):
    files = draw_lines([line()], tmp_path / "new" / "rank.8", title="line")
    assert [file.name for file in files] == ["rank.8.png", "rank.8.html"]
    assert all(file.exists() for file in files)


def test_picture_that_fails_leaves_the_former_one(tmp_path, monkeypatch):
    files = draw_lines([line()], tmp_path / "line", title="former")
    before = [file.read_bytes() for file in files]

    def fail(*_):
        raise RuntimeError

    monkeypatch.setattr(draw.page, "draw_charts", fail)
    with pytest.raises(RuntimeError):
        draw_lines([line(height=2.0)], tmp_path / "line", title="new")
    assert [file.read_bytes() for file in files] == before


def test_script_is_written_once_and_again_if_it_is_another(tmp_path):
    draw_lines([line()], tmp_path / "line", title="line")
    script = tmp_path / "plotly.min.js"
    written = script.stat().st_mtime_ns
    draw_lines([line()], tmp_path / "line", title="line")
    assert script.stat().st_mtime_ns == written
    script.write_text("of another version")
    draw_lines([line()], tmp_path / "line", title="line")
    assert script.stat().st_size > 1_000_000


@pytest.mark.parametrize("library", ["matplotlib", "plotly"])
def test_missing_library_is_named_with_what_installs_it(library, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ValueError, match=rf'{library}.*pip install "safe-lab\[sharpness\]"'):
        draw_lines([line()], tmp_path / "line", title="line")
    with pytest.raises(ValueError, match=library):
        plots.check_installed()
    assert not list(tmp_path.iterdir())


def test_nothing_loads_before_something_is_drawn_and_pyplot_never():
    program = (
        "import sys, pathlib, tempfile\n"
        "from safe_lab.sharpness.plots import Spectrum, draw_spectra\n"
        "assert not {'matplotlib', 'plotly'} & set(sys.modules)\n"
        "draw_spectra({'a': Spectrum([0, 1, 2], [0, 1, 0])}, pathlib.Path(tempfile.mkdtemp()) / 'x', title='x')\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_settings_of_others_are_left_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    draw_lines([line()], tmp_path / "line", title="line")
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    "draw_nothing", [lambda p: draw_lines([], p, title="x"), lambda p: draw_spectra({}, p, title="x")]
)
def test_nothing_to_draw_is_said(draw_nothing, tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_nothing(tmp_path / "picture")


# Scales


def test_slices_of_one_name_have_equal_scales_in_all_runs(tmp_path):
    runs = {
        "flat": [parabola(1.0, "random"), parabola(3.0, "eigenvector")],
        "sharp": [parabola(2.0, "random"), parabola(7.0, "eigenvector")],
    }
    found = Page(draw_slices_1d(runs, tmp_path / "picture", title="x")[1])
    random_flat, random_sharp, eigen_flat, eigen_sharp = (axis["range"] for axis in found.axes("y"))
    assert random_flat == random_sharp == pytest.approx([0.0, 2.3], abs=0.1)
    assert eigen_flat == eigen_sharp == pytest.approx([0.0, 7.6], abs=0.3)
    assert len({tuple(axis["range"]) for axis in found.axes("x")}) == 1
    assert found.axes("y")[1]["matches"] == "y"
    assert "matches" not in found.axes("y")[2]
    assert found.texts() == [
        "flat<br>random",
        "sharp<br>random",
        "flat<br>eigenvector",
        "sharp<br>eigenvector",
    ]


def test_planes_of_all_runs_and_samples_have_equal_colours(tmp_path):
    found = Page(draw_slices_2d({"flat": bowl(1.0), "sharp": bowl(4.0)}, tmp_path / "picture", title="x")[1])
    surfaces = found.traces_of("surface")
    assert len(surfaces) == 4
    assert {trace["coloraxis"] for trace in surfaces} == {"coloraxis"}
    assert found.layout["coloraxis"]["cmin"] == pytest.approx(0.1, abs=0.05)
    assert found.layout["coloraxis"]["cmax"] == pytest.approx(8.1, abs=0.05)
    heights = {tuple(found.layout[name]["zaxis"]["range"]) for name in found.layout if name.startswith("scene")}
    assert len(heights) == 1


def test_lines_and_spectra_have_equal_scales(tmp_path):
    lines = Page(draw_lines([line(height=1.0), line(height=3.0)], tmp_path / "lines", title="x")[1])
    spectra = Page(draw_spectra({"a": spectrum(2.0), "b": spectrum(5.0)}, tmp_path / "spectra", title="x")[1])
    for found in (lines, spectra):
        for letter in "xy":
            one, other = found.axes(letter)
            assert one["range"] == other["range"]
            assert one["type"] == other["type"]


def test_loss_axis_is_logarithmic_beyond_two_decades(tmp_path):
    narrow = Page(draw_slices_1d({"a": [parabola(9.0, bottom=0.1)]}, tmp_path / "narrow", title="x")[1])
    wide = Page(draw_slices_1d({"a": [parabola(11.0, bottom=0.1)]}, tmp_path / "wide", title="x")[1])
    with_zero = Page(draw_slices_1d({"a": [parabola(99.0, bottom=0.0)]}, tmp_path / "zero", title="x")[1])
    assert [page.axes("y")[0]["type"] for page in (narrow, wide, with_zero)] == ["linear", "log", "linear"]
    low, high = wide.axes("y")[0]["range"]
    assert -1.2 < low < -1
    assert math.log10(11.2) < high < 1.2


def test_colours_are_logarithmic_beyond_two_decades(tmp_path):
    found = Page(draw_slices_2d({"a": bowl(50.0)}, tmp_path / "picture", title="x")[1])
    assert found.layout["coloraxis"]["cmax"] == pytest.approx(2.0, abs=0.05)
    assert found.layout["coloraxis"]["colorbar"]["ticktext"] == ["0.1", "0.3", "1", "3", "10", "30", "100"]
    assert found.layout["scene"]["zaxis"]["type"] == "log"


def test_scale_of_one_value_has_room_on_both_sides():
    assert make_scale([2.0, 2.0]) == Scale(1.9, 2.1)
    assert make_scale([0.0]) == Scale(-1.0, 1.0)
    assert make_scale([None, math.nan, math.inf, 1e305]) == Scale(0.0, 1.0)


@pytest.mark.parametrize(
    "scale", [Scale(0, 1), Scale(-3e-7, 5e-7), Scale(2, 1e9), Scale(1e-3, 1e2, True), Scale(1e-30, 1e20, True)]
)
def test_ticks_are_few_and_within_the_scale(scale):
    ticks = scale.ticks()
    assert 3 <= len(ticks) <= 16
    assert all(scale.low <= tick <= scale.high for tick in ticks)


# Content


def test_curves_are_the_losses(tmp_path):
    found = Page(draw_slices_1d({"a": [parabola()]}, tmp_path / "picture", title="Title")[1])
    by_name = {trace["name"]: trace for trace in found.traces}
    assert by_name["training"]["x"] == T
    assert by_name["training"]["y"] == parabola().losses["training"]
    assert by_name["validation"]["y"] == parabola().losses["validation"]
    assert found.layout["title"]["text"] == "Title: a"


def test_gaps_are_left_where_there_is_no_loss(tmp_path):
    losses = {"training": [None, 1.0, math.nan, 2.0, math.inf, 1e305, 3.0, 1.0, None]}
    found = Page(draw_slices_1d({"a": [replace(parabola(), losses=losses)]}, tmp_path / "picture", title="x")[1])
    assert found.traces[0]["y"] == [None, 1.0, None, 2.0, None, None, 3.0, 1.0, None]


def test_slice_without_losses_is_a_panel_that_says_so(tmp_path):
    empty = replace(parabola(), losses={"training": [None] * len(T)})
    png, path = draw_slices_1d({"a": [parabola()], "b": [empty], "c": []}, tmp_path / "picture", title="x")
    assert sum("nothing was measured" in text for text in Page(path).texts()) == 2
    with Image.open(png) as image:
        assert image.size[0] > 1000


@pytest.mark.parametrize(
    "change",
    [
        {"stride": None},
        {"losses": {"training": [[math.nan] * 9] * 9}},
        {"x": [0.0], "losses": {"training": [[1.0]] * 9}},
    ],
)
def test_plane_without_losses_is_a_panel_that_says_so(change, tmp_path):
    _, path = draw_slices_2d({"a": replace(bowl(), **change)}, tmp_path / "picture", title="x")
    assert any("nothing was measured" in text for text in Page(path).texts())
    _, path = draw_plane(replace(plane(), **change), tmp_path / "plane", title="x")
    assert any("nothing was measured" in text for text in Page(path).texts())


def test_plane_with_losses_that_are_not_finite_has_a_hole(tmp_path):
    rows = [[math.nan if x + y > 1 else 1 + x * x for x in T] for y in T]
    _, path = draw_plane(replace(plane(), losses={"training": rows}), tmp_path / "picture", title="x")
    found = Page(path)
    (contour,) = found.traces_of("contour")
    assert contour["z"][-1][-1] is None
    assert "grey: the loss is not finite" in [trace.get("name") for trace in found.traces]


def test_unfinished_plane_is_drawn_on_the_grid_that_is_whole(tmp_path):
    rows = [[1.0 + x * x if i % 2 == 0 and j % 2 == 0 else None for i, x in enumerate(T)] for j in range(len(T))]
    found = Page(
        draw_slices_2d({"a": replace(bowl(), losses={"training": rows}, stride=2)}, tmp_path / "x", title="x")[1]
    )
    (surface,) = found.traces_of("surface")
    assert surface["x"] == T[::2]
    assert all(loss is not None for row in surface["z"] for loss in row)


def test_more_panels_than_a_browser_can_turn_are_contours(tmp_path, monkeypatch):
    monkeypatch.setattr(draw, "_MAX_SURFACES", 4)
    few = Page(draw_slices_2d({"a": bowl(), "b": bowl()}, tmp_path / "few", title="x")[1])
    many = Page(draw_slices_2d({"a": bowl(), "b": bowl(), "c": bowl()}, tmp_path / "many", title="x")[1])
    assert (len(few.traces_of("surface")), len(few.traces_of("contour"))) == (4, 0)
    assert (len(many.traces_of("surface")), len(many.traces_of("contour"))) == (0, 6)


def test_line_has_its_barrier_above_it_and_the_runs_at_its_ends(tmp_path):
    found = Page(draw_lines([line("safe", "lora", height=0.25)], tmp_path / "line", title="x")[1])
    assert found.texts() == ["safe → lora<br>barrier: training 0.25"]
    assert found.axes("x")[0]["ticktext"] == ["0<br>safe", "0.25", "0.5", "0.75", "1<br>lora"]
    by_name = {trace["name"]: trace for trace in found.traces}
    assert by_name["barrier"]["x"] == [0.5, 0.5]
    assert by_name["barrier"]["y"] == [0.5, 0.75]
    assert set(by_name["straight between the ends' losses"]["y"]) == {0.5}


@pytest.mark.parametrize(("height", "word"), [(math.inf, "infinite"), (None, "unknown"), (0.0, "0")])
def test_barrier_that_cannot_be_drawn_is_a_word(height, word, tmp_path):
    one = replace(line(), barriers={"training": height})
    found = Page(draw_lines([one], tmp_path / "line", title="x")[1])
    assert found.texts() == [f"first → second<br>barrier: training {word}"]
    assert "barrier" not in [trace["name"] for trace in found.traces]


def test_plane_has_its_runs_and_the_barriers_between_them(tmp_path):
    found = Page(draw_plane(plane(), tmp_path / "plane", title="x")[1])
    assert found.texts()[0] == "training<br>barrier: A-B 0.125, A-C 0.25, B-C 0.375"
    places = {trace["name"]: (trace["x"], trace["y"]) for trace in found.traces if trace.get("text") in list("ABC")}
    assert places == {"A: first": ([-0.5], [-0.5]), "B: second": ([0.5], [-0.5]), "C: third": ([0.0], [0.5])}
    assert [axis["scaleanchor"] for axis in found.axes("y")] == ["x", "x2"]


def test_spectrum_has_a_logarithmic_density_and_its_top_eigenvalues(tmp_path):
    found = Page(draw_spectra({"a": spectrum(4.0)}, tmp_path / "spectrum", title="x")[1])
    assert found.axes("y")[0]["type"] == "log"
    low, high = found.axes("y")[0]["range"]
    # Below the small peak at the largest eigenvalue, and above the large one at zero.
    assert low == pytest.approx(-5, abs=0.2)
    assert high == pytest.approx(0.5, abs=0.2)
    by_name = {trace["name"]: trace for trace in found.traces}
    assert by_name["top eigenvalues"]["x"] == [4.0, 2.0]
    assert found.texts() == ["largest eigenvalue 4"]


def test_spectrum_without_a_density_is_a_panel_that_says_so(tmp_path):
    found = Page(
        draw_spectra({"a": Spectrum([], []), "b": Spectrum([0, 1], [0.0, math.nan])}, tmp_path / "x", title="x")[1]
    )
    assert any("nothing was measured" in text for text in found.texts())


def test_slices_from_json_are_drawn_as_they_were(tmp_path):
    holes = replace(parabola(), losses={"training": [math.nan, *parabola().losses["training"][1:]]})
    pictures = []
    for kind, one, draw_it in [
        (Slice1D, holes, lambda one, path: draw_slices_1d({"a": [one]}, path, title="x")),
        (Slice1D, line(), lambda one, path: draw_lines([one], path, title="x")),
        (Slice2D, plane(), lambda one, path: draw_plane(one, path, title="x")),
    ]:
        again = kind.from_json(json.loads(to_json(asdict(one))))
        pictures.append([[file.read_bytes() for file in draw_it(each, tmp_path / "x")] for each in (one, again)])
    for live, loaded in pictures:
        assert live == loaded


# Words


def test_long_name_keeps_its_beginning_and_its_end():
    assert shortened("abcdefghij", 10) == "abcdefghij"
    assert shortened("abcdefghijk", 10) == "abcd…ghijk"


def test_no_line_is_longer_than_there_is_room_for():
    lines = wrapped(HOSTILE, 30)
    assert max(map(len, lines)) <= 30
    assert all(line.isprintable() for line in lines)
