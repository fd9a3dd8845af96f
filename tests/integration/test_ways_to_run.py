"""The commands of the pages about ways to run, as they stand there; those for several hosts and Slurm run in tests/cluster."""

import os
import re
import shutil

import pytest

from tests import jobs

DOCS = jobs.ROOT / "docs"
WAYS = ("laptop", "docker", "hosts", "slurm", "pbs", "kubernetes", "elastic", "restarts")
PROGRAM = r"    (?=([A-Z_]+=\S+ )*(hvdformer|horovodrun|\$\(command -v mpirun\)|mpirun|launch/\S+|sbatch) )"


def commands(page):
    """The indented commands of a page, without the comments behind them."""
    lines = (DOCS / f"{page}.md").read_text().splitlines()
    return [re.split(r"\s+# ", line)[0].strip() for line in lines if re.match(PROGRAM, f"{line} ")]


def prepare(folder):
    """A checkout in which run.yaml is the tiny config, made brief."""
    shutil.copytree(jobs.ROOT / "launch", folder / "launch")
    text = (jobs.ROOT / "configs" / "tiny.yaml").read_text()
    brief = text.replace("steps: 20", "steps: 10").replace("sample_tokens: 32", "sample_tokens: 0")
    (folder / "run.yaml").write_text(
        brief.replace("  evaluate_every: 10", "  evaluate_every: 10\n  final_evaluate_sequences: 8")
    )
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("ways"))


def test_the_pages_have_commands_and_the_index_has_the_pages():
    assert [len(commands(page)) for page in ("laptop", "hosts", "slurm")] == [7, 6, 5]
    index = (DOCS / "running.md").read_text()
    assert all(f"({page}.md)" in index for page in (*WAYS, "troubleshooting"))
    for path in (jobs.ROOT / "launch").iterdir():
        if path.suffix in (".sh", ".sbatch", ".yaml") and path.name != "entrypoint.sh":
            assert path.name in index


@pytest.mark.parametrize("command", commands("laptop"))
def test_a_command_of_the_laptop(command, folder):
    shutil.rmtree(folder / "runs", ignore_errors=True)
    job = jobs.Job(["bash", "-c", command], folder, VIRTUAL_ENV=str(jobs.BIN.parent))
    try:
        assert job.wait(240) == 0, job.output
    finally:
        job.end()
    if "DOCTOR" in command:
        assert "training can work here" in job.output and not (folder / "runs").exists()
    else:
        run = folder / "runs" / ("three" if "runs/three" in command else "run")
        losses = [line["loss"] for line in jobs.metrics(run) if "loss" in line]
        assert len(losses) == 10 and losses[-1] < losses[0]


def test_the_pages_link_to_pages_that_are_there():
    for path in DOCS.glob("*.md"):
        for target in re.findall(r"\]\(([\w./-]+\.md)\)", path.read_text()):
            if os.path.basename(target) != "docker.md":  # comes with the image
                assert (path.parent / target).exists(), f"{path.name} -> {target}"
