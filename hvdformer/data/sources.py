"""Where documents come from: text, JSON lines and Parquet, plain or compressed, cut into units of bounded size.

A unit is what one rank reads in one go. Units depend on the input alone, never on the number of ranks.
"""

from __future__ import annotations

import bz2
import codecs
import glob
import gzip
import io
import json
import lzma
import os
import re
import sys
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from hvdformer.errors import UserError

UNIT_BYTES = 4 * 2**20
PIECE_BYTES = (
    2**18
)  # text is read and tokenized in pieces of about this size: a tokenizer takes 300 times as much memory
MAX_LINE_BYTES = 2**25
STDIN = "-"
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
# What a folder is searched for; a file that is named itself may have any other suffix, and is taken for text.
_TEXT = frozenset(
    [
        ".txt",
        ".text",
        ".md",
        ".rst",
        ".tex",
        ".html",
        ".xml",
        ".csv",
        ".tsv",
        ".log",
        ".py",
        ".c",
        ".h",
        ".cc",
        ".cpp",
        ".hpp",
        ".java",
        ".js",
        ".ts",
        ".go",
        ".rs",
        ".rb",
        ".sh",
        ".sql",
        ".yaml",
        ".yml",
        ".toml",
        ".ini",
        ".cfg",
        ".json",
        ".r",
        ".jl",
        ".lua",
        ".pl",
        ".php",
        ".swift",
        ".kt",
        ".scala",
        ".f90",
        ".m",
        ".el",
        ".lisp",
        ".hs",
        ".ml",
        ".vim",
        ".org",
        ".adoc",
    ]
)
Errors = Literal["strict", "replace", "skip"]


@dataclass(frozen=True)
class Unit:
    """Some whole files of text, a range of bytes or row groups of one file, or one compressed file."""

    kind: Literal["text", "jsonl", "parquet"]
    paths: tuple[str, ...]
    start: int  # bytes for plain jsonl, row groups for parquet; 0 elsewhere
    end: int  # -1: to the end of the file
    nbytes: int  # for sharing out the work

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Tally:
    """What became of a unit so far: bytes read from the disk (compressed, where they are), and documents that were not
    readable and are skipped, or not UTF-8 and are mended."""

    bytes_read: int = 0
    skipped: int = 0
    replaced: int = 0


# Text, and whether its document ends with it: True, False, or None for a document that cannot be read and is to be
# dropped, with what came of it before.
Piece = tuple[str, bool | None]


def find_files(inputs: list[str]) -> list[str]:
    """The files that files, folders and globs name, each once, in order of the inputs and then of the path.

    Raises:
        UserError: an input names nothing.
    """
    found: dict[str, None] = {}
    for text in inputs:
        path = Path(text)
        if text == STDIN:
            matches = [text]
        elif path.is_dir():
            matches = sorted(_walk(path))
        elif path.exists():
            matches = [text]
        else:
            matches = sorted(match for match in glob.glob(text, recursive=True) if Path(match).is_file())
        if not matches and path.is_dir():
            raise UserError(
                f"{text}: holds no file whose suffix is one of text, .jsonl or .parquet. Name files of text with others."
            )
        if not matches:
            raise UserError(
                f"{text}: no such input. Give files, folders or globs of text, .jsonl or .parquet files, or - for stdin."
            )
        found.update(dict.fromkeys(matches))
    return list(found)


def _walk(folder: Path) -> Iterator[str]:
    """The files in a folder and those in it whose suffix is known."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}. Mend that, or name the files.")

    for path, _, names in os.walk(folder, onerror=refuse):
        for name in names:
            file = Path(path, name)
            if _is_known(file) and file.is_file():
                yield str(file)


def cut_into_units(files: list[str]) -> list[Unit]:
    """Units of about 4 MiB: small text files together, large plain .jsonl files in ranges, .parquet by row groups.

    Raises:
        UserError: a file cannot be read.
    """
    units: list[Unit] = []
    together: list[str] = []
    size_together = 0

    def close() -> None:
        nonlocal size_together
        if together:
            units.append(Unit("text", tuple(together), 0, -1, size_together))
            together.clear()
            size_together = 0

    for file in files:
        kind, compression = _kind(file)
        try:
            size = 0 if file == STDIN else Path(file).stat().st_size
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror}") from None
        if kind == "text" and file != STDIN:
            together.append(file)
            size_together += size
            if size_together >= UNIT_BYTES:
                close()
            continue
        close()
        if kind == "parquet":
            units += _parquet_units(file)
        elif kind == "jsonl" and not compression and file != STDIN:
            for start in range(0, max(size, 1), UNIT_BYTES):
                units.append(
                    Unit(kind, (file,), start, min(size, start + UNIT_BYTES), min(UNIT_BYTES, size - start))
                )
        else:
            units.append(Unit(kind, (file,), 0, -1, size))
    close()
    return units


def read_unit(unit: Unit, text_key: str, errors: Errors, tally: Tally) -> Iterator[Piece]:
    """The documents of a unit in pieces, in order, in bounded memory.

    errors: what a document that is not UTF-8, or a line that is not the JSON expected, leads to.
    tally: counts along.

    Raises:
        UserError: a file or line that cannot be read, named.
    """
    for path in unit.paths:
        try:
            if unit.kind == "text":
                yield from _text(path, errors, tally)
            elif unit.kind == "jsonl":
                yield from _json_lines(path, unit.start, unit.end, text_key, errors, tally)
            else:
                yield from _parquet(path, unit.start, unit.end, text_key, errors, tally)
        except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
            raise UserError(
                f"{path}: cannot be decompressed: {error}. The file is cut short or damaged."
            ) from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def _is_known(file: Path) -> bool:
    name = file.name.lower()
    for suffix in _COMPRESSED:
        name = name.removesuffix(suffix)
    return Path(name).suffix in _TEXT | {".jsonl", ".ndjson", ".parquet"}


def _kind(file: str) -> tuple[Literal["text", "jsonl", "parquet"], str]:
    """Kind by the suffix, and the suffix of the compression."""
    name = file.lower()
    compression = next((suffix for suffix in _COMPRESSED if name.endswith(suffix)), "")
    suffix = Path(name.removesuffix(compression)).suffix
    if suffix == ".parquet":
        return "parquet", ""
    return ("jsonl" if suffix in (".jsonl", ".ndjson") else "text"), compression


class _Counted(io.FileIO):
    """A file that counts what is read of it."""

    def __init__(self, path: str, tally: Tally) -> None:
        super().__init__(path, "rb")
        self._tally = tally

    def readinto(self, buffer: Any) -> int:
        nbytes = super().readinto(buffer) or 0
        self._tally.bytes_read += nbytes
        return nbytes


def _open(path: str, tally: Tally) -> BinaryIO:
    if path == STDIN:
        return sys.stdin.buffer
    compression = _kind(path)[1]
    file = io.BufferedReader(_Counted(path, tally), 2**16)
    if compression == ".gz":
        return gzip.open(file)  # type: ignore[return-value]
    if compression == ".bz2":
        return bz2.open(file)  # type: ignore[return-value]
    if compression == ".xz":
        return lzma.open(file)  # type: ignore[return-value]
    if compression == ".zst":
        return io.BufferedReader(_Zstandard(path, file))
    return file


class _Zstandard(io.RawIOBase):
    """zstandard's frames one after the other. (Its own reader takes a file that is cut short for a whole one.)"""

    def __init__(self, path: str, file: BinaryIO) -> None:
        try:
            import zstandard
        except ImportError:
            raise UserError(f'{path}: .zst files need zstandard: pip install "hvdformer[zstd]"') from None
        self._file, self._error = file, zstandard.ZstdError
        self._new_frame = zstandard.ZstdDecompressor(max_window_size=2**27).decompressobj
        self._frame: Any = None
        self._compressed, self._text = b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text:
            # In small steps: a kilobyte of zeros, well compressed, already is 32 MB.
            self._compressed = self._compressed or self._file.read(1024)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("it ends before its last frame does")
                return 0
            try:
                self._frame = self._frame or self._new_frame()
                self._text = self._frame.decompress(self._compressed)
            except self._error as error:
                raise EOFError(str(error)) from None
            self._compressed = b""
            if self._frame.eof:
                self._compressed, self._frame = self._frame.unused_data, None
        taken = self._text[: len(buffer)]
        buffer[: len(taken)] = taken
        self._text = self._text[len(taken) :]
        return len(taken)


# Where a text that is longer than a piece is cut: best between two lines with visible characters, or in front of a word,
# where a tokenizer of words has no token across; else behind any line.
_CUTS = [
    re.compile(pattern, re.DOTALL) for pattern in (r".*[!-~]\n(?=[!-~])", r".*[!-~](?= [!-~])", r".*\n(?=.)")
]


def _first_piece(text: str) -> int:
    """Length of the piece to begin with, of a text that is longer than a piece."""
    head = text[: PIECE_BYTES + 2]  # the two characters behind it say whether it may be cut there
    return next((found.end() for cut in _CUTS if (found := cut.match(head))), PIECE_BYTES)


def _pieces(text: str) -> Iterator[Piece]:
    """A whole document in pieces."""
    start = 0
    while len(text) - start > PIECE_BYTES + 2:
        length = _first_piece(text[start : start + PIECE_BYTES + 2])
        yield text[start : start + length], False
        start += length
    yield text[start:], True


def _text(path: str, errors: Errors, tally: Tally) -> Iterator[Piece]:
    """A file as one document."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with _open(path, tally) as file:
        held, offset = "", 0
        is_last = False
        while not is_last:
            chunk = file.read(PIECE_BYTES)
            is_last = not chunk
            state = decoder.getstate()  # with the beginning of a character that the chunk before ended in
            try:
                held += decoder.decode(chunk, final=is_last)
            except UnicodeDecodeError as error:
                if errors == "skip":
                    tally.skipped += 1
                    yield _DROP
                    return
                if errors == "strict":
                    raise UserError(
                        f"{path}: not UTF-8 at byte {offset - len(state[0]) + error.start}. Convert it, or use "
                        "--errors replace, or --errors skip."
                    ) from None
                tally.replaced += 1
                decoder = codecs.getincrementaldecoder("utf-8")("replace")
                decoder.setstate(state)
                held += decoder.decode(chunk, final=is_last)
            offset += len(chunk)
            while len(held) > PIECE_BYTES + 2:
                length = _first_piece(held)
                yield held[:length], False
                held = held[length:]
        yield held, True


_DROP: Piece = ("", None)


def _json_lines(path: str, start: int, end: int, key: str, errors: Errors, tally: Tally) -> Iterator[Piece]:
    """The documents of the lines that begin within [start, end)."""
    with _open(path, tally) as file:
        number = 0
        if start:
            file.seek(start - 1)
            _skip_line(file, end)  # the rest of one that began before
        while end < 0 or file.tell() < end:
            line = file.readline(MAX_LINE_BYTES + 1)
            if not line:
                return
            number += 1
            is_too_long = len(line) > MAX_LINE_BYTES
            if is_too_long:
                _skip_line(file, end)
            if not line.strip():
                continue
            try:
                if is_too_long:
                    raise ValueError(
                        f"is longer than {MAX_LINE_BYTES >> 20} MiB, expected a document that fits: give a longer one as "
                        "a file of text"
                    )
                text = _text_of(line, key, errors, tally)
            except ValueError as error:
                if errors == "skip":
                    tally.skipped += 1
                    yield _DROP
                    continue
                remedies = "--errors replace or skip" if isinstance(error, UnicodeError) else "--errors skip"
                what = "not UTF-8" if isinstance(error, UnicodeError) else error
                raise UserError(
                    f"{path}, line {number + _lines_before(path, start)}: {what}. Mend the line, or use {remedies}."
                ) from None
            yield from _pieces(text)


def _skip_line(file: BinaryIO, end: int) -> None:
    """Go on to the next line, or to a position at or behind `end` (-1: the end of the file)."""
    while end < 0 or file.tell() < end:
        rest = file.readline(PIECE_BYTES)
        if not rest or rest.endswith(b"\n"):
            return


def _text_of(line: bytes, key: str, errors: Errors, tally: Tally) -> str:
    """The text of a line of JSON lines.

    Raises:
        UnicodeError: it is not UTF-8, or spells half of a surrogate pair, which UTF-8 cannot hold.
        ValueError: it is not an object with text under `key`.
    """
    is_mended = False
    try:
        decoded = line.decode()
    except UnicodeDecodeError:
        if errors != "replace":
            raise
        decoded, is_mended = line.decode(errors="replace"), True
    text = _value_of(decoded, key)
    try:
        text.encode()
    except UnicodeEncodeError:
        if errors != "replace":
            raise
        text, is_mended = text.encode(errors="replace").decode(), True
    tally.replaced += is_mended
    return text


def _value_of(line: str, key: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("does not parse as JSON") from None
    if not isinstance(value, dict):
        raise ValueError(f"is a JSON {type(value).__name__}, expected an object with the key {key!r}")
    if key not in value:
        raise ValueError(f"has no key {key!r}, only {sorted(value)[:5]} (see --text-key)")
    if not isinstance(value[key], str):
        raise ValueError(f"has a {type(value[key]).__name__} under {key!r}, expected a string")
    return value[key]


def _lines_before(path: str, start: int) -> int:
    """Number of lines that begin before the first one of a range: only counted for a message."""
    if start == 0:
        return 0
    with open(path, "rb") as file:
        file.seek(start - 1)
        _skip_line(file, -1)
        remaining = file.tell()
        file.seek(0)
        lines = 0
        while remaining and (chunk := file.read(min(PIECE_BYTES, remaining))):
            lines += chunk.count(b"\n")
            remaining -= len(chunk)
    return lines


def _parquet_file(path: str) -> Any:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f'{path}: .parquet files need pyarrow: pip install "hvdformer[parquet]"') from None
    try:
        return parquet.ParquetFile(path)
    except (ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as Parquet: {error}") from None


def _parquet_units(path: str) -> list[Unit]:
    metadata = _parquet_file(path).metadata
    sizes = [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
    return [Unit("parquet", (path,), group, group + 1, size) for group, size in enumerate(sizes)]


def _parquet(path: str, start: int, end: int, column: str, errors: Errors, tally: Tally) -> Iterator[Piece]:
    from pyarrow import ArrowException

    file = _parquet_file(path)
    if column not in file.schema_arrow.names:
        raise UserError(
            f"{path}: has no column {column!r}, only {file.schema_arrow.names[:5]} (see --text-key)"
        )
    row = 0
    try:
        for batch in file.iter_batches(
            batch_size=32, row_groups=list(range(start, end)), columns=[column], use_threads=False
        ):
            for value in batch.column(0).to_pylist():
                if isinstance(value, str):
                    yield from _pieces(value)
                elif errors == "skip":
                    tally.skipped += 1
                    yield _DROP
                else:
                    raise UserError(
                        f"{path}, row group {start}, row {row}: found {type(value).__name__}, expected text in "
                        f"{column!r}. Mend it, or use --errors skip."
                    )
                row += 1
    except (ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path}, row group {start}: cannot be read as Parquet: {error}") from None
