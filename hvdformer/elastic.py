"""Elastic training in place: ranks leave and join, and those that stay go on with what they have in memory.

    horovodrun --min-np 1 --max-np 4 --host-discovery-script ./hosts.sh hvdformer train

Horovod's driver watches the hosts, tells the ranks of changes and starts processes on new ones. When a rank dies, the
collectives of the others fail; when hosts come or go, all ranks leave the loop after the same step. Either way each
process disconnects, connects again as one of the new ranks, and begins to train as at any other start, but for the
state: it comes from the rank that holds the newest one in memory (initialise.py), not from a checkpoint. Order of the
data, global batch and learning rate do not depend on how many ranks there are.

Horovod's own elastic State is not used: its copies of the optimizer go through a call that changes the weights.
"""

from __future__ import annotations

from collections.abc import Callable

from hvdformer.distributed import comm
from hvdformer.errors import RunError
from hvdformer.runtime import Runtime, Where
from hvdformer.state import Survivor

_MAX_CHANGES_WITHOUT_A_STEP = 10


def run(
    start: Callable[[], Runtime],
    job: Callable[[Runtime, Survivor], int],
    where: Where,
    say: Callable[[str], None],
) -> int:
    """Run the job, and again with what this process still holds of it whenever the ranks have changed.

    start: joins the job as one of its ranks. Horovod ends a process whose host was taken out within it.

    Returns the job's exit code. A job that is not elastic runs once.
    """
    survivor = Survivor()
    num_changes, step_before = 0, -1
    while True:
        is_elastic = True  # what cannot even connect again
        try:
            here = start()
            is_elastic = here.world.is_elastic
            return job(here, survivor)
        except Exception as error:
            is_change = isinstance(error, comm.WorldChanged) or comm.is_lost_contact(error)
            if not is_elastic or not is_change:
                raise
            step = survivor.values.get("step", 0)
            num_changes = num_changes + 1 if step == step_before else 1
            step_before = step
            if num_changes > _MAX_CHANGES_WITHOUT_A_STEP:
                raise RunError(f"the ranks changed {num_changes} times at step {step}: given up") from error
            where.enter("reconnect")
            if isinstance(error, comm.WorldChanged):
                say("hosts have come or gone: connecting anew")
            else:
                say("contact to a rank is lost: connecting anew")
                comm.hang_up()
            comm.disconnect()
