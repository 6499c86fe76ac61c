"""The fractals are pure functions of (seed, split, index), to the bit, and look as their parameters say."""

import hashlib
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from scipy.stats import chisquare
from sklearn.linear_model import RidgeClassifierCV
from sklearn.preprocessing import StandardScaler

from sovit.data import fractals
from sovit.data.fractals import FractalWorld, fingerprint, render, write_sheet

WORLD = FractalWorld()
GOLDEN = {
    "train": "494824401aca689ac44d850a03f42de88e03b4752a104a5477c17742288106a1",
    "heldout": "330f1cc76c32aec9eff877e9fc147a157bd0fb6a0c762fd33959af5b23538b93",
}
GOLDEN_FINGERPRINT = "e7ce123390bb"


def sha256_of_first_thousand(split):
    digest = hashlib.sha256()
    for array in render(WORLD, np.arange(1000), split):
        digest.update(array.tobytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------ same bits anywhere


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_first_thousand_images_and_labels_have_not_drifted(split):
    assert sha256_of_first_thousand(split) == GOLDEN[split]


def test_bits_do_not_depend_on_the_processor():
    """Compiled unoptimised for a processor without vector or fused instructions, the kernels give the same bytes."""
    code = (
        "import hashlib, numpy as np\n"
        "from sovit.data.fractals import FractalWorld, render\n"
        "images, labels = render(FractalWorld(), np.arange(1000))\n"
        "print(hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest())\n"
    )
    environment = os.environ | {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "NUMBA_OPT": "0"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == GOLDEN["train"]


def test_compiled_kernels_hold_no_fused_multiply_add():
    """A fused multiply-add rounds once instead of twice: fastmath, or a compiler that contracts, would bring it in."""
    render(WORLD, [0])
    for kernel in (fractals._render, fractals._chaos_game):
        (assembly,) = kernel.inspect_asm().values()
        for instruction in ("vfmadd", "vfmsub", "vfnmadd", "fmadd", "fmla"):
            assert instruction not in assembly


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_an_image_is_the_same_alone_in_a_batch_and_in_any_order(split):
    indices = np.array([0, 1, 7, 130, 99_999, 2**40, 2**62])
    images, labels = render(WORLD, indices, split)
    order = np.random.default_rng(0).permutation(len(indices))
    shuffled_images, shuffled_labels = render(WORLD, indices[order], split)
    np.testing.assert_array_equal(shuffled_images, images[order])
    np.testing.assert_array_equal(shuffled_labels, labels[order])
    for index, image, label in zip(indices, images, labels, strict=True):
        alone_image, alone_label = render(WORLD, [index], split)
        np.testing.assert_array_equal(alone_image[0], image)
        assert alone_label[0] == label


def test_every_index_is_another_image():
    images, _ = render(WORLD, np.arange(2000))
    assert len(np.unique(images.reshape(2000, -1), axis=0)) == 2000


def test_fingerprint_is_pinned_and_tells_worlds_apart():
    assert fingerprint(WORLD) == fingerprint(FractalWorld()) == GOLDEN_FINGERPRINT
    others = [FractalWorld(seed=1), FractalWorld(rotation=1.5), FractalWorld(num_classes=255), FractalWorld(size=24)]
    assert len({fingerprint(world) for world in [WORLD, *others]}) == 5


# ------------------------------------------------------------------------------------------------- splits and labels


def test_categories_do_not_change_when_the_counts_grow():
    small = FractalWorld(num_classes=20, num_heldout=6)
    for split, count in (("train", 20), ("heldout", 6)):
        np.testing.assert_array_equal(fractals._points(small, split), fractals._points(WORLD, split)[:count])


def test_held_out_images_of_a_category_do_not_change_when_the_counts_grow():
    few_images, few_labels = render(FractalWorld(num_classes=20, num_heldout=6), np.arange(6 * 5), "heldout")
    images, labels = render(WORLD, np.arange(64 * 5), "heldout")
    for category in range(6):
        np.testing.assert_array_equal(few_images[few_labels == category], images[labels == category])


def test_no_held_out_category_is_a_pretraining_category():
    """Every category, as its set of points, occurs once in the two splits together."""
    points = np.concatenate([fractals._points(WORLD, split)[:, 0].reshape(-1, 2048) for split in ("train", "heldout")])
    assert len(np.unique(points.round(3), axis=0)) == 256 + 64


def test_training_labels_are_uniform():
    labels = render(WORLD, np.arange(51_200))[1]
    counts = np.bincount(labels, minlength=256)
    assert len(counts) == 256
    assert 1e-3 < chisquare(counts).pvalue < 1 - 1e-3


def test_training_labels_do_not_follow_the_order_of_the_stream():
    labels = render(WORLD, np.arange(51_200))[1]
    assert abs(np.corrcoef(labels[:-1], labels[1:])[0, 1]) < 4 / math.sqrt(51_200)


def test_held_out_labels_are_balanced_over_any_consecutive_stretch():
    labels = render(WORLD, np.arange(1000, 1000 + 3 * 64), "heldout")[1]
    np.testing.assert_array_equal(np.bincount(labels), np.full(64, 3))


# ------------------------------------------------------------------------------------------------------- arithmetic


def test_polynomial_sine_and_cosine_agree_with_libm():
    for x in np.linspace(-50, 50, 20_001):
        sine, cosine = fractals._sincos(x)
        assert abs(sine - math.sin(x)) < 1e-12
        assert abs(cosine - math.cos(x)) < 1e-12


def test_polynomial_exp_agrees_with_libm():
    for x in np.linspace(-8, 8, 5001):
        assert fractals._exp(x) == pytest.approx(math.exp(x), rel=1e-12)


def test_hash_is_splitmix64():
    """The first outputs of the published generator for the seed 1234567."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [fractals._draw(np.uint64(1234567), counter) for counter in range(1, 5)] == expected


# ------------------------------------------------------------------------------------------------------------ images


def python_draw(key, counter):
    """splitmix64 in Python's unbounded integers."""
    word = 2**64 - 1
    x = (key + counter * 0x9E3779B97F4A7C15) & word
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & word
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & word
    return x ^ (x >> 31)


def python_render(world, index, space, points):
    """One training image by matrices, histogram2d and libm, from the points of the categories."""
    key = python_draw(python_draw(world.seed, space), index)
    share = [(python_draw(key, k) >> 11) / 2**53 for k in range(10)]
    variant = points[int(share[0] * len(points)), int(share[1] * 8)]
    start = int(share[2] * 513)
    cloud = variant[:, start : start + 512].astype(float)
    u = share[3]
    angle = u * world.rotation * (2 * share[4] - 1)
    shift = u * world.shift * (2 * np.array(share[5:7]) - 1)
    scale = math.exp(u * (world.log_scale_low + (world.log_scale_high - world.log_scale_low) * share[7]))
    aspect = math.exp(u * world.log_aspect * (2 * share[8] - 1))
    contrast = 1 - world.contrast + 2 * world.contrast * share[9]
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    stretch = 0.85 * scale * np.diag([math.sqrt(aspect), 1 / math.sqrt(aspect)])
    x, y = turn @ stretch @ cloud + shift[:, None]
    counts = np.histogram2d(y, x, bins=world.size, range=[[-1, 1], [-1, 1]])[0]
    pixels = range(16, 16 + world.size**2)
    noise = np.array([sum(python_draw(key, pixel).to_bytes(8, "little")) for pixel in pixels], dtype=float)
    noise = (noise - 8 * 127.5) / math.sqrt(8 * (256**2 - 1) / 12)
    value = contrast * np.sqrt(counts / max(1, counts.max())) + world.noise * noise.reshape(counts.shape)
    return np.clip(np.floor(48.5 + 160 * value), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("world", [WORLD, FractalWorld(seed=3, size=24, rotation=3.1, log_aspect=0.8, num_classes=7)])
def test_image_follows_the_recipe(world):
    """Rotation, shift, scale, aspect, contrast and noise of known strength, against an independent renderer."""
    indices = np.arange(500, 540)
    images, _ = render(world, indices)
    expected = [python_render(world, int(index), 3, fractals._points(world, "train")) for index in indices]
    different = np.count_nonzero(images != np.array(expected))
    assert different <= 8, "more than rounding at the edge of a pixel can explain"


def test_shift_moves_the_image_by_the_drawn_amount():
    """The centre of mass of the density moves by strength x draw x half the image, to a pixel's grain."""
    plain = dict(noise=0.0, contrast=0.0, log_scale_low=-1.0, log_scale_high=-1.0, log_aspect=0.0, size=64)
    indices = np.arange(30)
    still, moved = (render(FractalWorld(shift=shift, **plain), indices)[0] for shift in (0.0, 0.3))
    grid = np.arange(64)

    def centre(images):
        density = np.maximum(images.astype(float) - 48, 0) ** 2
        mass = density.sum((1, 2))
        return np.stack([density.sum(1) @ grid / mass, density.sum(2) @ grid / mass], 1)

    root = python_draw(WORLD.seed, 3)
    share = np.array([[python_draw(python_draw(root, i), k) / 2**64 for k in (3, 5, 6)] for i in range(30)])
    expected = 32 * 0.3 * share[:, :1] * (2 * share[:, 1:] - 1)
    inside = share[:, 0] > 0.5  # weak instances are not scaled down enough to stay clear of the edge
    np.testing.assert_allclose((centre(moved) - centre(still))[inside], expected[inside], atol=0.6)


def test_chaos_game_follows_contractive_maps_with_the_drawn_singular_values():
    """Every point is the image of the point before under one of the maps, and no map stretches."""
    for category_root in range(20):
        drawn, maps, points = np.full((4, 8), np.nan), np.full((4, 7), np.nan), np.empty((1, 1, 2, 300))
        fractals._chaos_game(np.uint64(category_root), 0.0, drawn, maps, points)
        n = int(np.isfinite(maps[:, 0]).sum())
        assert 2 <= n <= 4
        matrices, shifts = maps[:n, :4].reshape(n, 2, 2), maps[:n, 4:6]
        singular = np.linalg.svd(matrices, compute_uv=False)
        assert singular.max() <= fractals.MAX_SINGULAR + 1e-12
        assert (5 + n) / 2 - 1e-9 <= (singular @ [1, 2]).sum() <= (6 + n) / 2 + 1e-9
        before, after = points[0, 0, :, :-1].T, points[0, 0, :, 1:].T
        images = np.einsum("kij,tj->tki", matrices, before) + shifts
        assert np.abs(images - after[:, None]).max(-1).min(-1).max() < 1e-12


def test_points_are_normalised_by_their_percentiles():
    for split in ("train", "heldout"):
        points = fractals._points(WORLD, split)
        low = np.percentile(points, 3, axis=-1, method="lower")
        high = np.percentile(points, 97, axis=-1, method="higher")
        np.testing.assert_allclose(low, -high, atol=1e-6)
        np.testing.assert_allclose(high.max(-1), 1, atol=1e-6)


def test_every_category_is_visible():
    """No category falls outside the image or collapses into a few pixels."""
    images, labels = render(FractalWorld(noise=0.0), np.arange(20_000))
    lit = (images > 48).sum((1, 2))
    per_category = np.bincount(labels, lit) / np.bincount(labels)
    assert per_category.min() > 12
    assert per_category.max() < 240


def test_pixels_are_bytes_with_the_stated_background_and_noise():
    images, labels = render(WORLD, np.arange(500))
    assert images.shape == (500, 16, 16) and images.dtype == np.uint8
    assert labels.shape == (500,) and labels.dtype == np.int64
    clean = render(FractalWorld(noise=0.0), np.arange(500))[0]
    empty = images[clean == 48].astype(float)
    assert empty.mean() == pytest.approx(48, abs=0.15)
    assert empty.std() == pytest.approx(16, abs=0.3)
    brightest = clean.max((1, 2))
    assert brightest.min() >= 48 + 160 * 0.7 and brightest.max() <= 255


def test_held_out_categories_are_neither_trivial_nor_hopeless_for_ridge_regression_on_pixels():
    """64 categories, 10 shots, leave-one-out penalty; chance is 63/64. A trained model has room below this."""
    images, labels = render(WORLD, np.arange(64 * (10 + 64)), "heldout")
    pixels = images.reshape(len(images), -1).astype(float)
    scaler = StandardScaler().fit(pixels[:640])
    ridge = RidgeClassifierCV(alphas=np.geomspace(1e2, 1e5, 13)).fit(scaler.transform(pixels[:640]), labels[:640])
    error = 1 - ridge.score(scaler.transform(pixels[640:]), labels[640:])
    assert 0.55 < error < 0.75


# ----------------------------------------------------------------------------------------------------- errors, sheet


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", -1),
        ("num_classes", 0),
        ("num_heldout", 0),
        ("size", 3),
        ("rotation", -0.1),
        ("log_scale_low", 0.5),
        ("log_scale_high", float("nan")),
        ("contrast", 1.1),
        ("noise", float("nan")),
    ],
)
def test_a_senseless_world_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        FractalWorld(**{field: value})


def test_a_negative_index_is_refused():
    with pytest.raises(ValueError, match="-3 is negative"):
        render(WORLD, [4, -3])


def test_sheet_is_written(tmp_path):
    write_sheet(str(tmp_path / "sheet.png"), FractalWorld(num_classes=2, num_heldout=2), rows_per_split=1, columns=3)
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
