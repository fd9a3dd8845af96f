#!/usr/bin/env bash
# Train with Open MPI, on this machine or on hosts:  launch/mpirun.sh [CONFIG.yaml] [key=value ...]
set -euo pipefail

NP=${NP:-2}          # ranks over all hosts
HOSTS=${HOSTS:-}     # node1:8,node2:8 (slots a host); empty: this host, or what the batch system allotted

flags=(
  -np "$NP"
  --bind-to none     # a rank has threads of its own; bound to one core, as is the default at 2 ranks, they queue there
  --map-by slot      # neighbouring ranks on one host
  -x PATH            # so that the other hosts find this environment's python and hvdformer
)
[[ -n $HOSTS ]] && flags+=(--host "$HOSTS")
[[ -n ${LD_LIBRARY_PATH:-} ]] && flags+=(-x LD_LIBRARY_PATH)
# Settings of Horovod and NCCL in this shell hold for the ranks on the other hosts too.
for name in "${!HOROVOD_@}" "${!NCCL_@}"; do flags+=(-x "$name"); done
# More ranks than cores is refused by default; on a laptop, or for a test, it is meant.
[[ -z $HOSTS ]] && (( NP > $(nproc) )) && flags+=(--oversubscribe)
# Inside a container one is root, and mpirun wants to hear that this is meant.
(( EUID == 0 )) && flags+=(--allow-run-as-root)

exec mpirun "${flags[@]}" hvdformer train "$@"
