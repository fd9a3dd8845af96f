"""Who started this process, and as one of how many: read from the environment, before Horovod or MPI is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """What the launcher says of this process. Numbers that it does not give are None."""

    launcher: str  # for messages: "mpirun (Open MPI)", "horovodrun (Gloo)", ...
    rank: int
    size: int
    local_rank: int | None = None
    local_size: int | None = None


# launcher, then the variables of rank, size, rank on the node and ranks on the node; the first that fits counts.
# Slurm: SLURM_STEP_NUM_TASKS is set by srun for its tasks only. SLURM_NTASKS is set in a batch script too, where
# one process runs, so it says nothing of this process.
_LAUNCHERS = (
    ("horovodrun (Gloo)", "HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE"),
    (
        "mpirun (Open MPI)",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    ("mpirun (MPICH or Intel MPI)", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("srun (Slurm)", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", None),
    ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
)


def detect(environment: Mapping[str, str]) -> Launch | None:
    """The launcher that started this process, or None for a plain command."""
    for launcher, *names in _LAUNCHERS:
        rank, size, local_rank, local_size = (_number(environment, name) for name in names)
        if rank is not None and size is not None:
            return Launch(launcher, rank, size, local_rank, local_size)
    return None


def explain_separate_runs(launch: Launch) -> str:
    """Why a job of several ranks must not go on as several runs of one rank, and what to do instead."""
    found = f"{launch.launcher} started {launch.size} processes, but Horovod sees one: they would train apart"
    if launch.launcher == "torchrun":
        return f"{found}. Start with `horovodrun -np {launch.size} hvdformer train` or mpirun instead of torchrun."
    if launch.launcher.startswith("srun"):
        return (
            f"{found}. Start with `srun --mpi=pmix` (see `srun --mpi=list`), with an MPI that Slurm supports, "
            "or run mpirun inside the allocation."
        )
    return (
        f"{found}. Horovod was built for another MPI than the one that started it: run `hvdformer doctor`, use the "
        "mpirun of that MPI, or build Horovod for this one with `hvdformer build-horovod --mpi system`."
    )


def _number(environment: Mapping[str, str], name: str | None) -> int | None:
    text = environment.get(name, "") if name else ""
    return int(text) if text.isdecimal() else None
