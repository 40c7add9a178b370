"""Replays of tiny runs, held against runs that were trained with the schedules that are replayed."""

import json
import shutil

import pytest
from tiny import save_tiny_model, tiny_tree_in

from safe_lab import config as configuration
from safe_lab.cli import main
from safe_lab.replay import Replayer, configure, forecast_peak, read_recording
from safe_lab.run import run
from safe_lab.section import ConfigError


def replay(path, overrides=()):
    """A run under another schedule."""
    recording = read_recording(path)
    return Replayer(recording).replay(configure(recording, overrides))


SCHEDULES = {
    # First, as what happens once in a process is in its costs.
    "none": {"policy": "none"},
    "nothing": {"final_threshold": 0.0},
    "early": {"warmup": 1, "final": 2, "final_threshold": 0.4},
    "all": {"warmup": 0, "final": 1, "final_threshold": 2.0},
    "prefix": {"policy": "prefix", "warmup": 1, "final": 3, "final_share": 0.7},
    # At the last scoring: what freezes then is not worth a cache any more.
    "late": {"policy": "prefix", "warmup": 1, "final": 3, "final_share": 1.0, "curve": "linear"},
    "keep": {"warmup": 1, "final": 3, "curve": "linear", "final_threshold": 0.6, "refresh": False},
    "budget": {"policy": "budget", "warmup": 1, "final": 2, "final_importance": 0.6},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Run folders of one experiment by variant: texts of one length, so that every step has the same shape."""
    place = tmp_path_factory.mktemp("replay")
    # As large as to weigh more than the adapters and what is noise of the clock.
    model = save_tiny_model(place / "model", hidden_size=64, intermediate_size=128, num_hidden_layers=4)
    tree = tiny_tree_in(place, model)
    rows = [
        " ".join([f"word{1 + i % 2}", *(f"word{(7 * i + j) % 40 + 3}" for j in range(10)), f"word{50 + i // 8}"])
        + f",{i % 2}"
        for i in range(64)
    ]
    (place / "data.csv").write_text("\n".join(["text,label", *rows]))
    tree["training"] |= {"epochs": 4, "log_every": 1}
    tree["data"] |= {"max_train_samples": 48, "max_validation_samples": 8}
    for name, schedule in SCHEDULES.items():
        freezing = tree["freezing"] | {"interval": "epoch", "metric": "sensitivity"} | schedule
        run(configuration.build(tree | {"variant": name, "freezing": freezing}))
    return {name: place / "runs" / "tiny" / name / "seed-0" for name in SCHEDULES}


@pytest.fixture(scope="module")
def recording(folders):
    """The run that scored all units at each scoring and froze none."""
    return read_recording(folders["nothing"])


@pytest.fixture(scope="module")
def replayer(recording):
    """Of that run."""
    return Replayer(recording)


@pytest.mark.parametrize("name", ["early", "all", "prefix", "late", "keep", "budget", "nothing", "none"])
def test_a_runs_own_schedule_replays_to_what_it_did_and_cost(folders, name):
    found = read_recording(folders[name])
    replayed = replay(folders[name])
    history = replayed.history
    assert [moment.frozen for moment in history.moments] == [scoring.frozen_units for scoring in found.scorings]
    assert bool(history.moments[-1].frozen) == (name not in ("nothing", "none"))
    assert not history.stale_share or name == "keep"
    flops = found.result["resources"]["flops"]
    # The scorings before the first step are the run's own, and in no other forecast.
    assert replayed.forecast["resources/flops"] == pytest.approx(flops, rel=0.02)
    assert not replayed.no_forecast


@pytest.mark.parametrize("name", ["early", "all", "prefix", "late", "budget", "none"])
def test_a_replay_of_another_schedule_is_near_to_the_run_trained_with_it(replayer, folders, name):
    found = replayer.compare(read_recording(folders[name]))
    assert found.right >= 0.9 * found.unit_scorings > 0
    # An average over time, which on a model as small as this goes with the machine's noise.
    assert abs(found.errors["resources/memory_mean_bytes"]) < 0.35
    assert abs(found.errors["resources/flops"]) < 0.05
    assert abs(found.errors["resources/memory_peak_bytes"]) < 0.1


@pytest.mark.parametrize("name", ["prefix", "late"])
@pytest.mark.parametrize("savings", [{}, {"cache": False}, {"prefix": False}, {"fold": False}])
def test_flops_of_a_stage_are_forecast_exactly(replayer, folders, tmp_path, savings, name):
    tree = configuration.load(folders[name] / "config.yaml").model_dump(mode="json")
    tree |= {"output_dir": str(tmp_path), "savings": tree["savings"] | savings}
    config = configuration.build(tree)
    run(config)
    truth = read_recording(config.run_folder)
    replayed = replayer.replay(config)
    costs = replayer._costs
    spans = costs._cut([(moment.step, moment.frozen) for moment in replayed.history.moments], config)
    assert len(spans) == len({scoring.frozen_units for scoring in truth.scorings})
    for span in spans:
        measured = truth.stages[span.frozen, costs._cached_depth(span, config)]
        assert costs._step(span, config).flops == pytest.approx(sum(measured.flops.values()), rel=1e-9)


def test_scores_of_units_that_were_frozen_are_told_as_stale(folders):
    # All were frozen at the first scoring there, so that whatever is live later has its score from then.
    replayed = replay(folders["all"], ["freezing.final_threshold=0.3", "freezing.warmup=1", "freezing.final=2"])
    first, *others = replayed.history.moments
    assert not first.stale
    assert all(len(moment.stale) >= len(recorded_live(replayed, moment)) > 0 for moment in others)
    assert replayed.history.stale_share > 0.5


def recorded_live(replayed, moment):
    """Units that are live after a moment."""
    return set(range(replayed.history.num_units)) - moment.frozen


def test_a_coarser_interval_takes_the_scorings_that_are_there(recording):
    steps = recording.scorings[0].step
    config = configure(recording, [f"freezing.interval={2 * steps}"])
    assert [moment.step for moment in Replayer(recording).replay(config).history.moments] == [2 * steps]
    with pytest.raises(ConfigError, match="scores after step 4, and the run, with epoch, did not"):
        Replayer(recording).replay(configure(recording, ["freezing.interval=4"]))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["freezing.metric=cka"], "the scores that were recorded are by sensitivity"),
        (["freezing.unit=module"], "freezing.unit: cannot be replayed, only trained"),
        (["training.epochs=9"], "training.epochs: cannot be replayed"),
        (["freezing.final_treshold=1"], "did you mean final_threshold"),
        (["freezing.final_threshold"], "an override reads dotted.key=value"),
    ],
)
def test_what_the_records_do_not_tell_is_refused(folders, overrides, said):
    with pytest.raises(ConfigError, match=said):
        replay(folders["nothing"], overrides)


def test_a_metric_that_nobody_asks_for_may_be_another(folders):
    assert replay(folders["nothing"], ["freezing.policy=prefix", "freezing.metric=cka"]).history.moments[-1].frozen


def test_a_run_without_scores_tells_what_to_do(folders):
    with pytest.raises(ConfigError, match="policy none recorded none; one with policy safe and final_threshold 0"):
        replay(folders["none"], ["freezing.policy=safe"])


@pytest.mark.parametrize(
    "changes",
    [
        {"freezing": {"unit": "module"}},
        {"freezing": {"interval": 4, "final": 4}},
        {"freezing": {"warmup": "stable", "stable_share": 2.0}},
        {"training": {"gradient_accumulation": 4, "batch_size": 4}},
        {"adapter": {"target_modules": ["query", "dense"]}, "savings": {"trim_padding": 8}},
    ],
)
def test_runs_of_other_kinds_replay_to_what_they_did(recording, tmp_path, changes):
    tree = recording.config.model_dump(mode="json") | {"output_dir": str(tmp_path)}
    tree["freezing"] |= {"final_threshold": 0.4, "final": 2}
    config = configuration.build(
        {key: value | changes.get(key, {}) if isinstance(value, dict) else value for key, value in tree.items()}
    )
    run(config)
    found = read_recording(config.run_folder)
    replayed = Replayer(found).replay(config)
    assert [moment.frozen for moment in replayed.history.moments] == [
        scoring.frozen_units for scoring in found.scorings
    ]
    assert replayed.history.moments[-1].frozen
    assert replayed.forecast["resources/flops"] == pytest.approx(found.result["resources"]["flops"], rel=0.05)


def test_a_run_that_was_never_scored_or_stopped_early_is_told(recording, tmp_path):
    tree = recording.config.model_dump(mode="json") | {"output_dir": str(tmp_path)}
    short = configuration.build(tree | {"training": tree["training"] | {"epochs": 1}})
    run(short)
    with pytest.raises(ConfigError, match="ended before its first scoring"):
        replay(short.run_folder)
    impatient = tree["training"] | {"epochs": 9, "early_stopping": 1, "learning_rate": 1e-9}
    stopped = configuration.build(tree | {"variant": "stopped", "training": impatient})
    run(stopped)
    replayed = replay(stopped.run_folder)
    assert "training.early_stopping ended it" in replayed.no_forecast
    assert replayed.forecast["frozen_share"] == 0.0


def test_a_folder_that_holds_one_run_stands_for_it(folders, tmp_path):
    assert read_recording(folders["nothing"].parent).path == folders["nothing"]
    shutil.copytree(folders["nothing"], tmp_path / "seed-0")
    shutil.copytree(folders["nothing"], tmp_path / "seed-1")
    with pytest.raises(ConfigError, match="there are several runs: seed-0, seed-1; name one"):
        read_recording(tmp_path)


def test_a_setting_that_the_policy_does_not_ask_for_is_told(folders, capsys):
    assert main(["replay", str(folders["none"]), "freezing.final_threshold=0.4"]) == 0
    assert "without effect, as policy none does not ask for it: freezing.final_threshold" in capsys.readouterr().out
    assert "there is no such folder" in refusal(folders["none"] / "nowhere")


def refusal(path):
    with pytest.raises(ConfigError) as told:
        read_recording(path)
    return str(told.value)


def test_folders_that_are_no_finished_run_or_damaged_are_named(folders, tmp_path):
    with pytest.raises(ConfigError, match=r"there is no config\.yaml"):
        read_recording(tmp_path)
    copy = shutil.copytree(folders["early"], tmp_path / "copy")
    (copy / "result.json").unlink()
    with pytest.raises(ConfigError, match="the run has not finished"):
        read_recording(copy)
    shutil.copy(folders["early"] / "result.json", copy)
    rows = (copy / "importance.jsonl").read_text().splitlines()
    (copy / "importance.jsonl").write_text("\n".join(rows[1:]))
    with pytest.raises(ConfigError, match="lacks a unit"):
        read_recording(copy)
    (copy / "importance.jsonl").write_text("{")
    with pytest.raises(ConfigError, match="damaged"):
        read_recording(copy)


def test_costs_that_cannot_be_told_leave_the_schedule(folders, tmp_path):
    copy = shutil.copytree(folders["nothing"], tmp_path / "copy")
    rows = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    kept = [row for row in rows if "train/loss" not in row or row["step"] == rows[-2]["step"]]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    replayed = replay(copy, ["freezing.final_threshold=0.4"])
    assert set(replayed.forecast) == {"frozen_share", "frozen_depth"}
    assert "log_every" in replayed.no_forecast
    assert replayed.history.moments[-1].frozen


def test_the_peak_of_another_batch_is_near_to_the_run_trained_with_it(recording, tmp_path):
    tree = recording.config.model_dump(mode="json") | {"output_dir": str(tmp_path)}
    tree["training"] |= {"batch_size": 16}
    tree["adapter"] |= {"rank": 8}
    config = configuration.build(tree)
    truth = run(config).resources["memory_peak_bytes"]
    assert forecast_peak(recording, config) == pytest.approx(truth, rel=0.1)
    other = configuration.build(tree | {"data": tree["data"] | {"max_length": 8}})
    with pytest.raises(ConfigError, match="its data or its model"):
        forecast_peak(recording, other)


def test_the_command_prints_a_table_and_json_and_measures_itself(folders, capsys):
    arguments = ["replay", str(folders["nothing"]), "freezing.final_threshold=0.4"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "what would have frozen when" in printed
    assert "Held against the runs that were trained with other schedules: 7." in printed
    assert "Where the schedule goes by scores (4 of them)" in printed
    assert main([*arguments, "--json", "--against", str(folders["early"])]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["path"] for entry in found["measured"]] == [str(folders["early"])]
    assert len(found["scorings"]) == 3
    assert found["forecast"]["resources/flops"] > 0
    assert main(["replay", str(folders["nothing"] / "nowhere")]) == 2
