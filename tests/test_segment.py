"""Mean IoU is torchmetrics', tokens lie where their patches are, and the linear head learns what is linear."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from sovit.downstream import iou, pairs, segment
from sovit.downstream.scenes import scenes
from sovit.downstream.segment import Config, Head, check, run, text, tokens
from sovit.lit.trained import Trained
from sovit.strict import ConfigError
from trained_cells import untrained

TINY = Config(num_train=12, num_test=6, steps=6, warmup_steps=2, global_batch_size=4, pixels=False)


@pytest.fixture(scope="module")
def trained() -> Trained:
    return untrained()


def some_counts(seed: int = 0, num: int = 7, classes: int = 5) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    """Counts of random images whose labels hold the number to ignore, and class 3 nowhere; predictions and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.choice([0, 1, 2, 4, 255], size=(num, 9, 11), p=[0.4, 0.2, 0.2, 0.1, 0.1])
    predicted = np.where(rng.random(labels.shape) < 0.6, labels % 5, rng.choice([0, 1, 2, 4], size=labels.shape))
    of_images = np.stack([iou.counts(p, t, classes, 255) for p, t in zip(predicted, labels, strict=True)])
    return of_images, torch.from_numpy(predicted), torch.from_numpy(labels)


def test_mean_iou_and_accuracy_are_those_of_torchmetrics_and_of_the_confusion_matrix() -> None:
    of_images, predicted, labels = some_counts()
    found = iou.scores(of_images)
    index = MulticlassJaccardIndex(5, average="macro", ignore_index=255)(predicted, labels)
    assert found["miou"] == pytest.approx(float(index), abs=1e-6)
    right = MulticlassAccuracy(5, average="micro", ignore_index=255)(predicted, labels)
    assert found["accuracy"] == pytest.approx(float(right), abs=1e-6)
    seen = labels != 255
    table = confusion_matrix(labels[seen], predicted[seen], labels=range(5))
    union = table.sum(0) + table.sum(1) - np.diag(table)
    by_class = iou.with_intervals(of_images)["classes"]
    assert by_class[3] is None
    for k in (0, 1, 2, 4):
        assert by_class[k] == pytest.approx(table[k, k] / union[k])


def test_a_hand_worked_iou() -> None:
    labels, predicted = np.array([[0, 0, 1, 1]]), np.array([[0, 1, 1, 1]])
    found = iou.scores(iou.counts(predicted, labels, 2, 255)[None])
    assert found == {"miou": pytest.approx((1 / 2 + 2 / 3) / 2), "accuracy": 0.75}


def test_pixels_to_ignore_count_nowhere() -> None:
    _, predicted, labels = some_counts()
    other = torch.where(labels == 255, 4 - predicted, predicted)
    for p, q, t in zip(predicted.numpy(), other.numpy(), labels.numpy(), strict=True):
        assert (iou.counts(p, t, 5, 255) == iou.counts(q, t, 5, 255)).all()
    nothing = iou.counts(predicted[0].numpy(), np.full((9, 11), 255), 5, 255)
    assert iou.scores(nothing[None]) == {"miou": None, "accuracy": None}


def test_the_interval_is_that_of_drawing_images_anew() -> None:
    """Accuracy over images of one size is a mean, whose standard error is known."""
    rng = np.random.default_rng(1)
    hits = rng.binomial(100, rng.beta(6, 2, size=200))
    of_images = np.zeros((200, 3, 2), int)
    of_images[:, 0, 0], of_images[:, 1:, 0] = hits, 100
    of_images[:, 1, 0], of_images[:, 1, 1] = hits, 100 - hits
    found = iou.with_intervals(of_images)["accuracy"]
    half = 1.96 * (hits / 100).std() / np.sqrt(200)
    assert found["value"] == pytest.approx(hits.mean() / 100)
    assert found["hi"] - found["lo"] == pytest.approx(2 * half, rel=0.1)


def test_the_most_common_class_is_what_to_beat() -> None:
    of_images, _, labels = some_counts()
    everywhere = np.stack([iou.counts(np.zeros_like(t), t, 5, 255) for t in labels.numpy()])
    assert iou.one_class(of_images) == iou.scores(everywhere)


@pytest.mark.parametrize("pool", ["map", "token"])
def test_tokens_lie_where_their_patches_are(pool: str) -> None:
    """With attention and positions silenced a token sees its own patch only."""
    model = untrained(f"model.pool={pool}", "model.image_size=32").model
    for block in model.blocks:  # type: ignore[union-attr]
        torch.nn.init.zeros_(block.attn.proj.weight)
        torch.nn.init.zeros_(block.attn.proj.bias)
    image = torch.randn(1, 1, 32, 32)
    other = image.clone()
    other[..., 8:16, 24:32] += torch.randn(8, 8)
    changed = (tokens(model, image) - tokens(model, other)).abs().amax(1)[0] > 1e-6
    assert changed.nonzero().tolist() == [[1, 3]]


def test_the_head_is_a_linear_map_upsampled_bilinearly() -> None:
    head = Head(torch.randn(20, 3, 4, 4) * 2 + 1, 2)
    torch.nn.init.normal_(head.linear.weight)
    features = torch.randn(1, 3, 4, 4)
    standard = (features - head.mean) / head.scale
    small = torch.einsum("kc,bchw->bkhw", head.linear.weight[:, :, 0, 0], standard)
    found = head(features, (16, 16))
    # Pixel centres at 4 per token: pixel 6 lies 1/8 of the way from token 1 to token 2, so do rows.
    mixed = 0.875 * small[..., 1] + 0.125 * small[..., 2]
    torch.testing.assert_close(found[..., 6, 6], 0.875 * mixed[..., 1] + 0.125 * mixed[..., 2])


def test_a_scene_is_a_function_of_its_index_and_the_parts_share_no_object(trained: Trained) -> None:
    for kind in ("digits", "fractals"):
        train, test = (scenes(kind, part, trained.cfg, num=50, size=48) for part in ("train", "test"))
        assert torch.equal(train.images([7, 3])[1], train.images([3])[0])
        assert torch.equal(train.masks([7, 3])[1], train.mask(3))
        assert not torch.equal(train.images([3]), test.images([3]))
        ours, theirs = ({one.numpy().tobytes() for one in part.objects} for part in (train, test))
        assert len(ours) > 100 and not ours & theirs
        images, masks = train.images(range(50))[:, 0], train.masks(range(50))
        assert set(masks.unique().tolist()) <= set(range(1 + int(train.labels.max()) + 1))
        objects = [len(mask.unique()) - 1 for mask in masks]
        assert min(objects) >= 1 and max(objects) <= 4
        assert images[masks > 0].mean() > images[masks == 0].mean() + 0.3, "the masks lie elsewhere than the objects"
        assert images[masks == 0].mean() == pytest.approx(-0.6, abs=0.1)


def write_pairs(folder: Path, num: int = 8) -> str:
    """Pictures that are bright (class 1) or dark (class 0) all over, of several sizes, with a rim of no class."""
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for kind in ("images", "masks"):
            (folder / part / kind).mkdir(parents=True)
        for k in range(num):
            shape = (20 + k, 30)
            image = (60 + 130 * (k % 2) + rng.integers(-20, 20, shape)).astype(np.uint8)
            mask = np.full(shape, k % 2, np.uint8)
            mask[:2] = 255
            Image.fromarray(image).save(folder / part / "images" / f"{k}.jpg")
            Image.fromarray(mask).save(folder / part / "masks" / f"{k}.png")
    return str(folder)


def test_what_is_linear_in_the_pixels_is_learnt_to_the_end(trained: Trained, tmp_path: Path) -> None:
    cfg = dataclasses.replace(TINY, data=write_pairs(tmp_path / "pairs"), steps=30, pixels=True)
    check(cfg, trained)
    result = run(trained, cfg, tmp_path / "work")
    assert result["classes"] == ["0", "1"]
    assert result["pixels"]["miou"]["value"] == result["pixels"]["accuracy"]["value"] == 1
    assert result["one_class"]["miou"] < 0.5
    assert text(result)
    json.dumps(result, allow_nan=False)


def test_killed_at_any_step_it_ends_with_the_same_numbers(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(trained, TINY, tmp_path / "whole")
    eager = dataclasses.replace(TINY, checkpoint_every_s=0)
    entropy, calls = segment.F.cross_entropy, iter(range(100))

    def dying(*arguments: Any, **options: Any) -> Any:
        if next(calls) == 4:
            raise KeyboardInterrupt
        return entropy(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(segment.F, "cross_entropy", dying)
        with pytest.raises(KeyboardInterrupt):
            run(trained, eager, tmp_path / "cut")
    assert (tmp_path / "cut" / "resume.ckpt").exists()
    assert run(trained, eager, tmp_path / "cut") == whole


def test_bad_masks_and_pairs_are_one_sentence_each(trained: Trained, tmp_path: Path) -> None:
    data = Path(write_pairs(tmp_path / "pairs"))
    cfg = dataclasses.replace(TINY, data=str(data))

    def refused(message: str, changed: Config = cfg) -> None:
        with pytest.raises(ConfigError, match=message):
            check(changed, trained)
            run(trained, changed, tmp_path / "work")

    refused("holds the number 1, but there are 1|at least 2", dataclasses.replace(cfg, num_classes=1))
    mask = data / "train" / "masks" / "3.png"
    whole = mask.read_bytes()
    wrong = np.full((23, 30), 9, np.uint8)
    Image.fromarray(wrong).save(mask)
    refused("3.png holds the number 9, but there are 2 classes, 0 to 1", dataclasses.replace(cfg, num_classes=2))
    Image.fromarray(np.zeros((23, 30, 3), np.uint8)).save(mask)
    refused("3.png is no mask")
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(mask)
    refused(r"3.jpg has 30 x 23 pixels and .*3.png 30 x 20")
    mask.write_bytes(whole)
    image = data / "train" / "images" / "5.jpg"
    image.write_bytes(b"no image")
    refused("5.jpg cannot be used: it is no image")
    image.unlink()
    refused(r"5.png has no image of its name \(1 such files\)")
    refused("needs the folders train/images", dataclasses.replace(cfg, data=str(tmp_path)))
    refused("did you mean 'digits'", dataclasses.replace(cfg, data="digit"))
    refused("the nearest size that is: 16", dataclasses.replace(TINY, image_size=20))


def test_a_palette_does_not_change_the_numbers_of_a_mask(tmp_path: Path) -> None:
    numbers = np.arange(12, dtype=np.uint8).reshape(3, 4)
    image = Image.fromarray(numbers)
    image.putpalette([255 - k for k in range(256) for _ in range(3)])
    image.save(tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as written:
        assert written.mode == "P"
    assert (pairs.read_mask(tmp_path / "p.png") == numbers).all()
    Image.fromarray(numbers.astype(np.uint16) * 100).save(tmp_path / "deep.png")
    assert (pairs.read_mask(tmp_path / "deep.png") == numbers.astype(int) * 100).all()
