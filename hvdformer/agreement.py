"""What the ranks compare so that they stay one run: software, config and data before it, weights during it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hvdformer.distributed import comm
from hvdformer.distributed.comm import World
from hvdformer.errors import RunError, UserError
from hvdformer.state import TrainState, tensors_sha256

_MAX_SKIPPED_IN_A_ROW = 10


def agree(facts: dict[str, Any], world: World) -> None:
    """Compare what decides the run on all ranks, before the first step. Every rank calls it.

    A difference ends the job; of an elastic one only the rank that differs from rank 0.
    """
    places = comm.gather_json({**facts, "host": comm.host_name()}, "agreement")
    for rank, theirs in enumerate(places):
        different = [key for key in facts if theirs[key] != places[0][key]]
        if different:
            key = different[0]
            message = (
                f"rank {rank} on {theirs['host']} has another {key} than rank 0 on {places[0]['host']}: "
                f"{_difference(theirs[key], places[0][key])}. Give all hosts the same files and software."
            )
            if not world.is_elastic:
                raise comm.Agreed(message, UserError.exit_code)
            if world.rank == rank:
                raise UserError(message)


def agree_on_weights(state: TrainState, when: str) -> None:
    """Compare the weights of all ranks by hash. Every rank calls it."""
    hashes = comm.gather_json(tensors_sha256(state.weights()), "weights hash")
    odd = [rank for rank, value in enumerate(hashes) if value != hashes[0]]
    if odd:
        raise comm.Agreed(
            f"{when} the weights of rank {', '.join(map(str, odd))} differ from rank 0's: the replicas are no longer one "
            "model. Run `hvdformer doctor` under the same launcher; the last checkpoint is untouched.",
            RunError.exit_code,
        )


def check_replicas(state: TrainState, when: str) -> None:
    """Compare the weights of all ranks by the sums of their bits, bucket by bucket. Every rank calls it."""
    buckets = state.fusion.buckets
    own = [int(bucket.flat.detach().view(torch.int32).sum(dtype=torch.int64)) for bucket in buckets]
    everyone = comm.gather_json(own, "replicas")
    for number, values in enumerate(zip(*everyone, strict=True)):
        odd = [rank for rank, value in enumerate(values) if value != values[0]]
        if odd:
            names = buckets[number].names
            raise comm.Agreed(
                f"{when} the weights of {comm.ranks(odd)} differ from rank 0's, first among {names[0]}"
                + (f" to {names[-1]}" if len(names) > 1 else "")
                + ": the replicas are no longer one model. A memory or a network is at fault, or the software differs: "
                "run `hvdformer doctor` under the same launcher; the last checkpoint is untouched.",
                RunError.exit_code,
            )


def not_finite(state: TrainState, backward: Callable[[], Any], policy: str, step: int) -> str:
    """Find where the infinity or NaN comes from, and do what `train.nonfinite` says. Every rank calls it.

    The gradients are computed once more, which gives the same bits, and are not fused: so each rank sees its own.
    Returns what the user should hear of a step that is skipped.
    """
    fusion = state.fusion
    fusion.clear()
    with fusion.paused():
        backward()
        bad = [
            n for n, p in state.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()
        ]
    fusion.clear()
    found = comm.gather_json([comm.host_name(), bad[-1:], len(bad)], "gradients that are not finite")
    places = [
        f"rank {rank} on {host} in {name[0]}" + (f" and {count - 1} other parameters" if count > 1 else "")
        for rank, (host, name, count) in enumerate(found)
        if count
    ]
    shown = ", ".join(places[:4]) + (f" and {len(places) - 4} more ranks" if len(places) > 4 else "")
    message = (
        f"step {step}: the gradient is infinite or NaN, first on {shown}"
        if places
        else (
            f"step {step}: the gradient is infinite or NaN, though that of every rank by itself is finite: the sum overflowed"
        )
    )
    counters = state.counters
    counters.skipped_steps += 1
    counters.skipped_in_a_row += 1
    if policy == "skip" and counters.skipped_in_a_row < _MAX_SKIPPED_IN_A_ROW:
        return f"{message}. Nothing is updated in this step, on no rank (train.nonfinite=skip)."
    reason = f" It is the {counters.skipped_in_a_row}th step in a row." if policy == "skip" else ""
    raise comm.Agreed(
        f"{message}.{reason} The run ends before the weights are harmed: start it again with a lower "
        "optim.learning_rate, a longer optim.warmup_steps or train.precision=fp32; train.nonfinite=skip leaves out "
        "single steps.",
        RunError.exit_code,
    )


def _difference(theirs: Any, ours: Any) -> str:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        key = next(key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key))
        return f"{key} " + _difference(theirs.get(key), ours.get(key))
    return f"{theirs!r} against {ours!r}"
