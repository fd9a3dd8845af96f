"""Forge and damage files by the thousand, and read them as the product does: each is taken or refused in words.

    python -m tests.forgeries --files 3000

Checkpoints (with a manifest that fits, so that the checksums let them pass), shards, indexes, tokenizers and configs: bits
are flipped, parts cut off, doubled and replaced by noise, and numbers and texts in JSON, YAML and headers by hostile ones.
Reading gets 512 MiB of memory beyond what the process has and five seconds a file. Anything but UserError, the error that
a user sees as one message, ends the program with the seed and number that make the same file again.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from hvdformer import checkpoint
from hvdformer.config import Config, load_config
from hvdformer.data.shards import open_shards, write_data_set
from hvdformer.data.tokenizer import Tokenizer
from hvdformer.distributed.buckets import flatten
from hvdformer.distributed.fusion import Fusion, Share
from hvdformer.errors import UserError
from hvdformer.evaluate import load_model
from hvdformer.inspection import inspect
from hvdformer.state import TrainState
from hvdformer.tasks import causal_lm
from tests import jobs

MEMORY_BYTES, SECONDS = 512 * 2**20, 5
HOSTILE = [
    *(b"-1", b"0", b"1e999", b"NaN", b"null", b"18446744073709551615", b"4611686018427387904", b"[]", b"{}"),
    *(
        b'"../../etc/passwd"',
        b'"/dev/zero"',
        b"[" * 2000,
        b'{"a":' * 500,
        b"!!python/object/apply:os.system [id]",
    ),
    *(b'"F64"', b'"\\ud800"', b'""', b'"' + b"x" * 3000 + b'"', b"true", b"*a", b"&a [*a, *a]", b"0x10"),
]


def build(folder: Path) -> dict[str, Path]:
    """A good one of each: {kind: folder or file}."""
    config = load_config(jobs.ROOT / "configs" / "tiny.yaml", ())
    config = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": 257})})
    state = make_state(config)
    torch.stack([p.square().sum() for p in state.model.parameters()]).sum().backward()
    state.fusion.optimizer.step()
    state.counters.step = 1
    facts = {
        "config": config.model_dump(mode="json"),
        "world_size": 1,
        "data_fingerprint": "f",
        "versions": {},
    }
    saved = checkpoint.save(folder, state, Tokenizer.byte().to_json(), facts, config.checkpoint)
    documents = [(np.arange(n % 50 + 1, dtype=np.int64), n % 50 + 1) for n in range(40)]
    (folder / "shards").mkdir()
    write_data_set(
        folder / "shards", Tokenizer.byte(), {"train": documents, "validation": documents}, ["none"]
    )
    shutil.copy(jobs.ROOT / "configs" / "tiny.yaml", folder / "config.yaml")
    return {"checkpoint": saved, "shards": folder / "shards", "config": folder / "config.yaml"}


def make_state(config: Config) -> TrainState:
    model = causal_lm.build_model(config)
    fusion = Fusion(
        config.fusion,
        flatten(model.named_parameters(), bucket_mib=2.0),
        lambda matrices, vectors: torch.optim.AdamW([*matrices, *vectors]),
        Share(0, 1, 1, 1),
    )
    return TrainState(model, fusion)


def read_checkpoint(path: Path) -> None:
    """As `generate`, `inspect` and a resumed `train` do."""
    load_model(path)
    inspect(path, verify=False)
    state = make_state(checkpoint.read_config(path))
    state.make_optimizer_tensors(checkpoint.tensor_specs(path, checkpoint.OPTIMIZER_FILE))
    checkpoint.load_tensors(path, checkpoint.OPTIMIZER_FILE, dict(state.optimizer_tensors()))
    state.load_dict(checkpoint.read_state(path))


def read_shards(path: Path) -> None:
    shards = open_shards(path)
    shards.load_tokenizer()
    shards.read(0, shards.num_tokens)
    shards.document_ends(0, shards.num_tokens)
    inspect(path, verify=True)


READERS = {"checkpoint": read_checkpoint, "shards": read_shards, "config": lambda path: load_config(path, ())}


def forge(content: bytes, chance: random.Random) -> bytes:
    """One to four changes."""
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(content) + 1)
        end = min(len(content), at + chance.choice([1, 2, 8, 100]))
        what = chance.choice(["bit", "cut", "noise", "double", "number", "hostile", "hostile"])
        if what == "bit" and content:
            at = chance.randrange(len(content))
            content = content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :]
        elif what == "cut":
            content = content[:at]
        elif what == "noise":
            content = content[:at] + chance.randbytes(end - at) + content[end:]
        elif what == "double":
            content = content[:end] + content[at:]
        elif what == "number":  # of eight bytes, as headers have them
            number = chance.choice([0, 1, 2**31, 2**40, 2**62, 2**64 - 1])
            at -= at % 8
            content = content[:at] + number.to_bytes(8, "little") + content[at + 8 :]
        elif values := list(re.finditer(rb'(?<=: )[^,\n{}\[\]]+|(?<=":)[^,{}\[\]]+', content[:20000])):
            value = chance.choice(values)
            content = content[: value.start()] + chance.choice(HOSTILE) + content[value.end() :]
    return content


def forged(kind: str, good: Path, folder: Path, chance: random.Random) -> Path:
    """A copy of a good one in which a file is forged."""
    copy = folder / "forged"
    shutil.rmtree(copy, ignore_errors=True)
    if good.is_file():
        copy.mkdir()
        (copy / good.name).write_bytes(forge(good.read_bytes(), chance))
        return copy / good.name
    copy = shutil.copytree(good, copy / good.name)
    file = chance.choice(sorted(copy.iterdir()))
    file.write_bytes(forge(file.read_bytes(), chance))
    if kind == "checkpoint" and file.name != checkpoint.MANIFEST_FILE:
        manifest = json.loads((copy / checkpoint.MANIFEST_FILE).read_text())
        manifest[file.name] = {"bytes": file.stat().st_size, "sha256": checkpoint._file_sha256(file)}
        (copy / checkpoint.MANIFEST_FILE).write_text(json.dumps(manifest))
    return copy


def try_all(folder: Path, num_files: int, seed: int) -> dict[str, int]:
    """Forge and read that many; how many of each kind were refused, or taken for lack of a difference that matters."""
    good = build(folder)
    for kind, path in good.items():
        READERS[kind](path)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, resource.RLIM_INFINITY))
    counts: Counter[str] = Counter()
    for number in range(num_files):
        chance = random.Random(f"{seed}-{number}")
        kind = chance.choice(list(good))
        path = forged(kind, good[kind], folder, chance)
        signal.alarm(SECONDS)  # ends the process
        try:
            READERS[kind](path)
            counts[f"{kind} taken"] += 1
        except UserError as error:
            assert str(error)
            counts[f"{kind} refused"] += 1
        except BaseException:
            print(f"seed {seed}, number {number}: {kind} in {folder}", file=sys.stderr)
            raise
        finally:
            signal.alarm(0)
    return dict(sorted(counts.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        counts = try_all(Path(folder), arguments.files, arguments.seed)
    print(json.dumps({**counts, "seconds": round(time.monotonic() - began)}))


if __name__ == "__main__":
    main()
