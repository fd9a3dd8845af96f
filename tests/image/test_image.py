"""The images, built from the Dockerfile as it stands: what is in them, and training in them on ranks and on hosts."""

import json
import os
import re
import resource
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from tests import jobs
from tests.image import engine as engines

DOCS = (jobs.ROOT / "docs" / "docker.md").read_text()
USER = 1000  # the image's own
STRANGER = 4321  # a user that no image knows
TINY = ("train", "configs/tiny.yaml", "data.path=data/code", "train.sample_tokens=0")
STEPS = 20  # of configs/tiny.yaml


def commands(section):
    """The lines of code in a section of docs/docker.md."""
    text = DOCS.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return [line.strip() for line in text.splitlines() if line.startswith("    ")]


class Shell:
    """A folder outside the containers, and a user who works in it as the documentation tells."""

    def __init__(self, engine, folder, user):
        self.folder, self.user = folder, user
        # Debian's docker before any other that is on the PATH.
        self.environment = {**engine.environment, "PATH": f"/usr/bin:{os.environ['PATH']}", "GPUS": ""}
        self.environment |= {"HOME": str(folder), "OMP_NUM_THREADS": "1"}
        self.environment["DOCKER_CONFIG"] = str(folder / ".docker")
        # The most that an engine may give that is started here.
        self.environment["ULIMITS"] = (
            f"memlock={resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]} stack=67108864"
        )
        self.words = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "bash", "-euc"]

    def run(self, command, timeout=300):
        done = subprocess.run(
            [*self.words, command],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
        return done.returncode, done.stdout

    def succeed(self, command, timeout=300):
        code, output = self.run(command, timeout)
        assert code == 0, f"{command}\nended with {code}:\n{output}"
        return output

    def start(self, command):
        """In the background; its output goes to the file that is returned with it."""
        log = self.folder / f"output-{time.monotonic_ns()}.txt"
        with log.open("w") as output:
            process = subprocess.Popen(
                [*self.words, command],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        return process, log


@pytest.fixture
def shell(engine):
    """Makes a Shell of a user. pytest's own folders are closed to other users, and a checkout may be."""
    engine.folder.chmod(0o711)
    engine.socket.chmod(0o666)
    folder = Path(tempfile.mkdtemp(prefix="hvdformer-test-"))

    def make(user):
        (folder / "launch").mkdir()
        shutil.copy(jobs.ROOT / "launch" / "docker.sh", folder / "launch")
        for path in [folder, *folder.rglob("*")]:
            os.chown(path, user, user)
        return Shell(engine, folder, user)

    yield make
    if containers := engine.succeed("ps", "-aq").split():
        engine.succeed("rm", "-f", *containers)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data set that is made, and then read, here and in containers."""
    folder = Path(tempfile.mkdtemp(prefix="hvdformer-data-"))
    split = ("--validation-fraction", "0.2")
    jobs.succeed("plain", 1, "prepare", str(jobs.ROOT / "hvdformer"), "--out", "code", *split, cwd=folder)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def outside(data, tmp_path_factory):
    """{ranks: sha256 of weights and optimizer state} of the run without any container."""
    folder = tmp_path_factory.mktemp("outside")
    shutil.copytree(jobs.ROOT / "configs", folder / "configs")
    (folder / "data").symlink_to(data)
    found = {}
    for ranks, launcher in ((1, "plain"), (2, "mpirun")):
        jobs.succeed(launcher, ranks, *TINY, "--run-dir", f"runs/{ranks}", cwd=folder)
        found[ranks] = jobs.weights_and_optimizer(folder / "runs" / str(ranks), STEPS)
    assert found[1] and found[2]
    return found


def owners(folder):
    return {path.stat().st_uid for path in folder.rglob("*")}


# ---- what is in the image


def test_the_image_has_what_a_run_needs_and_not_what_a_build_needs(engine, image, figures):
    # Without a network: where the kernel forwards nothing, docker warns about that in the same output.
    run = ("run", "--rm", "--network", "none", image)
    assert engine.succeed(*run, "bash", "-c", "id -u; pwd").split() == [str(USER), "/work"]
    tools = "g++ gcc cc make cmake nvcc sshd /usr/sbin/sshd"
    listed = engine.run(*run, "bash", "-c", f"command -v {tools}").stdout
    assert not listed.strip(), listed
    built = engine.succeed(*run, "horovodrun", "--check-build")
    for part in ("PyTorch", "MPI", "Gloo"):
        assert f"[X] {part}" in built, built
    assert "[ ] NCCL" in built, built
    size = int(engine.succeed("image", "inspect", "--format", "{{.Size}}", image))
    base = int(engine.succeed("image", "inspect", "--format", "{{.Size}}", engines.BASE))
    figures.append(f"size of the CPU image: {size / 1e9:.2f} GB, of which the base here: {base / 1e9:.2f} GB")


def test_nothing_of_this_machine_is_in_the_image_but_by_its_base(engine, image):
    """A pip setting, certificate or cache that came in during the build would be in a layer above the base."""
    history = engine.succeed("history", "--no-trunc", "--format", "{{.CreatedBy}}", image)
    assert "pip.conf" not in history and "127.0.0.1" not in history
    leftovers = "find / -xdev ( -name '*.whl' -o -path '/root/.cache/*' -o -path '/src/*' -o -path '/tmp/*' ) -not -path '/proc/*'"
    run = ("run", "--rm", "--network", "none", "--user", "0", image)
    found = engine.succeed(*run, "bash", "-c", leftovers.replace("(", "\\(").replace(")", "\\)"))
    left = [line for line in found.split() if not line.startswith("/usr/share/python-wheels/")]
    assert not left, left


def test_a_command_starts_soon(engine, image, figures):
    took = []
    for _ in range(5):
        began = time.monotonic()
        assert "hvdformer train" in engine.succeed("run", "--rm", "--network", "none", image, "--help")
        took.append(time.monotonic() - began)
    figures.append(
        f"docker run IMAGE --help: {sorted(took)[2]:.2f} s, median of 5 ({min(took):.2f} to {max(took):.2f})"
    )


def test_without_arguments_it_is_the_help(engine, image):
    assert "build-horovod" in engine.succeed("run", "--rm", image)
    assert engine.run("run", "--rm", image, "trian").returncode == 2


# ---- training in it


@pytest.mark.parametrize(
    "ranks,launcher",
    [
        (1, ""),
        (2, "horovodrun -np 2 hvdformer"),
        (2, "horovodrun --gloo -np 2 hvdformer"),
        (2, "mpirun -np 2 --oversubscribe --bind-to none hvdformer"),
    ],
)
def test_a_run_in_a_container_ends_in_the_bits_of_one_outside(
    ranks, launcher, shell, image, data, outside, figures
):
    """Without --shm-size, too: 64 MiB do for two ranks."""
    here = shell(USER)
    mounts = f"-v {here.folder}/runs:/work/runs -v {data}:/work/data:ro -e OMP_NUM_THREADS=1"
    began = time.time()
    here.succeed(
        f"mkdir runs && docker run --rm {mounts} {image} {launcher} {' '.join(TINY)} --run-dir runs/run"
    )
    assert jobs.weights_and_optimizer(here.folder / "runs" / "run", STEPS) == outside[ranks]
    assert owners(here.folder / "runs") == {USER}
    first = next(line["time"] for line in jobs.metrics(here.folder / "runs" / "run") if "loss" in line)
    figures.append(
        f"docker run to the end of the first step, {launcher or 'one rank'}: {first - began:.1f} s"
    )


@pytest.mark.parametrize("user", [STRANGER, 0])
def test_any_user_can_train_without_a_mounted_folder(user, engine, image):
    """With the default data, which wants a cache."""
    command = ["horovodrun", "-np", "2", "hvdformer", "train", "configs/tiny.yaml", "train.sample_tokens=0"]
    output = engine.succeed("run", "--rm", "--user", f"{user}:{user}", image, *command)
    assert "2 ranks" in output and "bits per byte" in output


def test_a_mounted_folder_that_is_not_the_users_is_named(shell, image):
    here = shell(0)
    code, output = here.run(
        f"mkdir runs && docker run --rm -v $PWD/runs:/work/runs {image} train configs/tiny.yaml"
    )
    assert code == 2 and "runs/tiny" in output and "ermission" in output, output


def test_shared_memory_that_is_too_small_is_named(engine, image):
    command = ["horovodrun", "-np", "2", "hvdformer", "doctor"]
    done = engine.run("run", "--rm", "--shm-size", "32m", image, *command)
    # mpirun marks the ranks' output by pieces of a few KiB, also in the middle of a line.
    said = re.sub(r"\[\d+,\d+\]<std(out|err)>:", "", done.stdout)
    assert done.returncode != 0 and "--shm-size" in said, said
    engine.succeed("run", "--rm", "--shm-size", "1g", image, *command)


# ---- launch/docker.sh


def test_docker_sh_trains_as_the_user_who_calls_it(shell, image, data):
    here = shell(STRANGER)
    output = here.succeed("launch/docker.sh doctor")
    assert "training can work here" in output and "ranks: 2\n" in output, output
    output = here.succeed(f"DATA={data} NP=3 launch/docker.sh {' '.join(TINY)} --run-dir runs/run")
    assert "3 ranks" in output
    assert owners(here.folder / "runs") == {STRANGER}
    assert jobs.metrics(here.folder / "runs" / "run")


def test_docker_sh_takes_configs_and_settings_of_the_shell(shell, image):
    here = shell(STRANGER)
    (here.folder / "mine").mkdir()
    tiny = (jobs.ROOT / "configs" / "tiny.yaml").read_text()
    (here.folder / "mine" / "own.yaml").write_text(tiny.replace("steps: 20", "steps: 7"))
    here.succeed("CONFIGS=mine launch/docker.sh train configs/own.yaml")
    assert len([line for line in jobs.metrics(here.folder / "runs" / "own") if "loss" in line]) == 7
    assert "but you set 7" in here.succeed("HOROVOD_IDLE_CYCLE_TIME=7 launch/docker.sh doctor")


def test_docker_sh_says_that_no_gpu_reaches_a_container(shell, image):
    code, output = shell(STRANGER).run("GPUS=all launch/docker.sh doctor")
    assert code == 1 and "NVIDIA Container Toolkit" in output, output


def test_docker_stop_saves_and_the_same_command_goes_on(shell, engine, image):
    here = shell(STRANGER)
    command = "launch/docker.sh train configs/tiny.yaml train.steps=100000 checkpoint.every=50000"
    step = 0
    for turn in range(2):
        process, log = here.start(command)
        if turn:
            wait_for(f"going on from step {step}", process, log)
        wait_for(f"step {step + 12}/", process, log)
        (container,) = engine.succeed("ps", "-q").split()
        engine.succeed("stop", container)
        assert process.wait(60) == 0, log.read_text()
        newest = sorted((here.folder / "runs" / "tiny" / "checkpoints").iterdir())[-1]
        assert int(newest.name.removeprefix("step-")) >= step + 12, log.read_text()
        step = int(newest.name.removeprefix("step-"))


def wait_for(text, process, log, seconds=120):
    until = time.monotonic() + seconds
    while text not in log.read_text():
        assert process.poll() is None and time.monotonic() < until, log.read_text()
        time.sleep(0.05)


# ---- the documentation


def test_the_commands_of_the_documentation_for_one_machine(shell, image, data):
    here = shell(USER)
    (here.folder / "books").symlink_to(data / "code")
    listed = commands("Run")
    assert len(listed) >= 11
    for command in listed:
        here.succeed(command.replace(" --gpus all", ""))
    for name in ("one", "two", "three", "tiny", "cpu"):
        assert jobs.weights_and_optimizer(here.folder / "runs" / name, STEPS)
    assert jobs.weights_and_optimizer(here.folder / "scratch" / "runs" / "books", STEPS)


def test_two_containers_are_two_hosts(shell, engine, image, ssh_image, data, outside):
    """The commands of the documentation, with the data and the number of threads of the run outside."""
    here = shell(USER)
    here.succeed("mkdir runs")
    runs = []
    try:
        for command in commands("Several hosts"):
            command = command.replace(
                "--shm-size", f"-e OMP_NUM_THREADS=1 -v {data}:/work/data:ro --shm-size"
            )
            command = command.replace("train configs/tiny.yaml", " ".join(TINY))
            if "docker exec" in command:
                command = command.replace("docker exec", "docker exec -e OMP_NUM_THREADS=1")
                command = command.replace("mpirun ", "mpirun -x OMP_NUM_THREADS ")
                runs.append(command.split("runs/")[-1])
                wait_for_port(engine, "node2")
            if "ssh-keygen" in command:
                # ssh-keygen wants a user with a name, and this machine may have none of that number.
                subprocess.run(["bash", "-euc", command], cwd=here.folder, check=True)
                for path in [here.folder / "ssh", *(here.folder / "ssh").iterdir()]:
                    os.chown(path, USER, USER)
                continue
            output = here.succeed(command)
            if "docker exec" in command:
                assert "2 ranks (1 on this host)" in output, output
            if "docker stop" in command:
                assert not engine.succeed("ps", "-q").split()
    finally:
        engine.run("rm", "-f", "node1", "node2")
        engine.run("network", "rm", "hvdformer")
    assert runs == ["gloo", "mpi", "mpirun", "launch"]
    for name in runs:
        assert jobs.weights_and_optimizer(here.folder / "runs" / name, STEPS) == outside[2], name


def wait_for_port(engine, name, seconds=30):
    until = time.monotonic() + seconds
    while "listening on" not in engine.succeed("logs", name):
        assert time.monotonic() < until
        time.sleep(0.1)


def test_sshd_lets_in_only_who_has_the_key(engine, ssh_image):
    settings = engine.succeed(
        "run", "--rm", ssh_image, "bash", "-c",
        "mkdir -p ~/.sshd && ssh-keygen -q -t ed25519 -N '' -f ~/.sshd/host_key && "
        "/usr/sbin/sshd -T -f /etc/ssh/hvdformer_sshd_config",
    )  # fmt: skip
    for line in (
        "port 2222",
        "passwordauthentication no",
        "kbdinteractiveauthentication no",
        "permitrootlogin no",
    ):
        assert line in settings, settings
    keys = engine.succeed(
        "run", "--rm", "--user", "0", ssh_image, "bash", "-c", "ls /etc/ssh /home/hvdformer/.ssh"
    )
    assert "host" not in keys.replace("known_hosts", ""), keys


# ---- the image for GPUs


def test_the_image_for_gpus_has_nccl(engine, request, figures):
    torch = request.config.getoption("--gpu", None)
    if not torch:
        pytest.skip("25 GB of disk and 15 minutes: only with --gpu TORCH, such as --gpu torch==2.14.1")
    log = engine.build("hvdformer-gpu", GPU="nccl", TORCH=torch)
    assert "[X] NCCL" in log
    built = engine.succeed("run", "--rm", "hvdformer-gpu", "horovodrun", "--check-build")
    for part in ("PyTorch", "MPI", "Gloo", "NCCL"):
        assert f"[X] {part}" in built, built
    report = engine.succeed("run", "--rm", "--shm-size", "1g", "hvdformer-gpu", "doctor", "--json")
    report = json.loads(report[report.index("{") :])
    assert (
        report["horovod_built_with"]["nccl"]
        and report["nccl"]["built_into_horovod"]
        and not report["problems"]
    )
    # Without a GPU it trains on the CPU.
    command = ["horovodrun", "-np", "2", "hvdformer", "train", "configs/tiny.yaml", "train.sample_tokens=0"]
    assert "2 ranks" in engine.succeed("run", "--rm", "hvdformer-gpu", *command)
    size = int(engine.succeed("image", "inspect", "--format", "{{.Size}}", "hvdformer-gpu"))
    figures.append(f"size of the image for GPUs: {size / 1e9:.2f} GB")
