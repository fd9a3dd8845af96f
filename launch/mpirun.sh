#!/usr/bin/env bash
# Train with Open MPI, on this machine or on hosts:  launch/mpirun.sh [CONFIG.yaml] [key=value ...]
# DOCTOR=1 launch/mpirun.sh says whether this works here, and trains nothing.
set -euo pipefail

NP=${NP:-2}            # ranks over all hosts
HOSTS=${HOSTS:-}       # node1:8,node2:8 (slots a host); empty: this host, or what the batch system allotted
NETWORK=${NETWORK:-}   # interface or network that all hosts share: eth0, 10.1.0.0/16; empty: MPI tries all that are up

ranks=(hvdformer train "$@")
[[ -n ${DOCTOR:-} ]] && ranks=(hvdformer doctor)

flags=(
  -np "$NP"
  --bind-to none     # a rank has threads of its own; bound to one core, as is the default at 2 ranks, they queue there
  --map-by slot      # neighbouring ranks on one host
  -x PATH            # so that the other hosts find this environment's python and hvdformer
)
[[ -n $HOSTS ]] && flags+=(--host "$HOSTS")
# For the ranks' data, and for mpirun's own words with the other hosts.
[[ -n $NETWORK ]] && flags+=(--mca btl_tcp_if_include "$NETWORK" --mca oob_tcp_if_include "$NETWORK")
# What steers Python, hvdformer, Horovod, NCCL and threads here holds for the ranks on the other hosts too.
for name in LD_LIBRARY_PATH PYTHONPATH "${!HVDFORMER_@}" "${!HOROVOD_@}" "${!NCCL_@}" "${!OMP_@}"; do
  [[ -n ${!name:-} ]] && flags+=(-x "$name")
done
# More ranks than cores is refused by default; on a laptop, or for a test, it is meant.
[[ -z $HOSTS ]] && (( NP > $(nproc) )) && flags+=(--oversubscribe)
# Inside a container one is root, and mpirun wants to hear that this is meant.
(( EUID == 0 )) && flags+=(--allow-run-as-root)

# By its whole path: then it looks for its daemon in the same place on the other hosts, where ssh knows no such PATH.
mpirun=$(command -v mpirun) || { echo "there is no mpirun on the PATH: activate the environment" >&2; exit 2; }
exec "$mpirun" "${flags[@]}" "${ranks[@]}"
