"""Durations: what is read, how text and value agree, and the conversion to steps."""

import itertools
import math

import pytest

from sovit.duration import Duration, geometric, parse_duration, to_steps


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("500K steps", 500_000, "steps"),
        ("500ksteps", 500_000, "steps"),
        ("1 step", 1, "steps"),
        ("64M images", 64e6, "images"),
        ("  1.1 M  Images ", 1_100_000, "images"),
        ("32 gflops", 32, "gflops"),
        ("9T GFLOPs", 9e12, "gflops"),
        ("2e11 flops", 2e11, "flops"),
        ("2E+11flops", 2e11, "flops"),
        ("1.5e-2 gflops", 0.015, "gflops"),
        (".5B flops", 5e8, "flops"),
        ("2.01M images", 2_010_000, "images"),
    ],
)
def test_reads_number_suffix_and_unit_exactly(text, value, unit):
    """Exactly: 2.01M is 2010000, which 2.01 * 10**6 in floating point is not."""
    assert parse_duration(text) == Duration(value, unit)


@pytest.mark.parametrize(
    "text",
    ["", "500", "500K", "K steps", "5 hours", "5 m steps ahead", "-5 steps", "1,000 steps", "nan steps", "5G flops"],
)
def test_unreadable_text_is_quoted_with_the_units(text):
    with pytest.raises(ValueError, match=r"images.*gflops.*flops") as error:
        parse_duration(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize("text", ["0 steps", "0K images", "1e999 flops"])
def test_duration_is_positive_and_finite(text):
    with pytest.raises(ValueError, match="not positive and finite"):
        parse_duration(text)


def test_unknown_unit_is_named():
    with pytest.raises(ValueError, match="'hours' is not a unit"):
        Duration(1, "hours")


@pytest.mark.parametrize(
    ("duration", "text"),
    [
        (Duration(500_000, "steps"), "500K steps"),
        (Duration(2e11, "flops"), "200B flops"),
        (Duration(9e12, "gflops"), "9T gflops"),
        (Duration(8.84e15, "gflops"), "8840T gflops"),
        (Duration(32, "gflops"), "32 gflops"),
        (Duration(999.5, "gflops"), "999.5 gflops"),
        (Duration(0.05, "gflops"), "0.05 gflops"),
        (Duration(1e-7, "gflops"), "0.0000001 gflops"),
        (Duration(123_456, "steps"), "123.456K steps"),
    ],
)
def test_text_form(duration, text):
    assert str(duration) == text


def test_text_form_reads_back_to_the_same_bits():
    for value in (1 / 3, math.pi * 1e9, 7e11 / 3, 1e22, 1e-9, 123456789.125, 1000, 1e3 - 1e-10):
        duration = Duration(value, "flops")
        assert parse_duration(str(duration)) == duration


def test_every_unit_gives_the_same_steps_for_the_same_training():
    """So400m at 224 pixels, 220.36 GFLOPs an image: 1000 steps of 128 images, four ways."""
    for text in ("1000 steps", "128K images", "28206080 gflops", "2.820608e16 flops"):
        assert to_steps(parse_duration(text), forward_gflops=220.36, global_batch_size=128) == 1000


def test_steps_of_published_budgets():
    """SoViT's grid: 600M images at batch 128 are 4.69M steps. 9T gflops of a 221-GFLOP model are 40.7B images."""
    assert to_steps(parse_duration("600M images"), forward_gflops=1.0, global_batch_size=128) == 4_687_500
    assert to_steps(parse_duration("9T gflops"), forward_gflops=221.0, global_batch_size=1) == pytest.approx(
        40.72e9, rel=1e-3
    )


def test_steps_are_the_nearest_and_at_least_one():
    def steps(text):
        return to_steps(parse_duration(text), forward_gflops=1.0, global_batch_size=10)

    assert [steps(text) for text in ("14 images", "16 images", "1 images", "0.001 gflops")] == [1, 2, 1, 1]


@pytest.mark.parametrize(
    ("gflops", "batch", "words"), [(0.0, 1, "forward_gflops=0.0"), (1.0, 0, "global_batch_size=0")]
)
def test_conversion_needs_positive_numbers(gflops, batch, words):
    with pytest.raises(ValueError, match=words):
        to_steps(Duration(1, "steps"), forward_gflops=gflops, global_batch_size=batch)


def test_geometric_hits_its_ends_and_has_constant_ratio():
    labels = geometric("5e10 flops", "8e11 flops", 9)
    assert labels[0] == "50B flops"
    assert labels[1] == "70.71B flops"
    assert labels[2] == "100B flops"
    assert labels[-1] == "800B flops"
    values = [parse_duration(label).value for label in labels]
    for low, high in itertools.pairwise(values):
        assert high / low == pytest.approx(math.sqrt(2), rel=2e-4)


def test_geometric_keeps_its_ends_exactly_and_counts_whole_images():
    assert geometric("123456 images", "1M images", 2) == ["123.456K images", "1M images"]
    assert geometric("10 steps", "1K steps", 4) == ["10 steps", "46 steps", "215 steps", "1K steps"]
    assert geometric("10 gflops", "1K gflops", 4) == ["10 gflops", "46.42 gflops", "215.4 gflops", "1K gflops"]


@pytest.mark.parametrize(
    ("first", "last", "num", "words"),
    [
        ("1 gflops", "2 flops", 3, "different units"),
        ("2 steps", "2 steps", 3, "not less than"),
        ("1 steps", "2 steps", 1, "num=1"),
        ("1 steps", "3 steps", 9, "too close"),
    ],
)
def test_impossible_progressions_are_named(first, last, num, words):
    with pytest.raises(ValueError, match=words):
        geometric(first, last, num)
