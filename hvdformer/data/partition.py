"""Which examples a rank reads: a pure function of (seed, position, rank, size), with no state and no I/O.

The order of the examples depends on the seed and the position alone, never on the world size: ranks only share out
the micro-batches of a step. Each epoch visits every example once, in an order of its own.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from hvdformer.errors import UserError

_ROUNDS = 6  # a Feistel network of 4 is already indistinguishable from random (Luby and Rackoff, 1988)


def local_micro_batches(num_micro_batches: int, rank: int, size: int) -> range:
    """The micro-batches of a step that fall to a rank, in one run: 8 over 3 ranks are 3, 3 and 2."""
    each, more = divmod(num_micro_batches, size)
    begin = rank * each + min(rank, more)
    return range(begin, begin + each + (rank < more))


def example_ids(position: int, count: int, num_examples: int, seed: int, shuffle: bool = True) -> np.ndarray:
    """The ids of the examples at global positions [position, position + count), as int64 of shape (count,).

    Position is the number of examples consumed by all ranks since the run began; it runs on through the epochs.
    """
    return ids_at(np.arange(position, position + count, dtype=np.int64), num_examples, seed, shuffle)


def ids_at(positions: np.ndarray, num_examples: int, seed: int, shuffle: bool = True) -> np.ndarray:
    """The ids of the examples at any global positions: (N,) int64 to (N,) int64."""
    epochs, indices = np.divmod(positions, num_examples)
    if not shuffle:
        return indices
    ids = np.empty_like(indices)
    for epoch in np.unique(epochs):  # one, or two where a step crosses the end of an epoch
        inside = epochs == epoch
        ids[inside] = permute(indices[inside], num_examples, seed, int(epoch))
    return ids


def permute(indices: np.ndarray, num_examples: int, seed: int, epoch: int = 0) -> np.ndarray:
    """Where a pseudo-random permutation of range(num_examples) takes these indices; (N,) int64 to (N,) int64.

    A balanced Feistel network over the next power of four, walked until it lands inside the range (Black and
    Rogaway, "Ciphers with Arbitrary Finite Domains", 2002): no table, so 10^12 examples cost as little as 10^3.
    """
    half_bits = np.uint64(max(1, math.ceil(math.log2(max(num_examples, 2)) / 2)))
    half_mask = (np.uint64(1) << half_bits) - np.uint64(1)
    values = indices.astype(np.uint64)
    outside = np.ones(values.shape, dtype=bool)
    while outside.any():
        left, right = values[outside] >> half_bits, values[outside] & half_mask
        for key in _round_keys(seed, epoch):
            left, right = right, left ^ (_mix(right ^ key) & half_mask)
        values[outside] = (left << half_bits) | right
        outside = values >= np.uint64(num_examples)
    return values.astype(np.int64)


@functools.lru_cache(maxsize=16)
def _round_keys(seed: int, epoch: int) -> tuple[np.uint64, ...]:
    return tuple(np.random.SeedSequence([seed, epoch]).generate_state(_ROUNDS, np.uint64))


def _mix(values: np.ndarray) -> np.ndarray:
    """Scatter the bits of each uint64: the finaliser of splitmix64 (Steele et al., 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def digest(ids: np.ndarray) -> str:
    """A short name for the examples of a step, in their order: equal at every world size."""
    return hashlib.sha256(np.ascontiguousarray(ids, dtype="<i8").tobytes()).hexdigest()[:16]


class Blend:
    """Several data sets mixed by weight: at every position each has given its share, to within one example.

    The weights become whole numbers of examples in a period of positions, and who gives the next one within a period
    is a table: any position is found by a division and a look into it.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """weights: relative, positive; their shares are exact if they have a common denominator up to 10,000 (0.7 and
        0.3, or 3 and 1), else rounded to 1/10,000."""
        self.counts = _whole_shares(weights)  # of each data set, in a period
        self.period = int(self.counts.sum())
        self._source, self._before = _schedule(self.counts.tolist())

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For global positions (N,): the data set of each, and the position within that data set; (N,) int64 each."""
        periods, indices = np.divmod(positions, self.period)
        sources = self._source[indices]
        return sources, periods * self.counts[sources] + self._before[indices]


_MAX_PERIOD = 10_000


def _whole_shares(weights: Sequence[float]) -> np.ndarray:
    total = sum(map(Fraction, weights))
    exact = [Fraction(weight) / total for weight in weights]
    near = [share.limit_denominator(_MAX_PERIOD) for share in exact]
    period = math.lcm(*(share.denominator for share in near))
    if sum(near) == 1 and period <= _MAX_PERIOD:
        counts = [int(share * period) for share in near]
    else:  # the largest remainders are rounded up
        counts = [int(share * _MAX_PERIOD) for share in exact]
        remainders = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i] * _MAX_PERIOD, i))
        for index in remainders[: _MAX_PERIOD - sum(counts)]:
            counts[index] += 1
    if 0 in counts:
        raise ValueError(f"a weight below 1/{_MAX_PERIOD} of the sum would never be read")
    return np.array(counts, dtype=np.int64)


def _schedule(counts: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The data set of each position of a period, and how many examples that has given before, in this period.

    Example k of a data set with share c of a period Q may come at positions floor(k Q / c) to ceil((k + 1) Q / c) - 1;
    of those that may come now, the one that must come first does. This keeps every share within one at every prefix
    (Baruah et al., "Proportionate progress", 1996), which always giving the one furthest behind does not.
    """
    period = sum(counts)
    source, before = np.empty(period, dtype=np.int64), np.empty(period, dtype=np.int64)
    given = [0] * len(counts)
    for position in range(period):
        _, index = min(
            (-(-(done + 1) * period // count), index)
            for index, (done, count) in enumerate(zip(given, counts, strict=True))
            if done * period < (position + 1) * count
        )
        source[position], before[position] = index, given[index]
        given[index] += 1
    return source, before
