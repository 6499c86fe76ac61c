"""Images in files with their texts: COCO, VQA, OCR-VQA and GQA files beside a folder of images, or webdataset shards.

Images are decoded when they are asked for, in the view of an evaluation: short side to size / 0.875, central square. Texts
lie in arrays (`sovit.language.texts`), of shards on disk (`sovit.language.pair_shards`). What cannot be used is left out,
counted and named. `sovit.language.pairs` makes a training stream of them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sovit.data.decode import BadImage
from sovit.data.folders import FolderImages
from sovit.data.images import MOST_BAD, Unreadable
from sovit.data.sources import Images, LeftOut, Names
from sovit.data.views import TestView, decoding, to_float
from sovit.language import layouts
from sovit.language.examples import Question
from sovit.language.image_files import ImageFolder
from sovit.language.json_files import uncollected
from sovit.language.pair_shards import open_shards
from sovit.language.texts import Questions, TextLists

KINDS = ("pairs", "coco")


class Captions(Protocol):
    """The captions of each image."""

    def __getitem__(self, row: int, /) -> tuple[str, ...]: ...

    def lengths(self) -> NDArray[np.int64]:
        """How many captions each image has, int64 [N]."""


class FileTexts:
    """A `TextImages` of images in files. ``pictures`` gives the bytes of image ``row``.

    A grey image stands in for one that cannot be read: another one would not be what the texts speak of. It is counted in
    ``left_out`` then, for whether a file is an image shows only when it is decoded.
    """

    def __init__(
        self,
        name: str,
        pictures: Images,
        captions: Captions,
        questions: Questions,
        view: TestView,
        fingerprint: str,
        *,
        threads: int = 1,
    ) -> None:
        self.name, self.pictures, self.view, self.fingerprint = name, pictures, view, fingerprint
        self.where, self.left_out, self.threads = pictures.where, pictures.left_out, threads
        self._captions, self._questions = captions, questions
        self._bad: set[int] = set()
        self._bad_in_a_row = 0

    def __len__(self) -> int:
        return len(self.pictures)

    def images(self, rows: Sequence[int]) -> Tensor:
        """float32 [B, channels, size, size] in [-1, 1]. Raises Unreadable if none of the images can be read any more."""
        pixels = torch.zeros((len(rows), self.view.channels, self.view.size, self.view.size))
        with decoding(), ThreadPoolExecutor(self.threads) as pool:
            for k, (found, reason) in enumerate(pool.map(self._decoded, rows)):
                if found is None:
                    self._note(int(rows[k]), reason)
                else:
                    pixels[k] = to_float(found)
                    self._bad_in_a_row = 0
        return pixels

    def captions(self, row: int) -> tuple[str, ...]:
        """Those of an image; none if it has questions only."""
        return self._captions[row]

    @property
    def questions(self) -> Sequence[Question]:
        """All of them, in order of the rows."""
        return self._questions

    def captioned(self) -> NDArray[np.int64]:
        """The rows that have a caption."""
        return np.flatnonzero(self._captions.lengths())

    def _decoded(self, row: int) -> tuple[Tensor | None, str]:
        try:
            return self.view(self.pictures.read(int(row))), ""
        except BadImage as error:
            return None, str(error)
        except OSError as error:
            return None, error.strerror or str(error)

    def _note(self, row: int, reason: str) -> None:
        if row not in self._bad:
            self._bad.add(row)
            self.left_out.add(self.pictures.name(row), f"{reason}; a grey image stands in for it")
        self._bad_in_a_row += 1
        if len(self._bad) == len(self) or self._bad_in_a_row >= MOST_BAD:
            raise Unreadable(
                f"None of {self._bad_in_a_row:,} images in a row of {self.where} can be read, the last one "
                f"{self.pictures.full_name(row)} ({reason}); see whether the folder is still there."
            )


def open_texts(
    images: str,
    *,
    captions: str | None = None,
    questions: str | None = None,
    annotations: str | None = None,
    ocr_vqa: str | None = None,
    gqa: str | None = None,
    split: str | None = None,
    size: int,
    channels: int = 3,
    threads: int = 1,
) -> FileTexts:
    """The images of a folder that JSON files speak of, with all that these say of them.

    ``captions`` in COCO's layout; ``questions`` and ``annotations`` in VQA's; ``ocr_vqa``, of which ``split`` (train, val,
    test) picks a part; ``gqa``. An image has one row, however many files speak of it. ``threads`` decode at once.

    Raises ValueError if a folder or file is not there, is of another layout, or gives nothing that can be used.
    """
    if (questions is None) != (annotations is None):
        there, lacking = ("questions", "annotations") if annotations is None else ("annotations", "questions")
        raise ValueError(f"The {there} of VQA are given without {lacking}; give both files, or neither.")
    if split is not None and ocr_vqa is None:
        raise ValueError(f"The part {split!r} picks from an OCR-VQA file, and none is given; give one, or no part.")
    given = [path for path in (captions, questions, annotations, ocr_vqa, gqa) if path is not None]
    if not given:
        raise ValueError(f"No file says anything of the images in {images}; give captions or questions.")
    found = layouts.Gathered(ImageFolder(os.path.normpath(os.path.expanduser(images))))
    with uncollected():
        known = layouts.add_captions(found, captions) if captions is not None else None
        if questions is not None and annotations is not None:
            layouts.add_vqa(found, questions, annotations, known)
        if ocr_vqa is not None:
            layouts.add_ocr_vqa(found, ocr_vqa, split)
        if gqa is not None:
            layouts.add_gqa(found, gqa)
        return _packed(found, given, TestView(size, channels), threads)


@lru_cache(maxsize=8)
def open_pairs(
    kind: str,
    root: str,
    *,
    captions: str | None = None,
    split: str | None = None,
    image_key: str | None = None,
    text_key: str | None = None,
    size: int,
    channels: int = 3,
    threads: int = 1,
) -> FileTexts:
    """Images with captions to train on. Listed once a process, whoever asks again.

    ``pairs``: the webdataset shards of a folder and ``split``, or of a pattern, with the caption in KEY.txt or under a key
    of KEY.json (``text_key`` "txt" or "json.caption"). ``coco``: a folder of images and a ``captions`` file.

    Raises ValueError where `open_texts` and `open_shards` do.
    """
    if kind == "coco":
        if captions is None:
            raise ValueError(f"No file says what the images in {root} show; give the path of a COCO captions file.")
        wrong = next((name for name in (split, image_key, text_key) if name is not None), None)
        if wrong is not None:
            raise ValueError(f"{wrong!r} goes with shards, not with a COCO captions file; leave it out.")
        return open_texts(root, captions=captions, size=size, channels=channels, threads=threads)
    if kind != "pairs":
        raise ValueError(f"{kind!r} is no kind of images with captions; choose {' or '.join(KINDS)}.")
    if captions is not None:
        raise ValueError(f"Shards hold their captions; the file {captions} goes with kind coco.")
    shards = open_shards(os.path.normpath(os.path.expanduser(root)), split, image_key, text_key)
    name, none = _name(shards.pictures.where), Questions((), (), (), (), ())
    view = TestView(size, channels)
    return FileTexts(name, shards.pictures, shards, none, view, shards.pictures.fingerprint, threads=threads)


def _packed(found: layouts.Gathered, given: Sequence[str], view: TestView, threads: int) -> FileTexts:
    """What was gathered, in arrays; images without a text that can be used are dropped. Raises ValueError if none is."""
    questions = sorted(found.questions, key=lambda question: question[0])  # stable: within an image as they came
    used = np.zeros(len(found.sizes), bool)
    used[[row for row, captions in enumerate(found.captions) if captions]] = True
    used[[question[0] for question in questions]] = True
    files = " and ".join(given)
    if not used.any():
        if found.asked and found.missing.total() == found.asked:
            reason, count = found.missing.most_common(1)[0]
            raise ValueError(
                f"None of the {found.asked:,} images that {files} names can be used: of {count:,}, such as "
                f"{_first(found.left_out, reason)}, {reason}; is {found.folder.root} the folder they lie in?"
            )
        first = f", such as {found.left_out.named[0][0]} ({found.left_out.named[0][1]})" if found.left_out.count else ""
        raise ValueError(
            f"{files} says nothing that can be used: {found.left_out.count:,} entries were left out{first}."
        )
    place = np.cumsum(used) - 1  # old row -> new row
    names = Names(name for name, row in found.rows.items() if used[row])
    captions = TextLists(texts for row, texts in enumerate(found.captions) if used[row])
    rows, tasks, texts, answers, ids = zip(*questions, strict=True) if questions else ((), (), (), (), ())
    packed = Questions(place[list(rows)] if rows else (), tasks, texts, answers, ids)
    digest = hashlib.sha256(captions.digest() + packed.digest())
    for name, row in found.rows.items():
        if used[row]:
            digest.update(os.fsencode(name) + b"\0" + str(found.sizes[row]).encode() + b"\n")
    mark = f"texts-{digest.hexdigest()[:12]}"
    labels = np.zeros(int(used.sum()), np.int32)  # of no class
    pictures = FolderImages(found.folder.root, names, (), labels, found.left_out, mark)
    return FileTexts(_name(found.folder.root), pictures, captions, packed, view, mark, threads=threads)


def _first(left_out: LeftOut, reason: str) -> str:
    return next((name for name, found in left_out.named if found == reason), "one of them")


def _name(where: str) -> str:
    """What a set is called in a table: the last part of its path that is no name of a part or of images at large."""
    parts = [part for part in where.replace(" (", os.sep).rstrip(")").split(os.sep) if part]
    return next((part for part in reversed(parts) if part not in ("images", "train", "test", "val")), "files")
