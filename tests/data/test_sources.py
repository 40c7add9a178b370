import csv
import gzip
import json
import math

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from safe_lab.data import TASKS, load_data
from safe_lab.data.sources import load_splits

HOSTILE = [
    'an unbalanced " quote',
    "two ''quotes'' and a \\ backslash, a comma",
    "NA",
    "null",
    "None",
    "01",
    "1",
    "1e5",
    "nul\x00byte",
    "emoji \U0001f9ca and \u05e9\u05dc\u05d5\u05dd RTL \u202e",
    "line separator \u2028 inside",
    "  spaces around  ",
    "x" * 1_000_000,
]
LINE_BREAKS = ["two\nlines", "carriage\r\nreturn", "lone\rreturn", "a\ttab", ""]


def rows_of(texts):
    return [{"text": text, "label": i % 2} for i, text in enumerate(texts)]


def write(path, rows):
    """Write rows as the ending of the path says, with nothing but the standard library and pyarrow."""
    ending = path.name.removesuffix(".gz").rpartition(".")[2]
    if ending == "parquet":
        Dataset.from_list(rows).to_parquet(str(path))
        return path
    if ending == "json":
        content = json.dumps(rows)
    elif ending == "jsonl":
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    elif ending == "tsv":
        content = "".join("\t".join(map(str, cells)) + "\n" for cells in [list(rows[0]), *(r.values() for r in rows)])
    else:
        plain = path.parent / "plain.tmp"
        with plain.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerows([list(rows[0]), *(row.values() for row in rows)])
        content = plain.read_bytes().decode()
        plain.unlink()
    raw = content.encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def read(path, task="classification", **changes):
    return load_splits(
        str(path), TASKS[task], **{"label_column": "label", "validation_share": 0.1, "seed": 0} | changes
    )


def load(path, tokenizer, task="classification", **arguments):
    return load_data(task=task, path=str(path), tokenizer=tokenizer, **{"max_length": 16} | arguments)


TEXT_ENDINGS = ["jsonl", "json", "csv", "tsv", "jsonl.gz", "csv.gz"]


@pytest.mark.parametrize("ending", [*TEXT_ENDINGS, "parquet"])
def test_every_format_gives_the_same_tokens(ending, tmp_path, tokenizer):
    rows = [{"text": f"w{i} w{i + 1}", "label": i % 3} for i in range(9)]
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.{ending}", rows)
    data = load(tmp_path, tokenizer)
    assert data.train["input_ids"] == [[2, 4 + i, 5 + i, 3] for i in range(9)]
    assert data.train["labels"] == data.validation["validation"]["labels"] == [i % 3 for i in range(9)]
    assert data.labels == ("0", "1", "2")


@pytest.mark.parametrize("ending", [*TEXT_ENDINGS, "parquet"])
def test_hostile_text_comes_through_untouched(ending, tmp_path):
    texts = HOSTILE + ([] if ending == "tsv" else LINE_BREAKS)
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.{ending}", rows_of(texts))
    assert read(tmp_path)["train"]["text"] == texts


def test_reading_writes_nothing_into_the_folder(tmp_path, tokenizer):
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.csv", rows_of(["w1", "w2"]))
    load(tmp_path, tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.csv", "validation.csv"]


@pytest.mark.parametrize("as_dict", [True, False])
def test_folder_saved_by_datasets(as_dict, tmp_path, tokenizer):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    dataset = Dataset.from_list(rows_of([f"w{i}" for i in range(10)]), features=features)
    saved = DatasetDict({"train": dataset, "validation": dataset}) if as_dict else dataset
    saved.save_to_disk(str(tmp_path / "saved"))
    data = load(tmp_path / "saved", tokenizer)
    assert data.labels == ("no", "yes")
    assert (len(data.train), len(data.validation["validation"])) == ((10, 10) if as_dict else (9, 1))


@pytest.mark.parametrize("name", ["dev", "valid", "val", "validation"])
def test_validation_split_goes_by_several_names(name, tmp_path):
    write(tmp_path / "train.jsonl", rows_of(["a", "b"]))
    write(tmp_path / f"{name}.jsonl", rows_of(["c"]))
    assert read(tmp_path)["validation"]["text"] == ["c"]


def test_mnli_has_two_validation_splits(tmp_path):
    for split in ("train", "dev_matched", "dev_mismatched"):
        write(tmp_path / f"{split}.jsonl", rows_of([split, split]))
    splits = read(tmp_path, "mnli")
    assert list(splits) == ["train", "matched", "mismatched"]
    assert splits["mismatched"]["text"] == ["dev_mismatched"] * 2


def test_held_out_rows_are_stratified_disjoint_and_seeded(tmp_path):
    file = write(tmp_path / "all.jsonl", rows_of(map(str, range(100))))
    splits = read(file, validation_share=0.2)
    train, held_out = (set(splits[split]["text"]) for split in ("train", "validation"))
    assert (len(train), len(held_out), train & held_out) == (80, 20, set())
    assert sum(splits["validation"]["label"]) == 10
    assert read(file, validation_share=0.2)["validation"]["text"] == splits["validation"]["text"]
    assert read(file, validation_share=0.2, seed=1)["validation"]["text"] != splits["validation"]["text"]


@pytest.mark.parametrize(
    ("labels", "given", "expected"),
    [
        (["no", "yes"], None, ("no", "yes")),
        (["yes", "no"], ["yes", "no"], ("yes", "no")),
        ([0, 1], ["no", "yes"], ("no", "yes")),
        (["0", "1"], ["no", "yes"], ("no", "yes")),
        ([0.0, 1.0], ["no", "yes"], ("no", "yes")),
        ([False, True], ["no", "yes"], ("no", "yes")),
    ],
)
def test_labels_as_names_or_ids(labels, given, expected, tmp_path, tokenizer):
    file = write(tmp_path / "all.jsonl", [{"text": "w1", "label": labels[i % 2]} for i in range(20)])
    data = load(file, tokenizer, labels=given)
    assert data.labels == expected
    assert sorted(data.train["labels"]) == [0] * 9 + [1] * 9


def test_labels_file_names_the_ids(tmp_path, tokenizer):
    write(tmp_path / "train.csv", rows_of(["w1"] * 20))
    (tmp_path / "labels.json").write_text('["bad", "good"]')
    assert load(tmp_path, tokenizer).labels == ("bad", "good")


def test_named_columns_and_regression(tmp_path, tokenizer):
    file = write(tmp_path / "all.tsv", [{"a": "w1 w2", "b": "w3", "score": i / 4} for i in range(20)])
    data = load(file, tokenizer, "regression", text_column="a", text_pair_column="b", label_column="score")
    assert data.labels == ()
    assert data.train["input_ids"][0] == [2, 5, 6, 3, 7, 3]
    assert data.train["token_type_ids"][0] == [0, 0, 0, 0, 1, 1]
    assert all(isinstance(label, float) for label in data.train["labels"])


def test_truncation_is_counted_and_cuts_the_longer_text_of_a_pair(tmp_path, tokenizer):
    rows = [{"text": " ".join(["w1"] * n), "pair": "w2 w3", "label": n % 2} for n in (2, 5, 6, 30)]
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.jsonl", rows)
    data = load(tmp_path, tokenizer, text_pair_column="pair", max_length=10)
    assert data.num_truncated == {"train": 2, "validation": 2}
    assert data.train["length"] == [7, 10, 10, 10] == [len(ids) for ids in data.train["input_ids"]]
    assert data.train["input_ids"][3][-3:] == [6, 7, 3]


def test_subsets_are_seeded_and_of_the_size_asked_for(tmp_path, tokenizer):
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.jsonl", rows_of([f"w{i}" for i in range(40)]))
    data, again, other = (
        load(tmp_path, tokenizer, max_train_samples=10, max_validation_samples=5, seed=seed) for seed in (0, 0, 1)
    )
    assert (len(data.train), len(data.validation["validation"])) == (10, 5)
    assert data.train["input_ids"] == again.train["input_ids"] != other.train["input_ids"]


def bad_rows(row, value, column="label"):
    rows = rows_of([f"w{i}" for i in range(10)])
    rows[row][column] = value
    return rows


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        (bad_rows(3, 2), {"labels": ["a", "b"]}, r"split train, row 3.*label 2 is out of range, ids go from 0 to 1"),
        (bad_rows(3, -1), {"labels": ["a", "b"]}, r"split train, row 3.*-1 is out of range.*not public"),
        (bad_rows(3, 0.5), {"labels": ["a", "b"]}, r"split train, row 3.*0.5 is out of range"),
        (bad_rows(3, "positive"), {}, r"train.jsonl, row 3, column 'label': a str, 'positive', after .* a number"),
        (bad_rows(3, None), {}, r"split train, row 3.*label is missing"),
        (bad_rows(3, math.nan), {}, r"split train, row 3.*label is missing"),
        (bad_rows(3, math.nan), {"task": "regression"}, r"split train, row 3.*label is missing"),
        (bad_rows(3, math.inf), {"task": "regression"}, r"split train, row 3.*finite number"),
        (bad_rows(3, None, "text"), {}, r"split train, row 3.*'text'.*missing"),
        ([{"text": i, "label": 0} for i in range(4)], {"labels": ["a", "b"]}, r"split train, row 0.*text.*is a int, 0"),
        (rows_of(["w1"] * 4), {"text_column": "txet"}, r"data.text_column.*'txet'; did you mean text.*text, label"),
        (rows_of(["w1"] * 4), {"label_column": "gold"}, r"data.label_column.*'gold'.*its columns are text, label"),
        (rows_of(["w1"] * 4), {"labels": ["a", "a"]}, r"data.labels.*different"),
        (rows_of(["w1"] * 4), {"max_length": 65}, r"data.max_length is 65.*64"),
    ],
)
def test_bad_rows_are_named(rows, arguments, message, tmp_path, tokenizer):
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        load(tmp_path, tokenizer, **arguments)


def test_unknown_label_name_names_the_near_one(tmp_path, tokenizer):
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.csv", bad_rows(3, "positve"))
    with pytest.raises(ValueError, match=r"split train, row 3.*unknown label 'positve'.*did you mean positive"):
        load(tmp_path, tokenizer, labels=["negative", "positive"])


def test_csv_without_the_label_column_lists_its_columns(tmp_path, tokenizer):
    file = write(tmp_path / "all.csv", [{"text": "w1", "lable": 0}] * 4)
    with pytest.raises(ValueError, match=r"data.label_column.*did you mean lable.*text, lable"):
        load(file, tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.jsonl", '{"text": "a", "label": 0}\n{"text": "b", "la', r"train.jsonl, line 2: cut or not JSON"),
        ("train.jsonl", "[1, 2]\n", r"line 1: expected a JSON object, got list"),
        ("train.json", '[{"text": "a"}', r"train.json is cut or not JSON"),
        ("train.csv", 'text,label\n"a,0\n', r"train.csv is cut or not CSV"),
        ("train.csv", "text,label\na\n", r"train.csv, row 1: 1 fields, and the header has 2"),
        ("train.tsv", "text\ttext\na\tb\n", r"occurs twice"),
        ("train.parquet", "PAR1 not really", r"train.parquet cannot be read as parquet"),
        ("train.jsonl.gz", "not gzip", r"train.jsonl.gz cannot be read"),
        ("train.jsonl", "", r"split train is empty"),
        ("train.csv", "text,label\n", r"split train is empty"),
    ],
)
def test_broken_files_are_named(name, content, message, tmp_path, tokenizer):
    (tmp_path / name).write_text(content)
    write(tmp_path / "validation.jsonl", rows_of(["a", "b"]))
    with pytest.raises(ValueError, match=message):
        load(tmp_path, tokenizer)


def test_file_that_is_not_utf8_is_named(tmp_path, tokenizer):
    (tmp_path / "all.csv").write_bytes("text,label\ncaf\xe9,0\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"all.csv cannot be read"):
        load(tmp_path / "all.csv", tokenizer)


def test_missing_places_name_the_near_one(tmp_path, tokenizer):
    write(tmp_path / "reviews.jsonl", rows_of(["a", "b"]))
    with pytest.raises(FileNotFoundError, match=r"reviews2.jsonl: no such file or folder; did you mean reviews.jsonl"):
        load(tmp_path / "reviews2.jsonl", tokenizer)
    with pytest.raises(FileNotFoundError, match=r"no train split.*found reviews.jsonl"):
        load(tmp_path, tokenizer)


def test_unknown_format_is_named(tmp_path, tokenizer):
    (tmp_path / "all.xlsx").write_text("")
    with pytest.raises(ValueError, match=r"unknown format, known are jsonl"):
        load(tmp_path / "all.xlsx", tokenizer)


def test_labels_file_must_be_a_list_of_names(tmp_path, tokenizer):
    write(tmp_path / "train.jsonl", rows_of(["a"] * 4))
    (tmp_path / "labels.json").write_text('{"0": "bad"}')
    with pytest.raises(ValueError, match=r"labels.json: expected a list"):
        load(tmp_path, tokenizer)


def test_hub_out_of_reach_names_the_data_set_and_the_way_out(tokenizer):
    with pytest.raises(ConnectionError, match=r"'nyu-mll/glue' \(mrpc\).*data.path also takes a local file or folder"):
        load_data(task="mrpc", tokenizer=tokenizer, max_length=16)


def test_generic_task_without_a_path_is_an_error(tokenizer):
    with pytest.raises(ValueError, match=r"classification has no source of its own: set data.path"):
        load_data(task="classification", tokenizer=tokenizer, max_length=16)
