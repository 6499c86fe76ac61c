"""The decoder is the written-out formula and torch's layer, causal, blind to padding, and cached without a difference."""

import math

import pytest
import torch
from torch import Tensor, nn

from sovit.language.decoder import Decoder, build_decoder

SIZES = {"encoder_width": 6, "vocabulary_size": 11, "width": 8, "mlp_dim": 12, "num_heads": 2, "length": 9}


@pytest.fixture
def decoder() -> Decoder:
    """In float64 and with every weight away from its first value: zeros and ones would hide a term."""
    torch.manual_seed(0)
    made = build_decoder(**SIZES, depth=2).double().eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    made.standardise(3 + 2 * torch.randn(5, 4, 6, dtype=torch.float64))
    return made


def inputs(batch: int = 3, length: int = 5, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(11, (batch, length), generator=generator)
    return tokens, torch.randn(batch, 4, 6, generator=generator, dtype=torch.float64)


def norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.weight + layer.bias


def attention(x: Tensor, source: Tensor, layer: nn.Module, heads: int, *, causal: bool) -> Tensor:
    """Head by head, from the rows of the matrices."""
    size = x.shape[-1] // heads
    q, kv = layer.q, layer.kv
    found = []
    for head in range(heads):
        rows = slice(head * size, (head + 1) * size)
        later = slice(x.shape[-1] + head * size, x.shape[-1] + (head + 1) * size)
        queries = torch.einsum("bnd,ed->bne", x, q.weight[rows]) + q.bias[rows]
        keys = torch.einsum("bnd,ed->bne", source, kv.weight[rows]) + kv.bias[rows]
        values = torch.einsum("bnd,ed->bne", source, kv.weight[later]) + kv.bias[later]
        scores = torch.einsum("bne,bme->bnm", queries, keys) / math.sqrt(size)
        if causal:
            for i in range(scores.shape[1]):
                scores[:, i, i + 1 :] = -math.inf
        found.append(torch.einsum("bnm,bme->bne", scores.exp() / scores.exp().sum(-1, keepdim=True), values))
    return torch.cat(found, -1) @ layer.proj.weight.T + layer.proj.bias


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def test_the_logits_are_the_written_out_formula(decoder: Decoder) -> None:
    tokens, memory = inputs()
    standard = (memory - decoder.memory_mean) / (decoder.memory_std + 1e-5)
    images = norm(standard, decoder.memory_norm) @ decoder.memory_proj.weight.T + decoder.memory_proj.bias
    x = decoder.embedding.weight[tokens] + decoder.positions[:5]
    for block in decoder.blocks:
        normed = norm(x, block.norm1)
        x = x + attention(normed, normed, block.self_attn, 2, causal=True)
        x = x + attention(norm(x, block.norm2), images, block.cross_attn, 2, causal=False)
        hidden = gelu(norm(x, block.norm3) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias)
        x = x + hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
    logits = norm(x, decoder.norm) @ decoder.head.weight.T + decoder.head.bias
    torch.testing.assert_close(decoder(tokens, memory), logits, rtol=0, atol=1e-12)


def test_a_block_is_torchs_pre_norm_decoder_layer(decoder: Decoder) -> None:
    block = decoder.blocks[0]
    theirs = nn.TransformerDecoderLayer(
        8,
        2,
        12,
        dropout=0.0,
        activation=gelu,
        layer_norm_eps=1e-6,
        batch_first=True,
        norm_first=True,
        dtype=torch.float64,
    ).eval()
    state = {}
    for ours, name in ((block.self_attn, "self_attn"), (block.cross_attn, "multihead_attn")):
        for kind in ("weight", "bias"):
            state[f"{name}.in_proj_{kind}"] = torch.cat([getattr(ours.q, kind), getattr(ours.kv, kind)])
            state[f"{name}.out_proj.{kind}"] = getattr(ours.proj, kind)
    for ours, name in (
        (block.mlp.fc1, "linear1"),
        (block.mlp.fc2, "linear2"),
        *zip((block.norm1, block.norm2, block.norm3), ("norm1", "norm2", "norm3"), strict=True),
    ):
        state |= {f"{name}.{kind}": getattr(ours, kind) for kind in ("weight", "bias")}
    theirs.load_state_dict(state)
    x, memory = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 3, 8, dtype=torch.float64)
    found, _ = block(x, block.cross_attn.keys_values(memory), None, None)
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    torch.testing.assert_close(found, theirs(x, memory, tgt_mask=mask), rtol=0, atol=1e-12)


def test_no_logit_sees_a_later_token_and_every_later_one_sees_it(decoder: Decoder) -> None:
    tokens, memory = inputs(1, 6)
    before = decoder(tokens, memory)
    for place in range(6):
        other = tokens.clone()
        other[0, place] = (tokens[0, place] + 1) % 11
        changed = (decoder(other, memory) - before).abs().amax(-1)[0]
        assert changed[:place].max() == 0 if place else True
        assert changed[place:].min() > 1e-6


def test_the_image_is_seen_at_every_token(decoder: Decoder) -> None:
    tokens, memory = inputs()
    other = memory.clone()
    other[1, 2, 0] += 1
    changed = (decoder(tokens, memory) - decoder(tokens, other)).abs().amax(-1)
    assert changed[1].min() > 1e-6 and changed[0].max() == changed[2].max() == 0


def test_what_pads_a_text_changes_nothing(decoder: Decoder) -> None:
    tokens, memory = inputs()
    whole = decoder(tokens, memory)
    for pad in (0, 7):
        padded = torch.cat([tokens, torch.full((3, 4), pad)], 1)
        torch.testing.assert_close(decoder(padded, memory)[:, :5], whole, rtol=0, atol=1e-14)


def test_token_by_token_with_a_cache_is_the_whole_text_at_once(decoder: Decoder) -> None:
    tokens, memory = inputs()
    whole = decoder(tokens, memory)
    first, cache = decoder.extend(tokens[:, :2], decoder.start(memory))
    parts = [first]
    for place in range(2, 5):
        logits, cache = decoder.extend(tokens[:, place : place + 1], cache)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)
    assert cache.past[0][0].shape == (3, 2, 5, 4) and cache.memory[0][0].shape == (3, 2, 4, 4)


def test_texts_of_different_lengths_share_a_cache(decoder: Decoder) -> None:
    """A short text goes on after its padding as if there were none: same positions, and the padding is never looked at."""
    tokens, memory = inputs()
    lengths = torch.tensor([2, 4, 1])
    valid = torch.arange(4) < lengths[:, None]
    logits, cache = decoder.extend(tokens[:, :4].where(valid, 9), decoder.start(memory), valid)
    following, _ = decoder.extend(tokens[:, 4:], cache)
    for row, length in enumerate(lengths):
        alone = torch.cat([tokens[row : row + 1, :length], tokens[row : row + 1, 4:]], 1)
        expected = decoder(alone, memory[row : row + 1])
        torch.testing.assert_close(logits[row, :length], expected[0, :length], rtol=0, atol=1e-12)
        torch.testing.assert_close(following[row, 0], expected[0, -1], rtol=0, atol=1e-12)
    assert logits.isfinite().all()


def test_untrained_every_token_is_equally_likely() -> None:
    tokens, memory = inputs()
    log_probs = build_decoder(**SIZES)(tokens, memory.float()).log_softmax(-1)
    torch.testing.assert_close(log_probs, torch.full_like(log_probs, -math.log(11)))


def test_two_encoders_are_given_the_same_decoder_but_for_the_projection() -> None:
    states = []
    for width in (6, 40):
        torch.manual_seed(3)
        states.append(build_decoder(**SIZES | {"encoder_width": width}).state_dict())
    for name, tensor in states[0].items():
        if not name.startswith("memory"):
            assert torch.equal(tensor, states[1][name]), name
    assert states[1]["memory_proj.weight"].std() == pytest.approx(40**-0.5, rel=0.2)


def test_the_scale_of_a_feature_and_what_all_tokens_share_do_not_matter(decoder: Decoder) -> None:
    tokens, memory = inputs(30)
    scale, shift = torch.rand(6, dtype=torch.float64) + 0.5, torch.randn(6, dtype=torch.float64)
    decoder.standardise(memory)
    torch.testing.assert_close(decoder.memory_std, memory.flatten(0, 1).std(0, correction=0))
    before = decoder(tokens, memory)
    decoder.standardise(memory * scale + shift)
    torch.testing.assert_close(decoder(tokens, memory * scale + shift), before, rtol=0, atol=1e-3)
    decoder.standardise(torch.zeros_like(memory))
    assert decoder(tokens, torch.zeros_like(memory)).isfinite().all()


def test_sizes_that_cannot_be_are_one_sentence() -> None:
    for given, message in (
        ({"width": 9}, "width=9 of the decoder is not divisible into num_heads=2"),
        ({"vocabulary_size": 0}, "vocabulary_size=0 of the decoder must be at least 1"),
        ({"dropout": 1.0}, r"dropout=1.0 is not in \[0, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            build_decoder(**SIZES | given)
