"""Shards: a tokenized data set on disk, memory-mapped for reading. docs/data.md has the format as a table of bytes.

DIR/index.json           splits, shards with their counts and sha256, tokenizer, sources, fingerprint; written last
DIR/tokenizer.json
DIR/train-00000.bin      header, tokens, document ends
DIR/validation-00000.bin
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hvdformer.data.tokenizer import Tokenizer
from hvdformer.errors import RunError, UserError

INDEX_FILE = "index.json"
TOKENIZER_FILE = "tokenizer.json"
FORMAT_VERSION: Literal[1] = 1
MAGIC = b"HVDSHARD"
# magic, format version, bytes a token, tokens, documents; then tokens, padding to 8 bytes, and per document the
# position behind its last token
HEADER = struct.Struct("<8sIIQQ")
SPLITS = ("train", "validation")
_SHARD_NAME = re.compile(r"(train|validation)-\d{5,}\.bin")
_MAX_INDEX_BYTES = 256 * 2**20
_MEND = "Bring it back or prepare the data again; the same command goes on from the last checkpoint."


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ShardEntry(_Entry):
    """One shard, as the index describes it."""

    file: str
    tokens: int = Field(ge=0)
    documents: int = Field(ge=0)
    sha256: str


class SplitEntry(_Entry):
    """The shards of a split, in order, and the bytes of text that they were made from."""

    text_bytes: int = Field(ge=0)
    shards: tuple[ShardEntry, ...]


class Index(_Entry):
    """The content of index.json."""

    format_version: Literal[1]
    vocab_size: int = Field(ge=2)
    tokenizer_sha256: str
    end_of_document: int = Field(ge=0)
    splits: dict[Literal["train", "validation"], SplitEntry]
    sources: tuple[str, ...]
    options: dict[str, Any] = {}
    fingerprint: str


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 where it holds every id, else uint32; little-endian."""
    if vocab_size > 2**32:
        raise UserError(f"a vocabulary of {vocab_size} ids does not fit into 32 bits")
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def fingerprint(splits: dict[str, SplitEntry], tokenizer_sha256: str) -> str:
    """A hash of everything that decides which tokens are read in which order."""
    content = {name: [shard.sha256 for shard in split.shards] for name, split in sorted(splits.items())}
    text = json.dumps([FORMAT_VERSION, tokenizer_sha256, content], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write_shard(path: Path, pieces: Iterable[tuple[np.ndarray, bool]], dtype: np.dtype[Any]) -> ShardEntry:
    """Write one shard from token ids in pieces, each with whether a document ends with it, in one pass.

    The end of document is among the ids. The file appears under its name when it is whole and on the disk.

    Raises:
        RunError: the disk did not take it.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    tokens = documents = 0
    try:
        with open(temporary, "wb") as file, tempfile.TemporaryFile(dir=path.parent) as ends:
            file.write(HEADER.pack(MAGIC, FORMAT_VERSION, dtype.itemsize, 0, 0))
            for piece, is_end in pieces:
                file.write(np.ascontiguousarray(piece, dtype=dtype).data)
                tokens += len(piece)
                if is_end:
                    ends.write(tokens.to_bytes(8, "little"))
                    documents += 1
            file.write(b"\0" * (-tokens * dtype.itemsize % 8))
            ends.seek(0)
            shutil.copyfileobj(ends, file)
            file.seek(0)
            file.write(HEADER.pack(MAGIC, FORMAT_VERSION, dtype.itemsize, tokens, documents))
            file.flush()
            os.fsync(file.fileno())
        digest = file_sha256(temporary)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(f"{path} could not be written: {error.strerror}") from None
    return ShardEntry(file=path.name, tokens=tokens, documents=documents, sha256=digest)


def write_index(folder: Path, index: Index) -> None:
    """Write index.json, which makes the folder a data set: the last thing that a preparation does."""
    temporary = folder / f".{INDEX_FILE}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(index.model_dump_json(indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / INDEX_FILE)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(f"{folder / INDEX_FILE} could not be written: {error.strerror}") from None


def read_index(folder: Path) -> Index:
    """The index of a data set.

    Raises:
        UserError: there is none, so the data set is not complete; or it is not one of this format.
    """
    path = folder / INDEX_FILE
    try:
        if path.stat().st_size > _MAX_INDEX_BYTES:
            raise UserError(f"{path}: larger than {_MAX_INDEX_BYTES >> 20} MiB, so it is no index of ours")
        index = Index.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"{folder} is no complete data set: it has no {INDEX_FILE}. Make one with `hvdformer prepare INPUT... --out {folder}`."
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, fault["loc"])) or "the file"
        raise UserError(
            f"{path}: not an index of format {FORMAT_VERSION}: {where}: {fault['msg']}. Prepare the data again."
        ) from None
    for split in index.splits.values():
        for shard in split.shards:
            if not _SHARD_NAME.fullmatch(shard.file):
                raise UserError(f"{path}: names a shard {shard.file!r}, expected train-00000.bin or the like")
    return index


class Shard:
    """One shard file, memory-mapped: ranks of a node share its pages."""

    def __init__(self, path: Path, entry: ShardEntry, dtype: np.dtype[Any]) -> None:
        """Open and check everything but the checksum.

        Raises:
            UserError: missing, or not what the index says, by magic, version, token size, counts or length.
        """
        self.path, self.entry = path, entry
        try:
            with open(path, "rb") as file:
                length = os.fstat(file.fileno()).st_size
                header = file.read(HEADER.size)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}. Prepare the data again.") from None
        if len(header) < HEADER.size:
            raise UserError(f"{path}: has {length} bytes, shorter than a header. Prepare the data again.")
        magic, version, item, tokens, documents = HEADER.unpack(header)
        found = (magic, version, item, tokens, documents)
        expected = (MAGIC, FORMAT_VERSION, dtype.itemsize, entry.tokens, entry.documents)
        for name, ours, theirs in zip(
            ("magic", "version", "bytes a token", "tokens", "documents"), found, expected, strict=True
        ):
            if ours != theirs:
                raise UserError(f"{path}: {name} is {ours!r}, expected {theirs!r}. Prepare the data again.")
        ends_at = HEADER.size + tokens * item + (-tokens * item % 8)
        if length != ends_at + documents * 8:
            raise UserError(
                f"{path}: has {length} bytes, expected {ends_at + documents * 8}. Prepare the data again."
            )
        self._length = length
        self.tokens: np.ndarray = _map(path, dtype, HEADER.size, tokens)
        self.ends: np.ndarray = _map(path, np.dtype("<u8"), ends_at, documents)

    def check(self) -> None:
        """To be called before `tokens` or `ends` are read: of a file that was cut short, that would kill the process (SIGBUS).

        Raises:
            RunError: the file is gone, or not as long as it was.
        """
        try:
            length = os.stat(self.path).st_size
        except OSError as error:
            raise RunError(f"{self.path}: {error.strerror}, but the run still reads it. {_MEND}") from None
        if length != self._length:
            raise RunError(
                f"{self.path}: has {length} bytes now, expected {self._length}: it was changed while the run reads it. {_MEND}"
            )


def _map(path: Path, dtype: np.dtype[Any], offset: int, count: int) -> np.ndarray:
    if count == 0:  # an empty range cannot be mapped
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,)).view(np.ndarray)


class ShardSet:
    """One split of a data set: its shards as one row of tokens."""

    def __init__(self, folder: Path, index: Index, split: str) -> None:
        entry = index.splits.get(split)  # type: ignore[call-overload]
        if entry is None:
            raise UserError(f"{folder}: has no {split} split, only {', '.join(index.splits)}")
        self.folder, self.index = folder, index
        dtype = token_dtype(index.vocab_size)
        self.shards = [Shard(folder / shard.file, shard, dtype) for shard in entry.shards]
        self.starts = np.cumsum(
            [0, *(shard.entry.tokens for shard in self.shards)]
        )  # token position of each shard
        self.num_tokens = int(self.starts[-1])
        self.num_documents = sum(shard.entry.documents for shard in self.shards)
        self.num_bytes = entry.text_bytes
        self.vocab_size = index.vocab_size
        self.fingerprint = index.fingerprint
        self.tokenizer_fingerprint = index.tokenizer_sha256

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) as (count,) of the stored dtype; a copy where they span shards."""
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        parts = []
        while count > 0 and first < len(self.shards):
            self.shards[first].check()
            part = self.shards[first].tokens[start - self.starts[first] :][:count]
            parts.append(part)
            start, count, first = start + len(part), count - len(part), first + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def document_ends(self, start: int, count: int) -> np.ndarray:
        """Where documents end within tokens [start, start + count): positions behind their last tokens, from `start`."""
        found = []
        for shard, begin in zip(self.shards, self.starts[:-1], strict=True):
            window = np.array([max(0, start - begin), max(0, start + count - begin)], dtype=shard.ends.dtype)
            low, high = np.searchsorted(shard.ends, window, side="right")
            found.append(shard.ends[low:high].astype(np.int64) + begin - start)
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer that the data was prepared with."""
        tokenizer = Tokenizer.load(self.folder / TOKENIZER_FILE)
        if tokenizer.fingerprint != self.tokenizer_fingerprint:
            raise UserError(
                f"{self.folder / TOKENIZER_FILE} is not the tokenizer that the shards were made with: prepare the data again"
            )
        return tokenizer

    def verify(self) -> None:
        """Compare every shard with its sha256.

        Raises:
            UserError: the first shard that differs.
        """
        for shard in self.shards:
            if file_sha256(shard.path) != shard.entry.sha256:
                raise UserError(
                    f"{shard.path}: its sha256 is not the one in {INDEX_FILE}: the file was changed. Prepare the data again."
                )


def open_shards(folder: Path, split: str = "train") -> ShardSet:
    """Open a split of a data set for reading.

    Raises:
        UserError: not complete, damaged, or of another format.
    """
    return ShardSet(folder, read_index(folder), split)


def file_sha256(path: Path) -> str:
    """sha256 of a file's content, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def write_data_set(
    folder: Path,
    tokenizer: Tokenizer,
    splits: Mapping[str, Sequence[tuple[np.ndarray, int]]],
    sources: Sequence[str],
) -> None:
    """Write a small data set, one shard a split, from documents in memory: (token ids with their end, bytes of text)."""
    dtype = token_dtype(tokenizer.vocab_size)
    entries = {
        split: SplitEntry(
            text_bytes=sum(size for _, size in documents),
            shards=(
                write_shard(folder / f"{split}-00000.bin", ((ids, True) for ids, _ in documents), dtype),
            ),
        )
        for split, documents in splits.items()
    }
    (folder / TOKENIZER_FILE).write_text(tokenizer.to_json(), encoding="utf-8")
    index = Index(
        format_version=FORMAT_VERSION,
        vocab_size=tokenizer.vocab_size,
        tokenizer_sha256=tokenizer.fingerprint,
        end_of_document=tokenizer.end_of_document,
        splits=entries,
        sources=tuple(sources),
        fingerprint=fingerprint(entries, tokenizer.fingerprint),
    )
    write_index(folder, index)
