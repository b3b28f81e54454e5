# make demo and make test need nothing but Python >= 3.11 with venv; both set up .venv on first use.

VENV  ?= .venv
BIN   := $(VENV)/bin
# Installed first and by itself, so that no other requirement can pull a different build of it.
TORCH ?= torch==2.13.0
JOBS  ?= 2

# The first Python that really runs, is new enough and can make a virtual environment (version-manager shims may exist and fail).
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python /usr/bin/python3; do \
	"$$p" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { command -v "$$p"; break; }; done)

PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input install -qq --constraint constraints.txt

# One computing thread for each test worker: more would only compete.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# Material for MkDocs prints a notice about MkDocs 2 on every build; mkdocs is pinned below 2.
MKDOCS := NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/mkdocs

.PHONY: help demo test check lint format types docs docs-serve pytest bench install install-dev clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: install  ## train KFAC against tuned SGD and Adam, draw the plots, write report.html
	$(BIN)/kronfac demo

test: lint types docs pytest  ## everything CI checks: lint, types, docs, tests with coverage

lint: install-dev  ## ruff's rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install-dev  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: install-dev  ## mypy over src/
	$(BIN)/mypy

docs: install-dev  ## build the documentation into site/, warnings are errors
	$(MKDOCS) build --strict --quiet --site-dir site

docs-serve: install-dev  ## the documentation on a local port, rebuilt on change
	$(MKDOCS) serve

pytest: install-dev  ## the tests, with coverage of src/
	$(ONE_THREAD) $(BIN)/python -m pytest -q -n $(JOBS) --cov --cov-report=term $(PYTEST_ARGS)

bench: install-dev  ## cost of statistics, inverse, preconditioning and whole step, and peak memory
	$(BIN)/kronfac bench $(BENCH_ARGS)
	$(BIN)/python benchmarks/memory.py

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(VENV)/.torch: constraints.txt
	@test -n "$(PYTHON)" || { echo "kronfac needs Python 3.11 or newer with venv (Debian: apt install python3 python3-venv)" >&2; exit 2; }
	@echo "Setting up $(VENV) with $(PYTHON): a few minutes, once."
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(PIP) $(TORCH) hatchling editables
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(PIP) --no-build-isolation --editable '.[experiments]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.torch pyproject.toml
	$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@ $(VENV)/.installed

clean:  ## remove what the targets above made, .venv included
	rm -rf $(VENV) site build dist .mypy_cache .pytest_cache .ruff_cache .coverage .coverage.*
