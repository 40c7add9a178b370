"""Fixtures for all tests; what they are made of is in tiny.py."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

pytest.register_assert_rewrite("parallel")

# After that, as sweep_tools imports it.
from sweep_tools import PostgreSQL, Sweep, find_postgresql  # noqa: E402
from tiny import FAMILIES, save_tiny_model, tiny_tree_in, write_csv  # noqa: E402

# Sums over threads come out in other bits: the processes that tests start compute with as many threads as this one.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


@pytest.fixture(params=sorted(FAMILIES))
def family(request):
    """Each family of models in turn."""
    return request.param


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A tiny BERT on disk."""
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def tiny_tree(tiny_folder, tmp_path):
    """The YAML tree of a run that takes a second."""
    return tiny_tree_in(tmp_path, tiny_folder)


@pytest.fixture
def tree(tiny_tree, tmp_path):
    """The YAML tree of a run for several processes: without dropout, which each draws for itself; its last batch has one row."""
    folder = save_tiny_model(tmp_path / "model", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    tiny_tree["model"] = {"path": str(folder)}
    tiny_tree["data"] |= {"path": str(write_csv(tmp_path / "uneven.csv", rows=50)), "max_train_samples": 41}
    tiny_tree["training"] |= {"log_every": 1, "eval_batch_size": 4}
    tiny_tree["freezing"] |= {"interval": 4}
    return {"savings": {}, "memory": {}} | tiny_tree


@pytest.fixture
def postgresql():
    """A running PostgreSQL."""
    programs = find_postgresql()
    if programs is None:
        pytest.skip("PostgreSQL is not installed")
    server = PostgreSQL(programs)
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture
def sweep(tiny_tree, tmp_path):
    """A study that a test may change before it is run."""
    tiny_tree["training"] |= {"epochs": 1}
    return Sweep(tmp_path, {key: value for key, value in tiny_tree.items() if key != "name"})
