"""How a rank tells `hvdformer launch` why it ends: lines of JSON in a file, because launchers change exit codes."""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from hvdformer.distributed import launcher

VARIABLE = "HVDFORMER_FAILURES"  # the file; set by `hvdformer launch`


@dataclass(frozen=True)
class Failure:
    """Why a rank ended with a code that is not 0."""

    time: float  # seconds since 1970
    code: int
    rank: int
    host: str
    step: int  # 0: before the run knew its step
    phase: str
    message: str
    is_consequence: bool  # of another rank's failure
    is_stall: bool = False  # a rank stood still; no error was raised


def leave(
    code: int, message: str, step: int, phase: str, is_consequence: bool = False, is_stall: bool = False
) -> None:
    """Add this rank's failure to the file, if `hvdformer launch` asked for it."""
    if VARIABLE not in os.environ:
        return
    launch = launcher.detect(os.environ)
    rank = launch.rank if launch else 0
    failure = Failure(
        time.time(), code, rank, socket.gethostname(), step, phase, message, is_consequence, is_stall
    )
    try:
        file = os.open(os.environ[VARIABLE], os.O_WRONLY | os.O_APPEND)
        os.write(file, (json.dumps(asdict(failure)) + "\n").encode())
        os.close(file)
    except OSError:
        pass  # a host without the run folder; the message itself is on stderr


def first(path: Path) -> Failure | None:
    """The failure that was there first; one that only followed from another counts if there is no other."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found.append(Failure(**json.loads(line)))
        except (ValueError, TypeError):
            continue  # a line that was cut short
    return min(found, key=lambda failure: (failure.is_consequence, failure.time), default=None)
