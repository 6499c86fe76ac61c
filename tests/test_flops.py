"""Compute accounting, against published figures, and against the real module counted by torch."""

import random
from collections import Counter

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sovit.flops import POOLS, POS_EMBEDS, forward_flops, forward_gflops, num_params, train_gflops
from sovit.models.vit import build_vit
from sovit.shape import Shape, parse_shape

# name, image size, forward GFLOPs with a MAP head
PUBLISHED_GFLOPS = [
    ("So400m/14", 224, 221),  # arXiv 2305.13035
    ("So400m/14", 384, 672),  # arXiv 2305.13035; 27 x 27 tokens, the image does not divide
    ("So400m/14", 518, 1374),  # arXiv 2305.13035
    ("g/14", 518, 3208),  # arXiv 2305.13035
    ("G/14", 518, 5668),  # arXiv 2305.13035
    ("L/16", 384, 383),  # arXiv 2305.13035
    ("L/16", 224, 122.9),  # arXiv 2106.04560, as the rest
    ("g/14", 224, 533.1),
    ("G/14", 224, 965.3),
    ("L/16", 384, 382.8),
    ("g/14", 384, 1596.4),
    ("G/14", 384, 2859.9),
]
# arXiv 2106.04560: small models, where the element-wise work that XLA counts as well is up to 1 % of the whole
PUBLISHED_SMALL_GFLOPS = [
    *[("s/28", 224, "0.7"), ("s/16", 224, "2.2"), ("S/32", 224, "2.3"), ("Ti/16", 224, "2.5"), ("B/32", 224, "8.7")],
    *[("S/16", 224, "9.2"), ("B/28", 224, "11.3"), ("B/16", 224, "35.1"), ("s/28", 384, "2.0"), ("s/16", 384, "7.8")],
    *[("S/32", 384, "6.9"), ("Ti/16", 384, "9.5"), ("B/32", 384, "26.0"), ("S/16", 384, "31.2")],
    *[("B/28", 384, "30.5"), ("B/16", 384, "111.3")],
]
# The shapes of arXiv 2106.04560, 2302.05442 and 2305.13035 by hand, at 224 pixels with a MAP head
WORKED_GFLOPS = [
    *[("mu", "0.02"), ("Ti/16", "2.5"), ("S/16", "9.3"), ("M/16", "16.1"), ("B/16", "35.4"), ("B/14", "46.75")],
    *[("L/16", "123.3"), ("So150m/14", "71.4"), ("So400m/14", "220.35"), ("H/14", "335"), ("g/14", "534.00")],
    *[("g-opt", "599"), ("G/14", "966.6"), ("G-opt", "873"), ("e/14", "1977"), ("22B/14", "11251")],
    *[("grid-origin", "15.51"), ("star-center", "837.80")],
]
# name, pool, millions of parameters without a classifier; ``avg`` has no head, so it is the encoder alone
PUBLISHED_PARAMS = [
    *[("mu", "avg", "0.04"), ("M/16", "avg", "38"), ("H/14", "avg", "631")],  # big_vision, models/vit.py
    *[("g-opt", "avg", "1135"), ("G-opt", "avg", "1663"), ("e/14", "avg", "3805")],
    *[("Ti/16", "avg", "5.5"), ("s/16", "avg", "5.0"), ("s/28", "avg", "5.4"), ("S/16", "avg", "22")],  # 2106.04560
    *[("S/32", "avg", "22"), ("B/32", "avg", "87"), ("B/28", "avg", "87"), ("B/16", "avg", "86")],
    *[("B/14", "avg", "85.7"), ("L/16", "avg", "303"), ("g/14", "avg", "1011")],
    *[("G/14", "avg", "1843"), ("G/14", "map", "1881")],
    *[("So150m/14", "avg", "130"), ("So150m/14", "map", "137")],  # 2305.13035
    *[("So400m/14", "avg", "412"), ("So400m/14", "map", "428"), ("So400m/14", "map", "427.7")],
]


def agrees(value: float, printed: str, relative: float = 0.005) -> bool:
    """Within the relative tolerance, or within half a unit of the last printed digit."""
    digits = len(printed.partition(".")[2])
    return abs(value - float(printed)) <= max(relative * float(printed), 0.5 * 10**-digits)


@pytest.mark.parametrize(("name", "image_size", "gflops"), PUBLISHED_GFLOPS)
def test_forward_gflops_are_those_of_the_papers_within_half_a_percent(name, image_size, gflops):
    assert forward_gflops(parse_shape(name), image_size) == pytest.approx(gflops, rel=0.005)


@pytest.mark.parametrize(("name", "image_size", "printed"), PUBLISHED_SMALL_GFLOPS)
def test_forward_gflops_of_small_models_are_those_of_the_paper_within_a_percent_or_rounding(name, image_size, printed):
    assert agrees(forward_gflops(parse_shape(name), image_size), printed, relative=0.0104)


@pytest.mark.parametrize(("name", "printed"), WORKED_GFLOPS)
def test_forward_gflops_of_the_named_shapes(name, printed):
    assert agrees(forward_gflops(parse_shape(name), 224), printed)


@pytest.mark.parametrize(("name", "pool", "printed"), PUBLISHED_PARAMS)
def test_parameters_of_the_named_shapes(name, pool, printed):
    assert agrees(sum(num_params(parse_shape(name), 224, pool=pool).values()) / 1e6, printed)


def test_published_budgets_are_forward_flops_times_images():
    """arXiv 2305.13035 gives 9e12 GFLOPs to both; with x3 for training they would be 27e12."""
    assert 40e9 * forward_gflops(parse_shape("So400m/14"), 224) == pytest.approx(9e12, rel=0.06)
    assert 16e9 * forward_gflops(parse_shape("g/14"), 224) == pytest.approx(9e12, rel=0.06)


def test_vit_22b_counts_the_matrices_of_its_blocks():
    """arXiv 2302.05442 prints 21743 M."""
    shape = parse_shape("22B")
    groups = num_params(shape, 224)
    biases = shape.depth * (5 * shape.width + shape.mlp_dim)
    assert groups["attention_projections"] + groups["mlp"] - biases == pytest.approx(21_743.27e6, rel=1e-6)


def test_vit_e_with_the_jft_classifier():
    """3926 M in arXiv 2302.05442, with the 29,593 classes of the public JFT configuration."""
    assert agrees(sum(num_params(parse_shape("e/14"), 224, num_classes=29_593).values()) / 1e6, "3926")


@pytest.mark.parametrize(
    ("name", "total"),
    [("So400m", 428_833_704), ("So150m", 138_255_240), ("grid-origin", 29_871_912), ("star-center", 1_631_282_104)],
)
def test_parameters_with_a_map_head_and_1000_classes_to_the_last_one(name, total):
    """Totals of timm's VisionTransformer at 224 pixels, counted once on the real modules."""
    assert sum(num_params(parse_shape(name), 224, num_classes=1000).values()) == total


def test_training_costs_three_forward_passes():
    shape = parse_shape("B/16")
    assert train_gflops(shape, 224, pool="avg") == 3 * forward_gflops(shape, 224, pool="avg")


def test_pixels_that_fill_no_patch_cost_nothing():
    shape = parse_shape("So400m/14")
    assert forward_flops(shape, 384) == forward_flops(shape, 378)


@pytest.mark.parametrize("count", [forward_flops, forward_gflops, train_gflops, num_params])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 13}, "image_size=13 is smaller than patch_size=14"),
        ({"image_size": 0}, "image_size=0 is not"),
        ({"image_size": 224.0}, "image_size=224.0 is not"),
        ({"pool": "gap"}, "pool='gap' is unknown; use one of map, avg, token"),
        ({"channels": 0}, "channels=0 is not"),
        ({"num_classes": -1}, "num_classes=-1 is not"),
    ],
)
def test_impossible_input_is_refused(count, arguments, message):
    with pytest.raises(ValueError, match=message):
        count(parse_shape("B/14"), **({"image_size": 224} | arguments))


def test_position_tables_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="pos_embed='rope' is unknown"):
        num_params(parse_shape("B/14"), 224, pos_embed="rope")
    with pytest.raises(ValueError, match="divisible by 4, not 30"):
        num_params(Shape(30, 1, 8, 3, 8), 16, pos_embed="sincos2d")


def random_build(rng: random.Random, *, max_depth: int) -> dict:
    heads, head_dim, patch = rng.randint(1, 6), rng.randint(1, 24), rng.randint(1, 9)
    shape = Shape(heads * head_dim, rng.randint(1, max_depth), rng.randint(1, 700), heads, patch)
    return {
        "shape": shape,
        "image_size": patch * rng.randint(1, 5),
        "channels": rng.randint(1, 4),
        "pool": rng.choice(POOLS),
        "num_classes": rng.choice([0, 1, 10, 37]),
        "pos_embed": rng.choice(POS_EMBEDS if shape.width % 4 == 0 else POS_EMBEDS[:1]),
    }


def build_on_meta(build: dict) -> torch.nn.Module:
    with torch.device("meta"):
        return build_vit(**build, fused_attention=False)


def group_of(name: str) -> str:
    """The group of a module's or a parameter's name; attention products are what is left of ``attn``."""
    parts = name.split(".")
    if parts[0] in ("pos_embed", "cls_token"):
        return "positions"
    if parts[0] == "blocks":
        return {"attn": "attention_projections", "mlp": "mlp", "norm1": "norms", "norm2": "norms"}[parts[2]]
    return {"patch_embed": "patch_embedding", "norm": "norms", "attn_pool": "map_head", "head": "classifier"}[parts[0]]


def test_parameters_of_a_thousand_random_shapes_are_those_of_the_module_group_by_group():
    """Over pools, position tables, odd widths, heads and MLP dimensions; (448, 976) is a pair timm's ratio truncates."""
    rng = random.Random(0)
    builds = [random_build(rng, max_depth=2) for _ in range(1000)]
    builds += [builds[0] | {"shape": Shape(448, 1, 976, 7, 8), "image_size": 16, "pool": pool} for pool in POOLS]
    assert {(build["pool"], build["pos_embed"]) for build in builds} == {(p, e) for p in POOLS for e in POS_EMBEDS}
    for build in builds:
        counted: Counter[str] = Counter()
        for name, parameter in build_on_meta(build).named_parameters():
            counted[group_of(name)] += parameter.numel()
        assert +counted == +Counter(num_params(**build)), build


def test_flops_are_those_torch_counts_group_by_group_forward_and_backward():
    """On meta tensors with attention written out: torch's counter does not see fused attention on a CPU. The backward
    pass is two products for each of the forward pass, save the gradient of the image.
    """
    rng = random.Random(1)
    builds = [random_build(rng, max_depth=3) for _ in range(20)]
    assert {build["pool"] for build in builds} == set(POOLS)
    for build in builds:
        model = build_on_meta(build)
        images = torch.empty(2, build["channels"], build["image_size"], build["image_size"], device="meta")
        with FlopCounterMode(display=False) as counter:
            loss = model(images).sum()
        groups = forward_flops(**{key: value for key, value in build.items() if key != "pos_embed"})
        by_module = {name: sum(ops.values()) // 2 for name, ops in counter.get_flop_counts().items()}
        counted: Counter[str] = Counter()
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and not name.startswith("attn_pool"):
                counted[group_of(name)] += by_module[f"VisionTransformer.{name}"]
        attention = sum(by_module[f"VisionTransformer.blocks.{i}.attn"] for i in range(build["shape"].depth))
        counted["attention_products"] = attention - counted["attention_projections"]
        counted["map_head"] = by_module.get("VisionTransformer.attn_pool", 0)
        assert +counted == +Counter(groups), build
        assert counter.get_total_flops() == 2 * sum(groups.values()), build
        with FlopCounterMode(display=False) as backward:
            loss.backward()
        expected = 2 * (2 * sum(groups.values()) - groups["patch_embedding"])
        assert backward.get_total_flops() == expected, build
