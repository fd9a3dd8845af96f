"""The whole state of a run as one object: if exact resume needs it, it is here, and it does not know the world size."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from hvdformer.distributed.fusion import ADAMW_KEYS, Fusion
from hvdformer.errors import UserError
from hvdformer.guards import SpikeGuard
from hvdformer.precision import LossScale


@dataclass
class Counters:
    """How far the run is. Position is examples consumed by all ranks; tokens are the targets trained on."""

    step: int = 0
    position: int = 0
    tokens: int = 0
    train_seconds: float = 0.0  # without validation and saving
    total_bytes_sent: int = 0  # by rank 0 to fuse results
    skipped_steps: int = 0  # steps whose gradient was not finite and changed nothing
    skipped_in_a_row: int = 0


class TrainState:
    """Weights, optimizer state, loss scale and counters, each under a stable name.

    Randomness needs no state: dropout and data order are functions of (seed, step, micro-batch) and of
    (seed, epoch, position).
    """

    def __init__(
        self,
        model: torch.nn.Module,
        fusion: Fusion,
        loss_scale: LossScale | None = None,
        spikes: SpikeGuard | None = None,
    ) -> None:
        """fusion: of the buckets in which the model's parameters lie, with the optimizer."""
        self.model = model
        self.fusion = fusion
        self.loss_scale = loss_scale or LossScale(False)
        self.spikes = spikes or SpikeGuard(None)
        self.counters = Counters()

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of every parameter, tied ones once, in order of definition."""
        for name, parameter in self.model.named_parameters():
            yield name, parameter.detach()

    def optimizer_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """("parameter name/key", tensor) of the state of optimizer and fusion: moments, step counts. Empty before step 1.

        Moments are views of those of the buckets, so how the parameters were bucketed does not show.
        """
        for number, bucket in enumerate(self.fusion.buckets):
            for key, value in sorted(self.fusion.state_of(number).items()):
                views = bucket.views(value) if value.ndim else dict.fromkeys(bucket.names, value)
                for name, view in views.items():
                    yield f"{name}/{key}", view

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the state, prefixed by its kind: what resume has to bring to all ranks."""
        for name, tensor in self.weights():
            yield f"weights/{name}", tensor
        for name, tensor in self.optimizer_tensors():
            yield f"optimizer/{name}", tensor

    def make_optimizer_tensors(self, specs: dict[str, tuple[list[int], str]]) -> None:
        """Allocate the optimizer's state for the given {"parameter name/key": (shape, dtype)}, to be filled in place.

        Raises:
            UserError: the state is not that of these parameters.
        """
        shapes = {name: list(parameter.shape) for name, parameter in self.model.named_parameters()}
        for name, (shape, _) in specs.items():
            if list(shape) not in ([], shapes.get(name.rpartition("/")[0])):
                raise UserError(
                    f"the optimizer state {name} of shape {shape} belongs to no parameter of this model"
                )
        for number, bucket in enumerate(self.fusion.buckets):
            prefix = f"{bucket.names[0]}/"
            self.fusion.make_state(
                number,
                {
                    name.removeprefix(prefix): (bool(shape), getattr(torch, dtype))
                    for name, (shape, dtype) in specs.items()
                    if name.startswith(prefix)
                },
            )

    def to_dict(self) -> dict[str, object]:
        """The part of the state that is not tensors, for JSON."""
        return {
            **asdict(self.counters),
            "loss_scaler": self.loss_scale.to_dict(),
            "gradient_norms": self.spikes.to_dict(),
            **self.fusion.to_dict(),
        }

    def load_dict(self, values: dict[str, Any]) -> None:
        """Take over what `to_dict` gave."""
        defaults = asdict(Counters())
        self.counters = Counters(**{key: values.get(key, default) for key, default in defaults.items()})
        self.loss_scale.load_dict(values.get("loss_scaler"))
        self.spikes.load_dict(values.get("gradient_norms"))
        self.fusion.load_dict(values)


@dataclass
class Survivor:
    """What this process holds of a run when ranks have left or joined and the job is put together anew (elastic.py).

    Between two steps the tensors of the state stay as the last step left them, so nothing is copied. What else a step
    changes before it is complete is small, and is noted here.
    """

    state: TrainState | None = None
    values: dict[str, Any] = field(default_factory=dict)  # state.to_dict() after the last step
    record: dict[str, Any] | None = None  # metrics of the last step, if they are logged
    validation: tuple[dict[str, Any] | None, int | None] = (None, None)  # the newest one and its step
    is_updating: bool = False

    def note(self, state: TrainState, record: dict[str, Any] | None) -> None:
        """A step is complete."""
        self.state, self.values, self.record, self.is_updating = state, state.to_dict(), record, False

    @property
    def step(self) -> int:
        """The step whose state is here, whole and the same as on every other rank that has it; -1: none is."""
        if self.state is None or self.is_updating or not self.state.fusion.is_replicated:
            return -1
        step = int(self.values["step"])
        return step if step % self.state.fusion.every == 0 else -1


def is_of_fusion(name: str) -> bool:
    """Whether an optimizer tensor is kept by a kind of fusion: other kinds do without it."""
    return name.rpartition("/")[2] not in ADAMW_KEYS


def tensors_sha256(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """A hash of names, dtypes, shapes and bits, whatever the order and the device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {array.dtype} {tuple(array.shape)}\n".encode())
        digest.update(array.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
