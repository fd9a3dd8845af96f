"""A docker engine of the tests' own, and a base image that is made here: nothing is pulled, nothing is left behind.

The engine has its own folder, socket and bridge and makes no firewall rules, so that another one on this machine is not
touched: containers reach each other and no more. The base image is Debian by debootstrap, with this machine's pip settings in it: the Dockerfile knows of neither.
"""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = {"dockerd": "docker.io", "iptables": "iptables", "ip": "iproute2", "debootstrap": "debootstrap"}
BRIDGE, ADDRESS = "hvdformer-image", "10.98.0.1/24"
RELEASE = "bookworm"
BASE = f"hvdformer-test-base:{RELEASE}"
# Debian's: a docker of another origin on the PATH may be too old or too new for this engine.
DOCKER = "/usr/bin/docker"


def missing() -> list[str]:
    """What it takes and is not here, after an attempt to install it."""
    if platform.system() != "Linux" or os.geteuid() != 0:
        return ["Linux, as root: an engine is started"]
    wanted = sorted({package for program, package in PACKAGES.items() if not _where(program)})
    if not wanted:
        return []
    if not _where("apt-get"):
        return [*wanted, "apt-get, to install them"]
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", *wanted]):
        done = subprocess.run(
            ["apt-get", "-q", *command], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            return [f"{' '.join(wanted)}: apt-get {command[0]} failed: {done.stderr.strip()}"]
    return [f"{program} (package {package})" for program, package in PACKAGES.items() if not _where(program)]


class Engine:
    """A running dockerd, and how to give commands to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "docker.sock"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("DOCKER_")},
            "DOCKER_HOST": f"unix://{self.socket}",
            "DOCKER_BUILDKIT": "1",
            "BUILDKIT_PROGRESS": "plain",
            "DOCKER_CONFIG": str(folder / "config"),
        }

    def run(
        self, *arguments: str, timeout: float = 300, **options: object
    ) -> subprocess.CompletedProcess[str]:
        """docker ARGUMENTS to its end, whatever the end is; stdout and stderr are one text."""
        return subprocess.run(
            [DOCKER, *arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
            **options,  # type: ignore[call-overload]
        )

    def succeed(self, *arguments: str, timeout: float = 300) -> str:
        done = self.run(*arguments, timeout=timeout)
        assert done.returncode == 0, (
            f"docker {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout[-20000:]}"
        )
        return done.stdout

    def build(self, tag: str, target: str | None = None, **arguments: str) -> str:
        """Build the Dockerfile as it stands; the log. The network is the host's: that of the engine leads nowhere."""
        words = [word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")]
        words += ["--target", target] if target else []
        return self.succeed(
            "build",
            "--network",
            "host",
            "-t",
            tag,
            *words,
            "--build-arg",
            f"BASE={BASE}",
            str(ROOT),
            timeout=5000,
        )

    def make_base(self) -> None:
        """The base image, unless this engine has it already."""
        if self.succeed("images", "-q", BASE).strip():
            return
        system = self.folder / "base"
        shutil.rmtree(system, ignore_errors=True)
        log = self.folder / "debootstrap.log"
        with log.open("w") as output:
            done = subprocess.run(
                ["debootstrap", "--variant=minbase", RELEASE, str(system)],
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            )
        assert done.returncode == 0, log.read_text()[-5000:]
        for folder in ("var/cache/apt/archives", "var/lib/apt/lists"):
            shutil.rmtree(system / folder)
            (system / folder / "partial").mkdir(parents=True)
        pip = pip_settings()
        if certificates := pip.pop("cert", None):
            # Not where ca-certificates would write its own.
            (system / "etc/ssl").mkdir(exist_ok=True)
            shutil.copyfile(certificates, system / "etc/ssl/local.pem")
            pip["cert"] = "/etc/ssl/local.pem"
        if constraint := pip.pop("constraint", None):
            shutil.copyfile(constraint, system / "etc/pip-constraints.txt")
            pip["constraint"] = "/etc/pip-constraints.txt"
        for name, value in pip.items():
            if name in _PLACES:
                pip[name] = " ".join(map(INDEXES.address, value.split()))
        lines = ["[global]", *(f"{name} = {value}" for name, value in pip.items())]
        (system / "etc/pip.conf").write_text("\n".join(lines) + "\n")
        archive = subprocess.Popen(["tar", "-C", str(system), "-c", "."], stdout=subprocess.PIPE)
        subprocess.run(
            [DOCKER, "import", "-", BASE],
            env=self.environment,
            stdin=archive.stdout,
            stdout=subprocess.DEVNULL,
            check=True,
        )
        assert archive.wait() == 0
        shutil.rmtree(system)


@contextmanager
def engine(folder: Path) -> Iterator[Engine]:
    """Start dockerd in this folder; when it ends, so do its containers, networks and mounts."""
    lock = os.open(f"/run/{BRIDGE}.lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)  # another call that is under way has the same bridge and port
    folder.mkdir(parents=True, exist_ok=True)
    here = Engine(folder)
    (folder / "pid").unlink(missing_ok=True)
    settings = {
        "data-root": folder / "root",
        "exec-root": folder / "exec",
        "pidfile": folder / "pid",
        "host": f"unix://{here.socket}",
        "bridge": BRIDGE,
        "iptables": "false",
        "ip6tables": "false",
        "ip-forward": "false",
    }
    command = [_where("dockerd") or "dockerd", *(f"--{name}={value}" for name, value in settings.items())]
    if Path(f"/sys/class/net/{BRIDGE}").exists():  # of a call that was killed
        _ip("link", "del", BRIDGE)
    _ip("link", "add", BRIDGE, "type", "bridge")
    _ip("address", "add", ADDRESS, "dev", BRIDGE)
    _ip("link", "set", BRIDGE, "up")
    with (folder / "dockerd.log").open("a") as log:
        daemon = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    INDEXES.start()
    try:
        until = time.monotonic() + 60
        while here.run("version").returncode:
            said = (folder / "dockerd.log").read_text()[-3000:]
            assert daemon.poll() is None and time.monotonic() < until, said
            time.sleep(0.2)
        try:
            yield here
        finally:
            for container in here.run("ps", "-aq").stdout.split():
                here.run("rm", "-f", container)
            for network in here.run("network", "ls", "-q", "--filter", "type=custom").stdout.split():
                here.run("network", "rm", network)
    finally:
        daemon.terminate()
        try:
            daemon.wait(60)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
        _ip("link", "del", BRIDGE)
        INDEXES.stop()
        os.close(lock)


# ---- pip's settings

# Of pip's settings, those that say where packages are and how to get at them.
_PLACES = ("index-url", "extra-index-url", "find-links")
_KEPT = (*_PLACES, "cert", "constraint", "default-timeout", "timeout", "trusted-host")


def pip_settings() -> dict[str, str]:
    """This machine's: what pip finds in its files and in the environment."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    found: dict[str, str] = {}
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        name = name.rpartition(".")[2]
        if name in _KEPT:
            found[name] = value.strip().strip("'\"").replace("\\n", " ").strip()
    return found


class Indexes:
    """Folders of packages on this machine, for builds, which see no file of it: over HTTP, on the loopback interface.

    The port stays the same, for it is written into the base image.
    """

    PORT = 18763

    def __init__(self) -> None:
        self.server: ThreadingHTTPServer | None = None

    def start(self) -> None:
        places = [
            place for name, value in pip_settings().items() if name in _PLACES for place in value.split()
        ]
        folders = [_folder(place) for place in places]
        # A page of an index points to files beside the index.
        open_to_all = [folder.parent if folder.name == "simple" else folder for folder in folders if folder]
        if open_to_all:
            handler = partial(_Folders, open_to_all)
            self.server = ThreadingHTTPServer(("127.0.0.1", self.PORT), handler)
            threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        if self.server:
            self.server.shutdown()
            self.server.server_close()

    def address(self, place: str) -> str:
        """Of a place that pip looks into, as a build sees it."""
        folder = _folder(place)
        return f"http://127.0.0.1:{self.PORT}{folder}/" if folder else place


INDEXES = Indexes()


class _Folders(SimpleHTTPRequestHandler):
    def __init__(self, folders: list[Path], *arguments: object) -> None:
        self.folders = folders
        super().__init__(*arguments, directory="/")  # type: ignore[arg-type]

    def translate_path(self, path: str) -> str:
        found = super().translate_path(path)
        return (
            found if any(Path(found).is_relative_to(folder) for folder in self.folders) else os.devnull + "/"
        )

    def log_message(self, *_: object) -> None:
        pass


def _folder(place: str) -> Path | None:
    """The folder that a setting of pip names, if it is one of this machine."""
    path = unquote(urlsplit(place).path) if place.startswith("file:") else place
    return Path(path) if path.startswith("/") and Path(path).is_dir() else None


def _ip(*arguments: str) -> None:
    subprocess.run([_where("ip") or "ip", *arguments], check=True)


def _where(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
