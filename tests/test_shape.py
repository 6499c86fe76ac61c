"""Shapes: what is accepted, the two text forms, and the named shapes of the literature."""

import numpy as np
import pytest

from sovit.shape import NAMED, Shape, num_patches, parse_shape


@pytest.mark.parametrize("field", ["width", "depth", "mlp_dim", "num_heads", "patch_size"])
@pytest.mark.parametrize("value", [0, -4, True, 4.0, "4", None, np.float64(4)])
def test_every_field_is_a_positive_whole_number(field, value):
    fields = {"width": 32, "depth": 4, "mlp_dim": 128, "num_heads": 4, "patch_size": 8} | {field: value}
    with pytest.raises(ValueError, match=rf"^{field}=.* is not a positive whole number\.$"):
        Shape(**fields)


@pytest.mark.parametrize(("width", "heads", "mend"), [(100, 16, "96 or 112"), (17, 16, "16 or 32"), (3, 4, "width 4,")])
def test_a_width_that_heads_cannot_share_is_refused_with_the_nearest_widths(width, heads, mend):
    with pytest.raises(ValueError, match=f"width={width} is not divisible by num_heads={heads}; .*{mend}"):
        Shape(width, 4, 128, heads, 8)


def test_an_odd_head_dimension_is_a_shape():
    """SoViT's own shapes have them: 880 / 16 = 55 and 1968 / 16 = 123 (arXiv 2305.13035)."""
    assert parse_shape("So150m").head_dim == 55
    assert parse_shape("star-center").head_dim == 123


def test_shapes_are_values():
    shape = Shape(32, 4, 128, 4, 8)
    assert shape == Shape(**shape.as_dict())
    assert len({shape, Shape(32, 4, 128, 4, 8), Shape(32, 4, 128, 2, 8)}) == 2
    with pytest.raises(AttributeError):
        shape.width = 64


def test_text_round_trips_for_every_named_shape():
    for name, named in NAMED.items():
        shape = named.shape
        assert parse_shape(name) == shape
        assert parse_shape(f"{name}/{shape.patch_size}") == shape
        assert parse_shape(f"{shape}/{shape.patch_size}", num_heads=shape.num_heads) == shape
        assert parse_shape(str(shape), head_dim=shape.head_dim, patch_size=shape.patch_size) == shape


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("S/16", (384, 12, 1536, 6, 16)),  # arXiv 2106.04560; not "s", which is smaller
        ("s/28", (256, 6, 1024, 8, 28)),  # arXiv 2106.04560
        ("g/14", (1408, 40, 6144, 16, 14)),  # arXiv 2106.04560
        ("22B", (6144, 48, 24576, 48, 14)),  # arXiv 2302.05442
        ("So150m/14", (880, 18, 2320, 16, 14)),  # arXiv 2305.13035
        ("So400m/14", (1152, 27, 4304, 16, 14)),  # arXiv 2305.13035
        ("star-center", (1968, 40, 6144, 16, 14)),  # arXiv 2305.13035, section 4
        ("grid-origin", (608, 10, 928, 16, 14)),  # arXiv 2305.13035, section 4
    ],
)
def test_named_shapes_are_those_of_the_papers(name, expected):
    assert tuple(parse_shape(name).as_dict().values()) == expected


def test_explicit_arguments_win_over_what_the_text_implies():
    assert parse_shape("So400m/14", patch_size=16).patch_size == 16
    assert parse_shape("608x10x928/14", num_heads=16, patch_size=28) == Shape(608, 10, 928, 16, 28)
    assert parse_shape("So400m", num_heads=9).num_heads == 9
    assert parse_shape("So400m", head_dim=128).num_heads == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 0}, "num_heads=0 is not"),  # zero is a wrong value, not a missing one
        ({"patch_size": 0}, "patch_size=0 is not"),
        ({"head_dim": 0}, "not divisible by head_dim=0"),
        ({"head_dim": 7}, "width=1152 is not divisible by head_dim=7"),
        ({"head_dim": 64, "num_heads": 16}, "num_heads=16 times head_dim=64 is not width=1152"),
    ],
)
def test_bad_arguments_are_refused_and_not_replaced_by_the_names_own(arguments, message):
    with pytest.raises(ValueError, match=message):
        parse_shape("So400m/14", **arguments)


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("So400", "So400m"),
        ("so400m/14", "So400m"),
        ("g_opt", "g-opt"),
        ("22b/14", "22B"),
        ("b/16", "B"),
        ("T/16", "Ti"),
    ],
)
def test_a_misspelt_name_is_answered_with_the_nearest(text, near):
    with pytest.raises(ValueError, match=f"^{text!r} is not a shape: .*did you mean {near!r}"):
        parse_shape(text)


@pytest.mark.parametrize(
    "text", ["", "608x10", "608x10x928x16", "-608x10x928", "6.5x1x2", "So400m/", "So400m/x", "B/14/2"]
)
def test_anything_else_is_not_a_shape(text):
    with pytest.raises(ValueError, match="is not a shape"):
        parse_shape(text, num_heads=16, patch_size=14)


def test_dimensions_alone_need_heads_and_a_patch_size():
    with pytest.raises(ValueError, match="how many attention heads"):
        parse_shape("608x10x928", patch_size=14)
    with pytest.raises(ValueError, match="patch size"):
        parse_shape("608x10x928", num_heads=16)


def test_num_patches_of_a_square_image():
    assert num_patches(224, 14) == 256
    assert num_patches(16, 8) == 4


@pytest.mark.parametrize(
    ("image_size", "message"),
    [
        (384, "use image_size 378 or 392"),
        (8, "use image_size 14"),
        (0, "not a positive"),
        (-14, "not a positive"),
        (28.0, "not a positive"),
    ],
)
def test_an_image_that_patches_cannot_tile_is_refused_with_the_nearest_sizes(image_size, message):
    with pytest.raises(ValueError, match=message):
        num_patches(image_size, 14)
