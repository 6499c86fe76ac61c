"""Which images there are: a list of files or entries with their labels, readable at any place.

`open_images` lists one of three kinds (`sovit.data.folders`, `shards`, `saved`). Entries without a usable label are left
out here, counted and named; whether the bytes of an entry are an image shows only when they are decoded.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

MOST_CLASSES = 2**24
NAMED = 1000  # entries left out whose names are kept; the others are counted
SPLITS = ("train", "training", "test", "testing", "val", "valid", "validation")


class Names:
    """Many file names in two arrays: a list of strings would be copied into every worker by its reference counts."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._blob = np.frombuffer(b"".join(encoded), np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __getitem__(self, index: int) -> str:
        begin, end = self._ends[index : index + 2]
        return os.fsdecode(self._blob[begin:end].tobytes())


@dataclass
class LeftOut:
    """Entries that cannot be used, and why: how many, and the first of them by name."""

    count: int = 0
    named: list[tuple[str, str]] = field(default_factory=list)

    def add(self, name: str, reason: str) -> None:
        self.count += 1
        if len(self.named) < NAMED:
            self.named.append((name, reason))


class Images:
    """Labelled images of one kind of source. Subclasses say how to `read` one and what it is called."""

    def __init__(
        self,
        where: str,
        classes: Sequence[str],
        labels: NDArray[np.int32],
        left_out: LeftOut,
        fingerprint: str,
        blocks: Sequence[int] | NDArray[np.int64] = (),
    ) -> None:
        self.where, self.classes, self.labels = where, tuple(classes), labels
        self.left_out, self.fingerprint = left_out, fingerprint
        self.blocks = np.asarray(blocks if len(blocks) else [len(labels)], np.int64)  # sizes of what is stored together

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> bytes:
        """The bytes of an image file. Raises OSError."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """What the image is called, below `where`. May raise OSError where the name stands beside the image."""
        raise NotImplementedError

    def full_name(self, index: int) -> str:
        """What the image is called in a message, whatever has happened to it."""
        try:
            return f"{self.where}/{self.name(index)}"
        except (OSError, ValueError, tarfile.TarError):
            return f"{self.where}/image {index}"


@lru_cache(maxsize=32)
def open_images(
    kind: str,
    root: str,
    split: str | None = None,
    class_list: str | None = None,
    image_key: str | None = None,
    label_key: str | None = None,
) -> Images:
    """The images below a folder (kind imagefolder, webdataset or hf). Listed once a process, whoever asks again.

    Shards have numbers for labels; a ``classes.txt`` in their folder is their class list if no other is given.

    Raises ValueError if the folder is not there, holds no images of this kind, or fewer than two classes.
    """
    from sovit.data import folders, saved, shards  # they build on this module

    path = os.path.expanduser(root)
    beside = os.path.join(path, "classes.txt")
    if kind == "webdataset" and class_list is None and os.path.isfile(beside):
        class_list = beside
    names = read_class_list(class_list) if class_list else None
    if kind == "imagefolder":
        images: Images = folders.list_folder(path, split, names)
    elif kind == "webdataset":
        images = shards.list_shards(path, split, names, image_key, label_key)
    elif kind == "hf":
        images = saved.list_saved(path, split, names, image_key, label_key)
    else:
        raise ValueError(f"{kind!r} is no kind of images; choose imagefolder, webdataset or hf.")
    if not len(images):
        raise ValueError(f"{images.where} holds no images that can be used{_first(images.left_out)}.")
    if len(images.classes) < 2:
        raise ValueError(f"{images.where} holds one class, {images.classes[0]!r}; a classifier needs at least two.")
    return images


def kind_of(root: str) -> str:
    """Which kind of images a folder holds, from the names of its files. Raises ValueError if there is no such folder."""
    path = Path(root).expanduser()
    if not path.is_dir():
        raise ValueError(f"eval.datasets: {root} is no folder; give one that holds images.")
    inner = [path, *(path / split for split in SPLITS if (path / split).is_dir())]
    if any((folder / name).exists() for folder in inner for name in ("dataset_dict.json", "state.json")):
        return "hf"
    endings = {entry.suffix for folder in inner for entry in folder.iterdir()} | {
        entry.suffix for entry in (path / "data").glob("*.parquet")
    }
    return "webdataset" if ".tar" in endings else "hf" if ".parquet" in endings else "imagefolder"


def read_class_list(path: str) -> tuple[str, ...]:
    """The lines of a text file. Raises ValueError if it cannot be read, or holds an empty or a doubled line."""
    try:
        names = tuple(line.strip() for line in Path(path).expanduser().read_text("utf-8").rstrip().split("\n"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(
            f"The class list {path} cannot be read ({reason}); give a text file, one class a line."
        ) from None
    doubled = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if doubled is not None or "" in names:
        raise ValueError(
            f"The class list {path} holds {f'{doubled!r} twice' if doubled else 'an empty line'}; drop it."
        )
    return names


def labels_of(
    values: NDArray[np.str_],
    entry: Callable[[int], str],
    class_list: Sequence[str] | None,
    left_out: LeftOut,
    *,
    numbered: bool = False,
) -> tuple[tuple[str, ...], NDArray[np.int32], NDArray[np.bool_]]:
    """Classes, the labels of the entries that are kept, and which these are; the others are left out under their name.

    ``values`` are names of classes, "" for none. Without a class list the classes are the names found, in natural order
    (9 before 10). ``numbered``: the values are whole numbers, the places in the class list, or 0 .. the largest.
    """
    from timm.utils.misc import natural_key

    found, inverse = np.unique(values, return_inverse=True)
    if class_list is not None:
        classes = tuple(class_list)
    elif numbered:
        largest = max((int(name) for name in found if name.isdecimal()), default=0)
        if largest >= MOST_CLASSES:
            raise ValueError(f"A label of {largest} is no number of a class; give data.class_list to leave such out.")
        classes = tuple(str(k) for k in range(largest + 1))
    else:
        classes = tuple(sorted((str(name) for name in found if name), key=natural_key))
    index = {str(k) if numbered else name: k for k, name in enumerate(classes)}
    labels = np.array([index.get(str(name), -1) for name in found], np.int32)[inverse.ravel()]
    keep = labels >= 0
    if class_list is not None and not numbered and not all(name in index for name in found if name):
        there = set(found.tolist())  # with names that are not on the list, so one of the list may be misspelt
        for name in (name for name in classes if name not in there):  # in an order that is the same in every process
            left_out.add(f"class {name!r}", "the class list has it, and no image is of it")
    for k in np.flatnonzero(~keep):
        reason = f"its class {str(values[k])!r} is not one of the {len(classes)}" if values[k] else "it has no label"
        left_out.add(entry(int(k)), reason)
    return classes, labels[keep], keep


def fingerprint(kind: str, files: Iterable[tuple[str, int]], classes: Sequence[str]) -> str:
    """A short name that changes with the relative names and sizes of the files and with the classes, not with contents."""
    digest = hashlib.sha256(repr(tuple(classes)).encode())
    for name, size in sorted(files):
        digest.update(os.fsencode(name) + b"\0" + str(size).encode() + b"\n")
    return f"{kind}-{digest.hexdigest()[:12]}"


def _first(left_out: LeftOut) -> str:
    if not left_out.count:
        return ""
    name, reason = left_out.named[0]
    return f": {left_out.count:,} entries were left out, such as {name} ({reason})"
