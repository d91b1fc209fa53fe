# Two commands set everything up on a machine with Python and make:
#   make quickstart    a virtual environment, then the main job with its report
#   make test          the same environment, then the whole test suite
PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
STAMP := $(VENV)/.mmalign-installed

.DEFAULT_GOAL := help
.PHONY: help venv quickstart test lint clean

help:
	@echo "targets: venv quickstart test lint clean"

venv: $(STAMP)

# The package is installed in place; only a change of its dependencies installs again.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check $(PIP_FLAGS) -e '.[dev]'
	touch $@

quickstart: venv
	$(VENV)/bin/mmalign train trainers/recipes/shapes_flow_grpo.yaml

# A worker for each core, one thread each; a file stays with one worker.
test: venv
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --dist loadfile

lint: venv
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
