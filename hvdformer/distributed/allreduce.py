"""Fusion by allreduce: every step, every rank gets the sum of all ranks' gradients and makes the same update.

Horovod's `DistributedOptimizer` (arXiv 1802.05799) starts the allreduce of a bucket of gradients as soon as the
last micro-batch's backward has filled it, so that communication runs beside the rest of backward. Over a ring each
rank sends 2 (n-1)/n of the gradients' bytes a step.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from hvdformer.config import FusionConfig


class AllreduceFusion:
    """Wraps an optimizer so that its gradients are summed over all ranks before the update.

    The buckets are fixed (Horovod's own fusion depends on arrival times, and at three or more ranks floating-point
    sums depend on the fusion: Horovod issue 2642), so the same run gives the same bits.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        settings: FusionConfig,
        backward_passes: int,
    ) -> None:
        """Every rank calls this with the same parameters.

        backward_passes: micro-batches of this rank in a step; ranks may differ.
        """
        import horovod.torch as hvd

        named = list(named_parameters)
        self.optimizer = hvd.DistributedOptimizer(
            optimizer,
            named_parameters=named,
            compression=hvd.Compression.fp16 if settings.wire == "fp16" else hvd.Compression.none,
            backward_passes_per_step=backward_passes,
            op=hvd.Sum,
            groups=fixed_buckets([parameter for _, parameter in named], settings.bucket_mib),
        )

    def reduce(self) -> None:
        """Wait until every gradient is the sum over all ranks. Each rank calls it once a step, after backward."""
        self.optimizer.synchronize()

    def update(self, scaler: torch.amp.GradScaler) -> None:
        """Apply the reduced (and possibly clipped) gradients, then clear them."""
        with self.optimizer.skip_synchronize():  # reduce() has run: without this they would be summed twice
            scaler.step(self.optimizer)
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


def fixed_buckets(parameters: list[torch.nn.Parameter], bucket_mib: float) -> list[list[torch.nn.Parameter]]:
    """Cut the parameters into runs of about `bucket_mib` MiB, in the order in which backward fills them (the last first).

    A parameter larger than a bucket gets one of its own. The result depends on the shapes alone.
    """
    limit = bucket_mib * 2**20
    buckets: list[list[torch.nn.Parameter]] = []
    filled = 0
    for parameter in reversed(parameters):
        nbytes = parameter.numel() * parameter.element_size()
        if not buckets or filled + nbytes > limit:
            buckets.append([])
            filled = 0
        buckets[-1].append(parameter)
        filled += nbytes
    return buckets
