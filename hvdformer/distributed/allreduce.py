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
from hvdformer.distributed import comm
from hvdformer.distributed.buckets import Bucket, Watch
from hvdformer.distributed.fusion import Fusion, MakeOptimizer, Share

# Gradients of a mean over many targets are tiny, and fp16 ends at 6e-8: as numbers of about 1 they keep their bits.
# A sum above 64 (fp16 ends at 65,504) becomes infinite, which the gradient norm shows.
_FP16_SCALE = 1024.0


class AllreduceFusion(Fusion):
    """Horovod's DistributedOptimizer over the buckets.

    The buckets are fixed. What Horovod fuses by itself depends on arrival times, and at three or more ranks
    floating-point sums depend on what is fused (Horovod issue 2642), so tuning.py turns it off
    (HOROVOD_FUSION_THRESHOLD=0): the same run then gives the same bits.
    """

    def __init__(
        self, settings: FusionConfig, buckets: Sequence[Bucket], make_optimizer: MakeOptimizer, share: Share
    ) -> None:
        import horovod.torch as hvd

        super().__init__(settings, buckets, make_optimizer, share)
        self._bytes_a_number = 2 if settings.wire == "fp16" else 4
        self.optimizer = hvd.DistributedOptimizer(
            self.optimizer,
            named_parameters=[(f"bucket {number}", bucket.flat) for number, bucket in enumerate(buckets)],
            compression=_Fp16 if settings.wire == "fp16" else hvd.Compression.none,
            op=hvd.Sum,
        )
        if share.size > 1:  # alone there is nothing to reduce, and DistributedOptimizer reduces nothing
            self._watch = Watch(buckets, share.micro_batches, self._start)

    def _start(self, number: int) -> None:
        """Start the allreduce of a bucket that backward has filled.

        DistributedOptimizer does this in hooks on its own parameters, but the buckets are no part of the graph. What
        is not started here, `synchronize` starts.
        """
        flat = self.buckets[number].flat
        self.optimizer._handles[flat] = self.optimizer._allreduce_grad_async(flat)

    def reduce(self, scale: float) -> bool:
        """Wait until every gradient is the sum over all ranks."""
        for handle, _ in self.optimizer._handles.values():
            comm.sleep_until_done(handle)
        self.optimizer.synchronize()
        if self._watch:
            self._watch.reset()
        self._count_allreduce(sum(bucket.flat.numel() for bucket in self.buckets) * self._bytes_a_number)
        return True

    def _step(self, learning_rate: float) -> None:
        with self.optimizer.skip_synchronize():  # reduce() has run: without this they would be summed twice
            super()._step(learning_rate)


class _Fp16:
    """Horovod's interface of a compressor; its own leaves the sum in a new tensor, which the model would not see."""

    @staticmethod
    def compress(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (tensor * _FP16_SCALE).half(), tensor

    @staticmethod
    def decompress(tensor: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
        return original.copy_(tensor).div_(_FP16_SCALE)
