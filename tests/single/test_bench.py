"""What is computed from the runs of a benchmark, and what is refused before one starts."""

import pytest

from benchmarks import throughput
from hvdformer import bench
from hvdformer.errors import UserError

# Steps of 2 s, but for the third, which is the last of the warm-up and took long.
TIMES = [10.0, 11.0, 100.0, 102.0, 104.0, 106.0]
LINES = [
    {"time": at, "data_seconds": 0.25, "fusion_seconds": 0.5, "bytes_sent": 1000 if at > 100 else 9}
    for at in TIMES
]


def test_a_step_is_timed_from_end_to_end_after_the_warm_up():
    split = bench.split_of(LINES, tokens=400)
    assert split["step_seconds"] == 2 and split["tokens_per_second"] == 200
    assert split["data_seconds"] == 0.25 and split["exposed_communication_seconds"] == 0.5
    assert split["bytes_sent"] == 1000


def test_parts_that_the_run_did_not_time_are_not_made_up():
    split = bench.split_of(LINES, tokens=400)
    assert [split[f"{part}_seconds"] for part in ("forward", "backward", "update", "other")] == [None] * 4
    whole = [
        {**line, "forward_seconds": 0.375, "backward_seconds": 0.625, "update_seconds": 0.125}
        for line in LINES
    ]
    split = bench.split_of(whole, tokens=400)
    assert split["forward_seconds"] == 0.375 and split["backward_seconds"] == 0.625
    assert split["other_seconds"] == 2 - 0.25 - 0.5 - 0.375 - 0.625 - 0.125


def run(rate, **more):
    return {"tokens_per_second": rate, "forward_seconds": None, "step_seconds": 100 / rate, **more}


# A machine that is twice as fast in the second repeat and slower in the third.
REPEATS = [
    {
        (1, "strong"): run(100 * speed),
        (2, "strong"): run(150 * speed),
        (2, "weak"): run(180 * speed),
        (2, "limit"): {"tokens_per_second": 200 * speed},
        (2, "horovod"): {"tokens_per_second": 125 * speed},
    }
    for speed in (1.0, 2.0, 0.5)
]


def test_ratios_do_not_depend_on_a_speed_that_drifts():
    strong, weak = bench.summary(REPEATS, 2, "strong"), bench.summary(REPEATS, 2, "weak")
    assert strong["tokens_per_second"] == 150 and strong["tokens_per_second_range"] == [75, 300]
    assert strong["strong_efficiency"] == 0.75 and strong["strong_efficiency_range"] == [0.75, 0.75]
    assert strong["of_limit"] == 0.75 and strong["of_horovod"] == pytest.approx(1.2)
    assert weak["weak_efficiency"] == 0.9 and "of_limit" not in weak and "strong_efficiency" not in weak
    alone = bench.summary(REPEATS, 1, "strong")
    assert alone["tokens_per_second"] == 100 and alone["forward_seconds"] is None
    assert not any("efficiency" in key or key.startswith("of_") for key in alone)


def test_what_is_not_known_is_not_shown():
    entry = {
        "np": 1,
        "scaling": "strong",
        "tokens_per_second": 1234.5,
        "tokens_per_second_range": [1200.0, 1300.0],
        "step_seconds": 0.5,
        "other_seconds": None,
        **dict.fromkeys(bench.PARTS),
    }
    results = {
        "runs": [entry],
        "launcher": "mpirun",
        "threads_per_rank": 2,
        "steps": 10,
        "warmup_steps": 3,
        "repeats": 1,
    }
    shown = bench.tables(results)
    assert "1,234" in shown and "500.0 ms" in shown
    assert "forward" not in shown.splitlines()[4] and "efficiency" not in shown.splitlines()[0]
    entry["forward_seconds"] = 0.25
    assert "250.0 ms" in bench.tables(results) and "forward" in bench.tables(results)


@pytest.mark.parametrize(
    "overrides,sizes,message",
    [
        (
            ["fusion.kind=diloco", "train.evaluate_every=0", "checkpoint.every=0"],
            [1, 2],
            "does not fuse in every step",
        ),
        (["train.global_batch=4"], [1, 4], "at most 2 ranks"),
    ],
)
def test_what_cannot_be_measured_is_refused(overrides, sizes, message):
    with pytest.raises(UserError, match=message):
        bench.prepare(None, overrides, sizes, 10, 1, "mpirun")


def test_a_rank_is_not_to_start_ranks(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="started it 2 times"):
        bench.prepare(None, [], [1, 2], 10, 1, "mpirun")


def test_ranks_that_slurm_would_spread_are_refused(monkeypatch):
    monkeypatch.setattr(bench.launching, "choose_launcher", lambda wanted, np, hosts, environment: "srun")
    with pytest.raises(UserError, match="give --launcher mpirun"):
        bench.prepare(None, [], [1, 2], 10, 1, "auto")


def test_one_rank_is_always_measured_and_threads_are_shared_at_the_largest_size(monkeypatch):
    monkeypatch.setattr(bench.tuning, "usable_cores", lambda: 8)
    monkeypatch.setattr(bench.launching, "choose_launcher", lambda wanted, np, hosts, environment: wanted)
    settings = bench.prepare(None, ["train.device=cpu"], [4, 2], 10, 1, "mpirun")
    assert settings.sizes == (1, 2, 4) and settings.threads == 2
    assert bench.prepare(None, ["train.device=cpu"], None, 10, 1, "mpirun").sizes == (1, 2, 4, 8)


def test_processes_that_do_not_communicate_take_a_gpu_each(monkeypatch):
    monkeypatch.setattr(bench.launching, "num_gpus", lambda environment: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [bench._one_gpu(n, "auto")["CUDA_VISIBLE_DEVICES"] for n in range(3)] == ["5", "7", "5"]
    assert bench._one_gpu(1, "cpu") == {}


def test_the_throughput_benchmark_takes_ratios_within_a_repeat():
    repeats = [
        {
            name: {"tokens_per_second": rate * speed, "peak_memory_bytes": [size, 1], "losses": [2.0]}
            for name, rate, size in (("limit", 200, 10), ("mpi", 190, 20), ("ddp", 160, 30), ("plain", 80, 5))
        }
        for speed in (1.0, 3.0)
    ]
    del repeats[1]["ddp"]
    rows = {row["variant"]: row for row in throughput.summary(repeats)}
    assert rows["mpi"]["of limit"] == {"median": 0.95, "min": 0.95, "max": 0.95}
    assert (
        rows["mpi"]["of ddp"]["median"] == pytest.approx(190 / 160) and rows["mpi"]["peak_memory_bytes"] == 20
    )
    assert rows["mpi"]["tokens_per_second"] == {"median": 380, "min": 190, "max": 570}
    assert "of plain" not in rows["mpi"] and "of limit" not in rows["plain"]
    assert "| hvdformer, MPI | 380 (190 to 570) | 0.95 (0.95 to 0.95) |" in throughput.table(
        list(rows.values())
    )


def test_processes_in_lockstep_wait_for_the_slowest_in_every_step():
    limit = {"tokens_per_second": 40.0, "step_seconds": [[1.0, 3.0], [2.0, 1.0]], "losses": [2.0]}
    lockstep = throughput.in_lockstep(limit, tokens=25)
    assert lockstep == {**limit, "tokens_per_second": 2 * 25 * 2 / 5, "step_seconds": [[2.0, 3.0]]}


def test_every_variant_has_each_place_in_turn():
    names = ["a", "b", "c", "d"]
    orders = [throughput.turned(names, repeat) for repeat in range(8)]
    assert all(sorted(order) == names for order in orders)
    assert {order[0] for order in orders} == set(names) and {order[-1] for order in orders} == set(names)


def test_variants_that_do_not_train_the_same_are_found():
    with pytest.raises(SystemExit, match="not the same training"):
        throughput.check_losses({"mpi": {"losses": [5.0]}, "ddp": {"losses": [5.2]}, "hf": {"losses": [9.0]}})
    throughput.check_losses({"mpi": {"losses": [5.0]}, "ddp": {"losses": [5.01]}, "hf": {"losses": [9.0]}})
