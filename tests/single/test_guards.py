"""Which steps to leave out, and which checkpoints to keep."""

import pytest

from hvdformer.checkpoint import obsolete
from hvdformer.config import CheckpointConfig
from hvdformer.guards import SpikeGuard


def test_a_spike_stands_out_and_a_new_level_is_learned():
    guard = SpikeGuard(6.0)
    assert all(guard.accepts(1 + 0.1 * (step % 3)) for step in range(50))
    assert not guard.accepts(10.0)
    assert guard.accepts(1.1)
    assert [guard.accepts(5.0) for _ in range(12)] == [False] * 10 + [True] * 2


def test_nothing_is_a_spike_before_enough_is_known_or_when_not_asked():
    guard = SpikeGuard(2.0)
    assert all(guard.accepts(10.0**step) for step in range(15))
    assert all(SpikeGuard(None).accepts(10.0**step) for step in range(60))


def test_what_the_guard_knows_is_saved():
    norms = [1 + 0.1 * (step % 7) for step in range(100)]
    whole, first, second = SpikeGuard(3.0), SpikeGuard(3.0), SpikeGuard(3.0)
    for norm in norms:
        whole.accepts(norm)
    for norm in norms[:37]:
        first.accepts(norm)
    second.load_dict(first.to_dict())
    for norm in norms[37:]:
        second.accepts(norm)
    assert second.to_dict() == whole.to_dict()


@pytest.mark.parametrize(
    "settings,kept",
    [
        ({"keep_last": 2}, [40, 50]),
        ({"keep_last": 1, "keep_every": 20}, [20, 40, 50]),
        ({"keep_last": 1, "keep_best": 1}, [30, 50]),
        ({"keep_last": 1, "keep_best": 9}, [10, 30, 50]),  # only those that were validated can be best
    ],
)
def test_which_checkpoints_are_kept(settings, kept):
    losses = {50: 3.0, 40: None, 30: 1.0, 20: None, 10: 2.0}
    gone = obsolete(losses, CheckpointConfig(**settings))
    assert sorted(losses.keys() - set(gone)) == kept
