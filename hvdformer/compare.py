"""The same training under several kinds of fusion, one after the other: what each reaches, and what it costs."""

from __future__ import annotations

import functools
import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hvdformer import runtime
from hvdformer.config import Config, FaultsFound, check_world_size, load_config
from hvdformer.distributed import comm
from hvdformer.distributed.kinds import check_fusion
from hvdformer.errors import UserError
from hvdformer.metrics import duration, read_metrics
from hvdformer.signals import StopRequest
from hvdformer.train import train

RESULTS_FILE = "compare.json"
PLOT_FILE = "compare.png"


@dataclass(frozen=True)
class Kind:
    """A kind of fusion with its settings, as it is written: "allreduce", "diloco:every=100:outer_momentum=0.8"."""

    text: str

    @property
    def overrides(self) -> list[str]:
        """The same as key=value settings of a run."""
        kind, *settings = self.text.split(":")
        return [f"fusion.kind={kind}", *(f"fusion.{setting}" for setting in settings)]

    def folder(self, run_dir: Path) -> Path:
        """The folder of its run."""
        return run_dir / self.text.replace(":", "-")


def parse_kinds(text: str) -> list[Kind]:
    """The kinds of a list such as "allreduce,allreduce:wire=bf16,diloco:every=100"."""
    return [Kind(part.strip()) for part in text.split(",")]


def load_configs(path: Path | None, overrides: Sequence[str], kinds: Sequence[Kind]) -> list[Config]:
    """The config of each kind's run.

    Where the settings don't say otherwise, the last validation takes as many sequences as those before it, so that
    one curve leads to it, and no sample of text is written.

    Raises:
        UserError: with every fault of every kind.
    """
    having: dict[str, list[str]] = {}  # each fault with the kinds that have it
    fusions: dict[str, str] = {}  # settings, and the kind that has them
    configs: list[Config] = []
    for kind in kinds:
        try:
            config = load_config(path, [*overrides, *kind.overrides])
        except FaultsFound as error:
            for fault in error.faults:
                having.setdefault(fault, []).append(kind.text)
            continue
        settings = config.fusion.resolved().model_dump_json()
        if settings in fusions:
            having.setdefault(f"the same as {fusions[settings]}: name it once", []).append(kind.text)
        fusions.setdefault(settings, kind.text)
        defaults = {"final_evaluate_sequences": config.train.evaluate_sequences, "sample_tokens": 0}
        update = {key: value for key, value in defaults.items() if key not in config.train.model_fields_set}
        configs.append(config.model_copy(update={"train": config.train.model_copy(update=update)}))
    faults = [
        fault if len(texts) == len(kinds) > 1 else f"{', '.join(texts)}: {fault}"
        for fault, texts in having.items()
    ]
    if any(override.startswith("fusion.kind=") for override in overrides):
        faults.append("fusion.kind has no effect here: remove it, --fusion names the kinds")
    if faults:
        raise FaultsFound("compare", faults)
    return configs


def compare(
    kinds: Sequence[Kind],
    configs: Sequence[Config],
    run_dir: Path,
    target_loss: float | None,
    here: runtime.Runtime,
    where: runtime.Where,
    say: Callable[[str], None],
) -> tuple[dict[str, Any], int]:
    """Train with one kind after the other, each in a folder of `run_dir`. Every rank calls it with the same arguments.

    A kind whose run fails on all ranks alike leaves its place to the next. compare.json has the results after each
    kind, so that they are there even if a rank is killed later.

    Returns what is in compare.json, and the exit code: 1 if a kind failed, 130 when SIGINT stopped the job.
    """
    comm.on_every_rank(lambda: _check(kinds, configs, here.world), "kinds of fusion")
    stop = StopRequest()
    stop.install()
    errors: dict[str, str] = {}
    code = 0
    for number, (kind, config) in enumerate(zip(kinds, configs, strict=True)):
        if any(comm.sum_over_ranks([stop.number], "stop")):
            break
        say(f"--- kind {number + 1} of {len(kinds)}: {kind.text}")
        try:
            where.enter("start", 0)
            code = train(config, kind.folder(run_dir), "auto", here, where, stop=stop) or code
        except comm.Agreed as error:
            if error.exit_code == UserError.exit_code:
                raise
            errors[kind.text], code = str(error), error.exit_code
            say(f"{kind.text} failed: {error}")
        gc.collect()  # the hooks of a model and its fusion hold each other
        write = functools.partial(write_results, kinds, configs[0], run_dir, errors, target_loss)
        comm.on_rank_0(write, "results")
    results = comm.on_rank_0(
        lambda: write_results(kinds, configs[0], run_dir, errors, target_loss, plots=True), "plot"
    )
    return results, code


def _check(kinds: Sequence[Kind], configs: Sequence[Config], world: comm.World) -> None:
    """Refuse what cannot work in this job, all of it at once."""
    faults = []
    for kind, config in zip(kinds, configs, strict=True):
        try:
            check_fusion(config.fusion, world)
        except UserError as error:
            faults.append(f"{kind.text}: {error}")
    try:
        check_world_size(configs[0], world.size)
    except UserError as error:
        faults.append(str(error))
    if faults:
        raise FaultsFound("compare", faults)


# Results


@dataclass(frozen=True)
class Validation:
    """A validation of a run, and what the run had taken up to it."""

    step: int
    validation_loss: float  # nats a token
    tokens: int
    train_seconds: float  # without validation and saving
    total_bytes_sent: int  # by rank 0
    state_bytes: int  # on a rank, beside weights and gradients

    @classmethod
    def of(cls, record: dict[str, Any]) -> Validation:
        return cls(**{key: record[key] for key in cls.__dataclass_fields__})


def write_results(
    kinds: Sequence[Kind],
    config: Config,
    run_dir: Path,
    errors: dict[str, str],
    target_loss: float | None,
    plots: bool = False,
) -> dict[str, Any]:
    """Read the run folders, write compare.json and, if asked for, the plot. Rank 0 calls it.

    config: of any of the kinds; errors: of the kinds that failed.
    """
    metrics = {kind.text: read_metrics(kind.folder(run_dir)) for kind in kinds}
    curves = {
        text: [Validation.of(record) for record in records if record.get("validation_loss") is not None]
        for text, records in metrics.items()
    }
    complete = [curve for curve in curves.values() if curve and curve[-1].step == config.train.steps]
    if target_loss is None:
        target_loss = max((curve[-1].validation_loss for curve in complete), default=None)
    results: dict[str, Any] = {
        "steps": config.train.steps,
        "target_loss": target_loss,
        "plot": None,
        "kinds": [
            {
                "kind": kind.text,
                "run": str(kind.folder(run_dir)),
                **summary(curves[kind.text], config.train.steps, target_loss),
                "error": errors.get(kind.text),
            }
            for kind in kinds
        ],
    }
    if plots and any(metrics.values()) and (figure := plot(metrics, target_loss)):
        figure.savefig(run_dir / PLOT_FILE, dpi=120)
        results["plot"] = str(run_dir / PLOT_FILE)
    run_dir.mkdir(parents=True, exist_ok=True)
    temporary = run_dir / f"{RESULTS_FILE}.tmp"
    temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    temporary.replace(run_dir / RESULTS_FILE)
    return results


def summary(curve: Sequence[Validation], steps: int, target_loss: float | None) -> dict[str, Any]:
    """What a run of `steps` steps reached by its last validation, and when it had come to the target."""
    if not curve:
        return {"step": 0, "is_complete": False}
    last = curve[-1]
    return {
        **asdict(last),
        "is_complete": last.step == steps,
        "tokens_per_second": last.tokens / last.train_seconds,
        "bytes_sent_per_step": last.total_bytes_sent / last.step,
        **{
            f"{key}_to_target": reached([(getattr(v, name), v.validation_loss) for v in curve], target_loss)
            for key, name in (
                ("seconds", "train_seconds"),
                ("tokens", "tokens"),
                ("bytes", "total_bytes_sent"),
            )
        },
    }


def reached(points: Sequence[tuple[float, float]], target_loss: float | None) -> float | None:
    """Where a curve of (x, loss) first comes down to the target, by linear interpolation; None: it does not.

    What lies before the first point is not known: a target reached by then counts as reached there.
    """
    if target_loss is None:
        return None
    for (x0, loss0), (x1, loss1) in zip([points[0], *points], points, strict=False):
        if loss1 <= target_loss:
            return x1 if loss0 <= target_loss else x0 + (x1 - x0) * (loss0 - target_loss) / (loss0 - loss1)
    return None


_COLUMNS = (
    "fusion",
    "validation loss",
    "tokens/s",
    "bytes sent a step",
    "state",
    "time to target",
    "tokens to target",
)


def table(results: dict[str, Any]) -> str:
    """The results for the person: a row a kind, then what there is to say beside."""
    rows: list[Sequence[str]] = [_COLUMNS]
    notes = []
    for entry in results["kinds"]:
        if entry["error"]:
            notes.append(f"{entry['kind']} failed: {entry['error']}")
        elif not entry["is_complete"]:
            done = f"got to step {entry['step']}" if entry["step"] else "has no validation yet"
            notes.append(f"{entry['kind']} {done} of {results['steps']}; the same command goes on from there")
        if not entry["step"]:
            continue
        seconds, tokens = entry["seconds_to_target"], entry["tokens_to_target"]
        rows.append(
            (
                entry["kind"],
                f"{entry['validation_loss']:.4f}"
                + ("" if entry["is_complete"] else f" (step {entry['step']})"),
                f"{entry['tokens_per_second']:,.0f}",
                f"{entry['bytes_sent_per_step']:,.0f}",
                f"{entry['state_bytes'] / 2**20:,.1f} MiB",
                "-" if seconds is None else duration(seconds) if seconds >= 100 else f"{seconds:.1f} s",
                "-" if tokens is None else f"{tokens:,.0f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    if results["target_loss"] is not None:
        lines.append(
            f"target: validation loss {results['target_loss']:.4f}. Bytes and state are those of a rank, time is that "
            "of training, without validation and saving."
        )
    if results["plot"]:
        lines.append(f"curves: {results['plot']}")
    else:
        lines.append(
            "no plot, for want of matplotlib: pip install 'hvdformer[plot]', then the same command again"
        )
    return "\n".join(lines + notes)


def plot(metrics: dict[str, list[dict[str, Any]]], target_loss: float | None) -> Any:
    """Losses over tokens and over time, as a matplotlib figure; None without matplotlib.

    metrics: of each kind. Thin lines are training losses, dots validation losses.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, key, label in zip(
        figure.subplots(1, 2, sharey=True),
        ("tokens", "train_seconds"),
        ("tokens", "seconds of training"),
        strict=True,
    ):
        for number, (kind, records) in enumerate(metrics.items()):
            for loss, style in (
                ("loss", {"lw": 0.7, "alpha": 0.4}),
                ("validation_loss", {"marker": "o", "ms": 3}),
            ):
                points = [(r[key], r[loss]) for r in records if r.get(loss) is not None]
                name = kind if loss == "validation_loss" else None
                axes.plot(
                    *zip(*points, strict=True), color=f"C{number}", label=name, **style
                ) if points else None
        if target_loss is not None:
            axes.axhline(target_loss, color="gray", lw=0.7, ls=":")
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.axes[0].set_ylabel("loss, nats a token")
    return figure
