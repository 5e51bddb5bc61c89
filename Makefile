# `make demo` runs the main job on a fresh machine, `make test` the tests that people wait for,
# `make test-all` every test, `make lint` ruff and mypy, `make clean` removes what these made.
# All but `clean` set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f 2>/dev/null) setup.py pyproject.toml
# Two processes of one thread each; -rs lists what was skipped, and why.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs --durations=10 -n 2

.PHONY: demo test test-all lint setup clean

demo: setup
	$(BIN)/selfdistill demo

# Triton's interpreter needs processes of its own: a second run, which starts whatever the first one
# found. The status tells both.
test: SELECTED := -m "not slow"
test test-all: setup
	@status=0; set -x; \
	$(PYTEST) $(SELECTED) --dist loadfile || status=1; \
	TRITON_INTERPRET=1 $(PYTEST) $(SELECTED) tests/triton || status=1; \
	exit $$status

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
