"""The model behind `hvdformer plan`: against closed forms, brute force, published runs and what the code itself counts."""

import dataclasses
import itertools
import json
import math
import os
import random
import subprocess
import sys

import pytest

from benchmarks import plan_check
from hvdformer import plan
from hvdformer.config import ModelConfig
from hvdformer.errors import UserError
from hvdformer.models.decoder import Decoder, estimate_memory, parameter_count
from tests import jobs

# Numbers with units


@pytest.mark.parametrize(
    "reader,text,value",
    [
        (plan.parse_count, "7b", 7_000_000_000),
        (plan.parse_count, "350M", 350_000_000),
        (plan.parse_count, "1.3 t", 1_300_000_000_000),
        (plan.parse_count, "6,738,415,616", 6_738_415_616),
        (plan.parse_count, "6_738_415_616", 6_738_415_616),
        (plan.parse_count, "124k", 124_000),
        (plan.parse_rate, "400Gbit", 50e9),
        (plan.parse_rate, "400Gbit/s", 50e9),
        (plan.parse_rate, "25Gbps", 3.125e9),
        (plan.parse_rate, "100Gb/s", 12.5e9),
        (plan.parse_rate, "100GB/s", 100e9),
        (plan.parse_rate, "1.6 Tbit", 200e9),
        (plan.parse_rate, "3.35TB", 3.35e12),
        (plan.parse_rate, "100mbit", 12.5e6),
        (plan.parse_bytes, "80GB", 80e9),
        (plan.parse_bytes, "12GiB", 12 * 2**30),
        (plan.parse_bytes, "512 mib", 512 * 2**20),
        (plan.parse_seconds, "14us", 14e-6),
        (plan.parse_seconds, "0.5ms", 5e-4),
        (plan.parse_seconds, "0s", 0.0),
    ],
)
def test_a_text_with_a_unit(reader, text, value):
    assert reader(text) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    "reader,text",
    [
        *(
            (plan.parse_count, text)
            for text in ("", "b", "-7b", "7x", "7 GB", "0", "nan", "inf", "1e999", "7b7")
        ),
        *(
            (plan.parse_rate, text)
            for text in ("400", "400G", "Gbit", "-1Gbit", "0Gbit", "400Gbit/h", "12gold")
        ),
        *((plan.parse_bytes, text) for text in ("80", "80Gbit", "80GB/s", "0GB", "many")),
        *((plan.parse_seconds, text) for text in ("14", "14 min", "-1us", "us", "1S")),
    ],
)
def test_a_text_without_the_unit_is_refused_with_an_example(reader, text):
    with pytest.raises(UserError, match="expected .* such as") as error:
        reader(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize(
    "value,unit,text",
    [
        (55.2e9, "B", "55.2 GB"),
        (3.31e9, "B", "3.31 GB"),
        (0, "B", "0 B"),
        (999.96e9, "B", "1 TB"),
        (156e9, "B", "156 GB"),
    ],
)
def test_numbers_are_shown_with_three_digits(value, unit, text):
    assert plan.in_units(value, unit).replace("1.00 T", "1 T") == text


@pytest.mark.parametrize(
    "value,text", [(0, "0 s"), (1.5, "1.50 s"), (0.0153, "15.3 ms"), (3.4e-6, "3.40 us"), (250, "250 s")]
)
def test_times_are_shown_in_the_unit_that_reads_best(value, text):
    assert plan.seconds_text(value) == text


# The shape of so many parameters


@pytest.mark.parametrize(
    "asked,tolerance",
    [
        (1e6, 0.07),
        (5e6, 0.03),
        (30e6, 0.02),
        *((p, 0.02) for p in (124e6, 350e6, 1.3e9, 7e9, 13e9, 70e9, 1e12)),
    ],
)
def test_a_shape_has_about_the_parameters_asked_for_and_trains(asked, tolerance):
    config, vocab_size = plan.llama_like(round(asked))
    assert parameter_count(config, vocab_size) == pytest.approx(asked, rel=tolerance)
    assert config.width % config.heads == 0 and (config.width // config.heads) in (64, 128)


def test_seven_billion_parameters_are_the_shape_of_llama_7b():
    config, vocab_size = plan.llama_like(
        6_738_415_616
    )  # arXiv 2302.13971, table 2: width 4,096, 32 layers, 32 heads
    assert (config.width, config.layers, config.heads, vocab_size) == (4096, 32, 32, 32_000)


@pytest.mark.parametrize("width,tied,vocab_size", [(64, True, 257), (128, False, 1000), (192, True, 300)])
def test_parameters_in_closed_form_are_those_of_the_model(width, tied, vocab_size):
    config = ModelConfig(width=width, layers=3, heads=width // 64, tie_embeddings=tied)
    real = sum(p.numel() for p in Decoder(config, vocab_size).parameters())
    assert 3 * plan._block_parameters(width) + plan._outside_blocks(width, vocab_size, tied) == real


def test_too_few_parameters_for_any_shape_are_refused():
    with pytest.raises(UserError, match="less than one layer"):
        plan.llama_like(1000)


def test_operations_of_a_token_are_those_that_torch_counts():
    """torch's own counter over one forward and backward; attention is counted whole there too, not its causal half."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config = ModelConfig(width=128, layers=3, heads=2, context_length=64)
    model = Decoder(config, 300)
    tokens = torch.randint(300, (2, 64))
    # The kernel that is written in matrix products: the counter sees them.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens).sum().backward()
    counted = counter.get_total_flops() / tokens.numel()
    parameters = parameter_count(config, 300)
    # 6 N counts the gains of the norms as well, 2 D a layer, which are no matrix products.
    assert plan.flops_per_token(config, 300, parameters) == pytest.approx(counted, rel=0.01)


# Collectives


def cluster(**values):
    defaults = {"size": 16, "per_node": 4, "bandwidth": 1e9, "intra_bandwidth": 8e9, "latency": 1e-4}
    return plan.Cluster(**{**defaults, "intra_latency": 1e-5, "base_latency": 0.0, **values})


def simulate_ring(size, per_node, nbytes, latency, intra_latency, bandwidth, intra_bandwidth, rounds):
    """Step by step: in each, every rank hands 1/n of the buffer to the next, and waits for what it gets.

    For chunks so large that bandwidth is all, and so small that latency is all, the closed form must say the same.
    """
    done = [0.0] * size
    for _ in range(rounds):
        arrived = []
        for rank in range(size):
            source = (rank - 1) % size
            crosses = source // per_node != rank // per_node
            takes = (latency if crosses else intra_latency) + nbytes / size / (
                bandwidth if crosses else intra_bandwidth
            )
            arrived.append(max(done[source], done[rank]) + takes)
        done = arrived
    return max(done)


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("op,rounds", [("allreduce", 2), ("reducescatter", 1), ("allgather", 1)])
def test_a_ring_of_equal_links_takes_what_a_simulation_of_its_steps_takes(size, op, rounds):
    links = {"latency": 1e-4, "intra_latency": 1e-4, "bandwidth": 1e9, "intra_bandwidth": 1e9}
    simulated = simulate_ring(size, 1, 4e6, **links, rounds=rounds * (size - 1))
    assert cluster(size=size, per_node=1, algorithm="ring", **links).seconds(op, 4e6) == pytest.approx(
        simulated
    )


def test_a_ring_over_nodes_is_as_fast_as_its_slowest_link():
    """By bandwidth alone, as a simulation has it: each step waits for the network."""
    links = {"latency": 0.0, "intra_latency": 0.0, "bandwidth": 1e9, "intra_bandwidth": 8e9}
    simulated = simulate_ring(16, 4, 4e6, **links, rounds=30)
    assert cluster(**links, algorithm="ring").seconds("allreduce", 4e6) == pytest.approx(simulated)


def test_an_all_to_all_carries_what_its_messages_add_up_to():
    """Counted message by message: what leaves a node, and what leaves a GPU."""
    nbytes, size, per_node = 16e6, 16, 4
    network, link = [0.0] * 4, [0.0] * size
    for source, target in itertools.permutations(range(size), 2):
        link[source] += nbytes / size
        if source // per_node != target // per_node:
            network[source // per_node] += nbytes / size
    free = {"latency": 0.0, "intra_latency": 0.0}
    assert cluster(**free).seconds("alltoall", nbytes) == pytest.approx(max(network) / 1e9)
    fast = cluster(**free, bandwidth=1e15)
    assert fast.seconds("alltoall", nbytes) == pytest.approx(max(link) / 8e9)


def test_a_tree_wins_where_latency_counts_and_a_ring_where_bytes_do():
    ring, tree, auto = (cluster(size=512, per_node=8, algorithm=a) for a in ("ring", "tree", "auto"))
    assert tree.seconds("allreduce", 1e4) < ring.seconds("allreduce", 1e4) / 10
    assert ring.seconds("allreduce", 1e10) < tree.seconds("allreduce", 1e10)
    for nbytes in (1e4, 1e6, 1e8, 1e10):
        both = [ring.seconds("allreduce", nbytes), tree.seconds("allreduce", nbytes)]
        assert auto.seconds("allreduce", nbytes) == min(both)


@pytest.mark.parametrize("op", ["allreduce", "reducescatter", "allgather", "alltoall", "adasum"])
def test_alone_there_is_nothing_to_send(op):
    assert cluster(size=1).seconds(op, 1e9) == 0 == plan.sent(op, 1e9, 1)


def test_a_node_that_is_not_full_is_refused():
    with pytest.raises(UserError, match="12 GPUs do not fill nodes of 8"):
        cluster(size=12, per_node=8)


@pytest.mark.parametrize(
    "buckets,window,expected",
    [
        ([1.0], 10.0, 1.0),  # the last bucket is full when backward ends: nothing hides it
        ([1.0] * 10, 10.0, 1.0),
        ([2.0] * 10, 10.0, 11.0),  # a link that is too slow never rests after the first second
        ([0.0] * 10, 10.0, 0.0),
        ([3.0, 1.0], 4.0, 2.0),  # starts at 2 and at 5, ends at 6
    ],
)
def test_what_backward_does_not_hide(buckets, window, expected):
    assert plan.exposed_after(buckets, window) == pytest.approx(expected)


def test_what_is_exposed_lies_between_the_last_bucket_and_all_of_them():
    chance = random.Random(1)
    for _ in range(200):
        buckets = [chance.random() for _ in range(chance.randint(1, 20))]
        exposed = plan.exposed_after(buckets, chance.random() * 20)
        assert buckets[-1] - 1e-12 <= exposed <= sum(buckets) + 1e-12


# Kinds of fusion

WORK = plan.Work(0.3, 0.2, 0.05, 100_000_000, 4096)


def test_bytes_and_state_are_those_of_the_documentation():
    """docs/fusion.md has the same for each kind, in P parameters."""
    text = (jobs.ROOT / "docs" / "fusion.md").read_text()
    by_name = {kind.name: kind for kind in plan.kinds(8)}
    rows = {
        "allreduce": "`allreduce`",
        "exact": "`exact`",
        "zero1": "`zero1`",
        "local_sgd": "`local_sgd`",
        "diloco": "`diloco`",
    }
    rows |= {f"allreduce:wire={w}": f"`allreduce`, `wire: {w}`" for w in ("bf16", "fp16")} | {
        "adasum": "`adasum`"
    }
    assert set(rows) == set(by_name)
    for name, title in rows.items():
        line = next(line for line in text.splitlines() if line.startswith(f"| {title} |"))
        sent, kept = (cell.strip() for cell in line.split("|")[3:5])
        kind = by_name[name]
        number = sum(plan.sent(op, width, 2) * 2 for op, width, _ in kind.collectives)  # (n-1)/n is 1/2
        assert sent.startswith(f"{number:.0f} P (n-1)/n"), (name, sent, number)
        assert kept.startswith(f"{kind.state:.0f} P"), (name, kept, kind.state)
        assert ("/ n" in kept) == kind.shared


def test_above_64_micro_batches_exact_sends_and_keeps_64_bit_integers():
    narrow, wide = (next(k for k in plan.kinds(n) if k.name == "exact") for n in (64, 65))
    assert narrow.collectives[0][1] == 4 and wide.collectives[0][1] == 8 and wide.state - narrow.state == 4


@pytest.mark.parametrize("kind", plan.kinds(8), ids=lambda kind: kind.name)
def test_one_gpu_is_fully_efficient_and_a_better_network_never_slower(kind):
    alone = plan.predict(kind, WORK, cluster(size=1, per_node=1), 25, 50)
    assert alone["efficiency"] == 1 and alone["bytes_sent"] == 0 == alone["exposed_communication_seconds"]
    before = 0.0
    for bandwidth in (1e8, 1e9, 1e10, 1e12):
        found = plan.predict(kind, WORK, cluster(bandwidth=bandwidth), 25, 50)
        assert before <= found["efficiency"] <= 1.3  # zero1 updates 1/n of the model: it may gain
        assert found["exposed_communication_seconds"] <= found["communication_seconds"] + 0.01
        before = found["efficiency"]


def test_with_full_contention_nothing_is_hidden():
    kind = plan.kinds(8)[0]
    found = plan.predict(kind, WORK, cluster(contention=1.0), 25, 50)
    assert found["exposed_communication_seconds"] == pytest.approx(
        found["communication_seconds"] + cluster().cycle / 2
    )


def test_local_kinds_send_three_times_as_much_every_so_many_steps():
    allreduce, local = (
        next(k for k in plan.kinds(8) if k.name == name) for name in ("allreduce", "local_sgd")
    )
    each, now_and_then = (plan.predict(kind, WORK, cluster(), 25, 50) for kind in (allreduce, local))
    assert now_and_then["bytes_sent"] == pytest.approx(3 / 50 * each["bytes_sent"], rel=1e-6)


def test_memory_is_the_estimate_of_the_model_with_the_state_of_the_kind():
    config = ModelConfig(width=128, layers=2, heads=2, context_length=64)
    parameters = parameter_count(config, 300)
    estimate = estimate_memory(config, 300, 2, "bf16", activation_checkpointing=False, on_cpu=False)
    found = {k.name: plan.memory_of(k, estimate, parameters, 8) for k in plan.kinds(8)}
    assert {k: v for k, v in found["allreduce"].items() if k != "fusion buffers"} == estimate
    assert found["zero1"]["optimizer"] == round(estimate["optimizer"] / 8)
    assert found["diloco"]["optimizer"] == 2 * estimate["optimizer"]
    assert plan.memory_of(plan.kinds(8)[4], estimate, parameters, 1)["fusion buffers"] == 0


# Published runs


def test_published_runs_are_met_as_closely_as_the_documentation_says():
    """One set of constants. The error of BERT-large is large, and stays in the table."""
    rows = plan_check.published()
    errors = {(row["model"], row["gpus"]): row["error"] for row in rows}
    assert len(rows) == 7
    for model in ("Inception V3", "ResNet-101"):
        assert abs(errors[model, 512]) < 0.04 and abs(errors[model, 128]) < 0.04
    assert -0.12 < errors["VGG-16", 512] < 0 and -0.20 < errors["VGG-16", 128] < 0
    assert 0.30 < errors["BERT-large", 256] < 0.45
    page = (jobs.ROOT / "docs" / "plan.md").read_text()
    for line in plan_check.published_table().splitlines():
        assert line in page, "docs/plan.md is not what python -m benchmarks.plan_check --published prints"


def test_the_order_of_the_published_models_is_right():
    """Of the runs with one network: VGG-16, which sends three times as much in a shorter step, scales worst."""
    at_512 = {row["model"]: row["predicted"] for row in plan_check.published() if row["gpus"] == 512}
    assert at_512["VGG-16"] < at_512["Inception V3"] - 0.15 and at_512["VGG-16"] < at_512["ResNet-101"] - 0.15


def test_the_runs_on_a_slow_network_are_met_as_closely_as_the_documentation_says():
    """Six kinds of fusion, measured on two hosts at 100 Mbit/s; only computing is taken from one of them."""
    rows = {row["fusion"].split(":outer")[0]: row for row in plan_check.network()}
    assert len(rows) == 6
    for fusion, row in rows.items():
        assert abs(row["error"]) < 0.135, fusion
    assert sum(row["is_calibration"] for row in rows.values()) == 1
    page = (jobs.ROOT / "docs" / "plan.md").read_text()
    for line in plan_check.network_table().splitlines():
        assert line in page, "docs/plan.md is not what python -m benchmarks.plan_check --network prints"


# Measurement


def measured(tmp_path, **changes):
    content = {
        "machine": "any other key is ignored",
        "runs": [
            {
                "np": 1,
                "step_seconds": 0.5,
                "backward_seconds": 0.3,
                "exposed_communication_seconds": 0,
                "bytes_sent": 0,
                "parameters": 5_000_000,
            },
            {
                "np": 4,
                "step_seconds": 0.6,
                "backward_seconds": 0.3,
                "exposed_communication_seconds": 0.1,
                "bytes_sent": 30_000_000,
                "parameters": 5_000_000,
            },
        ],
        **changes,
    }
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(content))
    return path


def test_latency_and_bandwidth_are_found_again_in_allreduces_that_have_them():
    true = cluster(size=4, per_node=4, intra_bandwidth=3e9, intra_latency=2e-5)
    points = [{"np": 4, "bytes": b, "seconds": true.seconds("allreduce", b)} for b in (1e3, 1e5, 1e6, 1e7)]
    latency, bandwidth = plan.fit_allreduce(points)
    assert latency == pytest.approx(2e-5) and bandwidth == pytest.approx(3e9)


def test_a_bandwidth_is_found_again_in_the_exposed_time_that_it_gives():
    true = cluster(size=4, per_node=4, bandwidth=4e8, intra_bandwidth=4e8)
    work = plan.Work(0.5, 0.01, 0.0, 5_000_000, None)
    exposed = plan.predict(plan.kinds(1)[0], work, true, 2, 1)["exposed_communication_seconds"]
    run = {"np": 4, "step_seconds": 0.5, "backward_seconds": 0.01, "exposed_communication_seconds": exposed}
    run |= {"bytes_sent": 1, "parameters": 5_000_000, "micro_batches_per_rank": 1, "nodes": 1}
    assert plan.fit_bandwidth(
        run, dataclasses.replace(true, bandwidth=1, intra_bandwidth=1), 2
    ) == pytest.approx(4e8)


@pytest.mark.parametrize(
    "points", [[], [{"np": 2, "bytes": 10, "seconds": 1}], [{"np": 2, "bytes": 10, "seconds": 1}] * 3]
)
def test_too_few_allreduces_are_refused(points):
    with pytest.raises(UserError, match="two different sizes"):
        plan.fit_allreduce(points)


def test_a_plan_from_a_measurement_has_its_step_and_its_links(tmp_path):
    path = measured(tmp_path)
    result = plan.plan(plan.Options(gpus=1, parameters=5_000_000, measured=path))
    scale = result["model"]["parameters"] / 5_000_000
    assert result["one_gpu_step_seconds"] == pytest.approx(0.5 * scale)
    at_4 = plan.plan(plan.Options(gpus=4, parameters=5_000_000, measured=path, gpus_per_node=4))
    exposed = at_4["kinds"][0]["exposed_communication_seconds"]
    # Predicted for the very run that was measured, but for the few parameters that the shape has less.
    assert exposed == pytest.approx(0.1, rel=0.15)
    assert "what the run at np 4 exposed" in " ".join(at_4["sources"])
    wins = plan.plan(
        plan.Options(gpus=4, parameters=5_000_000, measured=path, intra_bandwidth=1e9, link_efficiency=1.0)
    )
    assert wins["constants"]["intra_bandwidth"] == 1e9


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"runs": []}, "expected"),
        ({"runs": [{"np": 2}]}, "step_seconds is None"),
        ({"runs": [{"np": 1, "step_seconds": "fast"}]}, "step_seconds is 'fast'"),
        ({"allreduce": 3}, "allreduce: expected a list"),
    ],
)
def test_a_file_that_is_no_measurement_is_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        plan.read_measurement(measured(tmp_path, **changes))


def test_a_file_without_np_1_or_without_json_is_refused(tmp_path):
    path = measured(tmp_path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({"runs": content["runs"][1:]}))
    with pytest.raises(UserError, match="no run with np 1"):
        plan.read_measurement(path)
    path.write_text("no JSON")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        plan.read_measurement(path)


# The command


def command(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "hvdformer", "plan", *arguments],
        capture_output=True,
        text=True,
        env={**jobs.environment(), "PYTHONPATH": os.pathsep.join([str(jobs.ROOT)])},
        cwd=jobs.ROOT,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_the_command_of_the_documentation():
    code, output, errors = command("--params", "7b", "--gpus", "512", "--bandwidth", "400Gbit")
    assert code == 0, errors
    for name in (
        "allreduce",
        "allreduce:wire=bf16",
        "allreduce:wire=fp16",
        "exact",
        "zero1",
        "adasum",
        "local_sgd",
        "diloco",
    ):
        assert f"\n{name}" in output
    assert "Llama-like" in output and "64 x 8 GPUs" in output and "assumed" in output and "too much" in output


def test_json_holds_what_the_table_shows():
    settings = (
        "configs/llama-1b.yaml",
        "--gpus",
        "16",
        "--tflops",
        "312",
        "--mfu",
        "0.5",
        "--memory",
        "40GB",
        "--json",
    )
    code, output, errors = command(
        *settings, "--bandwidth", "200Gbit", "--link-efficiency", "1", "--accumulate", "2"
    )
    assert code == 0, errors
    result = json.loads(output)
    assert result["model"]["parameters"] == 1_235_814_400  # as `train --dry-run` says
    assert result["constants"]["bandwidth"] == 25e9 and result["activation_checkpointing"] is True
    assert result["tokens_per_step"] == 16 * 2 * 2 * 4096
    row = result["kinds"][0]
    assert sum(row["memory"].values()) == row["memory_bytes"] and row["fits"] == (row["memory_bytes"] <= 40e9)
    flops = plan.flops_per_token(
        ModelConfig(width=2048, layers=16, heads=32, context_length=4096), 128256, 1_235_814_400
    )
    # Recomputing adds a third to the time of the operations that count.
    assert result["one_gpu_compute_seconds"] == pytest.approx(4 * 4096 * flops * 4 / 3 / (312e12 * 0.5))
    assert row["tokens_per_second"] == pytest.approx(result["tokens_per_step"] / row["step_seconds"])


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--gpus", "8"], "give --params"),
        (["--gpus", "8", "--params", "7q"], "--params: '7q': expected a count"),
        (["--gpus", "8", "--params", "7b", "--bandwidth", "400"], "--bandwidth: '400': expected a bandwidth"),
        (["--gpus", "12", "--params", "7b"], "12 GPUs do not fill nodes of 8"),
        (["--gpus", "8", "--params", "7b", "--measured", "nowhere.json"], "nowhere.json"),
        (["--gpus", "8", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_a_mistake_is_told_in_one_line_with_exit_code_2(arguments, message):
    code, output, errors = command(*arguments)
    assert code == 2 and not output and message in errors and errors.count("\n") == 1


def test_importing_it_loads_neither_torch_nor_horovod():
    program = "import sys, hvdformer.plan; print([m for m in ('torch', 'horovod', 'numpy', 'pydantic') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=jobs.environment()
    )
    assert done.stdout.strip() == "[]"


def test_a_larger_cluster_needs_more_of_everything_but_zero1():
    """Sanity over sizes: efficiency falls, memory stays, and zero1's falls."""
    found = [plan.plan(plan.Options(gpus=n, parameters=350_000_000, bucket_mib=64)) for n in (8, 64, 512)]
    for index, row in enumerate(found[0]["kinds"]):
        efficiencies = [f["kinds"][index]["efficiency"] for f in found]
        assert efficiencies == sorted(efficiencies, reverse=True), row["fusion"]
    zero1 = [next(r for r in f["kinds"] if r["fusion"] == "zero1")["memory"]["optimizer"] for f in found]
    assert zero1[0] == pytest.approx(64 * zero1[2], rel=1e-6)
    assert not math.isnan(sum(row["step_seconds"] for row in found[2]["kinds"]))
