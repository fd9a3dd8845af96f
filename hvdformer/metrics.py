"""What a run reports: metrics.jsonl for programs, a progress bar or plain lines for the person, and a log file."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, TextIO

METRICS_FILE = "metrics.jsonl"
LOG_FILE = "run.log"


class Reporter:
    """Writes a run's metrics and messages. One rank owns it; the others have none."""

    def __init__(self, run_dir: Path, steps: int, resumed_step: int) -> None:
        """Open the files of the run folder; lines of steps after `resumed_step`, which will be done again, go."""
        self._steps = steps
        self._metrics = _open_from(run_dir / METRICS_FILE, resumed_step)
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
        """Append one object to metrics.jsonl."""
        self._metrics.write(json.dumps(metrics) + "\n")
        self._metrics.flush()

    def sync(self) -> None:
        """Have metrics.jsonl on the disk: called before a checkpoint that stands on it."""
        os.fsync(self._metrics.fileno())

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._metrics.close()
        self._log.close()


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


def _open_from(path: Path, last_step: int) -> TextIO:
    """Open for appending, without the lines after `last_step`; the file is replaced as a whole or not at all."""
    kept = [entry for entry in read_metrics(path.parent) if entry.get("step", 0) <= last_step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
    temporary.replace(path)
    return open(path, "a", encoding="utf-8")


def _console() -> Any:
    from rich.console import Console

    return Console(stderr=True)
