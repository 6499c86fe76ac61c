"""The loader's batches are a function of the step, and the few-shot sets are split cleanly."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from sovit.data.digits import digits
from sovit.data.fractals import FractalWorld, render
from sovit.data.stream import FractalDataset, StepSampler, digits_fewshot, fractal_fewshot, make_loader

WORLD = FractalWorld(num_classes=12, num_heldout=4)


def batches(start_step, total_steps, num_workers=0):
    return list(make_loader(FractalDataset(WORLD), StepSampler(8, start_step, total_steps), num_workers))


def assert_equal_batches(found, expected):
    assert len(found) == len(expected)
    for (images, labels), (expected_images, expected_labels) in zip(found, expected, strict=True):
        assert torch.equal(images, expected_images)
        assert torch.equal(labels, expected_labels)


# ------------------------------------------------------------------------------------------------------------ stream


def test_batch_k_holds_the_images_k_b_onwards_as_floats_in_minus_one_to_one():
    for step, (images, labels) in enumerate(batches(0, 5)):
        expected_images, expected_labels = render(WORLD, np.arange(8 * step, 8 * step + 8))
        assert images.shape == (8, 1, 16, 16) and images.dtype == torch.float32
        assert labels.shape == (8,) and labels.dtype == torch.int64
        assert -1 <= images.min() < -0.5 and 0.5 < images.max() <= 1
        np.testing.assert_array_equal(((images[:, 0] + 1) * 127.5).round().byte().numpy(), expected_images)
        np.testing.assert_array_equal(labels.numpy(), expected_labels)


def test_workers_do_not_change_the_batches():
    assert_equal_batches(batches(0, 7, num_workers=2), batches(0, 7))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_stream_continues_where_it_stopped(num_workers):
    assert_equal_batches(batches(4, 9, num_workers), batches(0, 9)[4:])


def test_sampler_counts_all_steps_wherever_it_starts():
    """Lightning adds the steps behind a resumed run to the length it is told, so that must not shrink."""
    assert [len(StepSampler(8, start, 9)) for start in (0, 4, 9)] == [9, 9, 9]
    assert list(StepSampler(8, 9, 9)) == []


def test_a_single_item_equals_its_row_of_the_batch():
    dataset = FractalDataset(WORLD)
    images, labels = dataset.__getitems__([3, 1, 2])
    image, label = dataset[1]
    assert torch.equal(image, images[1]) and torch.equal(label, labels[1])


@pytest.mark.parametrize(
    ("arguments", "names"), [((0, 0, 5), "global_batch_size=0"), ((8, 6, 5), "start_step=6"), ((8, -1, 5), "-1")]
)
def test_a_senseless_sampler_is_refused(arguments, names):
    with pytest.raises(ValueError, match=names):
        StepSampler(*arguments)


# ---------------------------------------------------------------------------------------------------------- few-shot


def test_fractal_fewshot_has_balanced_disjoint_support_and_test_images():
    fewshot = fractal_fewshot(WORLD)
    assert fewshot.num_classes == 4
    np.testing.assert_array_equal(np.bincount(fewshot.train_labels), np.full(4, 50))
    np.testing.assert_array_equal(np.bincount(fewshot.test_labels), np.full(4, 64))
    for images in (fewshot.train_images, fewshot.test_images):
        assert images.shape[1:] == (1, 16, 16) and images.dtype == torch.float32
        assert images.min() >= -1 and images.max() <= 1
    everything = torch.cat([fewshot.train_images, fewshot.test_images]).flatten(1)
    assert len(everything.unique(dim=0)) == 4 * (50 + 64)


def test_fewshot_images_are_of_held_out_categories():
    """They are rendered from the held-out split: the training stream of the same indices is another one."""
    fewshot = fractal_fewshot(WORLD)
    heldout, labels = render(WORLD, np.arange(200), "heldout")
    np.testing.assert_array_equal(((fewshot.train_images[:, 0] + 1) * 127.5).round().byte().numpy(), heldout)
    np.testing.assert_array_equal(fewshot.train_labels.numpy(), labels)
    assert not np.array_equal(heldout, render(WORLD, np.arange(200), "train")[0])


@pytest.mark.parametrize("size", [8, 16, 24])
def test_digits_are_those_of_scikit_learn(size):
    train_images, train_labels, test_images, test_labels = digits(size)
    bunch = load_digits()
    np.testing.assert_array_equal(torch.cat([train_labels, test_labels]).numpy(), bunch.target)
    images = torch.cat([train_images, test_images])
    assert images.shape == (1797, 1, size, size) and images.dtype == torch.float32
    assert images.min() == -1 and images.max() <= 1
    block = size // 8
    means = images.reshape(1797, 8, block, 8, block).mean((2, 4)).flatten(1)
    original = torch.from_numpy(bunch.images / 8 - 1).flatten(1).float()
    for image in (0, 700, 1796):
        correlation = torch.corrcoef(torch.stack([means[image], original[image]]))[0, 1]
        assert correlation > 0.95, "the resized image is not the digit at this place"
    if size == 8:
        assert torch.equal(images.flatten(1), original)


def test_digits_fewshot_has_enough_support_for_25_shots():
    fewshot = digits_fewshot(16)
    assert fewshot.num_classes == 10
    assert np.bincount(fewshot.train_labels, minlength=10).min() >= 25
    assert len(fewshot.train_labels) + len(fewshot.test_labels) == 1797


def test_digits_of_no_size_are_refused():
    with pytest.raises(ValueError, match="size=0"):
        digits(0)


def test_streams_are_different_images_of_the_same_categories():
    """Stream s is the images from s * 2^40 on, so no two seeds of a run ever meet."""
    first, _ = FractalDataset(WORLD).__getitems__(range(8))
    second, labels = FractalDataset(WORLD, stream=3).__getitems__(range(8))
    images, expected = render(WORLD, 3 * 2**40 + np.arange(8))
    np.testing.assert_array_equal(((second[:, 0] + 1) * 127.5).round().byte().numpy(), images)
    np.testing.assert_array_equal(labels.numpy(), expected)
    assert not torch.equal(first, second)
    with pytest.raises(ValueError, match="stream=8388608"):
        FractalDataset(WORLD, stream=2**23)


def test_grey_is_repeated_over_the_channels():
    images, _ = FractalDataset(WORLD, channels=3).__getitems__(range(2))
    grey, _ = FractalDataset(WORLD).__getitems__(range(2))
    assert images.shape == (2, 3, 16, 16) and all(torch.equal(images[:, k : k + 1], grey) for k in range(3))
    assert fractal_fewshot(WORLD, 3).test_images.shape[1] == digits_fewshot(16, 3).test_images.shape[1] == 3
