"""Comparing kinds of fusion: what is refused, and how the results come from the metrics."""

import json
import sys

import numpy as np
import pytest

from hvdformer import compare
from hvdformer.config import Config
from hvdformer.errors import UserError
from tests import jobs

TINY = jobs.ROOT / "configs" / "tiny.yaml"


def configs(fusion, *overrides):
    return compare.load_configs(TINY, overrides, compare.parse_kinds(fusion))


def test_kinds_differ_in_their_fusion_only():
    found = configs("allreduce, allreduce:wire=bf16,diloco:every=5:outer_momentum=0.8", "train.steps=30")
    assert [config.fusion.wire for config in found] == ["fp32", "bf16", "fp32"]
    assert (found[2].fusion.every, found[2].fusion.outer_momentum) == (5, 0.8)
    assert (
        len({config.model_copy(update={"fusion": Config().fusion}).model_dump_json() for config in found})
        == 1
    )
    assert found[0].train.final_evaluate_sequences == found[0].train.evaluate_sequences == 32
    assert found[0].train.sample_tokens == 32, "what the file says stays"
    assert configs("zero1", "train.final_evaluate_sequences=0")[0].train.final_evaluate_sequences == 0


def test_every_fault_of_every_kind_is_told_at_once():
    with pytest.raises(UserError) as caught:
        configs(
            "addreduce,allreduce:evry=5,exact",
            "train.stepz=4",
            "fusion.kind=zero1",
        )
    message = str(caught.value)
    assert "4 faults found" in message
    assert "\n  train.stepz: no such setting; did you mean train.steps?" in message, "once, for all kinds"
    assert "addreduce: fusion.kind: found 'addreduce', expected" in message
    assert "allreduce:evry=5: fusion.evry: no such setting; did you mean fusion.every?" in message
    assert "fusion.kind has no effect here" in message


def test_contradictions_and_twins_are_told_at_once():
    with pytest.raises(UserError) as caught:
        configs("allreduce:every=5,diloco:every=4,exact,exact:wire=fp32")
    message = str(caught.value)
    assert "allreduce:every=5: fusion.every has no effect with fusion.kind=allreduce" in message
    assert "diloco:every=4: train.evaluate_every is 10 but fusion.every is 4" in message
    assert "diloco:every=4: checkpoint.every is 5 but fusion.every is 4" in message
    assert "exact:wire=fp32: the same as exact: name it once" in message
    assert "4 faults found" in message


def test_the_target_is_reached_where_numpy_says():
    x, losses = [10.0, 20.0, 40.0, 80.0], [5.0, 4.0, 3.5, 2.0]
    for target in (5.0, 4.4, 3.5, 2.1, 2.0):
        expected = np.interp(-target, [-loss for loss in losses], x)
        assert compare.reached(list(zip(x, losses, strict=True)), target) == pytest.approx(expected)
    assert compare.reached(list(zip(x, losses, strict=True)), 1.9) is None
    assert compare.reached([(7.0, 3.0)], 4.0) == 7.0, "by then, and nothing is known of before"
    assert compare.reached([(1.0, 5.0), (2.0, 3.0), (3.0, 4.0)], 4.0) == 1.5, "the first time"


def write_run(folder, losses, seconds_a_step, bytes_a_step):
    folder.mkdir(parents=True)
    lines = [
        {
            "step": step,
            "tokens": 100 * step,
            "train_seconds": seconds_a_step * step,
            "total_bytes_sent": bytes_a_step * step,
            "state_bytes": 2**20,
            "sequences": 32,
            "validation_loss": loss,
        }
        for step, loss in losses.items()
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def two_runs(tmp_path):
    write_run(tmp_path / "allreduce", {10: 4.0, 20: 3.0}, 2.0, 1000)
    write_run(tmp_path / "diloco-every=10", {10: 4.5, 20: 3.5}, 0.5, 60)
    return tmp_path, compare.parse_kinds("allreduce,diloco:every=10,zero1")


def test_results_are_taken_at_the_highest_final_loss(two_runs):
    folder, kinds = two_runs
    config = configs("allreduce")[0]
    results = compare.write_results(kinds, config, folder, {"zero1": "the disk is full"}, None)
    assert results == json.loads((folder / "compare.json").read_text())
    one, other, missing = results["kinds"]
    assert results["target_loss"] == 3.5
    assert (one["seconds_to_target"], one["tokens_to_target"], one["bytes_to_target"]) == (30, 1500, 15000)
    assert (other["seconds_to_target"], other["tokens_to_target"]) == (10, 2000)
    assert (one["tokens_per_second"], other["tokens_per_second"]) == (50, 200)
    assert (one["bytes_sent_per_step"], other["bytes_sent_per_step"]) == (1000, 60)
    assert not missing["is_complete"] and missing["error"] == "the disk is full"
    text = compare.table(results)
    assert "zero1 failed: the disk is full" in text and "target: validation loss 3.5000" in text
    assert [line.split()[0] for line in text.splitlines()[1:3]] == ["allreduce", "diloco:every=10"]


def test_a_run_that_is_not_complete_does_not_set_the_target(two_runs):
    folder, kinds = two_runs
    write_run(folder / "zero1", {10: 9.0}, 1.0, 1)
    results = compare.write_results(kinds, configs("allreduce")[0], folder, {}, None)
    assert results["target_loss"] == 3.5 and results["kinds"][2]["seconds_to_target"] is None
    assert "zero1 got to step 10 of 20; the same command goes on from there" in compare.table(results)


def test_without_matplotlib_there_is_the_table_and_how_to_get_it(two_runs, monkeypatch):
    folder, kinds = two_runs
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    results = compare.write_results(kinds, configs("allreduce")[0], folder, {}, 3.2, plots=True)
    assert results["plot"] is None and not (folder / "compare.png").exists()
    assert results["target_loss"] == 3.2 and "pip install 'hvdformer[plot]'" in compare.table(results)
