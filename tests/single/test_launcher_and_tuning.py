"""Who started us, and what is chosen for Horovod."""

import pytest

from hvdformer.distributed.launcher import Launch, detect, explain_separate_runs
from hvdformer.distributed.tuning import apply, choose, environment_summary, poll_briefly, threads_per_rank


@pytest.mark.parametrize(
    "environment,launcher,rank,size",
    [
        ({"HOROVOD_RANK": "1", "HOROVOD_SIZE": "4", "HOROVOD_LOCAL_RANK": "1", "HOROVOD_LOCAL_SIZE": "2"}, "horovodrun (Gloo)", 1, 4),
        ({"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, "mpirun (Open MPI)", 3, 8),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "mpirun (MPICH or Intel MPI)", 0, 2),
        ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "6", "SLURM_LOCALID": "1"}, "srun (Slurm)", 5, 6),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "torchrun", 0, 2),
        # mpirun inside a Slurm allocation: the nearer launcher counts
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4"}, "mpirun (Open MPI)", 2, 4),
    ],
)  # fmt: skip
def test_launchers_are_known_by_their_variables(environment, launcher, rank, size):
    found = detect(environment)
    assert (found.launcher, found.rank, found.size) == (launcher, rank, size)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK": "0"},
        {"OMPI_COMM_WORLD_RANK": "x", "OMPI_COMM_WORLD_SIZE": "2"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"},
    ],
)
def test_a_plain_command_has_no_launcher(environment):
    """SLURM_NTASKS alone is what a batch script sees, in which one process runs."""
    assert detect(environment) is None


@pytest.mark.parametrize("launcher", ["torchrun", "srun (Slurm)", "mpirun (Open MPI)"])
def test_separate_runs_are_explained_with_what_to_do(launcher):
    text = explain_separate_runs(Launch(launcher, 0, 4))
    assert launcher in text and "4 processes" in text and ("Start with" in text or "build-horovod" in text)


def names(choices):
    return {name: value for name, value, _ in choices}


def test_one_process_needs_no_mpi():
    chosen = names(choose(None, cores=2, on_gpu=False, sleeps_when_idle=False))
    assert (
        chosen["HOROVOD_CONTROLLER"] == chosen["HOROVOD_CPU_OPERATIONS"] == "gloo"
        and chosen["HOROVOD_SIZE"] == "1"
    )


def test_buckets_are_fixed_under_every_launcher():
    for launcher in ("horovodrun (Gloo)", "mpirun (Open MPI)", "srun (Slurm)"):
        for on_gpu in (True, False):
            chosen = names(
                choose(Launch(launcher, 0, 2, 0, 2), cores=2, on_gpu=on_gpu, sleeps_when_idle=True)
            )
            assert chosen["HOROVOD_FUSION_THRESHOLD"] == "0"


@pytest.mark.parametrize("launch", [None, Launch("mpirun (Open MPI)", 0, 2, 0, 2)])
@pytest.mark.parametrize("is_elastic", [False, True])
def test_on_a_cpu_horovod_is_kept_from_taking_the_cores_that_compute(launch, is_elastic):
    def chosen(**settings):
        found = names(choose(launch, cores=2, is_elastic=is_elastic, **settings))
        return {name: value for name, value in found.items() if name.endswith("CYCLE_TIME")}

    expected = {"HOROVOD_IDLE_CYCLE_TIME": "100"}
    assert chosen(on_gpu=False, sleeps_when_idle=True) == expected
    # As it was published it cannot sleep, and crashes if it is started twice with a cycle time.
    expected = {"HOROVOD_CYCLE_TIME": "10"} if launch and not is_elastic else {}
    assert chosen(on_gpu=False, sleeps_when_idle=False) == expected
    assert chosen(on_gpu=True, sleeps_when_idle=True) == {}


def test_what_the_user_has_set_is_left_alone():
    environment = {"HOROVOD_CYCLE_TIME": "7", "OTHER": "x"}
    chosen = apply(environment, Launch("mpirun (Open MPI)", 0, 2, 0, 2), on_gpu=False)
    assert environment["HOROVOD_CYCLE_TIME"] == "7" and environment["OTHER"] == "x"
    assert "HOROVOD_CYCLE_TIME" not in names(chosen) and "HOROVOD_FUSION_THRESHOLD" in names(chosen)


@pytest.mark.parametrize(
    "chosen", [{"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "passive"}]
)
def test_how_threads_wait_is_the_users_if_chosen(chosen):
    environment = dict(chosen)
    poll_briefly(environment)
    assert environment == chosen


@pytest.mark.parametrize(
    "affinities,rank,quota,threads",
    [
        ([[0, 1]], 0, 2, 2),
        ([[0, 1], [0, 1]], 0, 2, 1),
        ([[0], [1]], 1, 1, 1),  # bound by mpirun to one core each
        ([[0, 1, 2, 3], [4, 5, 6, 7]], 1, 4, 4),  # bound to a socket each
        ([list(range(16))] * 3, 0, 16, 5),
        ([[0, 1]] * 5, 0, 2, 1),  # more ranks than cores
        ([list(range(64))] * 2, 0, 8, 4),  # a container's quota of 8
    ],
)
def test_threads_share_the_cores_among_the_ranks_that_may_use_them(affinities, rank, quota, threads):
    assert threads_per_rank(affinities, rank, quota) == threads


def test_no_secret_of_the_environment_is_shown():
    shown = environment_summary(
        {"HOROVOD_SECRET_KEY": "s", "NCCL_DEBUG": "INFO", "AWS_SECRET": "s", "OMPI_MCA_btl": "tcp"}
    )
    assert shown == {"NCCL_DEBUG": "INFO", "OMPI_MCA_btl": "tcp"}
