"""Images and masks of their classes in folders: DATA/train/images/NAME.jpg with DATA/train/masks/NAME.png, and a part
test or val. A mask holds the number of a class for each pixel; DATA/classes.txt, if there, names them.

An image is squeezed to a square, its mask too where it is trained on; scores are taken at the mask's own resolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from sovit.config import ConfigError
from sovit.data import decode
from sovit.data.folders import ENDINGS
from sovit.data.sources import fingerprint, read_class_list
from sovit.data.views import decoding, to_float

TESTED = ("test", "val", "validation")


@dataclass(frozen=True)
class Pairs:
    """The pairs of a part, in the order of their names."""

    images_at: tuple[Path, ...]
    masks_at: tuple[Path, ...]
    size: int
    channels: int

    def __len__(self) -> int:
        return len(self.images_at)

    def images(self, rows: Sequence[int]) -> Tensor:
        """float32 [B, channels, size, size] in [-1, 1]. Raises ConfigError for a file that is no image."""
        return torch.stack([self._image(self.images_at[row], self.masks_at[row]) for row in rows])

    def masks(self, rows: Sequence[int]) -> Tensor:
        """int64 [B, size, size], the nearest pixel of the mask. Raises ConfigError."""
        nearest = v2.InterpolationMode.NEAREST_EXACT
        found = [v2.functional.resize(self.mask(row)[None], [self.size] * 2, nearest)[0] for row in rows]
        return torch.stack(found)

    def mask(self, row: int) -> Tensor:
        """int64 [height, width], as in the file. Raises ConfigError."""
        return torch.from_numpy(read_mask(self.masks_at[row]))

    def _image(self, path: Path, mask: Path) -> Tensor:
        with decoding():
            try:
                image, orientation = decode.opened(path.read_bytes())
                array = np.array(decode.pixels(image, orientation, self.channels))
            except (decode.BadImage, OSError) as error:
                raise ConfigError(f"{path} cannot be used: {error}; mend it, or remove it with its mask.") from None
        if (array.shape[1], array.shape[0]) != (wanted := _extent(mask)):
            raise ConfigError(
                f"{path} has {array.shape[1]} x {array.shape[0]} pixels and {mask} {wanted[0]} x {wanted[1]}."
            )
        pixels = torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)
        return to_float(v2.functional.resize(pixels, [self.size] * 2, antialias=True))


def read_mask(path: Path) -> NDArray[np.int64]:
    """The numbers [height, width] in a mask. Raises ConfigError."""
    try:
        with decoding(), Image.open(path) as image:
            array = np.array(image)
    except Exception as error:  # PIL's plugins raise nearly anything on damaged files
        raise ConfigError(f"{path} cannot be used: {error}; mend it, or remove it with its image.") from None
    if array.ndim != 2 or array.dtype.kind not in "uib":
        raise ConfigError(
            f"{path} is no mask: write the class of each pixel into one channel of a PNG of 8 or 16 bits."
        )
    return array.astype(np.int64)


def part_names(data: str) -> tuple[str, str]:
    """What the parts of a folder are called. Raises ConfigError if they are not there."""
    root = Path(data).expanduser()
    tested = next((part for part in TESTED if (root / part / "masks").is_dir()), None)
    if tested is None or not (root / "train" / "masks").is_dir():
        raise ConfigError(
            f"task.data: {data} needs the folders train/images, train/masks, test/images and test/masks (or val)."
        )
    return "train", tested


def pairs(data: str, part: str, *, size: int, channels: int) -> Pairs:
    """The pairs of a part. Raises ConfigError if a file has no partner, or there is none."""
    folder = Path(data).expanduser() / part
    images = _by_stem(folder / "images", ENDINGS)
    masks = _by_stem(folder / "masks", (".png",))
    odd = sorted(images.keys() ^ masks.keys())
    if odd:
        lone, missing = (images, "mask") if odd[0] in images else (masks, "image")
        raise ConfigError(f"{lone[odd[0]]} has no {missing} of its name ({len(odd)} such files); add or remove them.")
    if not images:
        raise ConfigError(f"{folder / 'images'} holds no images; give a folder with images and masks.")
    names = sorted(images)
    return Pairs(tuple(images[name] for name in names), tuple(masks[name] for name in names), size, channels)


def class_names(data: str, parts: Sequence[Pairs], num_classes: int | None, ignore: int) -> list[str]:
    """The classes: of classes.txt, as many as asked for, or as the largest number in the masks of ``parts`` says.

    Reads every mask, so that a number that is no class shows before anything is trained. Raises ConfigError.
    """
    listed = Path(data).expanduser() / "classes.txt"
    if num_classes is None and listed.is_file():
        return _checked(list(read_class_list(str(listed))), parts, ignore)
    if num_classes is not None:
        return _checked([str(k) for k in range(num_classes)], parts, ignore)
    return [str(k) for k in range(1 + max(largest for largest, _ in _largest(parts, ignore)))]


def fingerprint_of(data: str) -> str:
    """A short name that changes with the names and sizes of the files."""
    root = Path(data).expanduser()
    files = [path for part in part_names(data) for path in (root / part).glob("*/*") if path.is_file()]
    return fingerprint("pairs", [(str(path.relative_to(root)), path.stat().st_size) for path in files], ())


def _checked(names: list[str], parts: Sequence[Pairs], ignore: int) -> list[str]:
    largest, path = max(_largest(parts, ignore))
    if largest >= len(names):
        raise ConfigError(
            f"{path} holds the number {largest}, but there are {len(names)} classes, 0 to {len(names) - 1}; mend "
            f"task.num_classes or classes.txt, or write task.ignore={largest} if it stands for no class."
        )
    return names


def _largest(parts: Sequence[Pairs], ignore: int) -> list[tuple[int, str]]:
    found = []
    for path in (path for part in parts for path in part.masks_at):
        numbers = np.unique(read_mask(path))
        found.append((int(max(numbers[numbers != ignore], default=0)), str(path)))
    return found


def _extent(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def _by_stem(folder: Path, endings: Sequence[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix.lower() in endings and not path.name.startswith("."):
            if path.stem in found:
                raise ConfigError(f"{found[path.stem]} and {path} have one name; rename one.")
            found[path.stem] = path
    return found
