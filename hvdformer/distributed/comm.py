"""The one door to Horovod: start and end of the job, and the few collectives that are not a fusion.

Every function here that takes a `name` is a collective: all ranks call it, in the same order. Objects travel as
JSON, never as pickles.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch

from hvdformer.distributed import launcher, network, tuning
from hvdformer.errors import RunError, UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process's place in the job, as plain numbers, and the settings chosen for Horovod."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    controller: str  # "MPI" or "Gloo"
    operations: str  # library that moves CPU tensors: "MPI" or "Gloo"
    choices: tuple[tuple[str, str, str], ...] = field(default=(), repr=False)
    is_elastic: bool = False  # ranks may leave and join: elastic.py

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, the one that writes files and speaks to the user."""
        return self.rank == 0


class Agreed(Exception):
    """An error that every rank raises alike: only rank 0 has to tell it, and every rank can leave in order."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class WorldChanged(Exception):
    """Hosts have come or gone: every rank of an elastic job raises it after the same step, and connects anew."""


def connect(*, on_gpu: bool = False) -> World:
    """Start Horovod, tuned for this machine. Every process of the job calls it, before anything else here.

    Called once; of an elastic job again, after `disconnect`, whenever its ranks have changed.

    Raises:
        WorldChanged: of an elastic job, another rank has gone in the meantime.
        UserError: Horovod is missing or built for another torch; or a launcher started several processes that
            Horovod sees as one each; or this host has no way to the others.
    """
    launch = launcher.detect(os.environ)
    if launch is not None and launch.launcher == "torchrun" and launch.size > 1:
        raise UserError(launcher.explain_separate_runs(launch))
    is_elastic = os.environ.get("HOROVOD_ELASTIC") == "1"
    if is_elastic and tuning.CRASHES_WHEN_ELASTIC in os.environ:
        raise UserError(
            f"{tuning.CRASHES_WHEN_ELASTIC} is set, but with it Horovod 0.28.1 crashes when the ranks of an elastic job "
            "change: unset it, and start horovodrun without --cycle-time-ms"
        )
    choices = tuning.apply(os.environ, launch, on_gpu=on_gpu)
    try:
        _check_own_name()
        if not is_elastic:
            network.check(launch, os.environ)
    except UserError:
        if launch is not None and launch.local_rank:
            time.sleep(5)  # the launcher ends this rank when the one of its host that speaks has gone
            abort(UserError.exit_code)
        raise
    try:
        import horovod.torch as hvd
    except ImportError as error:
        raise UserError(
            f"Horovod cannot be loaded ({error}). Build it for this environment with `hvdformer build-horovod`."
        ) from error
    _hosts.have_changed = False
    sockets_before = _open_sockets()
    try:
        with network.waiting_for_ranks(launch, is_elastic=is_elastic):
            hvd.init()
    except (
        Exception
    ) as error:  # Horovod raises whatever its C++ side met; all of it means that the job can't start.
        if is_elastic:
            raise WorldChanged from error  # a rank has gone in the meantime
        raise RunError(
            f"Horovod did not start: {error}. `hvdformer doctor` says what it was built with."
        ) from error
    if is_elastic:
        _horovods_sockets.clear()
        _horovods_sockets.update(_open_sockets().items() - sockets_before.items())
        _hosts.watch()
    elif launch is not None and launch.size > 1 and hvd.size() == 1:
        raise UserError(launcher.explain_separate_runs(launch))
    operations = "MPI" if os.environ.get("HOROVOD_CPU_OPERATIONS", "").lower() == "mpi" else "Gloo"
    if "HOROVOD_CPU_OPERATIONS" not in os.environ:
        operations = "MPI" if hvd.mpi_enabled() else "Gloo"
    world = World(
        rank=hvd.rank(),
        size=hvd.size(),
        local_rank=hvd.local_rank(),
        local_size=hvd.local_size(),
        controller="MPI" if hvd.mpi_enabled() else "Gloo",
        operations=operations,
        choices=choices,
        is_elastic=is_elastic,
    )
    if on_gpu:
        # Before any other CUDA call: otherwise every rank of the node opens a context on GPU 0.
        torch.cuda.set_device(world.local_rank)
    return world


def _check_own_name() -> None:
    """Gloo looks up the address of its host's own name, and ends the process by an abort if there is none.

    Raises:
        UserError: Gloo is going to be used and the name has no address.
    """
    uses = {os.environ.get(name, "").lower() for name in ("HOROVOD_CONTROLLER", "HOROVOD_CPU_OPERATIONS")}
    if "gloo" not in uses:
        return
    try:
        socket.getaddrinfo(host_name(), None)
    except OSError as error:
        raise UserError(
            f"the name of this host, {host_name()}, has no address ({error.strerror}), and Gloo needs it: add a line "
            f"'ADDRESS {host_name()}' to /etc/hosts (127.0.1.1 will do for ranks on this host alone), or start with "
            "mpirun or horovodrun --mpi"
        ) from None


def disconnect() -> None:
    """Leave the job in order. Every rank calls it once, after its last collective."""
    import horovod.torch as hvd

    hvd.shutdown()


def hang_up() -> None:
    """Close Horovod's connections of an elastic job whose collectives have failed: the other ranks notice at once.

    They may be waiting for data from this rank, not from the one that is gone, and Gloo would have them wait for 30 s:
    Horovod's `disconnect`, which is still to be called, leaves the connections open until the next start.
    """
    for descriptor, identity in _horovods_sockets.items():
        try:
            if os.readlink(f"/proc/self/fd/{descriptor}") == identity:
                with socket.socket(fileno=os.dup(descriptor)) as connection:
                    connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            continue  # closed, or one that listens
    _horovods_sockets.clear()


_horovods_sockets: dict[int, str] = {}  # {descriptor: identity}


def _open_sockets() -> dict[int, str]:
    """{descriptor: identity} of this process's sockets; empty where there is no /proc."""
    found = {}
    for entry in Path("/proc/self/fd").glob("*"):
        try:
            target = os.readlink(entry)
        except OSError:
            continue
        if target.startswith("socket:"):
            found[int(entry.name)] = target
    return found


def abort(exit_code: int) -> NoReturn:
    """End this process at once, without waiting for the others: their launcher ends them when it sees this one go."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


class _Hosts:
    """Listens to the driver of an elastic job, which tells rank 0 of hosts that have come or gone."""

    def __init__(self) -> None:
        self.have_changed = False
        self._is_watching = False

    def watch(self) -> None:
        """Begin to listen; once in a process."""
        if not self._is_watching:
            from horovod.common.elastic import notification_manager

            notification_manager.init()
            notification_manager.register_listener(self)
            self._is_watching = True

    def on_hosts_updated(self, timestamp: int, change: int) -> None:
        """Horovod's name for what it calls, on a thread of its own."""
        self.have_changed = True


_hosts = _Hosts()


def hosts_have_changed() -> bool:
    """Whether this rank has been told that hosts have come or gone since it connected."""
    return _hosts.have_changed


def horovod_version() -> str:
    """The version of the Horovod that was loaded."""
    import horovod

    return horovod.__version__


def host_name() -> str:
    """The name of this host, for messages."""
    return socket.gethostname()


def sum_over_ranks(values: Iterable[int], name: str) -> list[int]:
    """Sum a few integers over all ranks: exactly, so in any order. Every rank calls it."""
    return wait(sum_over_ranks_async(values, name)).tolist()


def sum_over_ranks_async(values: Iterable[int], name: str) -> int:
    """Begin `sum_over_ranks`, so that it travels together with other tensors; `wait` gives the sums."""
    import horovod.torch as hvd

    return hvd.allreduce_async_(torch.tensor(list(values), dtype=torch.int64), name=name, op=hvd.Sum)


def wait(handle: int) -> torch.Tensor:
    """The result of a collective that was begun with an `_async` function."""
    with _waiting("the sums of the step"):
        return result(handle)


# Seconds. A pause is at most about half of the wait before it, until it is long enough to cost nothing.
_FIRST_PAUSE, _LONGEST_PAUSE = 50e-6, 1e-3


def result(handle: int) -> Any:
    """What a collective gives that was begun with one of Horovod's `_async` functions; until then this rank sleeps."""
    import horovod.torch as hvd

    sleep_until_done(handle)
    return hvd.synchronize(handle)


def sleep_until_done(handle: int) -> None:
    """Return when the collective is done, well or not, and leave the core to others meanwhile.

    Horovod's synchronize asks without a pause, taking and giving back Python's lock each time (mpi_ops_v2.cc,
    WaitAndClear). Where the cores are few it thereby takes turns with the very threads that move the tensor.
    """
    import horovod.torch as hvd

    pause = _FIRST_PAUSE
    while not hvd.poll(handle):
        time.sleep(pause)
        pause = min(1.5 * pause, _LONGEST_PAUSE)


_waits: list[str] = []


@contextlib.contextmanager
def _waiting(name: str) -> Iterator[None]:
    """Within it this rank waits for others, in the collective of this name."""
    _waits.append(name)
    try:
        yield
    finally:
        _waits.pop()


def waiting_for() -> str | None:
    """The collective in which this rank waits for others; asked from another thread."""
    return next(iter(_waits[-1:]), None)


def broadcast_tensors(named: Iterable[tuple[str, torch.Tensor]], name: str, root: int = 0) -> None:
    """Overwrite each tensor by that of rank `root`, in place. All ranks pass the same names, shapes and dtypes."""
    import horovod.torch as hvd

    handles = [hvd.broadcast_async_(tensor, root, name=f"{name}.{key}") for key, tensor in named]
    with _waiting(name):
        for handle in handles:
            result(handle)


def broadcast_json(value: Any, name: str, root: int = 0) -> Any:
    """The value of rank `root` on every rank; what the others pass is ignored. Anything that JSON can hold."""
    import horovod.torch as hvd

    data = (
        np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)
        if hvd.rank() == root
        else np.empty(0, np.uint8)
    )
    with _waiting(name):
        own_length = torch.tensor([len(data)], dtype=torch.int64)
        length = int(result(hvd.broadcast_async(own_length, root, name=f"{name}.length")))
        buffer = (
            torch.from_numpy(data.copy()) if hvd.rank() == root else torch.empty(length, dtype=torch.uint8)
        )
        return json.loads(result(hvd.broadcast_async(buffer, root, name=f"{name}.bytes")).numpy().tobytes())


def gather_json(value: Any, name: str) -> list[Any]:
    """The values of all ranks, in rank order, on every rank. Anything that JSON can hold."""
    import horovod.torch as hvd

    data = torch.from_numpy(np.frombuffer(json.dumps(value).encode(), dtype=np.uint8).copy())
    with _waiting(name):
        own_length = torch.tensor([len(data)], dtype=torch.int64)
        lengths = result(hvd.allgather_async(own_length, name=f"{name}.lengths")).tolist()
        gathered = result(hvd.allgather_async(data, name=f"{name}.bytes")).numpy().tobytes()
    ends = np.cumsum(lengths).tolist()
    return [json.loads(gathered[end - length : end]) for length, end in zip(lengths, ends, strict=True)]


def on_every_rank(function: Callable[[], T], name: str) -> T:
    """Run `function` on every rank and go on only if it worked on all.

    Every rank calls this; `function` itself makes no collective call. A UserError, RunError or OSError on any
    rank becomes one `Agreed` on all of them, which says which ranks met it where they differ.
    """
    outcome, result = _attempt(function)
    return _settle(outcome, result, gather_json(outcome, name))


def on_rank_0(function: Callable[[], Any], name: str) -> Any:
    """Run `function` on rank 0 and give its result, which must fit into JSON, to every rank.

    A UserError, RunError or OSError becomes an `Agreed` on all ranks, so that none waits for a rank that is gone.
    """
    import horovod.torch as hvd

    outcome, result = _attempt(function) if hvd.rank() == 0 else (None, None)
    outcome, result = broadcast_json([outcome, result], name)
    return _settle(outcome, result, [outcome])


def _attempt(function: Callable[[], T]) -> tuple[dict[str, Any] | None, T | None]:
    """Run; return (None, result), or what went wrong in a form that travels, and None."""
    try:
        return None, function()
    except (UserError, RunError) as error:
        return {"message": str(error), "exit_code": error.exit_code}, None
    except OSError as error:
        return {"message": str(error), "exit_code": RunError.exit_code}, None


def _settle(outcome: dict[str, Any] | None, result: Any, outcomes: list[dict[str, Any] | None]) -> Any:
    failed = [(rank, outcome) for rank, outcome in enumerate(outcomes) if outcome is not None]
    if not failed:
        return result
    by_message: dict[str, list[int]] = {}
    for rank, failure in failed:
        by_message.setdefault(failure["message"], []).append(rank)
    if len(failed) == len(outcomes) and len(by_message) == 1:
        message = next(iter(by_message))
    else:
        message = "\n".join(f"on {ranks(numbers)}: {text}" for text, numbers in by_message.items())
    raise Agreed(message, max(failure["exit_code"] for _, failure in failed))


def ranks(numbers: list[int]) -> str:
    """ "rank 1", or "ranks 1, 2, 5", for messages."""
    shown = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"rank {shown}" if len(numbers) == 1 else f"ranks {shown}"


def rank() -> int:
    """This process's rank in a job that was joined."""
    import horovod.torch as hvd

    return hvd.rank()


def is_first() -> bool:
    """Whether this is rank 0 of a job that was joined."""
    return rank() == 0


def is_lost_contact(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone."""
    return type(error).__name__ == "HorovodInternalError"
