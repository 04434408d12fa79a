# Everything here sets up what it needs. Required: make, and Python 3.11 or newer with venv.

SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
# What serving needs, and what tests, linters and benchmarks need beside it.
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
# For its interpreter, beside a torch without CUDA; one with CUDA brings the Triton that it was built with.
TRITON := triton==3.6.0

# The first Python that is new enough; PYTHON=... overrides.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3 python; do \
	if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then echo $$python; break; fi; done)

.PHONY: help install demo serve test test-unit lint bench clean

help:
	@echo "make demo      set up, start the cluster with the embedded model, answer one question, shut down"
	@echo "make serve     the same cluster, left running on http://127.0.0.1:8000"
	@echo "make test      everything that needs no GPU"
	@echo "make lint      ruff, mypy, import contracts"
	@echo "make bench     the engine against transformers on this machine, and what an idle cluster costs"
	@echo "make install   only set up, with what tests and linters need"

install: $(INSTALLED_DEV)

$(INSTALLED): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then \
		echo "baton: no Python 3.11 or newer with venv found; install one (Debian and Ubuntu: python3.11 python3.11-venv), or say which: make PYTHON=/path/to/python3" >&2; \
		exit 2; fi
	@echo "baton: setting up $(VENV) with $(PYTHON); the first time takes a few minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	@touch $@

$(INSTALLED_DEV): $(INSTALLED)
	@echo "baton: adding what tests, linters and benchmarks need"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@$(BIN)/python -c 'import triton' 2>/dev/null || \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(TRITON) || \
		echo "baton: no Triton for this machine; the tests of its kernels are skipped" >&2
	@touch $@

demo: $(INSTALLED)
	@$(BIN)/baton demo

serve: $(INSTALLED)
	@$(BIN)/baton serve

# Dozens of processes import the same modules: their bytecode is kept, whatever the environment says.
test test-unit: export PYTHONDONTWRITEBYTECODE :=

# Processes of the cluster tests share the machine: one after the other. Unit tests are short, use one thread each and sometimes wait.
test: test-unit
	$(BIN)/python -m pytest -q tests --ignore=tests/unit -m 'not gpu'

test-unit: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 3 --dist loadfile tests/unit -m 'not gpu'

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: install
	$(BIN)/baton bench engine --device cpu --peer transformers
	$(BIN)/baton bench idle

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
