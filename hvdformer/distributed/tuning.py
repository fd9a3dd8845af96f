"""Settings for Horovod and MPI, chosen for the machine before `hvd.init()`; what the user has set is left alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from hvdformer import horovod_source
from hvdformer.distributed.launcher import Launch

# (variable, value, why)
Choice = tuple[str, str, str]


def usable_cores() -> int:
    """Cores that this process may use: its affinity mask, cut down by a container's CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        pass
    return cores


def choose(
    launch: Launch | None, *, cores: int, on_gpu: bool, sleeps_when_idle: bool, is_elastic: bool = False
) -> list[Choice]:
    """The settings worth having for this launcher, device and number of cores, each with its reason. Pure.

    cores: cores that the ranks of this node share, as `usable_cores` counts them.
    sleeps_when_idle: whether this Horovod can: horovod_source.py.
    """
    idle: list[Choice] = []
    if sleeps_when_idle and not on_gpu:
        why = "ms: with nothing to reduce, Horovod's thread sleeps until there is something, and leaves the core to the rank"
        idle = [("HOROVOD_IDLE_CYCLE_TIME", "100", why)]
    if launch is None:
        # One process. Gloo needs no rendezvous for itself, while an MPI without its launcher may not even start:
        # the Open MPI of PyPI ends the process.
        why = "one process, no launcher: Horovod's own Gloo, so that MPI is not needed"
        return [
            *idle,
            ("HOROVOD_CONTROLLER", "gloo", why),
            ("HOROVOD_CPU_OPERATIONS", "gloo", why),
            *(
                (f"HOROVOD_{key}", value, why)
                for key, value in (
                    ("RANK", "0"),
                    ("SIZE", "1"),
                    ("LOCAL_RANK", "0"),
                    ("LOCAL_SIZE", "1"),
                    ("CROSS_RANK", "0"),
                    ("CROSS_SIZE", "1"),
                )
            ),
        ]
    choices: list[Choice] = [
        (
            "HOROVOD_FUSION_THRESHOLD",
            "0",
            "the buckets are ours: they keep their composition, so that the same run gives the same bits, and no copies",
        ),
        *idle,
    ]
    if on_gpu:
        return choices
    crowded = launch.local_size is None or launch.local_size >= cores
    if crowded and launch.launcher.startswith(("mpirun", "srun")):
        ranks = f"{launch.local_size or 'all'} ranks on {cores} cores"
        why = f"{ranks}: a rank that waits gives its core to one that computes"
        choices.append(("OMPI_MCA_mpi_yield_when_idle", "1", why))
    if not idle and not is_elastic:  # see CRASHES_WHEN_ELASTIC
        why = "ms between two negotiations: on a CPU each takes time from the ranks that compute"
        choices.append(("HOROVOD_CYCLE_TIME", "10", why))
    return choices


# Horovod 0.28.1 keeps what these two fix when it is started again in the same process, and then writes its defaults
# past the end of the vector that is left: parameter_manager.cc, BayesianParameter::SetValue. One of them alone is well.
CRASHES_WHEN_ELASTIC = "HOROVOD_CYCLE_TIME"


def apply(
    environment: MutableMapping[str, str], launch: Launch | None, *, on_gpu: bool
) -> tuple[Choice, ...]:
    """Put the chosen settings into the environment, but for those that are set already. Returns the ones put in."""
    chosen = [
        choice
        for choice in choose(
            launch,
            cores=usable_cores(),
            on_gpu=on_gpu,
            sleeps_when_idle=horovod_source.sleeps_when_idle(),
            is_elastic=environment.get("HOROVOD_ELASTIC") == "1",
        )
        if choice[0] not in environment
    ]
    environment.update((name, value) for name, value, _ in chosen)
    return tuple(chosen)


def poll_briefly(environment: MutableMapping[str, str]) -> None:
    """Have a CPU thread that waits for the others poll for 50 us and then sleep, unless the user has chosen. Before torch loads.

    By itself GNU's OpenMP polls 300,000 times, which is more than 10 ms, wherever a thread waits; there are thousands of such
    places in a step. If somebody else needs a core, the threads of the others poll for as long as that one has it: a step
    of two threads beside two busy processes took 8 times as long as alone, where twice is its share.
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", "1000")


def threads_per_rank(affinities: list[list[int]], rank: int, quota: int) -> int:
    """CPU threads for a rank: the cores that it may use, shared with the ranks of the node that may use them too.

    affinities: for each rank of this node, the core numbers it may run on; rank: this one's index in it.
    quota: cores that a container grants to all of them together.
    """
    mine = set(affinities[rank])
    sharing = sum(1 for other in affinities if mine & set(other))
    return max(1, min(len(mine), quota) // sharing)


def environment_summary(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables in force that steer Horovod and Open MPI; nothing else of the environment is shown or logged."""
    prefixes = ("HOROVOD_", "OMPI_MCA_", "NCCL_", "OMP_", "MKL_NUM", "GOMP_", "KMP_")
    hidden = ("KEY", "SECRET", "TOKEN", "PASSWORD")
    return {
        name: value
        for name, value in sorted(environment.items())
        if name.startswith(prefixes) and not any(word in name for word in hidden)
    }
