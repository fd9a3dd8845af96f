"""What `hvdformer plan` says of bytes and state is what real runs send and keep, for every kind of fusion."""

import json

import pytest

from hvdformer import plan
from tests import jobs

TINY = str(jobs.ROOT / "configs" / "tiny.yaml")
EVERY = 5
SETTINGS = ("train.steps=10", "train.sample_tokens=0", "train.device=cpu")


def compare(folder, np, fusion, *settings):
    """{kind: its entry in compare.json}, and the parameters of the model."""
    command = ("compare", TINY, *SETTINGS, *settings, "--fusion", ",".join(fusion), "--run-dir", "runs")
    jobs.succeed("mpirun", np, *command, cwd=folder)
    entries = json.loads((folder / "runs" / "compare.json").read_text())["kinds"]
    assert not [entry["error"] for entry in entries if entry["error"]]
    parameters = jobs.inspect(folder / "runs" / fusion[0].replace(":", "-"), folder)["parameters"]
    return {entry["kind"]: entry for entry in entries}, parameters


def check(kind, entry, parameters, np):
    cluster = plan.Cluster(np, np, 1e9, 1e9)
    work = plan.Work(1.0, 0.1, 0.0, parameters, None)
    predicted = plan.predict(kind, work, cluster, 2, EVERY)["bytes_sent"]
    # Buckets are padded to a multiple of the ranks, and a rank's own part is rounded down: bytes, not per cent.
    assert entry["bytes_sent_per_step"] == pytest.approx(predicted, abs=400), kind.name
    estimate = {"optimizer": 8 * parameters}
    state = plan.memory_of(kind, estimate, parameters, np)["optimizer"]
    # AdamW's step counts, a few bytes a bucket.
    assert entry["state_bytes"] == pytest.approx(state, abs=400), kind.name


@pytest.mark.parametrize("np", [2, 4])
def test_bytes_and_state_of_every_kind(np, tmp_path):
    kinds = {kind.name: kind for kind in plan.kinds(8)}
    local = {name: f"{name}:every={EVERY}" for name in ("local_sgd", "diloco")}
    entries, parameters = compare(tmp_path, np, [local.get(name, name) for name in kinds])
    for name, kind in kinds.items():
        check(kind, entries[local.get(name, name)], parameters, np)


def test_exact_of_more_than_64_micro_batches(tmp_path):
    exact = next(kind for kind in plan.kinds(66) if kind.name == "exact")
    entries, parameters = compare(tmp_path, 2, ["exact"], "train.global_batch=66")
    check(exact, entries["exact"], parameters, 2)
