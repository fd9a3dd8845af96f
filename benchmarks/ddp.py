"""The same training step with torch's DistributedDataParallel over gloo: what hvdformer is compared with.

Model, data, micro-batches, precision, clipping and optimizer are hvdformer's own; only the fusion of the gradients is
DDP's. Started by benchmarks.throughput, one process per rank, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set.
Prints one JSON object from rank 0: the wall-clock time at the end of each step.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from hvdformer.config import load_config
from hvdformer.data.loader import BatchLoader, Sequences
from hvdformer.data.shards import open_shards
from hvdformer.data.standard_library import prepare_standard_library
from hvdformer.optim import build_optimizer, learning_rate
from hvdformer.precision import autocast
from hvdformer.tasks import causal_lm


def main(overrides: list[str]) -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    dist.init_process_group("gloo")
    config = load_config(None, [*overrides, "model.vocab_size=257"])
    train, device = config.train, torch.device("cpu")
    sequences = Sequences(
        open_shards(prepare_standard_library(causal_lm.default_cache())), config.model.context_length
    )
    loader = BatchLoader(
        [sequences],
        weights=[1.0],
        seed=train.seed,
        micro_batch=train.micro_batch,
        num_micro_batches=train.global_batch // train.micro_batch,
        rank=rank,
        size=size,
        document_mask=False,
        shuffle=True,
        device=device,
    )
    model = causal_lm.build_model(config)
    replica = DistributedDataParallel(model, gradient_as_bucket_view=True)
    parameters = list(model.parameters())
    matrices, vectors = ([p for p in parameters if (p.ndim >= 2) == decays] for decays in (True, False))
    optimizer = build_optimizer(matrices, vectors, config.optim, device)
    targets = train.global_batch * config.model.context_length
    times = []
    for step in range(train.steps):
        batches = loader.step(step * train.global_batch)
        loss_sum = torch.zeros((), dtype=torch.float64)
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with nullcontext() if last else replica.no_sync():
                with autocast(device, train.precision):
                    logits = replica(batch.tokens[:, :-1])
                    loss = F.cross_entropy(
                        logits.flatten(0, 1).float(), batch.tokens[:, 1:].flatten(), reduction="sum"
                    )
                (loss * size / targets).backward()  # DDP divides by the number of ranks
                loss_sum += loss.detach()
        dist.all_reduce(loss_sum)
        torch.nn.utils.clip_grad_norm_(parameters, config.optim.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optim, train.steps, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # the gradients are views of DDP's buckets
        times.append(time.time())
    if rank == 0:
        print(json.dumps({"times": times, "loss": loss_sum.item() / targets}))
    loader.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
