"""Flat buckets: the model and its buckets are one memory."""

import torch

from hvdformer.distributed.buckets import flatten


def make(*sizes):
    return [(f"p{number}", torch.nn.Parameter(torch.randn(size))) for number, size in enumerate(sizes)]


def test_buckets_depend_on_shapes_alone_and_hold_every_parameter_once():
    named = make((10, 1), (100_000, 1), (7,), (10, 1), (20, 1), (300_000, 1), (9,))
    buckets = flatten(named, bucket_mib=1.0)
    assert [bucket.names for bucket in buckets] == [("p5",), ("p4", "p3", "p1", "p0"), ("p6", "p2")]
    assert [bucket.decays for bucket in buckets] == [True, True, False]


def test_an_update_of_the_bucket_is_an_update_of_the_model_and_backward_fills_it():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    reference = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    reference.load_state_dict(model.state_dict())
    buckets = flatten(model.named_parameters(), bucket_mib=1.0)
    optimizers = [
        torch.optim.AdamW([b.flat for b in buckets], lr=0.1),
        torch.optim.AdamW(reference.parameters(), lr=0.1),
    ]
    for step in range(3):
        inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        for each, optimizer in zip((model, reference), optimizers, strict=True):
            each(inputs).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    moments = {
        name: view for b in buckets for name, view in b.views(optimizers[0].state[b.flat]["exp_avg"]).items()
    }
    for name, parameter in reference.named_parameters():
        assert torch.equal(moments[name], optimizers[1].state[parameter]["exp_avg"])
