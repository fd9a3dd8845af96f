"""Faults on demand, for tests and for drills of an operator: nothing happens unless HVDFORMER_FAULT is set.

    HVDFORMER_FAULT=kill:rank=1,step=37 mpirun -np 2 hvdformer train ...

Form: ACTION:rank=R,step=S[,phase=P][,attempt=A], several of them separated by ";". They strike in the run's phase P
(data, forward, backward, fusion, update, evaluation or save; backward if not given), on attempt A of `hvdformer launch` (the
first if not given), so that a restarted job gets past them.

    kill       end the process by SIGKILL, as the kernel's out-of-memory killer does
    exit       leave with code 3 without a word
    raise      raise an error
    freeze     stop the process by SIGSTOP: it holds its memory and connections, and does nothing
    hang       never come back from this phase, as a read from a dead file server
    deadlock   the same with Python's lock in hand, as a library in C: no other thread of the process goes on either
    nan        make the loss NaN (phase backward)
    spike      make the loss, and with it the gradient, a thousand times as large (phase backward)
    full-disk  refuse the checkpoint of the step for want of space (phase save)
    corrupt    flip a bit in the checkpoint of the step after it was written (phase save)
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from dataclasses import dataclass

import torch

from hvdformer.errors import UserError

VARIABLE = "HVDFORMER_FAULT"
ATTEMPT = "HVDFORMER_ATTEMPT"  # set by `hvdformer launch`
ACTIONS = ("kill", "exit", "raise", "freeze", "hang", "deadlock", "nan", "spike", "full-disk", "corrupt")
_ONLY_IN = {"nan": "backward", "spike": "backward", "full-disk": "save", "corrupt": "save"}
PHASES = ("data", "forward", "backward", "fusion", "update", "evaluation", "save")


@dataclass(frozen=True)
class Fault:
    action: str
    rank: int
    step: int
    phase: str = "backward"
    attempt: int = 1


_armed: list[Fault] = []


def arm(rank: int) -> list[str]:
    """Read the variable; keep the faults of this rank and attempt. Returns a line about each fault of any rank.

    Raises:
        UserError: the variable is not of the form above.
    """
    faults = parse(os.environ.get(VARIABLE, ""))
    attempt = int(os.environ.get(ATTEMPT, "1"))
    _armed[:] = [fault for fault in faults if fault.rank == rank and fault.attempt == attempt]
    return [
        f"DRILL ({VARIABLE}): {fault.action} on rank {fault.rank} in step {fault.step}, {fault.phase}, attempt {fault.attempt}"
        for fault in faults
    ]


def parse(text: str) -> list[Fault]:
    """The faults that a value of the variable asks for."""
    faults = []
    for part in filter(None, text.split(";")):
        action, _, rest = part.partition(":")
        pairs = dict(pair.partition("=")[::2] for pair in filter(None, rest.split(",")))
        phase = pairs.pop("phase", _ONLY_IN.get(action, "backward"))
        try:
            numbers = {key: int(value) for key, value in pairs.items()}
            fault = Fault(action, phase=phase, **numbers)
        except (ValueError, TypeError):
            raise UserError(
                f"{VARIABLE}: {part!r}, expected ACTION:rank=R,step=S[,phase=P][,attempt=A]"
            ) from None
        if action not in ACTIONS or phase not in PHASES:
            raise UserError(
                f"{VARIABLE}: {part!r}, expected one of {', '.join(ACTIONS)} in one of {', '.join(PHASES)}"
            )
        if phase != _ONLY_IN.get(action, phase):
            raise UserError(f"{VARIABLE}: {part!r}, but {action} strikes in {_ONLY_IN[action]} only")
        faults.append(fault)
    return faults


def is_struck(action: str, step: int) -> bool:
    """Whether this action, which the caller carries out, is asked of this rank in this step."""
    return any((fault.action, fault.step) == (action, step) for fault in _armed)


def strike(phase: str, step: int) -> None:
    """Do what is asked of this rank in this phase of this step, but for what callers do themselves."""
    for fault in _armed:
        if (fault.phase, fault.step) == (phase, step):
            if fault.action == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif fault.action == "exit":
                os._exit(3)
            elif fault.action == "raise":
                raise RuntimeError(f"asked for by {VARIABLE}")
            elif fault.action == "freeze":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif fault.action == "hang":
                threading.Event().wait()
            elif fault.action == "deadlock":
                ctypes.PyDLL(None).sleep(2**31 - 1)


def spoil(loss: torch.Tensor, step: int) -> torch.Tensor:
    """The loss, or NaN or a thousand times the loss where that is asked for."""
    if is_struck("nan", step):
        return loss * float("nan")
    return loss * 1000 if is_struck("spike", step) else loss
