# `make demo` runs the main job on a fresh machine, `make test` the tests that people wait for,
# `make test-all` every test, `make lint` ruff and mypy, `make clean` removes what these made.
# All but `clean` and `gpu` set up .venv first. `make test-vllm` tests the vLLM engine with vLLM
# itself, in an environment of its own, and `make test-matrix` what hangs on versions under others
# than the pinned ones (hours; it writes docs/compatibility.md). `make gpu` measures everything on
# the GPU at hand with the Python and the packages that are there (docs/gpu-run.md; PYTHON=...,
# GPU_ARGUMENTS=...). `make docs` builds the site in build/site, `make kernel-hub` a kernel for
# Hugging Face's hub in build/kernel-hub.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f 2>/dev/null) setup.py pyproject.toml
# Two processes of one thread each; one that has nothing left takes tests over from the other. -rs lists
# what was skipped, and why.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs --durations=10 -n 2 --dist worksteal

.PHONY: demo docs gpu kernel-hub test test-all test-portable test-matrix test-vllm lint setup clean

demo: setup
	$(BIN)/selfdistill demo

# Triton's interpreter needs processes of its own: a second run, which starts whatever the first one
# found. The status tells both.
test: SELECTED := -m "not slow"
test-all: $(VENV)/.nvcc
test test-all: setup
	@status=0; set -x; \
	$(PYTEST) $(SELECTED) || status=1; \
	TRITON_INTERPRET=1 $(PYTEST) $(SELECTED) tests/triton || status=1; \
	exit $$status

# The tests that compare numbers, as on processors with fewer instructions.
test-portable: setup
	$(BIN)/python tests/portable.py

test-matrix:
	$(PYTHON) tests/version_matrix.py

# Neither a build nor an installation: the tree as it is, found through the working directory.
gpu:
	PYTHONPATH=. HF_HUB_OFFLINE=1 $(PYTHON) -m benchmarks.gpu $(GPU_ARGUMENTS)

kernel-hub: setup
	$(BIN)/python -m kernel_hub

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

# A CUDA compiler where the machine has none; after the extension, so that one pip runs at a time.
$(VENV)/.nvcc: requirements-nvcc.txt $(VENV)/.extension
	PYTHONPATH=tests/support $(BIN)/python -c "import sys, cuda_build; sys.exit(not cuda_build.find_nvcc())" \
	|| $(BIN)/python -m pip install --quiet --requirement requirements-nvcc.txt
	touch $@

# vLLM brings a torch of its own: the tests run against an installed wheel, whose extension was built
# with that torch, and not against the tree, whose extension is for .venv. The pytest command, unlike
# python -m pytest, leaves the tree off the path. A vLLM that is missing fails the tests here.
VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_BUILD := $(VLLM_VENV)/build
PACKAGES := $(shell find selfdistill selfdistill_kernels -name '*.py')

test-vllm: $(VLLM_VENV)/.package
	OMP_NUM_THREADS=1 SELFDISTILL_REQUIRE_VLLM=1 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 \
	$(VLLM_BIN)/pytest -q -rs --durations=5 --show-capture=stderr --override-ini pythonpath=tests/support \
	$(shell find tests -name 'test_vllm*.py')

$(VLLM_VENV)/.requirements: requirements-vllm.txt
	rm -rf $(VLLM_VENV)
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/python -m pip install --quiet --requirement requirements-vllm.txt
	$(VLLM_BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# Objects are kept between builds; modules are not, or one that has left the tree would stay.
$(VLLM_VENV)/.package: $(VLLM_VENV)/.requirements $(SOURCES) $(PACKAGES)
	mkdir -p $(VLLM_BUILD)
	find $(VLLM_BUILD) \( -name '*.py' -o -name '*.whl' \) -delete
	$(VLLM_BIN)/python setup.py --quiet \
	build --build-base $(VLLM_BUILD) bdist_wheel --dist-dir $(VLLM_BUILD)
	$(VLLM_BIN)/python -m pip install --quiet --no-deps --force-reinstall $(VLLM_BUILD)/*.whl
	touch $@

# The pages lie in build/pages as they do here, so that a link is right in both places; files that only a
# link names are copied, too. Warnings, a dead link among them, are errors; with --quiet they would not be.
DOCS_VENV := .venv-docs
PAGES := README.md CHANGELOG.md CONTRIBUTING.md LICENSE docs examples csrc/cuda/README.md \
	benchmarks/cost.py benchmarks/hopper/kernel.py requirements-vllm.txt selfdistill/training/loop.py \
	csrc/divergence.h csrc/clip.h csrc/cpu/rows.inl csrc/cpu/candidates.inl \
	selfdistill/prediction/law.py selfdistill_kernels/backends/reference/divergence.py \
	$(addprefix selfdistill_kernels/backends/triton/,clip.py divergence.py rows.py sweep.py gradient.py)

docs: $(DOCS_VENV)/.requirements
	rm -rf build/pages
	mkdir -p build/pages
	cp -r --parents $(PAGES) build/pages
	PATH="$(CURDIR)/$(DOCS_VENV)/bin:$$PATH" NO_MKDOCS_2_WARNING=1 mkdocs build --strict

$(DOCS_VENV)/.requirements: requirements-docs.txt
	test -x $(DOCS_VENV)/bin/python || $(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --requirement requirements-docs.txt
	touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(DOCS_VENV) build runs *.egg-info selfdistill_kernels/_C*.so
