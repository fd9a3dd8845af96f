"""A rank of what `hvdformer bench` compares a run with: python -m hvdformer.bench_rank WHAT OUT ...

horovod [CONFIG.yaml] key=value ...   the same training by Horovod's DistributedOptimizer as its documentation shows it
allreduce DEVICE THREADS              what the collective takes under hvdformer's settings, for several sizes

Rank 0 writes OUT, one JSON object.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hvdformer import runtime
from hvdformer.config import load_config
from hvdformer.data.loader import BatchLoader
from hvdformer.data.partition import local_micro_batches
from hvdformer.distributed import comm, stock
from hvdformer.optim import build_optimizer, learning_rate
from hvdformer.precision import autocast
from hvdformer.tasks import causal_lm

ALLREDUCE_BYTES = (2**12, 2**16, 2**18, 2**20, 2**22, 2**24, 2**26)


def main(what: str, out: str, *settings: str) -> None:
    """Every rank calls it with the same arguments."""
    told = train_by_horovod(settings) if what == "horovod" else time_allreduces(*settings)
    if comm.is_first():
        Path(out).write_text(json.dumps(told), encoding="utf-8")
    comm.disconnect()


def train_by_horovod(settings: Sequence[str]) -> dict[str, Any]:
    """The time at which each step ended, in seconds since 1970, and the loss of the last one.

    settings: [CONFIG.yaml] key=value ..., as for `hvdformer train`.
    """
    path = Path(settings[0]) if "=" not in settings[0] else None
    config = load_config(path, settings[1:] if path else settings)
    train = config.train
    world = stock.connect()
    on_gpu = runtime.uses_gpu(train.device)
    device = torch.device("cuda", world.local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if train.threads is not None:
        torch.set_num_threads(train.threads)
    examples = causal_lm.open_examples(config, world)
    config = runtime.resolve(config, device, examples.tokenizer.vocab_size, torch.get_num_threads())
    num_micro_batches = train.global_batch // train.micro_batch
    mine = local_micro_batches(num_micro_batches, world.rank, world.size)
    loader = BatchLoader(
        examples.train,
        weights=examples.weights,
        seed=train.seed,
        micro_batch=train.micro_batch,
        num_micro_batches=num_micro_batches,
        rank=world.rank,
        size=world.size,
        document_mask=config.data.document_mask,
        shuffle=config.data.shuffle,
        device=device,
    )
    model = causal_lm.build_model(config).to(device)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    optimizer = stock.wrap(
        build_optimizer(matrices, vectors, config.optim, device), model.named_parameters(), len(mine)
    )
    targets = train.global_batch * config.model.context_length
    times, loss_sum = [], 0.0
    for step in range(train.steps):
        loss_sum = 0.0
        for batch in loader.step(step * train.global_batch):
            with autocast(device, config.train.precision):
                loss, _ = causal_lm.loss_sum(model, batch)
            (loss / targets).backward()
            loss_sum += float(loss.detach())
        optimizer.synchronize()
        if config.optim.clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optim, train.steps, step)
        with optimizer.skip_synchronize():
            optimizer.step()
        model.zero_grad(set_to_none=False)
        times.append(time.time())
    loader.close()
    total = comm.sum_over_ranks([round(loss_sum * 2**20)], "loss")[0] / 2**20
    return {"times": times, "loss": total / targets}


def time_allreduces(device: str, threads: str) -> dict[str, Any]:
    """The median seconds of an allreduce of each size."""
    here = runtime.start(device, int(threads))
    points = []
    for num_bytes in ALLREDUCE_BYTES:
        seconds = stock.time_allreduce(num_bytes, repeats=15, device=here.device)
        points.append({"np": here.world.size, "bytes": num_bytes, "seconds": statistics.median(seconds)})
    return {"allreduce": points}


if __name__ == "__main__":
    main(*sys.argv[1:])
