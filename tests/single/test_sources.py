"""Readers of text: documents come back whole, and whatever else the bytes are, it is told in one message."""

import bz2
import gzip
import json
import lzma
import shutil
from datetime import timedelta

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdformer.data import sources
from hvdformer.data.sources import Tally, cut_into_units, find_files, read_unit
from hvdformer.errors import UserError

COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


def read(paths, errors="strict"):
    """(documents, tally) of files, as a preparation reads them."""
    tally, documents, held = Tally(), [], ""
    for unit in cut_into_units([str(path) for path in paths]):
        for text, ends in read_unit(unit, "text", errors, tally):
            held = "" if ends is None else held + text
            if ends:
                documents.append(held)
                held = ""
    return documents, tally


@given(
    content=st.binary(max_size=300) | st.text(max_size=100).map(str.encode),
    suffix=st.sampled_from([".txt", ".jsonl", ".parquet"]),
    compression=st.sampled_from(list(COMPRESS)),
    is_compressed=st.booleans(),
    cut=st.integers(0, 40),
    errors=st.sampled_from(["strict", "replace", "skip"]),
)
@settings(max_examples=400, deadline=timedelta(seconds=5))
def test_any_bytes_are_read_or_refused_in_words(
    tmp_path_factory, content, suffix, compression, is_compressed, cut, errors
):
    folder = tmp_path_factory.mktemp("fuzz")
    file = folder / f"a{suffix}{compression}"
    content = COMPRESS[compression](content) if is_compressed else content
    file.write_bytes(content[: len(content) - cut] if cut < 20 else content)
    try:
        documents, _ = read([file], errors)
    except UserError as error:
        assert str(file) in str(error)
    else:
        for document in documents:
            document.encode()
    shutil.rmtree(folder)


LINES = st.one_of(
    st.builds(
        lambda text, ascii: json.dumps({"text": text}, ensure_ascii=ascii),
        st.text(max_size=20),
        st.booleans(),
    ),
    st.dictionaries(st.sampled_from(["text", "x"]), st.text(max_size=9) | st.integers() | st.none()).map(
        json.dumps
    ),
    st.text(max_size=20),
).map(lambda line: line.encode(errors="surrogatepass")) | st.binary(max_size=20)


@given(st.lists(LINES, max_size=30), st.integers(1, 60), st.booleans(), st.sampled_from(["replace", "skip"]))
@settings(max_examples=200, deadline=timedelta(seconds=5))
def test_ranges_of_json_lines_hold_each_line_once(
    tmp_path_factory, lines, unit_bytes, newline_at_end, errors
):
    folder = tmp_path_factory.mktemp("ranges")
    file = folder / "a.jsonl"
    file.write_bytes(b"\n".join(lines) + b"\n" * newline_at_end)

    def outcome():
        try:
            documents, tally = read([file], errors)
            return documents, tally.skipped, tally.replaced
        except UserError as error:
            return str(error).split(": ")[0]  # file and line

    whole = outcome()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "UNIT_BYTES", unit_bytes)
        patch.setattr(sources, "PIECE_BYTES", 7)
        assert outcome() == whole
    shutil.rmtree(folder)


@given(st.text(st.sampled_from("ab \n\té語"), max_size=200), st.integers(4, 50))
@settings(deadline=timedelta(seconds=5))
def test_pieces_join_to_the_text(tmp_path_factory, text, piece_bytes):
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "a.txt").write_bytes(text.encode())
    (folder / "b.jsonl").write_text(json.dumps({"text": text}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PIECE_BYTES", piece_bytes)
        assert read([folder / "a.txt", folder / "b.jsonl"])[0] == [text, text]
        for unit in cut_into_units([str(folder / "a.txt"), str(folder / "b.jsonl")]):
            pieces = [piece for piece, _ in read_unit(unit, "text", "strict", Tally())]
            assert max(map(len, pieces)) <= piece_bytes + 2
    shutil.rmtree(folder)


@pytest.mark.parametrize("compression", [suffix for suffix in COMPRESS if suffix])
def test_a_compressed_file_that_is_cut_short_is_refused(compression, tmp_path):
    content = COMPRESS[compression](bytes(range(97, 122)) * 1000 + b"end")
    for name, length in (("a.txt", -1), ("b.jsonl", len(content) // 2)):
        file = tmp_path / f"{name}{compression}"
        file.write_bytes(content[:length])
        with pytest.raises(UserError, match="cannot be decompressed: .*cut short or damaged"):
            read([file], "skip")


def test_several_frames_and_small_files_that_are_large_when_read(tmp_path):
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(b"one ") + zstandard.compress(b"two"))
    assert read([tmp_path / "a.txt.zst"])[0] == ["one two"]
    zeros = zstandard.compress(b"\0" * 2**26)
    assert len(zeros) < 10_000
    (tmp_path / "b.txt.zst").write_bytes(zeros)
    (unit,) = cut_into_units([str(tmp_path / "b.txt.zst")])
    assert sum(len(text) for text, _ in read_unit(unit, "text", "strict", Tally())) == 2**26


def test_what_was_replaced_or_skipped_is_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good")
    (tmp_path / "b.txt").write_bytes(b"x" * (sources.PIECE_BYTES - 1) + "é".encode() + b"bad \xff \xfe")
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "\xff"}\n{"text": "\\ud800"}\n{"text": "fine"}\n')
    files = sorted(tmp_path.iterdir())
    documents, tally = read(files, "replace")
    assert documents[1].endswith("ébad \ufffd \ufffd") and documents[2:] == ["\ufffd", "?", "fine"]
    assert (tally.replaced, tally.skipped) == (3, 0)
    assert tally.bytes_read == sum(file.stat().st_size for file in files)
    documents, tally = read(files, "skip")
    assert documents == ["good", "fine"]
    assert (tally.replaced, tally.skipped) == (0, 3)
    with pytest.raises(UserError, match=f"b.txt: not UTF-8 at byte {sources.PIECE_BYTES + 5}"):
        read(files)


def test_a_line_that_is_too_long_is_refused_or_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 50)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "%s"}\n{"text": "b"}' % ("x" * 60))
    with pytest.raises(
        UserError, match=r"a.jsonl, line 2: is longer than 0 MiB.*give a longer one as a file of text"
    ):
        read([tmp_path / "a.jsonl"])
    assert read([tmp_path / "a.jsonl"], "skip")[0] == ["a", "b"]


def test_a_folder_is_searched_in_order_of_the_paths(tmp_path):
    for name in ("b/z.txt", "a.md", "b.txt", "b/a.jsonl.gz", "c.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    found = [str(tmp_path / name) for name in ("a.md", "b.txt", "b/a.jsonl.gz", "b/z.txt")]
    assert find_files([str(tmp_path)]) == found
    assert find_files([str(tmp_path / "c.bin"), str(tmp_path / "*.md"), str(tmp_path / "a.md")]) == [
        str(tmp_path / "c.bin"),
        found[0],
    ]
