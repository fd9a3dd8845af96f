"""Training: partition the data, initialise the replicas, train on each rank, fuse the results."""

from __future__ import annotations

import contextlib
import functools
import math
import signal
import time
from pathlib import Path
from typing import Any

from hvdformer import failures, faults, runtime
from hvdformer.agreement import agree, agree_on_weights, check_replicas, not_finite
from hvdformer.config import Config, check_world_size
from hvdformer.data.loader import Batch, BatchLoader
from hvdformer.data.partition import digest, local_micro_batches
from hvdformer.distributed import comm
from hvdformer.distributed.fusion import Share
from hvdformer.distributed.kinds import build_fusion, check_fusion
from hvdformer.distributed.watchdog import Watchdog, beat
from hvdformer.evaluate import evaluate
from hvdformer.guards import SpikeGuard
from hvdformer.initialise import initialise, initialise_from_survivor, newest_survivor
from hvdformer.metrics import Interval, LossSum, peak_memory_bytes
from hvdformer.optim import build_optimizer, learning_rate
from hvdformer.precision import LossScale, autocast
from hvdformer.reports import TIME_IS_UP, closing, opening, sample, versions
from hvdformer.run import Run
from hvdformer.signals import StopRequest
from hvdformer.state import Survivor, TrainState
from hvdformer.tasks import causal_lm


def train(
    config: Config,
    run_dir: Path,
    resume: str,
    here: runtime.Runtime,
    where: runtime.Where,
    survivor: Survivor | None = None,
    stop: StopRequest | None = None,
) -> int:
    """Run the whole job on this rank. Every rank calls it with the same arguments.

    resume: "auto" goes on from the newest whole checkpoint of the run folder if there is one; "never" refuses a
    folder with checkpoints; anything else is the path of a checkpoint from which a new run folder starts.
    survivor: of an elastic job, what this process still holds of the run; kept up to date for the next call.
    stop: installed by a caller that goes on after this run and has to know whether it was asked to stop.

    Returns the exit code: 0, or 130 when SIGINT stopped the run.
    """
    at_end = contextlib.ExitStack()
    try:
        code = _train(config, run_dir, resume, here, where, stop, survivor or Survivor(), at_end)
    except Exception as error:
        if here.world.is_elastic and comm.is_lost_contact(error):
            comm.hang_up()  # before anything that takes time: the others may be waiting for this rank
        # Another run may follow in this process; any other error ends it at once.
        if isinstance(error, comm.Agreed) or here.world.is_elastic:
            at_end.close()
        raise
    at_end.close()
    return code


def _train(
    config: Config,
    run_dir: Path,
    resume: str,
    here: runtime.Runtime,
    where: runtime.Where,
    stop: StopRequest | None,
    survivor: Survivor,
    at_end: contextlib.ExitStack,
) -> int:
    started = time.monotonic()
    world, device = here.world, here.device
    if stop is None:
        stop = StopRequest()
        stop.install()
    comm.on_every_rank(lambda: check_world_size(config, world.size), "world size")
    comm.on_every_rank(lambda: check_fusion(config.fusion, world), "fusion")

    # 1. Partition the data: every rank opens the same examples; position, rank and size say which are its own.
    where.enter("data")
    examples = causal_lm.open_examples(config, world)
    config = comm.on_every_rank(
        lambda: runtime.resolve(config, device, examples.tokenizer.vocab_size, here.threads), "resolve"
    )
    num_micro_batches = config.train.global_batch // config.train.micro_batch
    mine = local_micro_batches(num_micro_batches, world.rank, world.size)

    watch = Watchdog(
        world,
        config.train.stall_timeout_seconds,
        lambda: (where.step, where.phase),
        lambda message: failures.leave(1, message, where.step, where.phase, is_stall=True),
    )
    at_end.callback(watch.stop)

    # 2. Initialise the replicas: rank 0's weights and state on every rank, and proof by hash that they agree.
    where.enter("initialise")
    model = causal_lm.build_model(config).to(device)
    if config.train.compile:
        # Each block, not the whole model: its gradients would all come at once, and nothing would overlap.
        for block in model.blocks:
            block.compile()
    fusion = build_fusion(
        config.fusion,
        model.named_parameters(),
        functools.partial(build_optimizer, config=config.optim, device=device),
        Share(world.rank, world.size, len(mine), num_micro_batches),
    )
    loss_scale = LossScale(config.train.precision == "fp16")
    state = TrainState(model, fusion, loss_scale, SpikeGuard(config.train.max_spike_sigma))
    facts = {
        "config": config.model_dump(mode="json"),
        "world_size": world.size,
        "data_fingerprint": examples.fingerprint,
        "versions": versions(),
    }
    agree(
        {**facts, "parameters": {n: f"{p.dtype} {list(p.shape)}" for n, p in model.named_parameters()}}, world
    )
    drills = faults.arm(world.rank) if survivor.state is None else []  # not again when ranks have changed
    root, step_in_memory = newest_survivor(survivor) if world.is_elastic else (0, -1)
    is_recovered = step_in_memory >= 0
    run = Run.open(
        run_dir,
        config,
        resume,
        model,
        examples.fingerprint,
        world,
        step_in_memory if is_recovered else None,
    )
    at_end.callback(run.close)
    if is_recovered:
        initialise_from_survivor(state, survivor, root)
    else:
        initialise(state, run.start)
        survivor.note(state, None)
        survivor.validation = run.validation
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
    at_end.callback(loader.close)
    if watch.note:
        run.notes.append(watch.note)
    run.say(
        *drills,
        *run.notes,
        *opening(config, run_dir, here, model, examples, counters.step),
    )

    def after_step(record: dict[str, Any] | None, is_leaving: bool = False) -> None:
        """What follows a step: metrics, comparison of the replicas, validation, save. Every rank calls it."""
        step, is_last = counters.step, counters.step == config.train.steps
        if record is not None:
            run.step(record)
        if _due(step, config.train.check_replicas_every) and step % fusion.every == 0:
            check_replicas(state, f"after step {step}")
        if _due(step, config.train.evaluate_every) or is_last:
            where.enter("evaluation")
            limit = config.train.final_evaluate_sequences if is_last else config.train.evaluate_sequences
            validation = evaluate(model, examples.validation, config, world, device, limit)
            costs = {
                "tokens": counters.tokens,
                "train_seconds": counters.train_seconds,
                "total_bytes_sent": counters.total_bytes_sent,
                "state_bytes": fusion.state_bytes(),
            }
            run.validated(step, validation, costs)
            survivor.validation = validation, step
        if _due(step, config.checkpoint.every) or is_last or is_leaving:
            where.enter("save")
            if is_last:  # the final weights are one model, and every rank proves it
                agree_on_weights(state, f"after step {step}")
            newest, at_step = survivor.validation
            run.save(
                state,
                {**facts, "validation": newest, "validation_step": at_step},
                examples.tokenizer,
                config.checkpoint,
                is_final=is_last or is_leaving,
            )
        run.tell_of_saves()

    # 3. Train on each rank.
    nominal_targets = config.train.global_batch * config.model.context_length
    since_log = Interval()
    stop_requested = has_stopped = False
    model.train()
    if is_recovered and counters.step > 0:
        after_step(survivor.record)  # may have been broken off
    while counters.step < config.train.steps and not has_stopped:
        began, sent_before = time.perf_counter(), fusion.bytes_sent
        where.enter("data", counters.step + 1)
        micro_batches = dict(zip(mine, loader.step(counters.position), strict=True))

        def backward(micro_batches: dict[int, Batch] = micro_batches) -> tuple[LossSum, int]:
            """Accumulate the gradients of this rank's micro-batches; the last one starts the fusion of full buckets."""
            losses, num_targets = LossSum(device), 0
            for number, batch in micro_batches.items():
                where.enter("forward")
                runtime.seed_everything((config.train.seed, counters.step, number))
                with autocast(device, config.train.precision):
                    loss, count = causal_lm.loss_sum(model, batch)
                where.enter("backward")
                loss = faults.spoil(loss, counters.step + 1)
                (loss * (loss_scale.value / nominal_targets)).backward()
                losses.add(loss)
                num_targets += count
                beat(where.step)
            where.enter("fusion")
            return losses, num_targets

        if world.is_first and _is_over(config.train.max_minutes, started) and not stop.number:
            stop.number = TIME_IS_UP
        losses, own_targets = backward()
        totals = comm.sum_over_ranks_async(
            [*losses.totals(), own_targets, stop.number, int(comm.hosts_have_changed())], "step totals"
        )
        while not fusion.reduce(nominal_targets / max(own_targets, 1)):
            backward()  # exact fusion found its scale too fine or not known yet: all ranks alike
        *loss_totals, num_targets, stop_number, hosts_changed = comm.wait(totals).tolist()
        stop_requested = stop_requested or stop_number > 0
        # The document mask takes targets away, which the gradients don't know yet.
        scale = 1.0 if fusion.averages_locally else nominal_targets / num_targets
        grad_norm = fusion.clip(config.optim.clip_norm, scale / loss_scale.value)

        where.enter("update")
        rate = learning_rate(config.optim, config.train.steps, counters.step)
        if not loss_scale.accepts(grad_norm):
            fusion.clear()
            counters.skipped_steps += 1
        elif not math.isfinite(grad_norm):
            run.say(not_finite(state, backward, config.train.nonfinite, where.step))
        elif not state.spikes.accepts(grad_norm):
            fusion.clear()
            counters.skipped_steps += 1
            run.say(
                f"step {where.step}: gradient norm {grad_norm:.3g} is a spike; nothing is updated in this step"
            )
        else:
            survivor.is_updating = True
            fusion.update(rate)
            counters.skipped_in_a_row = 0
        step_ids = loader.step_ids(counters.position)
        counters.step += 1
        counters.position += config.train.global_batch
        counters.tokens += num_targets
        is_last, is_one_model = counters.step == config.train.steps, counters.step % fusion.every == 0
        has_stopped = stop_requested and is_one_model
        is_changing = hosts_changed > 0 and is_one_model and not is_last and not has_stopped
        if is_one_model or is_last:
            # 4. Fuse the results: kinds that fused the gradients have one model already, the others make it now.
            where.enter("fusion")
            fusion.fuse()
        where.enter("report")
        seconds = time.perf_counter() - began
        counters.train_seconds += seconds
        counters.total_bytes_sent += fusion.bytes_sent - sent_before
        since_log.add(
            tokens=num_targets,
            seconds=seconds,
            **where.take_seconds("data", "forward", "backward", "fusion", "update"),
            bytes_sent=fusion.bytes_sent - sent_before,
        )

        record = None
        if _due(counters.step, config.train.log_every) or is_last:
            record = {
                "step": counters.step,
                "time": time.time(),
                "position": counters.position,
                "tokens": counters.tokens,
                "train_seconds": counters.train_seconds,
                "epoch": counters.position / len(loader),
                "loss": LossSum.mean(loss_totals, num_targets),
                "learning_rate": rate,
                "grad_norm": grad_norm,
                "skipped_steps": counters.skipped_steps,
                "examples": digest(step_ids),
                **since_log.take(),
            }
        survivor.note(state, record)
        after_step(record, has_stopped or (is_changing and not fusion.is_replicated))
        if is_changing:
            raise comm.WorldChanged

    where.enter("summary")
    peaks = comm.gather_json(peak_memory_bytes(), "peak memory")
    run.say(*closing(config, run_dir, state, survivor.validation[0], peaks, stop.number))
    if world.is_first and counters.step == config.train.steps and config.train.sample_tokens:
        run.say(sample(config, model, examples.tokenizer, device))
    return 130 if stop.number == signal.SIGINT else 0


def _is_over(max_minutes: float | None, started: float) -> bool:
    return max_minutes is not None and time.monotonic() - started > 60 * max_minutes


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
