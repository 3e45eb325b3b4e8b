# Needs make and a Python from 3.11 on; everything else is installed into .venv from the pins in constraints.txt.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup test lint demo practice-base effects bench clean

# The first Python from 3.11 on; `make PYTHON=/path/to/python setup` takes another.
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3 python; do \
	"$$p" -c "$(NEW_ENOUGH)" 2>/dev/null && { command -v "$$p"; break; }; done)
BIN := .venv/bin
STAMP := .venv/.set-up

help: ## what can be made
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/make \1\t\2/p' Makefile | expand -t 22

setup: $(STAMP) ## make .venv and install everything into it

# A Python that cannot make a venv, or a failed install, leaves no stamp, so that the next call tries again.
$(STAMP): pyproject.toml constraints.txt
	@if [ ! -x $(BIN)/python ]; then \
	  if [ -z "$(PYTHON)" ] || ! "$(PYTHON)" -c "$(NEW_ENOUGH)" 2>/dev/null; then \
	    echo "luthier needs Python 3.11 or newer, found '$(PYTHON)': install one, or name it: make PYTHON=/path/to/python3.12 setup" >&2; exit 2; \
	  fi; \
	  echo "making .venv with $(PYTHON)"; \
	  "$(PYTHON)" -m venv .venv || { rm -rf .venv; \
	    echo "$(PYTHON) cannot make a virtual environment: install its venv package (python3-venv on Debian and Ubuntu)" >&2; exit 2; }; \
	fi
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

test: $(STAMP) ## every test, on two cores
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(STAMP) ## style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python luthier

demo: $(STAMP) ## tune the practice base and look at the report, in minutes
	$(BIN)/luthier demo

practice-base: $(STAMP) ## train the practice base anew from its own generator; NAME=s, l, … builds another
	for base in $(or $(NAME),s-moves seed "m --install"); do $(BIN)/python -m luthier.practice.bases $$base; done

effects: $(STAMP) ## look for the papers' effects in the practice world; what was run before is not run again
	$(BIN)/python -m luthier.effects --record docs

bench: $(STAMP) ## speed and memory beside other trainers
	$(BIN)/python benchmarks/train.py

clean: ## remove what was built: .venv, caches, reports
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis out demo-report practice-build effects-build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
