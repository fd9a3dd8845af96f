"""Initialise the replicas: one rank's weights and state on every rank, and proof by hash that they agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hvdformer import checkpoint
from hvdformer.agreement import agree_on_weights
from hvdformer.distributed import comm
from hvdformer.state import Survivor, TrainState, is_of_fusion


def initialise(state: TrainState, start: Path | None) -> None:
    """Bring rank 0's weights, and the whole state if there is a checkpoint, to every rank. Every rank calls it."""
    if start is not None:

        def load() -> dict[str, Any]:
            checkpoint.load_tensors(start, checkpoint.MODEL_FILE, dict(state.weights()))
            specs = checkpoint.tensor_specs(start, checkpoint.OPTIMIZER_FILE)
            state.make_optimizer_tensors(specs)
            tensors = dict(state.optimizer_tensors())
            # What only some kinds of fusion keep: begun anew if it is not there, passed over if it is not wanted.
            wanted = {name: t for name, t in tensors.items() if name in specs or not is_of_fusion(name)}
            surplus = [name for name in specs if name not in tensors and is_of_fusion(name)]
            checkpoint.load_tensors(start, checkpoint.OPTIMIZER_FILE, wanted, ignored=surplus)
            return {"specs": specs, "state": checkpoint.read_state(start)}

        loaded = comm.on_rank_0(load, "load")
        if next(state.optimizer_tensors(), None) is None:  # not rank 0
            state.make_optimizer_tensors(loaded["specs"])
        state.load_dict(loaded["state"])
    _spread(state, root=0)


def newest_survivor(survivor: Survivor) -> tuple[int, int]:
    """(rank, step) of the newest state that a rank still holds in memory; step -1: none does. Every rank calls it.

    A rank may be a step behind: it had not heard the end of a collective that others had.
    """
    steps = comm.gather_json(survivor.step, "survivors")
    return steps.index(max(steps)), max(steps)


def initialise_from_survivor(state: TrainState, survivor: Survivor, root: int) -> None:
    """Bring the state that rank `root` holds in memory to every rank, as `survivor` too. Every rank calls it."""
    held = survivor.state if comm.rank() == root else None
    specs = {}
    if held is not None:
        specs = {
            name: (list(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in held.optimizer_tensors()
        }
    told = {
        "specs": specs,
        "values": survivor.values,
        "record": survivor.record,
        "validation": survivor.validation,
    }
    told = comm.broadcast_json(told, "survivor", root)
    state.make_optimizer_tensors(told["specs"])
    if held is not None:
        source = dict(held.tensors())
        for name, tensor in state.tensors():
            tensor.copy_(source[name])
    state.load_dict(told["values"])
    _spread(state, root)
    survivor.note(state, told["record"])
    survivor.validation = tuple(told["validation"])


def _spread(state: TrainState, root: int) -> None:
    comm.broadcast_tensors(state.tensors(), "initialise", root)
    state.fusion.state_is_loaded()
    agree_on_weights(state, "after the broadcast of the initial state")
