# From a fresh clone, with Python and nothing else: `make demo`, `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.PHONY: setup demo demo-distributed test test-all check

setup: $(STAMP)

# torch first and on its own, so that no other package gets to choose its build.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/python -m phi3_plugin.recipes.phi3_demo

demo-distributed: setup
	$(BIN)/python -m phi3_plugin.recipes.phi3_demo --processes 2

# Two files at a time, in the order of tests/conftest.py, and one thread each.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: setup
	$(PYTEST) -m "not exhaustive"

test-all: setup
	PHI3_COLD=1 $(PYTEST)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) -m "not slow and not exhaustive"
