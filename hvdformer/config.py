"""Typed settings: defaults, then a YAML file, then key=value; every fault found is reported at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hvdformer.errors import UserError


class Section(BaseModel):
    """A group of settings. Unknown keys are an error, and a setting cannot change after checking."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(Section):
    """A decoder-only Transformer: modern by default, GPT-2 by settings (see configs/gpt2-124m.yaml)."""

    vocab_size: int | None = Field(None, ge=2, description="Number of token ids; null takes the tokenizer's.")
    context_length: int = Field(256, ge=1, description="Tokens a sequence; the longest context.")
    width: int = Field(320, ge=1, description="Model width (d_model).")
    layers: int = Field(4, ge=1, description="Number of Transformer blocks.")
    heads: int = Field(5, ge=1, description="Number of query heads.")
    kv_heads: int | None = Field(None, ge=1, description="Number of key/value heads; null: as many as heads.")
    ffn_width: int | None = Field(
        None, ge=1, description="Hidden width of the feed-forward part; null: 4 x width, or 8/3 for swiglu."
    )
    norm: Literal["rmsnorm", "layernorm"] = Field("rmsnorm", description="Normalisation before each part.")
    norm_epsilon: float = Field(1e-5, gt=0, description="Added to the variance in the normalisation.")
    positions: Literal["rotary", "learned"] = Field("rotary", description="How positions are encoded.")
    rope_theta: float | None = Field(None, gt=1, description="Base of the rotary angles; null: 10000.")
    activation: Literal["swiglu", "gelu", "gelu_tanh"] = Field(
        "swiglu", description="Feed-forward activation."
    )
    bias: bool = Field(False, description="Biases in the linear layers and in layernorm.")
    tie_embeddings: bool = Field(True, description="The output layer uses the input embedding's weights.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout probability in training.")


class MixEntry(Section):
    """One data set of a blend."""

    path: str = Field(description="A folder written by `hvdformer prepare`.")
    weight: float = Field(gt=0, description="Its share of the examples, relative to the other weights.")


class DataConfig(Section):
    """What is read. With neither path nor mix: the source text of Python's standard library, as bytes."""

    path: str | None = Field(None, description="A folder written by `hvdformer prepare`.")
    mix: tuple[MixEntry, ...] = Field((), description="Several data sets with weights, instead of path.")
    shuffle: bool = Field(True, description="Visit the sequences in a new pseudo-random order each epoch.")
    document_mask: bool = Field(False, description="Attention and loss do not cross document borders.")
    cache_dir: str | None = Field(
        None, description="Where the default data is kept, once a node; null: ~/.cache/hvdformer."
    )


class TrainConfig(Section):
    """The loop: how long, how much a step, at which precision, and what is reported when."""

    steps: int = Field(600, ge=1, description="Optimizer updates in the whole run.")
    global_batch: int = Field(16, ge=1, description="Sequences a step, over all ranks.")
    micro_batch: int = Field(2, ge=1, description="Sequences in one forward and backward.")
    seed: int = Field(1, ge=0, lt=2**63, description="Seed of weights, data order and dropout.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: cuda if there is a GPU, else cpu."
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="Of the forward and backward; weights stay fp32. auto: bf16 where the hardware has it, else fp32.",
    )
    threads: int | None = Field(
        None, ge=1, description="CPU threads per rank; null: cores / ranks on the node."
    )
    activation_checkpointing: bool = Field(
        False, description="Recompute each block in backward: less memory."
    )
    compile: bool = Field(False, description="torch.compile each block: slow start, faster steps.")
    log_every: int = Field(10, ge=1, description="Steps between two lines of metrics.jsonl.")
    evaluate_every: int = Field(200, ge=0, description="Steps between two validations; 0: only at the end.")
    evaluate_sequences: int = Field(
        512, ge=0, description="Sequences used by a validation during training; 0: all."
    )
    final_evaluate_sequences: int = Field(
        0, ge=0, description="Sequences used by the last validation; 0: all."
    )
    nonfinite: Literal["stop", "skip"] = Field(
        "stop",
        description="A loss or gradient that is infinite or NaN ends the run, or its step changes nothing on any rank.",
    )
    stall_timeout_seconds: float = Field(
        300, ge=2, description="A job in which nothing moves for this long is ended, with the rank named."
    )
    check_replicas_every: int = Field(
        100,
        ge=0,
        description="Steps between two comparisons of all ranks' weights; 0: only at start and end.",
    )
    max_minutes: float | None = Field(
        None, gt=0, description="After this long the run saves and stops, to go on when it is started again."
    )
    max_spike_sigma: float | None = Field(
        None,
        gt=0,
        description="Leave out a step whose gradient norm is this many standard deviations above the latest ones.",
    )
    sample_tokens: int = Field(256, ge=0, description="Tokens of sample text at the end; 0: none.")
    sample_prompt: str = Field("def ", description="What the sample text begins with.")


class OptimConfig(Section):
    """AdamW (arXiv 1711.05101) with a warm-up, a schedule and clipping by the global norm."""

    learning_rate: float = Field(3e-3, gt=0, description="At the peak, after the warm-up.")
    min_learning_rate: float = Field(1e-4, ge=0, description="At the end of the schedule.")
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "cosine", description="wsd: warm-up, stable, then a linear decay over the last decay_steps."
    )
    warmup_steps: int = Field(50, ge=0, description="Steps of linear warm-up from 0.")
    decay_steps: int | None = Field(
        None, ge=1, description="wsd only: length of the decay; null: a fifth of steps."
    )
    weight_decay: float = Field(0.1, ge=0, description="On matrices only; vectors are not decayed.")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    epsilon: float = Field(1e-8, gt=0)
    clip_norm: float = Field(1.0, ge=0, description="Largest global gradient norm; 0: no clipping.")


class FusionConfig(Section):
    """How the results of the ranks become one model."""

    kind: Literal["allreduce", "adasum", "exact", "local_sgd", "diloco", "zero1"] = Field(
        "allreduce", description="See docs/fusion.md: what each sends, keeps and is good for."
    )
    wire: Literal["fp32", "fp16", "bf16"] = Field(
        "fp32", description="allreduce only: number format of gradients on the network."
    )
    bucket_mib: float = Field(
        2.0, gt=0, description="Gradients are reduced in fixed buckets of about this many MiB."
    )
    every: int | None = Field(
        None, ge=1, description="local_sgd and diloco: steps between two fusions; null: 50."
    )
    outer_learning_rate: float | None = Field(
        None, gt=0, description="diloco: of the outer optimizer; null: 0.7."
    )
    outer_momentum: float | None = Field(
        None, ge=0, lt=1, description="diloco: Nesterov momentum of the outer optimizer; null: 0.9."
    )

    def resolved(self) -> FusionConfig:
        """With what null stands for filled in."""
        update: dict[str, Any] = {}
        if self.kind in LOCAL_KINDS:
            update["every"] = self.every or 50
        if self.kind == "diloco":
            update["outer_learning_rate"] = self.outer_learning_rate or 0.7
            update["outer_momentum"] = 0.9 if self.outer_momentum is None else self.outer_momentum
        return self.model_copy(update=update)


LOCAL_KINDS = ("local_sgd", "diloco")  # the ranks train apart between two fusions


class CheckpointConfig(Section):
    """When the whole state is saved. The last step always is."""

    every: int = Field(100, ge=0, description="Steps between two checkpoints; 0: only at the end.")
    background: bool = Field(
        True, description="Write while training goes on: a step waits for the copy in memory only."
    )
    keep_last: int = Field(2, ge=1, description="How many of the newest checkpoints are kept.")
    keep_every: int | None = Field(
        None, ge=1, description="Checkpoints of steps that are multiples of this are kept too."
    )
    keep_best: int = Field(
        0, ge=0, description="How many of those with the lowest validation loss are kept too."
    )


class Config(Section):
    """All settings of a run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    fusion: FusionConfig = FusionConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()


class FaultsFound(UserError):
    """Settings with faults: all of them, one a line, each with its key path."""

    def __init__(self, source: str, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        super().__init__(f"{source}: {count} found\n" + "\n".join(f"  {fault}" for fault in faults))


# Settings that may differ when a run folder is continued: they change what is reported, saved or where it
# runs, and no number of the training itself.
FREE_ON_RESUME = frozenset(
    {
        "data.cache_dir",
        "train.log_every",
        "train.sample_tokens",
        "train.sample_prompt",
        "checkpoint.every",
        "checkpoint.background",
        "checkpoint.keep_last",
        "checkpoint.keep_every",
        "checkpoint.keep_best",
        "train.stall_timeout_seconds",
        "train.check_replicas_every",
        "train.max_minutes",
    }
)


def load_config(path: Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read the settings of a run: the defaults, then the YAML file at `path`, then each "section.key=value".

    Raises:
        UserError: with every fault that was found, one a line, each with its key path.
    """
    tree: dict[str, Any] = {} if path is None else _read_yaml(path)
    return _with_overrides(tree, overrides, source=str(path) if path else "the settings")


def config_from_dict(tree: dict[str, Any], source: str, overrides: Sequence[str] = ()) -> Config:
    """Check settings that were stored by `Config.model_dump`; `source` names them in the message."""
    return _with_overrides(tree, overrides, source)


def flatten(config: Section, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting as ("section.key", value), in order of declaration."""
    for key in type(config).model_fields:
        value = getattr(config, key)
        if isinstance(value, Section):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differences(ours: Config, theirs: Config) -> list[str]:
    """The settings in which two configs differ, as "key: ours here, theirs there", but for FREE_ON_RESUME."""
    there = dict(flatten(theirs))
    return [
        f"{key}: {value!r} here, {there[key]!r} there"
        for key, value in flatten(ours)
        if value != there[key] and key not in FREE_ON_RESUME
    ]


def to_yaml(config: Config) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such config file. Give the path of a YAML file, or none for the defaults."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a config file: {error}") from None
    try:
        tree = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" line {where.line + 1}, column {where.column + 1}" if where else ""
        what = getattr(error, "problem", None) or "not valid YAML"
        raise UserError(
            f"{path}:{line} does not parse as YAML: {what}. Expected `section:` with `key: value`."
        ) from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(
            f"{path}: found a {type(tree).__name__}, expected sections such as `train:` with `steps: 100`."
        )
    return tree


def _with_overrides(tree: dict[str, Any], overrides: Sequence[str], source: str) -> Config:
    faults: list[str] = []
    for override in overrides:
        try:
            _set(tree, override)
        except ValueError as error:
            faults.append(str(error))
    return _checked(tree, faults, source)


def _set(tree: dict[str, Any], override: str) -> None:
    """Put one "section.key=value" into the tree; the value is read as YAML."""
    path, separator, text = override.partition("=")
    *sections, key = path.split(".")
    if not separator or not key or not all(sections):
        raise ValueError(f"{override!r}: expected section.key=value, for instance train.steps=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"{path}: {text!r} does not parse as a YAML value") from None
    node = tree
    for section in sections:
        child = node.get(section)
        if child is None:
            child = node[section] = {}
        if not isinstance(child, dict):
            raise ValueError(f"{path}: {section} is a value and has no key {key!r}")
        node = child
    node[key] = value


def _checked(tree: dict[str, Any], faults: list[str], source: str) -> Config:
    # A section that the file leaves empty (`train:` with nothing under it) means its defaults.
    tree = {key: {} if value is None else value for key, value in tree.items()}
    config = None
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        faults = faults + [_describe(fault) for fault in error.errors(include_url=False)]
    if config is not None:
        faults = faults + list(_contradictions(config))
    if faults:
        raise FaultsFound(source, faults)
    assert config is not None
    return config


def _describe(fault: Any) -> str:
    """One line for one fault that pydantic found: key path, what was found, what was expected."""
    path = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        near = _nearest(fault["loc"])
        return f"{path}: no such setting" + (f"; did you mean {near}?" if near else "")
    found = repr(fault["input"])
    found = found if len(found) <= 60 else found[:57] + "..."
    message = fault["msg"].replace("Input should be", "expected").replace("Field required", "is required")
    if fault["type"] == "missing":
        return f"{path}: {message}"
    if fault["type"] in ("model_type", "model_attributes_type"):
        return f"{path}: found {found}, expected keys with values under it"
    return f"{path}: found {found}, {message}"


def _nearest(location: tuple[Any, ...]) -> str | None:
    """The setting that an unknown key most likely meant: train.learning_rate means optim.learning_rate."""
    if len(location) == 1:
        return next(iter(difflib.get_close_matches(str(location[0]), list(Config.model_fields), 1)), None)
    keys = [key for key, _ in flatten(Config())]
    ours = [key for key in keys if key.startswith(f"{location[0]}.")]
    for candidates in (ours, keys):
        names = {key.rpartition(".")[2]: key for key in candidates}
        near = difflib.get_close_matches(str(location[-1]), list(names), 1, 0.7)
        if near:
            return names[near[0]]
    return None


def _contradictions(config: Config) -> Iterator[str]:
    """Settings that are each well-formed but impossible or without effect together."""
    model, data, train, optim = config.model, config.data, config.train, config.optim
    yield from _fusion_contradictions(config)
    if model.width % model.heads:
        yield f"model.heads is {model.heads} but model.width is {model.width}: heads must divide width"
    elif model.positions == "rotary" and (model.width // model.heads) % 2:
        yield (
            f"model.width / model.heads is {model.width // model.heads}: rotary positions turn pairs, "
            "so it must be even; change heads, or set model.positions=learned"
        )
    if model.kv_heads is not None and model.heads % model.kv_heads:
        yield f"model.kv_heads is {model.kv_heads} but model.heads is {model.heads}: kv_heads must divide heads"
    if model.rope_theta is not None and model.positions != "rotary":
        yield "model.rope_theta has no effect with model.positions=learned: remove it, or use rotary"
    if data.path is not None and data.mix:
        yield "data.path and data.mix are both set: keep one"
    if train.global_batch % train.micro_batch:
        yield (
            f"train.micro_batch is {train.micro_batch} but train.global_batch is {train.global_batch}: "
            "micro_batch must divide global_batch"
        )
    if train.precision == "fp16" and train.device == "cpu":
        yield "train.precision=fp16 needs a GPU: on a CPU use bf16 or fp32"
    keep_every, every = config.checkpoint.keep_every, config.checkpoint.every
    if keep_every is not None and (every == 0 or keep_every % every):
        yield (
            f"checkpoint.keep_every is {keep_every} but checkpoint.every is {every}: make it a multiple, so that there is "
            "a checkpoint to keep"
        )
    if optim.warmup_steps > train.steps:
        yield (
            f"optim.warmup_steps is {optim.warmup_steps} but train.steps is {train.steps}: "
            "lower warmup_steps or raise steps"
        )
    if optim.min_learning_rate > optim.learning_rate:
        yield (
            f"optim.min_learning_rate is {optim.min_learning_rate:g} but optim.learning_rate is "
            f"{optim.learning_rate:g}: the minimum must not be above the peak"
        )
    if optim.decay_steps is not None:
        if optim.schedule != "wsd":
            yield f"optim.decay_steps has no effect with optim.schedule={optim.schedule}: remove it, or use wsd"
        elif optim.warmup_steps + optim.decay_steps > train.steps:
            yield (
                f"optim.warmup_steps + optim.decay_steps is {optim.warmup_steps + optim.decay_steps} but train.steps "
                f"is {train.steps}: lower one of them or raise steps"
            )


def _fusion_contradictions(config: Config) -> Iterator[str]:
    fusion = config.fusion
    if fusion.wire != "fp32" and fusion.kind != "allreduce":
        yield (
            f"fusion.wire={fusion.wire} has no effect with fusion.kind={fusion.kind}: remove it, or use allreduce"
        )
    if fusion.every is not None and fusion.kind not in LOCAL_KINDS:
        yield (
            f"fusion.every has no effect with fusion.kind={fusion.kind}, which fuses in every step: remove it, or "
            f"use {' or '.join(LOCAL_KINDS)}"
        )
    for key in ("outer_learning_rate", "outer_momentum"):
        if getattr(fusion, key) is not None and fusion.kind != "diloco":
            yield f"fusion.{key} has no effect with fusion.kind={fusion.kind}: remove it, or use diloco"
    if fusion.kind in LOCAL_KINDS:
        every = fusion.resolved().every
        assert every is not None
        for key, value in (
            ("train.evaluate_every", config.train.evaluate_every),
            ("checkpoint.every", config.checkpoint.every),
        ):
            if value % every:
                yield (
                    f"{key} is {value} but fusion.every is {every}: only a fused model is evaluated or saved, so make "
                    f"{key} a multiple of it"
                )


def check_world_size(config: Config, size: int) -> None:
    """Refuse a world in which a rank would have no micro-batch to work on."""
    num_micro_batches = config.train.global_batch // config.train.micro_batch
    if size > num_micro_batches:
        raise UserError(
            f"{size} ranks but train.global_batch / train.micro_batch is {config.train.global_batch} / "
            f"{config.train.micro_batch} = {num_micro_batches} micro-batches a step: start at most "
            f"{num_micro_batches} ranks, lower micro_batch or raise global_batch"
        )
