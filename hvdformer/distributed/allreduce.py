"""Fusion by allreduce: every step, every rank gets the sum of all ranks' gradients and makes the same update.

The parameters of Horovod's `DistributedOptimizer` (arXiv 1802.05799) are the flat buckets of buckets.py, not the many
tensors of the model. The allreduce of a bucket starts as soon as the last micro-batch's backward has filled it, and
runs in place beside the rest of backward. Given the model's own tensors, Horovod negotiates each of them and copies
them into its fusion buffer and out again. Over a ring each rank sends 2 (n-1)/n of the gradients' bytes a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hvdformer.config import FusionConfig
from hvdformer.distributed.buckets import Bucket


class AllreduceFusion:
    """Wraps an optimizer of buckets so that their gradients are summed over all ranks before the update.

    The buckets are fixed. What Horovod fuses by itself depends on arrival times, and at three or more ranks
    floating-point sums depend on what is fused (Horovod issue 2642), so tuning.py turns it off
    (HOROVOD_FUSION_THRESHOLD=0): the same run then gives the same bits.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        buckets: Sequence[Bucket],
        settings: FusionConfig,
        backward_passes: int,
    ) -> None:
        """Every rank calls this with the same buckets.

        backward_passes: micro-batches of this rank in a step; ranks may differ.
        """
        import horovod.torch as hvd

        self._buckets = buckets
        self._fills = [backward_passes * len(bucket.parameters) for bucket in buckets]
        self._missing = list(self._fills)  # gradients still to come until a bucket is full
        self.optimizer = hvd.DistributedOptimizer(
            optimizer,
            named_parameters=[(f"bucket {number}", bucket.flat) for number, bucket in enumerate(buckets)],
            compression=hvd.Compression.fp16 if settings.wire == "fp16" else hvd.Compression.none,
            op=hvd.Sum,
        )
        if hvd.size() > 1:  # alone there is nothing to reduce, and DistributedOptimizer reduces nothing
            for number, bucket in enumerate(buckets):
                for parameter in bucket.parameters:
                    parameter.register_post_accumulate_grad_hook(
                        lambda _, number=number: self._filled(number)
                    )

    def _filled(self, number: int) -> None:
        """One more gradient of a bucket is there; with the last one, start its allreduce.

        DistributedOptimizer does this in hooks on its own parameters, but the buckets are no part of the graph. What
        is not started here, `synchronize` starts.
        """
        self._missing[number] -= 1
        if self._missing[number] == 0:
            flat = self._buckets[number].flat
            self.optimizer._handles[flat] = self.optimizer._allreduce_grad_async(flat)

    def reduce(self) -> None:
        """Wait until every gradient is the sum over all ranks. Each rank calls it once a step, after backward."""
        self.optimizer.synchronize()
        self._missing = list(self._fills)

    def update(self, scaler: torch.amp.GradScaler) -> None:
        """Apply the reduced (and possibly clipped) gradients, then clear them."""
        with self.optimizer.skip_synchronize():  # reduce() has run: without this they would be summed twice
            scaler.step(self.optimizer)
        for bucket in self._buckets:
            bucket.flat.grad = bucket.gradient  # with fp16 on the wire the reduced gradient is another tensor
            bucket.gradient.zero_()
