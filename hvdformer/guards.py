"""Guard rails of the training itself: which steps to leave out, decided by numbers that all ranks share."""

from __future__ import annotations

import math
from typing import Any

_DECAY = 0.98  # of the running mean and variance: about the last 50 steps
_STEPS_TO_LEARN = 20  # before anything counts as a spike
_MAX_IN_A_ROW = 10  # more than these are no spike but how the run now is


class SpikeGuard:
    """Notices gradient norms that stand out from the latest ones by `max_sigma` standard deviations; None: never."""

    def __init__(self, max_sigma: float | None) -> None:
        self._max_sigma = max_sigma
        self._mean = self._variance = 0.0
        self._steps = self._in_a_row = 0

    def accepts(self, norm: float) -> bool:
        """Whether a step with this gradient norm is to be taken. Finite norms only."""
        if self._max_sigma is None:
            return True
        limit = self._mean + self._max_sigma * math.sqrt(self._variance)
        is_spike = self._steps >= _STEPS_TO_LEARN and norm > limit
        if is_spike and self._in_a_row < _MAX_IN_A_ROW:
            self._in_a_row += 1
            return False
        if is_spike:
            self._steps = 0  # learn anew
        self._in_a_row = 0
        weight = max(1 - _DECAY, 1 / (self._steps + 1))  # a plain mean at first
        difference = norm - self._mean
        self._mean += weight * difference
        self._variance = (1 - weight) * (self._variance + weight * difference * difference)
        self._steps += 1
        return True

    def to_dict(self) -> dict[str, Any]:
        return {
            "mean": self._mean,
            "variance": self._variance,
            "steps": self._steps,
            "in_a_row": self._in_a_row,
        }

    def load_dict(self, values: dict[str, Any] | None) -> None:
        if values:
            self._mean, self._variance = float(values["mean"]), float(values["variance"])
            self._steps, self._in_a_row = int(values["steps"]), int(values["in_a_row"])
