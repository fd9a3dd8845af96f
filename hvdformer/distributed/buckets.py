"""Parameters and gradients laid out in flat buckets, so that a bucket is reduced and updated in place, as one tensor."""

from __future__ import annotations

from collections.abc import Iterable
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
        pieces = tensor.split([parameter.numel() for parameter in self.parameters])
        return {
            name: piece.view(parameter.shape)
            for name, parameter, piece in zip(self.names, self.parameters, pieces, strict=True)
        }


def flatten(named_parameters: Iterable[tuple[str, torch.nn.Parameter]], bucket_mib: float) -> list[Bucket]:
    """Move the parameters into buckets of about `bucket_mib` MiB, in the order in which backward fills them: last first.

    Call it once, with the model on its device and before an optimizer is made. A parameter larger than a bucket gets
    one of its own. Which parameter goes where depends on names and shapes alone, so all ranks agree and a run that is
    repeated reduces the same buckets.
    """
    buckets: list[Bucket] = []
    backwards = list(named_parameters)[::-1]
    for decays in (True, False):
        run: list[tuple[str, torch.nn.Parameter]] = []
        for name, parameter in backwards:
            if (parameter.ndim >= 2) != decays:
                continue
            if run and _nbytes(run) + _nbytes([(name, parameter)]) > bucket_mib * 2**20:
                buckets.append(_bucket(run, decays))
                run = []
            run.append((name, parameter))
        if run:
            buckets.append(_bucket(run, decays))
    return buckets


def _bucket(run: list[tuple[str, torch.nn.Parameter]], decays: bool) -> Bucket:
    names, parameters = zip(*run, strict=True)
    flat = torch.nn.Parameter(torch.cat([parameter.detach().reshape(-1) for parameter in parameters]))
    flat.grad = gradient = torch.zeros_like(flat)
    bucket = Bucket(flat, gradient, names, parameters, decays)
    values, gradients = bucket.views(flat.detach()), bucket.views(gradient)
    for name, parameter in run:
        parameter.data = values[name]
        parameter.grad = gradients[name]
    return bucket


def _nbytes(run: list[tuple[str, torch.nn.Parameter]]) -> int:
    return sum(parameter.numel() * parameter.element_size() for _, parameter in run)
