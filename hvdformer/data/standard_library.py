"""The default data: the source text of Python's own standard library, which every machine that runs this has."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import socket
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hvdformer.data.shards import INDEX_FILE, write_data_set
from hvdformer.data.tokenizer import Tokenizer
from hvdformer.errors import RunError

# What users install, the tests of the library itself, and files that programs wrote: tables of code pages, help texts.
_LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idle_test",
    "lib2to3",
    "pydoc_data",
    "encodings",
}
_VALIDATION_SHARE = 0.05


def documents() -> Iterator[tuple[str, str]]:
    """(path relative to the library, text) of every source file that is UTF-8, in order of the path."""
    for path, file in _files():
        try:
            yield path, file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue


def is_validation(path: str) -> bool:
    """Whether a document belongs to the validation split: by a hash of its path, so that it stays there."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") < _VALIDATION_SHARE * 2**64


def prepare_standard_library(cache: Path) -> Path:
    """The folder in `cache` that holds the library's text as byte shards; built if it is not there yet.

    Its name tells the Python version and the files with their sizes, so another library gets another folder. Several
    processes may build at the same time: the first to finish wins.

    Raises:
        RunError: the cache cannot be written.
    """
    sizes = "".join(f"{path} {file.stat().st_size}\n" for path, file in _files())
    name = f"python-{platform.python_version()}-{hashlib.sha256(sizes.encode()).hexdigest()[:12]}"
    folder = cache / name
    if (folder / INDEX_FILE).is_file():
        return folder
    # With the host: the cache may be shared, and processes in containers have the same low numbers.
    temporary = cache / f".{name}-{socket.gethostname()}-{os.getpid()}"
    tokenizer = Tokenizer.byte()
    splits: dict[str, list[tuple[np.ndarray, int]]] = {"train": [], "validation": []}
    for path, text in documents():
        ids = tokenizer.encode(text)
        splits["validation" if is_validation(path) else "train"].append(
            (np.append(ids, tokenizer.end_of_document), len(ids))
        )
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        write_data_set(
            temporary,
            tokenizer,
            splits,
            sources=[f"the standard library of Python {platform.python_version()}"],
        )
        try:
            temporary.rename(folder)
        except OSError:
            if not (folder / INDEX_FILE).is_file():
                raise
    except OSError as error:
        raise RunError(
            f"the default data cannot be kept in {cache}: {error.strerror}. Set data.cache_dir to a folder with room for 16 MiB."
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _files() -> list[tuple[str, Path]]:
    library = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, folders, names in os.walk(library):
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        found += [Path(folder) / name for name in names if name.endswith(".py")]
    return sorted((file.relative_to(library).as_posix(), file) for file in found)
