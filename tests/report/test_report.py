"""Reports of runs and experiments: what stands in them, what does not, and that text is text."""

import csv
import io
import json
import re
import shutil
from dataclasses import replace

import pytest
from rich.console import Console

from safe_lab import config as configuration
from safe_lab import yaml_core
from safe_lab.ablation.columns import columns_of
from safe_lab.ablation.show import print_comparison
from safe_lab.cli import main
from safe_lab.report import read_source, to_csv, to_latex, to_markdown, write_page
from safe_lab.report.charts import choose_styles, draw_costs
from safe_lab.report.tables import find_best, how_to_read
from safe_lab.section import ConfigError

HOSTILE = "</script><img src=x onerror=alert(1)>"


@pytest.fixture
def copy(experiment, tmp_path):
    """The same without its file, to be damaged."""
    folder = tmp_path / "runs" / "experiment"
    shutil.copytree(experiment, folder)
    (folder / "experiment.yaml").unlink()
    return folder


def test_an_experiment_is_reported_by_its_own_rules_with_what_is_missing(experiment):
    source = read_source([experiment])
    assert source.comparison.rules.margin == 0.5
    assert [row.variant for row in source.comparison.rows] == ["none", "cka", "late"]
    assert source.comparison.row("late").faults == {1: "it is missing"}
    page = write_page(source)
    assert "late, seed 1, is not in it: it is missing" in page
    assert "freezing.final" in page
    assert len(page) < 8e6


def test_an_experiment_that_was_moved_is_reported_where_it_lies(experiment, tmp_path):
    moved = tmp_path / "elsewhere" / "renamed (copy)"
    shutil.copytree(experiment, moved)
    source = read_source([moved])
    assert source.comparison.rules.margin == 0.5
    assert all(record.path.is_relative_to(moved.resolve()) for record in source.records)
    (moved / "experiment.yaml").write_text("variants: 3")
    with pytest.raises(ConfigError, match="it is damaged, or of another version"):
        read_source([moved])


def test_runs_are_reported_by_their_folders_wherever_they_lie(experiment, copy):
    assert len(read_source([copy]).records) == 5
    assert len(read_source([copy / "cka"]).records) == 2
    source = read_source([copy / "cka" / "seed-0"])
    assert source.comparison.baseline == "cka"
    assert source.commands[0].startswith("safe-lab train ")
    # Whichever ways lead to a run, it is one.
    (copy.parent / "link").symlink_to(copy)
    assert len(read_source([copy / "cka", copy / "cka" / "seed-0", copy.parent / "link"]).records) == 5
    shutil.copytree(copy / "cka" / "seed-0", copy / "cka" / "seed-0-kept")
    with pytest.raises(ConfigError, match="are both of variant cka and seed 0"):
        read_source([copy])
    shutil.rmtree(copy / "cka" / "seed-0-kept")
    # Runs of one name from two experiments may differ in all that is not their name.
    both = read_source([copy.rename(copy.with_name("other")), experiment / "cka" / "seed-0"])
    assert {record.variant for record in both.records} == {"experiment/cka", "other/cka", "other/late", "other/none"}


def test_runs_of_one_variant_that_differ_in_more_than_their_seed_are_refused(copy):
    config = copy / "cka" / "seed-1" / "config.yaml"
    tree = yaml_core.parse(config.read_text())
    tree["training"]["learning_rate"] = 0.5
    config.write_text(yaml_core.write(tree))
    with pytest.raises(
        ConfigError, match="are runs of one variant, and differ: training.learning_rate: 0.01 there, 0.5 here"
    ):
        read_source([copy])


def test_an_experiment_none_of_whose_runs_has_finished_is_reported_as_such(experiment, copy):
    for result in copy.glob("*/seed-*/result.json"):
        result.unlink()
    (copy / "experiment.yaml").write_text((experiment / "experiment.yaml").read_text())
    assert "it has not finished" in write_page(read_source([copy]))


def test_baseline_metric_and_margin_may_be_chosen(experiment):
    source = read_source([experiment], baseline="cka", metric="validation/loss", margin=0.1)
    assert (source.comparison.baseline, source.comparison.rules.metric) == ("cka", "validation/loss")
    rules = read_source([experiment], metric="validation/loss").comparison.rules
    # The experiment's margin is of its own metric, which stands beside now.
    assert (rules.margin, rules.figures[0]) == (None, "validation/accuracy")
    with pytest.raises(ConfigError, match="'cca' is no variant; did you mean cka"):
        read_source([experiment], baseline="cca")
    for metric, said in (
        ("validation/acuracy", "did you mean validation/accuracy"),
        ("frozen_share", "neither good nor bad"),
        ("test/accuracy", "is of a test split"),
        ("unfrozen_forecast/flops", "neither good nor bad"),
    ):
        with pytest.raises(ConfigError, match=said):
            read_source([experiment], metric=metric)
    for margin in (float("inf"), float("nan"), 0.0):
        with pytest.raises(ConfigError, match="margin: it must be above 0"):
            read_source([experiment], margin=margin)


def test_what_cannot_be_compared_is_told(copy, tmp_path):
    with pytest.raises(ConfigError, match="there is no such folder"):
        read_source([tmp_path / "nowhere"])
    config = copy / "none" / "seed-0" / "config.yaml"
    tree = yaml_core.parse(config.read_text())
    tree["data"] |= {"task": "regression"}
    config.write_text(yaml_core.write(tree))
    with pytest.raises(ConfigError, match="runs of different tasks do not compare: .*regression in"):
        read_source([copy])


def test_damaged_runs_are_in_the_report_as_such(copy):
    (copy / "none" / "seed-0" / "result.json").write_text("{")
    (copy / "none" / "seed-1" / "result.json").write_text('{"metrics": {}}')
    (copy / "cka" / "seed-0" / "config.yaml").write_text("freezing: {policy: of-the-future}")
    (copy / "cka" / "seed-1" / "importance.jsonl").write_text('{"step": 1')
    (copy / "cka" / "seed-1" / "events.jsonl").write_bytes(b"\xff")
    (copy / "cka" / "seed-1" / "environment.json").write_text("[]")
    source = read_source([copy])
    faults = {row.variant: row.faults for row in source.comparison.rows}
    assert "cannot be read" in faults["none"][0]
    assert "of another version: it lacks main_metric" in faults["none"][1]
    assert "this version cannot read its config.yaml" in faults["cka"][0]
    page = write_page(source)
    assert page.count("is not in it") >= 3


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        (
            "events.jsonl",
            '{"epoch": 1}',
            "What happened cannot be told: events.jsonl cannot be read: row 1 has no step",
        ),
        (
            "events.jsonl",
            json.dumps(dict.fromkeys(("epoch", "frozen_share", "frozen_depth"), 1) | {"step": HOSTILE, "units": []}),
            "What happened cannot be told: ",
        ),
        ("events.jsonl", "null", "What happened cannot be told: "),
        ("metrics.jsonl", "1", "What it cost cannot be drawn: metrics.jsonl cannot be read: row 1 has no epoch"),
        ("metrics.jsonl", '{"epoch": 1', "What it cost cannot be drawn: "),
        ("importance.jsonl", '{"epoch": 1, "scoring": 1}', "What froze when cannot be drawn: "),
        ("environment.json", '{"devices": null, "packages": null}', "an unknown processor"),
        ("result.json", "without what adds up", "late, seed 0"),
        ("result.json", None, "The spectrum cannot be drawn: "),
    ],
)
def test_what_is_damaged_in_a_run_is_told_and_the_rest_is_reported(copy, file, text, said):
    path = copy / "cka" / "seed-0" / file
    if text == "without what adds up":
        tree = json.loads(path.read_text())
        del tree["resources"]["flops_by_phase"]
        text = json.dumps(tree)
    if text is None:
        tree = json.loads(path.read_text())
        tree["sharpness"]["spectrum"] = {}
        text = json.dumps(tree)
    path.write_text(text)
    page = write_page(read_source([copy]))
    assert said.replace("'", "&#x27;") in page
    assert "late, seed 0" in page
    assert HOSTILE not in page


def test_missing_runs_are_named_whichever_way_an_experiment_is_reached(experiment, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(experiment, tmp_path / "runs" / name)
    one = read_source([tmp_path / "runs" / "one" / ".." / "one"])
    assert one.comparison.row("late").faults == {1: "it is missing"}
    both = read_source([tmp_path / "runs"])
    assert both.comparison.row("one/late").faults == both.comparison.row("two/late").faults == {1: "it is missing"}
    # Of an experiment that this version cannot read the runs stand by themselves.
    (tmp_path / "runs" / "two" / "experiment.yaml").write_text("variants: 3")
    mixed = read_source([tmp_path / "runs"])
    assert mixed.comparison.row("one/late").faults and not mixed.comparison.row("two/late").faults
    with pytest.raises(ConfigError, match="it is damaged, or of another version"):
        read_source([tmp_path / "runs" / "two"])
    shutil.rmtree(tmp_path / "runs" / "two")
    # One experiment is reported by its own rules, from above too.
    assert read_source([tmp_path / "runs"]).comparison.rules.margin == 0.5


def test_a_page_of_huge_runs_stays_small(copy):
    for variant in ("none", "cka", "late"):
        folder = copy / variant / "seed-0"
        row = json.loads((folder / "importance.jsonl").read_text().splitlines()[0])
        with (folder / "importance.jsonl").open("w") as stream:
            for scoring in range(300):
                for depth in range(144):
                    unit = f"base_model.model.bert.encoder.layer.{depth}.attention.self.query"
                    place = {"scoring": scoring, "epoch": scoring / 7, "step": scoring, "depth": depth, "unit": unit}
                    stream.write(json.dumps(row | place | {"normalized_score": (scoring + 1) / (depth + 3)}) + "\n")
    page = write_page(read_source([copy]))
    assert len(page.encode()) < 8e6
    assert "left out" not in page


def test_no_two_of_many_variants_look_alike():
    styles = choose_styles([f"variant {i}" for i in range(28)])
    assert len({(style.colour, style.symbol) for style in styles.values()}) == 28
    assert len({(style.colour, style.dash) for style in styles.values()}) == 28


def test_text_of_configurations_and_data_stays_text(copy):
    for seed in (0, 1):
        config = copy / "cka" / f"seed-{seed}" / "config.yaml"
        tree = yaml_core.parse(config.read_text())
        tree["data"]["text_column"] = HOSTILE
        config.write_text(yaml_core.write(tree))
    folder = copy / "cka" / "seed-0"
    rows = [json.loads(line) for line in (folder / "importance.jsonl").read_text().splitlines()]
    (folder / "importance.jsonl").write_text("".join(json.dumps(row | {"unit": HOSTILE}) + "\n" for row in rows))
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    (folder / "events.jsonl").write_text("".join(json.dumps(row | {"units": [HOSTILE]}) + "\n" for row in events))
    page = write_page(read_source([copy]))
    assert HOSTILE not in page
    assert "<img src=x" not in page
    assert "&lt;img src=x" in page


def test_sharpness_is_in_the_table_and_drawn_where_it_was_measured(experiment, copy):
    source = read_source([experiment])
    trace = source.comparison.row("cka").cells["sharpness/trace"]
    assert len(trace.by_seed) == 2
    assert trace.difference.is_relative == all(
        value > 0
        for row in ("none", "cka")
        for value in source.comparison.row(row).cells["sharpness/trace"].by_seed.values()
    )
    page = write_page(source)
    for shown in (
        "sharpness trace",
        "Spectrum of the Hessian",
        "Loss along a random direction",
        "Loss in the plane of two random",
    ):
        assert shown in page, shown
    (copy / "none" / "seed-0" / "sharpness" / "landscape.json").write_text("[1")
    for result in copy.glob("*/seed-*/result.json"):
        tree = json.loads(result.read_text())
        del tree["sharpness"]["spectrum"]
        result.write_text(json.dumps(tree))
    page = write_page(read_source([copy]))
    assert "The loss around the solution cannot be drawn: " in page
    assert "Spectrum of the Hessian" not in page


def test_means_of_other_seeds_are_told_as_such_and_the_best_is_of_the_same(copy):
    for variant, values in {"none": (0.5, 0.9), "cka": (0.6, 0.2), "late": (0.55,)}.items():
        for seed, value in enumerate(values):
            result = copy / variant / f"seed-{seed}" / "result.json"
            tree = json.loads(result.read_text())
            tree["metrics"]["validation/accuracy"] = value
            result.write_text(json.dumps(tree))
    comparison = read_source([copy]).comparison
    assert find_best(comparison, columns_of(comparison)[0]) == {"cka"}
    table = to_markdown(comparison)
    assert "0.7000 \N{PLUS-MINUS SIGN} 0.2828 (n = 2)" in table
    assert "0.5500 (n = 1)" in table


def test_all_that_are_written_as_the_best_is_are_marked(copy):
    for variant, value in {"none": 0.5, "cka": 0.75, "late": 0.75 - 1e-6}.items():
        for result in copy.glob(f"{variant}/seed-*/result.json"):
            tree = json.loads(result.read_text())
            tree["metrics"]["validation/accuracy"] = value
            result.write_text(json.dumps(tree))
    comparison = read_source([copy]).comparison
    assert find_best(comparison, columns_of(comparison)[0]) == {"cka", "late"}
    assert "Bold: " in how_to_read(comparison)
    alone = read_source([copy / "cka"]).comparison
    assert how_to_read(alone) == ""


@pytest.mark.parametrize("examples", [{"training": "many", "validation": None}, 3, None])
def test_what_was_trained_is_told_as_far_as_it_is_known(copy, examples):
    page = write_page(read_source([copy]))
    assert "by the baseline&#x27;s configuration: " in page
    assert re.search(r"\(examples: \d+ of training, \d+ of validation\)", page)
    for result in copy.glob("none/seed-*/result.json"):
        result.write_text(json.dumps(json.loads(result.read_text()) | {"examples": examples}))
    assert " of training" not in write_page(read_source([copy]))


def test_the_length_of_a_training_is_told_in_what_it_was_given_in(copy):
    assert ", 3 epochs." in write_page(read_source([copy]))
    for file in copy.glob("none/seed-*/config.yaml"):
        tree = yaml_core.parse(file.read_text())
        tree["training"]["max_steps"] = 40
        file.write_text(yaml_core.write(tree))
    assert ", 40 steps." in write_page(read_source([copy]))


def test_tables_hold_each_variants_figures(experiment):
    comparison = read_source([experiment]).comparison
    markdown = to_markdown(comparison)
    assert markdown.splitlines()[0].startswith("| variant | validation accuracy | memory peak, KiB |")
    assert len({line.count("|") for line in markdown.splitlines() if line.startswith("|")}) == 1
    assert "- late, seed 1, is not in it: it is missing" in markdown
    rows = list(csv.DictReader(io.StringIO(to_csv(comparison))))
    found = [row for row in rows if (row["variant"], row["figure"], row["seed"]) == ("cka", "validation/accuracy", "1")]
    assert float(found[0]["value"]) == comparison.row("cka").cells["validation/accuracy"].by_seed[1]
    assert any(row["verdict"] == "not in it: it is missing" for row in rows)
    latex = to_latex(comparison)
    # Two headings, a line for the baseline, two for each other.
    assert latex.count(r"\\") == 7
    assert len({line.count(" & ") for line in latex.splitlines() if line.endswith(r"\\")}) == 1
    assert r"\textbf{" in latex
    assert "_" not in latex.replace(r"\_", "")


def test_the_command_writes_by_the_files_ending(experiment, tmp_path, capsys):
    for name in ("page.html", "table.md", "table.csv", "table.tex"):
        assert main(["report", str(experiment), "--output", str(tmp_path / name)]) == 0
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert "booktabs" not in (tmp_path / "table.tex").read_text()
    assert "tabular" in (tmp_path / "table.tex").read_text()
    capsys.readouterr()
    assert main(["report", str(experiment), "--format", "md"]) == 0
    assert capsys.readouterr().out == (tmp_path / "table.md").read_text()
    assert main(["report", str(tmp_path / "nowhere"), "--format", "md"]) == 2
    assert main(["report", str(experiment), "--output", str(tmp_path / "no" / "folder.md")]) == 1
    assert "there is no such folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["report", str(experiment), "--format", "html"])
    capsys.readouterr()
    assert main(["report", str(experiment)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("against none")
    assert "cka: not enough seeds to say" in shown


def test_figures_beside_the_metric_may_be_chosen(experiment, capsys):
    chosen = "resources/flops,frozen_depth"
    assert main(["report", str(experiment), "--format", "md", "--figures", f"{chosen.replace(',', ', ')},"]) == 0
    heading = capsys.readouterr().out.splitlines()[0]
    assert heading == "| variant | validation accuracy | flops, GFLOP | frozen depth | p<br>effect | verdict |"
    assert f"--figures {chosen}" in read_source([experiment], figures=chosen.split(",")).commands[-1]
    for figure, said in (("resources/flop", "did you mean resources/flops"), ("test/accuracy", "is of a test split")):
        assert main(["report", str(experiment), "--figures", figure]) == 2
        assert said in capsys.readouterr().err


def test_a_table_for_the_terminal_leaves_out_what_does_not_fit(experiment):
    comparison = read_source([experiment]).comparison
    shown = {}
    for width in (60, 400):
        console = Console(width=width, file=io.StringIO())
        print_comparison(comparison, console)
        shown[width] = console.file.getvalue()
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown[60]
    assert "frozen depth" in shown[60].partition("Not shown here: ")[2].splitlines()[0]
    assert "Not shown here" not in shown[400]
    # Names that differ by their end are not cut.
    name = f"{'x' * 60}2"
    rows = [replace(row, variant=name) if row.variant == "cka" else row for row in comparison.rows]
    console = Console(width=80, file=io.StringIO())
    print_comparison(replace(comparison, rows=rows), console)
    assert "x2" in console.file.getvalue().partition(":")[0]


def test_what_adds_up_is_drawn_from_nothing_to_the_end(experiment):
    (record,) = [one for one in read_source([experiment]).records if one.path.parts[-2:] == ("cka", "seed-0")]
    flops = next(chart for chart in draw_costs(record) if chart.title.startswith("FLOPs"))
    ends = {line.name: (line.x[0], line.y[0], line.x[-1], line.y[-1]) for line in flops.figure.data}
    by_phase = record.result["resources"]["flops_by_phase"]
    assert ends["evaluation"] == pytest.approx((0, 0, record.result["epochs"], by_phase["evaluation"] / 1e12), rel=1e-5)


def test_a_run_without_an_experiment_is_a_report_of_one(experiment, tmp_path):
    config = configuration.load(experiment / "cka" / "seed-0" / "config.yaml")
    assert config.variant == "cka"
    page = write_page(read_source([experiment / "cka" / "seed-0"]))
    assert "What froze when" in page
