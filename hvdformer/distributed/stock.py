"""Horovod as it comes, for comparison: none of the settings of tuning.py, and the model's own tensors instead of buckets."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch

from hvdformer.distributed.comm import World


def connect() -> World:
    """Start Horovod with its own settings. Every rank of the job calls it, first of all."""
    import horovod.torch as hvd

    hvd.init()
    name = "MPI" if hvd.mpi_enabled() else "Gloo"
    return World(hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size(), controller=name, operations=name)


def wrap(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    passes_per_step: int,
) -> Any:
    """The optimizer as a DistributedOptimizer whose `synchronize` leaves the sum of all ranks' gradients. No collective."""
    import horovod.torch as hvd

    return hvd.DistributedOptimizer(
        optimizer,
        named_parameters=named_parameters,
        backward_passes_per_step=passes_per_step,
        op=hvd.Sum,
    )


def time_allreduce(num_bytes: int, repeats: int, device: torch.device) -> list[float]:
    """Seconds of each of `repeats` allreduces of this many bytes of fp32, after three others.

    Every rank calls it, in a job that `comm.connect` or `connect` started. All ranks wait for one another before each.
    """
    import horovod.torch as hvd

    tensor = torch.ones(max(1, num_bytes // 4), device=device)
    seconds = []
    for number in range(repeats + 3):
        hvd.allreduce_(torch.zeros(1), op=hvd.Sum, name="start together")
        began = time.perf_counter()
        hvd.allreduce_(tensor, op=hvd.Sum, name="timed")
        if number >= 3:
            seconds.append(time.perf_counter() - began)
        tensor.fill_(1)
    return seconds
