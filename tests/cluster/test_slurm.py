"""launch/slurm.sbatch on a real Slurm of two nodes: trains, and survives its time limit without losing a bit."""

import time

import pytest

from tests import jobs
from tests.integration.test_troubleshooting import assert_told
from tests.integration.test_ways_to_run import commands, prepare

SCRIPT = str(jobs.ROOT / "launch" / "slurm.sbatch")
STEPS = 60
COMMAND = (
    str(jobs.ROOT / "configs" / "tiny.yaml"),
    f"train.steps={STEPS}",
    "train.sample_tokens=0",
    "train.final_evaluate_sequences=8",
)
LAUNCHERS = ("srun", "mpirun", "launch")


def wait_for(condition, cluster, job, folder, timeout=300):
    """Until condition(state of the job, its log) holds."""
    log = folder / f"hvdformer-{job}.log"
    began = time.monotonic()
    while True:
        state = cluster.state(job, folder)
        text = log.read_text() if log.exists() else ""
        if condition(state["JobState"], text):
            return text
        assert state["JobState"] not in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"), text
        assert time.monotonic() - began < timeout, f"{state}\n{text}"
        time.sleep(0.5)


@pytest.fixture(scope="module")
def undisturbed(cluster, tmp_path_factory):
    """The run that nobody disturbed, made once for each launcher."""
    made = {}

    def run(launcher):
        if launcher not in made:
            folder = tmp_path_factory.mktemp(launcher)
            job = cluster.submit(SCRIPT, *COMMAND, "--run-dir", "run", cwd=folder, LAUNCHER=launcher)
            output = wait_for(lambda state, _: state == "COMPLETED", cluster, job, folder)
            made[launcher] = folder / "run", output
        return made[launcher]

    return run


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_four_ranks_on_two_nodes(launcher, undisturbed):
    run, output = undisturbed(launcher)
    assert "4 ranks (2 on this host)" in output and "controller MPI" in output
    losses = [line["loss"] for line in jobs.metrics(run) if "loss" in line]
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_usr1_saves_requeues_and_ends_in_the_same_bits(launcher, cluster, undisturbed, tmp_path):
    """As --signal=B:USR1 sends it, which no test can time: to the batch script alone."""
    reference, _ = undisturbed(launcher)
    job = cluster.submit(SCRIPT, *COMMAND, "--run-dir", "run", cwd=tmp_path, LAUNCHER=launcher)
    wait_for(lambda _, log: "step 12/" in log, cluster, job, tmp_path)
    cluster.run("scancel", "--batch", "--signal=USR1", job, cwd=tmp_path)
    wait_for(lambda _, log: "saved; in the queue again" in log, cluster, job, tmp_path)
    output = wait_for(lambda state, _: state == "COMPLETED", cluster, job, tmp_path)
    assert "going on from step" in output and "time is nearly up" in output
    assert cluster.state(job, tmp_path)["Restarts"] == "1"
    assert jobs.weights_and_optimizer(tmp_path / "run", STEPS) == jobs.weights_and_optimizer(reference, STEPS)
    assert jobs.numbers(tmp_path / "run") == jobs.numbers(reference)


def test_the_time_limit_itself(cluster, tmp_path):
    """A limit that comes near in mid-run: Slurm's own signal, 300 s before it as the script asks."""
    slow = (SCRIPT, *COMMAND, "train.global_batch=256")  # Slurm looks at the time twice a minute
    (reference := tmp_path / "undisturbed").mkdir()
    job = cluster.submit(*slow, "--run-dir", "run", cwd=reference)
    wait_for(lambda state, _: state == "COMPLETED", cluster, job, reference)
    job = cluster.submit("--time=60", *slow, "--run-dir", "run", cwd=tmp_path)
    wait_for(lambda _, log: "step 12/" in log, cluster, job, tmp_path)
    cluster.run("scontrol", "update", f"jobid={job}", "TimeLimit=4", cwd=tmp_path)
    wait_for(lambda _, log: "saved; in the queue again" in log, cluster, job, tmp_path)
    cluster.run("scontrol", "update", f"jobid={job}", "TimeLimit=60", cwd=tmp_path)
    wait_for(lambda state, _: state == "COMPLETED", cluster, job, tmp_path)
    states = [jobs.weights_and_optimizer(folder / "run", STEPS) for folder in (tmp_path, reference)]
    assert states[0] == states[1]


def test_a_mistake_ends_the_job_and_does_not_requeue_it(cluster, tmp_path):
    job = cluster.submit(SCRIPT, "no.such.setting=1", cwd=tmp_path)
    while (state := cluster.state(job, tmp_path))["JobState"] in ("PENDING", "RUNNING", "COMPLETING"):
        time.sleep(0.5)
    log = (tmp_path / f"hvdformer-{job}.log").read_text()
    assert state["JobState"] == "FAILED" and state["Restarts"] == "0" and "no such setting" in log


@pytest.mark.parametrize("command", commands("slurm"))
def test_a_command_of_the_page(command, cluster, tmp_path):
    """docs/slurm.md, as it stands there."""
    folder = prepare(tmp_path)
    submit = command.replace("sbatch ", "sbatch --parsable ", 1)
    job = cluster.run("bash", "-c", submit, cwd=folder).strip()
    output = wait_for(lambda state, _: state == "COMPLETED", cluster, job, folder)
    if "DOCTOR" in command:
        assert "training can work here" in output and "launcher: srun (Slurm)" in output
        return
    run = folder / "runs" / ("brief" if "runs/brief" in command else "run")
    steps = [line["step"] for line in jobs.metrics(run) if "grad_norm" in line]
    assert steps == list(range(1, 31 if "steps=30" in command else 11))


@pytest.mark.parametrize("kind,code", [("pmix", 0), ("none", 1), ("pmi2", 1)])
def test_what_open_mpi_says_to_the_kinds_of_srun(kind, code, cluster, tmp_path):
    program = "from mpi4py import MPI; print(MPI.COMM_WORLD.size, 'ranks')"
    command = f'srun --mpi={kind} --nodes=2 --ntasks-per-node=1 python -c "{program}" 2>&1; echo code $?'
    text = cluster.run("bash", "-c", command, cwd=tmp_path)
    assert f"code {code}" in text
    if code:
        assert_told(text, "OPAL ERROR: Unreachable", "pmix3x_client.c")
    else:
        assert text.count("2 ranks") == 2
