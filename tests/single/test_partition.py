"""The data order: a function of seed and position, whatever the world size."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdformer.data.partition import Blend, digest, example_ids, ids_at, local_micro_batches, permute
from hvdformer.errors import UserError


@given(num_examples=st.integers(1, 5000), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_a_permutation_takes_every_index_exactly_once(num_examples, seed, epoch):
    assert np.array_equal(
        np.sort(permute(np.arange(num_examples), num_examples, seed, epoch)), np.arange(num_examples)
    )


def test_a_permutation_of_10_to_the_12_is_computed_at_a_point():
    n = 10**12
    ids = permute(np.array([0, 1, n - 1]), n, seed=1)
    assert ids.dtype == np.int64 and (ids >= 0).all() and (ids < n).all() and len(set(ids.tolist())) == 3


def test_a_permutation_mixes_well():
    """Neighbours come to lie anywhere: the gaps of a random order of range(n) are n/3 in the mean."""
    n = 30_000
    ids = permute(np.arange(n), n, seed=3)
    assert abs(np.abs(np.diff(ids)).mean() / (n / 3) - 1) < 0.03
    assert abs(np.corrcoef(np.arange(n), ids)[0, 1]) < 0.03
    assert (
        permute(np.arange(n), n, seed=4) == ids
    ).sum() < 10  # another seed: one chance coincidence expected


@given(
    num_examples=st.integers(1, 300),
    micro_batch=st.integers(1, 4),
    num_micro_batches=st.integers(1, 12),
    size=st.integers(1, 8),
    stop=st.integers(0, 10),
    seed=st.integers(0, 1000),
)
@settings(max_examples=150, deadline=None)
def test_ranks_together_read_the_steps_of_one_process_and_resume_goes_on(
    num_examples, micro_batch, num_micro_batches, size, stop, seed
):
    global_batch = micro_batch * num_micro_batches
    steps = 2 * num_examples // global_batch + 3
    whole = example_ids(0, steps * global_batch, num_examples, seed)
    rows = []
    for step in range(steps):  # stopped after `stop` steps, then gone on at another world size
        ranks = size if step < stop else size % 3 + 1
        for rank in range(ranks):
            for k in local_micro_batches(num_micro_batches, rank, ranks):
                position = step * global_batch + k * micro_batch
                rows.append(example_ids(position, micro_batch, num_examples, seed))
    assert np.array_equal(np.concatenate(rows), whole)
    for epoch in range(len(whole) // num_examples):
        visited = whole[epoch * num_examples : (epoch + 1) * num_examples]
        assert np.array_equal(np.sort(visited), np.arange(num_examples))


def test_each_epoch_has_an_order_of_its_own():
    ids = example_ids(0, 2000, 1000, seed=1)
    assert (ids[:1000] == ids[1000:]).mean() < 0.02
    assert np.array_equal(example_ids(0, 20, 10, seed=1, shuffle=False), np.tile(np.arange(10), 2))


@pytest.mark.parametrize("num,size,counts", [(8, 3, [3, 3, 2]), (8, 8, [1] * 8), (3, 2, [2, 1]), (1, 1, [1])])
def test_micro_batches_are_shared_out_evenly_in_runs(num, size, counts):
    shares = [local_micro_batches(num, rank, size) for rank in range(size)]
    assert [len(share) for share in shares] == counts
    assert [k for share in shares for k in share] == list(range(num))


def test_the_digest_knows_the_order():
    assert digest(np.array([1, 2])) != digest(np.array([2, 1]))
    assert digest(np.array([1, 2])) == digest(np.array([1, 2], dtype=np.int32))


@given(
    weights=st.lists(st.integers(1, 999), min_size=1, max_size=6).filter(lambda w: sum(w) < 2**16),
    scale=st.sampled_from([1, 10, 1000]),
)
@settings(max_examples=300, deadline=None)
def test_a_blend_is_within_one_example_of_its_shares_at_every_position(weights, scale):
    blend = Blend([weight / scale for weight in weights])
    positions = np.arange(3 * 4096) + 10**6  # anywhere: nothing adds up on the way
    sources, within = blend.at(positions)
    total = sum(weights)
    for index, weight in enumerate(weights):
        assert (
            np.abs((positions[sources == index] + 1) * weight - total * (within[sources == index] + 1)).max(
                initial=0
            )
            <= total
        )
        given_so_far = within[sources == index]
        assert np.array_equal(
            np.diff(given_so_far), np.ones(max(len(given_so_far) - 1, 0))
        )  # none skipped or twice


def test_a_blend_of_unwieldy_weights_is_refused_with_what_would_do():
    with pytest.raises(UserError, match=r"repeat only after .* such as 0\.111, 0\.889"):
        Blend([0.12345678, 0.98765432])


def test_ids_at_equals_example_ids():
    positions = np.array([5, 99, 100, 250])
    assert ids_at(positions, 100, 7).tolist() == [int(example_ids(int(p), 1, 100, 7)[0]) for p in positions]
