"""Parameters and gradients laid out in flat buckets, so that a bucket is reduced and updated in place, as one tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Bucket:
    """Some parameters of a model, side by side in one flat parameter.

    The model's parameters and their gradients are views of `flat` and of its gradient: backward fills the bucket, and
    an update of the bucket is an update of the model.
    """

    flat: torch.nn.Parameter  # (N,)
    gradient: torch.Tensor  # (N,), what flat.grad is
    names: tuple[str, ...]
    parameters: tuple[torch.nn.Parameter, ...]
    decays: bool  # matrices take part in weight decay, vectors do not

    def views(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """A tensor of N numbers, such as a moment of `flat`, as {name: view in the shape of the parameter}."""
        sizes = [parameter.numel() for parameter in self.parameters]
        pieces = tensor[: sum(sizes)].split(sizes)
        return {
            name: piece.view(parameter.shape)
            for name, parameter, piece in zip(self.names, self.parameters, pieces, strict=True)
        }


class Watch:
    """Tells when backward has filled a bucket: its last missing gradient has just been accumulated."""

    def __init__(self, buckets: Sequence[Bucket], passes: int, full: Callable[[int], None]) -> None:
        """passes: backward passes that fill a bucket; full: called with the bucket's number, each time it is full."""
        self._fills = [passes * len(bucket.parameters) for bucket in buckets]
        self._missing = list(self._fills)
        self._full = full
        self.is_paused = False
        for number, bucket in enumerate(buckets):
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(lambda _, number=number: self._count(number))

    def _count(self, number: int) -> None:
        if self.is_paused:
            return
        self._missing[number] -= 1
        if self._missing[number] == 0:
            self._missing[number] = self._fills[number]
            self._full(number)

    def reset(self) -> None:
        """Begin anew, whatever has been counted."""
        self._missing = list(self._fills)


def flatten(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]], bucket_mib: float, multiple_of: int = 1
) -> list[Bucket]:
    """Move the parameters into buckets of about `bucket_mib` MiB, in the order in which backward fills them: last first.

    Call it once, with the model on its device and before an optimizer is made. A parameter larger than a bucket gets
    one of its own. Which parameter goes where depends on names and shapes alone, so all ranks agree and a run that is
    repeated reduces the same buckets. Each bucket is padded by zeros to a multiple of `multiple_of` numbers, so that
    as many ranks can share it.
    """
    buckets: list[Bucket] = []
    backwards = list(named_parameters)[::-1]
    for decays in (True, False):
        run: list[tuple[str, torch.nn.Parameter]] = []
        for name, parameter in backwards:
            if (parameter.ndim >= 2) != decays:
                continue
            if run and _nbytes(run) + _nbytes([(name, parameter)]) > bucket_mib * 2**20:
                buckets.append(_bucket(run, decays, multiple_of))
                run = []
            run.append((name, parameter))
        if run:
            buckets.append(_bucket(run, decays, multiple_of))
    return buckets


def _bucket(run: list[tuple[str, torch.nn.Parameter]], decays: bool, multiple_of: int) -> Bucket:
    names, parameters = zip(*run, strict=True)
    values = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
    flat = torch.nn.Parameter(torch.nn.functional.pad(values, (0, -len(values) % multiple_of)))
    flat.grad = gradient = torch.zeros_like(flat)
    bucket = Bucket(flat, gradient, names, parameters, decays)
    weights, gradients = bucket.views(flat.detach()), bucket.views(gradient)
    for name, parameter in run:
        parameter.data = weights[name]
        parameter.grad = gradients[name]
    return bucket


def _nbytes(run: list[tuple[str, torch.nn.Parameter]]) -> int:
    return sum(parameter.numel() * parameter.element_size() for _, parameter in run)
