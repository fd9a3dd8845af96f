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

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hvdformer.config import Config, config_from_dict
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
    loss_scaler: dict[str, float] | None
    config: dict[str, Any]
    world_size: int = Field(ge=1)
    data_fingerprint: str
    weights_sha256: str
    versions: dict[str, str]
    validation: dict[str, float] | None = None


class Damaged(Exception):
    """A checkpoint that is not what was written: the message says which file and how."""


def save(
    folder: Path,
    state: TrainState,
    tokenizer_json: str,
    facts: dict[str, Any],
    keep_last: int,
) -> Path:
    """Write the state as `folder`/step-NNNNNNNN, then remove all but the newest `keep_last`. One process calls it.

    facts: what else goes into state.json (config, world size, versions, ...).

    Raises:
        RunError: the file system did not take it. What was there before is untouched.
    """
    target = folder / f"step-{state.counters.step:08d}"
    temporary = folder / f"{_TEMPORARY}{target.name}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        # Copies: safetensors takes no views of one memory, and the tensors of a bucket are.
        weights = {name: tensor.cpu().clone() for name, tensor in state.weights()}
        optimizer = {name: tensor.cpu().clone() for name, tensor in state.optimizer_tensors()}
        content = {
            **facts,
            "format_version": FORMAT_VERSION,
            "weights_sha256": tensors_sha256(weights.items()),
        }
        writers: dict[str, Callable[[Path], object]] = {
            MODEL_FILE: lambda path: save_file(weights, path),
            OPTIMIZER_FILE: lambda path: save_file(optimizer, path),
            TOKENIZER_FILE: lambda path: path.write_text(tokenizer_json, encoding="utf-8"),
            STATE_FILE: lambda path: path.write_text(
                json.dumps({**content, **state.to_dict()}, indent=1), encoding="utf-8"
            ),
        }
        manifest = {}
        for name, write in writers.items():
            write(temporary / name)
            manifest[name] = {
                "bytes": (temporary / name).stat().st_size,
                "sha256": _file_sha256(temporary / name),
            }
        (temporary / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for name in (*writers, MANIFEST_FILE):
            _sync(temporary / name)
        _sync(temporary)
        if target.exists():  # a damaged one, or one of a run that was told to start anew
            _remove(target)
        temporary.rename(target)
        _sync(folder)
        for _, old in _list(folder)[keep_last:]:
            _remove(old)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(
            f"checkpoint of step {state.counters.step} could not be written to {folder}: {error}. "
            "Checkpoints written before are untouched; make room or repair the folder, then start the same command again."
        ) from None
    return target


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


def load_tensors(path: Path, file: str, into: dict[str, torch.Tensor]) -> None:
    """Copy the tensors of a checkpoint's file into tensors that exist: every name once, with equal shapes.

    Raises:
        UserError: the file holds other names or shapes, so it belongs to another model.
    """
    specs = tensor_specs(path, file)
    missing, surplus = sorted(into.keys() - specs.keys()), sorted(specs.keys() - into.keys())
    reshaped = [
        f"{name} is {specs[name][0]} there and {list(into[name].shape)} here"
        for name in into
        if name in specs and specs[name][0] != list(into[name].shape)
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
