"""The whole state of a run as one object: if exact resume needs it, it is here, and it does not know the world size."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hvdformer.distributed.buckets import Bucket
from hvdformer.errors import UserError


@dataclass
class Counters:
    """How far the run is. Position is examples consumed by all ranks; tokens are the targets trained on."""

    step: int = 0
    position: int = 0
    tokens: int = 0
    train_seconds: float = 0.0


class TrainState:
    """Weights, optimizer state, loss scale and counters, each under a stable name.

    Randomness needs no state: dropout and data order are functions of (seed, step, micro-batch) and of
    (seed, epoch, position).
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        buckets: Sequence[Bucket],
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        """optimizer: of the buckets' flat parameters, in which the model's parameters lie."""
        self.model = model
        self.optimizer = optimizer
        self.buckets = buckets
        self.scaler = scaler
        self.counters = Counters()

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of every parameter, tied ones once, in order of definition."""
        for name, parameter in self.model.named_parameters():
            yield name, parameter.detach()

    def optimizer_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """("parameter name/key", tensor) of the optimizer's state: moments and step counts. Empty before step 1.

        Moments are views of those of the buckets, so how the parameters were bucketed does not show.
        """
        for bucket in self.buckets:
            for key, value in sorted(self.optimizer.state.get(bucket.flat, {}).items()):
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
        for bucket in self.buckets:
            prefix = f"{bucket.names[0]}/"
            for name, (shape, dtype) in specs.items():
                if name.startswith(prefix):
                    self.optimizer.state[bucket.flat][name.removeprefix(prefix)] = torch.zeros(
                        bucket.flat.shape if shape else (),
                        dtype=getattr(torch, dtype),
                        device=self._device_of(shape, bucket),
                    )

    def _device_of(self, shape: list[int], bucket: Bucket) -> torch.device:
        """A step count stays on the CPU unless the optimizer is fused, as torch.optim wants it."""
        return bucket.flat.device if shape or self.optimizer.defaults.get("fused") else torch.device("cpu")

    def to_dict(self) -> dict[str, object]:
        """The part of the state that is not tensors, for JSON."""
        return {
            **asdict(self.counters),
            "loss_scaler": self.scaler.state_dict() if self.scaler is not None else None,
        }

    def load_dict(self, values: dict[str, Any]) -> None:
        """Take over what `to_dict` gave."""
        fields = asdict(Counters())
        self.counters = Counters(**{key: values[key] for key in fields})
        if self.scaler is not None and isinstance(values.get("loss_scaler"), dict):
            self.scaler.load_state_dict(values["loss_scaler"])


def tensors_sha256(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """A hash of names, dtypes, shapes and bits, whatever the order and the device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {array.dtype} {tuple(array.shape)}\n".encode())
        digest.update(array.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
