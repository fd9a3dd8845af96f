"""Stop on request: the first signal lets the step finish and save, the second ends at once."""

from __future__ import annotations

import os
import signal
from types import FrameType

# SIGUSR1 is what mpirun forwards to the ranks and what Slurm can send ahead of a time limit.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Whether someone asked this process to stop; `number` is the signal, 0 while nobody did."""

    def __init__(self) -> None:
        self.number = 0

    def install(self) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            os._exit(128 + number)
        self.number = number
