"""What the README, configs/ and launch/ hand to people runs as it stands."""

import re
import shlex
import shutil
import subprocess

import pytest

from tests import jobs

README = (jobs.ROOT / "README.md").read_text()
USE = README.split("## Use")[1].split("\n## ")[0]
COMMANDS = [
    line.split("#")[0].strip()
    for line in USE.splitlines()
    if re.match(r"    (horovodrun|mpirun|hvdformer) ", line)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkout's configs, in which the commands are run in their order."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("configs", "hvdformer"):
        shutil.copytree(jobs.ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_the_readme_has_commands():
    assert len(COMMANDS) >= 11 and "make train" in README and "make test" in README


@pytest.mark.parametrize("number", range(len(COMMANDS)), ids=COMMANDS)
def test_a_command_of_the_readme(number, folder):
    command = COMMANDS[number]
    if "build-horovod" in command and not jobs.has("g++"):
        pytest.skip("no compiler here")
    if command.endswith(
        "hvdformer train"
    ):  # the default run takes minutes: the same command with the tiny config
        command += f" configs/tiny.yaml train.sample_tokens=8 --run-dir runs/{number}"
    job = jobs.Job(shlex.split(command), folder)
    try:
        assert job.wait(240) == 0, job.output
    finally:
        job.end()
    assert "Traceback" not in job.output


@pytest.mark.parametrize("script", ["local.sh", "mpirun.sh"])
@pytest.mark.parametrize("np", [2, 3])
def test_a_launch_script(script, np, folder):
    path = jobs.ROOT / "launch" / script
    command = [
        str(path),
        "configs/tiny.yaml",
        "train.steps=5",
        "train.sample_tokens=0",
        "--run-dir",
        f"runs/{script}-{np}",
    ]
    job = jobs.Job(command, folder, NP=str(np))
    try:
        assert job.wait(120) == 0, job.output
    finally:
        job.end()
    assert f"{np} ranks" in job.output


@pytest.mark.skipif(not jobs.has("shellcheck"), reason="shellcheck is not installed")
def test_shell_files_pass_shellcheck():
    files = [str(path) for path in (jobs.ROOT / "launch").iterdir() if path.suffix in (".sh", ".sbatch")]
    files.append(str(jobs.ROOT / ".ci" / "run"))
    done = subprocess.run(
        ["shellcheck", *files], capture_output=True, text=True, env=jobs.environment(), check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def data_set(folder):
    text = (jobs.ROOT / "README.md").read_text() + "\n" + (jobs.ROOT / "hvdformer" / "train.py").read_text()
    for number in range(30):
        (folder / "text").mkdir(exist_ok=True)
        (folder / "text" / f"{number}.txt").write_text(f"{number}\n{text}")
    jobs.succeed(
        "plain", 1, "prepare", "text", "--out", "data/text", "--validation-fraction", "0.2", cwd=folder
    )
    return folder / "data" / "text"


@pytest.mark.parametrize("name", ["gpt2-124m", "llama-1b"])
def test_a_config_for_a_gpu_host_runs_when_it_is_made_small(name, folder, data_set):
    """Its own settings but for the sizes: two steps on two ranks."""
    small = [
        "model.width=64",
        "model.layers=2",
        "model.heads=4",
        "model.context_length=64",
        "model.vocab_size=300",
    ]
    small += [
        "train.steps=2",
        "train.global_batch=4",
        "train.micro_batch=1",
        "optim.warmup_steps=1",
        "train.device=cpu",
    ]
    small += ["train.sample_tokens=4", "train.precision=fp32", "train.evaluate_sequences=4"]
    if name == "llama-1b":
        small += ["model.kv_heads=2", "model.ffn_width=96"]
    output = jobs.succeed(
        "mpirun", 2, "train", f"configs/{name}.yaml", *small, "--run-dir", f"runs/{name}", cwd=folder
    )
    assert "bits per byte" in output


def test_bf16_activation_checkpointing_dropout_and_document_mask_train_and_resume(folder, data_set):
    """The settings that change the path of a step, together."""
    settings = [
        "train.precision=bf16",
        "train.activation_checkpointing=true",
        "model.dropout=0.1",
        "data.document_mask=true",
    ]
    command = ("train", "configs/tiny.yaml", "data.path=data/text", "train.sample_tokens=0", *settings)
    jobs.succeed("mpirun", 2, *command, "--run-dir", "runs/whole", cwd=folder)
    shutil.copytree(folder / "runs" / "whole", folder / "runs" / "half")
    shutil.rmtree(folder / "runs" / "half" / "checkpoints" / "step-00000020")
    assert "going on from step 15" in jobs.succeed(
        "mpirun", 2, *command, "--run-dir", "runs/half", cwd=folder
    )
    whole, half = (jobs.weights_and_optimizer(folder / "runs" / name, 20) for name in ("whole", "half"))
    assert whole == half
    losses = [line["loss"] for line in jobs.metrics(folder / "runs" / "whole") if "loss" in line]
    assert losses[-1] < losses[0] - 0.3


def test_compiled_blocks_train(folder):
    """torch.compile needs a compiler; the losses are those of the plain blocks, to rounding."""
    if not jobs.has("g++"):
        pytest.skip("no compiler here")
    command = (
        "train",
        "configs/tiny.yaml",
        "train.steps=5",
        "train.sample_tokens=8",
        "train.final_evaluate_sequences=8",
    )
    for name, settings in (("plain", ()), ("compiled", ("train.compile=true",))):
        jobs.succeed("mpirun", 2, *command, *settings, "--run-dir", f"runs/{name}", cwd=folder)
    losses = [
        [line["loss"] for line in jobs.metrics(folder / "runs" / name) if "loss" in line]
        for name in ("plain", "compiled")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_other_data_is_refused_on_resume_and_taken_on_request(folder, data_set):
    command = ("train", "configs/tiny.yaml", "data.path=data/changing", "train.sample_tokens=0")
    shutil.copytree(data_set, folder / "data" / "changing")
    jobs.succeed("plain", 1, *command, "--run-dir", "runs/changing", cwd=folder)
    shutil.rmtree(folder / "data" / "changing")
    again = (
        "prepare",
        "text",
        "--out",
        "data/changing",
        "--validation-fraction",
        "0.2",
        "--shuffle-seed",
        "7",
    )
    jobs.succeed("plain", 1, *again, cwd=folder)
    code, output = jobs.run("plain", 1, *command, "--run-dir", "runs/changing", cwd=folder)
    assert code == 2 and "was trained on other data" in output and "--resume" in output
    command = (*command, "train.steps=22", "--run-dir", "runs/taken", "--resume", "runs/changing")
    assert "going on from step 20" in jobs.succeed("plain", 1, *command, cwd=folder)


def test_a_blend_of_data_sets(folder, data_set):
    jobs.succeed(
        "plain", 1, "prepare", "configs", "--out", "data/other", "--validation-fraction", "0", cwd=folder
    )
    mix = "data.mix=[{path: data/text, weight: 3}, {path: data/other, weight: 1}]"
    command = ("train", "configs/tiny.yaml", mix, "train.sample_tokens=0")
    one = jobs.succeed("plain", 1, *command, "--run-dir", "runs/mix1", cwd=folder)
    jobs.succeed("mpirun", 2, *command, "--run-dir", "runs/mix2", cwd=folder)
    seen = [
        [line["examples"] for line in jobs.metrics(folder / "runs" / run) if "examples" in line]
        for run in ("mix1", "mix2")
    ]
    assert seen[0] == seen[1] and "bits per byte" in one
