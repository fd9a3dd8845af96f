"""hvdformer bench and the benchmarks of a checkout, with real launchers and small models."""

import json
import subprocess
import sys

import pytest

from benchmarks.throughput import LABELS
from tests import jobs

TINY = str(jobs.ROOT / "configs" / "tiny.yaml")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    command = [
        "bench",
        TINY,
        "--np",
        "1,2",
        "--steps",
        "3",
        "--repeats",
        "1",
        "--launcher",
        "mpirun",
        "--json",
    ]
    done = subprocess.run(
        [jobs.HVDFORMER, *command, "train.device=cpu"],
        cwd=folder,
        env=jobs.environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return folder, done, json.loads(done.stdout)


def test_bench_tells_of_every_size_and_scaling(measured):
    _, done, results = measured
    assert [(run["np"], run["scaling"], run["global_batch"]) for run in results["runs"]] == [
        (1, "strong", 8),
        (2, "strong", 8),
        (2, "weak", 16),
    ]
    assert "repeat 1 of 1: np 2, horovod:" in done.stderr and "np 2, limit:" in done.stderr
    assert results["machine"]["cores"] >= 1 and results["launcher"] == "mpirun"


def test_the_numbers_fit_together(measured):
    _, _, results = measured
    alone, strong, weak = results["runs"]
    for run in results["runs"]:
        assert run["tokens_per_second"] == pytest.approx(run["global_batch"] * 64 / run["step_seconds"])
        parts = [run["data_seconds"], run["exposed_communication_seconds"]]
        assert all(part >= 0 for part in parts) and sum(parts) < run["step_seconds"]
    assert strong["strong_efficiency"] == pytest.approx(
        strong["tokens_per_second"] / alone["tokens_per_second"] / 2
    )
    assert weak["weak_efficiency"] == pytest.approx(
        weak["tokens_per_second"] / alone["tokens_per_second"] / 2
    )
    assert 0 < strong["of_limit"] < 3 and strong["of_horovod"] > 0


def test_what_is_sent_is_what_the_model_has(measured):
    """A ring of two sends each gradient once, in fp32; the buckets are padded by little."""
    _, _, results = measured
    alone, strong, weak = results["runs"]
    assert alone["bytes_sent"] == 0
    assert strong["bytes_sent"] == weak["bytes_sent"] == pytest.approx(4 * strong["parameters"], rel=0.01)
    assert alone["parameters"] == 257 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 128 + 2 * 32) + 32


def test_the_collective_alone_takes_longer_for_more_bytes(measured):
    _, _, results = measured
    seconds = {point["bytes"]: point["seconds"] for point in results["allreduce"]}
    assert all(point["np"] == 2 and point["seconds"] > 0 for point in results["allreduce"])
    assert seconds[2**26] > seconds[2**16]


def test_bench_leaves_nothing_behind(measured):
    folder, _, _ = measured
    assert list(folder.iterdir()) == []


def test_a_run_that_fails_is_told_with_its_words(tmp_path):
    code, output = jobs.run(
        "plain", 1, "bench", TINY, "--np", "1", "--repeats", "1", "data.path=nowhere", cwd=tmp_path
    )
    assert code == 1 and "Traceback" not in output
    assert "a run of the benchmark ended with 2" in output and "nowhere is no complete data set" in output


@pytest.mark.parametrize("value", ["0", "1,x", "2,"])
def test_sizes_that_are_none_are_refused(value, tmp_path):
    code, output = jobs.run("plain", 1, "bench", TINY, "--np", value, cwd=tmp_path)
    assert code == 2 and "expected numbers of ranks such as 1,2,4" in output


SMALL = [
    "model.width=32",
    "model.layers=2",
    "model.heads=2",
    "model.context_length=64",
    "model.vocab_size=300",
]


def module(name, *arguments, cwd):
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *arguments],
        cwd=jobs.ROOT,
        env=jobs.environment(TMPDIR=str(cwd)),
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_throughput_benchmark_runs_every_variant(tmp_path):
    """And stops by itself if they don't train the same: throughput.check_losses."""
    command = [
        "--workload",
        "default",
        "--np",
        "2",
        "--repeats",
        "1",
        "--steps",
        "2",
        "--out",
        str(tmp_path / "out"),
    ]
    printed = module("throughput", *command, "--precision", "fp32", *SMALL, cwd=tmp_path)
    results = json.loads((tmp_path / "out" / "throughput-default-fp32-np2.json").read_text())
    (repeat,) = results["repeats"]
    assert set(repeat) == set(LABELS)
    for name, run in repeat.items():
        assert run["tokens_per_second"] > 0 and len(run["step_seconds"][0]) == 2, name
        assert run["seconds_to_first_step"] > 0
        ranks = 1 if name in ("single", "plain") else 2
        assert len(run["peak_memory_bytes"]) == ranks and min(run["peak_memory_bytes"]) > 100 * 2**20, name
    assert repeat["mpi"]["losses"] == pytest.approx(repeat["ddp"]["losses"], abs=1e-3)
    assert repeat["single"]["losses"] == pytest.approx(repeat["plain"]["losses"], abs=1e-3)
    assert all(label in printed for label in LABELS.values())
    assert (tmp_path / "out" / "throughput.png").stat().st_size > 10_000

    more = module(
        "throughput", *command, "--precision", "fp32", "--add", "--only", "single", *SMALL, cwd=tmp_path
    )
    again = json.loads((tmp_path / "out" / "throughput-default-fp32-np2.json").read_text())
    assert again["repeats"][0] == repeat and set(again["repeats"][1]) == {"single"} and "2 repeats" in more


def test_the_start_is_split_into_its_parts(tmp_path):
    printed = module("start", "--repeats", "1", "--out", str(tmp_path), cwd=tmp_path)
    results = json.loads((tmp_path / "start-np2.json").read_text())
    for (taken,) in results["seconds"].values():
        parts = [
            taken[part] for part in ("launcher", "python", "torch", "horovod", "hvdformer", "first_step")
        ]
        assert sum(parts) == pytest.approx(taken["in_all"]) and taken["torch"] > 0.1 and taken["launcher"] > 0
    assert "import of Horovod" in printed
