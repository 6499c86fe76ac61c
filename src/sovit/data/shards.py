"""Images in tar shards as the webdataset library writes them: KEY.jpg beside KEY.cls, the files of a KEY together.

timm's `ReaderWds` streams its shards through a shuffle buffer, so no place in its order can be asked for, and its
`ReaderImageInTar` takes the labels from folders and shares one open file among forked workers. Hence an index: the
headers of each shard are read once, and every image is then one `pread` at a known place. The index of a shard is kept
in the user's cache folder and believed while path, size and time of change of the shard are the same; where the
cache cannot be written it is made again by each process.

A shard that is no tar, is cut off or is compressed is refused before anything is trained: what it would have held is
unknown.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import sys
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sovit.data.folders import ENDINGS
from sovit.data.sources import SPLITS, Images, LeftOut, fingerprint, labels_of

LABEL_KEY = "cls"
_VERSION = 1  # of the index files
_BLOCK = 512  # bytes of a tar header, right before the content
_OPEN = 64  # shards a process keeps open


class Index(NamedTuple):
    """The images of one shard: where their bytes are, their labels as text, and what is no image with a label."""

    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    values: NDArray[np.str_]
    problems: list[tuple[str, str]]


class ShardImages(Images):
    """Images at known places of tar files."""

    def __init__(
        self,
        where: str,
        paths: Sequence[str],
        classes: Sequence[str],
        labels: NDArray[np.int32],
        shard_of: NDArray[np.int32],
        places: tuple[NDArray[np.int64], NDArray[np.int64]],
        left_out: LeftOut,
        mark: str,
    ) -> None:
        super().__init__(where, classes, labels, left_out, mark, np.bincount(shard_of, minlength=len(paths)))
        self._paths, self._shard_of, (self._offsets, self._sizes) = list(paths), shard_of, places

    def read(self, index: int) -> bytes:
        path, size = self._paths[self._shard_of[index]], int(self._sizes[index])
        file = _opened(path)  # held: another thread may make the cache forget it
        data = os.pread(file.handle, size, int(self._offsets[index]))
        if len(data) < size:
            raise OSError(f"the shard ends {size - len(data)} bytes before the image does")
        return data

    def name(self, index: int) -> str:
        """SHARD.tar/KEY.ENDING; the name is read from the shard."""
        path = self._paths[self._shard_of[index]]
        file = _opened(path)
        header = os.pread(file.handle, _BLOCK, int(self._offsets[index]) - _BLOCK)
        return f"{os.path.basename(path)}/{tarfile.TarInfo.frombuf(header, 'utf-8', 'surrogateescape').name}"


def list_shards(
    root: str, split: str | None, class_list: Sequence[str] | None, image_key: str | None, label_key: str | None
) -> ShardImages:
    """The images of all shards that a folder and a split, or a pattern, name. Raises ValueError for an unreadable shard."""
    paths = shard_paths(root, split)
    endings = tuple((image_key or ";".join(ending[1:] for ending in ENDINGS)).lower().split(";"))
    indexes = [_index(path, endings, label_key or LABEL_KEY) for path in paths]
    shard_of = np.repeat(np.arange(len(paths), dtype=np.int32), [len(index.sizes) for index in indexes])
    offsets, sizes = (np.concatenate([index[k] for index in indexes]) for k in (0, 1))
    values = np.concatenate([index.values for index in indexes])
    left_out = LeftOut()
    for path, index in zip(paths, indexes, strict=True):
        for name, reason in index.problems:
            left_out.add(f"{os.path.basename(path)}/{name}", reason)
    numbers = [value.isdecimal() for value in np.unique(values) if value]

    def entry(k: int) -> str:
        place = (offsets[[k]], sizes[[k]])
        return ShardImages("", paths, (), np.zeros(1, np.int32), shard_of[[k]], place, left_out, "").name(0)

    numbered = 2 * sum(numbers) > len(numbers)
    classes, labels, keep = labels_of(values, entry, class_list, left_out, numbered=numbered)
    mark = fingerprint("webdataset", [(os.path.basename(path), os.path.getsize(path)) for path in paths], classes)
    where = f"{root} ({split})" if split else root
    return ShardImages(where, paths, classes, labels, shard_of[keep], (offsets[keep], sizes[keep]), left_out, mark)


def shard_paths(root: str, split: str | None) -> list[str]:
    """The .tar files that a folder, or a pattern with {0000..0099} or *, names, sorted. Raises ValueError if none."""
    from braceexpand import braceexpand

    if os.path.isdir(root):
        folder = os.path.join(root, split) if split and os.path.isdir(os.path.join(root, split)) else root
        first = "" if folder != root or not split else split
        found = sorted(name for name in os.listdir(folder) if name.endswith((".tar", ".tar.gz", ".tgz")))
        paths = [os.path.join(folder, name) for name in found if name.startswith(first)]
        if not paths:
            of_split = f" whose names begin with {split}, nor a folder of that name" if split else ""
            raise ValueError(f"{root} holds no .tar files{of_split}; give data.root as it is on disk.")
        parts = sorted({name for name in (re.split("[-_.]", file)[0] for file in found) if name in SPLITS})
        if not split and len(parts) > 1 and "train" in parts:
            raise ValueError(f"{root} holds shards of {' and '.join(parts)}; write data.split=train.")
        return paths
    if split and not set(root) & set("*{"):
        raise ValueError(f"{root} is no folder; give data.root the folder of the shards.")
    if split:
        raise ValueError(f"data.split={split} goes with a folder; {root} is a pattern, so write data.split=null.")
    try:
        paths = list(braceexpand(root))
    except ValueError:
        raise ValueError(
            f"{root} has a brace too many; write a pattern such as DIR/train-{{0000..0099}}.tar."
        ) from None
    found = sorted({path for pattern in paths for path in ([pattern] if "*" not in pattern else glob.glob(pattern))})
    missing = next((path for path in found if not os.path.isfile(path)), None)
    if not found or missing:
        raise ValueError(
            f"{missing or root} is not there; give data.root a folder of shards, or a pattern of their names."
        )
    return found


def _index(path: str, endings: tuple[str, ...], label_key: str) -> Index:
    """The index of a shard: the one kept from before, if the shard has not changed since, or a new one."""
    try:
        state = os.stat(path)
    except OSError as error:
        raise ValueError(f"The shard {path} cannot be read ({error.strerror}); repair it, or leave it out.") from None
    key = repr((_VERSION, os.path.realpath(path), state.st_size, state.st_mtime_ns, endings, label_key))
    kept = cache_folder() / f"{hashlib.sha256(key.encode(errors='surrogateescape')).hexdigest()[:32]}.npz"
    with suppress(Exception), np.load(kept, allow_pickle=False) as found:  # not there or damaged: it is made again
        return Index(found["offsets"], found["sizes"], found["values"], json.loads(str(found["problems"])))
    index = read_headers(path, endings, label_key)
    scratch = kept.with_name(f".{kept.name}.{os.getpid()}")
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        with scratch.open("wb") as file:
            np.savez(file, **{**index._asdict(), "problems": np.array(json.dumps(index.problems))})
        os.replace(scratch, kept)
    return index


def cache_folder() -> Path:
    """Where indexes are kept: below $XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sovit" / "shards"


def read_headers(path: str, endings: Sequence[str], label_key: str) -> Index:
    """Walk over the headers of a shard and read its labels. Raises ValueError for a shard that is not a whole, plain tar."""
    from webdataset.tariterators import base_plus_ext

    images: list[tuple[int, int, str]] = []
    problems: list[tuple[str, str]] = []
    rank = {ending: k for k, ending in enumerate(endings)}
    label_ending, _, entry = label_key.partition(".")
    key, image, label = None, None, ""

    def close() -> None:
        if image is not None:
            images.append((image[1], image[2], label))
        elif key is not None:
            problems.append((key, "it has no image"))

    try:
        with open(path, "rb") as raw, tarfile.open(fileobj=raw, mode="r:") as tar:
            for member in tar:
                name, ending = base_plus_ext(member.name)
                if not member.isfile() or name is None or os.path.basename(member.name).startswith("."):
                    continue
                if name != key:
                    close()
                    key, image, label = name, None, ""
                if ending.lower() in rank:
                    if image is None or rank[ending.lower()] < image[0]:
                        image = (rank[ending.lower()], member.offset_data, member.size)
                elif ending.lower() == label_ending:
                    raw.seek(member.offset_data)
                    label = _label(raw.read(min(member.size, 2**20)), entry)
            close()
            raw.seek(tar.offset)
            if raw.read(_BLOCK).strip(b"\0"):  # tarfile takes a damaged header for the end
                raise tarfile.ReadError(f"damaged at byte {tar.offset}")
    except (tarfile.TarError, OSError, EOFError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if path.endswith(("gz", "bz2", "xz", "zst")):
            reason = "compressed files have no random access"
        raise ValueError(f"The shard {path} cannot be read ({reason}); unpack or repair it, or leave it out.") from None
    columns = list(zip(*images, strict=True)) or [(), (), ()]
    return Index(
        np.array(columns[0], np.int64), np.array(columns[1], np.int64), np.array(columns[2], np.str_), problems
    )


def _label(data: bytes, entry: str) -> str:
    """The class in a .cls or .json file, as text; "" if there is none."""
    try:
        value = json.loads(data)[entry] if entry else data.decode().strip()
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    text = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
    return str(int(text)) if text.isascii() and text.isdecimal() and len(text) < 19 else text[:200]


class _Descriptor:
    """A file that is closed when nobody uses it any more. pread has no position, so forked workers may share it."""

    def __init__(self, path: str) -> None:
        self.handle = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if not sys.is_finalizing() and hasattr(self, "handle"):
            os.close(self.handle)


@lru_cache(maxsize=_OPEN)
def _opened(path: str) -> _Descriptor:
    return _Descriptor(path)
