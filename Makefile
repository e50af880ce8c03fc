# Every target does its own set-up; a stamp file per extra makes the second time quick.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

VENV ?= .venv
BIN := $(VENV)/bin
DEMO := $(VENV)/.demo-done
DEV := $(VENV)/.dev-done
CANDIDATES := python3 python3.14 python3.13 python3.12 python3.11 python3.10 python
PYTHON ?= $(shell for p in $(CANDIDATES); do \
	$$p -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 \
	&& echo $$p && break; done)
ARGS ?=
WORKERS ?= auto

.DEFAULT_GOAL := help
.PHONY: help setup demo bench-world test lint format clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

setup: $(DEV) ## make .venv with the tested versions

demo: $(DEMO) ## fine-tune a real model with AdamW and SafeAdamW, print one table, draw one picture
	$(BIN)/safeopt demo $(ARGS)

bench-world: $(DEMO) ## repeat the synthetic world's headline and compare it with the committed one
	$(BIN)/python -m benchmarks.collapse.headline $(ARGS)

test: $(DEV) ## run the tests, one file a core at a time (ARGS="-k name", WORKERS=0 for one process)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest \
		--numprocesses $(WORKERS) --maxprocesses 8 --dist loadfile $(ARGS)

lint: $(DEV) ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV) ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove caches and builds, keep .venv
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/.%-done: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python >= 3.10 with venv and pip found: install one, or name it with PYTHON=/path/to/python" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@
