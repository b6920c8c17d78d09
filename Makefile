# Everything a fresh machine needs: python3 >= 3.11 with venv, and make.
#
#   make demo     phantom hospitals -> teachers -> distillation -> one scan segmented, in runs/demo
#   make test     the default tests
#   make check    ruff, mypy and the layer test
#
# PYTHON=python3.12 picks another interpreter; PIP_ARGS="..." is handed to every pip install (another index, say).

PYTHON ?= python3
PIP_ARGS ?=
VENV = .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
PIP = $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt $(PIP_ARGS)

.PHONY: help venv demo test check clean

help:
	@echo "make demo    phantom hospitals, teachers, distillation, one scan segmented -> runs/demo"
	@echo "make test    default tests (not slow, gpu, browser, engine)"
	@echo "make check   ruff, mypy, layer test"
	@echo "make venv    only the environment, in $(VENV)"
	@echo "make clean   remove $(VENV) and caches; runs/ is kept"
	@echo "PYTHON=...   interpreter for the environment (now: $(PYTHON)); PIP_ARGS=... more arguments for pip install"

venv: $(STAMP)

# torch goes first, on its own, so that the build which the index gives is settled before anything depends on it.
$(STAMP): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null 2>&1 || { \
		echo "fediod-med: no interpreter '$(PYTHON)'; install Python 3.11 or newer, or name one: make PYTHON=python3.12" >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "fediod-med: needs Python 3.11 or newer, '$(PYTHON)' is $$("$(PYTHON)" -c 'import platform; print(platform.python_version())');" \
			"name another: make PYTHON=python3.12" >&2; exit 2; }
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); \
		echo "fediod-med: '$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
	@echo "fediod-med: installing into $(VENV), once; the download of torch takes a few minutes"
	@$(PIP) --upgrade pip
	@$(PIP) torch
	@$(PIP) --editable '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/fediod demo --out runs/demo

test: $(STAMP)
	$(BIN)/python -m pytest

check: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/python -m pytest -q tests/test_layers.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
