"""Every file of launch/ that runs without root: real launchers and ranks; only the commands of PBS and LSF are stand-ins.

launch/slurm.sbatch runs on a real Slurm, and all of them on several hosts, in tests/cluster.
"""

import copy
import json
import re
import shlex
import shutil
import signal
import socket

import jsonschema
import psutil
import pytest
import yaml

from tests import jobs

LAUNCH = jobs.ROOT / "launch"
TINY = str(jobs.ROOT / "configs" / "tiny.yaml")
STEPS = 150
TRAIN = (
    TINY,
    f"train.steps={STEPS}",
    "train.sample_tokens=0",
    "train.final_evaluate_sequences=8",
    "--run-dir",
    "run",
)
HERE = socket.gethostname()


def finish(command, cwd, **extra):
    """Run to a good end; what was printed."""
    job = jobs.Job(command, cwd, **extra)
    try:
        assert job.wait(240) == 0, job.output
        return job.output
    finally:
        job.end()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The run at np 2 that nobody disturbs."""
    cwd = tmp_path_factory.mktemp("undisturbed")
    jobs.succeed("mpirun", 2, "train", *TRAIN, cwd=cwd)
    return cwd / "run"


def assert_same(run, other):
    assert jobs.weights_and_optimizer(run, STEPS) == jobs.weights_and_optimizer(other, STEPS)
    assert jobs.numbers(run) == jobs.numbers(other)


def test_every_file_is_run_by_a_test():
    tested = {"local.sh", "mpirun.sh"}  # tests/integration/test_docs_and_files.py
    tested |= {"elastic.sh", "discover_hosts.sh", "pbs.sh", "lsf.sh", "mpijob.yaml"}  # here
    tested |= {"slurm.sbatch"}  # tests/cluster/test_slurm.py
    of_the_image = {"docker.sh", "entrypoint.sh", "ssh_config", "sshd_config"}  # tests/image
    assert {path.name for path in LAUNCH.iterdir()} == tested | of_the_image


# The doctor, the same way for all


@pytest.mark.parametrize("script", ["local.sh", "mpirun.sh", "elastic.sh", "pbs.sh", "lsf.sh"])
def test_doctor(script, tmp_path):
    environment = {"DOCTOR": "1", "NP": "2"}
    if script == "elastic.sh":
        (tmp_path / "hosts").write_text("localhost:1\n127.0.0.1:1\n")
        environment["NETWORK"] = "lo"
    if script == "pbs.sh":
        environment = {**Pbs(tmp_path).environment, **environment}
    if script == "lsf.sh":
        environment = {**Lsf(tmp_path).environment, **environment}
    output = finish(["bash", str(LAUNCH / script), *TRAIN], tmp_path, **environment)
    assert "training can work here" in output and "size: 2" in output
    assert not (tmp_path / "run").exists()


# Elastic


def test_elastic_with_the_host_file_that_changes(undisturbed, tmp_path):
    """A rank is killed, a host is taken out of the file, and one is put into it."""
    hosts = tmp_path / "hosts"
    hosts.write_text(f"localhost:1\n127.0.0.1:1  # one of the names of this machine\n# {HERE}:1\n")
    command = [str(LAUNCH / "elastic.sh"), *TRAIN, "fusion.kind=exact"]
    job = jobs.Job(command, tmp_path, NP="2", MAX_NP="3", NETWORK="lo", COOLDOWN="1 2")
    try:
        job.wait_for("step 5/")
        hosts.write_text(f"localhost:1\n127.0.0.1:1\n{HERE}:1\n")
        job.wait_for(": 3 ranks")
        hosts.write_text(f"localhost:1\n{HERE}:1\n")
        assert job.wait(240) == 0, job.output
    finally:
        job.end()
    sizes = [int(size) for size in re.findall(r"hvdformer 0\S+: (\d+) ranks", job.output)]
    assert sizes[:3] == [2, 3, 2], job.output
    steps = [line["step"] for line in jobs.metrics(tmp_path / "run") if "grad_norm" in line]
    assert steps == list(range(1, STEPS + 1))


def test_the_discovery_script(tmp_path):
    script = str(LAUNCH / "discover_hosts.sh")
    (tmp_path / "some").write_text("a:2\n\n# b:1\n  c.example.org:4   # comment\nd:1")
    assert finish([script], tmp_path, HOSTS_FILE="some").split() == ["a:2", "c.example.org:4", "d:1"]
    # Of a host that is down, the probe says so by its code.
    (tmp_path / "probe").write_text('#!/bin/sh\n[ "$1" = up ] && [ "$2" != a ]\n')
    (tmp_path / "probe").chmod(0o755)
    found = finish([script], tmp_path, HOSTS_FILE="some", PROBE=f"{tmp_path}/probe up")
    assert found.split() == ["c.example.org:4", "d:1"]
    job = jobs.Job([script], tmp_path)
    assert job.wait(10) == 1 and f"there is no file {tmp_path}/hosts" in job.output


# PBS and LSF: stand-ins for the commands and variables of the batch system, as its documentation has them


class Batch:
    """A folder with commands that stand in for those of a batch system, and note how they were called."""

    def __init__(self, folder, environment, **programs):
        self.folder = folder / "batch"
        (self.folder / "bin").mkdir(parents=True)
        self.calls = self.folder / "calls"
        self.calls.write_text("")
        for name, text in programs.items():
            path = self.folder / "bin" / name
            path.write_text(f'#!/bin/bash\ncd {self.folder}\necho "{name} $*" >> calls\n{text}\n')
            path.chmod(0o755)
        (self.folder / "nodes").write_text(f"{HERE}\n{HERE}\n")  # a line a rank
        path = f"{self.folder}/bin:{jobs.environment()['PATH']}"
        self.environment = {"PATH": path, **environment(self.folder / "nodes")}


class Pbs(Batch):
    """qstat answers once the file `walltime` is there; qrerun ends the job, or refuses if the file `refuse` is there."""

    def __init__(self, folder):
        super().__init__(
            folder,
            lambda nodes: {
                "PBS_JOBID": "123.server",
                "PBS_NODEFILE": str(nodes),
                "PBS_O_WORKDIR": str(folder),
                "PBS_ENVIRONMENT": "PBS_BATCH",
            },
            qstat='until [ -s walltime ]; do sleep 0.1; done\necho "Job Id: $2"\n'
            'echo "    Resource_List.select = 1:ncpus=2:mpiprocs=2"\n'
            'echo "    Resource_List.walltime = $(cat walltime)"',
            qrerun='[ -e refuse ] && { echo "qrerun: Unauthorized Request $1" >&2; exit 159; }\nkill -KILL $PPID',
            qsub="echo 124.server",
        )
        (self.folder / "walltime").write_text("24:00:00\n")

    def start(self, folder, **extra):
        """The job's script from the start, as PBS runs it: a copy, in the home folder."""
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        spooled = self.folder / "123.server.SC"
        shutil.copy(LAUNCH / "pbs.sh", spooled)
        return jobs.Job(["bash", str(spooled)], home, ARGS=shlex.join(TRAIN), **self.environment, **extra)


class Lsf(Batch):
    def __init__(self, folder):
        super().__init__(
            folder,
            lambda nodes: {"LSB_JOBID": "123", "LSB_DJOB_HOSTFILE": str(nodes)},
            blaunch='ssh "$1" "export PATH=$PATH;" "${@:2}"',  # a task has the environment of the job
        )
        lines = re.findall(r"^#BSUB (-\S+) ?(.*)$", (LAUNCH / "lsf.sh").read_text(), re.MULTILINE)
        self.options = {name: value.strip('"') for name, value in lines}

    def start(self, folder, **extra):
        spooled = self.folder / "123.shell"
        shutil.copy(LAUNCH / "lsf.sh", spooled)
        return jobs.Job(["bash", str(spooled)], folder, ARGS=shlex.join(TRAIN), **self.environment, **extra)


def save_by_time_limit(pbs, job):
    (pbs.folder / "walltime").unlink()
    job.wait_for("step 12/")
    (pbs.folder / "walltime").write_text("00:05:01\n")  # SAVE_SECONDS is 300


def save_by_qsig(pbs, job):
    """`qsig -s USR1`: PBS signals all processes of the session."""
    job.wait_for("step 12/")
    signal_all(job)


def signal_all(job):
    started = psutil.Process(job.process.pid)
    for process in [*started.children(recursive=True), started]:
        if process.name() != "sleep":
            process.send_signal(signal.SIGUSR1)


@pytest.mark.parametrize("ask", [save_by_time_limit, save_by_qsig])
def test_pbs_saves_and_reruns_and_ends_in_the_same_bits(ask, undisturbed, tmp_path):
    pbs = Pbs(tmp_path)
    job = pbs.start(tmp_path)
    try:
        ask(pbs, job)
        assert job.wait(60) == -signal.SIGKILL, job.output  # by PBS, upon qrerun
    finally:
        job.end()
    assert "time is nearly up: saving" in job.output
    assert pbs.calls.read_text().splitlines()[-1] == "qrerun 123.server"
    (pbs.folder / "walltime").write_text("24:00:00\n")
    again = pbs.start(tmp_path)
    try:
        assert again.wait(240) == 0, again.output
    finally:
        again.end()
    assert "going on from step" in again.output
    assert pbs.calls.read_text().count("qrerun") == 1
    assert_same(tmp_path / "run", undisturbed)


def test_pbs_sends_a_new_job_where_qrerun_is_refused(tmp_path):
    pbs = Pbs(tmp_path)
    (pbs.folder / "refuse").write_text("")
    job = pbs.start(tmp_path)
    try:
        save_by_time_limit(pbs, job)
        assert job.wait(60) == 0, job.output
    finally:
        job.end()
    assert pbs.calls.read_text().splitlines()[-1] == (
        "qsub -l select=1:ncpus=2:mpiprocs=2 -l walltime=301 launch/pbs.sh"
    )
    assert "saved; in the queue again as 124.server" in job.output


def test_lsf_saves_asks_for_the_queue_and_ends_in_the_same_bits(undisturbed, tmp_path):
    lsf = Lsf(tmp_path)
    assert lsf.options["-wa"] == "USR1"
    job = lsf.start(tmp_path)
    try:
        job.wait_for("step 12/")
        signal_all(job)  # as LSF sends the signal of -wa: to all processes of the job
        assert job.wait(60) == int(lsf.options["-Q"]), job.output
    finally:
        job.end()
    assert "saved; in the queue again" in job.output
    again = lsf.start(tmp_path)
    try:
        assert again.wait(240) == 0, again.output
    finally:
        again.end()
    assert "going on from step" in again.output and "in the queue again" not in again.output
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("batch", [Pbs, Lsf])
def test_a_mistake_does_not_go_into_the_queue_again(batch, tmp_path):
    system = batch(tmp_path)
    arguments = ["bash", str(LAUNCH / f"{batch.__name__.lower()}.sh"), "no.such.setting=1"]
    job = jobs.Job(arguments, tmp_path, **system.environment)
    try:
        assert job.wait(120) == 2, job.output
    finally:
        job.end()
    assert "no such setting" in job.output
    assert "qrerun" not in system.calls.read_text()


# Kubernetes


def mpijob():
    return yaml.safe_load((LAUNCH / "mpijob.yaml").read_text())


def closed(schema):
    """The schema with every object closed that says what is in it: Kubernetes drops unknown fields without a word."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) for key, value in schema.items()}
    if isinstance(result.get("properties"), dict) and result.get("type") == "object":
        result.setdefault("additionalProperties", False)
    return result


@pytest.fixture(scope="module")
def validator():
    schema = json.loads((jobs.ROOT / "tests" / "data" / "kubeflow-mpijob-v2beta1.json").read_text())
    return jsonschema.Draft202012Validator(closed(schema))


def test_the_mpijob_fits_kubeflows_schema(validator):
    assert [error.message for error in validator.iter_errors(mpijob())] == []


@pytest.mark.parametrize(
    "path,value",
    [
        (("spec", "slotPerWorker"), 2),
        (("spec", "slotsPerWorker"), "two"),
        (("spec", "mpiImplementation"), "OpenMP"),
        (("spec", "mpiReplicaSpecs", "Worker", "template", "spec", "container"), []),
        (("spec", "mpiReplicaSpecs", "Worker", "template", "spec", "containers", 0, "arg"), ["sshd"]),
        (("spec", "runPolicy", "backoffLimits"), 1),
    ],
)
def test_the_schema_finds_mistakes(path, value, validator):
    job = copy.deepcopy(mpijob())
    place = job
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert list(validator.iter_errors(job))


def test_the_mpijob_fits_together():
    """What no schema says: volumes that are mounted are there, ranks fit the GPUs, the operator's keys go to the image's user."""
    spec = mpijob()["spec"]
    for replicas in spec["mpiReplicaSpecs"].values():
        pod = replicas["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} <= volumes
    worker = spec["mpiReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == spec["slotsPerWorker"]
    port = worker["readinessProbe"]["tcpSocket"]["port"]
    assert f"Port {port}\n" in (LAUNCH / "sshd_config").read_text()
    assert spec["sshAuthMountPath"] == "/home/hvdformer/.ssh"


def test_the_command_of_the_mpijob_trains(tmp_path):
    """With the variables and the host file that the operator makes, and sizes for this machine."""
    spec = mpijob()["spec"]
    arguments = spec["mpiReplicaSpecs"]["Launcher"]["template"]["spec"]["containers"][0]["args"]
    small = {
        "/opt/hvdformer/configs/gpt2-124m.yaml": TINY,
        "data.path=data/mine": "train.final_evaluate_sequences=8",
        "eth0": "lo",
        "NCCL_SOCKET_IFNAME=eth0": "NCCL_SOCKET_IFNAME=lo",
        "XDG_CACHE_HOME=/work/cache": f"XDG_CACHE_HOME={tmp_path}/cache",
    }
    assert set(small) <= set(arguments)
    (tmp_path / "hostfile").write_text(f"{HERE} slots={spec['slotsPerWorker']}\n")
    output = finish(
        [small.get(word, word) for word in arguments],
        tmp_path,
        OMPI_MCA_orte_default_hostfile=str(tmp_path / "hostfile"),
        OMPI_MCA_orte_keep_fqdn_hostnames="true",
        OMPI_MCA_orte_set_default_slots="2",
        OMPI_MCA_plm_rsh_args="-o ConnectionAttempts=10",
        K_MPI_JOB_ROLE="launcher",
    )
    assert ": 2 ranks" in output and (tmp_path / "cache" / "hvdformer").is_dir()
