"""Start hvdformer as a user does: real launchers, real processes, real signals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
HVDFORMER = str(BIN / "hvdformer")

LAUNCHERS = {
    "plain": lambda np: [],
    "horovodrun-mpi": lambda np: ["horovodrun", "--mpi", "-np", str(np)],
    "horovodrun-gloo": lambda np: ["horovodrun", "--gloo", "-np", str(np)],
    "mpirun": lambda np: ["mpirun", "--oversubscribe", "--bind-to", "none", "-np", str(np)],
}


def environment(**extra: str) -> dict[str, str]:
    """The test's own environment without what an outer launcher or a user's tuning would change."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("HOROVOD_", "OMPI_", "PMIX_", "PMI_", "SLURM_", "HVDFORMER_"))
    }
    kept["PATH"] = f"{BIN}{os.pathsep}{kept['PATH']}"
    kept["OMP_NUM_THREADS"] = "1"  # the same at every world size, so that sums over a row are the same too
    # Inside a container one is root, and mpirun wants to hear that this is meant.
    kept |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return kept | extra


class Job:
    """A running command with all the processes that it started."""

    def __init__(self, command: Sequence[str], cwd: Path, **extra: str) -> None:
        self.output_file = cwd / f"output-{time.monotonic_ns()}.txt"
        with open(self.output_file, "w") as output:
            self.process = subprocess.Popen(
                command,
                cwd=cwd,
                env=environment(**extra),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # nohup has it ignored
            )

    @property
    def output(self) -> str:
        return self.output_file.read_text(errors="replace")

    def ranks(self) -> list[psutil.Process]:
        """The processes that run hvdformer itself, not their launchers."""
        found = []
        started = psutil.Process(self.process.pid)
        for child in [started, *started.children(recursive=True)]:
            try:
                command = child.cmdline()
            except psutil.Error:
                continue
            if len(command) > 2 and command[1] == HVDFORMER and command[2] != "launch":
                found.append(child)
        return found

    def wait_for(self, text: str, timeout: float = 120) -> None:
        """Until the job has printed `text`."""
        end = time.monotonic() + timeout
        while text not in self.output:
            assert self.process.poll() is None, (
                f"ended with {self.process.returncode} before {text!r}:\n{self.output}"
            )
            assert time.monotonic() < end, f"no {text!r} within {timeout} s:\n{self.output}"
            time.sleep(0.02)

    def kill_ranks(self) -> None:
        """kill -9 of every rank, at the same moment as near as can be."""
        for rank in self.ranks():
            try:
                rank.kill()
            except psutil.NoSuchProcess:
                pass

    def wait(self, timeout: float = 240) -> int:
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.end()
            raise AssertionError(f"still running after {timeout} s:\n{self.output}") from None

    def end(self) -> None:
        """Leave nothing behind, whatever happened."""
        try:
            children = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            children = []
        for child in children:
            child.kill()
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait(10)


def command(launcher: str, np: int, *arguments: str) -> list[str]:
    return [*LAUNCHERS[launcher](np), HVDFORMER, *arguments]


def run(
    launcher: str, np: int, *arguments: str, cwd: Path, timeout: float = 240, **extra: str
) -> tuple[int, str]:
    """Run to the end; the exit code and what was printed."""
    job = Job(command(launcher, np, *arguments), cwd, **extra)
    try:
        code = job.wait(timeout)
        return code, job.output
    finally:
        job.end()


def succeed(launcher: str, np: int, *arguments: str, cwd: Path, timeout: float = 240, **extra: str) -> str:
    """Run to a good end; what was printed."""
    code, output = run(launcher, np, *arguments, cwd=cwd, timeout=timeout, **extra)
    assert code == 0, f"{launcher} -np {np} {arguments} ended with {code}:\n{output}"
    return output


def inspect(path: Path, cwd: Path) -> dict[str, Any]:
    return json.loads(succeed("plain", 1, "inspect", str(path), cwd=cwd))


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics without the timings, which no two runs share."""
    return [
        {
            key: value
            for key, value in line.items()
            if key not in ("time", "tokens_per_second") and not key.endswith("_seconds")
        }
        for line in metrics(run_dir)
    ]


def weights_and_optimizer(run_dir: Path, step: int) -> dict[str, str]:
    """sha256 of the checkpoint files that hold the training state."""
    manifest = json.loads((run_dir / "checkpoints" / f"step-{step:08d}" / "manifest.json").read_text())
    return {name: manifest[name]["sha256"] for name in ("model.safetensors", "optimizer.safetensors")}


def has(program: str) -> bool:
    return shutil.which(program, path=environment()["PATH"]) is not None
