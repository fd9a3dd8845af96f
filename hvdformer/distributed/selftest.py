"""A test of every collective and dtype that the package uses, against results known in advance."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hvdformer.distributed.comm import World


def run_selftest(world: World, device: torch.device) -> dict[str, str]:
    """{test: "ok" or what came instead} of this rank. Every rank calls it; all make the same calls in the same order.

    A test that raises on one rank raises on all, since Horovod hands a failed collective to every rank.
    """
    import horovod.torch as hvd

    rank, size = world.rank, world.size
    ranks = torch.arange(size)
    results = {}

    def same(found: torch.Tensor, expected: torch.Tensor) -> str:
        return "ok" if torch.equal(found.cpu(), expected) else f"found {found.tolist()}, expected {expected.tolist()}"

    def test(name: str, attempt: Callable[[str], str]) -> None:
        try:
            results[name] = attempt(f"selftest {name}")
        except Exception as error:  # the report is what this is for: whatever is wrong here is named in it
            results[name] = f"{type(error).__name__}: {error}"

    for dtype in (torch.float32, torch.float16, torch.float64, torch.int64):
        mine = torch.full((5,), rank + 1, dtype=dtype, device=device)
        total = torch.full((5,), int((ranks + 1).sum()), dtype=dtype)
        test(f"allreduce sum {dtype}", lambda name, mine=mine, total=total: same(hvd.allreduce(mine, op=hvd.Sum, name=name), total))
    for dtype in (torch.float32, torch.uint8, torch.int64):
        mine = torch.full((3,), rank, dtype=dtype, device=device)
        test(
            f"broadcast {dtype}",
            lambda name, mine=mine, dtype=dtype: same(hvd.broadcast(mine, size - 1, name=name), torch.full((3,), size - 1, dtype=dtype)),
        )
        uneven = torch.full((rank + 1,), rank, dtype=dtype, device=device)
        gathered = torch.repeat_interleave(ranks, ranks + 1).to(dtype)
        test(f"allgather {dtype}", lambda name, uneven=uneven, gathered=gathered: same(hvd.allgather(uneven, name=name), gathered))
    grouped = [torch.full((2,), float(rank), device=device), torch.full((3,), float(rank), device=device)]
    test(
        "grouped allreduce",
        lambda name: same(
            torch.cat(hvd.grouped_allreduce(grouped, op=hvd.Sum, name=name)), torch.full((5,), float(ranks.sum()))
        ),
    )
    return results
