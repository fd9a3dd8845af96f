"""The command line. Everything heavy is imported inside the commands, so that --help answers at once."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from hvdformer import __version__
from hvdformer.distributed import tuning
from hvdformer.errors import RunError, UserError

if TYPE_CHECKING:
    from hvdformer.runtime import Runtime, Where
    from hvdformer.state import Survivor


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="hvdformer")
def cli() -> None:
    """Train Transformers on Horovod and MPI.

    \b
        horovodrun -np 2 hvdformer train           two ranks on this machine
        mpirun -np 64 hvdformer train run.yaml     a cluster
        hvdformer train                            one process, the same code path
    """


@cli.command()
@click.argument("arguments", nargs=-1, metavar="[CONFIG.yaml] [key=value ...]")
@click.option(
    "--run-dir", type=click.Path(path_type=Path), help="Folder of the run.  [default: runs/NAME OF CONFIG]"
)
@click.option(
    "--resume",
    default="auto",
    show_default=True,
    metavar="auto|never|CHECKPOINT",
    help="Go on from the run folder's newest checkpoint, insist on a new run, or start a new run folder from a checkpoint.",
)
@click.option(
    "--dry-run", is_flag=True, help="Show the resolved config, parameters, memory and steps; start nothing."
)
def train(arguments: tuple[str, ...], run_dir: Path | None, resume: str, dry_run: bool) -> None:
    """Train a model; the same command again goes on where the run stopped.

    With no config: a small language model on the source text of Python's own standard library.
    """
    config_path, overrides = _split_arguments(arguments)
    run_dir = run_dir or _default_run_dir(config_path)
    if dry_run:
        _speak_once(lambda: _dry_run(config_path, overrides, run_dir))

    def job(start: Callable[[], Runtime], where: Where) -> int:
        from hvdformer import elastic
        from hvdformer.config import load_config
        from hvdformer.distributed import comm
        from hvdformer.train import train as run_training

        def run(here: Runtime, survivor: Survivor) -> int:
            config = comm.on_every_rank(lambda: load_config(config_path, overrides), "config")
            return run_training(config, run_dir, resume, here, where, survivor)

        return elastic.run(start, run, where, lambda line: _tell(f"{where.who}: {line}"))

    _on_all_ranks(job, *_device_settings(config_path, overrides))


@cli.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option(
    "-np",
    type=click.IntRange(min=1),
    help="Ranks.  [default: all slots of the hosts; else one per GPU or core here, at most one per micro-batch]",
)
@click.option("--hosts", metavar="a:2,b:2", help="Hosts and their slots.  [default: this machine]")
@click.option(
    "--hostfile",
    type=click.Path(path_type=Path, exists=True),
    help="The same, one host a line: NAME slots=N.",
)
@click.option(
    "--launcher",
    type=click.Choice(["auto", "mpirun", "horovodrun-mpi", "horovodrun-gloo", "srun"]),
    default="auto",
    show_default=True,
)
@click.option("--launcher-arguments", default="", metavar="TEXT", help="More arguments for that launcher.")
@click.option("--max-restarts", type=click.IntRange(min=0), default=10, show_default=True)
@click.option(
    "--min-np",
    type=click.IntRange(min=1),
    help="Go on with as few ranks when hosts are gone.  [default: all]",
)
@click.option(
    "--backoff", type=click.FloatRange(min=0), default=1.0, show_default=True, help="First pause, in seconds."
)
@click.option("--ssh", help="How to reach a host, for mpirun and to ask whether it is there.  [default: ssh]")
@click.argument("command", nargs=-1, required=True, metavar="-- train ...", type=click.UNPROCESSED)
def launch(
    np: int | None,
    hosts: str | None,
    hostfile: Path | None,
    launcher: str,
    launcher_arguments: str,
    max_restarts: int,
    min_np: int | None,
    backoff: float,
    ssh: str | None,
    command: tuple[str, ...],
) -> None:
    """Start `train` on several ranks, and again after a failure: docs/restarts.md.

    hvdformer launch -np 4 -- train run.yaml
    """
    if command[0] != "train":
        raise click.UsageError(f"found {command[0]!r}, expected -- train [CONFIG.yaml] [key=value ...]")
    job = train.make_context("hvdformer train", list(command[1:])).params  # refuses what train would refuse
    config_path, overrides = _split_arguments(job["arguments"])
    if job["dry_run"]:
        raise click.UsageError("--dry-run starts nothing: hvdformer train --dry-run")

    if hosts and hostfile:
        raise click.UsageError("found --hosts and --hostfile, expected one of them")

    def start() -> None:
        from hvdformer import launch as launching
        from hvdformer.config import load_config

        config = load_config(config_path, overrides)
        listed = launching.parse_hosts(hosts) if hosts else ()
        if hostfile:
            listed = launching.parse_hostfile(hostfile.read_text())
        num_ranks = np or launching.default_np(
            listed,
            config.train.global_batch // config.train.micro_batch,
            config.train.device == "cpu",
            os.environ,
        )
        plan = launching.Plan(
            command,
            job["run_dir"] or _default_run_dir(config_path),
            num_ranks,
            min_np or num_ranks,
            listed,
            launching.choose_launcher(launcher, num_ranks, listed, os.environ),
            tuple(shlex.split(launcher_arguments)),
            ssh or launching.SSH,
            max_restarts,
            backoff,
        )
        sys.exit(launching.launch(plan, lambda line: click.echo(f"hvdformer launch: {line}", err=True)))

    _run_local(start)


@cli.command()
@click.argument("arguments", nargs=-1, metavar="[CONFIG.yaml] [key=value ...]")
@click.option(
    "--fusion",
    required=True,
    metavar="KIND[:key=value ...],...",
    help="Kinds of fusion, each with settings of its own: allreduce,allreduce:wire=bf16,diloco:every=100.",
)
@click.option(
    "--run-dir",
    type=click.Path(path_type=Path),
    help="Folder of the runs, one a kind.  [default: runs/compare-NAME OF CONFIG]",
)
@click.option(
    "--target-loss",
    type=float,
    help="Validation loss for time and tokens to it.  [default: the highest that a kind ends with]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def compare(
    arguments: tuple[str, ...], fusion: str, run_dir: Path | None, target_loss: float | None, as_json: bool
) -> None:
    """Train the same model on the same data under several kinds of fusion, and compare what they reach and cost.

    The same command again goes on where it stopped. Settings are those of train; the last validation takes
    train.evaluate_sequences sequences unless they say otherwise.
    """
    config_path, overrides = _split_arguments(arguments)
    name = config_path.stem if config_path else "default"
    folder = run_dir or Path("runs") / f"compare-{name}"

    def job(start: Callable[[], Runtime], where: Where) -> int:
        here = start()
        from hvdformer.compare import compare as run_comparison
        from hvdformer.compare import load_configs, parse_kinds, table
        from hvdformer.distributed import comm

        def say(line: str) -> None:
            if here.world.is_first:
                click.echo(line)

        kinds = parse_kinds(fusion)
        configs = comm.on_every_rank(lambda: load_configs(config_path, overrides, kinds), "config")
        results, code = run_comparison(kinds, configs, folder, target_loss, here, where, say)
        say(json.dumps(results) if as_json else table(results))
        return code

    # Any kind's will do; exact has the say on threads, and all kinds are to have the same.
    kind = "exact" if "exact" in fusion else fusion.split(",")[0].split(":")[0]
    _on_all_ranks(job, *_device_settings(config_path, (*overrides, f"fusion.kind={kind}")))


@cli.command()
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the data set to make.")
@click.option(
    "--tokenizer",
    default="byte",
    show_default=True,
    metavar="byte|bpe:SIZE|FILE",
    help="Bytes, a BPE trained on a sample of the input, or a tokenizer.json.",
)
@click.option(
    "--text-key",
    default="text",
    show_default=True,
    help="Key of JSON lines, column of Parquet, that holds the text.",
)
@click.option(
    "--errors",
    type=click.Choice(["strict", "replace", "skip"]),
    default="strict",
    show_default=True,
    help="What to do with text that is not UTF-8; skip also leaves out broken JSON lines.",
)
@click.option("--dedup", is_flag=True, help="Keep only the first of documents with the same text.")
@click.option(
    "--validation-fraction",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.01,
    show_default=True,
    help="Share of documents, by hash, for validation.",
)
@click.option(
    "--shuffle-seed", type=click.IntRange(min=0), help="Shuffle the documents.  [default: order of the input]"
)
@click.option(
    "--shard-tokens",
    type=click.IntRange(min=1),
    default=2**27,
    show_default=True,
    help="Tokens a shard, about.",
)
def prepare(
    inputs: tuple[str, ...],
    out: Path,
    tokenizer: str,
    text_key: str,
    errors: Any,
    dedup: bool,
    validation_fraction: float,
    shuffle_seed: int | None,
    shard_tokens: int,
) -> None:
    """Turn text into a data set: files, folders and globs of text, .jsonl or .parquet, plain or .gz, .bz2, .xz or .zst.

    One file, line or row is one document. Start it on all cores with `mpirun -np N hvdformer prepare ...`; the result is
    the same to the bit for every N, and the same command again goes on where an interrupted one was.
    """
    from hvdformer.distributed.launcher import detect

    launch = detect(os.environ)

    def work() -> None:
        from hvdformer.data.prepare import Options, Ranks, join_mpi
        from hvdformer.data.prepare import prepare as run_prepare

        comm = None
        if launch is not None and launch.size > 1:
            if "MPI" not in launch.launcher and not launch.launcher.startswith("srun"):
                raise UserError(
                    f"prepare runs over MPI, not under {launch.launcher}: start it with mpirun -np {launch.size}"
                )
            comm = join_mpi(launch.size)
        options = Options(tokenizer, text_key, errors, dedup, validation_fraction, shuffle_seed, shard_tokens)
        run_prepare(inputs, out, options, Ranks(comm), lambda line: click.echo(line))

    # Every error is the same on all ranks: the first one tells it.
    _run_local(work, speaks=launch is None or launch.rank == 0)


@cli.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[key=value ...]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def evaluate(checkpoint: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Validate a CHECKPOINT (a step folder, or a run folder: its newest) on all ranks."""

    def job(start: Callable[[], Runtime], where: Where) -> int:
        here = start()
        from hvdformer.evaluate import evaluate_checkpoint

        result = evaluate_checkpoint(checkpoint, overrides, here)
        if here.world.is_first:
            if as_json:
                click.echo(json.dumps(result))
            else:
                click.echo(
                    f"{result['checkpoint']}: validation loss {result['validation_loss']:.4f}, "
                    f"{result['bits_per_byte']:.3f} bits per byte on {result['sequences']} sequences"
                )
        return 0

    _on_all_ranks(job, *_device_settings(None, overrides))


@cli.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--prompt", default="", help="What the text begins with.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.8,
    show_default=True,
    help="0: the likeliest token.",
)
@click.option("--top-k", type=click.IntRange(min=1), help="Sample from the k likeliest tokens only.")
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    help="Sample from the likeliest tokens that hold this probability.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def generate(
    checkpoint: Path,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
) -> None:
    """Continue a prompt with a CHECKPOINT (a step folder, or a run folder: its newest)."""

    def speak() -> None:
        from hvdformer.evaluate import load_model
        from hvdformer.generate import generate as generate_text

        model, tokenizer, device = load_model(checkpoint)
        text = generate_text(
            model,
            tokenizer,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            device=device,
        )
        click.echo(prompt + text)

    _speak_once(speak)


@cli.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--verify", is_flag=True, help="Check every checksum of a shard folder; checkpoints are always checked."
)
def inspect(path: Path, verify: bool) -> None:
    """Describe a checkpoint, a run folder or a shard folder as JSON."""

    def speak() -> None:
        from hvdformer.inspection import inspect as inspect_path

        click.echo(json.dumps(inspect_path(path, verify=verify), indent=1))

    _speak_once(speak)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(as_json: bool) -> None:
    """Say what works here and what not; under a launcher also test every collective on all ranks."""
    from hvdformer.doctor import doctor as examine

    _run_local(lambda: sys.exit(examine(as_json)))


@cli.command()
@click.argument("arguments", nargs=-1, metavar="[CONFIG.yaml] [key=value ...]")
@click.option(
    "--params", metavar="N", help="Parameters, such as 7b or 350m: a Llama-like shape of about so many."
)
@click.option("--gpus", type=click.IntRange(min=1), required=True, help="Ranks in all, one a GPU.")
@click.option("--gpus-per-node", type=click.IntRange(min=1), help="Ranks of a node.  [default: 8, or all]")
@click.option(
    "--bandwidth", metavar="RATE", help="Of a node's network, one way: 400Gbit or 50GB, a second.  [400Gbit]"
)
@click.option("--latency", metavar="TIME", help="Of one message between nodes: 14us.  [14us, NCCL's]")
@click.option(
    "--intra-bandwidth", metavar="RATE", help="Of a GPU to its node's others, one way.  [450GB, NVLink 4]"
)
@click.option("--intra-latency", metavar="TIME", help="Of one message within a node.  [3.4us, NCCL's]")
@click.option(
    "--link-efficiency",
    type=click.FloatRange(0, 1, min_open=True),
    help="Share of the nominal bandwidths that collectives reach.  [0.8]",
)
@click.option(
    "--tflops",
    type=click.FloatRange(min=0, min_open=True),
    help="Peak of a GPU in TFLOP/s, dense, in the precision used.  [989, H100 in bf16]",
)
@click.option(
    "--mfu",
    type=click.FloatRange(0, 1, min_open=True),
    help="Share of that peak that training reaches.  [0.4]",
)
@click.option("--memory", metavar="BYTES", help="Of a GPU: 80GB.  [80GB]")
@click.option("--memory-bandwidth", metavar="RATE", help="Of a GPU's memory: 3.35TB, a second.  [3.35TB]")
@click.option("--context-length", type=click.IntRange(min=1), help="Tokens a sequence.  [the model's]")
@click.option(
    "--micro-batch",
    type=click.IntRange(min=1),
    help="Sequences in one forward and backward.  [config's, or 1]",
)
@click.option(
    "--accumulate",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Micro-batches of a GPU in a step.",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16", "fp16"]),
    default="bf16",
    show_default=True,
    help="Of forward and backward, for their memory; --tflops is to be the peak in it.",
)
@click.option(
    "--activation-checkpointing", is_flag=True, default=None, help="Recompute each block in backward."
)
@click.option(
    "--bucket-mib",
    type=click.FloatRange(min=0, min_open=True),
    help="MiB of gradients a collective.  [fusion.bucket_mib]",
)
@click.option(
    "--every", type=click.IntRange(min=1), help="local_sgd, diloco: steps between two fusions.  [50]"
)
@click.option("--cycle-time", metavar="TIME", help="Between two of Horovod's negotiations.  [1ms]")
@click.option(
    "--contention",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Share of hidden communication that slows computing all the same: 1 where ranks fill a CPU's cores.",
)
@click.option(
    "--algorithm",
    type=click.Choice(["auto", "ring", "tree"]),
    default="auto",
    show_default=True,
    help="Of an allreduce; auto: the faster one for each, as NCCL chooses.",
)
@click.option(
    "--measured",
    type=click.Path(path_type=Path),
    help="Step time and links from a file of `hvdformer bench --json`; options given here win.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def plan(arguments: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Predict memory, step time and scaling efficiency of each kind of fusion on GPUs that are not here: docs/plan.md.

    \b
        hvdformer plan --params 7b --gpus 512 --bandwidth 400Gbit
        hvdformer plan configs/llama-1b.yaml --gpus 64 --bandwidth 100Gbit --accumulate 2
    """
    config_path, overrides = _split_arguments(arguments)

    def speak() -> None:
        from hvdformer import plan as planning

        result = planning.plan(planning.read_options(given), config_path, overrides)
        click.echo(json.dumps(result, indent=1) if as_json else planning.table(result))

    _speak_once(speak)


@cli.command("build-horovod")
@click.option("--gpu", type=click.Choice(["auto", "nccl", "none"]), default="auto", show_default=True)
@click.option("--mpi", type=click.Choice(["auto", "system", "wheel"]), default="auto", show_default=True)
@click.option(
    "--jobs", type=click.IntRange(min=1), help="Parallel compilers.  [default: by cores and memory]"
)
@click.option(
    "--wheel-dir",
    type=click.Path(path_type=Path),
    help="Where built wheels are kept.  [default: ~/.cache/hvdformer/wheels]",
)
@click.option("--force", is_flag=True, help="Build again, also when the same wheel is there.")
def build_horovod(gpu: str, mpi: str, jobs: int | None, wheel_dir: Path | None, force: bool) -> None:
    """Build Horovod for the torch, MPI and CUDA of this environment, and install it."""
    from hvdformer.horovod_build import build_horovod as build

    _run_local(lambda: build(gpu=gpu, mpi=mpi, jobs=jobs, wheel_dir=wheel_dir, force=force))


@cli.command()
@click.argument("arguments", nargs=-1, metavar="[CONFIG.yaml] [key=value ...]")
@click.option(
    "-np",
    "--np",
    "sizes",
    metavar="1,2,4",
    help="Numbers of ranks.  [default: 1, 2, 4, ... up to one per GPU or core here, at most one per micro-batch]",
)
@click.option(
    "--steps", type=click.IntRange(min=1), default=10, show_default=True, help="Timed steps, after 3 others."
)
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True)
@click.option(
    "--launcher",
    type=click.Choice(["auto", "mpirun", "horovodrun-mpi", "horovodrun-gloo"]),
    default="auto",
    show_default=True,
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the tables.")
def bench(
    arguments: tuple[str, ...],
    sizes: str | None,
    steps: int,
    repeats: int,
    launcher: str,
    as_json: bool,
) -> None:
    """Measure this machine: scaling over ranks, where a step's time goes, and how far from the limit: docs/bench.md.

    Takes minutes, and nothing else should run. The model and the step are those of train.
    """
    config_path, overrides = _split_arguments(arguments)

    def measure() -> None:
        from hvdformer import bench as benchmark

        if sizes is not None and not all(part.isdecimal() and int(part) for part in sizes.split(",")):
            raise UserError(f"--np: found {sizes!r}, expected numbers of ranks such as 1,2,4")
        numbers = [int(part) for part in sizes.split(",")] if sizes else None
        settings = benchmark.prepare(config_path, overrides, numbers, steps, repeats, launcher)
        results = benchmark.bench(settings, lambda line: click.echo(line, err=True))
        click.echo(json.dumps(results, indent=1) if as_json else benchmark.tables(results))

    _run_local(measure)


def main() -> None:
    """The console script."""
    tuning.poll_briefly(os.environ)
    cli.main(prog_name="hvdformer")


def _default_run_dir(config_path: Path | None) -> Path:
    return Path("runs") / (config_path.stem if config_path else "default")


def _split_arguments(arguments: tuple[str, ...]) -> tuple[Path | None, tuple[str, ...]]:
    """[CONFIG.yaml] [key=value ...] in any order."""
    paths = [Path(argument) for argument in arguments if "=" not in argument]
    if len(paths) > 1:
        raise click.UsageError(
            f"found {len(paths)} arguments without '=' ({', '.join(map(str, paths))}), expected one CONFIG.yaml at most"
        )
    return (paths[0] if paths else None), tuple(argument for argument in arguments if "=" in argument)


def _device_settings(config_path: Path | None, overrides: tuple[str, ...]) -> tuple[str, int | None]:
    """train.device and train.threads, which are needed to join the job; faults in the config are told once joined."""
    from hvdformer.config import load_config

    try:
        config = load_config(config_path, overrides)
    except UserError:
        return "auto", None
    threads = config.train.threads
    if threads is None and config.fusion.kind == "exact":
        threads = 1  # the same on every machine and at any world size, or the bits would differ
    return config.train.device, threads


def _on_all_ranks(
    job: Callable[[Callable[[], Runtime], Where], int], device: str, threads: int | None
) -> NoReturn:
    """Run this rank's part and leave: whatever happens ends every rank with one message and a code.

    job: given what joins the job, to be called first, and where to note how far it is.
    """
    from hvdformer import failures, runtime
    from hvdformer.distributed import comm

    where = runtime.Where()

    def start() -> Runtime:
        here = runtime.start(device, threads)
        where.who = f"rank {here.world.rank} on {comm.host_name()}"
        return here

    def leave(code: int, message: str, is_consequence: bool = False) -> None:
        failures.leave(code, message, where.step, where.phase, is_consequence)

    try:
        code = job(start, where)
        if code != 0:
            leave(code, "stopped by SIGINT")
        comm.disconnect()
        sys.exit(code)
    except comm.Agreed as error:
        # All ranks are here with the same error: the first one tells it, and they leave in order.
        if comm.is_first():
            leave(error.exit_code, str(error))
            _tell(str(error))
        comm.disconnect()
        sys.exit(error.exit_code)
    except (UserError, RunError) as error:
        leave(error.exit_code, str(error))
        _tell(str(error) if where.step == 0 else f"{where.who}, step {where.step}, {where.phase}: {error}")
        comm.abort(error.exit_code)
    except KeyboardInterrupt:  # before training has its own handling of signals
        leave(130, "stopped by SIGINT")
        comm.abort(130)
    except Exception as error:
        if comm.is_lost_contact(error):
            # Some other rank failed first and says why; this one would only add noise, and is mostly ended before this.
            leave(1, "lost contact with another rank", is_consequence=True)
            time.sleep(2)
            _tell(f"{where.who}, step {where.step}, {where.phase}: lost contact with another rank ({error})")
        else:
            leave(1, f"{type(error).__name__}: {error}")
            traceback.print_exc()
            _tell(f"{where.who}, step {where.step}, {where.phase}: {type(error).__name__}: {error}")
        comm.abort(1)


def _speak_once(command: Callable[[], Any]) -> NoReturn:
    """Run a command that needs one process; started as several, the others leave it to the first."""
    from hvdformer.distributed.launcher import detect

    launch = detect(os.environ)
    if launch is None or launch.rank == 0:
        _run_local(command)
    sys.exit(0)


def _run_local(command: Callable[[], Any], speaks: bool = True) -> None:
    """Run without Horovod: a mistake or failure is told in one message, with its exit code."""
    try:
        command()
    except (UserError, RunError) as error:
        if speaks:
            _tell(str(error))
        else:
            time.sleep(5)  # the launcher ends all when the first one goes: that has to be the one that speaks
        sys.exit(error.exit_code)


def _dry_run(config_path: Path | None, overrides: tuple[str, ...], run_dir: Path) -> None:
    from hvdformer.inspection import dry_run

    click.echo(dry_run(config_path, overrides, run_dir))


def _tell(message: str) -> None:
    click.echo(f"hvdformer: {message}", err=True)
