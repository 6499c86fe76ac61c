"""A small data set of coloured fractals on disk, to try data=imagefolder, webdataset and hf with, and to test them.

``python -m sovit.data.generate OUT --kind imagefolder`` writes a train and a test part; ``--damage`` adds to the first
class of the train part one of every defect that a reader has to survive.
"""

from __future__ import annotations

import argparse
import io
import json
import struct
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from sovit.data.fractals import FractalWorld, render
from sovit.data.order import mix

KINDS = ("imagefolder", "webdataset", "hf")
PER_SHARD = 100  # images
NO_LABEL, NO_SUCH_CLASS = "unlabelled", "mislabelled"


class Sample(NamedTuple):
    """The bytes of one file; ``label`` is None where there is none, or a number that is no class."""

    name: str
    data: bytes
    label: int | None


def picture(world: FractalWorld, index: int, size: int) -> Image.Image:
    """Image ``index`` of a world in colours of its own, of a size between ``size`` and twice that."""
    grey = render(world, [index], "heldout")[0][0]  # these go round the classes
    dark, light = np.asarray(mix(index, np.arange(6)) % np.uint64(256), np.float64).reshape(2, 3) * [[0.4], [1]]
    share = grey[..., None] / 255
    wide = 1 + int(mix(index, 7)) % 5 / 4
    image = Image.fromarray((dark + (light - dark) * share).clip(0, 255).astype(np.uint8))
    across, down = (round(size * wide), size) if int(mix(index, 8)) % 2 else (size, round(size * wide))
    return image.resize((across, down), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, form: str = "JPEG", **options: Any) -> bytes:
    """The bytes of an image file."""
    out = io.BytesIO()
    image.save(out, form, **({"quality": 90} if form == "JPEG" else {}), **options)
    return out.getvalue()


def _rotated(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side; to be turned clockwise
    return encoded(image, exif=exif)


def _bomb(image: Image.Image) -> bytes:
    """A PNG of 100,000 x 100,000 pixels in a few bytes."""
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b""))
    chunks = (struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _corrupt(image: Image.Image) -> bytes:
    """Noise over the head of the compressed pixels; PIL takes what is damaged further on without a word."""
    data = encoded(image, "PNG")
    return data[:41] + b"\x55" * 64 + data[105:]


def _palette(image: Image.Image) -> bytes:
    return encoded(image.quantize(16), "PNG", transparency=0)


def _grey16(image: Image.Image) -> bytes:
    return encoded(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "PNG")


ODD: dict[str, Callable[[Image.Image], bytes]] = {  # readable
    "cmyk.jpg": lambda image: encoded(image.convert("CMYK")),
    "palette.png": _palette,
    "grey16.png": _grey16,
    "grey_alpha.png": lambda image: encoded(image.convert("LA"), "PNG"),
    "grey.jpg": lambda image: encoded(image.convert("L")),
    "rotated.jpg": _rotated,
    "animated.gif": lambda image: encoded(image, "GIF", save_all=True, append_images=[image.rotate(90)]),
}
BROKEN: dict[str, Callable[[Image.Image], bytes]] = {  # not readable
    "empty.jpg": lambda image: b"",
    "truncated.jpg": lambda image: encoded(image)[: len(encoded(image)) // 2],
    "corrupt.png": _corrupt,
    "page.jpg": lambda image: b"<html><body>404 Not Found</body></html>",
    "bomb.png": _bomb,
}


def samples(classes: int, images: int, size: int, *, part: str = "train", damage: bool = False) -> Iterator[Sample]:
    """``images`` of each class in turn, and with ``damage`` one of each defect, of class 0. The parts share no image."""
    world = FractalWorld(num_heldout=classes, size=min(size, 64))
    first = 0 if part == "train" else classes * 2**20
    labels = [int(label) for label in render(world, first + np.arange(classes * images), "heldout")[1]]
    for k, label in enumerate(labels):
        yield Sample(f"{k:06d}.jpg", encoded(picture(world, first + k, size)), label)
    if damage:
        image = picture(world, labels.index(0), size)
        for name, make in {**ODD, **BROKEN}.items():
            yield Sample(name, make(image), 0)
        yield Sample(f"{NO_LABEL}.jpg", encoded(image), None)
        yield Sample(f"{NO_SUCH_CLASS}.jpg", encoded(image), classes + 1000)


def write_folder(out: Path, part: str, found: Iterator[Sample], classes: int) -> None:
    """``out/part/CLASS/NAME``; what has no class lies beside the folders, with a file that is no image."""
    folder = out / part
    for label in range(classes):
        (folder / class_name(label)).mkdir(parents=True, exist_ok=True)
    for sample in found:
        if sample.label is not None and sample.label >= classes:  # no class of its own here: a file that is no image
            (folder / class_name(0) / f"{NO_SUCH_CLASS}.txt").write_bytes(b"notes")
            continue
        place = folder if sample.label is None else folder / class_name(sample.label)
        (place / sample.name).write_bytes(sample.data)


def write_shards(out: Path, part: str, found: Iterator[Sample], classes: int) -> None:
    """``out/part-000000.tar`` and so on, and ``out/classes.txt``."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "classes.txt").write_text("".join(f"{class_name(label)}\n" for label in range(classes)))
    every = []
    for sample in found:
        key = sample.name.replace(".", "_", 1).rpartition("_")[0]
        members = {sample.name: sample.data}
        if sample.label is not None:
            about = json.dumps({"label": sample.label, "class": class_name(sample.label)}).encode()
            members |= {f"{key}.cls": str(sample.label).encode(), f"{key}.json": about}
        every.append(members)
    write_tars(out, part, every)


def write_tars(out: Path, part: str, every: Sequence[dict[str, bytes]]) -> None:
    """``out/part-000000.tar`` and so on, of samples given as their members' names and contents."""
    for shard, begin in enumerate(range(0, len(every), PER_SHARD)):
        with tarfile.open(out / f"{part}-{shard:06d}.tar", "w") as tar:
            for name, data in (member for sample in every[begin : begin + PER_SHARD] for member in sample.items()):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def write_saved(out: Path, parts: dict[str, Iterator[Sample]], classes: int) -> None:
    """A `datasets.DatasetDict` of the parts, saved to ``out``."""
    import datasets
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    names = [class_name(label) for label in range(classes)]
    found = {}
    for part, its in parts.items():
        every = [sample for sample in its if sample.label is None or sample.label < classes]  # it refuses other labels
        table = {
            "image": [{"bytes": sample.data, "path": sample.name} for sample in every],
            "label": [sample.label for sample in every],
        }
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        rows = datasets.Dataset.from_dict(table, features=features)
        found[part] = rows
    datasets.DatasetDict(found).save_to_disk(str(out))


def check_empty(out: Path) -> None:
    """Raise ValueError for a folder that holds something."""
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; give a new folder.")


def class_name(label: int) -> str:
    return f"class{label:03d}"


def generate(
    out: Path,
    kind: str = "imagefolder",
    *,
    classes: int = 8,
    images: int = 40,
    test_images: int = 10,
    size: int = 96,
    damage: bool = False,
) -> None:
    """Write ``images`` (and ``test_images``) of each class below ``out``. Raises ValueError if it is not empty."""
    check_empty(out)
    if min(classes, images, test_images, size) < 1 or classes < 2 or kind not in KINDS:
        raise ValueError(f"{classes} classes of {images} and {test_images} images as {kind!r} make no data set.")
    parts = {
        "train": samples(classes, images, size, damage=damage),
        "test": samples(classes, test_images, size, part="test"),
    }
    if kind == "hf":
        write_saved(out, parts, classes)
        return
    for part, found in parts.items():
        (write_folder if kind == "imagefolder" else write_shards)(out, part, found, classes)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sovit.data.generate", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("out", type=Path, help="a new or empty folder")
    parser.add_argument("--kind", choices=KINDS, default="imagefolder")
    parser.add_argument("--classes", type=int, default=8)
    parser.add_argument("--images", type=int, default=40, help="of each class in the train part")
    parser.add_argument("--test-images", type=int, default=10, help="of each class in the test part")
    parser.add_argument("--size", type=int, default=96, help="pixels of the short side")
    parser.add_argument("--damage", action="store_true", help="add one of each defect to the train part")
    given = vars(parser.parse_args(arguments))
    try:
        generate(given.pop("out"), given.pop("kind"), **given)
    except (ValueError, OSError) as error:
        print(f"sovit.data.generate: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
