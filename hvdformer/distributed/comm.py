"""The one door to Horovod: start and end of the job, and the few collectives that are not a fusion.

Every function here that takes a `name` is a collective: all ranks call it, in the same order. Objects travel as
JSON, never as pickles.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch

from hvdformer.distributed import launcher, tuning
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

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, the one that writes files and speaks to the user."""
        return self.rank == 0


class Agreed(Exception):
    """An error that every rank raises alike: only rank 0 has to tell it, and every rank can leave in order."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def connect(*, on_gpu: bool = False) -> World:
    """Start Horovod, tuned for this machine. Every process of the job calls it once, before anything else here.

    Raises:
        UserError: Horovod is missing or built for another torch; or a launcher started several processes that
            Horovod sees as one each.
    """
    launch = launcher.detect(os.environ)
    if launch is not None and launch.launcher == "torchrun" and launch.size > 1:
        raise UserError(launcher.explain_separate_runs(launch))
    choices = tuning.apply(os.environ, launch, on_gpu=on_gpu)
    try:
        import horovod.torch as hvd
    except ImportError as error:
        raise UserError(
            f"Horovod cannot be loaded ({error}). Build it for this environment with `hvdformer build-horovod`."
        ) from error
    try:
        hvd.init()
    except (
        Exception
    ) as error:  # Horovod raises whatever its C++ side met; all of it means that the job can't start.
        raise RunError(
            f"Horovod did not start: {error}. `hvdformer doctor` says what it was built with."
        ) from error
    if launch is not None and launch.size > 1 and hvd.size() == 1:
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
    )
    if on_gpu:
        # Before any other CUDA call: otherwise every rank of the node opens a context on GPU 0.
        torch.cuda.set_device(world.local_rank)
    return world


def disconnect() -> None:
    """Leave the job in order. Every rank calls it once, after its last collective."""
    import horovod.torch as hvd

    hvd.shutdown()


def abort(exit_code: int) -> NoReturn:
    """End this process at once, without waiting for the others: their launcher ends them when it sees this one go."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def host_name() -> str:
    """The name of this host, for messages."""
    return socket.gethostname()


def sum_over_ranks(values: Iterable[float], name: str) -> list[float]:
    """Sum a few float64 numbers over all ranks: sums and counts, never means."""
    return wait(sum_over_ranks_async(values, name)).tolist()


def sum_over_ranks_async(values: Iterable[float], name: str) -> int:
    """Begin `sum_over_ranks`, so that it travels together with other tensors; `wait` gives the sums."""
    import horovod.torch as hvd

    return hvd.allreduce_async_(torch.tensor(list(values), dtype=torch.float64), name=name, op=hvd.Sum)


def wait(handle: int) -> torch.Tensor:
    """The result of a collective that was begun with an `_async` function."""
    import horovod.torch as hvd

    return hvd.synchronize(handle)


def broadcast_tensors(named: Iterable[tuple[str, torch.Tensor]], name: str) -> None:
    """Overwrite each tensor by rank 0's, in place. All ranks pass the same names, shapes and dtypes."""
    import horovod.torch as hvd

    handles = [hvd.broadcast_async_(tensor, 0, name=f"{name}.{key}") for key, tensor in named]
    for handle in handles:
        hvd.synchronize(handle)


def broadcast_json(value: Any, name: str) -> Any:
    """Rank 0's value on every rank; what the others pass is ignored. Anything that JSON can hold."""
    import horovod.torch as hvd

    data = (
        np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)
        if hvd.rank() == 0
        else np.empty(0, np.uint8)
    )
    length = hvd.broadcast(torch.tensor([len(data)], dtype=torch.int64), 0, name=f"{name}.length")
    buffer = torch.from_numpy(data.copy()) if hvd.rank() == 0 else torch.empty(int(length), dtype=torch.uint8)
    return json.loads(hvd.broadcast(buffer, 0, name=f"{name}.bytes").numpy().tobytes())


def gather_json(value: Any, name: str) -> list[Any]:
    """The values of all ranks, in rank order, on every rank. Anything that JSON can hold."""
    import horovod.torch as hvd

    data = torch.from_numpy(np.frombuffer(json.dumps(value).encode(), dtype=np.uint8).copy())
    lengths = hvd.allgather(torch.tensor([len(data)], dtype=torch.int64), name=f"{name}.lengths").tolist()
    gathered = hvd.allgather(data, name=f"{name}.bytes").numpy().tobytes()
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
        message = "\n".join(f"on {_ranks(ranks)}: {text}" for text, ranks in by_message.items())
    raise Agreed(message, max(failure["exit_code"] for _, failure in failed))


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def is_first() -> bool:
    """Whether this is rank 0 of a job that was joined."""
    import horovod.torch as hvd

    return hvd.rank() == 0


def is_lost_contact(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone."""
    return type(error).__name__ == "HorovodInternalError"
