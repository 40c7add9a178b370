import pytest

from safe_lab import config as configuration
from safe_lab import yaml_core
from safe_lab.section import ConfigError

MINIMAL = "name: x\nmodel: {path: some/model}\ndata: {task: sst2}\n"


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text(MINIMAL)
    return file


def refusal(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        configuration.load(path, overrides)
    return str(caught.value)


def test_numbers_words_and_nulls_are_read_as_yaml_1_2():
    text = "a: 1e-3\nb: no\nc: null\nd: 1.5e+3\ne: true\nf: 012\ng: on\nh: 2024-01-01\ni: '1'\nj: 0x10\nk: 1_000\nl:"
    expected = {
        "a": 1e-3,
        "b": "no",
        "c": None,
        "d": 1500.0,
        "e": True,
        "f": 12,
        "g": "on",
        "h": "2024-01-01",
        "i": "1",
    }
    assert yaml_core.parse(text) == expected | {"j": "0x10", "k": "1_000", "l": None}


def test_what_is_written_is_read_back():
    value = {
        "a": "1e-3",
        "b": 1e-3,
        "c": "no",
        "d": "null",
        "e": [None, True, "~", "", "x: y", "é\n#"],
        "f": 1e-08,
        "g": {},
    }
    assert yaml_core.parse(yaml_core.write(value)) == value


def test_no_tag_makes_an_object():
    with pytest.raises(ValueError, match="not YAML"):
        yaml_core.parse("!!python/object/apply:os.system ['true']")


def test_overrides_reach_into_sections(path):
    config = configuration.load(
        path,
        ["training.epochs=3", "freezing.metric=fisher", "training.learning_rate=1e-4", "adapter.options.use_dora=true"],
    )
    assert (config.training.epochs, config.freezing.metric, config.training.learning_rate) == (3, "fisher", 1e-4)
    assert config.adapter.options == {"use_dora": True}


def test_the_resolved_yaml_loads_to_the_same_config(path, tmp_path):
    config = configuration.load(
        path,
        [
            "data.labels=[no, yes]",
            "freezing.warmup=stable",
            "training.max_grad_norm=null",
            "adapter.target_modules=all-linear",
        ],
    )
    again = tmp_path / "again.yaml"
    again.write_text(configuration.dump(config))
    assert configuration.load(again) == config
    assert config.data.labels == ("no", "yes")


def test_all_faults_are_told_at_once_one_line_each(path):
    lines = refusal(
        path,
        "trainin.epochs=3",
        "training.epoch=3",
        "training.epochs=zero",
        "freezing.metric=fischer",
        "model.dtype=int8",
        "data.task=sst",
    ).splitlines()
    assert len(lines) == 6
    assert "trainin: unknown key; did you mean training?" in lines
    assert "training.epoch: unknown key; did you mean epochs?" in lines
    assert any(line.startswith("training.epochs: ") and "integer" in line and "'zero'" in line for line in lines)
    assert any("'fischer' is no metric; did you mean fisher?" in line and "cka" in line for line in lines)
    assert any(line.startswith("model.dtype: ") and "'float32', 'bfloat16' or 'float16'" in line for line in lines)
    assert any("'sst' is no task; did you mean sst2?" in line for line in lines)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("freezing.policy=saef", "'saef' is no policy; did you mean safe?"),
        ("freezing.curve=cubik", "did you mean cubic?"),
        ("freezing.warmup=7", r"final (t_f) is 6, before warmup (t_w), 7"),
        ("freezing.metric_options.pool=first", "did you mean pooling?"),
        ("freezing.metric_options.pooling=last", "must be one of tokens, first"),
        ("freezing.metric_options={smoothing: true}", "metric cka has no option smoothing"),
        ("training.learning_rate=.nan", "finite"),
        ("training.eval_every=sometimes", "'epoch' or 'never', got 'sometimes', or input should be a valid integer"),
        ("training.save_every=0", "greater than or equal to 1"),
        ("name=../escape", "no plain folder name"),
        ("training=3", "training: input should be a mapping"),
        ("data.validation_share=1", "less than 1"),
        ("data.path=''", "at least 1 character"),
        ("training.epochs=true", "valid integer"),
        ("training.learning_rate=true", "valid number"),
        ("freezing.warmup=true", "valid integer"),
        ("training.log_every='3'", "valid integer"),
        ("freezing={policy: prefix, warmup: stable}", "policy prefix has none"),
    ],
)
def test_a_wrong_value_is_told_with_key_and_rule(path, override, message):
    assert message in refusal(path, override)


def test_a_missing_key_is_named(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("name: x\nmodel: {}\n")
    assert refusal(file).splitlines() == [
        "model.path: missing, and there is no default",
        "data: missing, and there is no default",
    ]


@pytest.mark.parametrize("text", ["", "- a\n", "3", "a: [", "\x00", "a: b: c", "x: 1\nx: 2\n"])
def test_what_is_no_mapping_of_sections_is_refused(tmp_path, text):
    file = tmp_path / "x.yaml"
    file.write_text(text)
    assert str(file) in refusal(file)


def test_a_missing_file_is_told_with_the_near_name(tmp_path):
    (tmp_path / "quickstart.yaml").write_text(MINIMAL)
    assert "did you mean" in refusal(tmp_path / "quickstar.yaml")
    assert "UTF-8" in refusal(_binary(tmp_path))


def _binary(tmp_path):
    file = tmp_path / "b.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    return file


def test_an_override_without_a_value_or_through_a_value_is_refused(path):
    assert "dotted.key=value" in refusal(path, "training.epochs")
    assert "holds a value" in refusal(path, "name.x=3")


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["freezing.final_threshold=0"], "nothing can ever freeze"),
        (["freezing.final_threshold=1.5"], "all units freeze"),
        (["training.epochs=1"], "saves nothing"),
        (["training.epochs=6"], "does not reach its final value"),
        (["freezing.metric=fisher"], "raw fisher scores"),
        (["freezing.policy=budget", "freezing.final_importance=0"], "only units without any importance"),
        (["freezing.policy=budget", "freezing.final_importance=1"], "all units freeze"),
        (["freezing.policy=budget", "freezing.normalize=max"], "no effect"),
        (["model.dtype=float16"], "epsilon"),
        (["training.early_stopping=2", "training.eval_every=never"], "no effect"),
        (["training.batch_size=1", "savings.trim_padding=8"], "a batch of one row has no padding"),
        (["freezing.policy=none", "sharpness.every=freeze"], "sharpness.every: freeze measures nothing"),
        (
            ["sharpness.landscape=[eigen_line]", "sharpness.measures=[trace]"],
            "eigen_line is left out without eigenvalues",
        ),
    ],
)
def test_a_threshold_that_decides_nothing_warns(path, overrides, part):
    assert any(part in warning for warning in configuration.warnings(configuration.load(path, overrides)))


@pytest.mark.parametrize("overrides", [[], ["freezing.policy=budget", "freezing.metric=fisher"]])
def test_default_settings_warn_of_nothing(path, overrides):
    assert configuration.warnings(configuration.load(path, overrides)) == []


def test_every_field_has_a_description():
    fields = list(configuration.fields())
    assert len(fields) > 50
    assert all(description and kind for _, kind, _, description in fields)
