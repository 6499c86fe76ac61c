"""The text tower: counted as torch counts it, blind to padding, not causal, drawn as it says."""

import dataclasses
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sovit.families.text import TextShape
from sovit.language.tower import build_tower, in_text
from sovit.models.blocks import checkpoint_blocks
from sovit.models.vit import build_vit
from sovit.optim import param_groups
from sovit.shape import Shape
from sovit.text_flops import TEXT_POOLS, tower_flops, tower_params

WORDS, LENGTH, EMBED, EOS = 50, 12, 20, 1
# MLP dimensions that timm's ratio would miss by one, odd ones, one block, the heads of an odd width
SHAPES = [TextShape(32, 2, 37, 4, LENGTH), TextShape(448, 1, 976, 4, LENGTH), TextShape(15, 3, 7, 3, LENGTH)]


def built(shape=SHAPES[0], **more):
    torch.manual_seed(0)
    options = {"vocabulary_size": WORDS, "length": LENGTH, "embed_dim": EMBED, "eos": EOS, **more}
    return build_tower(shape, **options).requires_grad_(False)


def texts(*lengths):
    """Random words, then the end, then zeros."""
    tokens = torch.randint(2, WORDS, (len(lengths), LENGTH), generator=torch.Generator().manual_seed(1))
    for row, length in zip(tokens, lengths, strict=True):
        row[length - 1] = EOS
        row[length:] = 0
    return tokens


@pytest.mark.parametrize("pool", TEXT_POOLS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_closed_forms_are_what_torch_counts_on_the_module(shape, pool):
    with torch.device("meta"):
        model = built(shape, pool=pool, fused_attention=False)
        tokens = torch.zeros(3, LENGTH, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(tokens)
    place = {"length": LENGTH, "embed_dim": EMBED, "pool": pool}
    assert 3 * sum(tower_flops(shape, **place).values()) == counter.get_total_flops()
    params = tower_params(shape, vocabulary_size=WORDS, **place)
    named = dict(model.named_parameters())
    assert sum(params.values()) == sum(parameter.numel() for parameter in named.values())

    def total(*parts):
        return sum(value.numel() for name, value in named.items() if any(part in name for part in parts))

    assert params["map_head"] == total("attn_pool")
    assert params["mlp"] == total(".mlp.") - total("attn_pool.mlp")
    assert params["projection"] == total("head.")
    assert params["norms"] == total("norm") - total("attn_pool.norm")


def test_a_deep_narrow_tower_counts_as_a_vit_of_as_many_tokens_without_its_patches():
    from sovit.flops import forward_flops

    vit = forward_flops(Shape(32, 2, 37, 4, 4), 16, pool="map")  # 16 tokens
    text = tower_flops(TextShape(32, 2, 37, 4, 16), length=16, embed_dim=EMBED, pool="map")
    for group in ("attention_projections", "attention_products", "mlp", "map_head"):
        assert text[group] == vit[group]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("pool", TEXT_POOLS)
def test_what_follows_the_end_of_a_text_does_not_change_its_embedding(pool, fused):
    model, tokens = built(pool=pool, fused_attention=fused), texts(1, 5, 9, LENGTH)
    wanted = model(tokens)
    other = torch.where(in_text(tokens, EOS), tokens, texts(LENGTH, LENGTH, LENGTH, LENGTH).flip(1))
    assert not torch.equal(other, tokens)
    torch.testing.assert_close(model(other), wanted)
    padded_with_ends = torch.where(in_text(tokens, EOS), tokens, EOS)
    torch.testing.assert_close(model(padded_with_ends), wanted)
    torch.testing.assert_close(model(tokens[:3, :9]), wanted[:3])  # nor how far it is padded
    assert wanted.isfinite().all()


@pytest.mark.parametrize("pool", TEXT_POOLS)
def test_every_word_up_to_the_end_changes_the_embedding(pool):
    """Attention is not causal: the first token's features know of the last word too."""
    model, tokens = built(pool=pool), texts(7)
    wanted, first = model(tokens), model.forward_features(tokens)[:, 0]
    for place in range(6):
        other = tokens.clone()
        other[0, place] = 2 + (other[0, place] - 1) % (WORDS - 2)
        assert (model(other) - wanted).abs().max() > 1e-4, place
        assert (model.forward_features(other)[:, 0] - first).abs().max() > 1e-4, place
    swapped = tokens[:, [1, 0, *range(2, LENGTH)]]
    assert (model(swapped) - wanted).abs().max() > 1e-4  # positions count


def test_a_text_without_an_end_is_all_text():
    model, tokens = built(), texts(LENGTH)
    tokens[0, -1] = 5
    assert in_text(tokens, EOS).all()
    assert model(tokens).isfinite().all()


@pytest.mark.parametrize("pool", TEXT_POOLS)
def test_the_parts_of_the_forward_pass_are_the_whole(pool):
    model, tokens = built(pool=pool), texts(3, 8)
    features = model.forward_features(tokens)
    assert features.shape == (2, LENGTH, 32)
    assert torch.equal(model.forward_head(features, tokens), model(tokens))
    assert torch.equal(model.head(model.forward_head(features, tokens, pre_logits=True)), model(tokens))
    embedded, log_scale, bias = model.forward_contrast(tokens)
    assert torch.equal(embedded, model(tokens)) and embedded.shape == (2, EMBED)
    assert (log_scale.shape, bias.shape) == ((1,), (1,))
    assert (log_scale.exp().item(), bias.item()) == (pytest.approx(10), -10)  # arXiv 2303.15343


def test_a_tower_for_a_loss_without_bias_has_none():
    model = built(bias=None, log_scale=math.log(1 / 0.07))
    assert model.bias is None and "bias" not in model.state_dict()
    assert model.forward_contrast(texts(4))[2] is None
    params = tower_params(SHAPES[0], vocabulary_size=WORDS, length=LENGTH, embed_dim=EMBED, bias=False)
    assert sum(params.values()) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("init", ["fan_in", "big_vision"])
def test_blocks_begin_as_a_vits_do(init):
    """Same names, same spread: what differs is what a text has and an image has not."""
    shape = Shape(64, 4, 256, 4, 4)
    torch.manual_seed(0)
    vit = dict(build_vit(shape, image_size=16, pool="map", init=init).named_parameters())
    torch.manual_seed(1)
    tower = dict(built(TextShape(64, 4, 256, 4, LENGTH), pool="map", init=init).named_parameters())
    shared = [name for name in tower if name.startswith(("blocks.", "attn_pool.", "norm."))]
    assert set(shared) == {name for name in vit if name.startswith(("blocks.", "attn_pool.", "norm."))}
    for name in shared:
        assert tower[name].shape == vit[name].shape
        if vit[name].numel() > 1000:
            assert tower[name].std().item() == pytest.approx(vit[name].std().item(), rel=0.05), name
        elif not vit[name].std() > 0:
            assert torch.equal(tower[name], vit[name]), name
    assert tower["head.weight"].std().item() == pytest.approx(64**-0.5, rel=0.1) and not tower["head.bias"].any()
    stds = (1.0, 0.5) if init == "fan_in" else (64**-0.5, 64**-0.5)
    assert tower["token_embed.weight"].std().item() == pytest.approx(stds[0], rel=0.05)
    assert tower["pos_embed"].std().item() == pytest.approx(stds[1], rel=0.1)


def test_weights_follow_the_generator_alone_and_no_memory_is_taken_on_meta():
    first, second = built().state_dict(), built().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    with torch.device("meta"):
        empty = built()
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    empty.load_state_dict(first, assign=True)
    assert torch.equal(empty(texts(5)), built()(texts(5)))


def test_matrices_are_decayed_and_rates_follow_the_shape():
    model = built(SHAPES[0]).requires_grad_(True)
    options = {"lr": 1.0, "weight_decay": 0.1, "head_weight_decay": 9.0}
    named = {id(p): name for name, p in model.named_parameters()}
    for rule in ("constant", "by_shape"):
        groups = param_groups(model, **options, lr_rule=rule)
        assert {named[id(p)] for group in groups for p in group["params"]} == set(named.values())
        decayed = {named[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
        assert "head.weight" in decayed and "blocks.1.mlp.fc2.weight" in decayed
        assert not decayed & {"log_scale", "bias", "pos_embed", "token_embed.weight", "head.bias"}
        assert {group["weight_decay"] for group in groups} == {0.0, 0.1}
    rates = {named[id(p)]: group["lr"] for group in groups for p in group["params"]}
    assert rates["head.weight"] == 64 / 32 and rates["token_embed.weight"] == 1.0


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_blocks_computed_again_have_the_same_gradients(kind):
    found = []
    for checkpointing in ("none", kind):
        model = built().requires_grad_(True)
        checkpoint_blocks(model, checkpointing)
        model(texts(4, 9)).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 20
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_stochastic_depth_rises_over_the_blocks():
    model = built(dataclasses.replace(SHAPES[0], depth=5), drop_path_rate=0.2)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"pool": "token"}, "pool='token' is unknown for texts; use one of last, map, avg"),
        ({"init": "zero"}, "init='zero' is unknown"),
        ({"eos": WORDS}, "eos=50 is no token of a vocabulary of 50"),
        ({"embed_dim": 0}, "embed_dim=0 is not a positive whole number"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate=1.0 is not in \[0, 1\)"),
    ],
)
def test_bad_input_is_one_sentence(more, words):
    with pytest.raises(ValueError, match=words):
        built(**more)


def test_longer_texts_than_there_are_positions_are_named():
    with pytest.raises(ValueError, match="Texts of 13 tokens are longer than length=12"):
        built()(torch.zeros(1, 13, dtype=torch.int64))
