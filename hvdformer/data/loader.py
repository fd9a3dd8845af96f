"""Examples for the training loop: fixed-length sequences from memory-mapped shards, gathered ahead of their step."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from hvdformer.data.partition import Blend, ids_at, local_micro_batches
from hvdformer.data.shards import ShardSet

# B sequences of a micro-batch, T context length


class Batch(NamedTuple):
    """One micro-batch: T inputs and, shifted by one, T targets."""

    tokens: torch.Tensor  # (B, T + 1) int64
    segments: (
        torch.Tensor | None
    )  # (B, T + 1) int32, number of the document within the sequence; None: not asked for


class Sequences:
    """A split cut into sequences: number i is tokens [i T, i T + T + 1), so that each token but the first is a target
    exactly once; fewer than T tokens at the very end are left out."""

    def __init__(self, shards: ShardSet, context_length: int) -> None:
        self.shards = shards
        self.context_length = context_length
        # Per shard, all windows that begin in it, as a view without a copy; those that run over its end come from read().
        self._windows = [
            np.lib.stride_tricks.sliding_window_view(shard.tokens, context_length + 1)
            if len(shard.tokens) > context_length
            else None
            for shard in shards.shards
        ]

    def __len__(self) -> int:
        return max(0, self.shards.num_tokens - 1) // self.context_length

    def gather(self, ids: np.ndarray) -> np.ndarray:
        """The sequences with these ids: (N,) int64 to (N, T + 1) of the stored dtype."""
        starts = ids * self.context_length
        if len(self._windows) == 1 and self._windows[0] is not None:
            return self._windows[0][starts]
        out = np.empty((len(ids), self.context_length + 1), dtype=self.shards.shards[0].tokens.dtype)
        homes = np.searchsorted(self.shards.starts, starts, side="right") - 1
        for home in np.unique(homes):
            rows = np.flatnonzero(homes == home)
            windows = self._windows[home]
            local = starts[rows] - self.shards.starts[home]
            inside = local < (0 if windows is None else len(windows))
            if windows is not None:
                out[rows[inside]] = windows[local[inside]]
            for row in rows[~inside]:  # at most one sequence per shard runs over its end
                out[row] = self.shards.read(int(starts[row]), self.context_length + 1)
        return out

    def segments(self, ids: np.ndarray) -> np.ndarray:
        """The number of the document within the sequence, for each token: (N,) to (N, T + 1) int32, from 0."""
        out = np.zeros((len(ids), self.context_length + 1), dtype=np.int32)
        for row, start in enumerate((ids * self.context_length).tolist()):
            ends = self.shards.document_ends(start, self.context_length + 1)
            out[row, ends[ends <= self.context_length]] = 1
        return np.cumsum(out, axis=1, dtype=np.int32)

    def batch(self, ids: np.ndarray, document_mask: bool) -> Batch:
        """The sequences with these ids as a micro-batch on the CPU."""
        return Batch(
            torch.from_numpy(self.gather(ids).astype(np.int64)),
            torch.from_numpy(self.segments(ids)) if document_mask else None,
        )


class BatchLoader:
    """The micro-batches of this rank, step by step, gathered by a thread while the step before is computed."""

    def __init__(
        self,
        sources: Sequence[Sequences],
        *,
        weights: Sequence[float],
        seed: int,
        micro_batch: int,
        num_micro_batches: int,
        rank: int,
        size: int,
        document_mask: bool,
        shuffle: bool,
        device: torch.device,
        prefetch: int = 2,
    ) -> None:
        """sources: one data set, or several that are mixed by `weights`; prefetch: steps gathered ahead."""
        self._sources = list(sources)
        self._blend = Blend(list(weights)) if len(self._sources) > 1 else None
        self._seed, self._shuffle = seed, shuffle
        self._micro_batch, self._global_batch = micro_batch, micro_batch * num_micro_batches
        self._mine = local_micro_batches(num_micro_batches, rank, size)
        self._document_mask, self._device = document_mask, device
        self._ahead: queue.Queue[tuple[int, list[Batch] | BaseException]] = queue.Queue(maxsize=prefetch)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._next = -1
        self.wait_seconds = 0.0  # how long the last step() waited for its data

    def __len__(self) -> int:
        """Examples in an epoch: of the one data set, or of all of them together."""
        return sum(len(source) for source in self._sources)

    def step_ids(self, position: int) -> np.ndarray:
        """The ids of all examples of the step that begins at `position`, those of all ranks: (global batch,) int64.

        With several data sets, number i of the k-th is i + the lengths of those before it.
        """
        positions = np.arange(position, position + self._global_batch, dtype=np.int64)
        sources, ids = self._locate(positions)
        offsets = np.cumsum([0, *(len(source) for source in self._sources)])
        return offsets[sources] + ids

    def step(self, position: int) -> list[Batch]:
        """This rank's micro-batches of the step that begins at global position `position`, on the device.

        Micro-batch k of the step holds positions [position + k B, position + k B + B). Asking for the steps in
        order is fast; any other position starts the reading ahead anew.
        """
        began = time.perf_counter()
        if self._thread is None or position != self._next:
            self.close()
            self._start(position)
        found, batches = self._ahead.get()
        if isinstance(batches, BaseException):
            raise batches
        assert found == position
        self._next = position + self._global_batch
        batches = [self._to_device(batch) for batch in batches]
        self.wait_seconds = time.perf_counter() - began
        return batches

    def close(self) -> None:
        """Stop reading ahead."""
        self._stop.set()
        if self._thread is not None:
            while self._thread.is_alive():  # it may be waiting for room in the queue
                try:
                    self._ahead.get_nowait()
                except queue.Empty:
                    self._thread.join(0.01)
            self._thread = None
        while not self._ahead.empty():
            self._ahead.get_nowait()

    def _start(self, position: int) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._read_ahead, args=(position, self._stop), daemon=True, name="loader"
        )
        self._thread.start()

    def _read_ahead(self, position: int, stop: threading.Event) -> None:
        while not stop.is_set():
            result: list[Batch] | BaseException
            try:
                result = [self._gather(position + k * self._micro_batch) for k in self._mine]
            except BaseException as error:  # handed to the training thread, which raises it
                result = error
            self._ahead.put((position, result))
            if isinstance(result, BaseException):
                return
            position += self._global_batch

    def _gather(self, position: int) -> Batch:
        sources, ids = self._locate(np.arange(position, position + self._micro_batch, dtype=np.int64))
        if self._blend is None:
            batch = self._sources[0].batch(ids, self._document_mask)
        else:
            parts = [
                self._sources[source].batch(ids[i : i + 1], self._document_mask)
                for i, source in enumerate(sources)
            ]
            segments = [part.segments for part in parts if part.segments is not None]
            batch = Batch(
                torch.cat([part.tokens for part in parts]), torch.cat(segments) if segments else None
            )
        if self._device.type == "cuda":
            batch = Batch(
                batch.tokens.pin_memory(), None if batch.segments is None else batch.segments.pin_memory()
            )
        return batch

    def _locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Data set and example id of each global position."""
        if self._blend is None:
            return np.zeros_like(positions), ids_at(
                positions, len(self._sources[0]), self._seed, self._shuffle
            )
        sources, within = self._blend.at(positions)
        ids = np.empty_like(within)
        for index, source in enumerate(self._sources):
            here = sources == index
            ids[here] = ids_at(within[here], len(source), self._seed + index, self._shuffle)
        return sources, ids

    def _to_device(self, batch: Batch) -> Batch:
        segments = None if batch.segments is None else batch.segments.to(self._device, non_blocking=True)
        return Batch(batch.tokens.to(self._device, non_blocking=True), segments)


def evaluation_batches(
    sequences: Sequences,
    *,
    micro_batch: int,
    rank: int,
    size: int,
    max_examples: int,
    document_mask: bool,
    device: torch.device,
) -> Iterator[Batch]:
    """This rank's share of the first `max_examples` sequences, in order; the last micro-batch of all may be smaller."""
    total = min(max_examples, len(sequences))
    for number in local_micro_batches(-(-total // micro_batch), rank, size):
        ids = np.arange(number * micro_batch, min(total, (number + 1) * micro_batch), dtype=np.int64)
        tokens, segments = sequences.batch(ids, document_mask)
        yield Batch(tokens.to(device), None if segments is None else segments.to(device))
