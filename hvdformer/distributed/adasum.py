"""Fusion by Adasum (arXiv 2006.02924, equation 2), Horovod's: sums what the ranks' gradients have apart, averages what they share.

Two gradients a and b become (1 - a.b / 2|a|^2) a + (1 - a.b / 2|b|^2) b: their sum if they are orthogonal, their mean if
they are equal; more than two by recursive halving, so the world size is a power of two. Each rank sends 2 (n-1)/n of
the gradients' bytes a step, and a few numbers.

It is applied to the gradients, each rank's the mean over its own targets, before the one optimizer. Horovod's
DistributedOptimizer applies it to what each rank's own optimizer makes of them, with moments that differ from rank to
rank: those could not be saved as one state that another world size goes on with.
"""

from __future__ import annotations

from collections.abc import Sequence

from hvdformer.config import FusionConfig
from hvdformer.distributed import comm
from hvdformer.distributed.buckets import Bucket
from hvdformer.distributed.fusion import Fusion, MakeOptimizer, Share, refuse
from hvdformer.errors import UserError


class AdasumFusion(Fusion):
    """Needs Horovod's MPI operations."""

    averages_locally = True

    def __init__(
        self, settings: FusionConfig, buckets: Sequence[Bucket], make_optimizer: MakeOptimizer, share: Share
    ) -> None:
        super().__init__(settings, buckets, make_optimizer, share)

    @staticmethod
    def cannot(world: comm.World) -> UserError | None:
        """Why Adasum cannot work in this job, if so."""
        if world.size & (world.size - 1):
            return refuse(
                "adasum", f"{world.size} ranks", "It halves the ranks: start 1, 2, 4, 8, ... of them."
            )
        if world.size > 1 and world.operations != "MPI":
            return refuse(
                "adasum",
                f"CPU operations are {world.operations}",
                "Horovod has Adasum for MPI only: start with mpirun or `horovodrun --mpi`, or take another kind.",
            )
        return None

    def reduce(self, scale: float) -> bool:
        """Adasum of the gradients of all ranks."""
        import horovod.torch as hvd

        if self.share.size == 1:
            for bucket in self.buckets:
                bucket.gradient.mul_(scale)
            return True
        handles = []
        for number, bucket in enumerate(self.buckets):
            bucket.gradient.mul_(scale)
            handles.append(hvd.allreduce_async_(bucket.gradient, name=f"bucket {number}", op=hvd.Adasum))
            self._count_allreduce(bucket.gradient.nbytes)
        for handle in handles:
            comm.result(handle)
        return True
