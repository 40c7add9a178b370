"""Imports run one way, and what a run does not use is not imported."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "safe_lab"

# A module may import what stands before it, or beside it in the same row.
LAYERS = [
    {
        "byte_size",
        "child",
        "suggest",
        "shapes",
        "yaml_core",
        "rng",
        "section",
        "units",
        "processes",
        "replicas",
        "sharding",
        "launch",
        "weights",
        "whole_file",
    },
    {"schedule", "policy", "importance", "data", "sharpness"},
    {"config"},
    {"decision", "nursery"},
    {"adapters", "model", "freezing", "checkpoint", "run_folder", "environment", "result", "evaluation", "memory"},
    {"optimizer", "resources", "plan", "prefix", "export", "folding", "gauging"},
    {"savings", "tracking", "losses", "figures", "micro_batches", "training_state"},
    {"console"},
    {"trainer"},
    {"job"},
    {"build"},
    {"saved"},
    {"run"},
    {"replay", "trainings", "hardware", "statistics"},
    {"bench", "sweep", "ablation"},
    {"report"},
    {"cli"},
    {"__init__", "__main__"},
]
LEVEL = {name: i for i, layer in enumerate(LAYERS) for name in layer}
# The paper's part works without configuration, trainer or tracker.
PURE = {
    "units",
    "schedule",
    "policy",
    "importance",
    "decision",
    "freezing",
    "suggest",
    "processes",
    "sharding",
    "sharpness",
    "whole_file",
}
ONLY_IN = {
    "accelerate": {"trainer", "job", "build", "saved", "tracking"},
    "wandb": {"tracking"},
    "optuna": {"sweep"},
    "peft": {"adapters"},
    "matplotlib": {"sharpness"},
    "plotly": {"sharpness", "sweep", "report"},
}


def imports():
    for path in PACKAGE.rglob("*.py"):
        module = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = (
                    [f"{node.module}.{alias.name}" for alias in node.names]
                    if node.module == "safe_lab"
                    else [node.module]
                )
            else:
                continue
            for name in names:
                yield module, name.split(".")


def test_every_module_has_a_layer():
    assert {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in PACKAGE.rglob("*.py")} == set(LEVEL)


def test_imports_run_one_way():
    for module, (top, *rest) in imports():
        if top == "safe_lab" and rest:
            assert LEVEL[rest[0]] <= LEVEL[module], f"{module} imports {rest[0]}"


def test_the_papers_part_knows_no_configuration_trainer_or_tracker():
    for module, (top, *rest) in imports():
        if module in PURE and top == "safe_lab" and rest:
            assert rest[0] in PURE, f"{module} imports {rest[0]}"


def test_heavy_libraries_are_known_to_few():
    for module, (top, *_) in imports():
        assert module in ONLY_IN.get(top, {module}), f"{module} imports {top}"


def test_public_names_exist_and_cost_nothing_until_used():
    program = (
        "import sys, safe_lab\n"
        "assert 'torch' not in sys.modules\n"
        "assert all(getattr(safe_lab, name) for name in safe_lab.__all__)\n"
        "assert not {'wandb', 'optuna', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_no_two_test_files_bear_one_name() -> None:
    """pytest imports files by their base names: two of one name and it collects only the first."""
    names = [path.name for path in Path(__file__).parent.rglob("*.py") if path.name != "conftest.py"]
    assert sorted(set(names)) == sorted(names)
