"""Horovod's allreduce between the ranks of one host, in memory that they share (hvdformer/shared_memory_operations.h)."""

import time

import pytest
import torch

from hvdformer.distributed import comm

SLOT = 2**20  # bytes that are summed at a time
DTYPES = [torch.float32, torch.float64, torch.int32, torch.int64]


def numbers_of(rank, count, dtype):
    generator = torch.Generator().manual_seed(1000 * rank + count)
    return (1000 * torch.randn(count, generator=generator, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_taken_in_the_order_of_the_ranks(world, dtype):
    import horovod.torch as hvd

    slot = SLOT // dtype.itemsize
    for count in (1, 5, world.size * 16 + 3, slot - 1, slot, slot + 1, 2 * slot + 17):
        expected = numbers_of(0, count, dtype)
        for rank in range(1, world.size):
            expected += numbers_of(rank, count, dtype)
        mine = numbers_of(world.rank, count, dtype)
        apart = hvd.allreduce(mine, op=hvd.Sum, name=f"apart {dtype} {count}")
        assert torch.equal(mine, numbers_of(world.rank, count, dtype))
        in_place = hvd.allreduce_(mine, op=hvd.Sum, name=f"in place {dtype} {count}")
        assert torch.equal(apart, expected) and torch.equal(in_place, expected)


def test_averages_and_scaled_sums(world):
    import horovod.torch as hvd

    mine = torch.full((5,), float(world.rank))
    mean = hvd.allreduce(mine, op=hvd.Average, name="mean")
    assert mean.tolist() == pytest.approx([(world.size - 1) / 2] * 5)
    scaled = hvd.allreduce(mine + 1, op=hvd.Sum, prescale_factor=0.5, postscale_factor=4.0, name="scaled")
    assert scaled.tolist() == [world.size * (world.size + 1.0)] * 5


def test_tensors_that_horovod_puts_together(world):
    import horovod.torch as hvd

    group = [torch.full((count,), float(world.rank + 1)) for count in (1, 70_001, 300_000)]
    for tensor in hvd.grouped_allreduce(group, op=hvd.Sum, name="group"):
        assert (tensor == sum(range(1, world.size + 1))).all()


def test_a_wait_of_others_does_not_tear_a_sum(world):
    """Many sums behind one another, and ranks that come late in turn: no slot is overwritten before it is read."""
    import horovod.torch as hvd

    for turn in range(12):
        if turn % world.size == world.rank:
            time.sleep(0.01)
        tensors = [torch.full((SLOT // 4 + 5,), float(turn + number)) for number in range(4)]
        handles = [
            hvd.allreduce_async_(tensor, op=hvd.Sum, name=f"{turn} {number}")
            for number, tensor in enumerate(tensors)
        ]
        for number, handle in enumerate(handles):
            comm.result(handle)
            assert (tensors[number] == world.size * (turn + number)).all()
