"""Images in folders named after their classes, as timm's `ReaderImageFolder` lists them.

The class of an image is the folder it lies in, whatever lies above. timm passes over files without an ending it
knows, and over images in no folder; a second walk over the directory finds those, and the sizes of all files.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sovit.data.sources import SPLITS, Images, LeftOut, Names, fingerprint, labels_of

# In lower case; files in capitals are found too.
ENDINGS = tuple(
    f".{ending}"
    for ending in "jpg jpeg jpe jfif png webp avif bmp gif tif tiff ppm pgm pbm jp2".split()  # noqa: SIM905
)


class FolderImages(Images):
    """Files below a folder."""

    def __init__(
        self, root: str, names: Names, classes: Sequence[str], labels: NDArray[np.int32], left_out: LeftOut, mark: str
    ) -> None:
        super().__init__(root, classes, labels, left_out, mark)
        self._names = names

    def read(self, index: int) -> bytes:
        with open(os.path.join(self.where, self.name(index)), "rb") as file:
            return file.read()

    def name(self, index: int) -> str:
        return self._names[index]


def list_folder(root: str, split: str | None, class_list: Sequence[str] | None) -> FolderImages:
    """The images of ``root``, or of ``root/split``. Raises ValueError if there is no such folder or it holds splits."""
    from timm.data.readers.reader_image_folder import ReaderImageFolder

    folder = os.path.join(root, split) if split else root
    if not os.path.isdir(folder):
        raise ValueError(
            f"{folder} is no folder; give data.root{' and data.split' if split else ''} as they are on disk."
        )
    inner = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not split and {"train"} < set(inner) <= set(SPLITS):
        raise ValueError(f"{folder} holds {', '.join(inner)}, which are parts and no classes; write data.split=train.")
    sizes, left_out = _walk(folder)
    if not sizes:
        raise ValueError(
            f"{folder} holds no images; it needs folders of classes with files such as .jpg or .png in them."
        )
    reader = ReaderImageFolder(folder, input_key=";".join(ENDINGS))
    class_of = {label: name for name, label in reader.class_to_idx.items()}
    names = [os.path.relpath(path, folder) for path, _ in reader.samples]
    values = np.array(
        [class_of[label] if os.sep in name else "" for name, (_, label) in zip(names, reader.samples, strict=True)],
        np.str_,
    )
    classes, labels, keep = labels_of(values, names.__getitem__, class_list, left_out)
    kept = Names(name for name, kept in zip(names, keep, strict=True) if kept)
    return FolderImages(folder, kept, classes, labels, left_out, fingerprint("imagefolder", sizes, classes))


def _walk(folder: str) -> tuple[list[tuple[str, int]], LeftOut]:
    """(name, bytes) of every image file, and the other files but hidden ones."""
    sizes, left_out = [], LeftOut()
    for directory, inner, files in os.walk(folder, followlinks=True):
        inner.sort()
        for name in sorted(files):
            path = Path(directory, name)
            relative = str(path.relative_to(folder))
            if path.suffix.lower() not in ENDINGS:
                if not name.startswith("."):
                    left_out.add(relative, "its name has no ending of an image")
                continue
            try:
                sizes.append((relative, os.stat(path).st_size))
            except OSError:  # a link that leads nowhere is an image that cannot be read
                sizes.append((relative, -1))
    return sizes, left_out
