# gradfast's everyday tasks. `make` alone explains them.

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch torchvision
ARGS   ?=

# Any of these may also be given on the command line or in the environment.
export GRADFAST_CUDA TORCH_CUDA_ARCH_LIST CUDA_HOME MAX_JOBS

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train test build bench lint format docs docs-serve device-test kernels gpu-check clean force

python := $(VENV)/bin/python
pip    := $(python) -m pip --disable-pip-version-check
# A step that is done leaves a file here; it is done again when what it depends on is newer.
done   := $(VENV)/.gradfast

help:
	@echo "gradfast: gradient clipping that costs nothing, and training that does not blow up"
	@echo
	@echo "  make train         set everything up, then train ResNet50 on real photographs"
	@echo "  make test          set everything up, then run the tests"
	@echo "  make build         set up the environment and build the native extension in it"
	@echo "  make bench         time clip and step against torch's; ARGS='--help' for more"
	@echo "  make device-test   run the CUDA kernels' tests on the CPU (g++, no GPU needed)"
	@echo "  make kernels       registers and occupancy of the CUDA kernels on every architecture; a spill is an error"
	@echo "  make gpu-check     on a machine with a GPU: build, test, sanitize and time the kernels; results in runs/gpu-check."
	@echo "                     With a PYTHON whose torch sees the GPU it installs nothing and needs no network"
	@echo "  make lint          check the style (ruff, clang-format) and the types (mypy)"
	@echo "  make format        rewrite the sources in that style"
	@echo "  make docs          build the documents' site into site/; a link that leads nowhere is an error"
	@echo "  make docs-serve    show that site at http://localhost:8000, and again whenever a document changes"
	@echo "  make clean         remove the environment and everything built"
	@echo
	@echo "Options, as NAME=value (now in brackets):"
	@echo "  ARGS      passed on: make train ARGS='--epochs 3', make test ARGS='-k adam'  [$(ARGS)]"
	@echo "  VENV      the environment's folder, made if absent  [$(VENV)]"
	@echo "  PYTHON    the Python that makes it, 3.10 or later  [$(PYTHON)]"
	@echo "  TORCH     the torch to install in it, such as 'torch==2.13.0'  [$(TORCH)]"
	@echo "  GRADFAST_CUDA=auto|0|1, TORCH_CUDA_ARCH_LIST, CUDA_HOME, MAX_JOBS: see setup.py"
	@echo
	@echo "The first 'make train' or 'make test' downloads torch (up to 3 GB) and compiles; later ones start at once."

train: $(done)/demo
	$(VENV)/bin/gradfast train $(ARGS)

test: $(done)/test
	$(python) -m pytest $(ARGS)

bench: $(done)/test
	$(VENV)/bin/gradfast bench $(ARGS)

build: $(done)/build
	@$(VENV)/bin/gradfast info

# ---- the environment -------------------------------------------------------------------------------------------

$(done)/venv:
	@$(PYTHON) build_backend/check_machine.py
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(done) && touch $@

$(done)/torch: $(done)/venv $(done)/torch.wanted
	@echo "Installing $(TORCH) ..."
	$(pip) install 'setuptools>=77.0.3' ninja $(TORCH)
	@touch $@

sources := $(shell find csrc build_backend -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu' -o -name '*.py')

# The package is installed in place: a change in gradfast/ needs no new build, one in csrc/ recompiles what it touches.
# Beside it come the extras of pyproject.toml that the target is for. A build for this machine alone needs the code of
# its own GPU alone; without a GPU, or with TORCH_CUDA_ARCH_LIST set, setup.py decides.
$(done)/build: extras =
$(done)/demo:  extras = [demo]
$(done)/test:  extras = [demo,export,monitor,test]
$(done)/dev:   extras = [demo,export,monitor,test,dev]
$(done)/docs:  extras = [docs]
$(done)/build $(done)/demo $(done)/test $(done)/dev $(done)/docs: $(done)/torch $(done)/build.wanted $(sources) setup.py pyproject.toml gradfast/version.py
	@echo "Building gradfast$(extras); the first time takes a few minutes, most of them in the compilers ..."
	@export TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-$$($(python) -c '$(own_gpu)')}"; \
	set -x; $(pip) install -q --no-build-isolation -e '.$(extras)'
	@$(python) -c "import json; print(json.load(open('gradfast/_build.json'))['summary'])"
	@touch $@

own_gpu := import torch; print("native" if torch.cuda.is_available() else "")

# Files that hold an option's value, and are rewritten only when it is another than last time.
$(done)/torch.wanted: wanted = $(TORCH)
$(done)/build.wanted: wanted = $(GRADFAST_CUDA) $(TORCH_CUDA_ARCH_LIST) $(CUDA_HOME)
$(done)/%.wanted: force | $(done)/venv
	@echo '$(wanted)' | cmp -s - $@ || echo '$(wanted)' > $@

# ---- checks ----------------------------------------------------------------------------------------------------

python_files := gradfast tests $(wildcard benchmarks examples docs/site) build_backend setup.py
cpp_files     = $(shell find csrc tests benchmarks -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')

lint: $(done)/dev
	$(python) -m ruff check $(python_files)
	$(python) -m ruff format --check $(python_files)
	$(VENV)/bin/clang-format --dry-run --Werror $(cpp_files)
	$(python) -m mypy

format: $(done)/dev
	$(python) -m ruff check --fix $(python_files)
	$(python) -m ruff format $(python_files)
	$(VENV)/bin/clang-format -i $(cpp_files)

# The variable stills a notice of the theme's authors.
docs: $(done)/docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build

docs-serve: $(done)/docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs serve

device-test:
	$(MAKE) -C tests/device

kernels: $(done)/torch
	$(python) build_backend/kernel_resources.py $(ARGS)

# Where $(PYTHON) itself has a torch that sees a GPU it is used as it is, so that a machine without network will do; else
# the environment is, which is made if absent. The GPU is asked for before minutes are spent on compiling.
gpu-check:
	@if $(PYTHON) -c '$(require_gpu)' 2>/dev/null; then \
	  $(PYTHON) tests/gpu/gpu_check.py $(ARGS); \
	elif [ ! -e /dev/nvidiactl ] && [ ! -e /dev/dxg ]; then \
	  echo "gradfast: make gpu-check needs an NVIDIA GPU; this machine has none, or no driver for it"; exit 1; \
	else \
	  $(MAKE) --no-print-directory $(done)/torch && $(python) -c '$(require_gpu)' && \
	  $(MAKE) --no-print-directory GRADFAST_CUDA=1 $(done)/test && $(python) tests/gpu/gpu_check.py $(ARGS); \
	fi

require_gpu := import torch; torch.cuda.is_available() or exit("gradfast: make gpu-check needs a GPU; torch sees none")

clean:
	rm -rf $(VENV) build site gradfast.egg-info gradfast/_build.json gradfast/_C.*.so
	find gradfast tests build_backend -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
