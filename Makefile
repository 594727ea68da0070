# What continuous integration runs is what people type. Needs make and Python >= 3.11; the rest goes into .venv.

PYTHON ?= python3
VENV   ?= .venv
# Test processes; those that start real ranks bring up to four more each.
JOBS   ?= 2
PIP    := $(VENV)/bin/python -m pip --quiet --quiet --disable-pip-version-check
RUN    := $(VENV)/bin/

# A target of this name is a step that was done with this version of the files it depends on.
PACKAGE := $(VENV)/.package
TOOLS   := $(VENV)/.tools

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help venv demo test lint types contracts unit fuzz bench clean

help: ## List what can be made
	@sed -n 's/^\([a-z]*\):.*## /\1|/p' $(MAKEFILE_LIST) | while IFS='|' read -r name what; do printf '  make %-10s %s\n' "$$name" "$$what"; done

venv: $(PACKAGE) ## Set up .venv with shardway alone: no torch
	@echo "$(RUN)shardway is ready"

demo: $(PACKAGE) ## Make a model of 0.5 GB, import, verify, export and verify it (KEEP=1 keeps the files)
	@$(RUN)python -m compileall -q src
	@$(RUN)python examples/demo.py $(if $(KEEP),--keep)

test: lint types contracts unit ## Everything that has to pass

lint: $(TOOLS) ## Style and formatting
	@$(RUN)ruff check --quiet
	@$(RUN)ruff format --check --quiet

types: $(TOOLS) ## Static types
	@$(RUN)mypy

contracts: $(TOOLS) ## Which package may import which
	@PYTHONPATH=src $(RUN)lint-imports --no-logo

unit: $(TOOLS) ## Tests (ARGS="-k name -x" goes to pytest)
	@$(RUN)python -m pytest -n $(JOBS) $(ARGS)

fuzz: $(TOOLS) ## Fuzz the parsers, guided by coverage (5 minutes; ARGS="--seconds 600 metadata" for longer)
	@$(PIP) install -c constraints.txt --group fuzz
	@PYTHONPATH=src $(RUN)python -m tests.fuzz $(ARGS)

bench: $(PACKAGE) ## Speed and memory beside cp (10 GB of disk, minutes; ARGS="--sizes small" needs less)
	@$(RUN)python -m benchmarks.convert $(ARGS)
	@$(RUN)python -m benchmarks.startup

clean: ## Remove .venv, caches and what a demo or benchmark left
	rm -rf $(VENV) demo-work bench-work fuzz-work dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("shardway needs Python 3.11 or later: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	@echo "setting up $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(PACKAGE): pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing shardway"
	@$(PIP) install -c constraints.txt -e .
	@touch $@

# torch first and by itself: it is the one that exists in several builds.
$(TOOLS): $(PACKAGE)
	@echo "installing torch, Megatron-Core, transformers and the test tools (once; a minute or two)"
	@$(PIP) install -c constraints.txt "$$(sed -n '/^torch==/p' constraints.txt)"
	@$(PIP) install --upgrade 'pip>=25.1'
	@$(PIP) install -c constraints.txt --group dev --group interop
	@touch $@
