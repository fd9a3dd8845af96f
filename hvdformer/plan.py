"""What a training step takes on machines that are not here: memory, time, communication and scaling efficiency, by model.

Nothing is started. The model is an alpha-beta model (Hockney, 1994) of each collective, and docs/plan.md has its errors
against published runs and against measurement. For S bytes on n ranks, g of them on each of m nodes:

    ring allreduce    base + 2 (n-m) a_i + 2 (m-1) a_o  +  2 (n-1)/n S / min(B_i, B_o)
    tree allreduce    base + 2 (g-1) a_i + 2 log2(m) a_o + 2 S / (0.92 min(B_i, B_o))       m > 1
    reduce-scatter, allgather    half of a ring allreduce
    all-to-all        base + (n-m) a_i + (m-1) a_o  +  S max((n-1)/n / B_i, g (n-g)/n / B_o)
    Adasum            2 (log2 g a_i + log2 m a_o), as much again for each level's dot products, and a ring's bytes

a_i, B_i: latency and bandwidth of a GPU's link to the others of its node; a_o, B_o: of a node's network. A ring passes
each node once, so the slower of the two links sets its pace. These are also the formulas by which NCCL chooses between
its algorithms (src/graph/tuning.cc); "auto" takes the faster one, as it does. The gradients of the last micro-batch
become ready at an even pace while backward runs, bucket by bucket, and one collective runs at a time: what is left when
backward ends is exposed. Each collective first waits for half a cycle of Horovod's negotiation.

Constants, unless options or --measured give others:
    a_i = 3.4 us, a_o = 14 us, base = 8.4 us, 0.92      NCCL, src/graph/tuning.cc: ring, Simple, NVLink and network
    B_i = 450 GB/s, memory 3.35 TB/s and 80 GB          NVIDIA H100 SXM data sheet: NVLink is 900 GB/s both ways together
    989 TFLOP/s                                         the same: bf16, dense
    B_o = 400 Gbit/s a node                             one NDR InfiniBand port
    links reach 0.8 of their nominal bandwidth          assumed; docs/plan.md says what other values change
    MFU 0.4                                             assumed; PaLM (arXiv 2204.02311, appendix B) defines it
    cycle 1 ms                                          Horovod 0.28.1's default, which hvdformer leaves on GPUs

Not modelled: stragglers, congestion between jobs, what NCCL's kernels take from the GPU while it computes, reading data,
saving, and the passes over the gradients that rounding to a wire format or to integers takes.

The file for --measured is JSON, as `hvdformer bench --json` writes it; other keys may be there and are ignored:

    {"runs": [{"np": 1,                              ranks
               "step_seconds": 0.52,                 mean or median of a whole step
               "backward_seconds": 0.33,             of it in backward passes, all of the rank's micro-batches together
               "exposed_communication_seconds": 0,   of it waiting for collectives that backward did not hide
               "bytes_sent": 0,                      payload that a rank sends a step
               "parameters": 5243200,
               "micro_batches_per_rank": 4,          optional, 1: only the last one's backward hides communication
               "nodes": 1}, ...],                    optional, 1
     "allreduce": [{"np": 2, "bytes": 1048576, "seconds": 0.0009, "nodes": 1}, ...]}      optional

The run at np 1 is the step without communication, for as much work a rank as it did. Bandwidth and latency come from
"allreduce" if it is there, by least squares of the relative error; otherwise the largest np says which bandwidth gives
its exposed time. Runs and allreduces with one node set the links within a node, those with more the network.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hvdformer.errors import UserError

if TYPE_CHECKING:
    from hvdformer.config import Config, ModelConfig

NCCL_INTRA_LATENCY = 3.4e-6
NCCL_LATENCY = 14e-6
NCCL_BASE_LATENCY = 8.4e-6
NCCL_TREE_EFFICIENCY = 0.92
H100_LINK = 450e9
H100_MEMORY_BANDWIDTH = 3.35e12
H100_MEMORY = 80e9
H100_TFLOPS = 989.0
NDR_PORT = 50e9
LINK_EFFICIENCY = 0.8
MFU = 0.4
CYCLE_SECONDS = 1e-3

# Bytes that pass between a GPU and its memory for each parameter in clipping, AdamW and clearing the gradient.
_NORM, _CLIP, _ADAMW, _CLEAR = 4, 8, 28, 4
_BUCKETS_MIB = (1, 2, 4, 8, 16, 32, 64, 128, 256)


# Numbers with units

_COUNT = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
_PREFIX = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2.0**10, "mi": 2.0**20, "gi": 2.0**30}
_TIME = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}


def parse_count(text: str) -> int:
    """A number such as 350m, 7b or 1.3t.

    Raises:
        UserError: it is none.
    """
    number, unit = _split(text, "a count such as 350m, 7b or 6738415616")
    if unit.lower() not in _COUNT or number * _COUNT[unit.lower()] < 1:
        raise UserError(f"{text!r}: expected a count such as 350m, 7b or 6738415616")
    return round(number * _COUNT[unit.lower()])


def parse_bytes(text: str) -> float:
    """Bytes, of 80GB or 512MiB.

    Raises:
        UserError: it is no amount of bytes.
    """
    expected = "an amount of memory such as 80GB or 512MiB"
    number, unit = _split(text, expected)
    match = re.fullmatch(r"([kmgt]i?)?(B|bytes?)", unit, re.IGNORECASE)
    scale = _PREFIX.get((match[1] or "").lower()) if match else None
    if scale is None:
        raise UserError(f"{text!r}: expected {expected}")
    return number * scale


def parse_rate(text: str) -> float:
    """Bytes a second, of 400Gbit, 400Gbit/s, 400Gbps or 50GB/s. Gbit and Gb are bits, GB is bytes.

    Raises:
        UserError: it is no bandwidth.
    """
    expected = "a bandwidth such as 400Gbit (a second) or 50GB (a second)"
    number, unit = _split(text, expected)
    match = re.fullmatch(r"([kKmMgGtT]i?)?(bits?|b|B|[Bb]ytes?)(ps|/s)?", unit)
    scale = _PREFIX.get((match[1] or "").lower()) if match else None
    if scale is None:
        raise UserError(f"{text!r}: expected {expected}")
    assert match is not None
    return number * scale / (8 if match[2] in ("bit", "bits", "b") else 1)


def parse_seconds(text: str) -> float:
    """Seconds, of 14us, 0.5ms or 2s.

    Raises:
        UserError: it is no time.
    """
    number, unit = _split(text, "a time such as 14us or 0.5ms", zero=True)
    if unit not in _TIME:
        raise UserError(f"{text!r}: expected a time such as 14us or 0.5ms")
    return number * _TIME[unit]


def _split(text: str, expected: str, zero: bool = False) -> tuple[float, str]:
    match = re.fullmatch(r"\s*(\d+(?:[.,_]?\d+)*|\d*\.\d+)(e[+-]?\d+)?\s*([A-Za-zµ/]*)\s*", text)
    try:
        number = float(match[1].replace(",", "").replace("_", "") + (match[2] or "")) if match else 0.0
    except ValueError:
        number = 0.0
    if match is None or not math.isfinite(number) or (number == 0 and not zero):
        raise UserError(f"{text!r}: expected {expected}")
    return number, match[3]


def in_units(value: float, unit: str, factor: float = 1000.0) -> str:
    """1.5e9 and "B" as "1.5 GB"; three digits that count."""
    prefixes = ["", "k", "M", "G", "T", "P"]
    power = 0
    while abs(value) >= 0.9995 * factor and power < len(prefixes) - 1:
        value, power = value / factor, power + 1
    digits = 0 if abs(value) >= 99.95 or value == int(value) else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f} {prefixes[power]}{unit}"


def seconds_text(value: float) -> str:
    """A time with the unit that reads best."""
    if value == 0:
        return "0 s"
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= scale * 0.9995 or unit == "us":
            number = value / scale
            return f"{number:.{0 if number >= 99.95 else 1 if number >= 9.995 else 2}f} {unit}"
    raise AssertionError


# The model of a model


def llama_like(parameters: int) -> tuple[ModelConfig, int]:
    """The shape of a Llama-like decoder of about so many parameters, and its vocabulary.

    As in Llama 1 (arXiv 2302.13971, table 2): width about 128 times the layers, heads of 128, SwiGLU of 8/3 width, no
    biases, an output layer of its own and 32,000 tokens. Below 100 m that vocabulary would be most of the model: then it
    is bytes with one embedding for input and output, and heads of 64, as in hvdformer's default.
    """
    from hvdformer.config import ModelConfig

    is_small = parameters < 100_000_000
    vocab_size, head = (257, 64) if is_small else (32_000, 128)
    best: tuple[float, int, int] | None = None
    for heads in range(1, 1024):
        width = heads * head
        layers = round((parameters - _outside_blocks(width, vocab_size, is_small)) / _block_parameters(width))
        if layers < 1:
            break
        total = layers * _block_parameters(width) + _outside_blocks(width, vocab_size, is_small)
        shape_error = abs(math.log(width / layers / (64 if is_small else 128)))
        # The count counts more than the proportions: 5 % off are as bad as proportions off by e.
        badness = shape_error + 20 * abs(total / parameters - 1)
        if best is None or badness < best[0]:
            best = (badness, heads, layers)
    if best is None:
        raise UserError(
            f"{parameters:,} parameters are less than one layer of the smallest shape: "
            f"at least {_block_parameters(head) + _outside_blocks(head, vocab_size, is_small):,}"
        )
    _, heads, layers = best
    config = ModelConfig(
        width=heads * head,
        layers=layers,
        heads=heads,
        context_length=512 if is_small else 4096,
        tie_embeddings=is_small,
        vocab_size=vocab_size,
    )
    return config, vocab_size


def _block_parameters(width: int) -> int:
    hidden = -(-8 * width // 3 // 64) * 64  # as ffn_width of models/layers.py
    return 4 * width * width + 3 * width * hidden + 2 * width


def _outside_blocks(width: int, vocab_size: int, tied: bool) -> int:
    return (1 if tied else 2) * vocab_size * width + width


def flops_per_token(config: ModelConfig, vocab_size: int, parameters: int) -> float:
    """Forward and backward of one token: 6 N + 12 L T D, as MFU counts them (arXiv 2204.02311, appendix B).

    N leaves out what is only looked up: positions, and the input embedding unless the output layer uses it too.
    """
    looked_up = 0 if config.tie_embeddings else vocab_size * config.width
    if config.positions == "learned":
        looked_up += config.context_length * config.width
    return 6 * (parameters - looked_up) + 12 * config.layers * config.context_length * config.width


@dataclass(frozen=True)
class Work:
    """A rank's part of a step, as it is without any communication."""

    compute_seconds: float  # forward and backward of all its micro-batches
    window_seconds: float  # backward of the last one: what can hide communication
    update_seconds: float  # clip and update, with the whole optimizer on this rank
    parameters: int
    tokens: int | None  # of this rank

    @property
    def seconds(self) -> float:
        return self.compute_seconds + self.update_seconds

    def slowed(self, factor: float) -> Work:
        """On cores that each have to serve `factor` ranks."""
        return replace(
            self,
            compute_seconds=self.compute_seconds * factor,
            window_seconds=self.window_seconds * factor,
            update_seconds=self.update_seconds * factor,
        )


def work_of(
    config: ModelConfig,
    vocab_size: int,
    parameters: int,
    micro_batch: int,
    accumulate: int,
    flops_per_second: float,
    memory_bandwidth: float,
    activation_checkpointing: bool,
) -> Work:
    """The work of a step at a rate of useful operations (peak x MFU); backward takes twice as long as forward.

    Recomputed activations are no useful operations: they add another forward.
    """
    tokens = micro_batch * config.context_length
    forward = tokens * flops_per_token(config, vocab_size, parameters) / 3 / flops_per_second
    backward = (3 if activation_checkpointing else 2) * forward
    return Work(
        compute_seconds=accumulate * (forward + backward),
        window_seconds=backward,
        update_seconds=(_NORM + _CLIP + _ADAMW + _CLEAR) * parameters / memory_bandwidth,
        parameters=parameters,
        tokens=tokens * accumulate,
    )


# Collectives


@dataclass(frozen=True)
class Cluster:
    """Ranks and what connects them. Bandwidths are one way, and what collectives reach, not nominal."""

    size: int
    per_node: int
    bandwidth: float  # bytes/s of one node's network
    intra_bandwidth: float  # bytes/s of one GPU to the others of its node
    latency: float = NCCL_LATENCY
    intra_latency: float = NCCL_INTRA_LATENCY
    base_latency: float = NCCL_BASE_LATENCY
    cycle: float = CYCLE_SECONDS
    algorithm: Literal["auto", "ring", "tree"] = "auto"
    contention: float = 0.0  # share of hidden communication that takes time from computing all the same

    def __post_init__(self) -> None:
        if self.size > self.per_node and self.size % self.per_node:
            raise UserError(
                f"{self.size} GPUs do not fill nodes of {self.per_node}: give a multiple, or --gpus-per-node"
            )

    @property
    def nodes(self) -> int:
        return max(1, self.size // self.per_node)

    @property
    def local(self) -> int:
        """Ranks of one node."""
        return min(self.size, self.per_node)

    @property
    def bus(self) -> float:
        """Bytes/s of a ring that passes each node once."""
        return min(self.bandwidth, self.intra_bandwidth) if self.nodes > 1 else self.intra_bandwidth

    def _steps(self) -> float:
        """Latency of n - 1 steps around the ring."""
        return (self.size - self.nodes) * self.intra_latency + (self.nodes - 1) * self.latency

    def seconds(self, op: str, nbytes: float) -> float:
        """One collective of `nbytes`: the whole buffer, of which each rank holds or gets a part or all."""
        n, g = self.size, self.local
        if n == 1:
            return 0.0
        share = (n - 1) / n
        if op == "allreduce":
            ring = self.base_latency + 2 * self._steps() + 2 * share * nbytes / self.bus
            if self.nodes == 1 or self.algorithm == "ring":
                return ring
            hops = 2 * ((g - 1) * self.intra_latency + math.log2(self.nodes) * self.latency)
            tree = self.base_latency + hops + 2 * nbytes / (NCCL_TREE_EFFICIENCY * self.bus)
            return tree if self.algorithm == "tree" else min(ring, tree)
        if op in ("reducescatter", "allgather"):
            return self.base_latency + self._steps() + share * nbytes / self.bus
        if op == "alltoall":
            within = share * nbytes / self.intra_bandwidth
            between = g * (n - g) / n * nbytes / self.bandwidth
            return self.base_latency + self._steps() + max(within, between)
        assert op == "adasum", op
        halving = math.log2(g) * self.intra_latency + math.log2(self.nodes) * self.latency
        levels = math.log2(n)
        slowest = self.latency if self.nodes > 1 else self.intra_latency
        dots = levels * (levels + 1) * slowest  # three numbers allreduced over 2, 4, ... n ranks
        return self.base_latency + 2 * halving + dots + 2 * share * nbytes / self.bus

    def small_seconds(self) -> float:
        """An allreduce of a few numbers, such as the totals of a step."""
        slowest = self.latency if self.nodes > 1 else self.intra_latency
        return 2 * math.ceil(math.log2(self.size)) * slowest if self.size > 1 else 0.0


def sent(op: str, nbytes: float, size: int) -> float:
    """Payload that a rank sends, as fusion.py counts it."""
    return (2 if op in ("allreduce", "adasum") else 1) * nbytes * (size - 1) / size


def exposed_after(buckets: Sequence[float], window: float) -> float:
    """Seconds of the buckets' collectives that are left when backward ends.

    buckets: seconds of each, in order; bucket k of K is ready after (k + 1)/K of the window; one runs at a time.
    """
    end = 0.0
    for number, seconds in enumerate(buckets):
        end = max(end, window * (number + 1) / len(buckets)) + seconds
    return max(0.0, end - window)


# Kinds of fusion


@dataclass(frozen=True)
class Kind:
    """What a kind of fusion sends and keeps for each parameter: docs/fusion.md, hvdformer/distributed/."""

    name: str
    collectives: tuple[tuple[str, int, str], ...]  # operation, bytes a parameter, when
    state: float  # bytes a parameter that optimizer and fusion keep
    buffers: float = 0.0  # bytes a parameter that collectives hold for a part of the step
    shared: bool = False  # state is shared out over the ranks


# backward: bucket by bucket beside it.  after: when backward has ended, bucket by bucket.  fuse: every `every` steps.
def kinds(num_micro_batches: int) -> tuple[Kind, ...]:
    """All kinds, for a step of so many micro-batches over all ranks: above 64 exact takes 64-bit integers."""
    integer = 4 if num_micro_batches <= 64 else 8
    return (
        Kind("allreduce", (("allreduce", 4, "backward"),), 8),
        Kind("allreduce:wire=bf16", (("alltoall", 2, "backward"), ("allgather", 2, "after")), 8, 2),
        Kind("allreduce:wire=fp16", (("allreduce", 2, "backward"),), 8, 2),
        Kind("exact", (("allreduce", integer, "backward"),), 8 + integer),
        Kind("zero1", (("reducescatter", 4, "backward"), ("allgather", 4, "after")), 8, 4, shared=True),
        Kind("adasum", (("adasum", 4, "after"),), 8),
        Kind("local_sgd", (("allreduce", 12, "fuse"),), 8),
        Kind("diloco", (("allreduce", 12, "fuse"),), 16),
    )


def predict(kind: Kind, work: Work, cluster: Cluster, bucket_mib: float, every: int) -> dict[str, Any]:
    """Time and traffic of a step of one kind; for kinds that fuse now and then, the mean over `every` steps.

    Efficiency is the step of one GPU over this step: each GPU has the same work at every size.
    """
    n, parameters = cluster.size, work.parameters
    num_buckets = max(1, math.ceil(4 * parameters / (bucket_mib * 2**20)))
    wait = cluster.cycle / 2 if n > 1 else 0.0
    communication = exposed = bytes_sent = 0.0
    for op, width, when in kind.collectives:
        nbytes = float(width * parameters)
        # The parts of local_sgd's 12 bytes, weights and two moments, travel one after the other.
        rounds = 3 if when == "fuse" else 1
        each = cluster.seconds(op, nbytes / rounds / num_buckets)
        total = rounds * num_buckets * each
        if when == "backward":
            left = exposed_after([each] * num_buckets, work.window_seconds) + wait
            left += cluster.contention * max(0.0, total + wait - left)
        elif when == "after":
            left = total + wait
        else:
            total, left, nbytes = total / every, (total + rounds * wait) / every, nbytes / every
        communication += total
        exposed += left
        bytes_sent += sent(op, nbytes, n)
    # A norm of all ranks (zero1), or the largest of any (local kinds), which nothing hides.
    if kind.shared or kind.collectives[0][2] == "fuse":
        communication += cluster.small_seconds()
        exposed += cluster.small_seconds() + wait
    update = work.update_seconds
    if kind.shared and n > 1:
        whole = _NORM + _CLIP + _ADAMW + _CLEAR
        own = (_NORM + _CLIP + _ADAMW) / n + _CLEAR + 8  # 8: the gathered weights are copied into the buckets
        update *= own / whole
    step = work.compute_seconds + update + exposed
    return {
        "fusion": kind.name,
        "bytes_sent": round(bytes_sent),
        "step_seconds": step,
        "communication_seconds": communication,
        "exposed_communication_seconds": exposed,
        "efficiency": work.seconds / step,
        "tokens_per_second": work.tokens * n / step if work.tokens else None,
    }


def memory_of(kind: Kind, estimate: dict[str, int], parameters: int, size: int) -> dict[str, int]:
    """Bytes on a rank: what models/decoder.py estimates for the step, with the state and buffers of this kind."""
    memory = dict(estimate)
    memory["optimizer"] = round(kind.state * parameters / (size if kind.shared else 1))
    buffers = kind.buffers * parameters if size > 1 else 0
    if kind.shared and size > 1:
        buffers += 4 * parameters / size  # the summed slices
    memory["fusion buffers"] = round(buffers)
    return memory


# Measurement


@dataclass(frozen=True)
class Measurement:
    """What a file for --measured says."""

    runs: tuple[dict[str, float], ...]
    allreduces: tuple[dict[str, float], ...]

    @property
    def alone(self) -> dict[str, float]:
        """The run at np 1."""
        return next(run for run in self.runs if run["np"] == 1)


def read_measurement(path: Path) -> Measurement:
    """Read a file for --measured; the module's docstring has its form.

    Raises:
        UserError: not such a file; says what is missing.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    runs = content.get("runs") if isinstance(content, dict) else None
    if not isinstance(runs, list) or not runs:
        raise UserError(f'{path}: expected {{"runs": [...]}}, as `hvdformer bench --json` writes it')
    needed = (
        "np",
        "step_seconds",
        "backward_seconds",
        "exposed_communication_seconds",
        "bytes_sent",
        "parameters",
    )
    optional = {"micro_batches_per_rank": 1.0, "nodes": 1.0}
    read = [_numbers(path, "runs", run, needed, optional) for run in runs]
    if not any(run["np"] == 1 for run in read):
        raise UserError(f"{path}: no run with np 1, which gives the step without communication")
    points = content.get("allreduce") or []
    if not isinstance(points, list):
        raise UserError(f"{path}: allreduce: expected a list")
    allreduces = [_numbers(path, "allreduce", p, ("np", "bytes", "seconds"), {"nodes": 1.0}) for p in points]
    return Measurement(tuple(read), tuple(allreduces))


def _numbers(
    path: Path, name: str, entry: Any, needed: Sequence[str], optional: dict[str, float]
) -> dict[str, float]:
    if not isinstance(entry, dict):
        raise UserError(f"{path}: {name}: expected objects, found {entry!r}")
    values = {}
    for key in (*needed, *optional):
        value = entry.get(key, optional.get(key))
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
            raise UserError(f"{path}: {name}: {key} is {value!r}, expected a number of at least 0")
        values[key] = float(value)
    return values


def work_measured(measurement: Measurement, parameters: int | None, tokens: int | None = None) -> Work:
    """The step without communication, of the run at np 1; for another number of parameters, in proportion to it."""
    alone = measurement.alone
    scale = parameters / alone["parameters"] if parameters else 1.0
    window = alone["backward_seconds"] / alone["micro_batches_per_rank"]
    return Work(
        compute_seconds=alone["step_seconds"] * scale,
        window_seconds=window * scale,
        update_seconds=0.0,  # part of the step
        parameters=parameters or round(alone["parameters"]),
        tokens=tokens,
    )


def fit_allreduce(points: Sequence[dict[str, float]]) -> tuple[float, float]:
    """Latency of a ring's step in seconds, and bandwidth in bytes/s, that fit measured allreduces best.

    seconds = 2 (n-1) latency + 2 (n-1)/n bytes / bandwidth, by least squares of the relative error.

    Raises:
        UserError: fewer than two sizes, or a time that does not grow with the bytes.
    """
    # Rows (x, y) . (latency, 1 / bandwidth) = seconds, each divided by its seconds.
    rows = [
        (
            2 * (p["np"] - 1) / p["seconds"],
            2 * (p["np"] - 1) / p["np"] * p["bytes"] / p["seconds"],
        )
        for p in points
        if p["np"] > 1 and p["seconds"] > 0
    ]
    xx, xy, yy = (sum(a[i] * a[j] for a in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    x, y = (sum(row[i] for row in rows) for i in (0, 1))
    determinant = xx * yy - xy * xy
    if len(rows) < 2 or determinant <= 1e-9 * xx * yy:
        raise UserError("allreduce: at least two different sizes are needed to tell latency from bandwidth")
    latency, inverse = (x * yy - y * xy) / determinant, (y * xx - x * xy) / determinant
    if latency < 0:  # the best fit without a latency
        latency, inverse = 0.0, y / yy
    if inverse <= 0:
        raise UserError("allreduce: the measured time does not grow with the bytes, so it gives no bandwidth")
    return latency, 1 / inverse


def fit_bandwidth(run: dict[str, float], cluster: Cluster, bucket_mib: float) -> float | None:
    """The bandwidth at which the model exposes as much as this run did; None: even at 1 TB/s it would be more.

    Where backward hid all of it, that is the least bandwidth which does, so a lower bound.
    """
    work = Work(
        run["step_seconds"],
        run["backward_seconds"] / run["micro_batches_per_rank"],
        0.0,
        round(run["parameters"]),
        None,
    )
    kind = kinds(1)[0]

    def exposed(bandwidth: float) -> float:
        at = replace(cluster, bandwidth=bandwidth, intra_bandwidth=bandwidth)
        return predict(kind, work, at, bucket_mib, 1)["exposed_communication_seconds"]

    low, high = 1e5, 1e12
    if exposed(high) > run["exposed_communication_seconds"]:
        return None
    for _ in range(80):
        middle = math.sqrt(low * high)
        low, high = (
            (middle, high) if exposed(middle) > run["exposed_communication_seconds"] else (low, middle)
        )
    return high


_LINKS = ("bandwidth", "latency", "intra_bandwidth", "intra_latency")


def cluster_measured(
    cluster: Cluster, measurement: Measurement, bucket_mib: float
) -> tuple[Cluster, dict[str, str]]:
    """The cluster with the links that were measured, and for each of those constants from what."""
    found: dict[str, str] = {}
    for is_network, rate, latency in (
        (False, "intra_bandwidth", "intra_latency"),
        (True, "bandwidth", "latency"),
    ):
        points = [p for p in measurement.allreduces if (p["nodes"] > 1) == is_network and p["np"] > 1]
        runs = [r for r in measurement.runs if (r["nodes"] > 1) == is_network and r["np"] > 1]
        if points:
            seconds, bandwidth = fit_allreduce(points)
            links: dict[str, Any] = {rate: bandwidth, latency: seconds}
            cluster = replace(cluster, base_latency=0.0, **links)
            found |= dict.fromkeys((rate, latency), f"measured, {len(points)} allreduces")
        elif runs:
            run = max(runs, key=lambda r: r["np"])
            at = replace(cluster, size=int(run["np"]), per_node=int(run["np"] / run["nodes"]))
            fitted = fit_bandwidth(run, at, bucket_mib)
            if fitted is None:
                raise UserError(
                    f"the run at np {run['np']:.0f} exposed {seconds_text(run['exposed_communication_seconds'])} of "
                    "communication, less than latency and half a cycle alone: give --cycle-time and latencies that fit, "
                    "or a file with allreduces"
                )
            links = {rate: fitted}
            cluster = replace(cluster, **links)
            found[rate] = f"measured, what the run at np {run['np']:.0f} exposed"
    return cluster, found


# The plan


@dataclass(frozen=True)
class Options:
    """What is asked for. None: the constant of the module's docstring, or what was measured."""

    gpus: int
    parameters: int | None = None
    gpus_per_node: int | None = None
    bandwidth: float | None = None  # bytes/s, nominal, of a node's network, one way
    latency: float | None = None  # seconds
    intra_bandwidth: float | None = None
    intra_latency: float | None = None
    link_efficiency: float | None = None
    tflops: float | None = None
    mfu: float | None = None
    memory: float = H100_MEMORY
    memory_bandwidth: float = H100_MEMORY_BANDWIDTH
    context_length: int | None = None
    micro_batch: int | None = None
    accumulate: int = 1
    precision: str = "bf16"
    activation_checkpointing: bool | None = None
    bucket_mib: float | None = None
    every: int | None = None
    cycle: float | None = None
    contention: float = 0.0
    algorithm: Literal["auto", "ring", "tree"] = "auto"
    measured: Path | None = None


def read_options(given: dict[str, Any]) -> Options:
    """Options as the command line has them, texts with units, as numbers.

    Raises:
        UserError: a text that has not the unit or the form expected; names the option.
    """
    readers = {
        "params": parse_count,
        "bandwidth": parse_rate,
        "intra_bandwidth": parse_rate,
        "memory_bandwidth": parse_rate,
        "latency": parse_seconds,
        "intra_latency": parse_seconds,
        "cycle_time": parse_seconds,
        "memory": parse_bytes,
    }
    names = {"params": "parameters", "cycle_time": "cycle"}
    values: dict[str, Any] = {}
    for key, value in given.items():
        if value is None:
            continue
        try:
            values[names.get(key, key)] = readers[key](value) if key in readers else value
        except UserError as error:
            raise UserError(f"--{key.replace('_', '-')}: {error}") from None
    return Options(**values)


def plan(options: Options, config_path: Path | None = None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What each kind of fusion takes on a cluster, as numbers and the sentences that say where they come from.

    The model's shape is that of the config, or with `options.parameters` a Llama-like one.

    Raises:
        UserError: options that do not go together.
    """
    from hvdformer.config import load_config

    config = load_config(config_path, overrides)
    measurement = read_measurement(options.measured) if options.measured else None
    if measurement is not None and (options.tflops or options.mfu):
        raise UserError(
            "--tflops and --mfu have no effect with --measured, whose step time counts: leave them out"
        )
    has_shape = config_path is not None or any(override.startswith("model.") for override in overrides)
    asked = options.parameters
    if asked is None and not has_shape:
        if measurement is None:
            raise UserError("no model: give --params 7b, or a CONFIG.yaml whose model has the shape")
        asked = round(measurement.alone["parameters"])
    if asked is not None:
        model, vocab_size = llama_like(asked)
        named = f"Llama-like, for {asked / 1e9:.4g} b"
    else:
        model, vocab_size = config.model, config.model.vocab_size or _vocab_size(config)
        named = f"of {config_path or 'the settings'}"
    if options.context_length is not None:
        model = model.model_copy(update={"context_length": options.context_length})
    micro_batch = options.micro_batch or (config.train.micro_batch if config_path else 1)
    recomputes = options.activation_checkpointing or config.train.activation_checkpointing
    bucket_mib = options.bucket_mib or config.fusion.bucket_mib
    every = options.every or config.fusion.every or 50
    cluster, sources = _cluster(options, measurement, bucket_mib)

    # Loads torch: not before the options have been found good.
    from hvdformer.models.decoder import estimate_memory, parameter_count

    parameters = parameter_count(model, vocab_size)
    memory = estimate_memory(
        model,
        vocab_size,
        micro_batch,
        options.precision,
        activation_checkpointing=recomputes,
        on_cpu=False,
    )
    if measurement is not None:
        work = work_measured(measurement, parameters)
        before = round(measurement.alone["parameters"])
        scaled = "" if before == parameters else f", in proportion for {parameters:,}"
        sources.append(
            f"compute: measured, a step of {seconds_text(measurement.alone['step_seconds'])} at np 1 with {before:,} "
            f"parameters{scaled}; each rank does as much work as that one did"
        )
    else:
        tflops, mfu = options.tflops or H100_TFLOPS, options.mfu or MFU
        rate = tflops * 1e12 * mfu
        work = work_of(
            model,
            vocab_size,
            parameters,
            micro_batch,
            options.accumulate,
            rate,
            options.memory_bandwidth,
            recomputes,
        )
        sources.append(
            f"compute: {tflops:g} TFLOP/s {'as given' if options.tflops else 'of an H100 SXM (data sheet, bf16)'} "
            f"x MFU {mfu:g} {'as given' if options.mfu else '(assumed)'}; memory {in_units(options.memory_bandwidth, 'B/s')}"
        )
    rows = []
    for kind in kinds(cluster.size * options.accumulate):
        if kind.name == "adasum" and cluster.size & (cluster.size - 1):
            continue
        steps = {
            mib: predict(kind, work, cluster, mib, every)["step_seconds"]
            for mib in (*_BUCKETS_MIB, bucket_mib)
        }
        best = min(steps, key=lambda mib: steps[mib])
        parts = memory_of(kind, memory, parameters, cluster.size)
        rows.append(
            {
                **predict(kind, work, cluster, bucket_mib, every),
                "memory_bytes": sum(parts.values()),
                "memory": parts,
                "fits": sum(parts.values()) <= options.memory,
                "best_bucket_mib": best,
                "step_seconds_at_best_bucket": steps[best],
            }
        )
    return {
        "model": {
            "named": named,
            "parameters": parameters,
            "vocab_size": vocab_size,
            **{key: getattr(model, key) for key in ("width", "layers", "heads", "context_length")},
            "tie_embeddings": model.tie_embeddings,
        },
        "gpus": cluster.size,
        "nodes": cluster.nodes,
        "gpus_per_node": cluster.local,
        "micro_batch": micro_batch,
        "micro_batches_per_gpu": options.accumulate,
        "tokens_per_step": work.tokens * cluster.size if work.tokens else None,
        "precision": options.precision,
        "activation_checkpointing": recomputes,
        "bucket_mib": bucket_mib,
        "every": every,
        "memory_per_gpu": options.memory,
        "one_gpu_step_seconds": work.seconds,
        "one_gpu_compute_seconds": work.compute_seconds,
        "overlap_window_seconds": work.window_seconds,
        "constants": {
            key: value for key, value in asdict(cluster).items() if key not in ("size", "per_node")
        },
        "sources": sources,
        "kinds": rows,
    }


def _vocab_size(config: Config) -> int:
    path = config.data.mix[0].path if config.data.mix else config.data.path
    if path is None:
        return 257  # bytes, as the default data
    from hvdformer.data.shards import open_shards

    return open_shards(Path(path), "train").vocab_size


def _cluster(
    options: Options, measurement: Measurement | None, bucket_mib: float
) -> tuple[Cluster, list[str]]:
    """The cluster of the options and the measurement, and sentences on where its constants come from."""
    efficiency = options.link_efficiency or LINK_EFFICIENCY
    cluster = Cluster(
        size=options.gpus,
        per_node=options.gpus_per_node or min(8, options.gpus),
        bandwidth=(options.bandwidth or NDR_PORT) * efficiency,
        intra_bandwidth=(options.intra_bandwidth or H100_LINK) * efficiency,
        latency=NCCL_LATENCY if options.latency is None else options.latency,
        intra_latency=NCCL_INTRA_LATENCY if options.intra_latency is None else options.intra_latency,
        cycle=CYCLE_SECONDS if options.cycle is None else options.cycle,
        algorithm=options.algorithm,
        contention=options.contention,
    )
    found: dict[str, str] = {}
    if measurement is not None:
        fitted, found = cluster_measured(cluster, measurement, bucket_mib)
        cluster = replace(
            fitted, **{key: getattr(cluster, key) for key in _LINKS if getattr(options, key) is not None}
        )
    sources = []
    for name, rate, latency, otherwise in (
        ("network of a node", "bandwidth", "latency", "one NDR port"),
        ("within a node, one GPU", "intra_bandwidth", "intra_latency", "NVLink of an H100"),
    ):
        parts = []
        for key, unit, default in ((rate, "bandwidth", otherwise), (latency, "latency", "NCCL's tuning.cc")):
            value = getattr(cluster, key)
            shown = in_units(value, "B/s") if unit == "bandwidth" else f"{seconds_text(value)} a message"
            origin = "as given" if getattr(options, key) is not None else found.get(key, default)
            if unit == "bandwidth" and not origin.startswith("measured"):
                assumed = "" if options.link_efficiency else ", assumed"
                origin = f"{efficiency:g} of nominal{assumed}; {origin}"
            parts.append(f"{shown} ({origin})")
        sources.append(f"{name}: {', '.join(parts)}")
    return cluster, sources


def table(result: dict[str, Any]) -> str:
    """The plan as text."""
    model = result["model"]
    width = f"width {model['width']:,}, {model['layers']} layers, {model['heads']} heads, vocabulary {model['vocab_size']:,}"
    tied = "one embedding" if model["tie_embeddings"] else "an output layer of its own"
    tokens = result["tokens_per_step"]
    lines = [
        f"model: {model['parameters']:,} parameters ({model['named']}): {width}, {tied}, context {model['context_length']:,}",
        f"ranks: {result['gpus']} on {result['nodes']} x {result['gpus_per_node']} GPUs; a step: {result['micro_batches_per_gpu']} "
        f"micro-batch{'es' if result['micro_batches_per_gpu'] > 1 else ''} of {result['micro_batch']} a GPU"
        + (f", {tokens:,} tokens in all" if tokens else "")
        + f"; {result['precision']}{', activations recomputed' if result['activation_checkpointing'] else ''}",
        *result["sources"],
        f"a step on one GPU: {seconds_text(result['one_gpu_step_seconds'])}, of which backward of the last micro-batch, which "
        f"hides communication, {seconds_text(result['overlap_window_seconds'])}; fusion.bucket_mib {result['bucket_mib']:g}",
        "",
    ]
    head = ["fusion", "memory a GPU", "sent a step", "communication", "exposed", "step", "efficiency"]
    if tokens:
        head.append("tokens/s")
    rows = [head]
    for row in result["kinds"]:
        name = row["fusion"]
        if name in ("local_sgd", "diloco"):
            name += f":every={result['every']}"
        cells = [
            name,
            in_units(row["memory_bytes"], "B") + ("" if row["fits"] else " (too much)"),
            in_units(row["bytes_sent"], "B"),
            seconds_text(row["communication_seconds"]),
            seconds_text(row["exposed_communication_seconds"]),
            seconds_text(row["step_seconds"]),
            f"{100 * row['efficiency']:.1f} %",
        ]
        if tokens:
            cells.append(f"{row['tokens_per_second']:,.0f}")
        rows.append(cells)
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    for row in rows:
        first, *others = (
            f"{cell:<{w}}" if not c else f"{cell:>{w}}"
            for c, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *others]).rstrip())
    lines += ["", *_notes(result)]
    return "\n".join(lines)


def _notes(result: dict[str, Any]) -> list[str]:
    first = result["kinds"][0]
    parts = ", ".join(f"{part} {in_units(size, 'B')}" for part, size in first["memory"].items() if size)
    notes = [f"memory of {first['fusion']}: {parts}"]
    better: dict[int, list[str]] = {}
    for row in result["kinds"]:
        gain = row["step_seconds"] / row["step_seconds_at_best_bucket"]
        if gain > 1.02:
            better.setdefault(row["best_bucket_mib"], []).append(f"{row['fusion']} {gain:.3g} x")
    notes += [
        f"faster with fusion.bucket_mib={mib}: {', '.join(names)}" for mib, names in sorted(better.items())
    ]
    if not any(row["fits"] for row in result["kinds"]):
        notes.append(
            f"no kind fits into {in_units(result['memory_per_gpu'], 'B')}: every rank holds the whole model; take fewer "
            "parameters, --activation-checkpointing, or a smaller micro-batch"
        )
    notes.append("local_sgd and diloco: efficiency is of tokens; they may need more of them (docs/fusion.md)")
    if not any(row["fusion"] == "adasum" for row in result["kinds"]):
        notes.append(f"adasum takes 2, 4, 8, ... ranks, not {result['gpus']}")
    return notes
