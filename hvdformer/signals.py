"""Stop on request: the first signal lets the step finish and save, a second SIGTERM or SIGINT ends at once."""

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
        if not self.number:
            self.number = number
        elif number != signal.SIGUSR1:
            # LSF and PBS send a signal to every process of the job, and mpirun passes on its own: one wish, heard twice.
            os._exit(128 + number)
