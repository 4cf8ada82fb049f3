# Every target sets up what it needs in .venv, from a bare python3 on.

PYTHON ?= python3
JOBS ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Asked for exactly, and first: a looser request may pull another build of several gigabytes.
TORCH := $(shell sed -n 's/^\(torch==.*\)/\1/p' constraints.txt)
# Tests marked `cuda` run where there is a GPU.
CUDA_FILTER = $$($(BIN)/python -c "import torch; print('' if torch.cuda.is_available() else 'not cuda')")

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint format bench clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "  ARGS='...' is passed on, e.g.  make demo ARGS='--task digits'  or  make test ARGS='-k cli'"

venv: $(READY)  ## install everything into .venv

$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
	  echo "error: $(PYTHON) not found; install Python 3.11 or newer, or pass PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1); pass PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
	  echo "error: could not make $(VENV); is the venv module installed? (Debian, Ubuntu: python3-venv)"; exit 1; }
	$(BIN)/python -m pip install --quiet $(TORCH) -c constraints.txt
	$(BIN)/python -m pip install --quiet -e '.[test,bench,dev]' -c constraints.txt
	@touch $@

# Threads that wait asleep: on 2 cores 10 % slower alone, and 4 times faster beside another process.
demo test: export OMP_WAIT_POLICY ?= passive

demo: $(READY)  ## train, prune, resurrect and export on two real tasks (a few minutes)
	$(BIN)/resu-compile demo $(ARGS)

test: $(READY)  ## run the tests
	$(BIN)/python -m pytest -n $(JOBS) -m "$(CUDA_FILTER)" $(ARGS)

lint: $(READY)  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## rewrite files in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## time the kernels and the training step
	$(BIN)/python -m pytest benchmarks -p no:xdist --benchmark-only $(ARGS)

clean:  ## remove .venv and everything built
	rm -rf $(VENV) build dist demo_output .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf *.egg-info
