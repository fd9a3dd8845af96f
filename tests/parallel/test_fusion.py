"""Every kind of fusion, compared with one process that does what the ranks do together, written in plain torch or NumPy."""

import functools
import math

import numpy as np
import pytest
import torch

from hvdformer.agreement import check_replicas
from hvdformer.config import FusionConfig, OptimConfig
from hvdformer.data.partition import local_micro_batches
from hvdformer.distributed import comm
from hvdformer.distributed.buckets import Watch
from hvdformer.distributed.fusion import Share
from hvdformer.distributed.kinds import build_fusion, check_fusion
from hvdformer.errors import UserError
from hvdformer.optim import build_optimizer
from hvdformer.state import TrainState, tensors_sha256

NUM_MICRO_BATCHES = 8  # over 3 ranks: 3, 3, 2
SIZE = 4  # examples of a micro-batch
TARGETS = NUM_MICRO_BATCHES * SIZE
OPTIM = OptimConfig(weight_decay=0.01, beta2=0.999)
RATE = 1e-2
SMALL = 0.0005  # MiB: three buckets


def make_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 32), torch.nn.GELU(), torch.nn.Linear(32, 1))


def loss_sum(model, step, number, factor=1.0):
    generator = torch.Generator().manual_seed(100 * step + number)
    inputs = torch.randn(SIZE, 6, generator=generator)
    targets = torch.randn(SIZE, 1, generator=generator)
    return ((model(inputs) - targets) ** 2).sum() * factor


class Together:
    """A model that is trained by a kind of fusion on all ranks, or as if this rank were alone."""

    def __init__(self, world, alone=False, **settings):
        rank, size = (0, 1) if alone else (world.rank, world.size)
        self.mine = local_micro_batches(NUM_MICRO_BATCHES, rank, size)
        self.model = make_model()
        settings = FusionConfig(**{"bucket_mib": SMALL, **settings}).resolved()
        self.fusion = build_fusion(
            settings,
            self.model.named_parameters(),
            functools.partial(build_optimizer, config=OPTIM, device=torch.device("cpu")),
            Share(rank, size, len(self.mine), NUM_MICRO_BATCHES),
        )
        self.state = TrainState(self.model, self.fusion)
        self.backwards = 0

    def backward(self, step, factor=1.0):
        self.backwards += 1
        for number in self.mine:
            (loss_sum(self.model, step, number, factor) / TARGETS).backward()

    def step(self, step, clip_norm=0.0, factor=1.0):
        self.backward(step, factor)
        while not self.fusion.reduce(NUM_MICRO_BATCHES / len(self.mine)):
            self.backward(step, factor)
        norm = self.fusion.clip(clip_norm, 1.0)
        if math.isfinite(norm):
            self.fusion.update(RATE)
        else:
            self.fusion.clear()
        if (step + 1) % self.fusion.every == 0:
            self.fusion.fuse()
        return norm

    def run(self, steps, clip_norm=0.0):
        norms = [self.step(step, clip_norm) for step in range(steps)]
        return self.model, norms

    def bits(self):
        return tensors_sha256(self.state.weights())


def adamw(model):
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": OPTIM.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=RATE,
        betas=(OPTIM.beta1, OPTIM.beta2),
        eps=OPTIM.epsilon,
    )


def train_alone(steps, clip_norm):
    """Plain torch, one process, the whole batch in one backward."""
    model = make_model()
    optimizer = adamw(model)
    norms = []
    for step in range(steps):
        optimizer.zero_grad()
        (sum(loss_sum(model, step, number) for number in range(NUM_MICRO_BATCHES)) / TARGETS).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm or math.inf)))
        optimizer.step()
    return model, norms


def assert_near(ours, reference, rtol=1e-4, atol=1e-6):
    for one, other in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


@pytest.mark.parametrize("kind", ["allreduce", "exact", "zero1"])
@pytest.mark.parametrize("bucket_mib", [SMALL, 8.0], ids=["many buckets", "one bucket"])
def test_kinds_that_sum_gradients_equal_one_process(world, kind, bucket_mib):
    reference, expected = train_alone(5, clip_norm=0.3)
    model, norms = Together(world, kind=kind, bucket_mib=bucket_mib).run(5, clip_norm=0.3)
    assert min(expected) > 0.3, "the clipping would not be tested"
    # fp32 sums of 8 terms in another order: a few units in the last place, magnified by Adam's division.
    torch.testing.assert_close(torch.tensor(norms), torch.tensor(expected), rtol=1e-5, atol=0)
    assert_near(model, reference)


@pytest.mark.parametrize("wire", ["fp16", "bf16"])
def test_a_narrow_wire_is_near_fp32(world, wire):
    """A relative error of 2^-8 (bf16) in the gradient changes a step of AdamW by about as much of its length."""
    reference, expected = train_alone(3, clip_norm=0.3)
    model, norms = Together(world, wire=wire).run(3, clip_norm=0.3)
    assert norms == pytest.approx(expected, rel=2**-7)
    assert_near(model, reference, rtol=0, atol=3 * RATE * 2**-5)


@pytest.mark.parametrize(
    "kind,wire,bytes_a_number", [("allreduce", "fp32", 4), ("allreduce", "bf16", 2), ("exact", "fp32", 4)]
)
def test_bytes_are_counted(world, kind, wire, bytes_a_number):
    together = Together(world, kind=kind, wire=wire)
    together.step(0)
    before = together.fusion.bytes_sent
    together.step(1)
    numbers = sum(bucket.flat.numel() for bucket in together.fusion.buckets)
    expected = 2 * (world.size - 1) / world.size * numbers * bytes_a_number
    assert together.fusion.bytes_sent - before == pytest.approx(expected, abs=8)


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "allreduce"},
        {"wire": "fp16"},
        {"wire": "bf16"},
        {"kind": "exact"},
        {"kind": "zero1"},
        {"kind": "local_sgd", "every": 3},
        {"kind": "diloco", "every": 3},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_all_ranks_hold_the_same_bits_and_so_do_two_runs(world, settings):
    first, second = Together(world, **settings), Together(world, **settings)
    first.run(6, clip_norm=0.3)
    second.run(6, clip_norm=0.3)
    assert first.bits() == second.bits()
    assert comm.gather_json(first.bits(), "bits") == [first.bits()] * world.size


# exact


def test_exact_gives_the_bits_of_one_rank(world):
    together, alone = Together(world, kind="exact"), Together(world, kind="exact", alone=True)
    _, norms = together.run(6, clip_norm=0.3)
    assert norms == alone.run(6, clip_norm=0.3)[1]
    assert together.bits() == alone.bits()
    assert tensors_sha256(together.state.tensors()) == tensors_sha256(alone.state.tensors())
    assert together.fusion.to_dict() == alone.fusion.to_dict()


def test_exact_rounds_to_the_24_bits_of_fp32_of_the_largest_gradient(world):
    """Against a sum in float64: the error of a gradient is at most half a quantum for each micro-batch."""
    together = Together(world, kind="exact", bucket_mib=8.0)
    together.backward(0)
    assert not together.fusion.reduce(1.0)  # the first step measures
    together.backward(0)
    assert together.fusion.reduce(1.0)
    model = make_model()
    for number in range(NUM_MICRO_BATCHES):
        (loss_sum(model, 0, number) / TARGETS).backward()
    largest = max(float(p.grad.abs().max()) for p in model.parameters())
    for bucket in together.fusion.buckets:
        for name, found in bucket.views(bucket.gradient).items():
            expected = model.get_parameter(name).grad
            # fp32's own rounding of the reference, of values up to the sum of 8
            assert (found - expected).abs().max() <= largest * 2**-20


def test_exact_notices_an_overflow_and_computes_the_step_again(world):
    together, alone = Together(world, kind="exact"), Together(world, kind="exact", alone=True)
    for each in (together, alone):
        for step, factor in enumerate([1.0, 1.0, 1e4, 1.0, 1e-6, 1.0]):
            each.step(step, factor=factor)
        # step 0 measures; step 2 has gradients 1e4 times as large; step 5 a million times those of step 4
        assert each.backwards == 6 + 3
    assert together.bits() == alone.bits()


def test_exact_takes_int64_where_int32_has_too_few_bits(world):
    def sums_of(num_micro_batches):
        fusion = build_fusion(
            FusionConfig(kind="exact"),
            make_model().named_parameters(),
            functools.partial(build_optimizer, config=OPTIM, device=torch.device("cpu")),
            Share(0, 1, num_micro_batches, num_micro_batches),
        )
        return fusion._sums[0].dtype

    assert (sums_of(64), sums_of(65)) == (torch.int32, torch.int64)


# adasum


def adasum_of(vectors):
    """Equation 2 of arXiv 2006.02924, pair by pair."""
    while len(vectors) > 1:
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [(1 - a @ b / (2 * a @ a)) * a + (1 - a @ b / (2 * b @ b)) * b for a, b in pairs]
    return vectors[0]


def test_adasum_equals_its_formula_or_is_refused(world):
    settings = FusionConfig(kind="adasum")
    if world.size & (world.size - 1):
        with pytest.raises(UserError, match=f"adasum cannot work here: {world.size} ranks"):
            check_fusion(settings, world)
        return
    if world.size > 1 and world.operations != "MPI":
        with pytest.raises(UserError, match="CPU operations are Gloo"):
            check_fusion(settings, world)
        return
    check_fusion(settings, world)
    together = Together(world, kind="adasum")
    together.backward(0)
    together.fusion.reduce(NUM_MICRO_BATCHES / len(together.mine))
    gradients = []
    for rank in range(world.size):
        model = make_model()
        theirs = local_micro_batches(NUM_MICRO_BATCHES, rank, world.size)
        (sum(loss_sum(model, 0, number) for number in theirs) / (len(theirs) * SIZE)).backward()
        gradients.append({name: p.grad.double().numpy().ravel() for name, p in model.named_parameters()})
    for bucket in together.fusion.buckets:
        expected = adasum_of([np.concatenate([g[name] for name in bucket.names]) for g in gradients])
        np.testing.assert_allclose(bucket.gradient.numpy(), expected, rtol=1e-4, atol=1e-6)


# Kinds that let the ranks train apart


def train_apart(size, steps, every, clip_norm, outer=None):
    """`size` models side by side in one process; outer: learning rate and momentum of torch's own Nesterov SGD."""
    models = [make_model() for _ in range(size)]
    optimizers = [adamw(model) for model in models]
    shares = [local_micro_batches(NUM_MICRO_BATCHES, rank, size) for rank in range(size)]
    together = make_model()
    sgd = outer and torch.optim.SGD(together.parameters(), lr=outer[0], momentum=outer[1], nesterov=True)
    for step in range(steps):
        for model, optimizer, mine in zip(models, optimizers, shares, strict=True):
            optimizer.zero_grad()
            (sum(loss_sum(model, step, number) for number in mine) / (len(mine) * SIZE)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            optimizer.step()
        if (step + 1) % every == 0:
            with torch.no_grad():
                for group in zip(
                    together.parameters(), *(model.parameters() for model in models), strict=True
                ):
                    mean = sum(
                        p * (len(s) / NUM_MICRO_BATCHES) for p, s in zip(group[1:], shares, strict=True)
                    )
                    group[0].grad = group[0] - mean
                    if not outer:
                        group[0].copy_(mean)
                if outer:
                    sgd.step()
                for model in models:
                    model.load_state_dict(together.state_dict())
                for states in zip(
                    *([o.state[p] for g in o.param_groups for p in g["params"]] for o in optimizers),
                    strict=True,
                ):
                    for key in ("exp_avg", "exp_avg_sq"):
                        mean = sum(
                            s[key] * (len(m) / NUM_MICRO_BATCHES) for s, m in zip(states, shares, strict=True)
                        )
                        for state in states:
                            state[key].copy_(mean)
    return together


def test_local_sgd_equals_models_side_by_side(world):
    model, _ = Together(world, kind="local_sgd", every=3).run(9, clip_norm=0.3)
    assert_near(model, train_apart(world.size, 9, 3, 0.3))


def test_diloco_equals_models_side_by_side_under_torchs_nesterov(world):
    settings = {"kind": "diloco", "every": 3, "outer_learning_rate": 0.6, "outer_momentum": 0.8}
    model, _ = Together(world, **settings).run(9, clip_norm=0.3)
    assert_near(model, train_apart(world.size, 9, 3, 0.3, outer=(0.6, 0.8)))


# zero1


def test_zero1_gives_the_bits_of_allreduce_where_sums_have_two_terms(world):
    one, other = Together(world, kind="zero1"), Together(world, kind="allreduce")
    norms, expected = (each.run(5, clip_norm=0.3)[1] for each in (one, other))
    if world.size <= 2:
        assert norms == expected and one.bits() == other.bits()
    else:  # sums of three terms and more depend on their order, which the collectives choose
        assert norms == pytest.approx(expected, rel=1e-6)
        assert_near(one.model, other.model)


def test_zero1_keeps_its_part_of_the_state_and_gathers_it_whole(world):
    one, other = Together(world, kind="zero1"), Together(world, kind="allreduce")
    one.run(3)
    other.run(3)
    numbers = sum(bucket.flat.numel() for bucket in one.fusion.buckets)
    scalars = 4 * len(one.fusion.buckets)
    assert one.fusion.state_bytes() == 2 * 4 * numbers / world.size + scalars
    one.fusion.gather_state()
    found, expected = dict(one.state.optimizer_tensors()), dict(other.state.optimizer_tensors())
    if world.rank == 0:
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-9)
    else:
        assert not found
    one.fusion.release_state()
    assert not dict(one.state.optimizer_tensors())


# What all kinds owe to the training loop

KINDS = [
    {"kind": "allreduce"},
    {"wire": "bf16"},
    {"kind": "exact"},
    {"kind": "zero1"},
    {"kind": "local_sgd", "every": 1},
    {"kind": "diloco", "every": 1},
]


@pytest.mark.parametrize("settings", KINDS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_a_nan_on_one_rank_is_seen_by_all_in_the_same_step(world, settings):
    together = Together(world, **settings)
    together.step(0)
    before = together.bits()
    factor = math.nan if world.rank == world.size - 1 else 1.0
    norm = together.step(1, clip_norm=0.3, factor=factor)
    assert not math.isfinite(norm)
    if together.fusion.every > 1 or not together.fusion.averages_locally:
        assert together.bits() == before
    assert math.isfinite(together.step(2))
    assert all(p.isfinite().all() for p in together.model.parameters())
    assert comm.gather_json(together.bits(), "bits") == [together.bits()] * world.size


@pytest.mark.parametrize("kind", ["local_sgd", "diloco"])
def test_a_norm_beyond_fp32_on_one_rank_is_infinite_on_all(world, kind):
    together = Together(world, kind=kind, every=1)
    together.backward(0)
    if world.rank == world.size - 1:
        for bucket in together.fusion.buckets:
            bucket.gradient.fill_(1e38)  # each is a number of fp32, their norm is none
    together.fusion.reduce(1.0)
    assert together.fusion.clip(0.3, 1.0) == math.inf


@pytest.mark.parametrize("settings", KINDS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_a_first_step_that_is_skipped_leaves_nothing_behind(world, settings):
    """As with fp16, whose loss scale starts too high: there are no moments yet when the first round ends."""
    together, undisturbed = Together(world, **settings), Together(world, **settings)
    assert not math.isfinite(together.step(0, factor=math.nan))
    together.step(0)
    undisturbed.step(0)
    if world.size == 1 or not together.fusion.averages_locally:
        assert together.bits() == undisturbed.bits()
    assert_near(together.model, undisturbed.model)


@pytest.mark.parametrize("settings", KINDS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_paused_leaves_the_plain_gradients_of_this_rank(world, settings):
    together = Together(world, **settings)
    with together.fusion.paused():
        together.backward(0)
    model = make_model()
    for number in together.mine:
        (loss_sum(model, 0, number) / TARGETS).backward()
    for ours, theirs in zip(together.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    together.fusion.clear()
    assert math.isfinite(together.step(0))


def test_each_bucket_is_started_by_its_last_gradient(world, monkeypatch):
    """So that it runs beside backward; alone, nothing is reduced."""
    counted, started = [], []
    original = Watch._count

    def watched(self, number):
        before = self._missing[number]
        counted.append(before)
        original(self, number)
        if before == 1:
            started.append(number)

    monkeypatch.setattr(Watch, "_count", watched)
    together = Together(world)
    together.run(2)
    if world.size == 1:
        assert not counted
    else:
        assert len(counted) == len(together.mine) * 4 * 2  # parameters, steps
        assert sorted(started) == sorted(2 * list(range(len(together.fusion.buckets))))


@pytest.mark.parametrize("kind", ["allreduce", "zero1"])
def test_a_flipped_bit_in_one_replica_is_found_and_named(world, kind):
    together = Together(world, kind=kind)
    together.run(2)
    check_replicas(together.state, "after step 2")
    if world.rank == world.size - 1:
        together.fusion.buckets[1].flat.detach().view(torch.int32)[3] ^= 1
    if world.size == 1:
        check_replicas(together.state, "after step 2")
        return
    name = together.fusion.buckets[1].names[0]
    with pytest.raises(
        comm.Agreed, match=f"weights of rank {world.size - 1} differ from rank 0's, first among {name}"
    ):
        check_replicas(together.state, "after step 2")
