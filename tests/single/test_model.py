"""The model, compared with Hugging Face's GPT-2 and Llama at equal weights."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hvdformer.config import load_config
from hvdformer.data.loader import Batch
from hvdformer.models.decoder import Decoder, estimate_memory, parameter_count
from hvdformer.models.layers import KeyValueCache
from hvdformer.tasks import causal_lm
from tests.jobs import ROOT

VOCAB = 97
GPT2 = ["norm=layernorm", "positions=learned", "activation=gelu_tanh", "bias=true"]


def model_config(*settings, width=48, layers=3, heads=4, context_length=32):
    shape = [f"width={width}", f"layers={layers}", f"heads={heads}", f"context_length={context_length}"]
    return load_config(None, [f"model.{setting}" for setting in [*shape, *settings]]).model


def make(*settings, **shape):
    model = Decoder(model_config(*settings, **shape), VOCAB)
    model.initialise(seed=3)
    with torch.no_grad():  # away from gains of one and biases of zero, which would hide a mistake
        generator = torch.Generator().manual_seed(4)
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tokens(batch=2, length=32, seed=0):
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def copy(target, source):
    with torch.no_grad():
        target.copy_(source)


def test_equals_gpt2_of_transformers():
    ours = make(*GPT2, "norm_epsilon=1e-5")
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=32, n_embd=48, n_layer=3, n_head=4, layer_norm_epsilon=1e-5
    )
    reference = GPT2LMHeadModel(config).eval()
    copy(reference.transformer.wte.weight, ours.embedding.weight)
    copy(reference.transformer.wpe.weight, ours.positions.weight)
    for theirs, block in zip(reference.transformer.h, ours.blocks, strict=True):
        for norm, our_norm in ((theirs.ln_1, block.attention_norm), (theirs.ln_2, block.feed_forward_norm)):
            copy(norm.weight, our_norm.weight)
            copy(norm.bias, our_norm.bias)
        for conv, linear in (
            (theirs.attn.c_attn, block.attention.query_key_value),
            (theirs.attn.c_proj, block.attention.output),
            (theirs.mlp.c_fc, block.feed_forward.input),
            (theirs.mlp.c_proj, block.feed_forward.output),
        ):
            copy(conv.weight, linear.weight.T)  # GPT-2 keeps its matrices transposed
            copy(conv.bias, linear.bias)
    copy(reference.transformer.ln_f.weight, ours.norm.weight)
    copy(reference.transformer.ln_f.bias, ours.norm.bias)
    # fp32 rounding of sums of up to 192 terms in another order, through three blocks
    torch.testing.assert_close(ours(tokens()), reference(tokens()).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("tie", ["true", "false"])
def test_equals_llama_of_transformers(kv_heads, tie):
    ours = make(
        f"kv_heads={kv_heads}",
        f"tie_embeddings={tie}",
        "ffn_width=80",
        "rope_theta=5000",
        "norm_epsilon=1e-6",
    )
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=kv_heads, max_position_embeddings=32, rms_norm_eps=1e-6, tie_word_embeddings=tie == "true",
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )  # fmt: skip
    reference = LlamaForCausalLM(config).eval()
    copy(reference.model.embed_tokens.weight, ours.embedding.weight)
    if tie == "false":
        copy(reference.lm_head.weight, ours.head.weight)
    for theirs, block in zip(reference.model.layers, ours.blocks, strict=True):
        copy(theirs.input_layernorm.weight, block.attention_norm.weight)
        copy(theirs.post_attention_layernorm.weight, block.feed_forward_norm.weight)
        q, k, v = block.attention.query_key_value.weight.split([48, 12 * kv_heads, 12 * kv_heads])
        for projection, weight in zip(
            (theirs.self_attn.q_proj, theirs.self_attn.k_proj, theirs.self_attn.v_proj),
            (q, k, v),
            strict=True,
        ):
            copy(projection.weight, weight)
        copy(theirs.self_attn.o_proj.weight, block.attention.output.weight)
        gate, up = block.feed_forward.input.weight.chunk(2)
        copy(theirs.mlp.gate_proj.weight, gate)
        copy(theirs.mlp.up_proj.weight, up)
        copy(theirs.mlp.down_proj.weight, block.feed_forward.output.weight)
    copy(reference.model.norm.weight, ours.norm.weight)
    torch.testing.assert_close(ours(tokens()), reference(tokens()).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [[], GPT2, ["kv_heads=2"]], ids=["modern", "gpt2", "grouped"])
def test_no_token_sees_a_later_one(settings):
    model = make(*settings)
    changed = tokens()
    changed[:, 20:] = (changed[:, 20:] + 1) % VOCAB
    one, other = model(tokens()), model(changed)
    torch.testing.assert_close(one[:, :20], other[:, :20])
    assert not torch.allclose(one[:, 20], other[:, 20])


def test_the_document_mask_makes_a_document_blind_to_its_neighbours():
    """Rotary positions are relative, so a document packed behind another gives the logits that it gives alone."""
    model = make()
    packed = tokens(1, 30)
    segments = torch.tensor([[0] * 13 + [1] * 17], dtype=torch.int32)
    # fp32 rounding: the angles of positions 13 .. 29 instead of 0 .. 16
    torch.testing.assert_close(
        model(packed, segments=segments)[:, 13:], model(packed[:, 13:]), rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(model(packed)[:, 13:], model(packed[:, 13:]), atol=1e-2)


def test_the_loss_leaves_out_the_first_token_of_a_document():
    model = make()
    inputs = tokens(1, 31)
    segments = torch.tensor([[0] * 10 + [1] * 21], dtype=torch.int32)
    loss, count = causal_lm.loss_sum(model, Batch(inputs, segments))
    parts = [causal_lm.loss_sum(model, Batch(part, None)) for part in (inputs[:, :10], inputs[:, 10:])]
    assert count == 29 == sum(part[1] for part in parts)
    torch.testing.assert_close(loss, parts[0][0] + parts[1][0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("settings", [[], GPT2, ["tie_embeddings=false", "kv_heads=1"]])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_parameter_gets_its_gradient_in_every_backward(settings, checkpointing):
    """A bucket with a parameter left out would never be reduced. Activation checkpointing changes no gradient."""
    gradients = []
    for recompute in (False, checkpointing):
        model = make(*settings, "dropout=0.1").train()
        model.activation_checkpointing = recompute
        torch.manual_seed(1)
        causal_lm.loss_sum(model, Batch(tokens(2, 33), None))[0].backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(gradient is not None for gradient in gradients[0])
    assert sum(bool((gradient != 0).any()) for gradient in gradients[0]) == len(gradients[0])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_weights_are_a_function_of_the_seed():
    one, same, other = (Decoder(model_config(), VOCAB) for _ in range(3))
    one.initialise(1)
    torch.rand(5)  # whatever happened to the global generator
    same.initialise(1)
    other.initialise(2)
    states = [torch.cat([p.reshape(-1) for p in model.parameters()]) for model in (one, same, other)]
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])
    assert abs(one.embedding.weight.std().item() - 0.02) < 0.001


@pytest.mark.parametrize("settings", [[], GPT2, ["kv_heads=2"]], ids=["modern", "gpt2", "grouped"])
def test_the_cache_gives_the_logits_of_the_whole(settings):
    model = make(*settings)
    inputs = tokens()
    cache = KeyValueCache(model.config, batch=2, device=torch.device("cpu"))
    pieces = [model(piece, cache=cache) for piece in inputs.split([7, 1, 1, 20, 3], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name,millions", [("gpt2-124m", 124.4), ("llama-1b", 1235.8)])
def test_published_sizes(name, millions):
    config = load_config(ROOT / "configs" / f"{name}.yaml").model
    assert parameter_count(config, config.vocab_size) / 1e6 == pytest.approx(millions, rel=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_memory_estimate_is_near_what_torch_keeps(checkpointing):
    """Tensors alive between forward and backward, counted by autograd's own hooks."""
    config = model_config("norm=rmsnorm", width=128, layers=4, heads=4, context_length=128)
    model = Decoder(config, 512)
    model.initialise(0)
    model.activation_checkpointing = checkpointing
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    batch = Batch(torch.randint(0, 512, (4, 129)), None)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = causal_lm.loss_sum(model, batch)
    held = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = sum(size for pointer, size in storages.items() if pointer not in held)
    estimate = estimate_memory(config, 512, 4, "fp32", checkpointing)
    assert estimate["weights"] == 4 * sum(p.numel() for p in model.parameters())
    expected = (
        estimate["activations"] + estimate["logits"] / 3
    )  # the logits' copy and gradient come later, or not in fp32
    if not checkpointing:  # with it, autograd's hooks see the inputs of the blocks only
        assert found == pytest.approx(expected, rel=0.3)
    else:
        assert found < expected
    loss.backward()
