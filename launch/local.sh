#!/usr/bin/env bash
# Train on the cores or GPUs of this machine:  launch/local.sh [CONFIG.yaml] [key=value ...]
# DOCTOR=1 launch/local.sh says whether this works here, and trains nothing.
set -euo pipefail

gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ') || true
NP=${NP:-$(( gpus > 0 ? gpus : 2 ))}  # ranks: one per GPU; on CPUs a rank uses cores / NP threads
CONTROLLER=${CONTROLLER:-gloo}  # gloo: ranks that wait sleep, so a busy machine is shared well; or mpi

ranks=(hvdformer train "$@")
[[ -n ${DOCTOR:-} ]] && ranks=(hvdformer doctor)

# No --verbose: it prints every variable of the environment, secrets included.
exec horovodrun "--$CONTROLLER" -np "$NP" "${ranks[@]}"
