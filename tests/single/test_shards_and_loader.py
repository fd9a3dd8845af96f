"""Shards on disk, and what the loader makes of them."""

import json
import shutil
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdformer.data.loader import BatchLoader, Sequences, evaluation_batches
from hvdformer.data.partition import example_ids
from hvdformer.data.shards import (
    Index,
    ShardSet,
    SplitEntry,
    fingerprint,
    open_shards,
    read_index,
    token_dtype,
    write_index,
    write_shard,
)
from hvdformer.data.tokenizer import Tokenizer
from hvdformer.errors import RunError, UserError

CPU = torch.device("cpu")


def make(folder, shards, vocab_size=257):
    """A data set of the given shards (lists of documents), all of them in the train split."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.byte()
    (folder / "tokenizer.json").write_text(tokenizer.to_json())
    entries = tuple(
        write_shard(
            folder / f"train-{n:05d}.bin", ((np.array(d), True) for d in documents), token_dtype(vocab_size)
        )
        for n, documents in enumerate(shards)
    )
    splits = {"train": SplitEntry(text_bytes=sum(e.tokens for e in entries), shards=entries)}
    write_index(
        folder,
        Index(
            format_version=1,
            vocab_size=vocab_size,
            tokenizer_sha256=tokenizer.fingerprint,
            end_of_document=256,
            splits=splits,
            sources=("test",),
            fingerprint=fingerprint(splits, tokenizer.fingerprint),
        ),
    )
    return folder


@pytest.fixture
def numbered(tmp_path):
    """1,000 tokens 0 .. 999 in three shards and documents of uneven lengths."""
    return make(
        tmp_path / "set", [[range(100), range(100, 333)], [range(333, 340)], [range(340, 1000)]], 1000
    )


def test_tokens_come_back_as_they_were_written(numbered):
    shards = open_shards(numbered)
    assert (shards.num_tokens, shards.num_documents) == (1000, 4)
    assert shards.read(0, 1000).tolist() == list(range(1000))
    assert shards.read(330, 15).tolist() == list(range(330, 345))  # over two borders
    assert shards.document_ends(90, 300).tolist() == [10, 243, 250]
    assert token_dtype(2**16).itemsize == 2 and token_dtype(2**16 + 1).itemsize == 4
    shards.verify()


@pytest.mark.parametrize("length", [1, 7, 64, 333, 998])
def test_sequences_cover_every_target_once_across_shards(numbered, length):
    sequences = Sequences(open_shards(numbered), length)
    rows = sequences.gather(np.arange(len(sequences)))
    assert rows[:, 1:].reshape(-1).tolist() == list(range(1, 1 + len(sequences) * length))
    assert (rows[:, :-1] + 1 == rows[:, 1:]).all()
    assert len(sequences) == 999 // length


def test_segments_number_the_documents_of_a_sequence(numbered):
    sequences = Sequences(open_shards(numbered), 50)
    assert sequences.segments(np.array([1]))[0].tolist() == [0] * 50 + [
        1
    ]  # tokens 50 .. 100: 100 begins the next
    assert sequences.segments(np.array([6]))[0].tolist() == [0] * 33 + [1] * 7 + [2] * 11  # tokens 300 .. 350


def loader_of(sequences, rank=0, size=1, **changes):
    arguments = {"micro_batch": 2, "num_micro_batches": 4, "document_mask": False, "shuffle": True} | changes
    return BatchLoader([sequences], weights=[1.0], seed=3, rank=rank, size=size, device=CPU, **arguments)


def test_ranks_share_the_micro_batches_of_the_same_step(numbered):
    sequences = Sequences(open_shards(numbered), 10)
    alone = loader_of(sequences)
    ranks = [loader_of(sequences, rank, 3) for rank in range(3)]
    for position in (0, 8, 16, 96):  # 96: a jump, and over the end of the epoch of 99
        expected = torch.cat([batch.tokens for batch in alone.step(position)])
        found = torch.cat([batch.tokens for loader in ranks for batch in loader.step(position)])
        assert torch.equal(found, expected)
        ids = example_ids(position, 8, 99, seed=3)
        assert expected[:, 0].tolist() == (ids * 10).tolist()
        assert alone.step_ids(position).tolist() == ids.tolist()
    for loader in (alone, *ranks):
        loader.close()


@given(
    documents=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=6), min_size=1, max_size=4),
    context_length=st.integers(1, 30),
    micro_batch=st.integers(1, 3),
    step=st.integers(0, 20),
)
@settings(max_examples=60, deadline=None)
def test_batches_hold_what_a_loop_over_the_tokens_finds(
    tmp_path_factory, documents, context_length, micro_batch, step
):
    """documents: their lengths, for each shard."""
    folder = tmp_path_factory.mktemp("loop")
    first, shards = 0, []
    for lengths in documents:
        shards.append(
            [range(first + sum(lengths[:i]), first + sum(lengths[: i + 1])) for i in range(len(lengths))]
        )
        first += sum(lengths)
    sequences = Sequences(open_shards(make(folder, shards)), context_length)
    if len(sequences):
        numbers = np.concatenate(
            [np.full(n, i) for i, n in enumerate(n for shard in documents for n in shard)]
        )
        loader = BatchLoader(
            [sequences],
            weights=[1.0],
            seed=5,
            micro_batch=micro_batch,
            num_micro_batches=3,
            rank=1,
            size=2,
            document_mask=True,
            shuffle=True,
            device=CPU,
        )
        (found,) = loader.step(step * 3 * micro_batch)
        loader.close()
        ids = example_ids(step * 3 * micro_batch + 2 * micro_batch, micro_batch, len(sequences), seed=5)
        for row, index in enumerate(ids * context_length):
            window = slice(index, index + context_length + 1)
            assert found.tokens[row].tolist() == list(range(first))[window]
            assert found.segments[row].tolist() == (numbers[window] - numbers[index]).tolist()
    shutil.rmtree(folder)


def test_an_error_of_the_reading_thread_is_raised_in_the_training_thread(numbered, monkeypatch):
    sequences = Sequences(open_shards(numbered), 10)
    loader = loader_of(sequences)

    def fail(ids):
        raise OSError("the disk is gone")

    monkeypatch.setattr(sequences, "gather", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        loader.step(0)
    loader.close()


def test_evaluation_reads_each_sequence_once_at_any_size(numbered):
    sequences = Sequences(open_shards(numbered), 10)
    for size in (1, 2, 5):
        for limit, expected in ((1000, 99), (7, 7)):
            rows = [
                batch.tokens[:, 0]
                for rank in range(size)
                for batch in evaluation_batches(
                    sequences,
                    micro_batch=4,
                    rank=rank,
                    size=size,
                    max_examples=limit,
                    document_mask=False,
                    device=CPU,
                )
            ]
            assert torch.cat(rows).tolist() == [10 * i for i in range(expected)]


def test_an_unfinished_data_set_is_not_accepted(numbered):
    (numbered / "index.json").unlink()
    with pytest.raises(UserError, match="no complete data set"):
        open_shards(numbered)


@pytest.mark.parametrize(
    "damage,says",
    [
        (lambda c: c[:-1], "bytes, expected"),
        (lambda c: c + b"\0", "bytes, expected"),
        (lambda c: b"NOTSHARD" + c[8:], "magic"),
        (lambda c: c[:8] + struct.pack("<I", 9) + c[12:], "version"),
        (lambda c: c[:12] + struct.pack("<I", 4) + c[16:], "bytes a token"),
        (lambda c: c[:16] + struct.pack("<Q", 2**62) + c[24:], "tokens"),
        (lambda c: c[:10], "shorter than a header"),
    ],
)
def test_a_shard_of_the_wrong_shape_is_refused_at_open(numbered, damage, says):
    file = numbered / "train-00001.bin"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=says):
        open_shards(numbered)


def test_a_flipped_bit_is_found_by_verify(numbered):
    file = numbered / "train-00002.bin"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"train-00002.bin: its sha256"):
        open_shards(numbered).verify()


@pytest.mark.parametrize("name", ["../train-00000.bin", "/etc/passwd", "train-00000.bin/..", "index.json"])
def test_an_index_cannot_lead_out_of_its_folder(numbered, name):
    index = json.loads((numbered / "index.json").read_text())
    index["splits"]["train"]["shards"][0]["file"] = name
    (numbered / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="names a shard"):
        read_index(numbered)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_fuzzed_shards_and_indexes_are_refused_in_words(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    make(folder, [[range(20)]])
    name = data.draw(st.sampled_from(["index.json", "train-00000.bin", "tokenizer.json"]))
    content = bytearray((folder / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    (folder / name).write_bytes(content[:cut] if data.draw(st.booleans()) else content)
    try:
        shards = open_shards(folder)
        shards.load_tokenizer()
        shards.read(0, shards.num_tokens)
        shards.verify()
    except UserError as error:
        assert str(error)
    shutil.rmtree(folder)


def test_a_full_disk_leaves_no_shard_behind(tmp_path, monkeypatch):
    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(RunError, match="No space left"):
        write_shard(tmp_path / "train-00000.bin", [(np.arange(10), True)], token_dtype(257))
    assert list(tmp_path.iterdir()) == []


def test_start_does_not_depend_on_the_size_of_the_data_set(tmp_path):
    """2 billion tokens in a sparse file open as fast as 2 million, and no page of them is read before it is needed."""
    import time

    import psutil

    seconds, resident = [], []
    for tokens in (2_000_000, 2_000_000_000):
        folder = make(tmp_path / str(tokens), [[range(10)]])
        path = folder / "train-00000.bin"
        index = json.loads((folder / "index.json").read_text())
        index["splits"]["train"]["shards"][0]["tokens"] = tokens
        (folder / "index.json").write_text(json.dumps(index))
        with open(path, "r+b") as file:
            file.write(struct.pack("<8sIIQQ", b"HVDSHARD", 1, 2, tokens, 1))
            file.truncate(32 + tokens * 2)
            file.seek(32 + tokens * 2)
            file.write(struct.pack("<Q", tokens))
        before = psutil.Process().memory_info().rss
        began = time.perf_counter()
        loader = loader_of(Sequences(ShardSet(folder, read_index(folder), "train"), 1024))
        loader.step(0)
        seconds.append(time.perf_counter() - began)
        resident.append(psutil.Process().memory_info().rss - before)
        loader.close()
    assert seconds[1] - seconds[0] < 1
    assert resident[1] - resident[0] < 30 * 2**20
