"""All kinds of fusion behind one setting, fusion.kind."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from hvdformer.config import FusionConfig
from hvdformer.distributed.adasum import AdasumFusion
from hvdformer.distributed.allreduce import AllreduceFusion
from hvdformer.distributed.bf16 import Bf16Fusion
from hvdformer.distributed.buckets import flatten
from hvdformer.distributed.comm import World
from hvdformer.distributed.diloco import DiLoCoFusion
from hvdformer.distributed.exact import ExactFusion
from hvdformer.distributed.fusion import Fusion, MakeOptimizer, Share
from hvdformer.distributed.local_sgd import LocalSGDFusion
from hvdformer.distributed.zero1 import Zero1Fusion

KINDS: dict[str, type[Fusion]] = {
    "allreduce": AllreduceFusion,
    "adasum": AdasumFusion,
    "exact": ExactFusion,
    "local_sgd": LocalSGDFusion,
    "diloco": DiLoCoFusion,
    "zero1": Zero1Fusion,
}


def check_fusion(settings: FusionConfig, world: World) -> None:
    """Refuse a kind that cannot work in this job, before anything starts.

    Raises:
        UserError: which kind, why, and what to do instead.
    """
    if settings.kind == "adasum" and (error := AdasumFusion.cannot(world)):
        raise error


def build_fusion(
    settings: FusionConfig,
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    make_optimizer: MakeOptimizer,
    share: Share,
) -> Fusion:
    """Lay the parameters out in buckets and make the fusion of the kind that is asked for. Every rank calls it."""
    kind = Bf16Fusion if settings.wire == "bf16" else KINDS[settings.kind]
    # Slices of equal length for every rank, where the kind cuts buckets up.
    multiple_of = share.size if kind in (Bf16Fusion, Zero1Fusion) else 1
    buckets = flatten(named_parameters, settings.bucket_mib, multiple_of)
    return kind(settings, buckets, make_optimizer, share)
