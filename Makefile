# Every target sets up what it needs: a virtual environment in .venv with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_DIR ?= runs/demo
DEMO_FLAGS ?=
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test lint types format clean
.DEFAULT_GOAL := help

help:  ## What can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: $(VENV)/demo.done  ## The whole method on embedded images, ending with a page to look at (minutes)
	$(BIN)/lwd demo --directory $(DEMO_DIR) $(DEMO_FLAGS)

test: $(VENV)/dev.done  ## All tests
	$(BIN)/python -m pytest

lint: $(VENV)/dev.done  ## Style and formatting
	$(BIN)/ruff check src tests benchmarks docs experiments
	$(BIN)/ruff format --check src tests benchmarks docs experiments

types: $(VENV)/dev.done  ## Static types
	$(BIN)/mypy

format: $(VENV)/dev.done  ## Apply the formatter and the safe lint fixes
	$(BIN)/ruff check --fix src tests benchmarks docs experiments
	$(BIN)/ruff format src tests benchmarks docs experiments

clean:  ## Remove the virtual environment and caches (runs stay)
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "lwd needs Python 3.11 or later; set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/%.done: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$*]'
	@touch $@
