"""Training: partition the data, initialise the replicas, train on each rank, fuse the results."""

from __future__ import annotations

import math
import platform
import signal
import time
from pathlib import Path
from typing import Any

import torch

import hvdformer
from hvdformer import checkpoint, runtime
from hvdformer.config import Config, check_world_size
from hvdformer.data.loader import BatchLoader
from hvdformer.data.partition import digest, local_micro_batches
from hvdformer.data.tokenizer import Tokenizer
from hvdformer.distributed import comm
from hvdformer.distributed.allreduce import AllreduceFusion
from hvdformer.distributed.buckets import flatten
from hvdformer.distributed.comm import World
from hvdformer.errors import RunError, UserError
from hvdformer.evaluate import evaluate
from hvdformer.generate import generate
from hvdformer.metrics import Reporter, duration, peak_memory_bytes
from hvdformer.models.decoder import Decoder
from hvdformer.optim import build_optimizer, clip_by_global_norm, learning_rate
from hvdformer.precision import autocast
from hvdformer.run_folder import RunFolder
from hvdformer.signals import StopRequest
from hvdformer.state import TrainState, tensors_sha256
from hvdformer.tasks import causal_lm
from hvdformer.tasks.causal_lm import Examples


def train(config: Config, run_dir: Path, resume: str, here: runtime.Runtime, where: runtime.Where) -> int:
    """Run the whole job on this rank. Every rank calls it with the same arguments.

    resume: "auto" goes on from the newest whole checkpoint of the run folder if there is one; "never" refuses a
    folder with checkpoints; anything else is the path of a checkpoint from which a new run folder starts.

    Returns the exit code: 0, or 130 when SIGINT stopped the run.
    """
    world, device = here.world, here.device
    stop = StopRequest()
    stop.install()
    comm.on_every_rank(lambda: check_world_size(config, world.size), "world size")

    # 1. Partition the data: every rank opens the same examples; position, rank and size say which are its own.
    where.phase = "data"
    examples = causal_lm.open_examples(config, world)
    config = comm.on_every_rank(
        lambda: runtime.resolve(config, device, examples.tokenizer.vocab_size), "resolve"
    )
    num_micro_batches = config.train.global_batch // config.train.micro_batch
    mine = local_micro_batches(num_micro_batches, world.rank, world.size)

    # 2. Initialise the replicas: rank 0's weights and state on every rank, and proof by hash that they agree.
    where.phase = "initialise"
    model = causal_lm.build_model(config).to(device)
    if config.train.compile:
        # Each block, not the whole model: its gradients would all come at once, and nothing would overlap.
        for block in model.blocks:
            block.compile()
    buckets = flatten(model.named_parameters(), config.fusion.bucket_mib)
    matrices, vectors = ([b.flat for b in buckets if b.decays == decays] for decays in (True, False))
    optimizer = build_optimizer(matrices, vectors, config.optim, device)
    fusion = AllreduceFusion(optimizer, buckets, config.fusion, backward_passes=len(mine))
    scaler = torch.amp.GradScaler(device.type, enabled=config.train.precision == "fp16")
    state = TrainState(model, fusion.optimizer, buckets, scaler)
    facts = {
        "config": config.model_dump(mode="json"),
        "world_size": world.size,
        "data_fingerprint": examples.fingerprint,
        "versions": versions(),
    }
    _agree(facts)
    run = Run.open(run_dir, config, resume, model, examples.fingerprint, world)
    _initialise(state, run.start)
    counters = state.counters
    where.step = counters.step
    loader = BatchLoader(
        examples.train,
        weights=examples.weights,
        seed=config.train.seed,
        micro_batch=config.train.micro_batch,
        num_micro_batches=num_micro_batches,
        rank=world.rank,
        size=world.size,
        document_mask=config.data.document_mask,
        shuffle=config.data.shuffle,
        device=device,
    )
    run.say(*run.notes, *_opening(config, run_dir, here, model, examples, counters.step))

    # 3. Train on each rank.
    nominal_targets = config.train.global_batch * config.model.context_length
    parameters = [*matrices, *vectors]
    since_log = _Interval()
    validation: dict[str, Any] | None = run.validation
    stopped = 0
    model.train()
    while counters.step < config.train.steps and not stopped:
        began = time.perf_counter()
        where.step, where.phase = counters.step + 1, "data"
        micro_batches = loader.step(counters.position)

        where.phase = "forward and backward"
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        num_targets = 0
        for number, batch in zip(mine, micro_batches, strict=True):
            runtime.seed_everything((config.train.seed, counters.step, number))
            with autocast(device, config.train.precision):
                loss, count = causal_lm.loss_sum(model, batch)
            # The backward of the last micro-batch starts the allreduce, bucket by bucket.
            scaler.scale(loss / nominal_targets).backward()
            loss_sum += loss.detach()
            num_targets += count
        totals = comm.sum_over_ranks_async([loss_sum.item(), num_targets, stop.number], "step totals")

        where.phase = "fusion"
        computed = time.perf_counter()
        fusion.reduce()
        total_loss, total_targets, stopped = comm.wait(totals).tolist()
        fusion_seconds = time.perf_counter() - computed  # what backward did not hide

        where.phase = "update"
        scaler.unscale_(fusion.optimizer)
        if total_targets != nominal_targets:  # the document mask takes targets away
            torch._foreach_mul_(
                [p.grad for p in parameters if p.grad is not None], nominal_targets / total_targets
            )
        grad_norm = float(clip_by_global_norm(parameters, config.optim.clip_norm))
        if not scaler.is_enabled() and not math.isfinite(grad_norm):
            raise comm.Agreed(
                f"step {where.step}: the gradient norm is {grad_norm} and the loss {total_loss / total_targets}, on all "
                "ranks alike. The run ends before the weights are harmed: start it again with a lower "
                "optim.learning_rate or a longer optim.warmup_steps, or train.precision=fp32.",
                RunError.exit_code,
            )
        rate = learning_rate(config.optim, config.train.steps, counters.step)
        for group in fusion.optimizer.param_groups:
            group["lr"] = rate
        fusion.update(scaler)
        scaler.update()
        step_ids = loader.step_ids(counters.position)
        counters.step += 1
        counters.position += config.train.global_batch
        counters.tokens += int(total_targets)
        seconds = time.perf_counter() - began
        counters.train_seconds += seconds
        since_log.add(int(total_targets), seconds, loader.wait_seconds, fusion_seconds)

        is_last = counters.step == config.train.steps
        if run.reporter and (_due(counters.step, config.train.log_every) or is_last):
            run.reporter.step(
                {
                    "step": counters.step,
                    "time": time.time(),
                    "position": counters.position,
                    "tokens": counters.tokens,
                    "epoch": counters.position / len(loader),
                    "loss": total_loss / total_targets,
                    "learning_rate": rate,
                    "grad_norm": grad_norm,
                    "examples": digest(step_ids),
                    **since_log.take(),
                }
            )
        if _due(counters.step, config.train.evaluate_every) or is_last:
            where.phase = "evaluation"
            limit = config.train.final_evaluate_sequences if is_last else config.train.evaluate_sequences
            validation = evaluate(model, examples.validation, config, world, device, limit)
            run.validated(counters.step, validation)
        if _due(counters.step, config.checkpoint.every) or is_last or stopped:
            where.phase = "save"
            if is_last:
                # 4. Fuse the results: the final weights are one model, and every rank proves it.
                _agree_on_weights(state, f"after step {counters.step}")
            run.save(
                state, {**facts, "validation": validation}, examples.tokenizer, config.checkpoint.keep_last
            )

    loader.close()
    where.phase = "summary"
    peaks = comm.gather_json(peak_memory_bytes(), "peak memory")
    run.say(*_closing(config, run_dir, state, validation, peaks, stop.number))
    if world.is_first and counters.step == config.train.steps and config.train.sample_tokens:
        run.say(_sample(config, model, examples.tokenizer, device))
    run.close()
    return 130 if stop.number == signal.SIGINT else 0


class Run:
    """The run folder and what is reported: rank 0 has them, the other ranks only know where the run starts."""

    def __init__(self) -> None:
        self.folder: RunFolder | None = None
        self.reporter: Reporter | None = None
        self.start: Path | None = None  # the checkpoint to start from
        self.validation: dict[str, Any] | None = None  # the newest validation before it
        self.notes: list[str] = []

    @classmethod
    def open(
        cls,
        path: Path,
        config: Config,
        resume: str,
        model: torch.nn.Module,
        data_fingerprint: str,
        world: World,
    ) -> Run:
        """Open the folder on rank 0 and tell every rank where the run starts. Every rank calls it."""
        run = cls()

        def open_folder() -> dict[str, Any]:
            checkpoint_bytes = 3 * sum(p.numel() * p.element_size() for p in model.parameters())
            run.folder = RunFolder(path, config, checkpoint_bytes)
            start, notes = _find_start(run.folder.checkpoints, resume)
            stored = checkpoint.read_state(start) if start else {}
            of_this_run = start is not None and start.parent == run.folder.checkpoints
            if of_this_run and stored["data_fingerprint"] != data_fingerprint:
                raise UserError(
                    f"{start} was trained on other data (fingerprint {stored['data_fingerprint'][:12]}, now "
                    f"{data_fingerprint[:12]}). Bring that data back; or, to go on with the new data, start a new run "
                    f"from the checkpoint: --run-dir NEW --resume {start}"
                )
            run.reporter = Reporter(path, config.train.steps, stored.get("step", 0))
            return {"start": start and str(start), "notes": notes, "validation": stored.get("validation")}

        found = comm.on_rank_0(open_folder, "open run")
        run.start = Path(found["start"]) if found["start"] else None
        run.notes, run.validation = found["notes"], found["validation"]
        return run

    def say(self, *lines: str) -> None:
        if self.reporter:
            for line in lines:
                self.reporter.say(line)

    def validated(self, step: int, validation: dict[str, Any]) -> None:
        if self.reporter:
            self.reporter.record({"step": step, **validation})
            self.reporter.say(
                f"step {step}  validation loss {validation['validation_loss']:.4f}  "
                f"{validation['bits_per_byte']:.3f} bits per byte  ({validation['sequences']} sequences)"
            )

    def save(self, state: TrainState, facts: dict[str, Any], tokenizer: Tokenizer, keep_last: int) -> None:
        """Save on rank 0 while the others wait for the outcome. Every rank calls it."""

        def write() -> str:
            assert self.folder is not None and self.reporter is not None
            self.reporter.sync()
            return str(checkpoint.save(self.folder.checkpoints, state, tokenizer.to_json(), facts, keep_last))

        began = time.perf_counter()
        path = comm.on_rank_0(write, "save")
        self.say(f"step {state.counters.step}  saved {path} in {time.perf_counter() - began:.1f} s")

    def close(self) -> None:
        if self.reporter:
            self.reporter.close()
        if self.folder:
            self.folder.close()


class _Interval:
    """Tokens and seconds of the steps since the last logged one."""

    def __init__(self) -> None:
        self._steps = self._tokens = 0
        self._seconds = self._data_seconds = self._fusion_seconds = 0.0

    def add(self, tokens: int, seconds: float, data_seconds: float, fusion_seconds: float) -> None:
        self._steps += 1
        self._tokens += tokens
        self._seconds += seconds
        self._data_seconds += data_seconds
        self._fusion_seconds += fusion_seconds

    def take(self) -> dict[str, float]:
        """The means for metrics.jsonl; counting starts anew."""
        metrics = {
            "tokens_per_second": self._tokens / self._seconds,
            "step_seconds": self._seconds / self._steps,
            "data_seconds": self._data_seconds / self._steps,
            "fusion_seconds": self._fusion_seconds / self._steps,
        }
        self.__init__()  # type: ignore[misc]
        return metrics


def versions() -> dict[str, str]:
    """The versions that decide what a run computes."""
    return {
        "hvdformer": hvdformer.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _find_start(checkpoints: Path, resume: str) -> tuple[Path | None, list[str]]:
    """The checkpoint to start from, or None, and what the user should know of it."""
    latest, damages = checkpoint.find_latest(checkpoints)
    if latest is None and damages:
        raise UserError("every checkpoint is damaged:\n  " + "\n  ".join(damages))
    if latest is not None and resume == "never":
        raise UserError(
            f"{checkpoints} holds checkpoints already. Choose a new --run-dir, or go on with this one by --resume auto."
        )
    if latest is None and resume not in ("auto", "never"):
        return checkpoint.resolve(Path(resume)), []
    return (
        latest,
        damages,
    )  # also for a run that began at another's checkpoint, when the same command comes again


def _initialise(state: TrainState, start: Path | None) -> None:
    """Bring rank 0's weights, and the whole state if there is a checkpoint, to every rank. Every rank calls it."""
    if start is not None:

        def load() -> dict[str, Any]:
            checkpoint.load_tensors(start, checkpoint.MODEL_FILE, dict(state.weights()))
            specs = checkpoint.tensor_specs(start, checkpoint.OPTIMIZER_FILE)
            state.make_optimizer_tensors(specs)
            checkpoint.load_tensors(start, checkpoint.OPTIMIZER_FILE, dict(state.optimizer_tensors()))
            return {"specs": specs, "state": checkpoint.read_state(start)}

        loaded = comm.on_rank_0(load, "load")
        if next(state.optimizer_tensors(), None) is None:  # not rank 0
            state.make_optimizer_tensors(loaded["specs"])
        state.load_dict(loaded["state"])
    comm.broadcast_tensors(state.tensors(), "initialise")
    _agree_on_weights(state, "after the broadcast of the initial state")


def _agree_on_weights(state: TrainState, when: str) -> None:
    """Compare the weights of all ranks by hash. Every rank calls it."""
    hashes = comm.gather_json(tensors_sha256(state.weights()), "weights hash")
    odd = [rank for rank, value in enumerate(hashes) if value != hashes[0]]
    if odd:
        raise comm.Agreed(
            f"{when} the weights of rank {', '.join(map(str, odd))} differ from rank 0's: the replicas are no longer one "
            "model. Run `hvdformer doctor` under the same launcher; the last checkpoint is untouched.",
            RunError.exit_code,
        )


def _agree(facts: dict[str, Any]) -> None:
    """Compare what decides the run on all ranks, before the first step. Every rank calls it."""
    places = comm.gather_json({**facts, "host": comm.host_name()}, "agreement")
    for rank, theirs in enumerate(places):
        different = [key for key in facts if theirs[key] != places[0][key]]
        if different:
            key = different[0]
            raise comm.Agreed(
                f"rank {rank} on {theirs['host']} has another {key} than rank 0 on {places[0]['host']}: "
                f"{_difference(theirs[key], places[0][key])}. Give all hosts the same files and software.",
                UserError.exit_code,
            )


def _difference(theirs: Any, ours: Any) -> str:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        key = next(key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key))
        return f"{key} " + _difference(theirs.get(key), ours.get(key))
    return f"{theirs!r} against {ours!r}"


def _opening(
    config: Config,
    run_dir: Path,
    here: runtime.Runtime,
    model: torch.nn.Module,
    examples: Examples,
    step: int,
) -> list[str]:
    """The lines that say what is about to run."""
    world, train = here.world, config.train
    ranks = "1 rank" if world.size == 1 else f"{world.size} ranks ({world.local_size} on this host)"
    chosen = ", ".join(
        f"{name}={value}" for name, value, _ in world.choices if not name.startswith("HOROVOD_CROSS")
    )
    lines = [
        f"hvdformer {hvdformer.__version__}: {ranks}, {here.device.type}, {here.threads} threads a rank, "
        f"{train.precision}, controller {world.controller}, CPU operations {world.operations}",
        f"chosen for Horovod here: {chosen or 'nothing, all of it was set already'}",
        f"model: {sum(p.numel() for p in model.parameters()):,} parameters; "
        f"data: {sum(s.shards.num_tokens for s in examples.train):,} tokens to train on",
        f"{train.steps} steps of {train.global_batch} x {config.model.context_length} tokens in micro-batches of "
        f"{train.micro_batch}; run folder {run_dir}",
    ]
    if step == train.steps:
        lines.append(
            f"this run is complete at step {step}: nothing is left to train. For another run choose a new --run-dir."
        )
    elif step:
        lines.append(f"going on from step {step}")
    return lines


def _closing(
    config: Config,
    run_dir: Path,
    state: TrainState,
    validation: dict[str, Any] | None,
    peaks: list[int],
    signalled: int,
) -> list[str]:
    """The closing summary."""
    counters = state.counters
    lines = [
        f"{counters.step} steps, {counters.tokens:,} tokens in {duration(counters.train_seconds)} of training; "
        f"peak memory of a rank {max(peaks) / 2**20:,.0f} MiB"
    ]
    if counters.step < config.train.steps:
        by = f" by {signal.Signals(signalled).name}" if signalled else ""
        lines.append(
            f"stopped{by} after step {counters.step} of {config.train.steps}, saved; the same command goes on from there"
        )
        return lines
    if validation is not None:
        lines.append(
            f"validation loss {validation['validation_loss']:.4f}, {validation['bits_per_byte']:.3f} bits per byte"
        )
    lines.append(f"checkpoint: {run_dir / 'checkpoints' / f'step-{counters.step:08d}'}")
    lines.append(f"sample from it: hvdformer generate {run_dir} --prompt {config.train.sample_prompt!r}")
    return lines


def _sample(config: Config, model: Decoder, tokenizer: Tokenizer, device: torch.device) -> str:
    """A sample of text from the trained model."""
    text = generate(
        model,
        tokenizer,
        config.train.sample_prompt,
        max_new_tokens=config.train.sample_tokens,
        temperature=0.7,
        seed=config.train.seed,
        device=device,
    )
    return f"sample:\n{config.train.sample_prompt}{text}"
