#!/usr/bin/env bash
# Train while ranks and hosts come and go:  launch/elastic.sh [CONFIG.yaml] [key=value ...]
# DOCTOR=1 launch/elastic.sh says whether this works here, and trains nothing.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

NP=${NP:-2}                # ranks to start with
MIN_NP=${MIN_NP:-1}        # with fewer, horovodrun waits for hosts (--elastic-timeout, 600 s) and then ends the job
MAX_NP=${MAX_NP:-$NP}      # never more; at most train.global_batch / train.micro_batch
DISCOVER=${DISCOVER:-$here/discover_hosts.sh}  # prints the hosts that are there; asked every second
NETWORK=${NETWORK:-}       # interface that all hosts share: eth0; for ranks on this machine alone: lo
COOLDOWN=${COOLDOWN:-10 60}  # seconds until a host whose rank failed may come back: first time, and at most

ranks=(hvdformer train "$@")
[[ -n ${DOCTOR:-} ]] && ranks=(hvdformer doctor)

read -ra cooldown <<< "$COOLDOWN"
flags=(
  --gloo             # the only controller of Horovod that is elastic
  -np "$NP" --min-np "$MIN_NP" --max-np "$MAX_NP"
  --host-discovery-script "$DISCOVER"
  --blacklist-cooldown-range "${cooldown[@]}"  # or a host that failed once never gets a rank again
)
[[ -n $NETWORK ]] && flags+=(--network-interfaces "$NETWORK")

# No --cycle-time-ms: with it Horovod 0.28.1 crashes when the ranks change.
exec horovodrun "${flags[@]}" "${ranks[@]}"
