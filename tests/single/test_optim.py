"""The optimizer, its schedule and clipping, compared with torch's own."""

import math

import numpy as np
import pytest
import torch

from hvdformer.config import load_config
from hvdformer.optim import build_optimizer, learning_rate


def optim(*settings, steps=100):
    return load_config(None, [f"train.steps={steps}", *(f"optim.{setting}" for setting in settings)]).optim


def test_cosine_equals_torchs_own_schedulers():
    config = optim("learning_rate=1.0", "min_learning_rate=0.1", "warmup_steps=10")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, end_factor=1.0, total_iters=9)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=90, eta_min=0.1)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[9])
    for step in range(100):
        assert learning_rate(config, 100, step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
        optimizer.step()
        schedule.step()


def test_wsd_warms_up_stays_and_decays():
    config = optim(
        "schedule=wsd", "learning_rate=1.0", "min_learning_rate=0.0", "warmup_steps=10", "decay_steps=20"
    )
    rates = [learning_rate(config, 100, step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[10:80] == [1.0] * 70
    assert rates[80:] == pytest.approx([1 - (step + 1) / 20 for step in range(20)])
    default = optim("schedule=wsd", "learning_rate=1.0", "warmup_steps=10")
    assert [learning_rate(default, 100, step) for step in (79, 80)] == [
        1.0,
        pytest.approx(1 - (1 - 1e-4) / 20),
    ]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_every_schedule_ends_where_it_should_and_never_stands_at_zero(schedule, warmup):
    config = optim(f"schedule={schedule}", f"warmup_steps={warmup}", steps=7)
    rates = [learning_rate(config, 7, step) for step in range(7)]
    assert all(0 < rate <= config.learning_rate and math.isfinite(rate) for rate in rates)
    if schedule != "constant" and warmup < 7:
        assert rates[-1] == pytest.approx(config.min_learning_rate)


def test_decay_on_matrices_only():
    """With a learning rate and gradients of zero, only the decay moves a weight: by 1 - rate * decay."""
    matrix, vector = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    optimizer = build_optimizer(
        [matrix], [vector], optim("learning_rate=0.5", "weight_decay=0.2"), torch.device("cpu")
    )
    matrix.grad, vector.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    assert torch.allclose(matrix, torch.full((2, 2), 0.9)) and torch.equal(vector, torch.ones(2))


def test_updates_equal_the_formula_of_adamw():
    """Algorithm 2 of arXiv 1711.05101 in NumPy, in fp64, with settings that tell each coefficient from the others."""
    config = optim("learning_rate=0.1", "weight_decay=0.2", "beta1=0.7", "beta2=0.9", "epsilon=0.05")
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 6).reshape(2, 3))
    optimizer = build_optimizer([parameter], [], config, torch.device("cpu"))
    weights = parameter.detach().double().numpy().copy()
    mean, square = np.zeros((2, 3)), np.zeros((2, 3))
    random = np.random.default_rng(0)
    for step in range(1, 6):
        gradient = random.standard_normal((2, 3))
        parameter.grad = torch.tensor(gradient, dtype=torch.float32)
        optimizer.step()
        mean = 0.7 * mean + 0.3 * gradient
        square = 0.9 * square + 0.1 * gradient**2
        denominator = np.sqrt(square / (1 - 0.9**step)) + 0.05
        weights -= 0.1 * (mean / (1 - 0.7**step) / denominator + 0.2 * weights)
    # fp32 against fp64: 6e-8 of weights near 1, five times over
    np.testing.assert_allclose(parameter.detach().numpy(), weights, rtol=0, atol=1e-6)
