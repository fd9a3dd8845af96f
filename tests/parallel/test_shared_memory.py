"""Horovod's collectives between the ranks of one host, in memory that they share (hvdformer/shared_memory_operations.h)."""

import math
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_least_and_the_largest(world, dtype):
    import horovod.torch as hvd

    count = SLOT // dtype.itemsize + 3
    everyones = torch.stack([numbers_of(rank, count, dtype) for rank in range(world.size)])
    for op, expected in ((hvd.Min, everyones.amin(0)), (hvd.Max, everyones.amax(0))):
        assert torch.equal(hvd.allreduce(everyones[world.rank], op=op, name=f"{dtype} {op}"), expected)


def test_what_is_not_a_number_stays_so(world):
    import horovod.torch as hvd

    for culprit in range(world.size):
        mine = torch.tensor([math.nan if world.rank == culprit else 1.0], dtype=torch.float64)
        for op in (hvd.Sum, hvd.Min, hvd.Max):
            assert hvd.allreduce(mine, op=op, name=f"not a number {culprit} {op}").isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_rank_gets_its_part_of_the_sums(world, dtype):
    """As Horovod has it: the rows, and the first ranks have one more where they cannot be shared equally."""
    import horovod.torch as hvd

    slot = SLOT // dtype.itemsize
    for rows, width in ((world.size, 1), (2 * world.size + 1, 3), (slot + 1, 1), (2 * slot + 17, 2)):
        expected = numbers_of(0, rows * width, dtype)
        for rank in range(1, world.size):
            expected += numbers_of(rank, rows * width, dtype)
        mine = numbers_of(world.rank, rows * width, dtype).view(rows, width)
        part = hvd.reducescatter(mine, op=hvd.Sum, name=f"part {dtype} {rows}")
        assert torch.equal(part, expected.view(rows, width).tensor_split(world.size)[world.rank])
        assert torch.equal(mine.flatten(), numbers_of(world.rank, rows * width, dtype))


def test_parts_of_several_tensors_and_of_means(world):
    import horovod.torch as hvd

    tensors = [torch.full((count,), float(world.rank)) for count in (world.size, 300_001)]
    for tensor, part in zip(
        tensors, hvd.grouped_reducescatter(tensors, op=hvd.Average, name="parts"), strict=True
    ):
        assert part.shape == tensor.tensor_split(world.size)[world.rank].shape
        assert part.tolist() == pytest.approx([(world.size - 1) / 2] * len(part))
    ones = torch.ones(world.size, 5)
    scaled = hvd.reducescatter(ones, op=hvd.Sum, postscale_factor=4.0, name="scaled parts")
    assert scaled.tolist() == [[4.0 * world.size] * 5]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, *DTYPES], ids=str)
def test_what_all_ranks_have_in_the_order_of_the_ranks(world, dtype):
    import horovod.torch as hvd

    slot = SLOT // dtype.itemsize
    for base, step, width in ((1, 0, 1), (0, 1, 3), (slot, 0, 1), (5, slot, 2)):
        parts = [
            numbers_of(rank, (base + rank * step) * width, torch.float64).to(dtype).view(-1, width)
            for rank in range(world.size)
        ]
        gathered = hvd.allgather(parts[world.rank], name=f"gather {dtype} {base} {step}")
        assert torch.equal(gathered, torch.cat(parts))
    assert hvd.allgather(torch.empty(0, 4), name=f"nothing {dtype}").shape == (0, 4)


def test_several_tensors_are_gathered_together(world):
    import horovod.torch as hvd

    group = [torch.full((world.rank + count, 2), float(world.rank)) for count in (0, 3, 70_001)]
    gathered = hvd.grouped_allgather(group, name="gathers")
    for count, tensor in zip((0, 3, 70_001), gathered, strict=True):
        parts = [torch.full((rank + count, 2), float(rank)) for rank in range(world.size)]
        assert torch.equal(tensor, torch.cat(parts))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32], ids=str)
def test_one_ranks_tensor_on_all(world, dtype):
    import horovod.torch as hvd

    for root in range(world.size):
        for count in (1, SLOT // dtype.itemsize, 2 * SLOT // dtype.itemsize + 3):
            theirs = numbers_of(root, count, torch.float64).to(dtype)
            mine = numbers_of(world.rank, count, torch.float64).to(dtype)
            name = f"{dtype} {root} {count}"
            assert torch.equal(hvd.broadcast(mine, root, name=f"apart {name}"), theirs)
            assert torch.equal(mine, numbers_of(world.rank, count, torch.float64).to(dtype))
            assert torch.equal(hvd.broadcast_(mine, root, name=f"in place {name}"), theirs)


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


def test_a_wait_of_others_does_not_tear_a_tensor(world):
    """Much behind one another, and ranks that come late in turn: no slot is overwritten before it is read."""
    import horovod.torch as hvd

    count = SLOT // 4 * 4 + world.size
    for turn in range(12):
        if turn % world.size == world.rank:
            time.sleep(0.01)
        tensors = [torch.full((count,), float(turn + number)) for number in range(4)]
        sums, parts, gathers, copies = [], [], [], []
        for number, tensor in enumerate(tensors):
            name = f"{turn} {number}"
            parts.append(hvd.reducescatter_async(tensor, op=hvd.Sum, name=f"part {name}"))
            gathers.append(hvd.allgather_async(tensor, name=f"gather {name}"))
            copies.append(hvd.broadcast_async(tensor, number % world.size, name=f"copy {name}"))
            sums.append(hvd.allreduce_async(tensor, op=hvd.Sum, name=f"sum {name}"))
        for number, handles in enumerate(zip(sums, parts, gathers, copies, strict=True)):
            total, part, gather, copy = map(comm.result, handles)
            assert (total == world.size * (turn + number)).all() and (part == total[0]).all()
            assert (gather == turn + number).all() and len(gather) == world.size * count
            assert (copy == turn + number).all()
