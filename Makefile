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
.PHONY: help venv demo test lint format bench bench-save bench-compare bench-smoke clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile
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

# Ratios against a reference, so that runs of one device can be compared. ARGS="-k 'M=16'" runs a part.
SUITE = $(BIN)/python -m benchmarks.suite

bench: $(READY)  ## time everything against its reference; JSON in .benchmarks/
	$(SUITE) --json .benchmarks/latest.json $(ARGS)

bench-save: $(READY)  ## the same, and keep it as the baseline of this device
	$(SUITE) --json .benchmarks/latest.json --save $(ARGS)

bench-compare: $(READY)  ## the same, and fail where a ratio fell by more than 10 %
	$(SUITE) --compare $(ARGS)

bench-smoke: $(READY)  ## see that every benchmark runs, in its smallest form (under 2 minutes)
	$(SUITE) --smoke $(ARGS)

clean:  ## remove .venv and everything built
	rm -rf $(VENV) build dist demo_output .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf *.egg-info
