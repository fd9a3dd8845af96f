"""Start the variants of a benchmark as a user starts them, and watch what they take."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
HVDFORMER = [sys.executable, str(BIN / "hvdformer")]
# Every step is timed; validation and saving come after the last one and are left out.
QUIET = (
    "train.log_every=1",
    "train.evaluate_every=0",
    "train.final_evaluate_sequences=2",
    "train.sample_tokens=0",
    "checkpoint.every=0",
)
_SAMPLE_SECONDS = 0.5


@dataclass(frozen=True)
class Outcome:
    """What one run of a variant took."""

    times: list[list[float]]  # per process that tells of itself: when each step ended, in seconds since 1970
    losses: list[float]  # of its last step, or the mean over all of them
    peak_memory_bytes: list[int]  # of the ranks, up to the end of training, largest first
    began: float  # when it was started


def environment(threads: int, **extra: str) -> dict[str, str]:
    """For all variants alike. Inside a container one is root, and mpirun wants to hear that this is meant."""
    return os.environ | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMP_NUM_THREADS": str(threads),
        **extra,
    }


def run_hvdformer(
    launcher: list[str], overrides: list[str], threads: int, ranks: int, copies: int = 1
) -> Outcome:
    """hvdformer under a launcher; `copies` of it side by side are independent jobs."""
    with _folder() as name:
        folders = [Path(name) / str(number) for number in range(copies)]
        commands = [
            [*launcher, *HVDFORMER, "train", *QUIET, *overrides, "--run-dir", str(folder)]
            for folder in folders
        ]
        _, began, peaks = _run(commands, threads)
        times, losses = [], []
        for folder in folders:
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            steps = [line for line in lines if "loss" in line]
            times.append([line["time"] for line in steps])
            losses.append(steps[-1]["loss"])
    return Outcome(times, losses, peaks.until(max(t[-1] for t in times), ranks * copies), began)


def run_module(module: str, arguments: list[str], threads: int, ranks: int) -> Outcome:
    """A module of benchmarks/, which tells of itself in the last line that it prints; several ranks under torchrun."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    outputs, began, peaks = _run([[*command, "-m", f"benchmarks.{module}", *arguments]], threads)
    told = json.loads(outputs[0].splitlines()[-1])
    return Outcome([told["times"]], [told["loss"]], peaks.until(told["times"][-1], ranks), began)


class _Peaks(threading.Thread):
    """Reads every half second how large our processes have been so far: the kernel keeps the peak, so little is missed."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._stop_asked = threading.Event()
        self._seen: dict[int, list[tuple[float, int]]] = {}
        self.start()

    def run(self) -> None:
        while not self._stop_asked.wait(_SAMPLE_SECONDS):
            for pid in _descendants(os.getpid()):
                try:
                    status = Path(f"/proc/{pid}/status").read_text()
                    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
                except (OSError, IndexError):
                    continue
                self._seen.setdefault(pid, []).append((time.time(), peak))

    def stop(self) -> None:
        self._stop_asked.set()
        self.join()

    def until(self, end: float, count: int) -> list[int]:
        """The peaks that the `count` largest processes had reached by `end`: launchers are far smaller than ranks."""
        peaks = [max((p for at, p in seen if at <= end), default=0) for seen in self._seen.values()]
        return sorted(peaks, reverse=True)[:count]


def _descendants(pid: int) -> list[int]:
    """By the kernel's own lists: a walk over all of /proc would take time from the ranks."""
    found = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            children = Path(f"/proc/{pid}/task/{task}/children").read_text().split()
            for child in map(int, children):
                found += [child, *_descendants(child)]
    except OSError:
        pass
    return found


def _run(commands: list[list[str]], threads: int) -> tuple[list[str], float, _Peaks]:
    """Run them side by side to their end: what each printed, when they began, and their peaks of memory."""
    began = time.time()
    started = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(threads),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for command in commands
    ]
    peaks = _Peaks()
    try:
        readers = [_Reader(process) for process in started]
        outputs = [reader.result() for reader in readers]
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
        peaks.stop()
    for process, (_, errors) in zip(started, outputs, strict=True):
        if process.returncode:
            command = " ".join(map(str, process.args))  # type: ignore[arg-type]
            sys.exit(f"{command}\nended with {process.returncode}:\n{errors}")
    return [output for output, _ in outputs], began, peaks


class _Reader(threading.Thread):
    """Reads a process's output until it ends, beside those of the others."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        super().__init__(daemon=True)
        self._process = process
        self._outputs = ("", "")
        self.start()

    def run(self) -> None:
        self._outputs = self._process.communicate()

    def result(self) -> tuple[str, str]:
        self.join()
        return self._outputs


def _folder() -> tempfile.TemporaryDirectory[str]:
    """Run folders in memory where there is room: writing a checkpoint back to a disk would go on in the next run."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 8 * 2**30
    return tempfile.TemporaryDirectory(dir=memory if roomy else None, prefix="hvdformer-bench-")
