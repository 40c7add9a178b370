import dataclasses
import json
import subprocess
import sys

import pytest

from safe_lab.data import TASKS, load_data
from safe_lab.data.metrics import METRICS


@pytest.mark.parametrize("name", TASKS)
class TestContract:
    def test_entry_is_consistent(self, name):
        task = TASKS[name]
        assert task.name == name
        assert task.main_metric in task.metrics
        assert set(task.metrics) <= set(METRICS)
        assert task.kind == "classification" or task.labels is None
        with pytest.raises(dataclasses.FrozenInstanceError):
            task.name = "other"

    def test_task_loads_from_a_folder(self, name, tmp_path, tokenizer):
        task = TASKS[name]
        columns = [column for column in (task.text_column, task.text_pair_column) if column]
        rows = [dict.fromkeys(columns, f"w{i} w1") | {task.label_column: i % 2} for i in range(8)]
        for split in ("train", *task.validation_splits.values()):
            (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = load_data(task=name, path=str(tmp_path), tokenizer=tokenizer, max_length=16)
        assert set(data.validation) == set(task.validation_splits)
        assert data.train["labels"] == [i % 2 for i in range(8)]
        assert bool(data.labels) == (task.kind == "classification")
        assert ("token_type_ids" in data.train.column_names) and set(data.num_truncated.values()) == {0}


def test_all_nine_glue_tasks_are_there():
    glue = {name for name, task in TASKS.items() if task.hub_id == "nyu-mll/glue"}
    assert glue == {"cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"}


def test_task_names_load_without_heavy_libraries():
    heavy = {"torch", "datasets", "transformers", "sklearn", "pandas"}
    code = f"import sys, safe_lab.data.tasks; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_unknown_task_names_the_near_one(tokenizer):
    with pytest.raises(ValueError, match="did you mean mrpc"):
        load_data(task="mrcp", tokenizer=tokenizer)
