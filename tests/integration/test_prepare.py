"""`hvdformer prepare`: every kind of input, the same bytes at any number of ranks, and every way to fail."""

import bz2
import gzip
import hashlib
import json
import lzma
import os
import random
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import zstandard

from hvdformer.data import prepare
from hvdformer.data.shards import open_shards
from tests import jobs

WORDS = [
    "the",
    "of",
    "and",
    "transformer",
    "horovod",
    "gradient",
    "rank",
    "über",
    "naïve",
    "数据",
    "step",
    "<|endoftext|>",
]


def text_of(seed, words):
    chance = random.Random(seed)
    return " ".join(chance.choice(WORDS) + ("\n" if chance.random() < 0.1 else "") for _ in range(words))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Documents in every format, one jsonl of 9 MB so that it is cut into ranges, and what they are in order."""
    import pyarrow
    from pyarrow import parquet

    folder = tmp_path_factory.mktemp("inputs") / "in"
    folder.mkdir()
    expected = {}

    def add(name, *texts):
        expected[name] = list(texts)

    big = [text_of(seed, 60) for seed in range(20_000)]
    (folder / "a.jsonl").write_text(
        "".join(json.dumps({"text": text, "id": n}) + "\n" for n, text in enumerate(big))
    )
    add("a.jsonl", *big)
    for suffix, compress in (
        (".gz", gzip.compress),
        (".bz2", bz2.compress),
        (".xz", lzma.compress),
        (".zst", zstandard.compress),
    ):
        text = text_of(suffix, 3000)
        (folder / f"b.txt{suffix}").write_bytes(compress(text.encode()))
        add(f"b.txt{suffix}", text)
        rows = [text_of(suffix + str(n), 50) for n in range(20)]
        lines = "\n".join(
            json.dumps({"text": row}, ensure_ascii=False) for row in rows
        )  # no newline at the end
        (folder / f"c.jsonl{suffix}").write_bytes(compress(lines.encode()))
        add(f"c.jsonl{suffix}", *rows)
    rows = [text_of(f"row {n}", 80) for n in range(300)]
    parquet.write_table(
        pyarrow.table({"text": rows, "n": list(range(300))}), folder / "d.parquet", row_group_size=100
    )
    add("d.parquet", *rows)
    (folder / "e").mkdir()
    for n in range(5):
        (folder / "e" / f"{n}.md").write_text(text_of(n, 500))
        add(f"e/{n}.md", text_of(n, 500))
    (folder / "f.txt").write_text("")  # an empty document is no document
    (folder / "ignored.bin").write_bytes(b"\xff\xfe")
    return folder, [text for name in sorted(expected) for text in expected[name]]


def hashes(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def documents_of(folder, split="train"):
    shards = open_shards(folder, split)
    tokenizer = shards.load_tokenizer()
    found = []
    for shard in shards.shards:
        begin = 0
        for end in shard.ends.astype(int).tolist():
            ids = shard.tokens[begin:end].tolist()
            assert ids[-1] == tokenizer.end_of_document and tokenizer.end_of_document not in ids[:-1]
            found.append(tokenizer.decode(ids[:-1]))
            begin = end
    return found


@pytest.mark.parametrize(
    "options",
    [
        ("--validation-fraction", "0"),
        (
            "--tokenizer",
            "bpe:400",
            "--validation-fraction",
            "0.1",
            "--shard-tokens",
            "300000",
            "--dedup",
            "--shuffle-seed",
            "1",
        ),
    ],
    ids=["bytes", "bpe"],
)
def test_the_same_bytes_at_1_2_and_3_ranks(inputs, options, tmp_path):
    folder, expected = inputs
    results = []
    for np_, launcher in ((1, "plain"), (2, "mpirun"), (3, "mpirun")):
        out = tmp_path / f"out{np_}"
        jobs.succeed(launcher, np_, "prepare", "in", "--out", str(out), *options, cwd=folder.parent)
        results.append(hashes(out))
    assert results[0] == results[1] == results[2]
    if options[0] == "--validation-fraction":
        assert documents_of(tmp_path / "out2") == expected
    else:
        train, validation = documents_of(tmp_path / "out2"), documents_of(tmp_path / "out2", "validation")
        assert sorted(train + validation) == sorted(set(expected))
        assert 0.07 < len(validation) / len(expected) < 0.13
        assert len(results[0]) >= 6, "one shard only"
        assert not {*train} & {*validation}


def test_standard_input(tmp_path):
    command = jobs.command("plain", 1, "prepare", "-", "--out", "out", "--validation-fraction", "0")
    subprocess.run(command, input=b"from a pipe", cwd=tmp_path, env=jobs.environment(), check=True)
    assert documents_of(tmp_path / "out") == ["from a pipe"]


def test_killed_at_any_moment_nothing_is_accepted_and_the_next_attempt_goes_on(inputs, tmp_path):
    folder, _ = inputs
    command = ("prepare", str(folder), "--out", "out", "--tokenizer", "bpe:300")
    jobs.succeed("plain", 1, "prepare", str(folder), "--out", "whole", "--tokenizer", "bpe:300", cwd=tmp_path)
    chance = random.Random(1)
    for _ in range(4):
        job = jobs.Job(jobs.command("mpirun", 2, *command), tmp_path)
        try:
            time.sleep(chance.uniform(0.8, 2.5))
            job.kill_ranks()
            job.wait(20)
        finally:
            job.end()
        if (tmp_path / "out" / "index.json").exists():
            break
        code, output = jobs.run("plain", 1, "train", "data.path=out", cwd=tmp_path)
        assert code == 2 and "no complete data set" in output
    code, output = jobs.run("mpirun", 2, *command, cwd=tmp_path)
    assert code == 0 or "is a data set already" in output, output
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_what_is_complete_is_not_done_again(inputs, tmp_path):
    """An attempt that fails on the last file leaves the parts of the others, and the next one takes them."""
    folder = tmp_path / "in"
    shutil.copytree(inputs[0], folder)
    (folder / "z.jsonl").write_text("{broken\n")
    made = []
    for launcher, np_ in (("plain", 1), ("mpirun", 2)):
        code, output = jobs.run(launcher, np_, "prepare", "in", "--out", "out", cwd=tmp_path)
        assert code == 2 and "z.jsonl, line 1: does not parse as JSON" in output
        parts = (tmp_path / "out" / ".parts").glob("*.json")
        made.append({part.name: part.with_suffix(".tokens").stat().st_mtime_ns for part in parts})
    assert len(made[0]) > 8 and made[0] == made[1]
    (folder / "z.jsonl").write_text('{"text": "mended"}\n')
    jobs.succeed("plain", 1, "prepare", "in", "--out", "out", "--validation-fraction", "0", cwd=tmp_path)
    assert documents_of(tmp_path / "out") == [*inputs[1], "mended"]


def test_what_a_kill_after_the_index_left_behind_goes_with_the_next_attempt(inputs, tmp_path):
    command = ("prepare", str(inputs[0]), "--out", "out")
    jobs.succeed("plain", 1, *command, cwd=tmp_path)
    whole = hashes(tmp_path / "out")
    for left in (".parts/00000000.tokens", ".lock"):
        (tmp_path / "out" / left).parent.mkdir(exist_ok=True)
        (tmp_path / "out" / left).touch()
        code, output = jobs.run("plain", 1, *command, cwd=tmp_path)
        assert code == 2 and "is a data set already" in output
        assert hashes(tmp_path / "out") == whole


BAD = [
    ("a.txt", b"fine \xff\xfe", "a.txt: not UTF-8 at byte 5"),
    ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl, line 2: does not parse as JSON"),
    ("a.jsonl", b'{"text": "x"}\n\n{"body": "y"}\n', "a.jsonl, line 3: has no key 'text', only ['body']"),
    ("a.jsonl", b'{"text": 5}\n', "a.jsonl, line 1: has a int under 'text'"),
    ("a.jsonl", b"[1]\n", "a.jsonl, line 1: is a JSON list"),
    ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl, line 1: not UTF-8"),
    ("a.txt.gz", gzip.compress(bytes(range(97, 122)) * 99)[:-9], "a.txt.gz: cannot be decompressed"),
    ("a.txt.zst", zstandard.compress(bytes(range(97, 122)) * 99)[:-9], "a.txt.zst: cannot be decompressed"),
    ("a.txt.xz", b"not xz at all", "a.txt.xz: cannot be decompressed"),
    ("a.parquet", b"PAR1 no", "a.parquet: cannot be read as Parquet"),
    ("a.txt", b"", "the input holds no text"),
]


@pytest.mark.parametrize(
    "launcher,np_,name,content,says",
    # Inside one process all are told the same way; over MPI one that rank 0 meets, and ones that any rank may meet.
    [("plain", 1, *bad) for bad in BAD] + [("mpirun", 2, *bad) for bad in (BAD[1], BAD[6], BAD[-1])],
    ids=lambda value: None if isinstance(value, (str, int)) else "",
)
def test_bad_input_is_told_once_and_leaves_nothing_that_passes_for_whole(
    launcher, np_, name, content, says, tmp_path
):
    (tmp_path / name).write_bytes(content)
    code, output = jobs.run(launcher, np_, "prepare", name, "--out", "out", cwd=tmp_path, timeout=60)
    assert code == 2 and says in output, output
    assert output.count("hvdformer: ") == 1 and "Traceback" not in output, output
    assert not (tmp_path / "out" / "index.json").exists()


def test_no_input_and_an_output_that_is_there(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "image.png").write_bytes(b"")
    assert "no such input" in jobs.run("plain", 1, "prepare", "missing*", "--out", "out", cwd=tmp_path)[1]
    assert "in: holds no file" in jobs.run("plain", 1, "prepare", "in", "--out", "out", cwd=tmp_path)[1]
    jobs.succeed("plain", 1, "prepare", "a.txt", "--out", "out", cwd=tmp_path)
    code, output = jobs.run("plain", 1, "prepare", "a.txt", "--out", "out", cwd=tmp_path)
    assert code == 2 and "is a data set already" in output


def test_errors_replace_and_skip(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good \xff bad")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "one"}\n{broken\n{"text": "\\ud800x"}\n{"text": "two"}\n')
    options = ("--validation-fraction", "0")
    output = jobs.succeed(
        "plain", 1, "prepare", "a.txt", "b.jsonl", "--out", "skip", "--errors", "skip", *options, cwd=tmp_path
    )
    assert documents_of(tmp_path / "skip") == ["one", "two"] and "skipped 3 documents" in output
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "\\ud800x"}\n')
    output = jobs.succeed(
        "plain",
        1,
        "prepare",
        "a.txt",
        "b.jsonl",
        "--out",
        "replace",
        "--errors",
        "replace",
        *options,
        cwd=tmp_path,
    )
    assert documents_of(tmp_path / "replace") == ["good \ufffd bad", "?x"]
    assert "replaced what is not UTF-8 in 2 documents" in output


def without_root(arguments, cwd):
    """Run as somebody to whom permissions apply: root without the capabilities that override them, or who runs the test."""
    command = jobs.command("plain", 1, *arguments)
    if os.geteuid() == 0:
        if not jobs.has("setpriv"):
            pytest.skip("taking root's capabilities needs setpriv")
        command = [
            "setpriv",
            "--bounding-set",
            "-dac_override,-dac_read_search",
            "--inh-caps",
            "-all",
            *command,
        ]
    done = subprocess.run(command, cwd=cwd, env=jobs.environment(), capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_no_permission(tmp_path):
    for folder in ("in", "in/closed", "closed"):
        (tmp_path / folder).mkdir()
    (tmp_path / "in/closed/a.txt").write_text("text")
    (tmp_path / "b.txt").write_text("text")
    (tmp_path / "in/closed").chmod(0o000)
    (tmp_path / "closed").chmod(0o555)
    for inputs, out, says in (
        ("b.txt", "closed/out", "closed/out cannot be written: Permission denied. Choose another --out."),
        ("in", "out", "in/closed: cannot be read: Permission denied"),
    ):
        code, output = without_root(("prepare", inputs, "--out", out), tmp_path)
        assert code == 2 and says in output and output.count("hvdformer: ") == 1, output
    (tmp_path / "b.txt").chmod(0o000)
    code, output = without_root(("prepare", "b.txt", "--out", "out"), tmp_path)
    assert code == 2 and "b.txt: cannot be read: Permission denied" in output, output
    assert not (tmp_path / "out" / "index.json").exists()


def test_two_at_once_on_the_same_folder(tmp_path):
    """The first one waits for its standard input; killed, it leaves the folder to the next."""
    (tmp_path / "a.txt").write_text("text")
    command = jobs.command("plain", 1, "prepare", "-", "--out", "out")
    first = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=jobs.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert "units" in first.stdout.readline()
        code, output = jobs.run("mpirun", 2, "prepare", "a.txt", "--out", "out", cwd=tmp_path)
        assert code == 2 and output.count("hvdformer: ") == 1, output
        assert f"out: another preparation is at work there (process {first.pid} on " in output
    finally:
        first.kill()
        first.communicate()
    jobs.succeed("mpirun", 2, "prepare", "a.txt", "--out", "out", "--validation-fraction", "0", cwd=tmp_path)
    assert documents_of(tmp_path / "out") == ["text"]
    assert {"index.json", "tokenizer.json", "train-00000.bin"} == {
        file.name for file in (tmp_path / "out").iterdir()
    }


def test_progress_sums_all_ranks(inputs, tmp_path):
    program = (
        "import sys; from hvdformer import cli; from hvdformer.data import prepare\n"
        "prepare.Progress.LINE_SECONDS = 0.0; cli.main()"
    )
    command = [
        *jobs.LAUNCHERS["mpirun"](3),
        sys.executable,
        "-c",
        program,
        "prepare",
        "in",
        "--out",
        tmp_path / "out",
    ]
    done = subprocess.run(
        command, cwd=inputs[0].parent, env=jobs.environment(), capture_output=True, text=True, check=True
    )
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("tokenized ")]
    amounts = [float(line[1]) for line in lines]
    assert amounts == sorted(amounts) and len(amounts) > 2
    assert lines[-1][1] == lines[-1][3] != "0.0", "not the work of all ranks"


def test_a_bar_on_a_terminal(inputs, tmp_path):
    terminal, end = os.openpty()
    try:
        command = jobs.command("plain", 1, "prepare", str(inputs[0] / "e"), "--out", "out")
        subprocess.run(command, cwd=tmp_path, env=jobs.environment(TERM="xterm"), stderr=end, check=True)
        shown = os.read(terminal, 65536).decode()
    finally:
        os.close(terminal)
        os.close(end)
    assert "tokenized" in shown and "━" in shown and "kB" in shown


def test_more_documents_than_are_held_in_memory(inputs, tmp_path, monkeypatch):
    """Sorting by way of the disk gives what sorting in memory gives; without shuffling the first of equal ones stay."""
    texts = [f"{number % 700} {number % 3}" for number in range(2000)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    made = {}
    for rows in (prepare._ROWS, 300):
        monkeypatch.setattr(prepare, "_ROWS", rows)
        for seed in (None, 1):
            out = tmp_path / f"{rows}-{seed}"
            options = prepare.Options("byte", "text", "strict", True, 0.0, seed, 1000)
            prepare.prepare([str(tmp_path / "a.jsonl")], out, options, prepare.Ranks(), print)
            made[rows, seed] = hashes(out)
            if seed is None:
                assert documents_of(out) == list(dict.fromkeys(texts))
            else:
                shuffled = documents_of(out)
                assert sorted(shuffled) == sorted(set(texts)) and shuffled != list(dict.fromkeys(texts))
    in_memory, by_disk = (list(made.values())[i : i + 2] for i in (0, 2))
    assert in_memory == by_disk


def test_inspect(inputs, tmp_path):
    texts = ["short", "a text of middling length", "long " * 100, "x"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    jobs.succeed(
        "plain",
        1,
        "prepare",
        "a.jsonl",
        "--out",
        "out",
        "--validation-fraction",
        "0",
        "--shard-tokens",
        "20",
        cwd=tmp_path,
    )
    described = json.loads(jobs.succeed("plain", 1, "inspect", "out", "--verify", cwd=tmp_path))
    lengths = [len(text) + 1 for text in texts]  # bytes, and the end of the document
    assert described["verified"] and described["sources"] == ["a.jsonl"] and described["vocab_size"] == 257
    split = described["splits"]["train"]
    assert split["tokens"] == sum(lengths) and split["documents"] == 4
    assert split["longest_document"] == max(lengths)
    assert split["median_document"] == float(np.median(lengths))
    assert split["bytes_per_token"] == pytest.approx(sum(map(len, texts)) / sum(lengths))
    assert split["shards"] > 1
    assert [shown[:5] for shown in split["begins_with"]] == [text[:5] for text in texts[:3]]

    shard = tmp_path / "out" / "train-00000.bin"
    content = bytearray(shard.read_bytes())
    content[40] ^= 1
    shard.write_bytes(content)
    jobs.succeed("plain", 1, "inspect", "out", cwd=tmp_path)
    code, output = jobs.run("plain", 1, "inspect", "out", "--verify", cwd=tmp_path)
    assert code == 2 and "train-00000.bin: its sha256 is not the one in index.json" in output
    assert output.count("hvdformer: ") == 1


@pytest.mark.parametrize("launcher,np_,damage", [("mpirun", 2, "cut short"), ("plain", 1, "deleted")])
def test_a_data_set_that_is_damaged_while_a_run_reads_it(launcher, np_, damage, inputs, tmp_path):
    """Reading a mapped file behind its end would kill the ranks without a word (SIGBUS)."""
    jobs.succeed(
        "plain", 1, "prepare", str(inputs[0]), "--out", "out", "--shard-tokens", "1000000", cwd=tmp_path
    )
    tiny = str(jobs.ROOT / "configs" / "tiny.yaml")
    settings = ("data.path=out", "train.steps=1000000", "train.evaluate_every=0", "train.sample_tokens=0")
    job = jobs.Job(jobs.command(launcher, np_, "train", tiny, *settings, "--run-dir", "run"), tmp_path)
    try:
        job.wait_for("step 7/")
        for shard in (tmp_path / "out").glob("train-*.bin"):
            if damage == "cut short":
                os.truncate(shard, 4096)
            else:
                shard.unlink()
        assert job.wait(30) == 1
    finally:
        job.end()
    says = "has 4096 bytes now, expected" if damage == "cut short" else "No such file or directory"
    assert says in job.output and "Bring it back or prepare the data again" in job.output, job.output
    assert "Bus error" not in job.output and "Traceback" not in job.output, job.output
    assert 1 <= job.output.count("hvdformer: ") <= np_, job.output


def test_a_full_disk(inputs, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], check=False).returncode
    ):
        pytest.skip("mounting a small tmpfs needs root")
    try:
        code, output = jobs.run("mpirun", 2, "prepare", str(inputs[0]), "--out", "disk/out", cwd=tmp_path)
        assert code == 1 and "No space left" in output and output.count("hvdformer: ") == 1
        assert not (disk / "out" / "index.json").exists()
        subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
        jobs.succeed("plain", 1, "prepare", str(inputs[0]), "--out", "disk/out", cwd=tmp_path)
        train, validation = documents_of(disk / "out"), documents_of(disk / "out", "validation")
        assert sorted(train + validation) == sorted(inputs[1])
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_memory_does_not_grow_with_the_input(tmp_path):
    """Peak memory of a rank for 5 and for 50 MB of JSON lines."""
    peaks = []
    for size in (1, 10):
        line = json.dumps({"text": text_of(size, 900)}) + "\n"
        (tmp_path / f"{size}.jsonl").write_text(line * (size * 5_000_000 // len(line)))
        command = jobs.command("plain", 1, "prepare", f"{size}.jsonl", "--out", f"out{size}")
        # Through a small process: a child begins with the peak of the one that it was forked from.
        program = (
            f"import resource, subprocess; subprocess.run({command!r}, check=True, stdout=subprocess.DEVNULL)"
        )
        program += "; print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            env=jobs.environment(),
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(done.stdout) / 1024)
    assert max(peaks) < 500
    assert peaks[1] < peaks[0] * 1.25 + 20, peaks
    assert int(np.sum([f.stat().st_size for f in (tmp_path / "out10").glob("*.bin")])) > 80_000_000


def test_under_horovodrun_it_says_where_it_belongs(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    output = jobs.run("horovodrun-gloo", 2, "prepare", "a.txt", "--out", "out", cwd=tmp_path)[1]
    assert "prepare runs over MPI" in output
