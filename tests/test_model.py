"""The model: dimensions, forward pass against one written out by hand, and the claims of the two initialisations."""

import math

import pytest
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from sovit.models.initial import INITS
from sovit.models.vit import build_vit, features, init_weights, sincos2d
from sovit.shape import NAMED, Shape

TINY = Shape(32, 4, 128, 4, 8)
ODD = Shape(35, 2, 33, 5, 4)  # odd width, head dimension 7, odd MLP dimension below the width
WIDE = Shape(96, 3, 200, 4, 8)  # large enough for the spread of its matrices to be measured


def build(shape: Shape, seed: int = 0, **arguments):
    torch.manual_seed(seed)
    return build_vit(shape, **({"image_size": 16} | arguments))


def shuffle_(model: nn.Module) -> None:
    """Move every parameter away from its special value, so that a forgotten bias or norm shows."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)


def features_by_hand(weights: dict[str, Tensor], images: Tensor, shape: Shape, pool: str) -> Tensor:
    """big_vision's model (google-research/big_vision, models/vit.py), in separate matrices and plain arithmetic."""

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        return centred * scale * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x: Tensor, name: str, part: slice = slice(None)) -> Tensor:
        return x @ weights[f"{name}.weight"][part].T + weights[f"{name}.bias"][part]

    def mlp(x: Tensor, name: str) -> Tensor:
        h = linear(x, f"{name}.fc1")
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        return linear(h, f"{name}.fc2")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (shape.num_heads, shape.head_dim)) for x in (q, k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(shape.head_dim)
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(-2)

    size, w = shape.patch_size, shape.width
    first, second, third = (slice(i * w, (i + 1) * w) for i in range(3))
    rows = images.unfold(2, size, size).unfold(3, size, size)  # (B, C, grid, grid, patch, patch)
    patches = rows.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    x = patches @ weights["patch_embed.proj.weight"].flatten(1).T + weights["patch_embed.proj.bias"]
    x = x + weights["pos_embed"]
    if pool == "token":
        x = torch.cat([weights["cls_token"].expand(len(x), 1, w), x], dim=1)
    for i in range(shape.depth):
        y = norm(x, f"blocks.{i}.norm1")
        qkv = f"blocks.{i}.attn.qkv"
        y = attend(linear(y, qkv, first), linear(y, qkv, second), linear(y, qkv, third))
        x = x + linear(y, f"blocks.{i}.attn.proj")
        x = x + mlp(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp")
    x = norm(x, "norm")
    if pool == "avg":
        return x.mean(1)
    if pool == "token":
        return x[:, 0]
    query = linear(weights["attn_pool.latent"], "attn_pool.q").expand(len(x), 1, w)
    y = attend(query, linear(x, "attn_pool.kv", first), linear(x, "attn_pool.kv", second))
    y = linear(y, "attn_pool.proj")
    return (y + mlp(norm(y, "attn_pool.norm"), "attn_pool.mlp"))[:, 0]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("pool", ["map", "avg", "token"])
@pytest.mark.parametrize("shape", [TINY, ODD])
def test_features_are_those_of_the_forward_pass_written_by_hand(shape, pool, fused):
    """Norm of the tokens before pooling, tanh GELU, eps 1e-6, no position for the class token, same MLP in the head."""
    model = build(shape, pool=pool, channels=2, num_classes=3, fused_attention=fused).double()
    shuffle_(model)
    images = torch.randn(5, 2, 16, 16, dtype=torch.float64)
    expected = features_by_hand(model.state_dict(), images, shape, pool)
    assert expected.shape == (5, shape.width)
    torch.testing.assert_close(features(model, images), expected, rtol=1e-9, atol=1e-9)
    logits = expected @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(images), logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pool", ["map", "avg", "token"])
def test_the_mlp_dimension_is_exact_where_a_ratio_would_truncate(pool):
    """int(448 * (976 / 448)) is 975."""
    assert int(448 * (976 / 448)) == 975
    model = build(Shape(448, 1, 976, 7, 8), pool=pool)
    hidden = [m.out_features for name, m in model.named_modules() if name.endswith("fc1")]
    assert hidden == [976] * (2 if pool == "map" else 1)


def test_every_named_shape_builds_on_the_meta_device():
    with torch.device("meta"):
        for named in NAMED.values():
            shape = named.shape
            model = build_vit(shape, image_size=16 * shape.patch_size)
            assert len(model.blocks) == shape.depth
            assert all(parameter.is_meta for parameter in model.parameters())
            assert model.attn_pool.mlp.fc1.out_features == shape.mlp_dim


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("pos_embed", ["learned", "sincos2d"])
def test_weights_depend_on_the_seed_alone(init, pos_embed):
    arguments = {"init": init, "pos_embed": pos_embed, "num_classes": 7}
    first = build(TINY, **arguments)
    with torch.device("meta"):
        build_vit(ODD, image_size=16)
    second, other = build(TINY, **arguments), build(TINY, seed=1, **arguments)
    assert first.state_dict().keys() == second.state_dict().keys()
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert not torch.equal(first.patch_embed.proj.weight, other.patch_embed.proj.weight)


def test_building_on_the_meta_device_draws_nothing():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with torch.device("meta"):
        build_vit(TINY, image_size=16, drop_path_rate=0.1)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("pool", ["map", "token"])
@pytest.mark.parametrize("pos_embed", ["learned", "sincos2d"])
def test_initialisation_reaches_every_tensor(init, pool, pos_embed):
    """A model from the meta device, filled with NaN and initialised, equals one built directly."""
    expected = build(TINY, init=init, pool=pool, pos_embed=pos_embed, num_classes=3, head_bias=-2.0)
    with torch.device("meta"):
        model = build_vit(TINY, image_size=16, init=init, pool=pool, pos_embed=pos_embed, num_classes=3)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(torch.nan)
    torch.manual_seed(0)
    init_weights(model, init=init, head_bias=-2.0)
    for name, value in expected.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "head"}


def test_fan_in_init_has_the_stated_spread_in_every_matrix():
    model = build(WIDE, image_size=64, channels=1)
    checked = 0
    for name, linear in linears(model).items():
        std = linear.in_features**-0.5
        if name.startswith("blocks.") and name.endswith(("attn.proj", "mlp.fc2")):
            std /= math.sqrt(2 * 3)
        assert linear.weight.std().item() == pytest.approx(std, rel=0.04), name
        assert abs(linear.weight.mean().item()) < 0.05 * std, name
        assert not linear.bias.any(), name
        checked += 1
    assert checked == 3 * 4 + 5
    assert model.patch_embed.proj.weight.std().item() == pytest.approx(1 / 8, rel=0.04)  # fan in 1 x 8 x 8
    assert not model.patch_embed.proj.bias.any()
    assert model.pos_embed.std().item() == pytest.approx(0.5, rel=0.04)
    assert model.attn_pool.latent.std().item() == pytest.approx(1, rel=0.3)


def test_big_vision_init_draws_q_k_and_v_as_separate_xavier_matrices():
    """Xavier on timm's stacked (3w, w) would be bounded by sqrt(6 / 4w), a factor sqrt(2) too small; the MAP head's
    stacked (2w, w) by sqrt(6 / 3w).
    """
    model = build(WIDE, image_size=64, init="big_vision")
    for name, linear in linears(model).items():
        stacked = {"qkv": 3, "kv": 2}.get(name.rpartition(".")[2], 1)
        bound = math.sqrt(6 / (linear.in_features + linear.out_features // stacked))
        for weight in linear.weight.chunk(stacked):
            assert 0.99 * bound < weight.abs().max().item() <= bound, name
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03), name


def test_big_vision_init_of_everything_else():
    model = build(WIDE, image_size=64, init="big_vision")
    for name, linear in linears(model).items():
        if "mlp" in name:
            assert linear.bias.std().item() == pytest.approx(1e-6, rel=0.3), name
        else:
            assert not linear.bias.any(), name
    patch = model.patch_embed.proj.weight
    std = (3 * 8 * 8) ** -0.5
    assert patch.std().item() == pytest.approx(std, rel=0.02)
    # flax's lecun_normal: truncated at two of its scales, which is wider than the std so that the std comes out right
    assert 1.9 * std < patch.abs().max().item() <= 2 * std / 0.87962566 * (1 + 1e-6)
    assert not model.patch_embed.proj.bias.any()
    assert model.pos_embed.std().item() == pytest.approx(96**-0.5, rel=0.04)
    bound = math.sqrt(6 / (1 + 96))
    assert 0.9 * bound < model.attn_pool.latent.abs().max().item() <= bound


@pytest.mark.parametrize("init", INITS)
def test_a_new_model_predicts_the_head_bias_whatever_it_sees(init):
    model = build(TINY, num_classes=5, init=init, head_bias=-10.0)
    logits = model(torch.randn(3, 3, 16, 16))
    assert torch.equal(logits, torch.full((3, 5), -10.0))


@pytest.mark.parametrize("init", INITS)
def test_norms_start_as_the_identity_and_the_class_token_at_zero(init):
    model = build(TINY, pool="token", init=init)
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 2 * TINY.depth + 1
    for norm in norms:
        assert norm.eps == 1e-6
        assert torch.equal(norm.weight, torch.ones(32))
        assert not norm.bias.any()
    assert not model.cls_token.any()


@pytest.mark.parametrize("init", INITS)
def test_pos_embed_std_replaces_the_default(init):
    model = build(WIDE, image_size=64, init=init, pos_embed_std=0.02)
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.04)
    assert not build(TINY, pos_embed_std=0.0, init=init).pos_embed.any()


def test_sincos_positions_of_a_2x2_grid_follow_the_formula():
    """[sin x, cos x, sin y, cos y], rows first; width 8 has the frequencies 1 and 1e-4."""
    s, c, t, d = math.sin(1), math.cos(1), math.sin(1e-4), math.cos(1e-4)
    expected = [
        [0, 0, 1, 1, 0, 0, 1, 1],  # y 0, x 0
        [s, t, c, d, 0, 0, 1, 1],  # y 0, x 1
        [0, 0, 1, 1, s, t, c, d],  # y 1, x 0
        [s, t, c, d, s, t, c, d],  # y 1, x 1
    ]
    model = build(Shape(8, 1, 16, 2, 8), pos_embed="sincos2d")
    torch.testing.assert_close(model.pos_embed, torch.tensor([expected]), rtol=0, atol=1e-7)


def test_sincos_positions_of_the_smallest_width_are_finite():
    """With width 4 there is one frequency, and i / (width / 4 - 1) is 0 / 0."""
    expected = torch.tensor([[[0, 1, 0, 1], [math.sin(1), math.cos(1), 0, 1]]])
    torch.testing.assert_close(sincos2d(1, 2, dim=4), expected)


def test_sincos_positions_are_saved_but_not_trained():
    model = build(TINY, pos_embed="sincos2d")
    assert "pos_embed" in model.state_dict()
    assert "pos_embed" not in dict(model.named_parameters())


def test_stochastic_depth_is_off_by_default_and_rises_linearly_otherwise():
    def rates(model):
        return [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]

    assert rates(build(TINY)) == []
    # the first block has rate 0 and no module; each block has two branches
    assert rates(build(TINY, drop_path_rate=0.3)) == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.3, 0.3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 20}, "image_size=20 is not divisible by patch_size=8; use image_size 16 or 24"),
        ({"pool": "gap"}, "pool='gap' is unknown"),
        ({"pos_embed": "rope"}, "pos_embed='rope' is unknown"),
        ({"init": "jax"}, "init='jax' is unknown; use one of fan_in, big_vision"),
        ({"channels": 0}, "channels=0"),
        ({"num_classes": -1}, "num_classes=-1"),
        ({"drop_path_rate": 1.0}, "drop_path_rate=1.0 is not in"),
        ({"pos_embed_std": -0.1}, "pos_embed_std=-0.1 is negative"),
        ({"pos_embed": "sincos2d", "pos_embed_std": 0.5}, "has no effect on pos_embed='sincos2d'"),
    ],
)
def test_impossible_models_are_refused_in_one_sentence_before_anything_is_built(arguments, message, monkeypatch):
    monkeypatch.setattr("sovit.models.vit.VisionTransformer", lambda **_: pytest.fail("built"))
    with pytest.raises(ValueError, match=message):
        build_vit(TINY, **({"image_size": 16} | arguments))


def test_sincos_positions_need_a_width_divisible_by_4():
    with pytest.raises(ValueError, match="divisible by 4, not 35"):
        build_vit(ODD, image_size=16, pos_embed="sincos2d")
