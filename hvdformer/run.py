"""One run's folder and reports: rank 0 has them open, the other ranks only know where the run starts."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import torch

from hvdformer import checkpoint
from hvdformer.config import CheckpointConfig, Config
from hvdformer.data.tokenizer import Tokenizer
from hvdformer.distributed import comm
from hvdformer.distributed.comm import World
from hvdformer.errors import RunError, UserError
from hvdformer.metrics import Reporter
from hvdformer.run_folder import RunFolder
from hvdformer.state import TrainState


class Run:
    """The run folder and what is reported: rank 0 has them, the other ranks only know where the run starts."""

    def __init__(self) -> None:
        self.folder: RunFolder | None = None
        self.reporter: Reporter | None = None
        self.start: Path | None = None  # the checkpoint to start from
        self.validation: tuple[dict[str, Any] | None, int | None] = (
            None,
            None,
        )  # the newest before it, its step
        self._saving: _Saving | None = None
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
        step_in_memory: int | None = None,
    ) -> Run:
        """Open the folder on rank 0 and tell every rank where the run starts. Every rank calls it.

        step_in_memory: the step that a rank of an elastic job still holds; what followed it is done once more.
        """
        run = cls()

        def open_folder() -> dict[str, Any]:
            checkpoint_bytes = 3 * sum(p.numel() * p.element_size() for p in model.parameters())
            run.folder = RunFolder(path, config, checkpoint_bytes)
            if step_in_memory is not None:
                run.reporter = Reporter(path, config.train.steps, step_in_memory - 1)
                return {"start": None, "notes": [], "validation": (None, None)}
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
            return {
                "start": start and str(start),
                "notes": notes,
                "validation": (stored.get("validation"), stored.get("validation_step")),
            }

        found = comm.on_rank_0(open_folder, "open run")
        run.start = Path(found["start"]) if found["start"] else None
        run.notes = found["notes"]
        run.validation = tuple(found["validation"])
        return run

    def say(self, *lines: str) -> None:
        if self.reporter:
            for line in lines:
                self.reporter.say(line)

    def step(self, metrics: dict[str, Any]) -> None:
        """A training step that is logged."""
        if self.reporter:
            self.reporter.step(metrics)

    def validated(self, step: int, validation: dict[str, Any], costs: dict[str, float]) -> None:
        """costs: what the run has taken up to here."""
        if self.reporter:
            self.reporter.record({"step": step, **validation, **costs})
            self.reporter.say(
                f"step {step}  validation loss {validation['validation_loss']:.4f}  "
                f"{validation['bits_per_byte']:.3f} bits per byte  ({validation['sequences']} sequences)"
            )

    def save(
        self,
        state: TrainState,
        facts: dict[str, Any],
        tokenizer: Tokenizer,
        settings: CheckpointConfig,
        is_final: bool,
    ) -> None:
        """Save on rank 0. Every rank calls it.

        What cannot be written is told, and tried again with the next save: the run goes on with the checkpoint before.
        The final save is waited for, and if it cannot be written the run has failed.
        """
        state.fusion.gather_state()
        if self.folder is not None:
            self._wait_for_save()
            began = time.perf_counter()
            taken = checkpoint.snapshot(state, tokenizer.to_json(), facts)
            self._saving = _Saving(self.folder.checkpoints, taken, settings, self.reporter, began)
            if is_final or not settings.background:
                self._saving.join()
        state.fusion.release_state()
        if is_final:
            comm.on_rank_0(lambda: self._wait_for_save(is_final=True), "save")

    def tell_of_saves(self) -> None:
        """Tell of a save that has ended since the last call."""
        if self._saving is not None and not self._saving.is_alive():
            self._wait_for_save()

    def _wait_for_save(self, is_final: bool = False) -> None:
        saving, self._saving = self._saving, None
        if saving is None:
            return
        saving.join()
        if isinstance(saving.outcome, Path):
            self.say(f"step {saving.step}  saved {saving.outcome} in {saving.seconds:.1f} s")
        elif is_final or not isinstance(saving.outcome, RunError):
            raise saving.outcome
        else:
            self.say(f"step {saving.step}  NOT SAVED, the run goes on and tries again: {saving.outcome}")

    def close(self) -> None:
        if self._saving is not None:
            self._saving.join()
        if self.reporter:
            self.reporter.close()
        if self.folder:
            self.folder.close()


class _Saving(threading.Thread):
    """A save in the background: its outcome is a path, or the error."""

    def __init__(
        self,
        folder: Path,
        taken: checkpoint.Snapshot,
        settings: CheckpointConfig,
        reporter: Reporter | None,
        began: float,
    ) -> None:
        super().__init__(name="save", daemon=True)
        self.step = taken.step
        self.outcome: Path | BaseException = RunError("the save has not ended")
        self.seconds = 0.0
        self._work = (folder, taken, settings)
        self._reporter, self._began = reporter, began
        self.start()

    def run(self) -> None:
        try:
            if self._reporter:
                self._reporter.sync()
            self.outcome = checkpoint.write(*self._work)
        except OSError as error:  # metrics.jsonl could not be synced
            self.outcome = RunError(f"metrics of step {self.step} could not be written: {error}")
        except BaseException as error:  # handed to the training thread
            self.outcome = error
        self.seconds = time.perf_counter() - self._began


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
