"""Four layouts of JSON files that say something of images in a folder.

* COCO captions: ``{"images": [{"id", "file_name"}], "annotations": [{"id", "image_id", "caption"}]}``
* VQA v2: ``{"questions": [{"question_id", "image_id", "question"}]}`` and, in a second file,
  ``{"annotations": [{"question_id", "answers": [{"answer"}, ... ten of them]}]}``
* OCR-VQA: ``{KEY: {"imageURL", "questions": [...], "answers": [...], "split": 1, 2 or 3}}``; the image is the local file KEY
  with an ending of images, or the last part of the URL. Nothing is ever downloaded.
* GQA: ``{ID: {"imageId", "question", "answer"}}``; the image is imageId.jpg.

An entry that cannot be used is left out, counted and named. Opens no image.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from sovit.data.sources import LeftOut
from sovit.language.image_files import ImageFolder, Refused
from sovit.language.json_files import entries_of, list_of, read_json
from sovit.language.texts import cleaned

SPLITS = {"train": 1, "val": 2, "test": 3}  # of OCR-VQA
CAPTIONS, QUESTIONS = "a COCO captions file", "the questions of VQA"
ANNOTATIONS, OCR_VQA, GQA = "the annotations of VQA", "an OCR-VQA file", "the questions of GQA"
TWICE = "its id is there twice"


@dataclass
class Gathered:
    """What has been found so far: an image has one row, however many files speak of it."""

    folder: ImageFolder
    left_out: LeftOut = field(default_factory=LeftOut)
    rows: dict[str, int] = field(default_factory=dict)  # file name below the folder -> row
    sizes: list[int] = field(default_factory=list)  # bytes
    captions: list[list[str]] = field(default_factory=list)
    questions: list[tuple[int, str, str, tuple[str, ...], str]] = field(default_factory=list)
    asked: int = 0  # images that the files name
    missing: Counter[str] = field(default_factory=Counter)  # reason -> images

    def row(self, place: tuple[str, int]) -> int:
        """The row of an image at a path, of a size in bytes."""
        name, size = place
        row = self.rows.setdefault(name, len(self.sizes))
        if row == len(self.sizes):
            self.sizes.append(size)
            self.captions.append([])
        return row

    def refuse(self, name: str, reason: str) -> None:
        """An image that the files name and the folder does not give."""
        self.left_out.add(name, reason)
        self.missing[reason] += 1

    def ask(self, row: int, task: str, text: str, answers: Any, key: str, entry: Callable[[], str]) -> None:
        """Add a question, unless it or all of its answers are no text; ``entry`` says what it is called in a message."""
        question, reason = cleaned(text)
        if reason:
            self.left_out.add(entry(), reason)
        if not question:
            return
        kept = []
        for answer in answers if isinstance(answers, list) else ():
            text, reason = cleaned(answer)
            if text:
                kept.append(text)
            if reason:
                self.left_out.add(f"an answer of {entry()}", reason)
        if kept:
            self.questions.append((row, task, question, tuple(kept), key))
        else:
            self.left_out.add(entry(), "it has no answer")


class _Places:
    """Where the image of each id lies; an image that is not there is named once, however often it is asked for."""

    def __init__(self, found: Gathered) -> None:
        self.found = found
        self.known: dict[Any, tuple[str, int] | None] = {}

    def __call__(self, key: Any, place: Callable[[], tuple[str, int]], name: Any = None) -> tuple[str, int] | None:
        if key not in self.known:
            self.found.asked += 1
            try:
                self.known[key] = place()
            except Refused as error:
                self.known[key] = None
                self.found.refuse(
                    _shown(name) if name and isinstance(name, str) else f"image {_shown(key)}", str(error)
                )
        return self.known[key]


def add_captions(found: Gathered, path: str) -> dict[Any, tuple[str, int] | None]:
    """Add a COCO captions file; returns where the image of each id lies, for questions about the same images.

    Raises ValueError if the file is no such file.
    """
    tree = read_json(path, ("id", "file_name", "image_id", "caption"))
    file = os.path.basename(path)
    places = _Places(found)
    for number, image in enumerate(list_of(tree, "images", path, CAPTIONS)):
        key = _id(image, "id")
        if key is None:
            found.left_out.add(f"image number {number} of {file}", "it has no id")
        elif key in places.known:
            found.left_out.add(f"image {_shown(key)} of {file}", TWICE)
        else:
            name = image.get("file_name")
            places(key, partial(found.folder.place, name), name)
    seen: set[Any] = set()
    spoken: set[Any] = set()
    for number, caption in enumerate(list_of(tree, "annotations", path, CAPTIONS)):
        own, key = _id(caption, "id"), _id(caption, "image_id")
        entry = partial(_entry, "caption", own, number, file)  # most captions need no name
        text, reason = cleaned(caption.get("caption") if isinstance(caption, dict) else None)
        if own is not None and own in seen:
            found.left_out.add(entry(), TWICE)
            continue
        seen.add(own)
        if key not in places.known or key is None:
            reason = "it has no image_id" if key is None else f"its image {_shown(key)} is not in the file"
            found.left_out.add(entry(), reason)
            continue
        spoken.add(key)
        if reason:
            found.left_out.add(entry(), reason)
        if text and (place := places.known[key]) is not None:
            found.captions[found.row(place)].append(text)
    for key, place in places.known.items():
        if place is not None and key not in spoken:
            found.left_out.add(place[0], f"{file} has no caption of it")
    return places.known


def add_vqa(
    found: Gathered, questions: str, annotations: str, known: dict[Any, tuple[str, int] | None] | None = None
) -> None:
    """Add the questions and the annotations of VQA; ``known`` images of a captions file need not be looked for.

    Raises ValueError if a file is no such file.
    """
    tree = read_json(questions, ("question", "question_id", "image_id", "data_subtype"))
    asked = list_of(tree, "questions", questions, QUESTIONS)
    part = tree.get("data_subtype")
    about = list_of(
        read_json(annotations, ("question_id", "image_id", "answers", "answer")),
        "annotations",
        annotations,
        ANNOTATIONS,
    )
    file, answering = os.path.basename(questions), os.path.basename(annotations)
    answers: dict[Any, dict[str, Any]] = {}
    for number, annotation in enumerate(about):
        key = _id(annotation, "question_id")
        if key is None:
            found.left_out.add(f"annotation number {number} of {answering}", "it has no question_id")
        elif key in answers:
            found.left_out.add(f"annotation {_shown(key)} of {answering}", TWICE)
        else:
            answers[key] = annotation
    places = _Places(found)
    places.known.update(known or {})
    seen: set[Any] = set()
    for number, question in enumerate(asked):
        key, image = _id(question, "question_id"), _id(question, "image_id")
        entry = partial(_entry, "question", key, number, file)
        if key is None or key in seen:
            found.left_out.add(entry(), "it has no question_id" if key is None else TWICE)
            continue
        seen.add(key)
        annotation = answers.get(key, {})
        if image is None or annotation.get("image_id", image) != image:
            found.left_out.add(
                entry(), "it has no image_id" if image is None else "its annotation is for another image"
            )
            continue
        place = places(image, partial(_of_number, found.folder, image, part))
        if place is not None:
            found.ask(found.row(place), "vqa", question.get("question"), annotation.get("answers"), str(key), entry)
    for key in (key for key in answers if key not in seen):
        found.left_out.add(f"annotation {_shown(key)} of {answering}", f"its question is not in {file}")


def add_ocr_vqa(found: Gathered, path: str, split: str | None = None) -> None:
    """Add an OCR-VQA file, or the train, val or test part of it. Raises ValueError if it is no such file."""
    if split is not None and split not in SPLITS:
        raise ValueError(f"{split!r} is no part of OCR-VQA; choose {', '.join(SPLITS)}, or none for all of it.")
    entries = entries_of(read_json(path, ("imageURL", "questions", "answers", "split")), path, OCR_VQA)
    _check_any(entries, "questions", path, OCR_VQA)
    file, places, seen = os.path.basename(path), _Places(found), set()
    for key, book in entries:
        entry = f"{_shown(key)} of {file}"
        if not isinstance(book, dict):
            found.left_out.add(entry, "it has no questions")
            continue
        if split is not None and book.get("split") != SPLITS[split]:
            if book.get("split") not in SPLITS.values():
                found.left_out.add(entry, "its split is none of 1, 2, 3")
            continue
        asked, answers = book.get("questions"), book.get("answers")
        if not isinstance(asked, list) or not isinstance(answers, list) or len(asked) != len(answers):
            found.left_out.add(entry, "it has not as many answers as questions")
            continue
        if key in seen:
            found.left_out.add(entry, TWICE)
            continue
        seen.add(key)
        place = places(key, partial(_of_url, found.folder, key, book.get("imageURL")))
        if place is not None:
            row = found.row(place)
            for number, (question, answer) in enumerate(zip(asked, answers, strict=True)):
                asks = partial(_entry, "question", number, number, entry)
                found.ask(row, "ocr_vqa", question, [answer], f"{key}/{number}", asks)


def add_gqa(found: Gathered, path: str) -> None:
    """Add the questions of GQA. Raises ValueError if the file is no such file."""
    entries = entries_of(read_json(path, ("imageId", "question", "answer")), path, GQA)
    _check_any(entries, "imageId", path, GQA)
    file, places, seen = os.path.basename(path), _Places(found), set()
    for key, question in entries:
        entry = partial(_entry, "question", key, 0, file)
        image = _id(question, "imageId")
        if image is None or key in seen:
            found.left_out.add(entry(), "it has no imageId" if image is None else TWICE)
            continue
        seen.add(key)
        place = places(image, partial(found.folder.named, str(image)))
        if place is not None:
            found.ask(found.row(place), "gqa", question.get("question"), [question.get("answer")], key, entry)


def _check_any(entries: Sequence[tuple[str, Any]], key: str, path: str, expected: str) -> None:
    if not any(isinstance(value, dict) and key in value for _, value in entries):
        raise ValueError(f'{path} is not {expected}: none of its {len(entries):,} entries has a "{key}".')


def _id(entry: Any, key: str) -> Any:
    """A whole number, or a text, or None."""
    value = entry.get(key) if isinstance(entry, dict) else None
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None


def _entry(what: str, key: Any, number: int, of: str) -> str:
    """What an entry is called in a message: by its id, or by its place if it has none."""
    return f"{what} {_shown(key) if key is not None else f'number {number}'} of {of}"


def _of_number(folder: ImageFolder, key: int | str, part: Any) -> tuple[str, int]:
    """VQA names images by COCO's numbers; other sets by names with or without an ending."""
    if isinstance(key, int):
        return folder.numbered(key, part if isinstance(part, str) else "")
    return folder.named(key)


def _of_url(folder: ImageFolder, key: str, url: Any) -> tuple[str, int]:
    try:
        return folder.named(key)
    except Refused:
        last = url.split("?", 1)[0].rsplit("/", 1)[-1] if isinstance(url, str) else ""
        if not last:
            raise
        return folder.place(last)


def _shown(key: Any) -> str:
    """An id or a name in a message: printable, and not a page long."""
    text = str(key)
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= 120 else f"{text[:120]}..."
