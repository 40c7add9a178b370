"""The notebooks run from top to bottom on runs of the shipped files with a tiny model; they define nothing and hold no output."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from forks import command
from tiny import write_csv

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def safe_lab(folder, *arguments):
    """Run the command in a folder."""
    log = folder / "log"
    with command(arguments, log, log, folder=folder) as fork:
        fork.wait(timeout=300)
    assert fork.returncode == 0, log.read_text()


@pytest.fixture(scope="module")
def workplace(tiny_folder, tmp_path_factory):
    """A folder with the notebooks in it, and the runs that they read."""
    folder = tmp_path_factory.mktemp("notebooks")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")
    rows = (f"data.path={write_csv(folder / 'rows.csv')}", "data.task=classification", f"model.path={tiny_folder}")
    tiny = (*rows, "data.max_length=32", "training.epochs=3", "training.batch_size=8", "tracking.wandb=disabled")
    safe_lab(folder, "ablate", ROOT / "experiments/demo.yaml", *tiny, "freezing.final=2", "freezing.normalize=rank")
    safe_lab(folder, "ablate", ROOT / "experiments/ablations/quickstart.yaml", *tiny)
    safe_lab(folder, "sweep", ROOT / "sweeps/quickstart.yaml", *tiny, "--trials", 4)
    runs = sorted((folder / "runs/demo").glob("*/seed-0"))
    small = ("samples=8", "validation_samples=8", "tolerance=0.9", "budget_products=60", "spectrum_starts=2")
    safe_lab(folder, "sharpness", *runs, *small, "landscape=[random_line, random_plane]", "landscape_points=3")
    return folder


def test_they_run_from_top_to_bottom(workplace):
    words = [sys.executable, "-m", "pytest", "--nbmake", "--nbmake-timeout=200", "-q", "-p", "no:cacheprovider"]
    ended = subprocess.run([*words, "notebooks"], cwd=workplace, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stdout
    assert f"{len(NOTEBOOKS)} passed" in ended.stdout


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_they_define_nothing_and_hold_no_output(path):
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            definitions = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda
            assert not any(isinstance(node, definitions) for node in ast.walk(ast.parse("".join(cell["source"]))))
