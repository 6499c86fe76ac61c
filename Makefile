# Every target sets up .venv by itself; nothing but Python 3.11 or newer, make and git is needed.
SHELL := /bin/bash
PYTHON ?= python3
SWEEP ?=
BACKEND ?=
RUN = $(if $(filter-out wandb,$(BACKEND)),$(error BACKEND=$(BACKEND): write BACKEND=wandb, or leave it out),$(if $(BACKEND),wandb sweep,run))
ARGS ?=
BIN := .venv/bin

.DEFAULT_GOAL := help

.PHONY: help
help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup: .venv/.installed  ## create .venv and install the locked packages

.venv/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sovit needs Python 3.11 or newer; set PYTHON=python3.12, say.")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

.PHONY: sweep-star
sweep-star: setup  ## train the star sweep and write its report (SWEEP=star_smoke: a short one; BACKEND=wandb: by W&B agents)
	$(BIN)/sovit $(RUN) sweeps/$(or $(SWEEP),star_tiny).yaml $(ARGS)
	$(BIN)/sovit fit runs/$(or $(SWEEP),star_tiny)

.PHONY: sweep-grid
sweep-grid: setup  ## train the grid sweep of small shapes and write its report
	$(BIN)/sovit $(RUN) sweeps/$(or $(SWEEP),grid_tiny).yaml $(ARGS)
	$(BIN)/sovit fit runs/$(or $(SWEEP),grid_tiny)

.PHONY: sweep-diagonal
sweep-diagonal: setup  ## train shapes scaled jointly: how far to go along the star's direction
	$(BIN)/sovit $(RUN) sweeps/$(or $(SWEEP),diagonal_tiny).yaml $(ARGS)
	$(BIN)/sovit fit runs/$(or $(SWEEP),diagonal_tiny)

.PHONY: optimize
optimize: setup  ## the whole way: star, grid, prediction, the predicted shape against its rivals (under an hour on two cores)
	$(BIN)/sovit optimize $(ARGS)

ENCODER ?=
TINY := runs/encoder_tiny/encoder_tiny-w0040-d02-m0200-h04-p08-s0
LIT := $(if $(ENCODER),lit_mine,lit_tiny)
TOWER := runs/$(LIT)/$(LIT)-w0032-d02-m0128-h04-l040-s0

.PHONY: eval-multimodal
eval-multimodal: setup  ## an encoder by what can be said of its images: zero-shot, retrieval, captions, answers (ENCODER=RUN: yours)
	$(if $(ENCODER),,$(BIN)/python -m sovit.train experiment=encoder_tiny)
	$(BIN)/python -m sovit.train experiment=lit_tiny name=$(LIT) text.encoder=$(or $(ENCODER),$(TINY)) $(ARGS)
	$(BIN)/sovit eval $(TOWER) task=zeroshot
	$(BIN)/sovit eval $(TOWER) task=retrieval
	$(BIN)/sovit eval $(or $(ENCODER),$(TINY)) task=multitask

.PHONY: test
test: setup  ## run the test suite
	$(BIN)/python -m pytest $(ARGS)

.PHONY: test-all
test-all: setup  ## run every test: the long ones too, and a Slurm of its own where it can be installed (as root)
	$(BIN)/python -m pytest -m "" $(ARGS)

.PHONY: lint
lint: setup  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: bench
bench: setup  ## measure the loader, the two ways to get several durations from one run, and the plan against the clock
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/durations.py
	$(BIN)/python benchmarks/planned.py
	$(BIN)/python benchmarks/language.py

.PHONY: bench-analysis
bench-analysis: setup  ## measure the fit: efficiency, coverage, alarms, promises, laws, power, comparisons (over an hour)
	for study in estimator intervals specification promised joint power comparing; do $(BIN)/python benchmarks/$$study.py || exit 1; done

.PHONY: lock
lock:  ## pin every package again (needs uv)
	uv pip compile pyproject.toml --group dev --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-annotate --no-header --upgrade -o requirements.lock

.PHONY: clean
clean:  ## delete the virtual environment, keep the runs
	rm -rf .venv
