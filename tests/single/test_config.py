"""Settings: where they come from, and every way to get them wrong."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdformer.config import check_world_size, config_from_dict, differences, flatten, load_config, to_yaml
from hvdformer.errors import UserError
from tests.jobs import ROOT


def test_defaults_then_file_then_overrides(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("train:\n  steps: 70\n  seed: 5\noptim:\n  learning_rate: 1e-4\n")
    config = load_config(file, ["train.steps=80", "model.dropout=0.25", "data.mix=[{path: a, weight: 2}]"])
    assert (config.train.steps, config.train.seed, config.train.micro_batch) == (80, 5, 2)
    assert config.optim.learning_rate == 1e-4 and config.model.dropout == 0.25
    assert config.data.mix[0].path == "a" and config.data.mix[0].weight == 2


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_config_is_valid(file):
    assert load_config(file) == config_from_dict(load_config(file).model_dump(mode="json"), "again")


def test_the_resolved_config_reads_back_equal(tmp_path):
    config = load_config(None, ["optim.schedule=wsd", "optim.decay_steps=10", "model.rope_theta=5e5"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config


def test_all_faults_are_reported_at_once_with_their_key_paths():
    with pytest.raises(UserError) as caught:
        load_config(
            None,
            ["train.stesp=3", "optim.learning_rate=fast", "model.heads=0", "oops", "train.learning_rate=1"],
        )
    message = str(caught.value)
    assert "5 faults" in message
    assert "train.stesp: no such setting; did you mean train.steps?" in message
    assert "train.learning_rate: no such setting; did you mean optim.learning_rate?" in message
    assert "optim.learning_rate: found 'fast'" in message
    assert "model.heads: found 0" in message
    assert "'oops': expected section.key=value" in message


@pytest.mark.parametrize(
    "overrides,says",
    [
        (["train.micro_batch=3"], "micro_batch must divide global_batch"),
        (["model.heads=7"], "heads must divide width"),
        (["model.width=24", "model.heads=8"], "rotary positions turn pairs"),
        (["model.width=64", "model.heads=8", "model.kv_heads=3"], "kv_heads must divide heads"),
        (["model.positions=learned", "model.rope_theta=100"], "rope_theta has no effect"),
        (["optim.decay_steps=5"], "decay_steps has no effect"),
        (["optim.warmup_steps=2000", "train.steps=500"], "lower warmup_steps or raise steps"),
        (["optim.min_learning_rate=1"], "must not be above the peak"),
        (["optim.schedule=wsd", "optim.decay_steps=590"], "lower one of them or raise steps"),
        (["data.path=a", "data.mix=[{path: a, weight: 1}]"], "keep one"),
        (["train.precision=fp16", "train.device=cpu"], "fp16 needs a GPU"),
        (["model.dropout=1"], "model.dropout: found 1"),
        (["optim.learning_rate=.nan"], "optim.learning_rate"),
        (["train=5"], "train: found 5"),
        (["train.steps.more=5", "train.steps=5"], "train.steps"),
    ],
)
def test_impossible_or_useless_settings_are_named(overrides, says):
    with pytest.raises(UserError, match=says.replace("(", r"\(")):
        load_config(None, overrides)


def test_a_file_that_does_not_parse_names_the_line(tmp_path):
    file = tmp_path / "broken.yaml"
    file.write_text("train:\n  steps: [1, 2\nmodel: x\n")
    with pytest.raises(UserError, match=r"broken.yaml: line \d+"):
        load_config(file)
    file.write_text("- a\n- b\n")
    with pytest.raises(UserError, match="found a list"):
        load_config(file)
    with pytest.raises(UserError, match="no such config file"):
        load_config(tmp_path / "missing.yaml")
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="broken.yaml"):
        load_config(file)


def test_yaml_cannot_construct_objects(tmp_path):
    file = tmp_path / "evil.yaml"
    file.write_text(f"train: !!python/object/apply:os.system ['touch {tmp_path}/owned']\n")
    with pytest.raises(UserError):
        load_config(file)
    assert not (tmp_path / "owned").exists()


@given(st.text(max_size=200))
def test_any_text_as_a_config_is_accepted_or_refused_in_words(text):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "any.yaml"
        file.write_text(text, encoding="utf-8")
        try:
            load_config(file)
        except UserError as error:
            assert str(error)


def test_more_ranks_than_micro_batches_is_refused():
    config = load_config(None, ["train.global_batch=4", "train.micro_batch=2"])
    check_world_size(config, 2)
    with pytest.raises(UserError, match="3 ranks but .* = 2 micro-batches"):
        check_world_size(config, 3)


def test_differences_leave_out_what_changes_no_number():
    ours = load_config(None, ["train.log_every=3", "checkpoint.keep_last=9", "train.steps=601"])
    assert differences(ours, load_config()) == ["train.steps: 601 here, 600 there"]


def test_every_setting_has_a_description():
    from hvdformer.config import Config

    for section in Config.model_fields.values():
        for name, field in section.annotation.model_fields.items():
            assert field.description or name in ("beta1", "beta2", "epsilon"), name
    assert len(list(flatten(Config()))) > 40


def test_default_yaml_is_the_default():
    assert load_config(ROOT / "configs" / "default.yaml") == load_config()
