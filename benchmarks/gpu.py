"""What a GPU does with hvdformer: tokens/s, share of the card's own peak, and what Horovod and DDP cost at size 1.

    python -m benchmarks.gpu [--rounds 7] [--steps 20] [--device cuda|cpu] [--small] [key=value ...]

The peak is measured, not taken from a data sheet: bf16 matrix products of several sizes, the best of which counts.
Then the same training step, in one process, in turn:

- plain PyTorch: the model, fused AdamW and clipping, no Horovod;
- hvdformer: the same with its buckets and `fusion.kind=allreduce`, as in train.py; at size 1 nothing is sent;
- DDP: the same under DistributedDataParallel at size 1, backend nccl (gloo on a CPU).

A round is a block of steps of each, in an order that turns from round to round; ratios are taken within a round, and
medians over the rounds after the first. Inputs are random tokens that lie on the device. Beside them the whole program,
`hvdformer train`, is timed by its own metrics: the loader, metrics and everything else included. MFU counts
6 N + 12 L T D operations a token (arXiv 2204.02311, appendix B) against that measured peak.

It also counts how often a step of hvdformer makes the CPU wait for the GPU (torch.cuda.set_sync_debug_mode).
Writes benchmarks/results/gpu-NAME.json. --device cpu --small runs the same code where there is no GPU; its numbers mean
nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.ddp import WithLoss
from benchmarks.fusion import Trainee
from benchmarks.processes import ROOT, run_hvdformer
from hvdformer import runtime
from hvdformer.bench import machine as this_machine
from hvdformer.config import Config, load_config
from hvdformer.data.loader import Batch
from hvdformer.distributed import comm
from hvdformer.models.decoder import parameter_count
from hvdformer.optim import build_optimizer
from hvdformer.plan import flops_per_token
from hvdformer.tasks import causal_lm

# 124 M parameters in the modern shape, 65,536 tokens a step.
SETTINGS = (
    "model.vocab_size=50304",
    "model.context_length=1024",
    "model.width=768",
    "model.layers=12",
    "model.heads=12",
    "train.micro_batch=16",
    "train.global_batch=64",
    "train.precision=bf16",
    "fusion.bucket_mib=25",
)
SMALL = (
    "model.vocab_size=300",
    "model.context_length=32",
    "model.width=32",
    "model.layers=2",
    "model.heads=2",
    "train.micro_batch=2",
    "train.global_batch=4",
    "train.precision=bf16",
)
PEAK_SIZES, SMALL_SIZES = (2048, 4096, 8192, 16384), (64, 128)


class Plain:
    """The step as anybody writes it."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        self.model: torch.nn.Module = WithLoss(
            causal_lm.build_model(config).to(device), config, own_loss=False
        )
        self.parameters = list(self.model.parameters())
        matrices, vectors = (
            [p for p in self.parameters if (p.ndim >= 2) == decays] for decays in (True, False)
        )
        self.optimizer = build_optimizer(matrices, vectors, config.optim, device)

    def step(self, micro_batches: list[Batch]) -> None:
        for batch in micro_batches:
            self.backward(batch, len(micro_batches))
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.optim.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)

    def backward(self, batch: Batch, num: int) -> None:
        (self.model(batch) / num).backward()


class Replica(Plain):
    """The same under DistributedDataParallel."""

    def __init__(self, config: Config, device: torch.device) -> None:
        super().__init__(config, device)
        self.model = DistributedDataParallel(
            self.model,
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )

    def step(self, micro_batches: list[Batch]) -> None:
        assert isinstance(self.model, DistributedDataParallel)
        with self.model.no_sync():
            for batch in micro_batches[:-1]:
                self.backward(batch, len(micro_batches))
        self.backward(micro_batches[-1], len(micro_batches))
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.optim.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="seconds instead of minutes; for tests")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20, help="of each variant in a round")
    parser.add_argument("--out", type=Path, help="[default: benchmarks/results/gpu-NAME.json]")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    settings = [*(SMALL if arguments.small else SETTINGS), *arguments.overrides]
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: torch finds no GPU here; --device cpu --small tries the code without one")
    # Before this process joins a job and takes memory of the GPU: both would reach the program.
    program = [*settings, f"train.device={arguments.device}", "optim.warmup_steps=2"]
    program += [f"train.steps={max(12, 2 * arguments.steps)}"]
    whole_program = [rate_of_program(program) for _ in range(3)]
    here = runtime.start(arguments.device)
    if here.device.type == "cuda":
        import horovod.torch as hvd

        if not hvd.nccl_built():
            sys.exit(
                "benchmarks.gpu: Horovod was built without NCCL: hvdformer build-horovod --gpu nccl --force"
            )
    config = load_config(None, settings)
    config = runtime.resolve(config, here.device, 257, here.threads)
    peaks = matrix_product_peaks(here.device, SMALL_SIZES if arguments.small else PEAK_SIZES)
    report = {
        "command": "python -m benchmarks.gpu " + " ".join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(here.device),
        "matrix_product_tflops_bf16": peaks,
        "settings": settings,
        **training(config, here, arguments.rounds, arguments.steps, max(peaks.values()), whole_program),
    }
    comm.disconnect()
    name = re.sub(r"[^a-z0-9]+", "-", str(report["machine"]["name"]).lower().replace("nvidia", "")).strip("-")
    target = arguments.out or ROOT / "benchmarks" / "results" / f"gpu-{name}.json"
    target.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))
    print(f"written: {target}")


def machine(device: torch.device) -> dict[str, Any]:
    facts: dict[str, Any] = {"torch": torch.__version__, "horovod": comm.horovod_version()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return facts | {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    return facts | {"name": f"CPU {this_machine()['cpu']}"}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_product_peaks(device: torch.device, sizes: tuple[int, ...]) -> dict[str, float]:
    """{N: TFLOP/s} of products of two N x N matrices in bf16: the best of five blocks of each size."""
    peaks = {}
    for size in sizes:
        a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
        out = torch.empty_like(a)
        # About 0.1 s at 500 TFLOP/s, after which the clocks have settled.
        repeats = max(3, int(5e13 / (2 * size**3))) if device.type == "cuda" else 3
        best = float("inf")
        for _ in range(5):
            synchronize(device)
            began = time.perf_counter()
            for _ in range(repeats):
                torch.mm(a, b, out=out)
            synchronize(device)
            best = min(best, (time.perf_counter() - began) / repeats)
        peaks[str(size)] = 2 * size**3 / best / 1e12
    return peaks


def rate_of_program(overrides: list[str]) -> float:
    """Tokens/s of `hvdformer train`, from the end of its fifth step to that of its last one."""
    config = load_config(None, overrides)
    times = run_hvdformer([], overrides, torch.get_num_threads(), 1).times[0][4:]
    tokens = config.train.global_batch * config.model.context_length
    return tokens * (len(times) - 1) / (times[-1] - times[0])


def training(
    config: Config,
    here: runtime.Runtime,
    rounds: int,
    steps: int,
    peak_tflops: float,
    whole_program: list[float],
) -> dict[str, Any]:
    """Tokens/s of all variants, and how they compare. whole_program: tokens/s of `hvdformer train`, measured before."""
    device, train, model = here.device, config.train, config.model
    assert model.vocab_size is not None
    generator = torch.Generator().manual_seed(1)
    micro_batches = [
        Batch(
            torch.randint(
                model.vocab_size, (train.micro_batch, model.context_length + 1), generator=generator
            ).to(device),
            None,
        )
        for _ in range(train.global_batch // train.micro_batch)
    ]
    tokens = train.global_batch * model.context_length
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=0,
            world_size=1,
        )
        makers: dict[str, Callable[[], Any]] = {
            "plain PyTorch": lambda: Plain(config, device),
            "hvdformer": lambda: Trainee(config, config.fusion, here.world, device),
            "DDP": lambda: Replica(config, device),
        }
        trainees = {name: make() for name, make in makers.items()}
        seconds: dict[str, list[float]] = {name: [] for name in trainees}
        names = list(trainees)
        for number in range(rounds + 1):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                synchronize(device)
                began = time.perf_counter()
                for _ in range(steps):
                    trainees[name].step(micro_batches)
                synchronize(device)
                seconds[name].append((time.perf_counter() - began) / steps)
        waits = count_waits(lambda: trainees["hvdformer"].step(micro_batches), device)
        dist.destroy_process_group()
    parameters = parameter_count(model, model.vocab_size)
    flops = flops_per_token(model, model.vocab_size, parameters)
    plain = seconds["plain PyTorch"][1:]
    variants = []
    for name, all_values in seconds.items():
        values = all_values[1:]
        rate = tokens / statistics.median(values)
        variants.append(
            {
                "variant": name,
                "tokens_per_second": rate,
                "tokens_per_second_min_max": [tokens / max(values), tokens / min(values)],
                "mfu": rate * flops / peak_tflops / 1e12,
                "overhead_over_plain": statistics.median(v / p for v, p in zip(values, plain, strict=True))
                - 1,
            }
        )
    rate = statistics.median(whole_program)
    variants.append(
        {
            "variant": "hvdformer train, whole program",
            "tokens_per_second": rate,
            "tokens_per_second_min_max": [min(whole_program), max(whole_program)],
            "mfu": rate * flops / peak_tflops / 1e12,
            "overhead_over_plain": tokens / statistics.median(plain) / rate - 1,
        }
    )
    return {
        "parameters": parameters,
        "precision": train.precision,
        "tokens_per_step": tokens,
        "rounds": rounds,
        "steps_per_round": steps,
        "flops_per_token": flops,
        "waits_for_the_gpu_in_a_step": waits,
        "variants": variants,
    }


def count_waits(step: Callable[[], Any], device: torch.device) -> list[str] | None:
    """Where a step makes the CPU wait for the GPU, as "file:line"; None on a CPU."""
    if device.type != "cuda":
        return None
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    return [
        f"{Path(w.filename).name}:{w.lineno}"
        for w in caught
        if "synchronizing CUDA operation" in str(w.message)
    ]


def table(report: dict[str, Any]) -> str:
    peak = max(report["matrix_product_tflops_bf16"].items(), key=lambda item: item[1])
    lines = [
        f"{report['machine']['name']}: bf16 matrix products reach {peak[1]:,.4g} TFLOP/s (at {peak[0]} x {peak[0]})",
        f"{report['parameters']:,} parameters, {report['tokens_per_step']:,} tokens a step, {report['precision']}",
        "| | tokens/s, median (min to max) | MFU of the measured peak | overhead over plain PyTorch |",
        "|---|---|---|---|",
    ]
    for row in report["variants"]:
        low, high = row["tokens_per_second_min_max"]
        lines.append(
            f"| {row['variant']} | {row['tokens_per_second']:,.0f} ({low:,.0f} to {high:,.0f}) "
            f"| {100 * row['mfu']:.1f} % | {100 * row['overhead_over_plain']:+.1f} % |"
        )
    waits = report["waits_for_the_gpu_in_a_step"]
    if waits is not None:
        lines.append(f"a step waits {len(waits)} times for the GPU: {', '.join(waits)}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
