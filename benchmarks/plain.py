"""One process without any framework: the loop that a good PyTorch user writes over the same model and data.

    OMP_NUM_THREADS=1 python -m benchmarks.plain key=value ...

The model is hvdformer's, and so are the examples of each step. The rest is PyTorch as its documentation shows it: logits,
`F.cross_entropy`, accumulated gradients, `clip_grad_norm_`, fused AdamW with weight decay on the matrices, a cosine schedule.
Prints one JSON object: the wall-clock time at the end of each step, and the loss of the last one.
"""

from __future__ import annotations

import json
import sys
import time

import torch
import torch.nn.functional as F

from benchmarks.workloads import load, open_loader
from hvdformer.config import Config
from hvdformer.data.loader import Batch
from hvdformer.optim import learning_rate
from hvdformer.precision import DTYPES
from hvdformer.tasks import causal_lm


def mean_loss(model: torch.nn.Module, batch: Batch, precision: str) -> torch.Tensor:
    """The mean cross-entropy of a micro-batch, as one writes it: all logits at once, in fp32 for the softmax."""
    with torch.autocast("cpu", dtype=DTYPES.get(precision, torch.bfloat16), enabled=precision != "fp32"):
        logits = model(batch.tokens[:, :-1])  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1).float(), batch.tokens[:, 1:].flatten())


def adamw(model: torch.nn.Module, config: Config) -> torch.optim.AdamW:
    """AdamW with the settings of hvdformer's, on the model's own tensors."""
    optim = config.optim
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": optim.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=optim.learning_rate, betas=(optim.beta1, optim.beta2), eps=optim.epsilon, fused=True
    )


def main(overrides: list[str]) -> None:
    config = load(overrides)
    train = config.train
    num_micro_batches = train.global_batch // train.micro_batch
    loader = open_loader(config, 0, 1)
    model = causal_lm.build_model(config)
    optimizer = adamw(model, config)
    times = []
    for step in range(train.steps):
        total = 0.0
        for batch in loader.step(step * train.global_batch):
            loss = mean_loss(model, batch, train.precision) / num_micro_batches
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optim, train.steps, step)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.time())
    loader.close()
    print(json.dumps({"times": times, "loss": total}))


if __name__ == "__main__":
    main(sys.argv[1:])
