"""Raw text to shards, over MPI: `mpirun -np N hvdformer prepare INPUT... --out DIR`; the same bytes for every N.

1. Rank 0 lists the input, cuts it into units that do not depend on the number of ranks, and shares them out by bytes.
2. Each rank makes its units into parts: tokens, and per document its length and hash.
3. Rank 0 plans which documents are in which shard. Ranks write the shards, and rank 0 the index last: without it nothing
   is accepted.

What grows with the input lies in OUT/.parts, not in memory. A part that is complete is kept until the end, so a
preparation that was interrupted goes on where it was.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import heapq
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
from hvdformer.data.sources import Errors, Tally, Unit
from hvdformer.data.tokenizer import END_OF_DOCUMENT, Tokenizer
from hvdformer.errors import RunError, UserError

T = TypeVar("T")
PARTS = ".parts"
LOCK = ".lock"
BPE_SAMPLE_BYTES = 8 * 2**20
_READ_TOKENS = 2**20
_ROWS = 2**18  # documents in memory at once
_MAX_BUCKETS = 500  # open files of a sort: above 130 million documents the buckets grow
# Of a document in a part: tokens with the end of document, bytes of text, and the first 16 bytes of its sha256.
DOCUMENT = np.dtype([("tokens", "<u8"), ("bytes", "<u8"), ("hash", "V16")])
# Of a document in a plan: where its tokens are, in tokens from the beginning of its part, and a key to sort by.
ROW = np.dtype([("part", "<u4"), ("begin", "<u8"), *DOCUMENT.descr, ("order", "<u8")])


class Ranks:
    """The little communication that a preparation needs, over MPI or alone. Objects travel as JSON."""

    def __init__(self, comm: Any = None) -> None:
        """comm: an mpi4py communicator; None: one process, and MPI is not needed."""
        self._comm = comm
        self.rank = comm.Get_rank() if comm else 0
        self.size = comm.Get_size() if comm else 1
        self.on_this_node = 1  # ranks
        self.cores = os.sched_getaffinity(0)  # of these ranks, together
        if comm:
            self._meet_node()
        self._reported = np.zeros(self.size, dtype=np.int64)  # the last report of each rank, on rank 0
        self._num_sent = self._num_received = 0
        self._report: tuple[Any, np.ndarray] | None = None

    def gather(self, value: Any, meanwhile: Callable[[], None] = lambda: None) -> list[Any]:
        """The values of all ranks on every rank; `meanwhile` is called again and again until all are here."""
        if self._comm is None:
            return [value]
        # An MPI that waits in a collective takes a whole core, and rank 0 needs it to train a BPE.
        everyone = self._comm.Ibarrier()
        while not everyone.Test():
            meanwhile()
            time.sleep(0.005)
        return [json.loads(text) for text in self._comm.allgather(json.dumps(value))]

    def every(self, function: Callable[[], T], meanwhile: Callable[[], None] = lambda: None) -> T:
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
            what = f"{failure.filename or 'the output folder'}: {failure.strerror or failure}"
            error = ("run", f"{what}. Mend that and run the same command again: what is complete is kept.")
        except Exception as failure:  # a defect of ours: all ranks have to end with it too
            error = ("run", f"{type(failure).__name__}: {failure}")
        outcomes = self.gather([error, self._num_sent], meanwhile)
        while self.rank == 0 and self._num_received < sum(sent for _, sent in outcomes):
            self.reported()
        first = next((error for error, _ in outcomes if error), None)
        if first:
            raise (UserError if first[0] == "user" else RunError)(first[1])
        return result

    def first(self, function: Callable[[], Any]) -> Any:
        """Run on rank 0; every rank gets the result, which must fit into JSON."""
        return self.gather(self.every(lambda: function() if self.rank == 0 else None))[0]

    def report(self, amount: int) -> None:
        """Tell rank 0 how much this rank has done, without waiting for it."""
        if self.rank == 0:
            self._reported[0] = amount
            return
        if self._report is not None:
            self._report[0].Wait()  # so small a message leaves before it is received
        message = np.array([amount], dtype=np.int64)
        self._report = (self._comm.Isend(message, dest=0), message)
        self._num_sent += 1

    def reported(self) -> int:
        """What all ranks have reported, in sum; on rank 0."""
        if self._comm is not None:
            from mpi4py import MPI

            status = MPI.Status()
            while self._comm.Iprobe(status=status):
                rank = status.Get_source()
                self._comm.Recv(self._reported[rank : rank + 1], source=rank)
                self._num_received += 1
        return int(self._reported.sum())

    def _meet_node(self) -> None:
        from mpi4py import MPI

        node = self._comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.on_this_node = node.Get_size()
        self.cores = set().union(*node.allgather(self.cores))
        node.Free()


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


class Progress:
    """Bytes of the input that all ranks have read, shown by rank 0: a bar on a terminal, elsewhere a line now and then."""

    LINE_SECONDS = 10.0

    def __init__(self, ranks: Ranks, total: int, say: Callable[[str], None]) -> None:
        self._ranks, self._total, self._say = ranks, total, say
        self._complete = 0  # bytes of the units that this rank has done
        self._reported_at = self._shown_at = time.monotonic()
        self._shown = 0
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if self._ranks.rank == 0 and sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            columns = (
                progress.TextColumn("tokenized"),
                progress.BarColumn(),
                progress.DownloadColumn(),
                progress.TransferSpeedColumn(),
                progress.TimeRemainingColumn(),
            )
            self._bar = progress.Progress(*columns, console=Console(stderr=True))
            self._bar.add_task("", total=self._total)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.show()
        if self._bar is not None:
            self._bar.stop()

    def within(self, nbytes: int) -> None:
        """So much of the unit at hand is read."""
        now = time.monotonic()
        if now - self._reported_at > 0.2:
            self._reported_at = now
            self._ranks.report(self._complete + nbytes)
            self.show()

    def complete(self, nbytes: int) -> None:
        """A unit of so many bytes is done."""
        self._complete += nbytes
        self._ranks.report(self._complete)
        self.within(0)

    def show(self) -> None:
        """On rank 0, say what all ranks have done so far, if it is time to."""
        if self._ranks.rank != 0:
            return
        done = min(self._total, self._ranks.reported())
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done)
        elif now - self._shown_at >= self.LINE_SECONDS:
            speed = (done - self._shown) / (now - self._shown_at)
            self._say(f"tokenized {done / 1e6:,.1f} of {self._total / 1e6:,.1f} MB, {speed / 1e6:,.1f} MB/s")
            self._shown, self._shown_at = done, now


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
    # A rank is one core. While rank 0 trains a BPE the others of its node sleep, and it uses their cores.
    os.environ.setdefault("RAYON_NUM_THREADS", str(ranks.on_this_node))
    with ExitStack() as at_end:
        ranks.every(lambda: at_end.enter_context(_locked(out, say)) if ranks.rank == 0 else None)
        listed = ranks.first(lambda: _list_units(inputs, out, ranks.size))
        tokenizer = Tokenizer.from_json(ranks.first(lambda: _make_tokenizer(out, ranks, listed, options)))
        ranks.every(lambda: token_dtype(tokenizer.vocab_size))
        if ranks.rank == 0:
            say(
                f"{listed['units']} units, {listed['bytes'] / 1e6:,.1f} MB of input, {ranks.size} ranks, vocabulary "
                f"{tokenizer.vocab_size}"
            )

        with Progress(ranks, listed["bytes"], say) as progress:

            def make_parts() -> None:
                os.environ["TOKENIZERS_PARALLELISM"] = "false"
                for number, unit in _read_units(out, ranks.rank):
                    _make_part(_part(out, number), unit, tokenizer, options, progress)
                    progress.complete(unit.nbytes)

            ranks.every(make_parts, meanwhile=progress.show)
        index = _write_shards(inputs, out, listed["units"], tokenizer, options, ranks)
        ranks.first(lambda: _conclude(out, index, listed, say, time.monotonic() - began))
    return index


def _conclude(
    out: Path, index: Index, listed: dict[str, int], say: Callable[[str], None], seconds: float
) -> None:
    facts = [_read_facts(out, number) for number in range(listed["units"])]
    _remove_parts(out)
    for split, entry in index.splits.items():
        tokens = sum(shard.tokens for shard in entry.shards)
        documents = sum(shard.documents for shard in entry.shards)
        say(f"{split}: {tokens:,} tokens, {documents:,} documents, {len(entry.shards)} shards")
    if skipped := sum(fact["skipped"] for fact in facts):
        say(f"skipped {skipped:,} documents that could not be read")
    if replaced := sum(fact["replaced"] for fact in facts):
        say(f"replaced what is not UTF-8 in {replaced:,} documents")
    say(f"done in {seconds:.1f} s, {listed['bytes'] / 1e6 / seconds:,.1f} MB/s: {out}")


def _remove_parts(out: Path) -> None:
    """What a complete data set does not need, as far as it is there; the caller holds the lock."""
    if (out / PARTS).exists():
        shutil.rmtree(out / PARTS)
    (out / LOCK).unlink(missing_ok=True)


@contextmanager
def _locked(out: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Make the output folder, and keep other preparations out of it; the lock goes with its process, however that ends.

    Raises:
        UserError: it cannot be written, is a data set already, or another preparation is at work there.
    """
    complete = UserError(f"{out} is a data set already. Choose another --out, or remove it first.")
    if (out / INDEX_FILE).exists() and not ((out / PARTS).exists() or (out / LOCK).exists()):
        raise complete
    with ExitStack() as at_end:
        try:
            (out / PARTS).mkdir(parents=True, exist_ok=True)
            file = at_end.enter_context(open(out / LOCK, "a+", encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{out} cannot be written: {error.strerror}. Choose another --out.") from None
        is_locked = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{out}: another preparation is at work there ({file.read()}). Wait for it, or choose another --out."
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            is_locked = False
            say(f"{out}: its file system has no locks. See to it that no other preparation writes there.")
        if (out / INDEX_FILE).exists():
            # Another one has just finished, or was killed before it had tidied up; without locks it may be about to.
            if is_locked:
                _remove_parts(out)
            raise complete
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield


def _list_units(inputs: Sequence[str], out: Path, size: int) -> dict[str, int]:
    """Cut the input into units and write the share of each rank into a file of its own; how many units and bytes."""
    units = sources.cut_into_units(sources.find_files(list(inputs)))
    if not units:
        raise UserError("the input is empty: no rows in any file. Give files with text.")
    for rank, share in enumerate(share_out([unit.nbytes for unit in units], size)):
        with open(_unit_list(out, rank), "w", encoding="utf-8") as file:
            for number in share:
                file.write(json.dumps([number, units[number].to_json()]) + "\n")
    return {"units": len(units), "bytes": sum(unit.nbytes for unit in units)}


def share_out(sizes: Sequence[int], size: int) -> list[list[int]]:
    """Numbers of the units of each rank, balanced by bytes: the largest first, each to whoever has least."""
    shares: list[list[int]] = [[] for _ in range(size)]
    loads = [(0, rank) for rank in range(size)]
    for number in sorted(range(len(sizes)), key=lambda number: (-sizes[number], number)):
        load, least = loads[0]
        shares[least].append(number)
        heapq.heapreplace(loads, (load + sizes[number] + 1, least))
    return [sorted(share) for share in shares]


def _unit_list(out: Path, rank: int) -> Path:
    return out / PARTS / f"units-{rank}.jsonl"


def _read_units(out: Path, rank: int) -> Iterator[tuple[int, Unit]]:
    """The units of a rank with their numbers."""
    with open(_unit_list(out, rank), encoding="utf-8") as file:
        for line in file:
            number, unit = json.loads(line)
            yield number, Unit(**{**unit, "paths": tuple(unit["paths"])})


def _make_tokenizer(out: Path, ranks: Ranks, listed: dict[str, int], options: Options) -> str:
    """The tokenizer that was asked for; a BPE is trained once, and found again by an attempt that goes on."""
    name = options.tokenizer
    if name == "byte":
        return Tokenizer.byte().to_json()
    if not name.startswith("bpe:"):
        return Tokenizer.load(Path(name)).to_json()
    vocab_size = int(name.removeprefix("bpe:")) if name.removeprefix("bpe:").isdecimal() else 0
    if vocab_size < 257:
        raise UserError(
            f"--tokenizer {name}: expected bpe:SIZE with a size of at least 257, 256 bytes and the end of document"
        )
    sample = _choose_sample(out, ranks.size, listed["units"])
    key = hashlib.sha256(json.dumps([name, options.text_key, options.errors, listed]).encode())
    for unit in sample:
        key.update(json.dumps([unit.to_json(), _files_identity(unit)]).encode())
    kept = out / PARTS / f"bpe-{key.hexdigest()[:16]}.json"
    if not kept.exists():
        with _on_cores(ranks.cores):
            _write_whole(kept, _train_bpe(sample, vocab_size, options))
    return Tokenizer.load(kept).to_json()


@contextmanager
def _on_cores(cores: set[int]) -> Iterator[None]:
    """Let threads that are started meanwhile run on these cores; a launcher may have bound the process to one."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _choose_sample(out: Path, size: int, num_units: int) -> list[Unit]:
    """Units spread evenly over the input, at most 2,048 of them, in order."""
    stride = -(-num_units // 2048)
    chosen = [
        (number, unit)
        for rank in range(size)
        for number, unit in _read_units(out, rank)
        if number % stride == 0
    ]
    return [unit for _, unit in sorted(chosen, key=lambda entry: entry[0])]


def _train_bpe(units: Sequence[Unit], vocab_size: int, options: Options) -> str:
    """Byte-level BPE (arXiv 1508.07909) from the beginnings of these units, 8 MiB in all: deterministic."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    each = BPE_SAMPLE_BYTES // len(units)

    def sample() -> Iterator[str]:
        for unit in units:
            if unit.paths == (sources.STDIN,):
                raise UserError(
                    "a BPE cannot be trained on stdin, which can be read once only: use files, or a tokenizer.json"
                )
            taken = 0
            for text, _ in sources.read_unit(unit, options.text_key, options.errors, Tally()):
                yield text[: each - taken]
                taken += len(text)
                if taken >= each:
                    break

    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    library.train_from_iterator(sample(), trainer)
    return library.to_str()


def _files_identity(unit: Unit) -> list[list[Any]]:
    """Path, size and time of change of every file: another input is another preparation."""
    files = [path for path in unit.paths if path != sources.STDIN]
    return [[path, (stat := os.stat(path)).st_size, stat.st_mtime_ns] for path in files]


def _identity(unit: Unit, options: Options, tokenizer: Tokenizer) -> str:
    """A hash of all that decides the content of a part: one that has it need not be made again."""
    relevant = [
        options.text_key,
        options.errors,
        tokenizer.fingerprint,
        unit.to_json(),
        _files_identity(unit),
    ]
    return hashlib.sha256(json.dumps(relevant).encode()).hexdigest()


def _part(out: Path, number: int) -> Path:
    return out / PARTS / f"{number:08d}.tokens"


def _make_part(path: Path, unit: Unit, tokenizer: Tokenizer, options: Options, progress: Progress) -> None:
    """Tokenize a unit into `path`, its documents into .documents and, last, what they are into .json."""
    facts_path, documents_path = path.with_suffix(".json"), path.with_suffix(".documents")
    identity = _identity(unit, options, tokenizer)
    if unit.paths != (sources.STDIN,) and facts_path.exists():
        facts = json.loads(facts_path.read_text())
        if facts["identity"] == identity and facts["sha256"] == _sha256s(path, documents_path):
            return
    dtype = token_dtype(tokenizer.vocab_size)
    tally = Tally()
    num_documents = 0
    with open(path, "wb") as file, open(documents_path, "wb") as documents:
        begin, nbytes, digest = 0, 0, hashlib.sha256()  # of the document at hand
        for texts in _batches(sources.read_unit(unit, options.text_key, options.errors, tally)):
            encoded = tokenizer.encode_batch([text for text, _ in texts])
            for (text, ends), ids in zip(texts, encoded, strict=True):
                file.write(ids.astype(dtype).data)
                raw = text.encode()
                nbytes += len(raw)
                digest.update(raw)
                if ends is None:  # not readable: what came of it before goes too
                    file.truncate(begin * dtype.itemsize)
                    file.seek(begin * dtype.itemsize)
                elif ends and nbytes:
                    file.write(np.array([tokenizer.end_of_document], dtype=dtype).data)
                    end = file.tell() // dtype.itemsize
                    documents.write(np.array((end - begin, nbytes, digest.digest()[:16]), DOCUMENT).tobytes())
                    begin = end
                    num_documents += 1
                if ends is not False:
                    nbytes, digest = 0, hashlib.sha256()
            progress.within(min(tally.bytes_read, unit.nbytes))
        for written in (file, documents):
            written.flush()
            os.fsync(written.fileno())
    facts = {
        "identity": identity,
        "sha256": _sha256s(path, documents_path),
        "documents": num_documents,
        "skipped": tally.skipped,
        "replaced": tally.replaced,
    }
    _write_whole(facts_path, json.dumps(facts))


def _write_whole(path: Path, text: str) -> None:
    """Write a file that appears under its name when it is whole and on the disk."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _sha256s(*paths: Path) -> list[str]:
    return [file_sha256(path) if path.exists() else "" for path in paths]


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


def _write_shards(
    inputs: Sequence[str], out: Path, num_parts: int, tokenizer: Tokenizer, options: Options, ranks: Ranks
) -> Index:
    """Turn the parts into shards: which document goes where depends on the parts alone, and ranks share the shards out."""
    dtype = token_dtype(tokenizer.vocab_size)
    plans = ranks.first(lambda: _plan_shards(out, num_parts, options))

    def write() -> list[dict[str, Any]]:
        written = []
        for split, shard, nbytes in plans[ranks.rank :: ranks.size]:
            pieces = _tokens_of(out, _plan(out, split, shard), dtype)
            entry = write_shard(out / f"{split}-{shard:05d}.bin", pieces, dtype)
            written.append({"split": split, "shard": shard, "bytes": nbytes, "entry": entry.model_dump()})
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
        sources=tuple(inputs),
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


def _plan(out: Path, split: str, shard: int) -> Path:
    return out / PARTS / f"{split}-{shard:05d}.rows"


def _plan_shards(out: Path, num_parts: int, options: Options) -> list[tuple[str, int, int]]:
    """Write the documents of each shard, in order, into a file of its own; (split, shard, bytes of text) of each."""
    for split in SPLITS:
        for old in (
            *out.glob(f"{split}-*.bin"),
            *(out / PARTS).glob(f"{split}-*.rows"),
        ):  # of another attempt
            old.unlink()
    num_rows = sum(_read_facts(out, part)["documents"] for part in range(num_parts))
    if not num_rows:
        raise UserError("the input holds no text: every document is empty")
    rows = _rows(out, num_parts, options.shuffle_seed)
    if options.dedup:
        rows = _first_of_equal(rows, num_rows, out)
    if options.dedup or options.shuffle_seed is not None:
        limit = num_rows if options.shuffle_seed is None else 2**64
        buckets = _buckets(rows, lambda rows: rows["order"], limit, num_rows, out)
        rows = (bucket[np.argsort(bucket["order"], kind="stable")] for bucket in buckets)

    text_bytes: dict[str, list[int]] = {split: [] for split in SPLITS}  # of each shard
    tokens_before = dict.fromkeys(SPLITS, 0)
    last = dict.fromkeys(SPLITS, -1)  # multiple of shard_tokens that the last shard began at or behind
    for table in rows:
        # The first 8 bytes of the hash decide the split, so a document stays in it whatever else is in the input.
        is_validation = _first_8_bytes(table) < options.validation_fraction * 2.0**64
        for split, chosen in zip(SPLITS, (table[~is_validation], table[is_validation]), strict=True):
            ends = tokens_before[split] + np.cumsum(chosen["tokens"].astype(np.int64))
            multiples = (ends - chosen["tokens"].astype(np.int64)) // options.shard_tokens
            for multiple in np.unique(multiples).tolist():
                of_shard = chosen[multiples == multiple]
                if multiple != last[split]:
                    last[split] = multiple
                    text_bytes[split].append(0)
                with open(_plan(out, split, len(text_bytes[split]) - 1), "ab") as file:
                    of_shard.tofile(file)
                text_bytes[split][-1] += int(of_shard["bytes"].sum())
            tokens_before[split] = int(ends[-1]) if len(ends) else tokens_before[split]
    return [(split, shard, size) for split in SPLITS for shard, size in enumerate(text_bytes[split])]


def _rows(out: Path, num_parts: int, shuffle_seed: int | None) -> Iterator[np.ndarray]:
    """The documents of all parts in order of the input, in tables of bounded size; `order` is that, or a random number."""
    num_before = 0
    for part in range(num_parts):
        draw = None if shuffle_seed is None else np.random.default_rng([shuffle_seed, part])
        begin = 0
        for documents in _read_tables(_part(out, part).with_suffix(".documents"), DOCUMENT):
            rows = np.empty(len(documents), dtype=ROW)
            rows["part"] = part
            ends = begin + np.cumsum(documents["tokens"], dtype=np.int64)
            rows["begin"] = ends - documents["tokens"].astype(np.int64)
            for name in ("tokens", "bytes", "hash"):
                rows[name] = documents[name]
            numbers = np.arange(num_before, num_before + len(rows), dtype=np.uint64)
            rows["order"] = numbers if draw is None else draw.integers(2**64, size=len(rows), dtype=np.uint64)
            begin, num_before = int(ends[-1]), num_before + len(rows)
            yield rows


def _read_tables(path: Path, dtype: np.dtype[Any]) -> Iterator[np.ndarray]:
    """The records of a file, in tables of bounded size."""
    with open(path, "rb") as file:
        while len(table := np.fromfile(file, dtype, _ROWS)):
            yield table


def _first_8_bytes(rows: np.ndarray) -> np.ndarray:
    """Of the hashes, as numbers: (N,) uint64."""
    return np.ascontiguousarray(rows["hash"]).view("<u8").reshape(-1, 2)[:, 0]


def _first_of_equal(rows: Iterable[np.ndarray], num_rows: int, out: Path) -> Iterator[np.ndarray]:
    """Of documents with the same text only the one that comes first in the input."""
    for bucket in _buckets(rows, _first_8_bytes, 2**64, num_rows, out):  # equal ones are in the same bucket
        _, first = np.unique(bucket["hash"], return_index=True)
        yield bucket[np.sort(first)]


def _buckets(
    tables: Iterable[np.ndarray],
    key: Callable[[np.ndarray], np.ndarray],
    limit: int,
    num_rows: int,
    out: Path,
) -> Iterator[np.ndarray]:
    """The rows by ranges of their keys, which are below `limit`, in tables of bounded size; by way of the disk."""
    num_buckets = min(_MAX_BUCKETS, -(-num_rows // _ROWS))
    width = np.uint64(-(-limit // num_buckets) if num_buckets > 1 else 2**64 - 1)
    with ExitStack() as files:
        buckets = [
            files.enter_context(tempfile.TemporaryFile(dir=out / PARTS)) for _ in range(num_buckets + 1)
        ]
        for rows in tables:
            numbers = key(rows) // width
            order = np.argsort(numbers, kind="stable")
            found, begins = np.unique(numbers[order], return_index=True)
            for number, group in zip(found.tolist(), np.split(rows[order], begins[1:]), strict=True):
                buckets[number].write(group.tobytes())
        for bucket in buckets:
            bucket.seek(0)
            if content := bucket.read():
                yield np.frombuffer(content, dtype=ROW)


def _tokens_of(out: Path, plan: Path, dtype: np.dtype[Any]) -> Iterator[tuple[np.ndarray, bool]]:
    """The tokens of the documents of a shard, read from their parts in pieces, and whether a document ends with each."""
    with ExitStack() as stack:
        opened: dict[int, BinaryIO] = {}
        for rows in _read_tables(plan, ROW):
            for part, begin, count in zip(
                rows["part"].tolist(), rows["begin"].tolist(), rows["tokens"].tolist(), strict=True
            ):
                if part not in opened:
                    if len(opened) >= 64:
                        stack.close()
                        opened.clear()
                    opened[part] = stack.enter_context(open(_part(out, part), "rb"))
                opened[part].seek(begin * dtype.itemsize)
                for left in range(count, 0, -_READ_TOKENS):
                    yield np.fromfile(opened[part], dtype, min(left, _READ_TOKENS)), left <= _READ_TOKENS
