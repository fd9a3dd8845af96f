#!/usr/bin/env bash
# Train with the image on the GPUs of this machine:  launch/docker.sh train [CONFIG.yaml] [key=value ...]
# Other commands of hvdformer run on the same ranks; first of all:  launch/docker.sh doctor
set -euo pipefail

ENGINE=${ENGINE:-docker}             # or podman
IMAGE=${IMAGE:-hvdformer}            # docs/docker.md says how to build it
GPUS=${GPUS-all}                     # as docker's --gpus takes them: all, 2, '"device=0,1"'; empty: the CPU
NP=${NP:-}                           # ranks; empty: one per GPU, or 2 on the CPU
RUNS=${RUNS:-$PWD/runs}              # folder here for the runs; /work/runs in the container, so runs/... in arguments
DATA=${DATA:-}                       # folder here with data; /work/data there, to be read only; empty: none
CONFIGS=${CONFIGS:-}                 # folder here with configs; /work/configs there; empty: the image's
SHM_SIZE=${SHM_SIZE:-1g}             # shared memory: ranks of one host exchange data there; docker gives 64 MiB
# Limits. What a network card or a GPU reads directly is locked in memory, far beyond the usual limit; and libraries put large
# buffers on the stack, for which NVIDIA's own images ask 64 MiB. Empty: the engine's, where it may not raise them.
ULIMITS=${ULIMITS-memlock=-1 stack=67108864}
RUN_AS=${RUN_AS:-$(id -u):$(id -g)}  # user and group that the ranks run as: what they write is yours

(( $# )) || set -- train

if [[ -n $GPUS ]]; then
  # Asked in a container: podman takes --gpus without a GPU or a driver, says nothing, and the run would use the CPU.
  gpus=$("$ENGINE" run --rm --gpus "$GPUS" "$IMAGE" nvidia-smi --list-gpus | grep -c '^GPU ') || {
    echo "A container sees no GPU with --gpus $GPUS: is the NVIDIA Container Toolkit installed? GPUS= trains on the CPU." >&2
    exit 1
  }
fi
NP=${NP:-${gpus:-2}}

mkdir -p "$RUNS"  # or the engine makes it, and it is root's

flags=(
  --rm
  --init                    # a process 1 that passes signals on and clears up after dead ranks
  --stop-timeout 120        # seconds from docker stop to the kill: enough to finish a step and save
  --user "$RUN_AS"
  --shm-size "$SHM_SIZE"
  --volume "$(realpath "$RUNS"):/work/runs"
)
for limit in $ULIMITS; do flags+=(--ulimit "$limit"); done
[[ -n $GPUS ]] && flags+=(--gpus "$GPUS")
[[ -n $DATA ]] && flags+=(--volume "$(realpath "$DATA"):/work/data:ro")
[[ -n $CONFIGS ]] && flags+=(--volume "$(realpath "$CONFIGS"):/work/configs:ro")
# Settings of Horovod and NCCL in this shell hold for the ranks too.
for name in "${!HOROVOD_@}" "${!NCCL_@}" "${!OMP_@}"; do flags+=(--env "$name"); done

case $1 in
  train) command=(launch -np "$NP" --) ;;  # starts again after failures, and saves at docker stop: docs/restarts.md
  *) command=(horovodrun -np "$NP" hvdformer) ;;
esac

exec "$ENGINE" run "${flags[@]}" "$IMAGE" "${command[@]}" "$@"
