"""Studies over runs that take a second, and where they are kept."""

import pytest
from sweep_tools import PostgreSQL, Sweep, find_postgresql


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
