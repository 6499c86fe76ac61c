"""The stream of images in files is a function of the position, and every odd file shows what PIL says it shows."""

import io
import itertools
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import v2

from sovit.config import compose
from sovit.data import decode, images
from sovit.data.fractals import FractalWorld
from sovit.data.generate import BROKEN, ODD, encoded, generate, picture
from sovit.data.images import Batch, FilePixels, ImageStream, Unreadable, fewshot_set, finish
from sovit.data.order import Order, mix, permute
from sovit.data.sources import Images, LeftOut, open_images
from sovit.data.stream import StepSampler, make_loader
from sovit.data.views import TestView, TrainView, decoding, to_float
from sovit.lit.data import TrainData
from sovit.strict import ConfigError


class Held(Images):
    """Images in memory, as a source."""

    def __init__(self, files: list[bytes], labels: list[int]) -> None:
        classes = [str(k) for k in range(max(labels) + 1)]
        super().__init__("held", classes, np.array(labels, np.int32), LeftOut(), "held")
        self.files = files

    def read(self, index: int) -> bytes:
        return self.files[index]

    def name(self, index: int) -> str:
        return str(index)


def drawing(k: int = 0, size: int = 48) -> Image.Image:
    return picture(FractalWorld(num_heldout=4, size=32), k, size)


def png(k: int = 0, size: int = 48) -> bytes:
    return encoded(drawing(k, size), "PNG")


@pytest.fixture(scope="module")
def source() -> Held:
    """Twenty images of four classes; 3, 4 and 11 cannot be read."""
    files = [png(k) for k in range(20)]
    for k in (3, 4, 11):
        files[k] = b"no image"
    return Held(files, [k % 4 for k in range(20)])


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with decoding():
        yield


def loaded(stream: ImageStream, batch: int, start: int, stop: int, workers: int = 0, **share: int) -> list[Batch]:
    return list(make_loader(stream, StepSampler(batch, start, stop, **share), workers))


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for a, b in zip(one[:3], other[:3], strict=True):
            assert torch.equal(a, b)
        assert one.bad == other.bad


# ------------------------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 255, 1000, 4097])
def test_a_permutation_misses_nothing_and_doubles_nothing(size: int) -> None:
    for key in range(4):
        assert sorted(permute(np.arange(size), size, key)) == list(range(size))


def test_every_order_of_four_is_as_likely_as_another() -> None:
    """Binomial deviation of each of the 24 orders, and no order of a large set that can be told from chance."""
    draws = 4_000
    seen = Counter(tuple(permute(np.arange(4), 4, key).tolist()) for key in range(draws))
    assert len(seen) == 24
    assert max(abs(count - draws / 24) for count in seen.values()) < 4.5 * np.sqrt(draws / 24)
    order = permute(np.arange(50_000), 50_000, 5)
    for lag in (0, 1, 2, 256):
        a, b = (order, np.arange(len(order))) if lag == 0 else (order[lag:], order[:-lag])
        assert abs(np.corrcoef(a, b)[0, 1]) < 4.5 / np.sqrt(len(order))


@pytest.mark.parametrize("group", [1, 2, 3, 16])
@pytest.mark.parametrize("blocks", [[12], [3, 5, 1, 4], [4, 0, 7, 0, 0, 2, 9], [1] * 7])
def test_every_epoch_shows_every_image_once_whatever_the_shards(blocks: list[int], group: int) -> None:
    order, size = Order(blocks, seed=3, group=group), sum(blocks)
    epochs = [order(np.arange(size) + size * epoch).tolist() for epoch in range(6)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert order([4 * size + 3, 0, 2 * size + 1]).tolist() == [epochs[4][3], epochs[0][0], epochs[2][1]]
    if size > 7:
        assert Order(blocks, seed=4, group=group)(np.arange(size)).tolist() != epochs[0]


def test_shards_that_are_shuffled_together_are_read_together() -> None:
    order = Order([10] * 12, seed=0, group=3)
    shards = order(np.arange(240)) // 10
    for begin in range(0, 240, 30):
        assert len(set(shards[begin : begin + 30])) == 3
    assert len({tuple(sorted(set(shards[begin : begin + 30]))) for begin in range(0, 240, 30)}) > 4
    firsts = Order([10] * 3, seed=0, group=3)(30 * np.arange(40)) % 10
    assert len(set(firsts.tolist())) > 5, "every epoch begins at the same place within a shard"
    inside = order(np.arange(30))
    assert np.abs(np.diff(inside // 10)).sum() > 5, "the shards of a group follow one after another, not shuffled"


def test_an_epoch_of_a_billion_images_takes_no_memory() -> None:
    size = 10**9 + 7
    found = permute(np.arange(1000) * 10**6, size, 1, 2)
    assert len(set(found.tolist())) == 1000 and found.min() >= 0 and found.max() < size and found.std() > size / 5


def test_no_order_of_nothing() -> None:
    with pytest.raises(ValueError, match="0 images"):
        Order([0, 0], seed=0)
    with pytest.raises(ValueError, match=r"not in 0 \.\. 4"):
        permute([5], 5, 0)


# ------------------------------------------------------------------------------------------------------------ stream


@pytest.mark.parametrize("batch", [6, 32])
def test_batches_depend_on_the_step_alone(source: Held, batch: int) -> None:
    """Workers, where the run starts (in the middle of an epoch), and a batch larger than the data set change nothing."""
    stream = ImageStream(source, TrainView(8, randaugment_ops=2), seed=5, mixup=0.3)
    whole = loaded(stream, batch, 0, 9)
    assert_same(loaded(stream, batch, 0, 9, workers=2), whole)
    for start, workers in ((1, 0), (5, 2), (8, 0)):
        assert_same(loaded(stream, batch, start, 9, workers), whole[start:])


@pytest.mark.parametrize("world", [2, 4])
def test_the_shares_of_the_processes_are_the_global_batch(source: Held, world: int) -> None:
    stream = ImageStream(source, TrainView(8), seed=5, mixup=0.3)
    whole = [finish(batch, 4) for batch in loaded(stream, 8, 2, 5)]
    shares = [[finish(b, 4) for b in loaded(stream, 8, 2, 5, rank=rank, world=world)] for rank in range(world)]
    for step, (pixels, labels) in enumerate(whole):
        assert torch.equal(torch.cat([share[step][0] for share in shares]), pixels)
        assert torch.equal(torch.cat([share[step][1] for share in shares]), labels)


def test_an_epoch_shows_the_labels_of_all_images_that_can_be_read() -> None:
    held = Held([png(k, 16) for k in range(12)], [k % 3 for k in range(12)])
    stream = ImageStream(held, TrainView(8, min_area=1.0, flip=False), seed=0)
    for epoch in range(3):
        batch = stream.__getitems__(range(12 * epoch, 12 * epoch + 12))
        assert np.bincount(batch.labels).tolist() == [4, 4, 4]
        assert [int(label) for label in batch.labels] == [k % 3 for k in stream.order(np.arange(12) + 12 * epoch)]


def test_a_broken_image_is_replaced_by_the_next_that_can_be_read(source: Held) -> None:
    """Whoever reads it, in every epoch; the label is that of the image that is shown."""
    stream = ImageStream(source, TrainView(8, min_area=1.0, flip=False), seed=0)
    batch = stream.__getitems__(range(40))
    stands_for = {3: 5, 4: 5, 11: 12}
    expected = [stands_for.get(k, k) for k in stream.order(np.arange(40)).tolist()]
    assert batch.labels.tolist() == [k % 4 for k in expected]
    for row, k in enumerate(expected):
        seed = int(mix(0, 1, row) >> np.uint64(1))
        np.testing.assert_array_equal(batch.images[row].numpy(), stream.view(source.files[k], seed))
    assert Counter(name for name, _ in batch.bad) == {"held/3": 2, "held/4": 4, "held/11": 2}


def test_an_image_is_cropped_anew_in_every_epoch_and_alike_for_every_reader(source: Held) -> None:
    stream = ImageStream(source, TrainView(8), seed=1)
    first, second = (stream.__getitems__(range(20 * e, 20 * e + 20)) for e in range(2))
    place = {int(k): row for row, k in enumerate(stream.order(np.arange(20, 40)))}
    rows = [place[int(k)] for k in stream.order(np.arange(20))]
    assert (first.images != second.images[rows]).flatten(1).any(1).sum() >= 18
    assert torch.equal(stream.__getitems__([7]).images[0], first.images[7])
    assert not torch.equal(ImageStream(source, TrainView(8), seed=2).__getitems__(range(20)).images, first.images)


def test_reading_leaves_the_generators_of_the_training_alone(source: Held) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    stream = ImageStream(source, TrainView(8, randaugment_ops=1), seed=5, mixup=0.3)
    for workers in (0, 2):
        list(map(lambda batch: finish(batch, 4), loaded(stream, 4, 0, 3, workers)))
    assert torch.equal(torch.get_rng_state(), before[0]) and np.random.get_state()[1].tolist() == before[1]


def test_workers_leave_signals_to_the_process_that_trains(source: Held) -> None:
    """Slurm signals every process of a step: a worker that died of it would turn a run to be resumed into a failed one."""
    loader = make_loader(ImageStream(source, TrainView(8), seed=0), StepSampler(4, 0, 30), 1)
    batches = iter(loader)
    next(batches)
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(batches._workers[0].pid, number)
    assert len(list(batches)) == 29


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_that_went_away_ends_in_one_sentence(workers: int) -> None:
    """Also out of a worker, where an exception would come wrapped in a traceback."""
    held = Held([b"gone"] * 5, [0, 1, 0, 1, 0])
    (batch,) = loaded(ImageStream(held, TrainView(8), seed=0), 4, 0, 1, workers)
    with pytest.raises(
        Unreadable, match=r"^None of 5 images in a row of held can be read, the last one held/\d"
    ) as error:
        finish(batch, 2)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------------- views


def test_the_crop_is_torchvisions_inception_crop() -> None:
    """The same random numbers give the crop that torchvision makes of a PIL image, to a level of 255."""
    image, found, expected = drawing(2, 90), [], []
    crop = v2.RandomResizedCrop(24, scale=(0.05, 1.0), ratio=(3 / 4, 4 / 3), antialias=True)
    for seed in range(30):
        found.append(TrainView(24, flip=False)(encoded(image, "PNG"), seed).permute(1, 2, 0).numpy().astype(int))
        torch.manual_seed(seed)
        expected.append(np.asarray(crop(image)).astype(int))
    assert np.abs(np.array(found) - np.array(expected)).max() <= 1
    assert len({crop.tobytes() for crop in found}) == 30


def test_half_of_the_views_are_mirrored_and_the_switch_stops_that() -> None:
    image = Image.new("RGB", (16, 16))
    image.paste((255, 255, 255), (0, 0, 8, 16))  # the left half is white
    view = TrainView(8, min_area=1.0)
    mirrored = [bool(view(encoded(image, "PNG"), seed)[0, 4, 6] > 127) for seed in range(400)]
    assert 200 - 4.5 * 10 < sum(mirrored) < 200 + 4.5 * 10
    still = TrainView(8, min_area=1.0, flip=False)
    assert not any(still(encoded(image, "PNG"), seed)[0, 4, 6] > 127 for seed in range(50))


def test_randaugment_is_torchvisions_after_the_crop() -> None:
    image = drawing(1)
    plain = TrainView(16, min_area=1.0, flip=False)
    changed = TrainView(16, min_area=1.0, flip=False, randaugment_ops=2, randaugment_magnitude=15)
    assert sum((changed(encoded(image, "PNG"), s) != plain(encoded(image, "PNG"), s)).any() for s in range(20)) >= 15
    torch.manual_seed(4)
    v2.RandomResizedCrop(16, scale=(1.0, 1.0)).make_params([image])
    expected = v2.RandAugment(2, 15)(v2.functional.to_pil_image(plain(encoded(image, "PNG"), 4)))
    torch.manual_seed(4)
    np.testing.assert_array_equal(changed(encoded(image, "PNG"), 4).permute(1, 2, 0), np.asarray(expected))


@pytest.mark.parametrize("size", [(100, 60), (60, 100), (64, 64), (10, 7), (1, 1)])
def test_an_evaluation_sees_the_centre(size: tuple[int, int]) -> None:
    """Oracle: PIL, the short side to 32 for a view of 28, and the middle of that."""
    image = drawing(3, 80).resize(size)
    scale = 32 / min(size)
    resized = image.resize((int(size[0] * scale), int(size[1] * scale)), Image.Resampling.BILINEAR)
    left, top = (round((side - 28) / 2) for side in resized.size)
    expected = np.asarray(resized.crop((left, top, left + 28, top + 28))).astype(int)
    found = TestView(28)(encoded(image, "PNG")).permute(1, 2, 0).numpy()
    assert np.abs(found - expected).max() <= 1


def test_bytes_become_minus_one_to_one() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(1, 3, 1, 1)
    floats = to_float(pixels)
    assert floats.shape == (1, 3, 16, 16) and floats.is_contiguous() and floats.dtype == torch.float32
    assert floats.min() == -1 and floats.max() == 1
    torch.testing.assert_close(floats[0, 2].flatten(), torch.linspace(-1, 1, 256))


def test_grey_models_get_grey_images() -> None:
    assert TrainView(8, channels=1)(png(), 0).shape == TestView(8, channels=1)(encoded(drawing())).shape == (1, 8, 8)


@pytest.mark.parametrize("view", [TestView(24), TrainView(24, flip=False)])
def test_a_large_jpeg_is_decoded_small_and_looks_the_same(view: TestView | TrainView, monkeypatch) -> None:
    image = drawing(2, 600)
    data, more = encoded(image), ((3,) if isinstance(view, TrainView) else ())
    seen: list[int] = []
    honest = decode.pixels
    monkeypatch.setattr(decode, "pixels", lambda *a: seen.append((out := honest(*a)).width) or out)
    small = view(data, *more).int()
    monkeypatch.setattr(decode, "shrink", lambda *a: None)
    whole = view(data, *more).int()
    assert seen[0] <= image.width / 2 and seen[1] == image.width
    assert (small - whole).abs().float().mean() < 1.5 and (small - whole).abs().max() < 30


# ----------------------------------------------------------------------------------------------------------- defects


def test_odd_images_show_what_pil_shows() -> None:
    image = drawing(1, 40)

    def read(data: bytes, channels: int = 3) -> np.ndarray:
        return np.asarray(decode.pixels(*decode.opened(data), channels)).astype(int)

    def pil(data: bytes) -> Image.Image:
        return Image.open(io.BytesIO(data))

    made = {name: make(image) for name, make in ODD.items()}
    np.testing.assert_array_equal(read(made["cmyk.jpg"]), np.asarray(pil(made["cmyk.jpg"]).convert("RGB")))
    assert np.abs(read(made["cmyk.jpg"]) - np.asarray(image)).mean() < 6  # not inverted
    np.testing.assert_array_equal(read(made["animated.gif"]), np.asarray(pil(made["animated.gif"]).convert("RGB")))
    upright = ImageOps.exif_transpose(pil(made["rotated.jpg"]))
    np.testing.assert_array_equal(read(made["rotated.jpg"]), np.asarray(upright))
    assert read(made["rotated.jpg"]).shape[:2] == image.size  # height and width have changed places
    grey = np.asarray(image.convert("L")).astype(int)
    np.testing.assert_array_equal(read(made["grey16.png"]), np.repeat(grey[..., None], 3, 2))
    np.testing.assert_array_equal(read(made["grey_alpha.png"], channels=1), grey)
    rgba = np.asarray(pil(made["palette.png"]).convert("RGBA")).astype(int)
    on_white = np.where(rgba[..., 3:] == 0, 255, rgba[..., :3])
    assert (rgba[..., 3] == 0).any()
    np.testing.assert_array_equal(read(made["palette.png"]), on_white)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_as_pil_turns_it(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(drawing(1, 32), exif=exif)
    image, found = decode.opened(data)
    assert found == orientation
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert decode.upright_size(image, found) == expected.size
    np.testing.assert_array_equal(np.asarray(decode.pixels(image, found)), np.asarray(expected))


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_image_is_told_from_a_sound_one(name: str) -> None:
    """PIL reads a damaged PNG without a word when it is asked a second time, which looking for its EXIF does."""
    data = BROKEN[name](drawing())
    for view in (lambda: TestView(8)(data), lambda: TrainView(8)(data, 0)):
        with pytest.raises(decode.BadImage) as error:
            view()
        assert 0 < len(str(error.value)) < 130 and "0x" not in str(error.value)


def test_any_bytes_are_an_image_or_a_reason() -> None:
    """Flipped and cut bytes of every kind of file raise BadImage or give an image, and nothing else."""
    rng = np.random.default_rng(0)
    outcomes = Counter()
    for make, turn in itertools.product(ODD.values(), range(12)):
        data = bytearray(make(drawing(size=16)))
        for place in rng.integers(0, len(data), 1 + turn):
            data[place] = rng.integers(256)
        try:
            outcomes[TestView(8)(bytes(data[: rng.integers(len(data) // 2, len(data) + 1)])).shape] += 1
        except decode.BadImage:
            outcomes["bad"] += 1
    assert set(outcomes) == {(3, 8, 8), "bad"} and outcomes["bad"] > 20


# ------------------------------------------------------------------------------------------------------------- mixup


def test_mixup_is_the_written_out_formula() -> None:
    held = Held([png(k, 16) for k in range(6)], [0, 1, 2, 0, 1, 2])
    view = TrainView(8)
    plain = [finish(b, 3) for b in loaded(ImageStream(held, view, seed=3), 4, 0, 30)]
    mixed = loaded(ImageStream(held, view, seed=3, mixup=0.4), 4, 0, 30)
    shares = torch.cat([batch.shares for batch in mixed]).reshape(-1, 2)
    assert torch.equal(shares[:, 0], shares[:, 1]) and shares.min() >= 0.5 and shares.max() <= 1
    assert len(shares[:, 0].unique()) > 50
    for (pixels, labels), batch in zip(plain, mixed, strict=True):
        found, targets = finish(batch, 3)
        assert targets.dtype == torch.float32 and targets.shape == (4, 3)
        for row in range(4):
            share, partner = float(batch.shares[row]), row ^ 1
            torch.testing.assert_close(found[row], share * pixels[row] + (1 - share) * pixels[partner])
            expected = torch.zeros(3)
            expected[labels[row]] += share
            expected[labels[partner]] += 1 - share
            torch.testing.assert_close(targets[row], expected)


def test_the_share_of_mixup_is_beta_distributed() -> None:
    """Mean and variance of max(l, 1 - l) for l ~ Beta(1, 1): uniform on 1/2 .. 1."""
    stream = ImageStream(Held([png()] * 2, [0, 1]), TrainView(8), seed=0, mixup=1.0)
    shares = stream._shares(np.arange(0, 8000, 2)).double()
    assert abs(shares.mean() - 0.75) < 4.5 * (1 / 48) ** 0.5 / 4000**0.5 and abs(shares.var() - 1 / 48) < 0.002


def test_mixup_needs_whole_pairs_in_every_process(tmp_path: Path) -> None:
    cfg = compose(["data=hf", "data.root=x", "data.num_classes=3", "model.channels=3", "data.mixup=0.2",
                   "trainer.global_batch_size=12", "eval.datasets=[digits]"])  # fmt: skip
    TrainData(cfg, 5, rank=1, world=2)
    with pytest.raises(ConfigError, match=r"trainer\.global_batch_size=12 does not give 4 processes an even number"):
        TrainData(cfg, 5, rank=1, world=4)
    with pytest.raises(ConfigError, match="12 does not give 5 processes"):
        TrainData(cfg, 5, rank=1, world=5)


# ---------------------------------------------------------------------------------------------------------- few-shot


@pytest.mark.parametrize("kept", [True, False])
def test_slices_of_a_set_larger_than_memory_are_those_of_a_tensor(source: Held, kept: bool, monkeypatch) -> None:
    """And an unreadable image is replaced by one of its own class, named once a pass."""
    if not kept:
        monkeypatch.setattr(images, "IN_MEMORY", 0)
    bad: list[str] = []
    lazy = FilePixels(source, np.arange(20), TestView(8), threads=3, note=lambda name, reason: bad.append(name))
    stands_for = {3: 7, 4: 8, 11: 15}
    expected = to_float(torch.stack([TestView(8)(source.files[stands_for.get(k, k)]) for k in range(20)]))
    for _ in range(2):
        assert torch.equal(torch.cat([lazy[start : start + 6] for start in range(0, 24, 6)]), expected)
    assert len(lazy) == 20 and len(lazy[5:5]) == 0
    assert Counter(bad) == {name: 1 if kept else 2 for name in ("held/3", "held/4", "held/11")}


def test_a_class_without_a_readable_image_ends_in_one_sentence() -> None:
    held = Held([png(), b"", png(), b""], [0, 1, 0, 1])
    with pytest.raises(Unreadable, match="None of 2 images in a row of held can be read"):
        FilePixels(held, np.arange(4), TestView(8))[0:4]


def test_the_pool_of_a_large_set_is_fifty_a_class(monkeypatch) -> None:
    monkeypatch.setattr(images, "AS_TENSOR", 0)
    train, test = (Held([png(size=8)] * (n * 3), [k % 3 for k in range(n * 3)]) for n in (120, 2))
    found = fewshot_set("name", train, test, TestView(8), shots=[1, 5])
    assert isinstance(found.train_images, FilePixels) and len(found.train_images) == 150
    assert np.bincount(found.train_labels).tolist() == [50] * 3 and np.bincount(found.test_labels).tolist() == [2] * 3
    assert np.array_equal(train.labels[found.train_images.chosen], found.train_labels)
    assert np.ptp(found.train_images.chosen) > 50 and len(set(found.train_images.chosen.tolist())) == 150
    more = fewshot_set("name", train, test, TestView(8), shots=[40])
    assert np.bincount(more.train_labels).tolist() == [80] * 3


def test_a_test_set_of_other_classes_is_refused() -> None:
    train, test = Held([png()] * 4, [0, 1, 2, 0]), Held([png()] * 2, [0, 1])
    with pytest.raises(ValueError, match="different classes, such as '2'"):
        fewshot_set("name", train, test, TestView(8), shots=[1])


# ------------------------------------------------------------------------------------------------------ whole stream


@pytest.mark.parametrize("kind", ["imagefolder", "webdataset", "hf"])
def test_every_kind_gives_the_same_images_at_the_same_position(kind: str, tmp_path: Path, monkeypatch) -> None:
    """With workers that were forked after files were opened: a shared file position would mix images up."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    generate(tmp_path / "set", kind, classes=3, images=40, test_images=1, size=16)
    found = open_images(kind, str(tmp_path / "set"), "train")
    stream = ImageStream(found, TrainView(8), seed=0, group=1)
    alone = loaded(stream, 20, 0, 8)
    assert_same(loaded(stream, 20, 0, 8, workers=2), alone)
    rows = stream.order(np.arange(20))
    for row, index in enumerate(rows.tolist()):
        seed = int(mix(0, 1, row) >> np.uint64(1))
        np.testing.assert_array_equal(alone[0].images[row].numpy(), TrainView(8)(found.read(index), seed))
