"""Several hosts on this machine: network namespaces on a virtual switch, for benchmarks and tests.

Each host is hvdformer1, hvdformer2, ... with its own name, hosts file, shared memory, address (10.99.0.1, ...) and sshd, and
one end of a virtual cable to the switch, which `tc tbf` can slow down and `cut` can take away. Files, cores and memory are
the machine's own. It needs Linux and root; `missing` says what is not here.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
PREFIX = "hvdformer"  # of the namespaces; 0 is the switch, and the hosts follow
SWITCH = f"{PREFIX}0"
NEEDED = {
    "ip": "iproute2",
    "tc": "iproute2",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "sshd": "openssh-server",
}


def missing() -> list[str]:
    """What it takes and is not here."""
    found = [f"{program} (package {package})" for program, package in NEEDED.items() if not where(program)]
    if platform.system() != "Linux" or os.geteuid() != 0:
        found.insert(0, "Linux, as root: namespaces are made")
    return found


def where(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def sh(*command: str) -> str:
    done = subprocess.run(
        [where(command[0]) or command[0], *command[1:]], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


class Hosts:
    """The hosts, and how to start something on one of them."""

    def __init__(self, folder: Path, num: int) -> None:
        self.folder = folder
        self.names = [f"{PREFIX}{number}" for number in range(1, num + 1)]
        self.addresses = {name: f"10.99.0.{number}" for number, name in enumerate(self.names, 1)}
        self.daemons: list[subprocess.Popen[bytes]] = []  # an sshd each

    def start(
        self, name: str, *command: str, log: Path, cwd: Path = ROOT, **environment: str
    ) -> subprocess.Popen[bytes]:
        """Start a command on a host: in its namespaces, with its name, hosts file, ssh settings and shared memory."""
        script = (
            f"hostname {name} && mount --make-rprivate / && mount -t tmpfs tmpfs /dev/shm && "
            f'mount --bind {self.folder}/hosts /etc/hosts && mount --bind {self.folder}/ssh /root/.ssh && exec "$@"'
        )
        unshared = ["unshare", "--uts", "--mount", "--ipc", "sh", "-c", script, "sh", *command]
        with log.open("ab") as output:
            return subprocess.Popen(
                ["nsenter", f"--net=/run/netns/{name}", *unshared],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={
                    **os.environ,
                    "PATH": f"{BIN}:{os.environ['PATH']}:/usr/sbin",
                    "HOME": "/root",
                    **environment,
                },
                cwd=cwd,
                start_new_session=True,
            )

    def cut(self, name: str, *, up: bool = False) -> None:
        """Take a host's cable out of the switch, or put it back."""
        sh("ip", "-n", SWITCH, "link", "set", name, "up" if up else "down")

    def change(self, name: str, *command: str) -> None:
        """Run a command in what sessions on a host see, such as a mount; `$PID` is their sshd's, whose affinity they inherit."""
        pid = str(self.daemons[self.names.index(name)].pid)
        sh("nsenter", "--target", pid, "--mount", *(word.replace("$PID", pid) for word in command))

    def end_sessions(self) -> None:
        """Kill what was started on the hosts over ssh."""
        for daemon in self.daemons:
            kill(children(daemon))

    def sent(self) -> int:
        """tx_bytes of the host that has sent most."""
        links = [
            json.loads(sh("ip", "-n", name, "-s", "-j", "link", "show", "eth0"))[0] for name in self.names
        ]
        return max(link["stats64"]["tx"]["bytes"] for link in links)


@contextmanager
def network(folder: Path, num: int = 2, rate: str | None = None) -> Iterator[Hosts]:
    """So many hosts; rate, as tc writes it, is that of each one's sending. What an earlier call left behind goes first."""
    lock = os.open(f"/run/{PREFIX}-network.lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)  # another call that is under way has the same names
    take_down()
    hosts = Hosts(folder, num)
    (folder / "ssh").mkdir(mode=0o700)
    lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in hosts.addresses.items())]
    (folder / "hosts").write_text("\n".join(lines) + "\n")
    key = folder / "ssh" / "id_ed25519"
    sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
    (folder / "ssh" / "authorized_keys").write_text(key.with_suffix(".pub").read_text())
    (folder / "ssh" / "config").write_text("StrictHostKeyChecking no\nLogLevel ERROR\n")
    Path("/root/.ssh").mkdir(mode=0o700, exist_ok=True)  # to be mounted over
    Path("/run/sshd").mkdir(exist_ok=True)
    try:
        sh("ip", "netns", "add", SWITCH)
        sh("ip", "-n", SWITCH, "link", "add", "switch", "type", "bridge")
        sh("ip", "-n", SWITCH, "link", "set", "switch", "up")
        for name, address in hosts.addresses.items():
            sh("ip", "netns", "add", name)
            ends = ("eth0", "netns", name, "type", "veth", "peer", "name", name, "netns", SWITCH)
            sh("ip", "link", "add", *ends)
            sh("ip", "-n", SWITCH, "link", "set", name, "master", "switch", "up")
            sh("ip", "-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            sh("ip", "-n", name, "link", "set", "lo", "up")
            sh("ip", "-n", name, "link", "set", "eth0", "up")
            if rate is not None:
                # What the kernel may send between two ticks of its timer: too little of it, and 1 Gbit/s is not reached.
                burst = "256kb" if "gbit" in rate else "32kb"
                shape = ("root", "tbf", "rate", rate, "burst", burst, "latency", "50ms")
                sh("tc", "-n", name, "qdisc", "add", "dev", "eth0", *shape)
        options = ["StrictModes=no", "UsePAM=no", "PidFile=none", "PermitRootLogin=prohibit-password"]
        options += [f"HostKey={key}", "AuthorizedKeysFile=/root/.ssh/authorized_keys", "MaxStartups=100"]
        command = [where("sshd") or "sshd", "-D", "-e", "-f", "/dev/null"]
        command += [word for option in options for word in ("-o", option)]
        for name in hosts.names:
            hosts.daemons.append(hosts.start(name, *command, log=folder / f"sshd-{name}.log"))
        yield hosts
    finally:
        for daemon in hosts.daemons:
            end(daemon)
        take_down()
        os.close(lock)


def is_up() -> bool:
    """Whether hosts are there."""
    return bool(_present())


def take_down() -> None:
    """Remove the namespaces, and with them the cables and all processes on the hosts."""
    for name in _present():
        pids = map(int, sh("ip", "netns", "pids", name).split())
        kill([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)])
        sh("ip", "netns", "del", name)


def _present() -> set[str]:
    names = {line.split()[0] for line in sh("ip", "netns", "list").splitlines() if line}
    return {name for name in names if name.removeprefix(PREFIX).isdecimal()}


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process with all that it started."""
    kill([*children(process), psutil.Process(process.pid)] if process.poll() is None else [])
    process.wait()


def children(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            pass
