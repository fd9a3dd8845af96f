"""`hvdformer prepare` on two ranks against one and against Hugging Face datasets, and the peak memory of a rank.

    python -m benchmarks.prepare [--repeats 5] [--source FOLDER]

The input is the text of Debian's linux-doc-6.12 (8,517 .rst and .txt files, 59.9 MB) as one file of JSON lines; without
--source, the unpacked package, it is fetched with `apt-get download`. Alternating within each repeat:

- np 1, np 2: `mpirun -np N hvdformer prepare ... --tokenizer bpe:8192`, the training of the BPE included;
- ours: the same on two ranks with the tokenizer.json of the first, so that it only tokenizes;
- Hugging Face: the same with `load_dataset("json")` and `map(batched=True, num_proc=2)`, until the tokens of all
  documents are in datasets' own files; its cache is empty each time.

Each is a command from its start to its end, one thread a process. Both must find the same number of tokens. Then the
peak memory of each rank, for the input and for one of ten times its size whose other nine copies have other words.
Writes benchmarks/results/prepare.json. It needs datasets: pip install "hvdformer[bench]".
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import shutil
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from benchmarks.processes import BIN, ROOT, environment
from hvdformer.bench import machine

PACKAGE = "linux-doc-6.12"
VOCABULARY = "bpe:8192"
# Runs a command and writes its peak memory in KiB into a file of this rank. (A process begins with the peak of the one
# that it was forked from, so mpirun's own figure would not do.)
PEAK = (
    "import os, resource, subprocess, sys; code = subprocess.call(sys.argv[2:]); "
    "file = open(sys.argv[1] + os.environ['OMPI_COMM_WORLD_RANK'], 'w'); "
    "file.write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)); sys.exit(code)"
)
HUGGING_FACE = """
import sys
from datasets import load_dataset
from datasets.utils.logging import disable_progress_bar
from tokenizers import Tokenizer

text, tokenizer_file, cache = sys.argv[1:]
disable_progress_bar()
tokenizer = Tokenizer.from_file(tokenizer_file)
tokenizer.encode_special_tokens = True
end = tokenizer.token_to_id("<|endoftext|>")

def encode(batch):
    encoded = tokenizer.encode_batch_fast(batch["text"], add_special_tokens=False)
    return {"ids": [one.ids + [end] for one in encoded], "tokens": [len(one.ids) + 1 for one in encoded]}

if __name__ == "__main__":
    data = load_dataset("json", data_files=text, split="train", cache_dir=cache)
    data = data.map(encode, batched=True, num_proc=2, remove_columns=["text"])
    print(sum(data["tokens"]))
"""


def fetch(folder: Path) -> Path:
    """The package, unpacked."""
    subprocess.run(["apt-get", "download", PACKAGE], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    (package,) = folder.glob("*.deb")
    subprocess.run(["dpkg", "-x", package, folder / "unpacked"], check=True)
    return folder / "unpacked"


def write_input(source: Path, file: Path) -> dict[str, int]:
    """All .rst and .txt files, plain or as .gz, as one file of JSON lines; documents and bytes of text."""
    documents = nbytes = 0
    with open(file, "w") as out:
        for path in sorted(source.rglob("*")):
            if path.is_file() and path.name.removesuffix(".gz").endswith((".rst", ".txt")):
                raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
                out.write(json.dumps({"text": raw.decode(errors="replace")}) + "\n")
                documents, nbytes = documents + 1, nbytes + len(raw)
    return {"documents": documents, "text_bytes": nbytes}


def write_ten_times(small: Path, large: Path) -> None:
    """The input and nine copies of it, each with the letters turned by so many places: other words, the same lengths."""
    letters = string.ascii_lowercase
    with open(large, "w") as out:
        for turn in range(10):
            table = str.maketrans(letters, letters[turn:] + letters[:turn])
            with open(small) as lines:
                for line in lines:
                    out.write(json.dumps({"text": json.loads(line)["text"].translate(table)}) + "\n")


def prepare_command(np: int, text: Path, out: Path, tokenizer: str, peaks: Path | None = None) -> list[str]:
    command = [str(BIN / "hvdformer"), "prepare", str(text), "--out", str(out), "--tokenizer", tokenizer]
    wrapped = [sys.executable, "-c", PEAK, str(peaks), *command] if peaks else command
    return ["mpirun", "--oversubscribe", "--bind-to", "none", "-np", str(np), *wrapped]


def run(command: list[str]) -> tuple[float, str]:
    """Seconds from start to end, and what was printed."""
    variables = environment(1, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    began = time.perf_counter()
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return seconds, done.stdout


def run_prepare(np: int, text: Path, work: Path, tokenizer: str) -> tuple[float, int]:
    """Seconds and tokens; the data set stays until the next one."""
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    seconds, _ = run(prepare_command(np, text, out, tokenizer))
    splits = json.loads((out / "index.json").read_text())["splits"].values()
    return seconds, sum(shard["tokens"] for split in splits for shard in split["shards"])


def run_hugging_face(text: Path, work: Path, tokenizer: Path) -> tuple[float, int]:
    with tempfile.TemporaryDirectory(dir=work) as cache:
        script = Path(cache, "with_datasets.py")
        script.write_text(HUGGING_FACE)
        seconds, printed = run([sys.executable, str(script), str(text), str(tokenizer), cache])
    return seconds, int(printed.split()[-1])


def peak_megabytes(np: int, text: Path, work: Path) -> list[float]:
    """Of each rank."""
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    run(prepare_command(np, text, out, VOCABULARY, work / "peak-"))
    return [int((work / f"peak-{rank}").read_text()) * 1024 / 1e6 for rank in range(np)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--source", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        text, tokenizer = work / "text.jsonl", work / "tokenizer.json"
        result = {
            "command": f"python -m benchmarks.prepare --repeats {arguments.repeats}",
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine(),
            "load_before": os.getloadavg()[0],
            "versions": {name: version(name) for name in ("tokenizers", "datasets", "mpi4py", "numpy")}
            | {"python": platform.python_version()},
            "input": write_input(arguments.source or fetch(work), text),
        }
        run_prepare(2, text, work, VOCABULARY)  # also warms up the files of all that is imported
        shutil.copy(work / "out" / "tokenizer.json", tokenizer)
        variants: dict[str, Callable[[], tuple[float, int]]] = {
            "np 1": lambda: run_prepare(1, text, work, VOCABULARY),
            "np 2": lambda: run_prepare(2, text, work, VOCABULARY),
            "ours": lambda: run_prepare(2, text, work, str(tokenizer)),
            "Hugging Face": lambda: run_hugging_face(text, work, tokenizer),
        }
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for repeat in range(arguments.repeats):
            for name in list(variants)[:: 1 if repeat % 2 == 0 else -1]:
                took, tokens = variants[name]()
                seconds[name].append(took)
                print(f"{name:14s} {took:6.1f} s  {tokens:,} tokens", flush=True)
                if result.setdefault("tokens", tokens) != tokens:
                    raise SystemExit(f"{name} found {tokens} tokens, expected {result['tokens']}")
        result["seconds"] = seconds
        result["median_seconds"] = {name: statistics.median(values) for name, values in seconds.items()}
        result["np_2_times_as_fast_as_np_1"] = ratio(seconds["np 1"], seconds["np 2"])
        result["ours_times_as_fast_as_hugging_face"] = ratio(seconds["Hugging Face"], seconds["ours"])

        ten_times = work / "ten-times.jsonl"
        write_ten_times(text, ten_times)
        result["peak_megabytes_of_each_rank"] = {
            "np 2": peak_megabytes(2, text, work),
            "np 2, ten times the input": peak_megabytes(2, ten_times, work),
        }
    (ROOT / "benchmarks" / "results" / "prepare.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "seconds"}, indent=1))


def ratio(slower: list[float], faster: list[float]) -> float:
    """The median of the ratios within a repeat."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))


if __name__ == "__main__":
    main()
