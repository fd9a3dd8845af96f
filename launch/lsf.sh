#!/usr/bin/env bash
# Train under LSF:  ARGS="run.yaml train.steps=2000" bsub < launch/lsf.sh
# Before the time limit it saves and goes into the queue again, until the run is done. Flags of bsub win over the lines
# below:  ARGS=run.yaml bsub -n 32 -R "span[ptile=4]" -W 48:00 < launch/lsf.sh
# DOCTOR=1 bsub < launch/lsf.sh says whether this works there, and trains nothing.
#BSUB -J hvdformer
#BSUB -n 4
#BSUB -R "span[ptile=2]"
#BSUB -W 24:00
#BSUB -wa USR1
#BSUB -wt 5
#BSUB -Q 99
#BSUB -r
#BSUB -o hvdformer-%J.log
# n: ranks, over all hosts.  ptile: ranks a host: one a GPU (add -gpu "num=2"); on CPUs one a socket.
# wa, wt: SIGUSR1 5 minutes before the limit, enough for a step and a checkpoint.  Q: exit code 99 means the queue again.
# r: again after a host has failed.  o: one log for all turns.
set -uo pipefail

ARGS=${ARGS:-}            # of hvdformer train, separated by blanks
RSH=${RSH:-blaunch}       # how mpirun reaches the other hosts: LSF's own way; or ssh
NETWORK=${NETWORK:-}      # interface or network that all hosts share: ib0, 10.1.0.0/16; empty: MPI tries all

read -ra arguments <<< "$ARGS"
ranks=(hvdformer train "${arguments[@]}" "$@")
[[ -n ${DOCTOR:-} ]] && ranks=(hvdformer doctor)

flags=(
  -np "$(grep -c . "$LSB_DJOB_HOSTFILE")"  # a line a rank
  --hostfile "$LSB_DJOB_HOSTFILE"          # for an Open MPI that was built without LSF, as PyPI's is
  --bind-to none                           # a rank has threads of its own; bound to one core, they queue there
  --mca plm_rsh_agent "$RSH"
  -x PATH                                  # so that the other hosts find this environment's python and hvdformer
)
[[ -n $NETWORK ]] && flags+=(--mca btl_tcp_if_include "$NETWORK" --mca oob_tcp_if_include "$NETWORK")
for name in LD_LIBRARY_PATH PYTHONPATH "${!HVDFORMER_@}" "${!HOROVOD_@}" "${!NCCL_@}" "${!OMP_@}"; do
  [[ -n ${!name:-} ]] && flags+=(-x "$name")
done

# In the background: bash runs a trap only when no command is in the foreground. mpirun passes SIGUSR1 on to the ranks,
# which finish the step, save and end with 0; that LSF sends it to all processes of this host makes no difference to them.
asked=0
trap 'asked=1; echo "time is nearly up: saving"; kill -USR1 "$pid"' USR1
# mpirun by its whole path: then it looks for its daemon in the same place on the other hosts.
mpirun=$(command -v mpirun) || { echo "there is no mpirun on the PATH: activate the environment" >&2; exit 2; }
"$mpirun" "${flags[@]}" "${ranks[@]}" &
pid=$!
while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done  # a signal ends a wait, not the job
wait "$pid"  # its code, which bash keeps
code=$?

if (( asked && code == 0 )); then
  # A run that was just done starts once more, finds nothing to do, and is not asked to stop.
  echo "saved; in the queue again"
  exit 99
fi
exit "$code"
