"""Where documents come from: text, JSON lines and Parquet, plain or compressed, cut into units of bounded size.

A unit is what one rank reads in one go. Units depend on the input alone, never on the number of ranks.
"""

from __future__ import annotations

import bz2
import codecs
import glob
import gzip
import json
import lzma
import sys
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from hvdformer.errors import UserError

UNIT_BYTES = 4 * 2**20
PIECE_BYTES = 2**20  # text is read and tokenized in pieces of about this size
MAX_LINE_BYTES = 2**28
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
            matches = sorted(str(file) for file in path.rglob("*") if file.is_file() and _is_known(file))
        elif path.exists():
            matches = [text]
        else:
            matches = sorted(match for match in glob.glob(text, recursive=True) if Path(match).is_file())
        if not matches:
            raise UserError(
                f"{text}: no such input. Give files, folders or globs of text, .jsonl or .parquet files, or - for stdin."
            )
        found.update(dict.fromkeys(matches))
    return list(found)


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


def read_unit(unit: Unit, text_key: str, errors: Errors) -> Iterator[Piece]:
    """The documents of a unit in pieces, in order, in bounded memory.

    errors: what a document that is not UTF-8, or a line that is not the JSON expected, leads to.

    Raises:
        UserError: a file or line that cannot be read, named.
    """
    for path in unit.paths:
        try:
            if unit.kind == "text":
                yield from _text(path, errors)
            elif unit.kind == "jsonl":
                yield from _json_lines(path, unit.start, unit.end, text_key, errors)
            else:
                yield from _parquet(path, unit.start, unit.end, text_key)
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


def _open(path: str) -> BinaryIO:
    if path == STDIN:
        return sys.stdin.buffer
    compression = _kind(path)[1]
    if compression == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if compression == ".bz2":
        return bz2.open(path, "rb")  # type: ignore[return-value]
    if compression == ".xz":
        return lzma.open(path, "rb")  # type: ignore[return-value]
    if compression == ".zst":
        try:
            import zstandard
        except ImportError:
            raise UserError(f'{path}: .zst files need zstandard: pip install "hvdformer[zstd]"') from None
        return _Zstandard(
            zstandard.ZstdDecompressor().stream_reader(open(path, "rb"), read_across_frames=True)
        )  # type: ignore[return-value]
    return open(path, "rb")


class _Zstandard:
    """zstandard's reader, with its own error turned into the one that a cut file gives elsewhere."""

    def __init__(self, reader: Any) -> None:
        import io

        self._reader = io.BufferedReader(reader)

    def __enter__(self) -> Any:
        return self._reader

    def __exit__(self, *_: object) -> None:
        self._reader.close()


def _text(path: str, errors: Errors) -> Iterator[Piece]:
    """One document, in pieces that end with a line where there are lines."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace" if errors == "replace" else "strict")
    with _open(path) as file:
        held, offset = "", 0
        while chunk := file.read(PIECE_BYTES):
            try:
                held += decoder.decode(chunk)
            except UnicodeDecodeError as error:
                yield from _undecodable(path, f"byte {offset + error.start}", errors)
                return
            offset += len(chunk)
            cut = held.rfind("\n") + 1
            if cut:
                yield held[:cut], False
                held = held[cut:]
            elif len(held) > MAX_LINE_BYTES:
                yield held, False
                held = ""
        try:
            held += decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            yield from _undecodable(path, f"byte {offset}", errors)
            return
        yield held, True


def _undecodable(path: str, where: str, errors: Errors) -> Iterator[Piece]:
    if errors == "skip":
        yield _DROP
        return
    raise UserError(f"{path}: not UTF-8 at {where}. Convert it, or use --errors replace, or --errors skip.")


_DROP: Piece = ("", None)


def _json_lines(path: str, start: int, end: int, key: str, errors: Errors) -> Iterator[Piece]:
    """The documents of the lines that begin within [start, end)."""
    with _open(path) as file:
        number = 0
        if start:
            file.seek(start - 1)
            file.readline()  # the rest of a line that began before
        while end < 0 or file.tell() < end:
            line = file.readline(MAX_LINE_BYTES + 1)
            if not line:
                return
            number += 1
            if not line.strip():
                continue
            try:
                if len(line) > MAX_LINE_BYTES:
                    raise ValueError(f"is longer than {MAX_LINE_BYTES >> 20} MiB")
                text = _text_of(line.decode("utf-8", "replace" if errors == "replace" else "strict"), key)
                # JSON can spell lone surrogates, which UTF-8 cannot.
                text = text.encode("utf-8", "replace" if errors == "replace" else "strict").decode()
            except UnicodeError:
                if errors == "skip":
                    yield _DROP
                    continue
                line_number = number + _lines_before(path, start)
                raise UserError(
                    f"{path}, line {line_number}: not UTF-8. Convert it, or use --errors replace or skip."
                ) from None
            except ValueError as error:
                if errors == "skip":
                    yield _DROP
                    continue
                line_number = number + _lines_before(path, start)
                raise UserError(
                    f"{path}, line {line_number}: {error}. Mend the line, or use --errors skip."
                ) from None
            yield text, True


def _text_of(line: str, key: str) -> str:
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
        file.readline()
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


def _parquet(path: str, start: int, end: int, column: str) -> Iterator[Piece]:
    file = _parquet_file(path)
    if column not in file.schema_arrow.names:
        raise UserError(
            f"{path}: has no column {column!r}, only {file.schema_arrow.names[:5]} (see --text-key)"
        )
    for batch in file.iter_batches(batch_size=256, row_groups=list(range(start, end)), columns=[column]):
        for row, value in enumerate(batch.column(0).to_pylist()):
            if not isinstance(value, str):
                raise UserError(
                    f"{path}, row group {start}, row {row}: found {type(value).__name__}, expected text in {column!r}"
                )
            yield value, True
