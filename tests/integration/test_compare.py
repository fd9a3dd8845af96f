"""hvdformer compare, under real launchers."""

import json

import pytest

from tests import jobs

TINY = str(jobs.ROOT / "configs" / "tiny.yaml")
FUSION = "allreduce,diloco:every=5:outer_learning_rate=1e30,allreduce:wire=bf16,zero1,local_sgd:every=5"
COMMAND = ("compare", TINY, "train.sample_tokens=0", "--fusion", FUSION, "--run-dir", "runs")


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Killed in the third kind and started again; one of the kinds cannot work: it makes the weights infinite."""
    folder = tmp_path_factory.mktemp("compare")
    job = jobs.Job(jobs.command("mpirun", 2, *COMMAND), folder)
    try:
        job.wait_for("--- kind 3 of 5: allreduce:wire=bf16")
        job.wait_for("saved runs/allreduce-wire=bf16/checkpoints/step-00000010")
        so_far = json.loads((folder / "runs" / "compare.json").read_text())
        job.kill_ranks()
        assert job.wait(20) != 0
    finally:
        job.end()
    code, output = jobs.run("mpirun", 2, *COMMAND, cwd=folder)
    return folder, so_far, code, output


def test_the_results_so_far_outlive_a_kill(compared):
    _, so_far, _, _ = compared
    first, second, *others = so_far["kinds"]
    assert first["is_complete"] and first["validation_loss"] < 4.5
    assert "infinite or NaN" in second["error"]
    assert not any(entry["is_complete"] for entry in others)


def test_a_kind_that_fails_leaves_its_place_to_the_next(compared):
    _, _, code, output = compared
    assert code == 1 and "Traceback" not in output
    assert "diloco:every=5:outer_learning_rate=1e30 failed: step" in output
    table = output[output.index("fusion  ") :].splitlines()
    assert [line.split()[0] for line in table[1:5]] == [
        "allreduce",
        "allreduce:wire=bf16",
        "zero1",
        "local_sgd:every=5",
    ]


def test_the_results_are_those_of_the_runs(compared):
    folder, _, _, _ = compared
    results = json.loads((folder / "runs" / "compare.json").read_text())
    entries = {entry["kind"]: entry for entry in results["kinds"]}
    one, half, zero1, local = (
        entries[kind] for kind in ("allreduce", "allreduce:wire=bf16", "zero1", "local_sgd:every=5")
    )
    numbers = jobs.inspect(folder / "runs" / "allreduce", folder)["parameters"]
    # Two ranks: a rank sends 2 (n-1)/n = 1 times the gradients a step; weights and two moments every 5 steps.
    assert one["bytes_sent_per_step"] == pytest.approx(4 * numbers, rel=1e-3)
    assert half["bytes_sent_per_step"] == pytest.approx(2 * numbers, rel=1e-3)
    assert local["bytes_sent_per_step"] == pytest.approx(12 * numbers / 5, rel=1e-3)
    assert one["state_bytes"] == pytest.approx(8 * numbers, rel=1e-3)
    assert zero1["state_bytes"] == pytest.approx(4 * numbers, rel=1e-2)
    complete = [entry for entry in results["kinds"] if entry["is_complete"]]
    assert results["target_loss"] == max(entry["validation_loss"] for entry in complete)
    for entry in complete:
        assert 0 < entry["tokens_to_target"] <= entry["tokens"] == 20 * 8 * 64
        assert 0 < entry["seconds_to_target"] <= entry["train_seconds"]
        assert entry["validation_loss"] == jobs.metrics(folder / entry["run"])[-1]["validation_loss"]
    image = (folder / "runs" / "compare.png").read_bytes()
    assert image.startswith(b"\x89PNG") and len(image) > 10_000


def test_each_run_ends_in_the_bits_of_train(compared):
    """Whether another kind was trained before it in the same processes, or it was killed."""
    folder, _, _, output = compared
    assert "going on from step 10" in output and "this run is complete at step 20" in output
    command = ("train", TINY, "train.sample_tokens=0", "train.final_evaluate_sequences=32")
    for name, setting in (("allreduce-wire=bf16", "fusion.wire=bf16"), ("zero1", "fusion.kind=zero1")):
        jobs.succeed("mpirun", 2, *command, setting, "--run-dir", f"alone/{name}", cwd=folder)
        run, alone = folder / "runs" / name, folder / "alone" / name
        assert jobs.weights_and_optimizer(run, 20) == jobs.weights_and_optimizer(alone, 20)
        assert jobs.numbers(run) == jobs.numbers(alone)


def test_json_on_standard_output_and_a_stop_in_between(tmp_path):
    command = ("compare", TINY, "train.steps=2000", "train.evaluate_every=100", "checkpoint.every=100")
    command += ("--fusion", "exact,diloco", "--run-dir", "runs", "--json")
    job = jobs.Job(jobs.command("horovodrun-gloo", 2, *command), tmp_path)
    try:
        job.wait_for("step 12/")
        job.ranks()[-1].send_signal(15)
        assert job.wait(30) == 0, job.output
    finally:
        job.end()
    line = next(line for line in job.output.splitlines() if '"target_loss"' in line)
    results = json.loads(line[line.index("{") :])  # horovodrun puts the rank before each line
    assert [entry["is_complete"] for entry in results["kinds"]] == [False, False]
    assert "kind 2 of 2" not in job.output, "asked to stop, and went on with the next kind"
    assert results == json.loads((tmp_path / "runs" / "compare.json").read_text())


def test_what_cannot_work_is_refused_before_anything_starts(tmp_path):
    code, output = jobs.run(
        "horovodrun-gloo", 2, "compare", TINY, "--fusion", "allreduce,exact:every=5,diloco", cwd=tmp_path
    )
    assert code == 2 and output.count("hvdformer: ") == 1
    for text in (
        "3 faults found",
        "exact:every=5: fusion.every has no effect",
        "diloco: checkpoint.every is 5",
    ):
        assert text in output
    command = ("compare", TINY, "train.global_batch=2", "--fusion", "allreduce,adasum")
    code, output = jobs.run("mpirun", 3, *command, cwd=tmp_path)
    assert code == 2 and output.count("hvdformer: ") == 1 and "Traceback" not in output
    assert "adasum: fusion.kind=adasum cannot work here: 3 ranks" in output and "3 ranks but" in output
    assert not (tmp_path / "runs").exists()
