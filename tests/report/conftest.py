"""What reports are made of in these tests."""

import pytest
from tiny import tiny_tree_in

from safe_lab import ablation, yaml_core
from safe_lab.run import run


@pytest.fixture(scope="session")
def experiment(tiny_folder, tmp_path_factory):
    """The folder of an experiment that has run, but for one run."""
    folder = tmp_path_factory.mktemp("report")
    tree = tiny_tree_in(folder, tiny_folder)
    del tree["name"]
    tree["sharpness"] = {
        "when": "end",
        "measures": ["trace", "eigenvalues", "spectrum"],
        "samples": 16,
        "validation_samples": 0,
        "tolerance": 0.9,
        "budget_products": 60,
        "spectrum_starts": 2,
        "spectrum_steps": 4,
        "landscape": ["random_line", "random_plane"],
        "landscape_points": 5,
    }
    tree = {
        "name": "experiment",
        "base": tree,
        "variants": {"none": {"freezing.policy": "none"}, "cka": {}, "late": {"freezing.final": 4}},
        "seeds": 2,
        "margin": 0.5,
    }
    path = folder / "experiment.yaml"
    path.write_text(yaml_core.write(tree))
    found = ablation.load(path)
    for one in found.runs:
        if one != ("late", 1):
            run(found.config_of(*one))
    (found.folder / "experiment.yaml").write_text(yaml_core.write(found.to_dict()))
    return found.folder
