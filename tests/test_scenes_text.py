"""The embedded scenes show what their facts say: judged from the pixels, without the code that draws them."""

import hashlib

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier

from sovit.data.digits import digits
from sovit.data.fractals import FractalWorld
from sovit.language.facts import DIGIT, DIGITS, NAMES, PLACES, facts_of
from sovit.language.scenes import named, scenes, write_sheet

TRAIN, TEST = scenes("train", num=1500), scenes("test", num=600)
GOLDEN_FACTS = "74da20088685"


def quarters(images):
    """[B, 1, 16, 16] to [B, 4, 8, 8], in reading order."""
    return images.reshape(-1, 2, 8, 2, 8).permute(0, 1, 3, 2, 4).reshape(-1, 4, 8, 8)


@pytest.fixture(scope="module")
def train_images():
    return TRAIN.images(range(len(TRAIN)))


@pytest.fixture(scope="module")
def quarter_things(train_images):
    """(pixels, the thing in them or None) of every quarter."""
    return [
        (pixels, next((thing for thing in TRAIN.facts(row).things if thing.place == place), None))
        for row, scene in enumerate(quarters(train_images))
        for place, pixels in zip(PLACES, scene, strict=True)
    ]


# -------------------------------------------------------------------------------------------------- same anywhere


def test_facts_have_not_drifted():
    told = repr([facts_of(seed, part, row) for seed in (0, 3) for part in ("train", "test") for row in range(200)])
    assert hashlib.sha256(told.encode()).hexdigest()[:12] == GOLDEN_FACTS


def test_a_scene_does_not_hang_on_its_batch_or_on_how_many_there_are(train_images):
    rows = [1499, 5, 5, 17]
    torch.testing.assert_close(TRAIN.images(rows), train_images[rows], rtol=0, atol=1e-6)
    few = scenes("train", num=20)
    assert [few.captions(row) for row in range(20)] == [TRAIN.captions(row) for row in range(20)]
    assert few.questions == [question for question in TRAIN.questions if question.row < 20]
    assert few.fingerprint != TRAIN.fingerprint


def test_seed_part_and_world_each_make_other_scenes():
    def pixels(part, **arguments):
        return scenes(part, num=8, **arguments).images(range(8))

    base = pixels("train")
    assert not torch.equal(base, pixels("train", seed=1))
    assert not torch.equal(base, pixels("test"))
    other = scenes("train", num=8, world=FractalWorld(seed=5))
    assert not torch.equal(base, other.images(range(8)))
    assert other.facts(3) == TRAIN.facts(3)  # the same words, of other categories
    assert other.fingerprint != scenes("train", num=8).fingerprint


# ---------------------------------------------------------------------------------------------- seen in the pixels


def test_an_empty_quarter_holds_noise_and_a_thing_holds_ink(quarter_things):
    for pixels, thing in quarter_things:
        assert (pixels.max() > -0.3) == (thing is not None)


def test_bright_and_dim_are_told_by_the_brightest_pixel(quarter_things):
    for pixels, thing in quarter_things:
        if thing is not None:
            assert ("bright" if pixels.max() > 0.45 else "dim") == thing.brightness


def test_small_things_leave_more_of_their_quarter_empty(quarter_things):
    """What of a small thing is inked lies within 5 of 8 pixels, both ways; a large one reaches further in 95 of 100."""
    spans = {"small": [], "large": []}
    for pixels, thing in quarter_things:
        if thing is not None and thing.brightness == "bright":
            inked = (pixels > -0.3).numpy()
            spans[thing.size].append(max(int(np.ptp(np.flatnonzero(inked.any(axis)))) + 1 for axis in (0, 1)))
    assert max(spans["small"]) <= 5
    assert np.mean(np.array(spans["large"]) > 5) > 0.95


def test_a_large_digit_is_the_image_of_that_digit_in_its_own_part(quarter_things):
    support, support_labels, test, _ = digits(8)
    support, test = (images.flatten(1) + 1 for images in (support, test))
    for pixels, thing in [one for one in quarter_things if one[1] and one[1].kind == DIGIT and one[1].size == "large"][
        :300
    ]:
        ink = (pixels + 0.62).flatten()
        ink = ink / ink.norm()
        likeness = support @ ink / support.norm(dim=1)
        assert str(int(support_labels[likeness.argmax()])) == thing.name
        assert likeness.max() > (test @ ink / test.norm(dim=1)).max()  # not an image of the other part


def test_no_object_image_is_in_both_parts():
    from sovit.language.drawing import _objects

    for kind in ("fractal", DIGIT):
        train, test = (_objects(FractalWorld(), part, kind)[0].flatten(1).numpy() for part in ("train", "test"))
        assert not {image.tobytes() for image in train} & {image.tobytes() for image in test}


def test_every_name_can_be_told_from_the_others():
    """Nearest neighbours, trained on the train part and judged on the other: 16 fractals, then ten digits."""
    for names, least in ((NAMES, 0.9), (DIGITS, 0.6)):
        x, y = (array.numpy() for array in named("train", num_per_class=1500 // len(names), classes=names))
        u, v = (array.numpy() for array in named("test", num_per_class=30, classes=names))
        x, u = (centred(images) for images in (x, u))
        assert (np.bincount(v) == 30).all()
        assert KNeighborsClassifier(3).fit(x, y).score(u, v) > least


def centred(images):
    """The quarter with the most ink, its ink moved to the corner and brought to unit length."""
    found = quarters(torch.from_numpy(images)) + 0.62
    best = found[torch.arange(len(found)), found.sum((2, 3)).argmax(1)]
    moved = []
    for one in best:
        inked = one > 0.25
        top, left = (int(inked.any(axis).int().argmax()) for axis in (1, 0))
        moved.append(torch.roll(one, (-top, -left), (0, 1)))
    flat = torch.stack(moved).flatten(1)
    return (flat / flat.norm(dim=1, keepdim=True)).numpy()


def test_what_is_said_can_be_learned_from_the_pixels(train_images):
    """A ridge classifier on pixels: whether a quarter is empty, how many things there are, how bright and how large."""
    facts = [TRAIN.facts(row) for row in range(len(TRAIN))]
    told = [TEST.facts(row) for row in range(len(TEST))]
    corner = [[row for row, one in enumerate(all_) if one.at(0, 0)] for all_ in (facts, told)]
    x, u = (images.flatten(1).numpy() for images in (train_images, TEST.images(range(len(TEST)))))

    def score(rows, others, of):
        y, v = [of(facts[row]) for row in rows], [of(told[row]) for row in others]
        values = np.unique(v, return_counts=True)[1]
        return RidgeClassifier(alpha=3.0).fit(x[rows], y).score(u[others], v), values.max() / len(v)

    everything = range(len(x)), range(len(u))
    for rows, others, of, least in (
        (*everything, lambda one: one.at(0, 0) is not None, 0.8),
        (*everything, lambda one: len(one.things), 0.4),
        (*corner, lambda one: one.at(0, 0).brightness, 0.8),
        (*corner, lambda one: one.at(0, 0).size, 0.7),
    ):
        reached, chance = score(list(rows), list(others), of)
        assert reached > max(least, chance + 0.1)


# ----------------------------------------------------------------------------------------------- what can be asked


@pytest.mark.parametrize("size", [8, 17, 64, 256])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_size_and_number_of_channels(size, channels):
    images = scenes("test", num=4, size=size, channels=channels).images([0, 3])
    assert images.shape == (2, channels, size, size) and images.dtype == torch.float32
    assert images.min() >= -1 and images.max() <= 1
    assert (images == images[:, :1]).all()
    assert scenes("test", num=4, size=size).images([]).shape == (0, 1, size, size)


def test_larger_pictures_show_the_same_scene():
    small = scenes("train", num=40).images(range(40))
    large = scenes("train", num=40, size=64).images(range(40))
    averaged = torch.nn.functional.avg_pool2d(large, 4)
    for row in range(40):
        ink = [(one[row, 0].reshape(2, 8, 2, 8).amax((1, 3)) > -0.3) for one in (small, averaged)]
        assert torch.equal(*ink)


def test_what_is_not_there_is_refused_in_a_sentence():
    for arguments, words in (
        ({"part": "val"}, "'val' is no part of the scenes; choose train or test."),
        ({"num": 0}, "0 images are none; ask for at least one."),
        ({"size": 257}, "size=257 is not in 8 .. 256"),
        ({"channels": 2}, "channels=2 is not 1 or 3"),
    ):
        with pytest.raises(ValueError) as caught:
            scenes(**{"part": "train", "num": 3, **arguments})
        assert str(caught.value).startswith(words)
    with pytest.raises(ValueError, match=r"'cat' is nothing a scene holds; choose of moru, "):
        named("test", num_per_class=1, classes=["moru", "cat"])
    with pytest.raises(IndexError, match=r"Row 600 is not in 0 .. 599, the scenes of part test\."):
        TEST.captions(600)


def test_sheet_is_written(tmp_path):
    write_sheet(str(tmp_path / "sheet.png"), TRAIN, rows=[0, 1])
    assert (tmp_path / "sheet.png").read_bytes()[:4] == b"\x89PNG"
