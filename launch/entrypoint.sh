#!/usr/bin/env bash
# Of the image: launchers and shells are run as they stand, everything else is a command of hvdformer.
set -euo pipefail

# Under docker run --user there may be no home folder to keep caches in: they go with the container then.
[[ -w ${HOME:-/} ]] || export HOME=/tmp

case ${1:-} in
  horovodrun | mpirun | mpiexec | bash | sh | python | python3 | nvidia-smi) exec "$@" ;;
  sshd)  # for several hosts, in the ssh variant of the image: docs/docker.md
    mkdir -p ~/.sshd
    [[ -e ~/.sshd/host_key ]] || ssh-keygen -q -t ed25519 -N '' -f ~/.sshd/host_key  # never part of the image
    exec /usr/sbin/sshd -D -e -f /etc/ssh/hvdformer_sshd_config "${@:2}"
    ;;
  *) exec hvdformer "$@" ;;
esac
