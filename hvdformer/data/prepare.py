"""Raw text to shards, over MPI: `mpirun -np N hvdformer prepare INPUT... --out DIR`; the same bytes for every N.

1. Rank 0 lists the input and cuts it into units that do not depend on the number of ranks.
2. Ranks share the units out by bytes. Each unit becomes a part: tokens, and per document its length and hash.
3. Ranks write shards, each from a run of whole parts. Rank 0 writes the index last: without it nothing is accepted.

A part that is complete is kept until the end, so a preparation that was interrupted goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from hvdformer.data import sources
from hvdformer.data.shards import (
    FORMAT_VERSION,
    INDEX_FILE,
    SPLITS,
    TOKENIZER_FILE,
    Index,
    ShardEntry,
    SplitEntry,
    file_sha256,
    fingerprint,
    token_dtype,
    write_index,
    write_shard,
)
from hvdformer.data.sources import Errors, Unit
from hvdformer.data.tokenizer import END_OF_DOCUMENT, Tokenizer
from hvdformer.errors import RunError, UserError

T = TypeVar("T")
PARTS = ".parts"
BPE_SAMPLE_BYTES = 8 * 2**20
_MAX_READ_TOKENS = 2**23
# Of a document in a part: tokens with the end of document, bytes of text, and the first 16 bytes of its sha256.
DOCUMENT = np.dtype([("tokens", "<u8"), ("bytes", "<u8"), ("hash", "V16")])


class Ranks:
    """The few collectives that a preparation needs, over MPI or alone. Objects travel as JSON."""

    def __init__(self, comm: Any = None) -> None:
        """comm: an mpi4py communicator; None: one process, and MPI is not needed."""
        self._comm = comm
        self.rank = comm.Get_rank() if comm else 0
        self.size = comm.Get_size() if comm else 1

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks on every rank."""
        if self._comm is None:
            return [value]
        return [json.loads(text) for text in self._comm.allgather(json.dumps(value))]

    def every(self, function: Callable[[], T]) -> T:
        """Run on every rank; an error of any becomes the same error of all, so that none waits for one that is gone."""
        error: tuple[str, str] | None = None
        result: Any = None
        try:
            result = function()
        except UserError as mistake:
            error = ("user", str(mistake))
        except RunError as failure:
            error = ("run", str(failure))
        except OSError as failure:
            error = ("run", f"{failure.filename or 'the disk'}: {failure.strerror or failure}")
        except Exception as failure:  # a defect of ours: all ranks have to end with it too
            error = ("run", f"{type(failure).__name__}: {failure}")
        first = next((error for error in self.gather(error) if error), None)
        if first:
            raise (UserError if first[0] == "user" else RunError)(first[1])
        return result

    def first(self, function: Callable[[], Any]) -> Any:
        """Run on rank 0; every rank gets the result, which must fit into JSON."""
        return self.gather(self.every(lambda: function() if self.rank == 0 else None))[0]


def join_mpi(size: int) -> Any:
    """The communicator of all ranks, of which the launcher says that there are `size`.

    Raises:
        UserError: mpi4py sees another number: it loads another MPI than the one that started this process.
    """
    os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")  # a rank that waits gives its core away
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    if comm.Get_size() != size:
        raise UserError(
            f"the launcher started {size} processes, but mpi4py sees {comm.Get_size()}: use the mpirun of the MPI that "
            "mpi4py loads (`hvdformer doctor`)"
        )
    return comm


@dataclass(frozen=True)
class Options:
    """What decides the bytes of the result, besides the input itself."""

    tokenizer: str
    text_key: str
    errors: Errors
    dedup: bool
    validation_fraction: float
    shuffle_seed: int | None
    shard_tokens: int


def prepare(
    inputs: Sequence[str], out: Path, options: Options, ranks: Ranks, say: Callable[[str], None]
) -> Index:
    """Make the data set `out` of the inputs. Every rank calls it with the same arguments.

    say: tells the person; called on rank 0 only.

    Raises:
        UserError, RunError: the same on all ranks; what was complete is kept for the next attempt.
    """
    began = time.monotonic()
    if ranks.first(lambda: (out / INDEX_FILE).exists()):
        raise UserError(f"{out} is a data set already. Choose another --out, or remove it first.")
    units = [Unit(**_tuples(unit)) for unit in ranks.first(lambda: _list_units(inputs, out))]
    tokenizer = Tokenizer.from_json(ranks.first(lambda: _make_tokenizer(units, options, out).to_json()))
    ranks.every(lambda: token_dtype(tokenizer.vocab_size))
    mine = share_out([unit.nbytes for unit in units], ranks.size)[ranks.rank]
    total = sum(unit.nbytes for unit in units)
    if ranks.rank == 0:
        say(
            f"{len(units)} units, {total / 1e6:,.1f} MB of input, {ranks.size} ranks, vocabulary {tokenizer.vocab_size}"
        )

    # A rank is one core: N ranks on N cores each tokenize in one thread. (The training of a BPE has used them all.)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def make_parts() -> None:
        told = time.monotonic()
        for number in mine:
            _make_part(_part(out, number), units[number], tokenizer, options)
            if ranks.rank == 0 and (sys.stderr.isatty() or time.monotonic() - told > 10):
                told = time.monotonic()
                done = sum(
                    unit.nbytes for i, unit in enumerate(units) if _part(out, i).with_suffix(".json").exists()
                )
                say(f"tokenized {done / 1e6:,.1f} of {total / 1e6:,.1f} MB in {told - began:.0f} s")

    ranks.every(make_parts)
    index = _write_shards(out, len(units), tokenizer, options, units, ranks)
    if ranks.rank == 0:
        skipped = sum(_read_facts(out, number)["skipped"] for number in range(len(units)))
        shutil.rmtree(out / PARTS)
        for split, entry in index.splits.items():
            tokens = sum(shard.tokens for shard in entry.shards)
            documents = sum(shard.documents for shard in entry.shards)
            say(f"{split}: {tokens:,} tokens, {documents:,} documents, {len(entry.shards)} shards")
        if skipped:
            say(f"skipped {skipped} documents that could not be read")
        say(f"done in {time.monotonic() - began:.1f} s: {out}")
    ranks.gather(None)
    return index


def share_out(sizes: Sequence[int], size: int) -> list[list[int]]:
    """Numbers of the units of each rank, balanced by bytes: the largest first, each to whoever has least."""
    shares: list[list[int]] = [[] for _ in range(size)]
    loads = [0] * size
    for number in sorted(range(len(sizes)), key=lambda number: (-sizes[number], number)):
        least = loads.index(min(loads))
        shares[least].append(number)
        loads[least] += sizes[number] + 1
    return [sorted(share) for share in shares]


def _tuples(unit: dict[str, Any]) -> dict[str, Any]:
    return {**unit, "paths": tuple(unit["paths"])}


def _list_units(inputs: Sequence[str], out: Path) -> list[dict[str, Any]]:
    files = sources.find_files(list(inputs))
    units = sources.cut_into_units(files)
    if not units:
        raise UserError("the input is empty")
    try:
        (out / PARTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}. Choose another --out.") from None
    return [unit.to_json() for unit in units]


def _make_tokenizer(units: Sequence[Unit], options: Options, out: Path) -> Tokenizer:
    """The tokenizer that was asked for; a BPE is trained once, and found again by an attempt that goes on."""
    name = options.tokenizer
    if name == "byte":
        return Tokenizer.byte()
    if not name.startswith("bpe:"):
        return Tokenizer.load(Path(name))
    size = int(name.removeprefix("bpe:")) if name.removeprefix("bpe:").isdecimal() else 0
    if size < 257:
        raise UserError(
            f"--tokenizer {name}: expected bpe:SIZE with a size of at least 257, 256 bytes and the end of document"
        )
    key = hashlib.sha256(json.dumps([name, options.text_key, _files_identity(units)]).encode()).hexdigest()[
        :16
    ]
    kept = out / PARTS / f"bpe-{key}.json"
    if not kept.exists():
        text = _train_bpe(units, size, options)
        temporary = kept.with_suffix(".tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(kept)
    return Tokenizer.load(kept)


def _train_bpe(units: Sequence[Unit], size: int, options: Options) -> str:
    """Byte-level BPE (arXiv 1508.07909) from a sample spread evenly over the units: deterministic."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    each = max(4096, BPE_SAMPLE_BYTES // len(units))
    chosen = units[:: max(1, len(units) * each // BPE_SAMPLE_BYTES)]

    def sample() -> Iterator[str]:
        for unit in chosen:
            if unit.paths == (sources.STDIN,):
                raise UserError(
                    "a BPE cannot be trained on stdin, which can be read once only: use files, or a tokenizer.json"
                )
            taken = 0
            for text, _ in sources.read_unit(unit, options.text_key, options.errors):
                yield text[: each - taken]
                taken += len(text)
                if taken >= each:
                    break

    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(sample(), trainer)
    return library.to_str()


def _files_identity(units: Sequence[Unit]) -> list[list[Any]]:
    """Path, size and time of change of every file: another input is another preparation."""
    files = sorted({path for unit in units for path in unit.paths if path != sources.STDIN})
    return [[path, (stat := os.stat(path)).st_size, stat.st_mtime_ns] for path in files]


def _identity(unit: Unit, options: Options, tokenizer: Tokenizer) -> str:
    """A hash of all that decides the content of a part: one that has it need not be made again."""
    relevant = [
        options.text_key,
        options.errors,
        tokenizer.fingerprint,
        unit.to_json(),
        _files_identity([unit]),
    ]
    return hashlib.sha256(json.dumps(relevant).encode()).hexdigest()


def _part(out: Path, number: int) -> Path:
    return out / PARTS / f"{number:08d}.tokens"


def _make_part(path: Path, unit: Unit, tokenizer: Tokenizer, options: Options) -> None:
    """Tokenize a unit into `path`, its documents into .documents and, last, what they are into .json."""
    facts_path, documents_path = path.with_suffix(".json"), path.with_suffix(".documents")
    identity = _identity(unit, options, tokenizer)
    if unit.paths != (sources.STDIN,) and facts_path.exists():
        facts = json.loads(facts_path.read_text())
        if facts["identity"] == identity and file_sha256(path) == facts["sha256"]:
            return
    dtype = token_dtype(tokenizer.vocab_size)
    documents: list[tuple[int, int, bytes]] = []
    skipped = 0
    try:
        with open(path, "wb") as file:
            begin, nbytes, digest = 0, 0, hashlib.sha256()  # of the document at hand
            for texts in _batches(sources.read_unit(unit, options.text_key, options.errors)):
                encoded = tokenizer.encode_batch([text for text, _ in texts])
                for (text, ends), ids in zip(texts, encoded, strict=True):
                    file.write(ids.astype(dtype).data)
                    raw = text.encode()
                    nbytes += len(raw)
                    digest.update(raw)
                    if ends is None:  # not readable: what came of it before goes too
                        file.truncate(begin * dtype.itemsize)
                        file.seek(begin * dtype.itemsize)
                        skipped += 1
                    elif ends and nbytes:
                        file.write(np.array([tokenizer.end_of_document], dtype=dtype).data)
                        end = file.tell() // dtype.itemsize
                        documents.append((end - begin, nbytes, digest.digest()[:16]))
                        begin = end
                    if ends is not False:
                        nbytes, digest = 0, hashlib.sha256()
            file.flush()
            os.fsync(file.fileno())
        np.array(documents, dtype=DOCUMENT).tofile(documents_path)
        facts = {"identity": identity, "sha256": file_sha256(path), "skipped": skipped}
        temporary = facts_path.with_suffix(".tmp")
        temporary.write_text(json.dumps(facts), encoding="utf-8")
        temporary.replace(facts_path)
    except OSError as error:
        raise RunError(
            f"{path.parent} could not be written: {error.strerror}. Make room and run the same command again: "
            "what is complete is kept."
        ) from None


def _batches(pieces: Iterator[sources.Piece]) -> Iterator[list[sources.Piece]]:
    """Pieces in lists of about PIECE_BYTES of text: enough for the tokenizer to work on, few enough to hold."""
    batch: list[sources.Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[0]) + 64
        if size >= sources.PIECE_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _read_facts(out: Path, number: int) -> dict[str, Any]:
    return json.loads(_part(out, number).with_suffix(".json").read_text())


def _read_documents(out: Path, number: int) -> np.ndarray:
    return np.fromfile(_part(out, number).with_suffix(".documents"), dtype=DOCUMENT)


def _write_shards(
    out: Path, num_parts: int, tokenizer: Tokenizer, options: Options, units: Sequence[Unit], ranks: Ranks
) -> Index:
    """Turn the parts into shards: which document goes where depends on the parts alone, and ranks share the shards out."""
    dtype = token_dtype(tokenizer.vocab_size)
    plans = ranks.every(lambda: _plan_shards(out, num_parts, options))

    def write() -> list[dict[str, Any]]:
        written = []
        for number, (split, shard, rows) in enumerate(plans):
            if number % ranks.size == ranks.rank:
                entry = write_shard(out / f"{split}-{shard:05d}.bin", _tokens_of(out, rows, dtype), dtype)
                written.append(
                    {
                        "split": split,
                        "shard": shard,
                        "bytes": int(rows["bytes"].sum()),
                        "entry": entry.model_dump(),
                    }
                )
        return written

    written = [row for rows in ranks.gather(ranks.every(write)) for row in rows]
    written.sort(key=lambda row: (row["split"], row["shard"]))
    entries = {
        split: SplitEntry(
            text_bytes=sum(row["bytes"] for row in written if row["split"] == split),
            shards=tuple(ShardEntry(**row["entry"]) for row in written if row["split"] == split),
        )
        for split in SPLITS
        if any(row["split"] == split for row in written)
    }
    index = Index(
        format_version=FORMAT_VERSION,
        vocab_size=tokenizer.vocab_size,
        tokenizer_sha256=tokenizer.fingerprint,
        end_of_document=tokenizer.end_of_document,
        splits=entries,
        sources=tuple(sorted({path for unit in units for path in unit.paths})),
        options={
            "validation_fraction": options.validation_fraction,
            "dedup": options.dedup,
            "shuffle_seed": options.shuffle_seed,
            "errors": options.errors,
        },
        fingerprint=fingerprint(entries, tokenizer.fingerprint),
    )

    def finish() -> None:
        (out / TOKENIZER_FILE).write_text(tokenizer.to_json(), encoding="utf-8")
        write_index(out, index)

    ranks.first(finish)
    return index


def _plan_shards(out: Path, num_parts: int, options: Options) -> list[tuple[str, int, np.ndarray]]:
    """(split, number of the shard, its documents) of every shard; a document: part, first token in it, and DOCUMENT."""
    tables = []
    for part in range(num_parts):
        documents = _read_documents(out, part)
        table = np.empty(len(documents), dtype=[("part", "<u4"), ("begin", "<u8"), *DOCUMENT.descr])
        table["part"] = part
        ends = np.cumsum(documents["tokens"], dtype=np.uint64)
        table["begin"] = ends - documents["tokens"]
        for name in DOCUMENT.names or ():
            table[name] = documents[name]
        tables.append(table)
    documents = np.concatenate(tables)
    if not len(documents):
        raise UserError("the input holds no text: every document is empty")
    if options.dedup:  # the first of equal documents stays, in order of the input
        _, first = np.unique(documents["hash"], return_index=True)
        documents = documents[np.sort(first)]
    # The first 8 bytes of the hash decide the split, so a document stays in it whatever else is in the input.
    draws = np.ascontiguousarray(documents["hash"]).view("<u8").reshape(-1, 2)[:, 0]
    is_validation = draws < options.validation_fraction * 2.0**64
    plans = []
    for split, chosen in (("train", documents[~is_validation]), ("validation", documents[is_validation])):
        if options.shuffle_seed is not None:
            chosen = chosen[np.random.default_rng(options.shuffle_seed).permutation(len(chosen))]
        numbers = (np.cumsum(chosen["tokens"]) - chosen["tokens"]) // np.uint64(options.shard_tokens)
        for shard in range(int(numbers[-1]) + 1 if len(chosen) else 0):
            rows = chosen[numbers == shard]
            if len(rows):
                plans.append((split, shard, rows))
    return _renumbered(plans)


def _renumbered(plans: list[tuple[str, int, np.ndarray]]) -> list[tuple[str, int, np.ndarray]]:
    """Without gaps, which a document longer than a shard leaves behind it."""
    counts = dict.fromkeys(SPLITS, 0)
    result = []
    for split, _, rows in plans:
        result.append((split, counts[split], rows))
        counts[split] += 1
    return result


def _tokens_of(out: Path, rows: np.ndarray, dtype: np.dtype[Any]) -> Iterator[np.ndarray]:
    """The tokens of documents, read from their parts one by one; a very long one is mapped, not read."""
    with ExitStack() as stack:
        opened: dict[int, BinaryIO] = {}
        for part, begin, count in zip(
            rows["part"].tolist(), rows["begin"].tolist(), rows["tokens"].tolist(), strict=True
        ):
            if count > _MAX_READ_TOKENS:
                yield np.memmap(_part(out, part), dtype, "r", begin * dtype.itemsize, (count,))
                continue
            if part not in opened:
                if len(opened) >= 64:
                    stack.close()
                    opened.clear()
                opened[part] = stack.enter_context(open(_part(out, part), "rb"))
            opened[part].seek(begin * dtype.itemsize)
            yield np.fromfile(opened[part], dtype, count)
