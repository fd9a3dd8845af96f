#!/usr/bin/env bash
# Train under PBS Professional or OpenPBS:  ARGS="run.yaml train.steps=2000" qsub launch/pbs.sh
# Before the time limit it saves and goes into the queue again, until the run is done. Flags of qsub go before the file
# and win over the lines below:  ARGS=run.yaml qsub -l select=8:ncpus=4:mpiprocs=4 -l walltime=48:00:00 launch/pbs.sh
# DOCTOR=1 qsub launch/pbs.sh says whether this works there, and trains nothing.
#PBS -N hvdformer
#PBS -l select=2:ncpus=2:mpiprocs=2
#PBS -l place=scatter
#PBS -l walltime=24:00:00
#PBS -V
#PBS -r y
#PBS -j oe
# select: 2 hosts with 2 ranks (mpiprocs) each: one a GPU (add :ngpus=2); on CPUs one a socket, ncpus / mpiprocs threads.
# scatter: each on a host of its own.  V: with the environment of qsub's shell, so that PATH has hvdformer and ARGS is known.
# r: it may run again, also after a host has failed.  j: one file of output.
set -uo pipefail

ARGS=${ARGS:-}                      # of hvdformer train, separated by blanks
SCRIPT=${SCRIPT:-launch/pbs.sh}     # this file, seen from where qsub was called: PBS runs a copy of it
SAVE_SECONDS=${SAVE_SECONDS:-300}   # before the limit: enough for a step and a checkpoint
RSH=${RSH:-ssh}                     # how mpirun reaches the other hosts; pbs_tmrsh where ssh between them is not allowed
NETWORK=${NETWORK:-}                # interface or network that all hosts share: ib0, 10.1.0.0/16; empty: MPI tries all

cd "$PBS_O_WORKDIR" || exit 1       # PBS starts in the home folder
read -ra arguments <<< "$ARGS"
ranks=(hvdformer train "${arguments[@]}" "$@")
[[ -n ${DOCTOR:-} ]] && ranks=(hvdformer doctor)

flags=(
  -np "$(grep -c . "$PBS_NODEFILE")"  # a line a rank
  --hostfile "$PBS_NODEFILE"          # for an Open MPI that was built without PBS, as PyPI's is
  --bind-to none                      # a rank has threads of its own; bound to one core, they queue there
  --mca plm_rsh_agent "$RSH"
  -x PATH                             # so that the other hosts find this environment's python and hvdformer
)
[[ -n $NETWORK ]] && flags+=(--mca btl_tcp_if_include "$NETWORK" --mca oob_tcp_if_include "$NETWORK")
for name in LD_LIBRARY_PATH PYTHONPATH "${!HVDFORMER_@}" "${!HOROVOD_@}" "${!NCCL_@}" "${!OMP_@}"; do
  [[ -n ${!name:-} ]] && flags+=(-x "$name")
done

# mpirun by its whole path: then it looks for its daemon in the same place on the other hosts.
mpirun=$(command -v mpirun) || { echo "there is no mpirun on the PATH: activate the environment" >&2; exit 2; }
"$mpirun" "${flags[@]}" "${ranks[@]}" &
pid=$!

# mpirun passes SIGUSR1 on to the ranks, which finish the step, save and end with 0. `qsig -s USR1 JOB` asks for it too.
asked=0
save() { asked=1; echo "time is nearly up: saving"; kill -USR1 "$pid"; }
trap save USR1

# PBS has no signal ahead of the limit, so the time is watched here. walltime is HH:MM:SS.
limit=0
for part in $(qstat -f "$PBS_JOBID" | sed -n 's/^ *Resource_List.walltime = //p' | tr : ' '); do
  limit=$(( limit * 60 + 10#$part ))
done
(( limit )) || echo "qstat -f tells no walltime: nothing is saved ahead of a limit" >&2
while kill -0 "$pid" 2>/dev/null; do
  (( asked || limit == 0 || SECONDS < limit - SAVE_SECONDS )) || save
  sleep 1
done
wait "$pid"
code=$?

if (( asked && code == 0 )); then
  # A run that was just done starts once more, finds nothing to do, and is not asked to stop.
  if qrerun "$PBS_JOBID"; then
    echo "saved; in the queue again"
    sleep 60  # PBS ends this script
  else
    # Many sites let operators only do this: a new job then, with the resources of this one.
    select=$(qstat -f -w "$PBS_JOBID" | sed -n 's/^ *Resource_List.select = //p')
    next=$(qsub ${select:+-l "select=$select"} -l "walltime=$limit" "$SCRIPT") \
      || { echo "saved, but not in the queue again: give the qsub command once more" >&2; exit 1; }
    echo "saved; in the queue again as $next"
  fi
fi
exit "$code"
