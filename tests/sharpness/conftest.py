"""Fixtures of small problems; what they are made of is in problems.py."""

from __future__ import annotations

import pytest
from problems import dense_hessian, mlp, transformer


@pytest.fixture
def bert():
    """A tiny BERT with LoRA in float64, anew for each test."""
    return transformer()


@pytest.fixture(scope="session")
def bert_hessian():
    """The dense Hessian of the loss of ``bert``."""
    return dense_hessian(transformer())


@pytest.fixture(params=["classification", "regression"])
def small(request):
    """A small network of either kind of task, in float64."""
    return mlp(request.param)
