"""What only a GPU can show. Not among the default tests: `pytest tests/gpu -m gpu`, or benchmarks/gpu.sh, which builds first.

Every run takes as many ranks as there are GPUs. With one GPU the collectives run through NCCL all the same, at size 1.
"""

import json
import shutil
import sys

import pytest
import torch

from tests import jobs

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no NVIDIA GPU here"),
]
LAUNCHER = "horovodrun-gloo" if GPUS > 1 else "plain"
ADASUM = ["fusion.kind=adasum"]
KINDS = {
    "allreduce": [],
    "bf16": ["fusion.wire=bf16"],
    "fp16": ["fusion.wire=fp16"],
    "exact": ["fusion.kind=exact"],
    "zero1": ["fusion.kind=zero1"],
    "local_sgd": ["fusion.kind=local_sgd", "fusion.every=5"],
    "diloco": ["fusion.kind=diloco", "fusion.every=5"],
    "adasum": ADASUM,
}
SETTINGS = [
    "configs/tiny.yaml",
    "model.width=64",
    "model.heads=1",
    "train.device=cuda",
    "train.global_batch=16",
    "train.sample_tokens=0",
    "train.evaluate_sequences=16",
    "train.final_evaluate_sequences=16",
]


def train(run, folder, *settings, launcher=LAUNCHER, np=GPUS):
    return jobs.succeed(
        launcher, np, "train", *SETTINGS, *settings, "--run-dir", f"runs/{run}", cwd=folder, timeout=300
    )


def losses(folder, run):
    return [line["loss"] for line in jobs.metrics(folder / "runs" / run) if "loss" in line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    shutil.copytree(jobs.ROOT / "configs", folder / "configs")
    return folder


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training_lowers_the_loss(precision, folder):
    if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this GPU does not multiply bf16")
    output = train(precision, folder, f"train.precision={precision}", "train.steps=40")
    assert ", cuda, " in output, output
    found = losses(folder, precision)
    assert found[-1] < found[0] - 0.5, found


def test_bf16_and_fp16_follow_fp32(folder):
    """The first losses, before rounding has led the runs apart: 16 bits keep 2 to 3 digits of each product."""
    for precision in ("fp32", "bf16", "fp16"):
        train(f"first-{precision}", folder, f"train.precision={precision}", "train.steps=5")
    reference = losses(folder, "first-fp32")
    for precision in ("bf16", "fp16"):
        assert losses(folder, f"first-{precision}") == pytest.approx(reference, rel=0.02)


def test_the_gpu_computes_what_the_cpu_computes(folder):
    """fp32, where cuBLAS does not round to TF32 unless asked: the losses of ten steps agree to rounding."""
    train("on-gpu", folder, "train.precision=fp32", "train.steps=10")
    train(
        "on-cpu", folder, "train.precision=fp32", "train.steps=10", "train.device=cpu", launcher="plain", np=1
    )
    assert losses(folder, "on-gpu") == pytest.approx(losses(folder, "on-cpu"), rel=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", ["allreduce", "exact", "zero1"])
def test_a_resumed_run_ends_in_the_same_bits(kind, precision, folder):
    whole, half = (f"{name}-{kind}-{precision}" for name in ("whole", "half"))
    settings = [*KINDS[kind], f"train.precision={precision}"]
    train(whole, folder, *settings)
    shutil.copytree(folder / "runs" / whole, folder / "runs" / half)
    shutil.rmtree(folder / "runs" / half / "checkpoints" / "step-00000020")
    assert "going on from step 15" in train(half, folder, *settings)
    results = [jobs.weights_and_optimizer(folder / "runs" / run, 20) for run in (whole, half)]
    assert results[0] == results[1]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "adasum"])
def test_a_kind_of_fusion_trains(kind, folder):
    """Over NCCL between the GPUs; alone it has to make the same steps as plain averaging, to its own rounding."""
    for name in {kind, "allreduce"}:
        train(
            f"kind-{name}",
            folder,
            *KINDS[name],
            "train.steps=10",
            "train.evaluate_every=0",
            "checkpoint.every=0",
        )
    found, plain = losses(folder, f"kind-{kind}"), losses(folder, "kind-allreduce")
    assert found[0] == pytest.approx(plain[0], rel=1e-3)  # the same weights and examples
    assert found[-1] < found[0] - 0.1
    if GPUS == 1 and kind != "diloco":  # diloco's outer step goes further than the mean, at any size
        assert found == pytest.approx(plain, rel=1e-2)


@pytest.mark.skipif(GPUS & (GPUS - 1) != 0, reason="Adasum takes 1, 2, 4, 8, ... ranks")
def test_adasum_trains(folder):
    launcher = "mpirun" if GPUS > 1 else "plain"
    train("adasum", folder, *ADASUM, "train.steps=10", launcher=launcher)
    found = losses(folder, "adasum")
    assert found[-1] < found[0] - 0.1


COLLECTIVES = """
import json, sys, torch
from hvdformer import runtime
from hvdformer.distributed import comm
here = runtime.start(sys.argv[1])
import horovod.torch as hvd
assert sys.argv[1] == "cpu" or hvd.nccl_built(), "Horovod was built without NCCL"
rank, size, device = here.world.rank, here.world.size, here.device
total = sum(range(1, size + 1))
def check(name, found, expected):
    assert found.device == device and found.tolist() == expected, f"{name}: {found.tolist()}, not {expected}"
for dtype in (torch.float32, torch.float16, torch.int32, torch.int64):  # allreduce, wire=fp16, exact
    x = torch.full((1000,), rank + 1, dtype=dtype, device=device)
    check(f"allreduce {dtype}", hvd.allreduce(x, op=hvd.Sum, name=f"a {dtype}"), [total] * 1000)
x = torch.full((6 * size,), float(rank + 1), device=device)  # zero1
check("reducescatter", hvd.reducescatter(x, op=hvd.Sum, name="r"), [float(total)] * 6)
x = torch.full((6,), float(rank + 1), device=device)
check("allgather", hvd.allgather(x, name="g"), [float(r + 1) for r in range(size) for _ in range(6)])
x = torch.arange(2 * size, device=device).to(torch.uint8) + rank  # wire=bf16: numbers as bytes
received = hvd.alltoall(x, name="t")
check("alltoall of bytes", received, [2 * rank + k + r for r in range(size) for k in range(2)])
x = torch.full((2,), rank, dtype=torch.uint8, device=device)
check("allgather of bytes", hvd.allgather(x, name="b"), [r for r in range(size) for _ in range(2)])
print(f"rank {rank}: all collectives are right", flush=True)
comm.disconnect()
"""


def test_every_collective_of_the_kinds_is_right_over_nccl(tmp_path):
    job = jobs.Job(
        [*jobs.LAUNCHERS[LAUNCHER](GPUS), sys.executable, "-c", COLLECTIVES, "cuda"],
        tmp_path,
        PYTHONPATH=str(jobs.ROOT),
    )
    try:
        assert job.wait(240) == 0, job.output
    finally:
        job.end()
    assert job.output.count("all collectives are right") == GPUS


# Two numbers that the loop decides by: the totals of the losses, and the gradient norm.
ALLOWED_WAITS = 2
WAITS = """
import functools, json, torch
from hvdformer import runtime
from hvdformer.config import load_config
from hvdformer.data.loader import BatchLoader
from hvdformer.distributed import comm
from hvdformer.distributed.fusion import Share
from hvdformer.distributed.kinds import build_fusion
from hvdformer.metrics import LossSum
from hvdformer.optim import build_optimizer
from hvdformer.precision import autocast
from hvdformer.tasks import causal_lm
import sys, warnings
from pathlib import Path
device, precision = sys.argv[1:]
here = runtime.start(device)
def watch_for_waits(mode):
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
config = load_config(Path("configs/tiny.yaml"), [f"train.device={device}", f"train.precision={precision}"])
examples = causal_lm.open_examples(config, here.world)
config = runtime.resolve(config, here.device, examples.tokenizer.vocab_size, here.threads)
num = config.train.global_batch
model = causal_lm.build_model(config).to(here.device)
share = Share(0, 1, num, num)
make = functools.partial(build_optimizer, config=config.optim, device=here.device)
fusion = build_fusion(config.fusion.resolved(), model.named_parameters(), make, share)
loader = BatchLoader(examples.train, weights=examples.weights, seed=1, micro_batch=1, num_micro_batches=num, rank=0, size=1,
                     document_mask=False, shuffle=True, device=here.device)
def backward(position):
    losses = LossSum(here.device)
    for number, batch in enumerate(loader.step(position)):
        runtime.seed_everything((1, 1, number))
        with autocast(here.device, config.train.precision):
            loss, count = causal_lm.loss_sum(model, batch)
        (loss / 1000).backward()
        losses.add(loss)
    return losses
def rest(losses):
    fusion.reduce(1.0)
    totals = losses.totals()
    fusion.clip(1.0, 1.0)
    fusion.update(1e-3)
for step in range(3):  # what is set up once may wait
    rest(backward(step * num))
watch_for_waits("error")
losses = backward(3 * num)  # raises where it would wait
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    watch_for_waits("warn")
    rest(losses)
watch_for_waits("default")
waits = [f"{w.filename}:{w.lineno}" for w in caught if "synchronizing CUDA operation" in str(w.message)]
print("waits " + json.dumps(waits), flush=True)
loader.close()
comm.disconnect()
"""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_micro_batches_never_wait_for_the_gpu_and_the_rest_of_a_step_twice(precision, folder):
    """Forward, backward, loading and the loss sums are only queued: torch would raise where the CPU has to wait."""
    command = [sys.executable, "-c", WAITS, "cuda", precision]
    job = jobs.Job(command, folder, PYTHONPATH=str(jobs.ROOT))
    try:
        assert job.wait(240) == 0, job.output
    finally:
        job.end()
    waits = json.loads(next(line for line in job.output.splitlines() if line.startswith("waits "))[6:])
    assert len(waits) <= ALLOWED_WAITS, waits
