"""Seconds from the command to the end of the first step of configs/tiny.yaml, with warm caches, and what takes them.

    python -m benchmarks.start [--np 2] [--repeats 5]

The ranks are started by this module, which imports torch, then Horovod, then hvdformer and what else it needs, takes the
time of each, and goes on as `hvdformer train` does. The first run only warms the caches. Medians over the others; rank 0's
view. Writes benchmarks/results/start-npN.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PARTS = {
    "launcher": "launcher, until the process of rank 0 is there",
    "python": "Python, until its first line of ours",
    "torch": "import of torch",
    "horovod": "import of Horovod",
    "hvdformer": "import of hvdformer and what else it needs",
    "first_step": "joining the job, data, model, and the first step",
}


def rank(split_file: str, arguments: list[str]) -> None:
    """One rank: imports one after the other, then the command."""
    marks = [time.time()]
    created = marks[0] - own_age()
    import torch  # noqa: F401

    marks.append(time.time())
    import horovod.torch  # noqa: F401

    marks.append(time.time())
    from hvdformer import cli, elastic, train  # noqa: F401

    marks.append(time.time())
    if os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("HOROVOD_RANK")) == "0":
        Path(split_file).write_text(json.dumps({"created": created, "marks": marks}))
    cli.cli.main(arguments)


def own_age() -> float:
    """Seconds since this process began, to 10 ms. What psutil gives rests on the time of boot in whole seconds."""
    began = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began


def measure(launcher: list[str]) -> dict[str, float]:
    """One start: seconds of each part, and in all."""
    from benchmarks.processes import QUIET, ROOT, environment

    with tempfile.TemporaryDirectory() as name:
        split_file, run_dir = Path(name) / "split", Path(name) / "run"
        command = [*launcher, sys.executable, "-m", "benchmarks.start", "--rank", str(split_file)]
        train = ["train", str(ROOT / "configs" / "tiny.yaml"), *QUIET, "train.device=cpu", "train.steps=5"]
        began = time.time()
        done = subprocess.run(
            [*command, *train, "--run-dir", str(run_dir)],
            cwd=ROOT,
            env=environment(1),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(f"{done.args} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        split = json.loads(split_file.read_text())
        first = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[0])["time"]
    imported, torch_there, horovod_there, all_there = split["marks"]
    return {
        "launcher": split["created"] - began,
        "python": imported - split["created"],
        "torch": torch_there - imported,
        "horovod": horovod_there - torch_there,
        "hvdformer": all_there - horovod_there,
        "first_step": first - all_there,
        "in_all": first - began,
    }


def main() -> None:
    from benchmarks.throughput import RESULTS, machine, versions

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--np", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    launchers = {
        "mpirun": ["mpirun", "-np", str(arguments.np), "--oversubscribe", "--bind-to", "none"],
        "horovodrun --gloo": ["horovodrun", "--gloo", "-np", str(arguments.np)],
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in launchers}
    for number in range(arguments.repeats + 1):
        for name, launcher in launchers.items():
            taken = measure(launcher)
            if number:
                found[name].append(taken)
    results = {
        "command": "python -m benchmarks.start " + " ".join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": versions(),
        "np": arguments.np,
        "seconds": found,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"start-np{arguments.np}.json").write_text(json.dumps(results, indent=1) + "\n")
    print("| seconds, median (min to max) | " + " | ".join(found) + " |")
    print("|---" * (1 + len(found)) + "|")
    for part, label in {**PARTS, "in_all": "in all"}.items():
        cells = []
        for runs in found.values():
            values = [run[part] for run in runs]
            cells.append(f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        print(f"| {label} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank(sys.argv[2], sys.argv[3:])
    else:
        main()
