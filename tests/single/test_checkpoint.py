"""Checkpoints: whole or not there, checked when read, and never trusted."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from hvdformer import checkpoint
from hvdformer.config import CheckpointConfig, Config, FusionConfig
from hvdformer.data.tokenizer import Tokenizer
from hvdformer.distributed.buckets import flatten
from hvdformer.distributed.fusion import Fusion, Share
from hvdformer.errors import RunError, UserError
from hvdformer.state import TrainState, tensors_sha256
from tests import jobs

FACTS = {"config": Config().model_dump(mode="json"), "world_size": 1, "data_fingerprint": "f", "versions": {}}


def make_state(steps=2, fused=True, width=4):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(width, 3), torch.nn.Linear(3, 1))
    fusion = Fusion(
        FusionConfig(),
        flatten(model.named_parameters(), bucket_mib=2.0),
        lambda matrices, vectors: torch.optim.AdamW([*matrices, *vectors], lr=0.1, fused=fused),
        Share(0, 1, 1, 1),
    )
    optimizer = fusion.optimizer
    state = TrainState(model, fusion)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=False)
        model(torch.randn(5, width)).sum().backward()
        optimizer.step()
        state.counters.step += 1
        state.counters.position += 5
    return state


def save(folder, state, keep_last=9):
    return checkpoint.save(
        folder, state, Tokenizer.byte().to_json(), FACTS, CheckpointConfig(keep_last=keep_last)
    )


def load(path, state):
    checkpoint.load_tensors(path, checkpoint.MODEL_FILE, dict(state.weights()))
    state.make_optimizer_tensors(checkpoint.tensor_specs(path, checkpoint.OPTIMIZER_FILE))
    checkpoint.load_tensors(path, checkpoint.OPTIMIZER_FILE, dict(state.optimizer_tensors()))
    state.load_dict(checkpoint.read_state(path))


@pytest.mark.parametrize("fused", [True, False])
def test_the_whole_state_comes_back_and_goes_on_the_same(tmp_path, fused):
    state = make_state(3, fused)
    path = save(tmp_path, state)
    other = make_state(0, fused)
    load(path, other)
    assert other.counters == state.counters
    assert tensors_sha256(other.tensors()) == tensors_sha256(state.tensors())
    for each in (state, other):
        torch.manual_seed(9)
        each.fusion.optimizer.zero_grad(set_to_none=False)
        each.model(torch.randn(5, 4)).sum().backward()
        each.fusion.optimizer.step()
    assert tensors_sha256(other.tensors()) == tensors_sha256(state.tensors())


def test_files_are_plain_safetensors_and_json(tmp_path):
    state = make_state()
    path = save(tmp_path, state)
    weights = load_file(path / "model.safetensors")
    assert weights.keys() == dict(state.weights()).keys()
    assert checkpoint.read_state(path)["weights_sha256"] == tensors_sha256(weights.items())


def test_the_newest_are_kept(tmp_path):
    state = make_state()
    for step in (5, 100, 20):
        state.counters.step = step
        save(tmp_path, state, keep_last=2)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step-00000020", "step-00000100"]
    assert checkpoint.find_latest(tmp_path) == (tmp_path / "step-00000100", [])


@pytest.mark.parametrize("name", [*checkpoint._FILES, checkpoint.MANIFEST_FILE])
@pytest.mark.parametrize("damage", ["cut", "flip", "missing", "empty", "longer"])
def test_any_damage_is_found_and_the_one_before_used(tmp_path, name, damage):
    state = make_state()
    good = save(tmp_path, state)
    state.counters.step += 1
    bad = save(tmp_path, state) / name
    content = bytearray(bad.read_bytes())
    if damage == "cut":
        bad.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[len(content) // 2] ^= 4
        bad.write_bytes(content)
    elif damage == "missing":
        bad.unlink()
    elif damage == "empty":
        bad.write_bytes(b"")
    else:
        bad.write_bytes(content + b"x")
    found, lines = checkpoint.find_latest(tmp_path)
    assert found == good
    assert len(lines) == 1 and "step-00000003 is damaged" in lines[0]


def test_another_model_is_refused_by_name_and_shape(tmp_path):
    path = save(tmp_path, make_state(width=4))
    with pytest.raises(UserError, match=r"0.weight is \[3, 4\] there and \[3, 6\] here"):
        checkpoint.load_tensors(path, checkpoint.MODEL_FILE, dict(make_state(width=6).weights()))
    with pytest.raises(UserError, match="surplus is only here"):
        checkpoint.load_tensors(
            path, checkpoint.MODEL_FILE, dict(make_state().weights()) | {"surplus": torch.zeros(1)}
        )


@pytest.mark.parametrize(
    "make,says",
    [
        (lambda folder: folder / "nothing", "no such checkpoint"),
        (lambda folder: folder, "holds no checkpoint"),
    ],
)
def test_a_path_without_a_checkpoint_says_what_is_expected(tmp_path, make, says):
    with pytest.raises(UserError, match=says):
        checkpoint.resolve(make(tmp_path))


def test_a_run_folder_and_a_step_folder_both_name_a_checkpoint(tmp_path):
    path = save(tmp_path / "checkpoints", make_state())
    assert (
        checkpoint.resolve(tmp_path)
        == checkpoint.resolve(path)
        == checkpoint.resolve(tmp_path / "checkpoints")
        == path
    )


def test_leftovers_of_an_interrupted_save_are_never_found_and_are_cleaned(tmp_path):
    path = save(tmp_path, make_state())
    (tmp_path / ".incomplete-step-00000009-77").mkdir()
    (tmp_path / ".incomplete-step-00000009-77" / "model.safetensors").write_bytes(b"half")
    assert checkpoint.find_latest(tmp_path)[0] == path
    checkpoint.clean(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_interrupted_at_any_moment_a_whole_checkpoint_is_left():
    """The short form of tests/interruptions.py: kill -9 at random instants, a real disk that runs full."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.interruptions", "--times", "40"],
        cwd=jobs.ROOT,
        env=jobs.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["killed"] + counts.get("disk full", 0) >= 40


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], check=False
        ).returncode
    ):
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_loses_nothing(small_disk):
    state = make_state()
    good = save(small_disk / "checkpoints", state)
    filler = small_disk / "filler"
    free = shutil.disk_usage(small_disk).free
    filler.write_bytes(b"x" * (free - 4096))
    state.counters.step += 1
    with pytest.raises(RunError, match="step 3 could not be written .*No space left"):
        save(small_disk / "checkpoints", state)
    assert checkpoint.find_latest(small_disk / "checkpoints") == (good, [])
    assert [entry.name for entry in (small_disk / "checkpoints").iterdir()] == [good.name]
    filler.unlink()
    assert save(small_disk / "checkpoints", state).name == "step-00000003"


@pytest.mark.parametrize(
    "change,says",
    [
        ({"step": "x"}, "step"),
        ({"step": -1}, "step"),
        ({"config": None}, "config"),
        ({"format_version": 2}, "format_version"),
        ({"tokens": None}, "tokens"),
    ],
)
def test_a_forged_state_is_damage(tmp_path, change, says):
    path = save(tmp_path, make_state())
    content = json.loads((path / "state.json").read_text()) | change
    (path / "state.json").write_text(json.dumps(content))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["state.json"] = {
        "bytes": (path / "state.json").stat().st_size,
        "sha256": checkpoint._file_sha256(path / "state.json"),
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"no whole checkpoint left(.|\n)*state.json: {says}"):
        checkpoint.resolve(tmp_path)


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_forged_checkpoints_are_refused_in_words(tmp_path_factory, data):
    """Whoever forges the manifest too gets past the checksums, but no further than an error message."""
    folder = tmp_path_factory.mktemp("forged")
    path = save(folder, make_state())
    name = data.draw(st.sampled_from([*checkpoint._FILES, checkpoint.MANIFEST_FILE]))
    content = bytearray((path / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (path / name).write_bytes(content)
    if name != checkpoint.MANIFEST_FILE and data.draw(st.booleans()):
        manifest = json.loads((path / checkpoint.MANIFEST_FILE).read_text())
        manifest[name] = {"bytes": len(content), "sha256": checkpoint._file_sha256(path / name)}
        (path / checkpoint.MANIFEST_FILE).write_text(json.dumps(manifest))
    try:
        found = checkpoint.resolve(folder)
        checkpoint.read_config(found)
        load(found, make_state(0))
        Tokenizer.load(found / checkpoint.TOKENIZER_FILE)
    except UserError as error:
        assert str(error)
    shutil.rmtree(folder)


def test_forged_files_are_refused_in_words_by_the_hundred():
    """The short form of tests/forgeries.py: checkpoints, shards, indexes, tokenizers and configs."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.forgeries", "--files", "150", "--seed", "1"],
        cwd=jobs.ROOT,
        env=jobs.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
