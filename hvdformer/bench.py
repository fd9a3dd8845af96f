"""How fast this machine trains with one rank and with several, where a step's time goes, and how far from the limit that is.

Every number comes from whole runs that are started as a user starts them. For each number of ranks there are:
- strong scaling: the step of the config, shared by the ranks;
- weak scaling: as many times that step, so that each rank has the work of one rank alone;
- the limit: as many single hvdformer processes, each with a rank's share of the step and no communication. They have all
  that makes the step itself fast, so what is missing to them is the cost of working together;
- Horovod's DistributedOptimizer as its documentation shows it, with Horovod's own settings (bench_rank.py).
All have the same threads a rank. The order turns from one repeat to the next, and ratios are taken within a repeat.
docs/bench.md explains the numbers; `make bench` in a checkout has torch DDP and Hugging Face's Trainer beside it.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdformer import launch as launching
from hvdformer.config import check_world_size, load_config
from hvdformer.data.partition import local_micro_batches
from hvdformer.distributed import launcher, tuning
from hvdformer.errors import RunError, UserError

WARMUP_STEPS = 3
KINDS = ("strong", "weak", "limit", "horovod")
# Every step is timed; validation and saving come after the last one and are left out.
_QUIET = (
    "train.log_every=1",
    "train.evaluate_every=0",
    "train.final_evaluate_sequences=2",
    "train.sample_tokens=0",
    "train.check_replicas_every=0",
    "train.max_minutes=null",
    "checkpoint.every=0",
    "checkpoint.keep_every=null",
    "optim.schedule=constant",  # of so few steps; a config's own may not fit into them
    "optim.warmup_steps=1",
    "optim.decay_steps=null",
)
# The parts of a step, by their names here and in metrics.jsonl, in the order in which they come.
PARTS = {
    "data_seconds": "data_seconds",
    "forward_seconds": "forward_seconds",
    "backward_seconds": "backward_seconds",
    "exposed_communication_seconds": "fusion_seconds",
    "update_seconds": "update_seconds",
}

Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What is to be measured."""

    config_path: Path | None
    overrides: tuple[str, ...]
    sizes: tuple[int, ...]  # numbers of ranks, 1 among them
    steps: int  # timed, after WARMUP_STEPS others
    repeats: int
    launcher: str  # as `hvdformer launch` names them
    threads: int  # CPU threads a rank


def prepare(
    config_path: Path | None,
    overrides: Sequence[str],
    sizes: Sequence[int] | None,
    steps: int,
    repeats: int,
    wanted_launcher: str,
) -> Settings:
    """Fill in what the user left open.

    sizes: numbers of ranks; None: 1, 2, 4, ... up to what `hvdformer launch` would start here. 1 is always among them,
    since efficiencies stand on it.

    Raises:
        UserError: a fault in the settings, more ranks than micro-batches, or this process is itself a rank.
    """
    outer = launcher.detect(os.environ)
    if outer is not None and outer.size > 1:
        raise UserError(
            f"bench starts the ranks itself, but {outer.launcher} started it {outer.size} times: start it once."
        )
    config = load_config(config_path, overrides)
    if config.fusion.every is not None or config.fusion.kind in ("local_sgd", "diloco"):
        raise UserError(
            f"fusion.kind={config.fusion.kind} does not fuse in every step, so a step has no fixed cost: use compare"
        )
    train = config.train
    if sizes is None:
        most = launching.default_np(
            (), train.global_batch // train.micro_batch, train.device == "cpu", os.environ
        )
        sizes = [2**power for power in range(most.bit_length())]
    sizes = sorted({1, *sizes})
    check_world_size(config, sizes[-1])
    name = launching.choose_launcher(wanted_launcher, sizes[-1], (), os.environ)
    if name == "srun":
        raise UserError(
            "bench measures one machine, and srun would spread the ranks over the nodes of this Slurm allocation: in an "
            "allocation of one node give --launcher mpirun"
        )
    return Settings(
        config_path,
        tuple(overrides),
        tuple(sizes),
        steps,
        repeats,
        name,
        train.threads or max(1, tuning.usable_cores() // sizes[-1]),
    )


def bench(settings: Settings, say: Say) -> dict[str, Any]:
    """Measure. Returns what `--json` prints; docs/bench.md has its form.

    Raises:
        RunError: one of the runs failed; the message has the end of what it said.
    """
    runs = {
        (size, kind): (lambda size=size, kind=kind: _run(settings, size, kind))
        for size in settings.sizes
        for kind in KINDS
        if size > 1 or kind == "strong"  # alone there is nothing to share, and nothing to scale
    }
    repeats: list[dict[tuple[int, str], dict[str, Any]]] = []
    names = list(runs)
    for number in range(settings.repeats):
        repeat = {}
        for name in names[number % len(names) :] + names[: number % len(names)]:
            repeat[name] = runs[name]()
            size, kind = name
            say(
                f"repeat {number + 1} of {settings.repeats}: np {size}, {kind}: "
                f"{repeat[name]['tokens_per_second']:,.0f} tokens/s"
            )
        repeats.append(repeat)
    config = load_config(settings.config_path, settings.overrides)
    num_micro_batches = config.train.global_batch // config.train.micro_batch
    entries = []
    for size in settings.sizes:
        for scaling in ("strong", "weak") if size > 1 else ("strong",):
            times = size if scaling == "weak" else 1
            entries.append(
                {
                    "np": size,
                    "nodes": 1,
                    "scaling": scaling,
                    "global_batch": times * config.train.global_batch,
                    "micro_batches_per_rank": times * num_micro_batches / size,
                    **summary(repeats, size, scaling),
                }
            )
    return {
        "command": shlex.join(["hvdformer", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "launcher": settings.launcher,
        "threads_per_rank": settings.threads,
        "steps": settings.steps,
        "warmup_steps": WARMUP_STEPS,
        "repeats": settings.repeats,
        "runs": entries,
        "allreduce": _time_allreduces(settings) if settings.sizes[-1] > 1 else [],
        "raw": [
            [{"np": size, "kind": kind, **run} for (size, kind), run in sorted(repeat.items())]
            for repeat in repeats
        ],
    }


def summary(
    repeats: Sequence[dict[tuple[int, str], dict[str, Any]]], size: int, scaling: str
) -> dict[str, Any]:
    """One entry of "runs": medians over the repeats, and ratios that were taken within a repeat. Pure.

    repeats: per (ranks, kind) what a run took, as `_run` gives it.
    """
    own = [repeat[size, scaling] for repeat in repeats]
    rates = [run["tokens_per_second"] for run in own]
    entry: dict[str, Any] = {
        key: None if any(run[key] is None for run in own) else statistics.median(run[key] for run in own)
        for key in own[0]
    }
    entry["tokens_per_second_range"] = [min(rates), max(rates)]
    ratios = {
        f"{name}_efficiency": [
            repeat[size, name]["tokens_per_second"] / size / repeat[1, "strong"]["tokens_per_second"]
            for repeat in repeats
        ]
        for name in ("strong", "weak")
        if size > 1 and name == scaling
    }
    if scaling == "strong" and size > 1:
        for name in ("limit", "horovod"):
            ratios[f"of_{name}"] = [
                repeat[size, "strong"]["tokens_per_second"] / repeat[size, name]["tokens_per_second"]
                for repeat in repeats
            ]
    for name, values in ratios.items():
        entry[name] = statistics.median(values)
        entry[f"{name}_range"] = [min(values), max(values)]
    return entry


def split_of(lines: Sequence[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """What a step took, from the lines of metrics.jsonl of every step: means after the warm-up. Pure.

    tokens: of a step. A step here is from the end of one to the end of the next, so that all of it counts. Parts that the
    lines don't tell of are None; "other_seconds" is what is left when all are known.
    """
    times = [line["time"] for line in lines][WARMUP_STEPS - 1 :]
    seconds = (times[-1] - times[0]) / (len(times) - 1)
    timed = lines[WARMUP_STEPS:]
    parts: dict[str, float | None] = {
        name: statistics.fmean(line[key] for line in timed) if all(key in line for line in timed) else None
        for name, key in PARTS.items()
    }
    known = [value for value in parts.values() if value is not None]
    return {
        "tokens_per_second": tokens / seconds,
        "step_seconds": seconds,
        **parts,
        "other_seconds": seconds - sum(known) if len(known) == len(parts) else None,
        "bytes_sent": statistics.fmean(line["bytes_sent"] for line in timed),
    }


def _run(settings: Settings, size: int, kind: str) -> dict[str, Any]:
    """Start one of the kinds on `size` ranks, and read what it took."""
    config = load_config(settings.config_path, settings.overrides)
    train = config.train
    context = config.model.context_length
    command = _launcher_command(settings, size)
    with tempfile.TemporaryDirectory(prefix="hvdformer-bench-") as name:
        folder = Path(name)
        if kind == "horovod":
            rank = _rank("horovod", folder / "out", *_config(settings, train.global_batch))
            _start_all([[*command, *rank]], [{}])
            times = json.loads((folder / "out").read_text())["times"][WARMUP_STEPS - 1 :]
            seconds = (times[-1] - times[0]) / (len(times) - 1)
            return {"tokens_per_second": train.global_batch * context / seconds, "step_seconds": seconds}
        if kind == "limit":
            num = train.global_batch // train.micro_batch
            batches = [len(local_micro_batches(num, rank, size)) * train.micro_batch for rank in range(size)]
            commands = [_train(settings, folder / str(rank), batch) for rank, batch in enumerate(batches)]
            _start_all(commands, [_one_gpu(rank, train.device) for rank in range(size)])
            rates = [
                split_of(_steps(folder / str(rank)), batch * context)["tokens_per_second"]
                for rank, batch in enumerate(batches)
            ]
            # The slowest decides when a step is over, as it would if they worked together.
            slowest = min(rate / batch for rate, batch in zip(rates, batches, strict=True))
            return {"tokens_per_second": slowest * train.global_batch}
        batch = train.global_batch * (size if kind == "weak" else 1)
        _start_all([[*command, *_train(settings, folder / "run", batch)]], [{}])
        return {
            **split_of(_steps(folder / "run"), batch * context),
            "parameters": _parameters(folder / "run"),
        }


def _time_allreduces(settings: Settings) -> list[dict[str, Any]]:
    """The collective by itself, at the largest number of ranks."""
    device = load_config(settings.config_path, settings.overrides).train.device
    with tempfile.TemporaryDirectory(prefix="hvdformer-bench-") as name:
        out = Path(name) / "out"
        command = _launcher_command(settings, settings.sizes[-1])
        _start_all([[*command, *_rank("allreduce", out, device, str(settings.threads))]], [{}])
        points: list[dict[str, Any]] = json.loads(out.read_text())["allreduce"]
    return [{**point, "nodes": 1} for point in points]


def _train(settings: Settings, run_dir: Path, global_batch: int) -> list[str]:
    """The command of a rank of hvdformer, as a user gives it."""
    return [*launching.program(), "train", *_config(settings, global_batch), "--run-dir", str(run_dir)]


def _config(settings: Settings, global_batch: int) -> list[str]:
    """[CONFIG.yaml] and key=value settings: the user's, and over them those of a benchmark."""
    return [
        *([str(settings.config_path)] if settings.config_path else []),
        *settings.overrides,
        *_QUIET,
        f"train.steps={WARMUP_STEPS + settings.steps}",
        f"train.threads={settings.threads}",
        f"train.global_batch={global_batch}",
    ]


def _rank(what: str, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "hvdformer.bench_rank", what, str(out), *more]


def _launcher_command(settings: Settings, size: int) -> list[str]:
    name = settings.launcher if size > 1 else "plain"
    plan = launching.Plan((), Path(), size, size, (), name)
    return launching.launcher_command(plan, size, (), os.environ)


def _one_gpu(number: int, device: str) -> dict[str, str]:
    """What has process `number` of those that don't communicate take the GPU that rank `number` would take."""
    gpus = 0 if device == "cpu" else launching.num_gpus(os.environ)
    if not gpus:
        return {}
    listed = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
    return {"CUDA_VISIBLE_DEVICES": listed[number % gpus]}


def _start_all(commands: Sequence[Sequence[str]], environments: Sequence[dict[str, str]]) -> None:
    """Run commands side by side until all have ended.

    Raises:
        RunError: one of them failed; the others are ended.
    """
    with tempfile.TemporaryDirectory(prefix="hvdformer-bench-") as name:
        logs = [Path(name) / str(number) for number in range(len(commands))]
        started: list[subprocess.Popen[bytes]] = []
        try:
            for command, environment, log in zip(commands, environments, logs, strict=True):
                with open(log, "wb") as output:
                    started.append(
                        subprocess.Popen(
                            command,
                            env={**os.environ, **environment},
                            stdin=subprocess.DEVNULL,
                            stdout=output,
                            stderr=subprocess.STDOUT,
                            start_new_session=True,  # so that all of its processes can be ended together
                        )
                    )
            for process, command, log in zip(started, commands, logs, strict=True):
                if process.wait() != 0:
                    words = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
                    raise RunError(
                        f"a run of the benchmark ended with {process.returncode}: {shlex.join(command)}\n{words}"
                    )
        finally:
            for process in started:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGTERM)
                    process.wait()


def _steps(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / launching.METRICS_FILE).read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


def _parameters(run_dir: Path) -> int:
    """Read from the run's own words: this process does without torch."""
    for line in (run_dir / "run.log").read_text(encoding="utf-8").splitlines():
        before, found, _ = line.partition(" parameters;")
        if found:
            return int(before.split()[-1].replace(",", ""))
    raise RunError(f"{run_dir / 'run.log'} does not say how many parameters the model has")


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    cpu = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "cpu": cpu,
        "cores": tuning.usable_cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": launching.num_gpus(os.environ),
        "system": platform.platform(),
    }


def tables(results: dict[str, Any]) -> str:
    """The results for the person."""
    runs = results["runs"]
    speed: list[tuple[str, ...]] = [
        ("np", "scaling", "tokens/s", "(min to max)", "efficiency", "of the limit", "of plain Horovod")
    ]
    split: list[tuple[str, ...]] = [
        ("np", "scaling", "step", "data", "forward", "backward", "communication", "update", "other")
    ]
    for run in runs:
        low, high = run["tokens_per_second_range"]
        efficiency = run.get(f"{run['scaling']}_efficiency")
        name = "-" if run["np"] == 1 else run["scaling"]
        ratios = [efficiency, run.get("of_limit"), run.get("of_horovod")]
        speed.append(
            (
                str(run["np"]),
                name,
                f"{run['tokens_per_second']:,.0f}",
                f"({low:,.0f} to {high:,.0f})",
                *("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
            )
        )
        parts = [run["step_seconds"], *(run[name] for name in PARTS), run["other_seconds"]]
        split.append(
            (str(run["np"]), name, *("-" if part is None else f"{1000 * part:,.1f} ms" for part in parts))
        )
    threads = results["threads_per_rank"]
    lines = [
        *_aligned(speed),
        "",
        "of a step on rank 0, means:",
        *_aligned(split),
        "",
        f"{results['launcher']}, {threads} thread{'s' * (threads > 1)} a rank, {results['steps']} steps after "
        f"{results['warmup_steps']}, medians of {results['repeats']}. The limit: as many single processes that do not communicate.",
        "Communication is what backward did not hide. torch DDP and Hugging Face's Trainer beside it: `make bench` in a checkout.",
    ]
    return "\n".join(lines)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns under one another; one in which no row has anything is left out."""
    columns = [column for column in zip(*rows, strict=True) if any(cell != "-" for cell in column[1:])]
    widths = [max(map(len, column)) for column in columns]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in zip(*columns, strict=True)
    ]
