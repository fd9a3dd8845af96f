"""Fusion by allreduce with bfloat16 on the wire: half the traffic of fp32, and sums in fp32.

Horovod knows no bfloat16, so a bucket travels as bytes: rank r gets slice r of every rank's gradient (alltoall), adds
them in fp32 in the order of the ranks, and sends the sum, rounded once more, to all (allgather). This is the
reduce-scatter and allgather of a ring allreduce, with one rounding before the sum and one after it however many ranks
there are. Each rank sends 2 (n-1)/n of the gradients' bytes in bf16 a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hvdformer.config import FusionConfig
from hvdformer.distributed import comm
from hvdformer.distributed.buckets import Bucket, Watch
from hvdformer.distributed.fusion import Fusion, MakeOptimizer, Share

# n ranks, K numbers in a rank's slice of a bucket


class Bf16Fusion(Fusion):
    """The alltoall of a bucket starts when backward has filled it; the rest follows in `reduce`."""

    def __init__(
        self, settings: FusionConfig, buckets: Sequence[Bucket], make_optimizer: MakeOptimizer, share: Share
    ) -> None:
        """buckets: padded to a multiple of the world size."""
        super().__init__(settings, buckets, make_optimizer, share)
        self._handles: dict[int, int] = {}
        if share.size > 1:
            self._watch = Watch(buckets, share.micro_batches, self._start)

    def _start(self, number: int) -> None:
        import horovod.torch as hvd

        wire = self.buckets[number].gradient.to(torch.bfloat16).view(torch.uint8)
        self._handles[number] = hvd.alltoall_async(wire, name=f"bucket {number} slices")

    def reduce(self, scale: float) -> bool:
        """Bring the sum over all ranks into every gradient."""
        import horovod.torch as hvd

        if self._watch is None:
            return True
        gathers = []
        for number in range(len(self.buckets)):
            if number not in self._handles:
                self._start(number)
            received, _ = comm.result(self._handles.pop(number))
            slices = received.view(torch.bfloat16).view(self.share.size, -1)  # (n, K)
            total = slices[0].float()
            for other in slices[1:]:
                total += other
            wire = total.to(torch.bfloat16).view(torch.uint8)
            gathers.append(hvd.allgather_async(wire, name=f"bucket {number} sums"))
        for bucket, handle in zip(self.buckets, gathers, strict=True):
            bucket.gradient.copy_(comm.result(handle).view(torch.bfloat16))
            self._count_scatter(2 * 2 * bucket.flat.numel())
        self._watch.reset()
        return True
