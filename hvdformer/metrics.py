"""What a run reports: metrics.jsonl for programs, a progress bar or plain lines for the person, and a log file."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import resource
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

METRICS_FILE = "metrics.jsonl"
LOG_FILE = "run.log"


class LossSum:
    """A sum of losses that has the same bits in any order and grouping: integers that count 2^-24 nat."""

    def __init__(self, device: torch.device) -> None:
        self._totals = torch.zeros(
            2, dtype=torch.int64, device=device
        )  # sum; number of losses that aren't finite

    def add(self, loss: torch.Tensor) -> None:
        """Add the loss of a micro-batch, a scalar, without waiting for the device."""
        loss = loss.detach().double()
        is_finite = loss.isfinite()
        self._totals[0] += torch.where(is_finite, loss * 2.0**24, 0.0).round().long()
        self._totals[1] += ~is_finite

    def totals(self) -> list[int]:
        """Two integers, to be summed over the ranks."""
        return self._totals.tolist()

    @staticmethod
    def mean(totals: Sequence[int], num_targets: int) -> float:
        """The mean loss a target, of summed totals; NaN if a loss was not finite."""
        fixed, num_bad = totals
        return math.nan if num_bad else fixed / 2.0**24 / num_targets


class Reporter:
    """Writes a run's metrics and messages. One rank owns it; the others have none."""

    def __init__(self, run_dir: Path, steps: int, resumed_step: int) -> None:
        """Open the files of the run folder; lines of steps after `resumed_step`, which will be done again, go."""
        self._steps = steps
        self._metrics = _open_from(run_dir / METRICS_FILE, resumed_step)
        self._lock = threading.Lock()
        self._unwritten = b""  # lines that the disk did not take, to be tried again
        self._log = (run_dir / LOG_FILE).open("a", encoding="utf-8")
        self._bar: Any = None
        if sys.stderr.isatty():
            from rich import progress

            self._bar = progress.Progress(
                progress.TextColumn("step {task.completed}/{task.total}"),
                progress.BarColumn(),
                progress.TextColumn("{task.fields[status]}"),
                progress.TimeRemainingColumn(),
                console=_console(),
            )
            self._task = self._bar.add_task("train", total=steps, completed=resumed_step, status="")
            self._bar.start()
        self._began, self._first = time.monotonic(), resumed_step

    def say(self, message: str) -> None:
        """Tell the person, and the log."""
        if self._bar is not None:
            self._bar.console.print(message, markup=False, highlight=False)
        else:
            print(message, flush=True)
        with contextlib.suppress(OSError):  # a full disk: the terminal has it, and saving tells of the disk
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")
            self._log.flush()

    def step(self, metrics: dict[str, Any]) -> None:
        """One logged training step."""
        self.record(metrics)
        status = f"loss {metrics['loss']:.4f}  {metrics['tokens_per_second']:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=metrics["step"], status=status)
            return
        done, left = metrics["step"] - self._first, self._steps - metrics["step"]
        seconds_left = (time.monotonic() - self._began) / max(done, 1) * left
        self.say(
            f"step {metrics['step']}/{self._steps}  {status}  learning rate {metrics['learning_rate']:.2e}  "
            f"gradient norm {metrics['grad_norm']:.2f}  {duration(seconds_left)} left"
        )

    def record(self, metrics: dict[str, Any]) -> None:
        """Append one object to metrics.jsonl; JSON has no NaN, so null stands for it.

        What a full disk does not take is kept, and written with the next line or at the next save.
        """
        metrics = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()
        }
        with self._lock:
            self._unwritten += (json.dumps(metrics) + "\n").encode()
        with contextlib.suppress(OSError):
            self._write()

    def sync(self) -> None:
        """Have metrics.jsonl on the disk: called before a checkpoint that stands on it.

        Raises:
            OSError: the disk does not take it.
        """
        self._write()
        os.fsync(self._metrics)

    def _write(self) -> None:
        """Write whole lines or nothing. The save thread calls it too."""
        with self._lock:
            end = os.lseek(self._metrics, 0, os.SEEK_END)
            if os.write(self._metrics, self._unwritten) < len(self._unwritten):
                os.ftruncate(self._metrics, end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._unwritten = b""

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        os.close(self._metrics)
        with contextlib.suppress(OSError):
            self._log.close()


class Interval:
    """What the steps since the last logged one took."""

    def __init__(self) -> None:
        self._steps = 0
        self._sums: dict[str, float] = {}

    def add(self, **values: float) -> None:
        """values: of one step; tokens and seconds are among them."""
        self._steps += 1
        for key, value in values.items():
            self._sums[key] = self._sums.get(key, 0) + value

    def take(self) -> dict[str, float]:
        """The rate of tokens, and the mean a step of all the others; counting starts anew."""
        sums, steps = self._sums, self._steps
        self._sums, self._steps = {}, 0
        metrics = {
            "tokens_per_second": sums.pop("tokens") / sums["seconds"],
            "step_seconds": sums.pop("seconds") / steps,
        }
        return metrics | {key: value / steps for key, value in sums.items()}


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss, or m:ss below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def peak_memory_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The objects of a run's metrics.jsonl; a last line that was cut short is left out."""
    try:
        lines = (run_dir / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    metrics = []
    for line in lines:
        try:
            metrics.append(json.loads(line))
        except ValueError:
            break
    return metrics


def _open_from(path: Path, last_step: int) -> int:
    """Open for appending, without the lines after `last_step`; the file is replaced as a whole or not at all."""
    kept = [entry for entry in read_metrics(path.parent) if entry.get("step", 0) <= last_step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
    temporary.replace(path)
    return os.open(path, os.O_WRONLY | os.O_APPEND)


def _console() -> Any:
    from rich.console import Console

    return Console(stderr=True)
