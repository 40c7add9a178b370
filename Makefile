# Each target does its own set-up: a machine with Python 3.11+, pip and make needs nothing else.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test lint format bench clean

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo,sharpness,postgresql,dev]"
	# What tests hold the curvature against. Without its dependencies, of which torchvision in a build for CUDA keeps transformers
	# from loading any model where torch is the CPU's.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps curvlinops-for-pytorch backpack-for-pytorch \
		einconv einops linear_operator opt_einsum unfoldNd
	touch $@

demo: install
	$(BIN)/safe-lab ablate experiments/demo.yaml

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 3 --dist worksteal

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: install
	$(BIN)/safe-lab bench experiments/bench/small.yaml

clean:
	rm -rf .venv runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache
