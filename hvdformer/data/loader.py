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
        """The sequences with these ids: (N,) int64 to (N, T + 1) int64."""
        out = np.empty((len(ids), self.context_length + 1), dtype=np.int64)
        for home, rows, local in self._by_shard(ids):
            windows = self._windows[home]
            inside = local < (0 if windows is None else len(windows))
            if windows is not None:
                if len(rows) == len(ids) and inside.all():
                    out[...] = windows[local]
                else:
                    out[rows[inside]] = windows[local[inside]]
            for row in rows[~inside]:  # at most one sequence per shard runs over its end
                start = int(ids[row]) * self.context_length
                out[row] = self.shards.read(start, self.context_length + 1)
        return out

    def segments(self, ids: np.ndarray) -> np.ndarray:
        """The number of the document within the sequence, for each token: (N,) to (N, T + 1) int32, from 0."""
        T = self.context_length
        begins = np.zeros((len(ids), T + 1), dtype=np.int32)  # 1 where a document begins
        for home, rows, local in self._by_shard(ids):
            ends = self.shards.shards[home].ends
            # In the dtype of `ends`: otherwise all of it is converted for each search.
            low, high = (np.searchsorted(ends, (local + s).astype(ends.dtype), side="right") for s in (0, T))
            counts = high - low
            row = np.repeat(np.arange(len(rows)), counts)
            # Of each row the ends low, low + 1, ..., high - 1, all rows after one another.
            which = np.arange(len(row)) + np.repeat(low - np.cumsum(counts) + counts, counts)
            begins[rows[row], ends[which].astype(np.int64) - local[row]] = 1
            for row in rows[local + T >= len(self.shards.shards[home].tokens)]:  # runs over the shard's end
                found = self.shards.document_ends(int(ids[row]) * T, T + 1)
                begins[row, found[found <= T]] = 1
        return np.cumsum(begins, axis=1, dtype=np.int32)

    def batch(self, ids: np.ndarray, document_mask: bool) -> Batch:
        """The sequences with these ids as a batch on the CPU."""
        return Batch(
            torch.from_numpy(self.gather(ids)),
            torch.from_numpy(self.segments(ids)) if document_mask else None,
        )

    def _by_shard(self, ids: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """For each shard in which some of the sequences begin: its number, their rows, and where in it they begin."""
        starts = ids * self.context_length
        homes = np.searchsorted(self.shards.starts, starts, side="right") - 1
        for home in np.unique(homes):
            self.shards.shards[home].check()
            rows = np.flatnonzero(homes == home)
            yield int(home), rows, starts[rows] - self.shards.starts[home]


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
        mine = local_micro_batches(num_micro_batches, rank, size)
        # This rank's examples lie side by side in the step, so that one gather brings all of them.
        self._share = np.arange(mine.start * micro_batch, mine.stop * micro_batch, dtype=np.int64)
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
                result = self._gather(position + self._share)
            except BaseException as error:  # handed to the training thread, which raises it
                result = error
            self._ahead.put((position, result))
            if isinstance(result, BaseException):
                return
            position += self._global_batch

    def _gather(self, positions: np.ndarray) -> list[Batch]:
        """The examples at these positions, cut into micro-batches."""
        sources, ids = self._locate(positions)
        if self._blend is None:
            tokens, segments = self._sources[0].batch(ids, self._document_mask)
        else:
            parts = [
                (rows, source.batch(ids[rows], self._document_mask))
                for index, source in enumerate(self._sources)
                if len(rows := np.flatnonzero(sources == index))
            ]
            order = torch.from_numpy(np.argsort(np.concatenate([rows for rows, _ in parts])))
            tokens = torch.cat([batch.tokens for _, batch in parts])[order]
            masks = [batch.segments for _, batch in parts if batch.segments is not None]
            segments = torch.cat(masks)[order] if masks else None
        if self._device.type == "cuda":
            tokens = tokens.pin_memory()
            segments = None if segments is None else segments.pin_memory()
        pieces = tokens.split(self._micro_batch)
        masked = [None] * len(pieces) if segments is None else segments.split(self._micro_batch)
        return [Batch(*pair) for pair in zip(pieces, masked, strict=True)]

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
