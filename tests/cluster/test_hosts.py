"""Several hosts, as network namespaces with an sshd each: launchers, hosts that differ, and a cable that is pulled."""

import json
import os
import signal
import subprocess
import time

import pytest

from benchmarks.hosts import end
from tests import jobs
from tests.integration.test_launch_files import LAUNCH, Lsf, Pbs, mpijob
from tests.integration.test_ways_to_run import commands, prepare

TINY = str(jobs.ROOT / "configs" / "tiny.yaml")
BRIEF = ("train.sample_tokens=0", "train.final_evaluate_sequences=8")
TIMEOUT = 10  # train.stall_timeout_seconds


class Job:
    """A command on the first host."""

    def __init__(self, hosts, folder, *command, **environment):
        self.hosts = hosts
        self.log = folder / f"output-{time.monotonic_ns()}.txt"
        settings = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        # Each host takes the cores for its own, but all share them: a rank that polls would hold up the others.
        settings |= {"OMPI_MCA_mpi_yield_when_idle": "1"}
        settings |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(jobs.ROOT)} | environment
        self.process = hosts.start(hosts.names[0], *command, log=self.log, cwd=folder, **settings)

    def output(self):
        return self.log.read_text(errors="replace")

    def wait_for(self, text, timeout=120):
        began = time.monotonic()
        while text not in self.output():
            assert self.process.poll() is None and time.monotonic() - began < timeout, self.output()
            time.sleep(0.05)

    def wait(self, timeout=240):
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s:\n{self.output()}") from None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        end(self.process)
        self.hosts.end_sessions()


def launcher(name, hosts):
    """One rank on each host; the commands of docs/hosts.md."""
    listed = ",".join(f"{host}:1" for host in hosts)
    if name == "mpirun":
        return [str(jobs.BIN / "mpirun"), "-np", str(len(hosts)), "--host", listed, "--bind-to", "none",
                "--mca", "btl_tcp_if_include", "eth0", "--mca", "oob_tcp_if_include", "eth0",
                "-x", "PATH", "-x", "PYTHONPATH"]  # fmt: skip
    kind = "--" + name.removeprefix("horovodrun-")
    found = [f"--mpi-args=--prefix {jobs.BIN.parent}"] if kind == "--mpi" else []
    return ["horovodrun", kind, *found, "--network-interfaces", "eth0", "-np", str(len(hosts)), "-H", listed]


LAUNCHERS = ("horovodrun-gloo", "horovodrun-mpi", "mpirun")


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_trains_on_several_hosts(name, number, three_hosts, tmp_path):
    command = [*launcher(name, three_hosts.names[:number]), jobs.HVDFORMER, "train", TINY]
    with Job(three_hosts, tmp_path, *command, *BRIEF, "--run-dir", "run") as job:
        assert job.wait() == 0, job.output()
    assert f"{number} ranks (1 on this host)" in job.output()
    assert f"controller {'Gloo' if 'gloo' in name else 'MPI'}" in job.output()
    losses = [line["loss"] for line in jobs.metrics(tmp_path / "run") if "loss" in line]
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_pulled_cable_ends_the_job_in_time_and_names_the_host(name, three_hosts, tmp_path):
    hosts = three_hosts.names[:2]
    command = [*launcher(name, hosts), jobs.HVDFORMER, "train", TINY, "train.steps=100000"]
    command += [f"train.stall_timeout_seconds={TIMEOUT}", "--run-dir", "run"]
    with Job(three_hosts, tmp_path, *command) as job:
        job.wait_for("step 12/")
        three_hosts.cut(hosts[1])
        began = time.monotonic()
        try:
            code = job.wait(TIMEOUT + 20)
        finally:
            three_hosts.cut(hosts[1], up=True)
        seconds = time.monotonic() - began
    assert code != 0
    assert f"on {hosts[1]}" in job.output() and "host or its network is gone" in job.output(), job.output()
    assert seconds < TIMEOUT + 5, f"{seconds:.0f} s"  # 5 s for the launcher to take down what it started


@pytest.mark.parametrize("name", ["mpirun", "horovodrun-mpi", "horovodrun-gloo"])
def test_launch_goes_on_without_the_host_that_is_cut_off(name, three_hosts, tmp_path):
    hosts = three_hosts.names[:2]
    words = "--mca btl_tcp_if_include eth0" if name == "mpirun" else "--network-interfaces eth0"
    command = [jobs.HVDFORMER, "launch", "--launcher", name, "--launcher-arguments", words]
    command += [
        "--hosts",
        ",".join(f"{host}:1" for host in hosts),
        "--min-np",
        "1",
        "--ssh",
        "ssh -o ConnectTimeout=3",
    ]
    command += ["--", "train", TINY, "train.steps=60", f"train.stall_timeout_seconds={TIMEOUT}"]
    with Job(three_hosts, tmp_path, *command, *BRIEF, "--run-dir", "run") as job:
        job.wait_for("step 12/")
        three_hosts.cut(hosts[1])
        try:
            assert job.wait() == 0, job.output()
        finally:
            three_hosts.cut(hosts[1], up=True)
    assert f"without {hosts[1]}" in job.output() and "going on from step" in job.output()
    attempts = [json.loads(line) for line in (tmp_path / "run" / "launch.jsonl").read_text().splitlines()]
    assert attempts[0]["unreachable"] == [hosts[1]] and attempts[-1]["code"] == 0


def test_a_host_with_other_data_is_found_before_the_first_step(three_hosts, tmp_path):
    """The same path on all hosts, but not the same files behind it."""
    for name in ("one", "two"):
        text = tmp_path / f"text-{name}"
        text.mkdir()
        for number in range(20):
            (text / f"{number}.txt").write_text(f"{name} {number} " * 300)
        fraction = ("--validation-fraction", "0.2")
        jobs.succeed("plain", 1, "prepare", str(text), "--out", f"data-{name}", *fraction, cwd=tmp_path)
    hosts = three_hosts.names[:2]
    data = str(tmp_path / "data-one")
    command = [*launcher("mpirun", hosts), jobs.HVDFORMER, "train", TINY, f"data.path={data}"]
    three_hosts.change(hosts[1], "mount", "--bind", str(tmp_path / "data-two"), data)
    try:
        with Job(three_hosts, tmp_path, *command, "--run-dir", "run") as job:
            assert job.wait() == 2, job.output()
        assert f"rank 1 on {hosts[1]} has another data_fingerprint than rank 0 on {hosts[0]}" in job.output()
    finally:
        three_hosts.change(hosts[1], "umount", data)
    three_hosts.change(hosts[1], "mount", "-t", "tmpfs", "tmpfs", data)
    try:
        with Job(three_hosts, tmp_path, *command, "--run-dir", "run") as job:
            assert job.wait() == 2, job.output()
        assert "on rank 1: " in job.output() and data in job.output()
    finally:
        three_hosts.change(hosts[1], "umount", data)


def test_hosts_with_other_numbers_of_cores_train(three_hosts, tmp_path):
    """Threads follow the cores of each host, unless the bits are to depend on nothing (fusion.kind=exact)."""
    hosts = three_hosts.names[:2]
    three_hosts.change(hosts[1], "taskset", "--cpu-list", "--pid", "0", "$PID")
    try:
        command = [*launcher("mpirun", hosts), jobs.HVDFORMER, "train", TINY, *BRIEF]
        with Job(three_hosts, tmp_path, *command, "--run-dir", "run") as job:
            assert job.wait() == 0, job.output()
    finally:
        three_hosts.change(hosts[1], "taskset", "--cpu-list", "--pid", f"0-{os.cpu_count() - 1}", "$PID")


@pytest.mark.parametrize("command", commands("hosts"))
def test_a_command_of_the_page(command, three_hosts, tmp_path):
    """docs/hosts.md, with the names of the hosts here."""
    folder = prepare(tmp_path)
    command = command.replace("node", three_hosts.names[0].rstrip("1"))
    with Job(three_hosts, folder, "bash", "-c", command, VIRTUAL_ENV=str(jobs.BIN.parent)) as job:
        assert job.wait() == 0, job.output()
    if "DOCTOR" in command:
        assert "training can work here" in job.output() and "10.99.0.0/24: works" in job.output()
        return
    losses = [line["loss"] for line in jobs.metrics(folder / "runs" / "run") if "loss" in line]
    assert len(losses) == 10 and losses[-1] < losses[0] and "4 ranks (2 on this host)" in job.output()


@pytest.mark.parametrize("batch", [Pbs, Lsf])
def test_a_batch_file_on_two_hosts(batch, three_hosts, tmp_path):
    """Trains on the hosts of the list, saves upon the signal to the script, and asks for the queue; then goes on."""
    hosts = three_hosts.names[:2]
    system = batch(tmp_path)
    (system.folder / "nodes").write_text("".join(f"{host}\n" * 2 for host in hosts))
    script = str(LAUNCH / f"{batch.__name__.lower()}.sh")
    command = ["bash", script, TINY, "train.steps=100", *BRIEF, "--run-dir", "run"]
    environment = {**system.environment, "NETWORK": "eth0"}
    with Job(three_hosts, tmp_path, *command, **environment) as job:
        job.wait_for("step 12/")
        job.process.send_signal(signal.SIGUSR1)
        assert job.wait(60) == (99 if batch is Lsf else -signal.SIGKILL), job.output()
    assert "4 ranks (2 on this host)" in job.output() and "time is nearly up: saving" in job.output()
    called = system.calls.read_text()
    assert "qrerun 123.server" in called if batch is Pbs else f"blaunch {hosts[1]}" in called, called
    with Job(three_hosts, tmp_path, *command, **environment) as job:
        assert job.wait() == 0, job.output()
    assert "going on from step" in job.output()
    steps = [line["step"] for line in jobs.metrics(tmp_path / "run") if "grad_norm" in line]
    assert steps == list(range(1, 101))


def test_the_mpijobs_command_on_two_hosts(three_hosts, tmp_path):
    """With the variables and the list of hosts that the operator makes."""
    spec = mpijob()["spec"]
    words = spec["mpiReplicaSpecs"]["Launcher"]["template"]["spec"]["containers"][0]["args"]
    small = {
        "mpirun": str(jobs.BIN / "mpirun"),  # in the image, ssh knows the PATH
        "/opt/hvdformer/configs/gpt2-124m.yaml": TINY,
        "data.path=data/mine": "train.final_evaluate_sequences=8",
        "XDG_CACHE_HOME=/work/cache": f"XDG_CACHE_HOME={tmp_path}/cache",
    }
    lines = [f"{host} slots={spec['slotsPerWorker']}\n" for host in three_hosts.names[:2]]
    (tmp_path / "hostfile").write_text("".join(lines))
    environment = {
        "OMPI_MCA_orte_default_hostfile": str(tmp_path / "hostfile"),
        "OMPI_MCA_orte_keep_fqdn_hostnames": "true",
        "OMPI_MCA_orte_set_default_slots": "2",
        "OMPI_MCA_plm_rsh_args": "-o ConnectionAttempts=10",
    }
    command = [small.get(word, word) for word in words]
    with Job(three_hosts, tmp_path, *command, **environment) as job:
        assert job.wait() == 0, job.output()
    assert "4 ranks (2 on this host)" in job.output()


RECORDER = """
import socket, sys
from hvdformer.cli import cli
from hvdformer.data import standard_library

*arguments, log = sys.argv[1:]
write = standard_library.write_data_set

def noted(*arguments, **options):
    with open(log, "a") as file:
        print(socket.gethostname(), file=file)
    return write(*arguments, **options)

standard_library.write_data_set = noted
cli.main(arguments, prog_name="hvdformer")
"""


@pytest.mark.parametrize("is_shared", [False, True])
def test_one_rank_of_each_node_builds_the_default_data(is_shared, three_hosts, tmp_path):
    """Two ranks on each of two hosts; with a cache of each host's own, and with one that they share."""
    hosts = three_hosts.names[:2]
    cache, log = tmp_path / "cache", tmp_path / "built"
    cache.mkdir()
    (tmp_path / "recorder.py").write_text(RECORDER)
    command = launcher("mpirun", hosts)
    command[command.index("--host") + 1] = ",".join(f"{host}:2" for host in hosts)
    command[command.index("-np") + 1] = "4"
    command += ["python", str(tmp_path / "recorder.py"), "train", TINY, "train.steps=6"]
    command += [*BRIEF, f"data.cache_dir={cache}", "--run-dir", "run", str(log)]
    if not is_shared:
        three_hosts.change(hosts[1], "mount", "-t", "tmpfs", "tmpfs", str(cache))
    try:
        with Job(three_hosts, tmp_path, *command) as job:
            assert job.wait() == 0, job.output()
        three_hosts.change(hosts[1], "sh", "-c", f"ls -A {cache} > {tmp_path}/second")
    finally:
        if not is_shared:
            three_hosts.change(hosts[1], "umount", str(cache))
    built = log.read_text().split()
    assert len(built) == len(set(built)) and set(built) <= set(hosts)
    assert is_shared or len(built) == 2
    first, second = os.listdir(cache), (tmp_path / "second").read_text().split()
    assert len(first) == 1 and first == second  # nothing half-made is left behind
