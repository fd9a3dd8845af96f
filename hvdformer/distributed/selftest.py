"""A test of every collective and dtype that the package uses, against results known in advance."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from hvdformer.distributed.comm import World


def run_selftest(world: World, device: torch.device) -> dict[str, str]:
    """{test: "ok" or what came instead} of this rank. Every rank calls it; all make the same calls in the same order.

    A test that raises on one rank raises on all, since Horovod hands a failed collective to every rank.
    """
    rank, size = world.rank, world.size
    ranks = torch.arange(size)
    results: dict[str, str] = {}

    def same(found: torch.Tensor, expected: torch.Tensor) -> str:
        return (
            "ok"
            if torch.equal(found.cpu(), expected)
            else f"found {found.tolist()}, expected {expected.tolist()}"
        )

    def test(name: str, attempt: Callable[[str], torch.Tensor], expected: torch.Tensor) -> None:
        try:
            results[name] = same(attempt(f"selftest {name}"), expected)
        except Exception as error:  # the report is what this is for: whatever is wrong here is named in it
            results[name] = f"{type(error).__name__}: {error}"

    for dtype in (torch.float32, torch.float16, torch.float64, torch.int64):
        mine = torch.full((5,), rank + 1, dtype=dtype, device=device)
        total = torch.full((5,), int((ranks + 1).sum()), dtype=dtype)
        test(f"allreduce sum {dtype}", partial(_allreduce, mine), total)
    for dtype in (torch.float32, torch.uint8, torch.int64):
        mine = torch.full((3,), rank, dtype=dtype, device=device)
        test(
            f"broadcast {dtype}", partial(_broadcast, mine, size - 1), torch.full((3,), size - 1, dtype=dtype)
        )
        uneven = torch.full((rank + 1,), rank, dtype=dtype, device=device)
        test(
            f"allgather {dtype}",
            partial(_allgather, uneven),
            torch.repeat_interleave(ranks, ranks + 1).to(dtype),
        )
    pair = [torch.full((2,), float(rank), device=device), torch.full((3,), float(rank), device=device)]
    test("grouped allreduce", partial(_grouped_allreduce, pair), torch.full((5,), float(ranks.sum())))
    return results


def _allreduce(tensor: torch.Tensor, name: str) -> torch.Tensor:
    import horovod.torch as hvd

    return hvd.allreduce(tensor, op=hvd.Sum, name=name)


def _broadcast(tensor: torch.Tensor, root: int, name: str) -> torch.Tensor:
    import horovod.torch as hvd

    return hvd.broadcast(tensor, root, name=name)


def _allgather(tensor: torch.Tensor, name: str) -> torch.Tensor:
    import horovod.torch as hvd

    return hvd.allgather(tensor, name=name)


def _grouped_allreduce(tensors: list[torch.Tensor], name: str) -> torch.Tensor:
    import horovod.torch as hvd

    return torch.cat(hvd.grouped_allreduce(tensors, op=hvd.Sum, name=name))
