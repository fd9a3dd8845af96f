#!/usr/bin/env bash
# The hosts that are there, NAME:SLOTS a line, for launch/elastic.sh. horovodrun runs it every second: keep it quick.
set -euo pipefail

# One host a line, NAME:SLOTS; what follows # is not read. Edit it while the job runs: the ranks follow within seconds.
HOSTS_FILE=${HOSTS_FILE:-hosts}
PROBE=${PROBE:-}  # a command that fails for a host that is down, such as "ping -c 1 -W 1"; its name is added

[[ -r $HOSTS_FILE ]] || { echo "$0: there is no file $PWD/$HOSTS_FILE; HOSTS_FILE names another" >&2; exit 1; }
read -ra probe <<< "$PROBE"
while read -r host _ || [[ -n $host ]]; do
  host=${host%%#*}
  [[ -n $host ]] || continue
  if (( ${#probe[@]} == 0 )) || "${probe[@]}" "${host%:*}" < /dev/null > /dev/null 2>&1; then
    echo "$host"
  fi
done < "$HOSTS_FILE"
