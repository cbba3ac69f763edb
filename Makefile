# `make` alone lists what there is. Every target makes .venv by itself when it is missing or older than what it is made from.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?= demo
BENCH ?= bench.jsonl
# Processes that share the tests.
JOBS ?= auto

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-all bench sanitize lint format clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

$(STAMP): requirements-dev.txt pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/cuda/*)
	@$(BIN)/python -c pass 2>/dev/null || { \
		"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
			{ echo "fastprune needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3.11" >&2; exit 1; }; \
		echo "making $(VENV) with $(PYTHON)"; "$(PYTHON)" -m venv --clear $(VENV); }
	@echo "installing what requirements-dev.txt pins (about 2 GB the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input -r requirements-dev.txt
	@touch $(STAMP)

venv: $(STAMP)  ## install everything into .venv

demo: $(STAMP)  ## the paper's effect on a small trained model; ends with a table and demo/report.html
	$(BIN)/fastprune demo --out $(OUT)

test: $(STAMP)  ## the quick tests, four minutes at most; ARGS="-k mask" passes options to pytest
	$(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8 -m "not slow and not real" $(ARGS)

test-all: $(STAMP)  ## all tests, as continuous integration runs them
	$(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8 $(ARGS)

bench: $(STAMP)  ## benchmarks and a table of them; wants a quiet machine and some twenty-five minutes
	@rm -f $(BENCH)
	@set -e; for script in benchmarks/bench_*.py; do echo "# $$script" >&2; $(BIN)/python $$script --out $(BENCH) $(ARGS) >/dev/null; done
	@$(BIN)/python benchmarks/table.py $(BENCH)

sanitize: $(STAMP)  ## the tests of the C++ operations, under AddressSanitizer and UBSan
	tests/sanitized.sh $(BIN)/python

lint: $(STAMP)  ## what continuous integration checks about the code's form and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## put the code into that form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv and everything built
	rm -rf $(VENV) build dist *.egg-info fastprune/*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find fastprune kernels tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
