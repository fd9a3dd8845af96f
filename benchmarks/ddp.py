"""The same training step with torch's DistributedDataParallel over gloo: what hvdformer is compared with.

    torchrun --nproc-per-node 2 -m benchmarks.ddp [--own-loss] key=value ...

Model, data, micro-batches, precision, loss, clipping and optimizer are hvdformer's own; only the fusion of the gradients is
DDP's. With --own-loss the loss is PyTorch's too, as in benchmarks/plain.py: what a user has who does without hvdformer.

DDP is set up as its documentation advises where speed matters: gradients are views of the buckets, so that nothing is
copied; all micro-batches but the last go under no_sync; buffers are not broadcast. Prints one JSON object from rank 0: the
wall-clock time at the end of each step, and the loss of the last one.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.plain import adamw, mean_loss
from benchmarks.workloads import load, open_loader
from hvdformer.config import Config
from hvdformer.data.loader import Batch
from hvdformer.optim import learning_rate
from hvdformer.precision import autocast
from hvdformer.tasks import causal_lm


class WithLoss(torch.nn.Module):
    """A model whose output is its loss: DDP hears of a forward only if it is called itself."""

    def __init__(self, model: torch.nn.Module, config: Config, own_loss: bool) -> None:
        super().__init__()
        self.model, self.config, self.own_loss = model, config, own_loss

    def forward(self, batch: Batch) -> torch.Tensor:
        """The mean loss of a micro-batch."""
        if self.own_loss:
            return mean_loss(self.model, batch, self.config.train.precision)
        with autocast(batch.tokens.device, self.config.train.precision):
            loss, count = causal_lm.loss_sum(self.model, batch)
        return loss / count


def main(overrides: list[str]) -> None:
    own_loss = "--own-loss" in overrides
    config = load([override for override in overrides if override != "--own-loss"])
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    train = config.train
    num_micro_batches = train.global_batch // train.micro_batch
    loader = open_loader(config, rank, size)
    model = causal_lm.build_model(config)
    replica = DistributedDataParallel(
        WithLoss(model, config, own_loss), gradient_as_bucket_view=True, broadcast_buffers=False
    )
    optimizer = adamw(model, config)
    times = []
    for step in range(train.steps):
        batches = loader.step(step * train.global_batch)
        total = torch.zeros((), dtype=torch.float64)
        for number, batch in enumerate(batches):
            with nullcontext() if number == len(batches) - 1 else replica.no_sync():
                loss = replica(batch) / num_micro_batches
                (loss * size).backward()  # DDP divides by the number of ranks
                total += loss.detach()
        dist.all_reduce(total)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optim, train.steps, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # the gradients are views of DDP's buckets
        times.append(time.time())
    loader.close()
    if rank == 0:
        print(json.dumps({"times": times, "loss": total.item()}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
