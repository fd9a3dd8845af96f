"""Checkpoints: whole, written atomically, checked by sha256 when read, and found without a pointer that could lie.

    RUN/checkpoints/step-00000100/
        model.safetensors       weights, fp32
        optimizer.safetensors   moments and step counts, named "parameter/key"
        tokenizer.json          so that text can be made from the checkpoint alone
        state.json              counters, config, world size, versions, sha256 of the weights
        manifest.json           size and sha256 of every other file

A checkpoint is written under a temporary name, synced and then renamed, by one process. Nothing is unpickled.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hvdformer import faults
from hvdformer.config import CheckpointConfig, Config, config_from_dict
from hvdformer.distributed import watchdog
from hvdformer.errors import RunError, UserError
from hvdformer.state import TrainState, tensors_sha256

FORMAT_VERSION = 1
MODEL_FILE, OPTIMIZER_FILE, STATE_FILE, MANIFEST_FILE = (
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "manifest.json",
)
TOKENIZER_FILE = "tokenizer.json"
_FILES = (MODEL_FILE, OPTIMIZER_FILE, TOKENIZER_FILE, STATE_FILE)
_NAME = re.compile(r"step-(\d{8,})")
_TEMPORARY = ".incomplete-"
_MAX_JSON_BYTES = 16 * 2**20  # no state.json or manifest.json of ours comes near


class StoredState(BaseModel):
    """What state.json has to hold; the config in it is checked when it is used."""

    model_config = ConfigDict(extra="allow")

    format_version: Literal[1]
    step: int = Field(ge=0)
    position: int = Field(ge=0)
    tokens: int = Field(ge=0)
    train_seconds: float = Field(ge=0)
    total_bytes_sent: int = Field(0, ge=0)
    loss_scaler: dict[str, float] | None
    config: dict[str, Any]
    world_size: int = Field(ge=1)
    data_fingerprint: str
    weights_sha256: str
    versions: dict[str, str]
    validation: dict[str, float] | None = None
    validation_step: int | None = None
    gradient_norms: dict[str, float] | None = None
    exact_scales: dict[str, Annotated[int, Field(ge=-200, le=200)]] | None = None


class Damaged(Exception):
    """A checkpoint that is not what was written: the message says which file and how."""


@dataclass(frozen=True)
class Snapshot:
    """A copy of the whole state in memory, which training does not touch any more."""

    step: int
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    tokenizer_json: str
    content: dict[str, Any]  # of state.json, but for the hash of the weights


def snapshot(state: TrainState, tokenizer_json: str, facts: dict[str, Any]) -> Snapshot:
    """Copy the state; facts: what else goes into state.json (config, world size, versions, ...)."""
    # Copies also because safetensors takes no views of one memory, and the tensors of a bucket are.
    return Snapshot(
        state.counters.step,
        {name: tensor.cpu().clone() for name, tensor in state.weights()},
        {name: tensor.cpu().clone() for name, tensor in state.optimizer_tensors()},
        tokenizer_json,
        {**facts, "format_version": FORMAT_VERSION, **state.to_dict()},
    )


def save(
    folder: Path, state: TrainState, tokenizer_json: str, facts: dict[str, Any], keep: CheckpointConfig
) -> Path:
    """Write the state as `folder`/step-NNNNNNNN. One process calls it; see `write`."""
    return write(folder, snapshot(state, tokenizer_json, facts), keep)


def write(folder: Path, taken: Snapshot, keep: CheckpointConfig) -> Path:
    """Write a snapshot as `folder`/step-NNNNNNNN, then remove those that `keep` does not keep. One process calls it.

    Raises:
        RunError: the file system did not take it. What was there before is untouched.
    """
    target = folder / f"step-{taken.step:08d}"
    temporary = folder / f"{_TEMPORARY}{target.name}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        if faults.is_struck("full-disk", taken.step):
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} (a drill)")
        content = {**taken.content, "weights_sha256": tensors_sha256(taken.weights.items())}
        writers: dict[str, Callable[[Path], object]] = {
            MODEL_FILE: lambda path: save_file(taken.weights, path),
            OPTIMIZER_FILE: lambda path: save_file(taken.optimizer, path),
            TOKENIZER_FILE: lambda path: path.write_text(taken.tokenizer_json, encoding="utf-8"),
            STATE_FILE: lambda path: path.write_text(json.dumps(content, indent=1), encoding="utf-8"),
        }
        manifest = {}
        for name, write_file in writers.items():
            write_file(temporary / name)
            manifest[name] = {
                "bytes": (temporary / name).stat().st_size,
                "sha256": _file_sha256(temporary / name),
            }
            watchdog.beat()
        (temporary / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for name in (*writers, MANIFEST_FILE):
            _sync(temporary / name)
            watchdog.beat()
        _sync(temporary)
        if target.exists():  # a damaged one, or one of a run that was told to start anew
            _remove(target)
        temporary.rename(target)
        _sync(folder)
        if faults.is_struck("corrupt", taken.step):
            _flip_a_bit(target / MODEL_FILE)
        for step in obsolete({step: _validation_loss(path) for step, path in _list(folder)}, keep):
            _remove(folder / f"step-{step:08d}")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(
            f"checkpoint of step {taken.step} could not be written to {folder}: {error}. "
            "Checkpoints written before are untouched; make room or repair the folder, then start the same command again."
        ) from None
    return target


def obsolete(losses: dict[int, float | None], keep: CheckpointConfig) -> list[int]:
    """The steps whose checkpoints `keep` does not keep. losses: of the validation at each step, None if there was none."""
    kept = set(sorted(losses)[-keep.keep_last :])
    if keep.keep_every is not None:
        kept |= {step for step in losses if step % keep.keep_every == 0}
    if keep.keep_best:
        measured = sorted((loss, step) for step, loss in losses.items() if loss is not None)
        kept |= {step for _, step in measured[: keep.keep_best]}
    return [step for step in losses if step not in kept]


def _validation_loss(path: Path) -> float | None:
    """The validation loss of exactly this checkpoint's weights, if they were validated."""
    try:
        state = _read_json(path / STATE_FILE)
    except Damaged:
        return None
    if state.get("validation_step") != state.get("step"):
        return None
    loss = (state.get("validation") or {}).get("validation_loss")
    return loss if isinstance(loss, float) else None


def _flip_a_bit(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))


def clean(folder: Path) -> None:
    """Remove what interrupted saves and removals left behind. One process calls it, before any save."""
    for leftover in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def find_latest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint in `folder` that is whole, and a line about each newer one that is damaged."""
    damages: list[str] = []
    for _, path in _list(folder):
        try:
            verify(path)
            return path, damages
        except Damaged as damage:
            damages.append(f"{path} is damaged and is not used: {damage}")
    return None, damages


def resolve(path: Path) -> Path:
    """The checkpoint that a user's path means: a step folder, or the newest whole one of a run folder.

    Raises:
        UserError: there is none, or the one named is damaged.
    """
    if (path / "checkpoints").is_dir():
        path = path / "checkpoints"
    if _list(path):
        latest, damages = find_latest(path)
        if latest is None:
            raise UserError("no whole checkpoint left:\n  " + "\n  ".join(damages))
        return latest
    if not path.is_dir():
        raise UserError(
            f"{path}: no such checkpoint. Give a run folder, or one of the step-... folders in its checkpoints/."
        )
    if not (path / MANIFEST_FILE).is_file():
        raise UserError(
            f"{path}: holds no checkpoint. Expected a run folder with checkpoints/step-... in it, or such a step folder."
        )
    try:
        verify(path)
    except Damaged as damage:
        raise UserError(f"{path} is damaged: {damage}. Use another of {path.parent}.") from None
    return path


def verify(path: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        Damaged: a file is missing, cut short or changed.
    """
    manifest = _read_json(path / MANIFEST_FILE)
    if set(manifest) != set(_FILES):
        raise Damaged(f"{MANIFEST_FILE} lists {sorted(manifest)}, expected {sorted(_FILES)}")
    for name in _FILES:
        expected = manifest[name]
        try:
            found = (path / name).stat().st_size
            if found != expected["bytes"]:
                raise Damaged(f"{name} has {found} bytes, expected {expected['bytes']}")
            if _file_sha256(path / name) != expected["sha256"]:
                raise Damaged(f"{name} does not have the sha256 of {MANIFEST_FILE}")
        except OSError as error:
            raise Damaged(f"{name} cannot be read ({error.strerror})") from None
        except (TypeError, KeyError):
            raise Damaged(f"{MANIFEST_FILE} has no size and sha256 for {name}") from None
    try:
        StoredState.model_validate(_read_json(path / STATE_FILE))
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        raise Damaged(f"{STATE_FILE}: {'.'.join(map(str, fault['loc']))}: {fault['msg']}") from None


def read_state(path: Path) -> dict[str, Any]:
    """The content of state.json (see StoredState) of a checkpoint that `verify` has passed."""
    return _read_json(path / STATE_FILE)


def read_config(path: Path) -> Config:
    """The config that the checkpoint was trained with."""
    return config_from_dict(read_state(path)["config"], source=str(path / STATE_FILE))


def tensor_specs(path: Path, file: str) -> dict[str, tuple[list[int], str]]:
    """{name: (shape, torch dtype)} of the tensors in a checkpoint's file, without reading them."""
    with _open(path / file) as tensors:
        specs = {}
        for name in tensors.keys():  # noqa: SIM118 (safe_open is no dict)
            view = tensors.get_slice(name)
            dtype = _DTYPES.get(view.get_dtype())
            if dtype is None:
                raise UserError(f"{path / file}: {name} has the unknown dtype {view.get_dtype()}")
            specs[name] = (list(view.get_shape()), dtype)
        return specs


def check_shapes(path: Path, file: str, wanted: dict[str, list[int]], ignored: Collection[str] = ()) -> None:
    """Refuse a checkpoint's file that does not hold exactly these {name: shape}, but for names that are ignored.

    Raises:
        UserError: the file holds other names or shapes, so it belongs to another model.
    """
    specs = tensor_specs(path, file)
    missing, surplus = (
        sorted(wanted.keys() - specs.keys()),
        sorted(specs.keys() - wanted.keys() - set(ignored)),
    )
    reshaped = [
        f"{name} is {specs[name][0]} there and {wanted[name]} here"
        for name in wanted
        if name in specs and specs[name][0] != wanted[name]
    ]
    if missing or surplus or reshaped:
        faults = (
            reshaped
            + [f"{name} is only here" for name in missing]
            + [f"{name} is only there" for name in surplus]
        )
        shown = "; ".join(faults[:3]) + (f"; and {len(faults) - 3} more" if len(faults) > 3 else "")
        raise UserError(
            f"{path} is a checkpoint of another model: {shown}. Use the config that it was trained with."
        )


def load_tensors(path: Path, file: str, into: dict[str, torch.Tensor], ignored: Collection[str] = ()) -> None:
    """Copy the tensors of a checkpoint's file into tensors that exist: every name once, with equal shapes.

    ignored: names that the file may have and that are not wanted.

    Raises:
        UserError: the file holds other names or shapes, so it belongs to another model.
    """
    check_shapes(path, file, {name: list(tensor.shape) for name, tensor in into.items()}, ignored)
    with _open(path / file) as tensors:
        for name, tensor in into.items():
            tensor.copy_(tensors.get_tensor(name))


_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
}


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors: {error}") from None


def _list(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the checkpoints in a folder by their names, newest first."""
    try:
        entries = [(match, entry) for entry in folder.iterdir() if (match := _NAME.fullmatch(entry.name))]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(((int(match[1]), entry) for match, entry in entries), reverse=True)


def _remove(path: Path) -> None:
    """Remove a checkpoint so that no half of it is ever found under its name."""
    doomed = path.with_name(f"{_TEMPORARY}{path.name}-{os.getpid()}-removed")
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise Damaged(f"{path.name} is larger than {_MAX_JSON_BYTES} bytes")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise Damaged(f"{path.name} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise Damaged(f"{path.name} does not parse as JSON") from None
    if not isinstance(value, dict):
        raise Damaged(f"{path.name} is not a JSON object")
    return value


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Have the file or folder written to the disk, not only to the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
