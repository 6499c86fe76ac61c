"""The options of ViT-22B (arXiv 2302.05442, section 2): each does what it says, and norms of queries and keys do what
they are there for.
"""

import itertools
import math
import random
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sovit.config import compose
from sovit.data.fractals import FractalWorld
from sovit.data.stream import FractalDataset
from sovit.derived import model_geometry, model_options
from sovit.flops import BLOCKS, NORMS, POOLS, VIT22B, forward_flops, num_params
from sovit.models.initial import INITS
from sovit.models.vit import build_vit, init_weights
from sovit.optim import build_optimizer, param_groups
from sovit.records import config_hash
from sovit.shape import Shape, parse_shape

WIDTH, MLP_DIM, HEADS = 36, 50, 3
SHAPE = Shape(WIDTH, 2, MLP_DIM, HEADS, 4)
BIASES = ("bias", "mlp_bias")


def build(shape: Shape = SHAPE, seed: int = 0, **options) -> nn.Module:
    torch.manual_seed(seed)
    return build_vit(shape, **({"image_size": 16, "pool": "avg"} | options))


def names(**options) -> set[str]:
    return {name for name, _ in build(**options).named_parameters()}


@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("norm", list(NORMS))
def test_the_fused_block_is_the_sum_of_attention_and_mlp_in_separate_matrices(qkv_bias, qk_norm, norm):
    """y = x + attention(norm(x)) + mlp(norm(x)), every matrix written by itself."""
    block = build(block="parallel", qkv_bias=qkv_bias, qk_norm=qk_norm, norm=norm).blocks[0].double()
    torch.manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64) / math.sqrt(shape[-1])

    q, k, v, out = (draw(WIDTH, WIDTH) for _ in range(4))
    first, second, scale = draw(MLP_DIM, WIDTH), draw(WIDTH, MLP_DIM), 1 + draw(WIDTH)
    of_q, of_k = 1 + draw(WIDTH // HEADS), 1 + draw(WIDTH // HEADS)
    q_bias, k_bias, v_bias = draw(3, WIDTH) if qkv_bias else torch.zeros(3, WIDTH, dtype=torch.float64)
    mlp_bias, out_bias, norm_bias = draw(MLP_DIM), draw(WIDTH), draw(WIDTH) if norm == "layernorm" else None
    with torch.no_grad():
        block.in_proj.weight.copy_(torch.cat([first, q, k, v]))
        if qkv_bias:
            block.in_proj.bias.copy_(torch.cat([mlp_bias, q_bias, k_bias, v_bias]))
        else:
            block.mlp_bias.copy_(mlp_bias)
        block.out_proj.weight.copy_(torch.cat([out, second], dim=1))
        block.out_proj.bias.copy_(out_bias)
        block.in_norm.weight.copy_(scale)
        if norm_bias is not None:
            block.in_norm.bias.copy_(norm_bias)
        if qk_norm:
            block.q_norm.weight.copy_(of_q)
            block.k_norm.weight.copy_(of_k)

    def normed(x: Tensor, scale: Tensor) -> Tensor:
        x = x if norm == "rmsnorm" else x - x.mean(-1, keepdim=True)
        return scale * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def heads(x: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
        return (x @ matrix.T + bias).unflatten(-1, (HEADS, -1)).transpose(1, 2)

    x = 3 * torch.randn(2, 7, WIDTH, dtype=torch.float64) + 1
    y = normed(x, scale) + (0 if norm_bias is None else norm_bias)
    queries, keys, values = heads(y, q, q_bias), heads(y, k, k_bias), heads(y, v, v_bias)
    if qk_norm:
        queries, keys = normed(queries, of_q), normed(keys, of_k)
    weights = (queries @ keys.transpose(-2, -1) / math.sqrt(WIDTH // HEADS)).softmax(-1)
    attention = (weights @ values).transpose(1, 2).flatten(2) @ out.T
    hidden = y @ first.T + mlp_bias
    gelu = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    expected = x + attention + gelu @ second.T + out_bias
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("block", BLOCKS)
def test_options_leave_out_the_parameters_they_say(block):
    everything = names(block=block, qk_norm=True)
    blocks = {name for name in everything if name.startswith("blocks.")}
    without_qk = names(block=block)
    assert {n for n in everything - without_qk} == {n for n in blocks if ".q_norm." in n or ".k_norm." in n}
    norms = {n for n in everything if "norm" in n and n.endswith("bias")}
    assert len(norms) == 1 + 2 * (4 if block == "serial" else 3)
    for norm in ("layernorm_nobias", "rmsnorm"):
        assert everything - names(block=block, qk_norm=True, norm=norm) == norms
    gone, new = everything - names(block=block, qk_norm=True, qkv_bias=False), names(block=block, qkv_bias=False)
    if block == "serial":
        assert gone == {f"blocks.{i}.attn.qkv.bias" for i in range(2)}
    else:  # the MLP keeps the bias that it had a slice of
        assert gone == {f"blocks.{i}.in_proj.bias" for i in range(2)}
        assert {f"blocks.{i}.mlp_bias" for i in range(2)} <= new


def test_vit_22b_has_the_biases_that_the_paper_keeps_and_no_other():
    """In a block those of the MLP: of its first layer, and of its second, which the fused output shares."""
    found = {n for n in names(**VIT22B, pool="map") if n.endswith(BIASES)}
    assert {n for n in found if n.startswith("blocks.0")} == {"blocks.0.mlp_bias", "blocks.0.out_proj.bias"}
    assert not {n for n in found if "norm" in n}
    assert {n.partition(".")[0] for n in found} == {"patch_embed", "blocks", "attn_pool"}


def test_rmsnorm_does_not_centre():
    """A constant added to all features goes unseen by LayerNorm, not by RMSNorm."""
    x = torch.randn(4, WIDTH)
    for norm, seen in (("layernorm", False), ("layernorm_nobias", False), ("rmsnorm", True)):
        layer = build(norm=norm).norm
        assert torch.allclose(layer(x), layer(x + 3.0), atol=1e-4) != seen


def test_a_parallel_block_drops_both_branches_together():
    model = build(block="parallel", drop_path_rate=0.4)
    assert [m.drop_prob for m in model.modules() if isinstance(m, DropPath)] == pytest.approx([0.4])


def test_unknown_options_are_refused_in_one_sentence():
    for build_or_count in (build_vit, num_params):
        with pytest.raises(ValueError, match="block='paralel' is unknown; use one of serial, parallel"):
            build_or_count(SHAPE, image_size=16, block="paralel")
        with pytest.raises(
            ValueError, match="norm='batchnorm' is unknown; use one of layernorm, layernorm_nobias, rms"
        ):
            build_or_count(SHAPE, image_size=16, norm="batchnorm")


def group_of(name: str, p: Tensor, shape: Shape) -> dict[str, int]:
    """Parameters of a block by group; of a fused matrix, those of its parts."""
    leaf = name.split(".", 2)[2]
    if leaf == "in_proj.weight":
        return {"attention_projections": 3 * shape.width**2, "mlp": p.numel() - 3 * shape.width**2}
    if leaf == "in_proj.bias":
        return {"attention_projections": 3 * shape.width, "mlp": p.numel() - 3 * shape.width}
    if leaf == "out_proj.weight":
        return {"attention_projections": shape.width**2, "mlp": p.numel() - shape.width**2}
    if "norm" in leaf:
        return {"norms": p.numel()}
    return {"attention_projections" if leaf.startswith("attn.") else "mlp": p.numel()}


def test_parameters_and_flops_of_all_options_are_those_of_the_module_group_by_group():
    rng = random.Random(0)
    for block, qk_norm, qkv_bias, norm in itertools.product(BLOCKS, (False, True), (False, True), NORMS):
        for _ in range(2):
            heads, patch = rng.randint(1, 6), rng.randint(1, 9)
            shape = Shape(heads * rng.randint(1, 24), rng.randint(1, 3), rng.randint(1, 700), heads, patch)
            geometry = {"image_size": patch * rng.randint(1, 5), "pool": rng.choice(POOLS), "num_classes": 7}
            options = {"block": block, "qk_norm": qk_norm, "qkv_bias": qkv_bias, "norm": norm}
            with torch.device("meta"):
                model = build_vit(shape, **geometry, **options, fused_attention=False)
            counted: Counter[str] = Counter()
            for name, p in model.named_parameters():
                if name.startswith("blocks."):
                    counted.update(group_of(name, p, shape))
                elif name.startswith("norm."):
                    counted["norms"] += p.numel()
            groups = num_params(shape, **geometry, **options)
            assert +counted == +Counter({key: groups[key] for key in ("attention_projections", "mlp", "norms")})
            assert sum(groups.values()) == sum(p.numel() for p in model.parameters())
            with FlopCounterMode(display=False) as counter:
                model(torch.empty(2, 3, geometry["image_size"], geometry["image_size"], device="meta"))
            assert counter.get_total_flops() == 2 * sum(forward_flops(shape, **geometry).values())


def test_the_published_22b_model():
    """21743 M in the matrices of its blocks; 22.2e9 with embeddings and pooling; 11,251 GFLOPs forward at 224 pixels."""
    shape = parse_shape("22B/14")
    with torch.device("meta"):
        model = build_vit(shape, image_size=224, **VIT22B, fused_attention=False)
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.ndim > 1)
    total = sum(p.numel() for p in model.parameters())
    assert round(matrices / 1e6) == 21_743
    assert total == sum(num_params(shape, 224, **VIT22B).values())
    assert total == pytest.approx(22.2e9, rel=1e-3)
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() == sum(forward_flops(shape, 224).values()) == pytest.approx(11_251e9, rel=1e-4)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_every_part_of_a_fused_matrix_is_drawn_as_if_it_stood_alone(init, qkv_bias):
    width, depth, mlp_dim = 96, 3, 250
    model = build(Shape(width, depth, mlp_dim, 4, 4), block="parallel", qk_norm=True, qkv_bias=qkv_bias, init=init)
    for block in model.blocks:
        rows = dict(zip(("first", "q", "k", "v"), block.in_proj.weight.split([mlp_dim, *[width] * 3]), strict=True))
        columns = block.out_proj.weight.split([width, mlp_dim], dim=1)
        for name, part in (rows | dict(zip(("out", "second"), columns, strict=True))).items():
            outputs, inputs = part.shape
            if init == "fan_in":
                std = inputs**-0.5 / (math.sqrt(2 * depth) if name in ("out", "second") else 1)
            else:
                std = math.sqrt(2 / (inputs + outputs))
                assert part.abs().max().item() <= math.sqrt(3) * std * (1 + 1e-6), name
            assert part.std().item() == pytest.approx(std, rel=0.04), name
        mlp_bias = block.in_proj.bias[:mlp_dim] if qkv_bias else block.mlp_bias
        for bias in (mlp_bias, block.out_proj.bias):
            assert bias.std().item() == pytest.approx(1e-6 if init == "big_vision" else 0, rel=0.3)
        assert not qkv_bias or not block.in_proj.bias[mlp_dim:].any()
        assert all(
            torch.equal(m.weight, torch.ones_like(m.weight)) for m in (block.in_norm, block.q_norm, block.k_norm)
        )


@pytest.mark.parametrize("init", INITS)
def test_initialisation_reaches_every_tensor_of_the_recipe(init):
    options = VIT22B | {"pool": "map", "num_classes": 3, "init": init}
    expected = build(**options)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = build_vit(SHAPE, image_size=16, **options)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(torch.nan)
    init_weights(model, init=init)
    for name, value in expected.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_the_shape_rule_knows_what_feeds_the_fused_matrices():
    """Width 36 at base 18 halves the rate; the fused output has 36 + 50 inputs, at the base 18 + 25. No vector decays."""
    model = build(**VIT22B, num_classes=5)
    rules = {"lr_rule": "by_shape", "base_width": 18, "base_mlp_dim": 32, "base_depth": 2}
    groups = param_groups(model, lr=1.0, weight_decay=0.1, head_weight_decay=0.2, **rules)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    by_name = {name: found[id(p)] for name, p in model.named_parameters()}
    assert by_name["blocks.0.in_proj.weight"] == (0.5, 0.1)
    assert by_name["blocks.0.out_proj.weight"] == (pytest.approx((18 + 32) / (36 + 50)), 0.1)
    assert by_name["head.weight"] == (0.5, 0.2)
    vectors = {name for name, p in model.named_parameters() if p.ndim == 1 or name == "pos_embed"}
    assert {"blocks.1.mlp_bias", "blocks.1.q_norm.weight", "blocks.1.in_norm.weight", "norm.weight"} <= vectors
    assert {by_name[name] for name in vectors} == {(1.0, 0.0)}
    assert len(by_name) == len(found)


def test_the_configuration_of_vit_22b_builds_the_published_model():
    cfg = compose(["model=vit22b", "shape=22B/14"])
    assert {key: model_options(cfg)[key] for key in VIT22B} == VIT22B
    geometry = model_geometry(cfg) | {"num_classes": 0}
    found = num_params(parse_shape("22B/14"), **geometry, **model_options(cfg))
    assert found == num_params(parse_shape("22B/14"), 224, **VIT22B)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "412264f7f3a9d38a"),
        (["experiment=star_tiny"], "88c29b4e5829eb1a"),
        (["experiment=star_tiny", "shape=64x8x256", "seed=3"], "f0e8d945e66cdba9"),
        (["experiment=star"], "691d76b55071e329"),
    ],
)
def test_runs_recorded_before_an_option_existed_keep_their_hash(overrides, expected):
    """Hashes of the commit before these options, and before those of data in files. A changed one orphans all records."""
    assert config_hash(compose(overrides)) == expected


def test_every_option_of_the_recipe_changes_the_hash():
    overrides = ["model.block=parallel", "model.qk_norm=true", "model.qkv_bias=false", "model.norm=rmsnorm"]
    assert len({config_hash(compose([one])) for one in overrides} | {config_hash(compose([]))}) == 5


def stressed(qk_norm: bool, steps: int) -> tuple[list[float], list[float]]:
    """Losses and largest attention logits of ViT-22B blocks at fifty times a sound learning rate, on the fractals."""
    shape, classes = Shape(64, 8, 128, 2, 4), 16
    data = FractalDataset(FractalWorld(seed=0, num_classes=classes, num_heldout=2, size=16))
    options = VIT22B | {"qk_norm": qk_norm}
    model = build(shape, channels=1, num_classes=classes, init="fan_in", **options)
    optimizer = build_optimizer(model, "adamw", lr=0.05, weight_decay=0.0, head_weight_decay=0.0, beta2=0.98)
    queries: list[Tensor] = []
    logits: list[float] = []

    def meet(_: nn.Module, __: tuple[Tensor, ...], keys: Tensor) -> None:
        products = torch.einsum("bqhd,bkhd->bhqk", queries.pop(), keys.detach())
        logits[-1] = max(logits[-1], products.abs().max().item() / math.sqrt(shape.head_dim))

    for block in model.blocks:  # without qk_norm these are the identity
        block.q_norm.register_forward_hook(lambda _, __, result: queries.append(result.detach()))
        block.k_norm.register_forward_hook(meet)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * min(1.0, (step + 1) / 10)
        images, labels = data.__getitems__(range(64 * step, 64 * (step + 1)))
        logits.append(0.0)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, logits


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small operations on a shared machine wait for each other's threads
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("block", BLOCKS)
def test_normed_queries_and_keys_bound_the_logits_whatever_the_matrices(block):
    """A normed vector of d features is no longer than sqrt(d): |q k| / sqrt(d) <= sqrt(d), and plain ones have no bound."""
    images, largest = 100 * torch.randn(4, 3, 16, 16), {}
    for qk_norm in (False, True):
        model = build(block=block, qk_norm=qk_norm, qkv_bias=False, norm="rmsnorm")
        found: list[Tensor] = []
        for module in model.blocks:
            with torch.no_grad():
                (module.in_proj if block == "parallel" else module.attn.qkv).weight.mul_(100)
            owner = module if block == "parallel" else module.attn
            for part in (owner.q_norm, owner.k_norm):
                part.register_forward_hook(lambda _, __, result, found=found: found.append(result))
        model(images)
        lengths = [vectors.norm(dim=-1).max().item() for vectors in found]
        largest[qk_norm] = max(q * k for q, k in zip(lengths[::2], lengths[1::2], strict=True)) / math.sqrt(12)
    assert largest[True] <= math.sqrt(12) * (1 + 1e-5) < 1e4 < largest[False]


@pytest.mark.usefixtures("one_thread")
def test_a_rate_that_blows_up_the_attention_logits_trains_with_normed_queries_and_keys():
    """The divergence of the paper's appendix B in small: without the norms logits reach thousands, attention is one token
    or another, and the loss stays near that of guessing, log 16 = 2.77. Seeds 0, 1, 2 gave after 140 steps: largest logit
    3432, 7738, 2751 and loss 2.60, 2.18, 2.69 without; 39, 29, 24 and 1.78, 1.77, 2.10 with.
    """
    (losses, logits), (normed_losses, normed_logits) = (stressed(qk_norm, 140) for qk_norm in (False, True))
    assert losses[0] == normed_losses[0] == pytest.approx(math.log(16))
    assert max(logits) > 1000 and max(logits[-20:]) > 30 * max(logits[:5])
    assert max(normed_logits) < 100
    plain, normed = (sum(found[-20:]) / 20 for found in (losses, normed_losses))
    assert plain > 2.35 and normed < 2.1 and plain - normed > 0.4
