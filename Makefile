# From a fresh clone, with Python and nothing else: `make demo`, `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.PHONY: setup demo demo-distributed test test-all check runtimes docs release

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

# Two files at a time, in the order of tests/conftest.py, and one thread each. Bytecode is kept
# whatever the shell says: to compile every test anew in each process takes a quarter of a minute.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: setup
	$(PYTEST) -m "not exhaustive and not runtimes"

test-all: setup
	PHI3_COLD=1 $(PYTEST)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) -m "not slow and not exhaustive and not runtimes"

# What is exported, in every program that serves it; some 27 GB of environments, each of its own.
runtimes: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.runtimes

# The pages need neither torch nor this package installed: an environment of their own.
.venv-docs/bin/mkdocs:
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet -c constraints.txt \
	'mkdocs-material>=9.6' 'mkdocstrings[python]>=0.30'

docs: .venv-docs/bin/mkdocs
	NO_MKDOCS_2_WARNING=true .venv-docs/bin/mkdocs build --quiet --strict

# What is published: built from a clean copy of the last commit, checked, and listed. Uploads nothing.
release: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt build 'twine>=6'
	rm -rf build/release dist && mkdir -p build/release
	git archive HEAD | tar -x -C build/release
	$(BIN)/python -m build --outdir dist build/release
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m zipfile --list dist/*.whl
	tar --list --file dist/*.tar.gz
