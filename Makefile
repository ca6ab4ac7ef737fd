# `make demo` and `make test` do all the set-up they need, in a virtual environment of their own.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PROMPT ?= ROMEO:

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.runtime
	$(BIN)/tritium generate --prompt "$(PROMPT)" --max-new-tokens 120 --seed 1 --stream

test: $(VENV)/.development $(VENV)/triton-3.6.0 $(VENV)/lm-eval
	VENV="$(VENV)" $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

lint: $(VENV)/.development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p $(VENV)/types/tritium
	ln -sfn $(foreach path,tritium/__init__.py kernels runtime models benchmarks,"$(CURDIR)/$(path)") $(VENV)/types/tritium/
	$(BIN)/mypy

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Tritium needs Python 3.11 or newer: make PYTHON=/path/to/python3")'
	$(PYTHON) -m venv "$(VENV)"

$(VENV)/.runtime: setup.py constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.development: setup.py constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

# The oldest Triton that is supported: the kernels' compilation is tested under it too (tests/aot).
$(VENV)/triton-3.6.0: | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --no-deps --target "$@" triton==3.6.0

# The evaluation harness without what its tasks need, which is a lot: the adapter is tested on its base class.
$(VENV)/lm-eval: | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --no-deps --target "$@" lm_eval==0.4.13

clean:
	rm -rf "$(VENV)" build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
