# `make demo` runs the main job on a fresh machine, `make test` every test. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f 2>/dev/null) setup.py pyproject.toml

.PHONY: demo test lint setup clean

demo: setup
	$(BIN)/selfdistill demo

# Two processes of one thread each; the Triton kernels under the interpreter need their own.
test: export OMP_NUM_THREADS = 1
test: setup
	$(BIN)/python -m pytest -q --durations=10 -n 2 --dist loadfile
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q --durations=10 -n 2 tests/triton

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

setup: $(VENV)/.extension

# Pinned requirements first (torch among them), so that the extension builds against that torch.
$(VENV)/.requirements: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

$(VENV)/.extension: $(VENV)/.requirements $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) build runs *.egg-info selfdistill_kernels/_C*.so
