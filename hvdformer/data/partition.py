"""Which examples a rank reads: a pure function of (seed, position, rank, size), with no state and no I/O.

The order of the examples depends on the seed and the position alone, never on the world size: ranks only share out
the micro-batches of a step. Each epoch visits every example once, in an order of its own.
"""

from __future__ import annotations

import hashlib
import heapq
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
    keys = np.random.SeedSequence([seed, epoch]).generate_state(_ROUNDS, np.uint64)
    values = indices.astype(np.uint64)
    outside = np.ones(values.shape, dtype=bool)
    while outside.any():
        left, right = values[outside] >> half_bits, values[outside] & half_mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & half_mask)
        values[outside] = (left << half_bits) | right
        outside = values >= np.uint64(num_examples)
    return values.astype(np.int64)


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

    The weights, taken as the decimals that they are written as, are shares of a period of positions: 0.7 and 0.3 are 7
    and 3 of 10. An example of a data set may come no earlier and no later than its share allows; of those that may
    come, the one with the earliest deadline does, which always works out (Baruah et al., "Proportionate Progress",
    1996). Whoever is furthest behind, the simpler rule, can be late by more than one. Any position is found by a
    division and a look into the one period.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """weights: relative, positive.

        Raises:
            UserError: the shares repeat only after more than 2^16 examples.
        """
        exact = [Fraction(str(weight)) for weight in weights]
        shares = [weight / sum(exact) for weight in exact]
        period = math.lcm(*(share.denominator for share in shares))
        if period > _MAX_PERIOD:
            rounded = ", ".join(f"{float(share):.3f}" for share in shares)
            raise UserError(
                f"data.mix has weights whose shares repeat only after {period:,} examples, at most {_MAX_PERIOD:,}: "
                f"give shares with fewer digits, such as {rounded}"
            )
        counts = [int(share * period) for share in shares]
        self.counts = np.array(counts)  # of each data set in a period
        self.period = period
        self._source = np.empty(period, dtype=np.int64)  # data set of each position of a period
        self._before = np.empty(period, dtype=np.int64)  # examples that it has given before, in this period
        given = [0] * len(counts)
        waiting = [(0, index) for index in range(len(counts))]  # by the position from which the next may come
        ready: list[tuple[int, int]] = []  # by the position at which the next must have come
        for position in range(period):
            while waiting and waiting[0][0] <= position:
                _, index = heapq.heappop(waiting)
                heapq.heappush(ready, (-(-(given[index] + 1) * period // counts[index]), index))
            _, index = heapq.heappop(ready)
            self._source[position], self._before[position] = index, given[index]
            given[index] += 1
            if given[index] < counts[index]:
                heapq.heappush(waiting, (given[index] * period // counts[index], index))

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For global positions (N,): the data set of each, and the position within that data set; (N,) int64 each."""
        periods, indices = np.divmod(positions, self.period)
        sources = self._source[indices]
        return sources, periods * self.counts[sources] + self._before[indices]


_MAX_PERIOD = 2**16
