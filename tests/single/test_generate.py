"""Generation: the cache changes no token, and sampling keeps what it should."""

import pytest
import torch

from hvdformer.data.tokenizer import Tokenizer
from hvdformer.generate import generate, generate_ids, sample
from tests.single.test_model import GPT2, make, tokens


@pytest.mark.parametrize("settings", [[], GPT2, ["kv_heads=2"]], ids=["modern", "gpt2", "grouped"])
def test_greedy_with_the_cache_equals_greedy_without(settings):
    model = make(*settings)
    prompt = [5, 6, 7]
    found = list(generate_ids(model, prompt, max_new_tokens=25, temperature=0))
    ids = list(prompt)
    for _ in range(25):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert found == ids[3:]


def test_beyond_the_context_the_newer_half_is_kept():
    model = make(context_length=16)
    prompt = list(range(40))  # longer than the context
    found = list(generate_ids(model, prompt, max_new_tokens=30, temperature=0))
    ids, seen = list(prompt), list(prompt[-16:])
    for _ in range(30):
        token = int(model(torch.tensor([seen]))[0, -1].argmax())
        ids.append(token)
        seen = [*seen, token] if len(seen) < 16 else ids[-8:]
    assert found == ids[40:]


def test_generation_does_not_compile():
    """Every token would: the cache grows, and each layer has its own number."""
    plain, compiled = make(), make()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for block in compiled.blocks:
        block.compile(backend=count)
    torch.testing.assert_close(compiled(tokens()), plain(tokens()))
    assert graphs
    graphs.clear()
    assert list(generate_ids(compiled, [1, 2], 8, temperature=0)) == list(
        generate_ids(plain, [1, 2], 8, temperature=0)
    )
    assert not graphs


def test_the_seed_decides_and_the_mode_is_given_back():
    model = make("dropout=0.5").train()
    greedy = [list(generate_ids(model, [1], 20, temperature=0)) for _ in range(2)]
    assert greedy[0] == greedy[1] == list(generate_ids(make(), [1], 20, temperature=0))  # no dropout
    runs = [list(generate_ids(model, [1], 20, temperature=1.0, seed=seed)) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert model.training


def draws(logits, **settings):
    generator = torch.Generator().manual_seed(0)
    arguments = {"temperature": 1.0, "top_k": None, "top_p": None} | settings
    return [sample(logits, generator=generator, **arguments) for _ in range(4000)]


def test_sampling_follows_the_probabilities():
    logits = torch.tensor([0.1, 0.6, 0.3]).log()
    counts = torch.bincount(torch.tensor(draws(logits)), minlength=3) / 4000
    torch.testing.assert_close(counts, torch.tensor([0.1, 0.6, 0.3]), rtol=0, atol=0.03)
    sharper = torch.bincount(torch.tensor(draws(logits, temperature=0.5)), minlength=3) / 4000
    torch.testing.assert_close(sharper, torch.tensor([0.01, 0.36, 0.09]) / 0.46, rtol=0, atol=0.03)


def test_top_k_and_top_p_keep_the_smallest_set():
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    assert set(draws(logits, top_k=1)) == {1} == set(draws(logits, temperature=0))
    assert set(draws(logits, top_k=2)) == {1, 3}
    assert set(draws(logits, top_p=0.49)) == {1}
    assert set(draws(logits, top_p=0.7)) == {1, 3}
    assert set(draws(logits, top_p=0.8)) == {1, 2, 3}
    assert set(draws(logits, top_p=1.0)) == {0, 1, 2, 3}
    # two of exactly a half: the first reaches p by itself
    assert set(draws(torch.zeros(2), top_p=0.5)) == {0}


def test_text_stops_at_the_end_of_the_document():
    class Scripted(torch.nn.Module):
        """Says "ab", then the end of the document, then "c"."""

        def __init__(self):
            super().__init__()
            self.config = make(context_length=16).config
            self.said = iter([97, 98, 256, 99])
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def hidden(self, tokens, cache):
            cache.length += tokens.shape[1]
            return torch.zeros(1, tokens.shape[1], 1)

        def unembed(self, hidden):
            return torch.nn.functional.one_hot(torch.tensor([next(self.said)]), 257).float()

    assert generate(Scripted(), Tokenizer.byte(), "x", max_new_tokens=9, temperature=0) == "ab"
    assert generate(Scripted(), Tokenizer.byte(), "", max_new_tokens=2, temperature=0) == "ab"
