"""What each kind of fusion costs a training step: steps of all kinds in turn, in the same processes.

    mpirun -np 2 python -m benchmarks.fusion [--kinds allreduce,exact,zero1] [--rounds 40] [key=value ...]

Every kind has a model of its own, and all train on the same batches. A round is one step of each kind, and the ratio to
the first kind is taken within a round: whatever else the machine does strikes both alike. The table has medians over the
rounds after the first ten. Without a launcher's ranks there is nothing to fuse, and the cost at size 1 is shown.

--horovod adds Horovod's DistributedOptimizer as it comes, on the model's own tensors; with HOROVOD_FUSION_THRESHOLD
unset it then fuses by itself, as Horovod's default of 128 MiB says, so run it apart from the kinds that must not be fused.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import time
from typing import Any

import click
import torch

from hvdformer import runtime
from hvdformer.config import Config, FusionConfig, load_config
from hvdformer.data.loader import BatchLoader
from hvdformer.data.partition import local_micro_batches
from hvdformer.distributed import comm
from hvdformer.distributed.fusion import Share
from hvdformer.distributed.kinds import build_fusion
from hvdformer.metrics import peak_memory_bytes
from hvdformer.optim import build_optimizer
from hvdformer.precision import autocast
from hvdformer.tasks import causal_lm

WARMUP_ROUNDS = 10


class Trainee:
    """A model with its kind of fusion."""

    def __init__(self, config: Config, fusion: FusionConfig, world: comm.World, device: torch.device) -> None:
        num = config.train.global_batch // config.train.micro_batch
        self.mine = local_micro_batches(num, world.rank, world.size)
        self.model = causal_lm.build_model(config).to(device)
        self.fusion = build_fusion(
            fusion.resolved(),
            self.model.named_parameters(),
            functools.partial(build_optimizer, config=config.optim, device=device),
            Share(world.rank, world.size, len(self.mine), num),
        )
        self.config, self.device, self.steps = config, device, 0

    def step(self, micro_batches: list[Any]) -> float:
        """One training step; its seconds."""
        began = time.perf_counter()
        self._backward(micro_batches)
        while not self.fusion.reduce(1.0):
            self._backward(micro_batches)
        self.fusion.clip(self.config.optim.clip_norm, 1.0)
        self.fusion.update(1e-4)
        self.steps += 1
        if self.steps % self.fusion.every == 0:
            self.fusion.fuse()
        return time.perf_counter() - began

    def _backward(self, micro_batches: list[Any]) -> None:
        for batch in micro_batches:
            with autocast(self.device, self.config.train.precision):
                loss, count = causal_lm.loss_sum(self.model, batch)
            (loss / (count * len(self.mine))).backward()


class Horovods(Trainee):
    """Horovod's DistributedOptimizer as its documentation shows it."""

    def __init__(self, config: Config, world: comm.World, device: torch.device) -> None:
        import horovod.torch as hvd

        num = config.train.global_batch // config.train.micro_batch
        self.mine = local_micro_batches(num, world.rank, world.size)
        self.model = causal_lm.build_model(config).to(device)
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        vectors = [p for p in self.model.parameters() if p.ndim < 2]
        self.optimizer = hvd.DistributedOptimizer(
            build_optimizer(matrices, vectors, config.optim, device),
            named_parameters=self.model.named_parameters(),
            backward_passes_per_step=len(self.mine),
            op=hvd.Sum,
        )
        self.config, self.device = config, device

    def step(self, micro_batches: list[Any]) -> float:
        began = time.perf_counter()
        self._backward(micro_batches)
        self.optimizer.synchronize()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_norm or 1e9)
        with self.optimizer.skip_synchronize():
            self.optimizer.step()
        self.model.zero_grad(set_to_none=False)
        return time.perf_counter() - began


@click.command()
@click.option("--kinds", default="allreduce,exact,zero1", show_default=True)
@click.option("--rounds", default=40, show_default=True)
@click.option(
    "--horovod", is_flag=True, help="Also Horovod's DistributedOptimizer on the model's own tensors."
)
@click.option("--json", "as_json", is_flag=True)
@click.argument("overrides", nargs=-1)
def main(kinds: str, rounds: int, horovod: bool, as_json: bool, overrides: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    here = runtime.start("cpu", 1)
    config = load_config(None, overrides)
    examples = causal_lm.open_examples(config, here.world)
    config = runtime.resolve(config, here.device, examples.tokenizer.vocab_size, 1)
    trainees: dict[str, Trainee] = {}
    for kind in filter(None, kinds.split(",")):
        name, _, wire = kind.partition(":")
        trainees[kind] = Trainee(
            config, FusionConfig(kind=name, **({"wire": wire} if wire else {})), here.world, here.device
        )
    if horovod:
        trainees["Horovod's own"] = Horovods(config, here.world, here.device)
    loader = BatchLoader(
        examples.train,
        weights=examples.weights,
        seed=1,
        micro_batch=config.train.micro_batch,
        num_micro_batches=config.train.global_batch // config.train.micro_batch,
        rank=here.world.rank,
        size=here.world.size,
        document_mask=False,
        shuffle=True,
        device=here.device,
    )
    seconds: dict[str, list[float]] = {name: [] for name in trainees}
    for number in range(WARMUP_ROUNDS + rounds):
        micro_batches = loader.step(number * config.train.global_batch)
        names = list(trainees)
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            seconds[name].append(trainees[name].step(micro_batches))
    loader.close()
    if here.world.is_first:
        _report(seconds, here, config, overrides, as_json)
    comm.disconnect()


def _report(
    seconds: dict[str, list[float]],
    here: runtime.Runtime,
    config: Config,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    first = next(iter(seconds))
    rows = []
    for name, all_values in seconds.items():
        values, base = all_values[WARMUP_ROUNDS:], seconds[first][WARMUP_ROUNDS:]
        ratios = sorted(b / v for b, v in zip(base, values, strict=True))
        rows.append(
            {
                "kind": name,
                "step_seconds": statistics.median(values),
                f"speed_of_{first}": statistics.median(ratios),
                "quartiles": [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],
            }
        )
    if as_json:
        facts = {
            "np": here.world.size,
            "operations": here.world.operations,
            "precision": config.train.precision,
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "settings": overrides,
            "peak_memory_mib": peak_memory_bytes() / 2**20,
        }
        print(json.dumps({**facts, "rows": rows}))
        return
    print(f"np {here.world.size}, {here.world.operations}, {config.train.precision}, 1 thread a rank")
    for row in rows:
        low, high = row["quartiles"]
        print(
            f"{row['kind']:20s} {row['step_seconds'] * 1000:8.1f} ms   {row[f'speed_of_{first}']:.3f} of {first}'s speed "
            f"(quartiles {low:.3f} to {high:.3f})"
        )


if __name__ == "__main__":
    main()
