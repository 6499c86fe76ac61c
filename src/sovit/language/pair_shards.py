"""Images and captions in tar shards as the webdataset library writes them: KEY.jpg beside KEY.txt, or a key of KEY.json.

The headers and texts of each shard are read once; what is kept, in memory and in the user's cache folder, is where image
and text of each pair lie, in 32 bytes. An image and a caption are then one read each at a known place. The names of members
are never used as paths.

A shard that is no tar, is cut off or is compressed is refused: what it would have held is unknown.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sovit.data.folders import ENDINGS
from sovit.data.shards import ShardImages, cache_folder, shard_paths
from sovit.data.sources import LeftOut, fingerprint
from sovit.language.texts import LONGEST, cleaned

TEXT_KEY = "txt"
_VERSION = 1  # of the index files
_BLOCK = 512  # bytes of a tar header
_MOST_TEXT = 16 * LONGEST  # bytes of a .txt that are read: enough for LONGEST characters, with white space between
_MOST_JSON = 2**20  # bytes of a .json


class PairIndex(NamedTuple):
    """The pairs of one shard; ``problems`` are what is no pair, ``digest`` is of all texts."""

    places: NDArray[np.int64]  # [N, 4]: offset and size of the image, offset and size of the text
    problems: list[tuple[str, str]]
    digest: str


class ShardPairs:
    """The captions of shards, each read when it is asked for; ``pictures`` are their images."""

    def __init__(self, pictures: ShardImages, texts: ShardImages, text_key: str) -> None:
        self.pictures, self._texts, self._text_key = pictures, texts, text_key

    def __getitem__(self, row: int) -> tuple[str, ...]:
        """The captions of a pair. Raises OSError if the shard cannot be read any more, or has changed."""
        found = [text for text, _ in captions_in(self._texts.read(row), self._text_key) if text]
        if not found:
            raise OSError(f"{self._texts.full_name(row)} holds no caption any more")
        return tuple(found)

    def lengths(self) -> NDArray[np.int64]:
        """At least one: an image without a caption is no pair."""
        return np.ones(len(self.pictures), np.int64)


def open_shards(root: str, split: str | None, image_key: str | None, text_key: str | None) -> ShardPairs:
    """The pairs of all shards that a folder and a split, or a pattern, name.

    Raises ValueError for a shard that cannot be read, a key of another form, or no pairs at all.
    """
    text_key = text_key or TEXT_KEY
    ending, dot, entry = text_key.partition(".")
    text_key = f"{ending.lower()}{dot}{entry}"
    if not ending or (dot and (ending != "json" or not entry)) or text_key == "json":
        raise ValueError(
            f"The text key {text_key!r} is none; write the ending of the text files, such as txt, or json.KEY."
        )
    paths = shard_paths(root, split)
    endings = tuple((image_key or ";".join(ending[1:] for ending in ENDINGS)).lower().split(";"))
    indexes = [_index(path, endings, text_key) for path in paths]
    sizes = [len(index.places) for index in indexes]
    where, left_out = f"{root} ({split})" if split else root, LeftOut()
    for path, index in zip(paths, indexes, strict=True):
        for name, reason in index.problems:
            left_out.add(f"{os.path.basename(path)}/{name}", reason)
    if not sum(sizes):
        first = f", such as {left_out.named[0][0]} ({left_out.named[0][1]})" if left_out.count else ""
        raise ValueError(
            f"{where} holds no images with captions in .{text_key}: {left_out.count:,} entries were left out{first}."
        )
    files = [
        (f"{os.path.basename(path)} {index.digest}", os.path.getsize(path))
        for path, index in zip(paths, indexes, strict=True)
    ]
    mark = fingerprint("pairs", files, (text_key,))
    shard_of = np.repeat(np.arange(len(paths), dtype=np.int32), sizes)
    labels = np.broadcast_to(np.int32(0), len(shard_of))  # of no class, in no memory

    places = np.concatenate([index.places for index in indexes])

    def members(k: int) -> ShardImages:
        return ShardImages(where, paths, (), labels, shard_of, (places[:, k], places[:, k + 1]), left_out, mark)

    return ShardPairs(members(0), members(2), text_key)


def captions_in(data: bytes, text_key: str) -> list[tuple[str, str]]:
    """(caption, reason it is not used, or not whole) of the bytes of a .txt or .json; a key of .json may hold several."""
    _, _, entry = text_key.partition(".")
    if not entry:
        try:
            return [cleaned(codecs.getincrementaldecoder("utf-8-sig")().decode(data))]  # it may end amid a character
        except UnicodeDecodeError:
            return [("", "its text is not UTF-8")]
    try:
        found: Any = json.loads(data)
        found = found[entry]
    except (ValueError, RecursionError):
        return [("", "its .json is no whole JSON")]
    except (KeyError, TypeError, IndexError):
        return [("", f"its .json has no {entry!r}")]
    return [cleaned(text) for text in (found if isinstance(found, list) else [found])]


def _index(path: str, endings: tuple[str, ...], text_key: str) -> PairIndex:
    """The index of a shard: the one kept from before, if the shard has not changed since, or a new one."""
    try:
        state = os.stat(path)
    except OSError as error:
        raise ValueError(f"The shard {path} cannot be read ({error.strerror}); repair it, or leave it out.") from None
    parts = ("pairs", _VERSION, os.path.realpath(path), state.st_size, state.st_mtime_ns, endings, text_key)
    kept = cache_folder() / f"{hashlib.sha256(repr(parts).encode(errors='surrogateescape')).hexdigest()[:32]}.npz"
    with suppress(Exception), np.load(kept, allow_pickle=False) as found:  # not there or damaged: it is made again
        problems = [(name, reason) for name, reason in json.loads(str(found["problems"]))]
        return PairIndex(found["places"], problems, str(found["digest"]))
    index = read_pairs(path, endings, text_key)
    scratch = kept.with_name(f".{kept.name}.{os.getpid()}")
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        with scratch.open("wb") as file:
            told = np.array(json.dumps(index.problems))
            np.savez(file, places=index.places, problems=told, digest=np.array(index.digest))
        os.replace(scratch, kept)
    return index


def read_pairs(path: str, endings: Sequence[str], text_key: str) -> PairIndex:
    """Walk over the headers of a shard and read its texts. Raises ValueError for a shard that is not a whole, plain tar."""
    rank = {ending: k for k, ending in enumerate(endings)}
    text_ending = text_key.partition(".")[0]
    places: list[tuple[int, int, int, int]] = []
    problems: list[tuple[str, str]] = []
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as raw:
            for key, members in _keys(raw):
                images = sorted((rank[ending], place) for ending, place in members if ending in rank)
                texts = [place for ending, place in members if ending == text_ending]
                if not images or not texts:
                    problems.append((key, f"it has no {'image' if not images else f'.{text_ending}'}"))
                    continue
                (offset, size), json_ = texts[0], text_ending == "json"
                if json_ and size > _MOST_JSON:
                    problems.append((f"{key}.json", f"it is larger than {_MOST_JSON:,} bytes"))
                    continue
                size = min(size, _MOST_TEXT) if not json_ else size
                data = os.pread(raw.fileno(), size, offset)
                found = captions_in(data, text_key)
                problems += [(f"{key}.{text_ending}", reason) for _, reason in found if reason]
                if any(text for text, _ in found):
                    places.append((*images[0][1], offset, size))
                    digest.update(b"%d:" % len(data) + data)
                elif not found:
                    problems.append((f"{key}.{text_ending}", "it is empty"))
    except (tarfile.TarError, OSError, EOFError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if path.endswith(("gz", "bz2", "xz", "zst")):
            reason = "compressed files have no random access"
        raise ValueError(f"The shard {path} cannot be read ({reason}); unpack or repair it, or leave it out.") from None
    return PairIndex(np.array(places, np.int64).reshape(-1, 4), problems, digest.hexdigest()[:16])


def _keys(raw: Any) -> Iterator[tuple[str, list[tuple[str, tuple[int, int]]]]]:
    """(key, [(ending, (offset, size))]) of a tar file, in its order. Raises tarfile.TarError if it is not whole."""
    from webdataset.tariterators import base_plus_ext

    key: str | None = None
    members: list[tuple[str, tuple[int, int]]] = []
    with tarfile.open(fileobj=raw, mode="r:") as tar:
        for member in tar:
            name, ending = base_plus_ext(member.name)
            if not member.isfile() or name is None or os.path.basename(member.name).startswith("."):
                continue
            if name != key:
                if key is not None:
                    yield key, members
                key, members = name, []
            members.append((ending.lower(), (member.offset_data, member.size)))
        raw.seek(tar.offset)
        if raw.read(_BLOCK).strip(b"\0"):  # tarfile takes a damaged header for the end
            raise tarfile.ReadError(f"damaged at byte {tar.offset}")
    if key is not None:
        yield key, members
