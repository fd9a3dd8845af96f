"""Fusion by allreduce, compared with one process that holds the whole batch."""

import pytest
import torch

from hvdformer.config import FusionConfig
from hvdformer.data.partition import local_micro_batches
from hvdformer.distributed import comm
from hvdformer.distributed.allreduce import AllreduceFusion
from hvdformer.distributed.buckets import flatten

NUM_MICRO_BATCHES = 8  # over 3 ranks: 3, 3, 2


def make_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 32), torch.nn.GELU(), torch.nn.Linear(32, 1))


def micro_batch(step, number):
    generator = torch.Generator().manual_seed(100 * step + number)
    return torch.randn(4, 6, generator=generator), torch.randn(4, 1, generator=generator)


def loss_sum(model, step, number):
    inputs, targets = micro_batch(step, number)
    return ((model(inputs) - targets) ** 2).sum()


def train_alone(steps, clip_norm):
    """Plain torch, one process, the whole batch in one backward."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    norms = []
    for step in range(steps):
        optimizer.zero_grad()
        (sum(loss_sum(model, step, number) for number in range(NUM_MICRO_BATCHES)) / 32).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)))
        optimizer.step()
    return model, norms


def train_together(world, steps, clip_norm, **settings):
    model = make_model()
    mine = local_micro_batches(NUM_MICRO_BATCHES, world.rank, world.size)
    buckets = flatten(model.named_parameters(), settings.pop("bucket_mib", 2.0))
    flats = [bucket.flat for bucket in buckets]
    fusion = AllreduceFusion(torch.optim.AdamW(flats, lr=1e-2), buckets, FusionConfig(**settings), len(mine))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    norms = []
    for step in range(steps):
        for number in mine:
            (loss_sum(model, step, number) / 32).backward()
        fusion.reduce()
        norms.append(float(torch.nn.utils.clip_grad_norm_(flats, clip_norm)))
        fusion.update(scaler)
    return model, norms


@pytest.mark.parametrize("bucket_mib", [0.0005, 8.0], ids=["many buckets", "one bucket"])
def test_steps_equal_those_of_one_process(world, bucket_mib):
    alone, norms_alone = train_alone(5, clip_norm=0.3)
    together, norms = train_together(world, 5, clip_norm=0.3, bucket_mib=bucket_mib)
    assert min(norms_alone) > 0.3, "the clipping would not be tested"
    # fp32 sums of 8 terms in another order: a few units in the last place, magnified by Adam's division.
    torch.testing.assert_close(torch.tensor(norms), torch.tensor(norms_alone), rtol=1e-5, atol=0)
    for ours, reference in zip(together.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-6)


def test_all_ranks_hold_the_same_bits(world):
    model, _ = train_together(world, 5, clip_norm=0.3)
    bits = [parameter.detach().view(torch.int32).tolist() for parameter in model.parameters()]
    assert all(other == bits for other in comm.gather_json(bits, "bits"))


def test_two_runs_give_the_same_bits(world):
    first, _ = train_together(world, 5, clip_norm=0.3, bucket_mib=0.0005)
    second, _ = train_together(world, 5, clip_norm=0.3, bucket_mib=0.0005)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_fp16_on_the_wire_is_near_fp32(world):
    exact, _ = train_together(world, 1, clip_norm=1e9)
    rounded, _ = train_together(world, 1, clip_norm=1e9, wire="fp16")
    for one, other in zip(exact.parameters(), rounded.parameters(), strict=True):
        # Adam's first step is the sign of the gradient times the learning rate: 1e-2 at most, whatever was rounded.
        torch.testing.assert_close(one, other, rtol=0, atol=1e-3)


def test_each_bucket_is_reduced_once_a_step_and_before_synchronize(world, monkeypatch):
    """Started by the last gradient, so that it runs beside backward; alone, nothing is reduced."""
    started = []
    original = AllreduceFusion._filled

    def watched(self, number):
        original(self, number)
        started.append(self._missing[number])

    monkeypatch.setattr(AllreduceFusion, "_filled", watched)
    train_together(world, 2, clip_norm=1e9, bucket_mib=0.0005)
    mine = len(local_micro_batches(NUM_MICRO_BATCHES, world.rank, world.size))
    parameters, steps = 4, 2
    assert len(started) == (0 if world.size == 1 else mine * parameters * steps)
    assert started.count(0) == (
        0 if world.size == 1 else steps * 3
    )  # two matrices, and the two vectors together
