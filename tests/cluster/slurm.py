"""A Slurm cluster on the hosts of benchmarks/hosts.py: real munged, slurmctld and one slurmd a host."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.hosts import Hosts, end, where
from tests import jobs

NEEDED = {
    "munged": "munge",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
}


def missing() -> list[str]:
    found = [f"{program} (package {package})" for program, package in NEEDED.items() if not where(program)]
    if not list(Path("/usr/lib").glob("*/pmix2/lib/libpmix.so")):
        # What Debian's srun --mpi=pmix loads is a name that only the package for developers has.
        found.append("libpmix.so (package libpmix-dev)")
    return found


class Slurm:
    """How to give commands to it, on the first host."""

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self.hosts, self.folder = hosts, folder
        self.environment = {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "OMP_NUM_THREADS": "1",
            "OMPI_MCA_mpi_yield_when_idle": "1",  # both hosts share the cores
            # More than one interface would do no harm here, but ranks must not try the loopback one.
            "OMPI_MCA_btl_tcp_if_include": "eth0",
        }

    def run(self, *command: str, cwd: Path) -> str:
        """A command of Slurm to its end; what it printed."""
        log = self.folder / f"command-{time.monotonic_ns()}.txt"
        started = self.hosts.start(
            self.hosts.names[0],
            *command,
            log=log,
            cwd=cwd,
            PYTHONPATH=str(jobs.ROOT),
            **self.environment,
        )
        assert started.wait(60) == 0, f"{command}: {log.read_text()}"
        return log.read_text()

    def submit(self, *arguments: str, cwd: Path, **environment: str) -> str:
        """sbatch; the number of the job."""
        exported = (
            [f"--export=ALL,{','.join(f'{k}={v}' for k, v in environment.items())}"] if environment else []
        )
        return self.run("sbatch", "--parsable", *exported, *arguments, cwd=cwd).strip()

    def state(self, job: str, cwd: Path) -> dict[str, str]:
        words = self.run("scontrol", "show", "job", job, cwd=cwd).split()
        return dict(word.split("=", 1) for word in words if "=" in word)


@contextmanager
def slurm(hosts: Hosts, folder: Path) -> Iterator[Slurm]:
    """Start it on the hosts, two cores each, and stop it."""
    key, socket = folder / "munge.key", folder / "munge.socket"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    nodes = "\n".join(
        f"NodeName={name} NodeAddr={address} CPUs=2 RealMemory=1000 State=UNKNOWN"
        for name, address in hosts.addresses.items()
    )
    for name in ("state", "spool"):
        (folder / name).mkdir()
    # cred_expire: a job that is put back waits until its old credential is invalid, 120 s otherwise.
    (folder / "slurm.conf").write_text(
        f"""ClusterName=test
SlurmctldHost={hosts.names[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={socket},cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerParameters=sched_interval=2,sched_min_interval=0
KillWait=5
TmpFS=/dev/shm
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
{nodes}
PartitionName=all Nodes={",".join(hosts.names)} Default=YES MaxTime=INFINITE State=UP
"""
    )
    cluster = Slurm(hosts, folder)
    daemons: list[subprocess.Popen[bytes]] = []

    def daemon(name: str, program: str, *arguments: str) -> None:
        log = folder / f"{program}-{name}.log"
        command = [where(program) or program, *arguments]
        daemons.append(hosts.start(name, *command, log=log, PYTHONPATH=str(jobs.ROOT), **cluster.environment))

    first = hosts.names[0]
    try:
        munge = ["--foreground", "--force", f"--key-file={key}", f"--socket={socket}"]
        munge += [f"--{what}-file={folder}/munge.{what}" for what in ("log", "pid", "seed")]
        daemon(first, "munged", *munge)
        while not socket.exists():
            assert daemons[0].poll() is None, (folder / f"munged-{first}.log").read_text()
            time.sleep(0.05)
        daemon(first, "slurmctld", "-D")
        for name in hosts.names:
            daemon(name, "slurmd", "-D", "-N", name)
        began = time.monotonic()
        while cluster.run("sinfo", "-h", "-o", "%T %D", cwd=folder).strip() != f"idle {len(hosts.names)}":
            assert time.monotonic() - began < 60, "".join(
                log.read_text()[-2000:] for log in folder.glob("*.log")
            )
            time.sleep(0.5)
        yield cluster
    finally:
        for process in reversed(daemons):
            end(process)
