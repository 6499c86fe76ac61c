"""The embedded scenes as files, to try captions, questions and shards of one's own with, and to test them.

``python -m sovit.language.generate_files OUT --kind json`` writes, of a train and a test part each, a folder of images,
captions.json (COCO), questions.json and annotations.json (VQA), ocr_vqa.json and gqa.json; ``--kind pairs`` writes
webdataset shards with KEY.jpg, KEY.txt and KEY.json. ``--damage`` adds to the train part one of every defect that a reader
has to survive.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from sovit.data.generate import BROKEN, ODD, check_empty, encoded, write_tars
from sovit.data.views import CENTRAL
from sovit.language.examples import Question
from sovit.language.layouts import SPLITS
from sovit.language.scenes import Scenes, scenes

KINDS = ("json", "pairs")
TEN = 10  # answers to a question of VQA
ODD_TEXTS = (  # usable
    "Ein Bär über der größten Brücke",
    "一只猫坐在红色的椅子上",
    "صورة لقطة وكلب",
    "🐈‍⬛ on a 🛋️ 👩🏽‍🚀",
    "<script>alert('a')</script> $(touch here); ../../x \x00 {}",
    "word " * 200_000,
)
BAD_TEXTS: tuple[Any, ...] = ("", " \n\t ", None, 7, ["a list"])  # not usable


def picture(pixels: Tensor) -> Image.Image:
    """A PIL image of float32 [channels, size, size] in [-1, 1]."""
    levels = pixels.add(1).mul(127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    return Image.fromarray(levels if levels.shape[-1] == 3 else levels[..., 0])


def write_json(out: Path, source: Scenes, split: str, *, damage: bool = False) -> None:
    """``out/images`` and five JSON files beside it."""
    folder = out / "images"
    folder.mkdir(parents=True)
    images: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    for row, data in enumerate(_files(source)):
        name = f"{_stem(split, row)}.jpg"
        (folder / name).write_bytes(data)
        images.append({"id": row, "file_name": name, "height": source.size, "width": source.size})
        for text in source.captions(row):
            captions.append({"id": len(captions), "image_id": row, "caption": text})
    asked = {task: [q for q in source.questions if q.task == task] for task in ("vqa", "ocr_vqa", "gqa")}
    questions = [{"question_id": k, "image_id": q.row, "question": q.text} for k, q in enumerate(asked["vqa"])]
    annotations = [_annotation(k, question) for k, question in enumerate(asked["vqa"])]
    books = {}
    for row, its in itertools.groupby(asked["ocr_vqa"], key=lambda question: question.row):
        books[f"{row}"] = _book(list(its), f"{_stem(split, row)}.jpg", SPLITS[split])
    programs: dict[str, Any] = {
        f"{k:08d}": {
            "imageId": _stem(split, q.row),
            "question": q.text,
            "answer": q.answers[0],
            "semantic": [{"operation": "?"}],
        }
        for k, q in enumerate(asked["gqa"])
    }
    if damage:
        _damage_images(folder, source, images, captions)
        _damage_captions(images, captions)
        _damage_questions(questions, annotations, books, programs, _stem(split, 0))
    trees = {
        "captions": {"info": {}, "images": images, "annotations": captions},
        "questions": {"data_subtype": split, "questions": questions},
        "annotations": {"data_subtype": split, "annotations": annotations},
        "ocr_vqa": books,
        "gqa": programs,
    }
    for name, tree in trees.items():
        (out / f"{name}.json").write_text(json.dumps(tree), "utf-8")


def write_shards(out: Path, source: Scenes, part: str, *, damage: bool = False) -> None:
    """``out/part-000000.tar`` and so on."""
    out.mkdir(parents=True, exist_ok=True)
    samples = [
        (f"{row:06d}", {"jpg": data, **_about(list(source.captions(row)))}) for row, data in enumerate(_files(source))
    ]
    if damage:
        samples += _damaged_samples(samples[0][1]["jpg"])
    every = [{f"{key}.{ending}": data for ending, data in members.items()} for key, members in samples]
    write_tars(out, part, every)


def generate(
    out: Path,
    kind: str = "json",
    *,
    num: int = 64,
    test_num: int = 16,
    size: int = 64,
    channels: int = 3,
    seed: int = 0,
    damage: bool = False,
) -> None:
    """Write ``num`` scenes (and ``test_num``) below ``out``. Raises ValueError if it is not empty."""
    check_empty(out)
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no kind of files; choose {' or '.join(KINDS)}.")
    for part, count in (("train", num), ("test", test_num)):
        source = scenes(part, num=count, size=size, channels=channels, seed=seed)
        broken = damage and part == "train"
        if kind == "json":
            write_json(out / part, source, part, damage=broken)
        else:
            write_shards(out, source, part, damage=broken)


def _stem(split: str, row: int) -> str:
    return f"COCO_{split}_{row:012d}"


def _files(source: Scenes) -> Iterator[bytes]:
    """JPEG files with a margin that the central square of an evaluation cuts off, so that it shows the whole scene."""
    extra = round(source.size / CENTRAL) - source.size
    before = round(extra / 2)
    for row in range(len(source)):
        framed = pad(source.images([row]), [before, extra - before] * 2, mode="replicate")
        yield encoded(picture(framed[0]))


def _annotation(key: int, question: Question) -> dict[str, Any]:
    answers = itertools.islice(itertools.cycle(question.answers), TEN)
    return {
        "question_id": key,
        "image_id": question.row,
        "multiple_choice_answer": question.answers[0],
        "answers": [{"answer": text, "answer_confidence": "yes", "answer_id": k} for k, text in enumerate(answers, 1)],
    }


def _book(its: list[Question], file: str, split: int) -> dict[str, Any]:
    return {
        "imageURL": f"http://images.invalid/{file}",
        "questions": [question.text for question in its],
        "answers": [question.answers[0] for question in its],
        "split": split,
    }


def _about(captions: Any) -> dict[str, bytes]:
    first = captions[0] if isinstance(captions, list) and captions else captions
    text = first if isinstance(first, str) else ""
    return {"txt": text.encode(), "json": json.dumps({"caption": captions}).encode()}


def _damage_images(folder: Path, source: Scenes, images: list[Any], captions: list[Any]) -> None:
    """Images of odd kinds, broken ones, missing ones, and names that lead out of the folder."""
    whole = picture(source.images([0])[0])
    for name, make in {**ODD, **BROKEN}.items():
        (folder / name).write_bytes(make(whole))
    outside = folder.parent / "outside.jpg"
    outside.write_bytes(encoded(whole))
    (folder / "link_out.jpg").symlink_to(outside.resolve())
    (folder / "folder_out").symlink_to(folder.parent.resolve())
    (folder / "folder.jpg").mkdir()
    leading = (
        "../outside.jpg",
        str(outside.resolve()),
        "link_out.jpg",
        "folder_out/outside.jpg",
        "../../../../etc/passwd",
    )
    names: list[str | None] = [*ODD, *BROKEN, *leading, "missing.jpg", "folder.jpg", "", None]
    for file in names:
        key = len(images) + 10_000
        images.append({"id": key, "file_name": file})
        captions.append({"id": key, "image_id": key, "caption": f"an odd image, {str(file)[-20:]}"})


def _damage_captions(images: list[Any], captions: list[Any]) -> None:
    """Odd and broken texts, doubled ids, images that nobody names."""
    images += [{**images[1], "file_name": "another.jpg"}, {"file_name": "nobody.jpg"}, "no entry"]
    images.append({**images[0], "id": 20_000})  # the same file as image 0
    for text in (*ODD_TEXTS, *BAD_TEXTS):
        captions.append({"id": len(captions) + 30_000, "image_id": 20_000, "caption": text})
    captions += [
        {**captions[2], "caption": "of an id that is there twice"},
        {"id": 40_000, "image_id": 999_999, "caption": "of no image"},
        {"id": 40_001, "image_id": 0},
        None,
    ]


def _damage_questions(
    questions: list[Any], annotations: list[Any], books: dict[str, Any], gqa: dict[str, Any], image: str
) -> None:
    """Questions without answers, answers without questions, and what else goes wrong between two files."""
    extra = len(questions) + 50_000
    for k, text in enumerate(("without answers", "of no image", "with empty answers", "", "of two images")):
        questions.append({"question_id": extra + k, "image_id": 777_777 if k == 1 else 0, "question": text})
    annotations += [
        {"question_id": extra + 1, "image_id": 777_777, "answers": [{"answer": "yes"}]},
        {"question_id": extra + 2, "image_id": 0, "answers": [{"answer": ""}, {"answer": 7}]},
        {"question_id": extra + 3, "image_id": 0, "answers": [{"answer": "yes"}]},
        {"question_id": extra + 4, "image_id": 1, "answers": [{"answer": "yes"}]},
        {"question_id": extra + 99, "image_id": 0, "answers": [{"answer": "of no question"}]},
        {**annotations[0]},
    ]
    questions.append({**questions[0], "question": "of an id that is there twice"})
    books["../../../etc/passwd"] = {"imageURL": None, "questions": ["Who?"], "answers": ["root"], "split": 1}
    books["uneven"] = {"imageURL": "", "questions": ["a", "b"], "answers": ["c"], "split": 1}
    books["nowhere"] = {"imageURL": "", "questions": ["a"], "answers": ["c"], "split": 4}
    gqa["bad"] = {"imageId": "../outside", "question": "Where?", "answer": "there"}
    gqa["none"] = {"imageId": image, "question": "What?", "answer": None}


def _damaged_samples(good: bytes) -> list[tuple[str, dict[str, bytes]]]:
    broken = (b"<html></html>", b"")
    return [
        *((f"odd{k}", {"jpg": good, **_about([text])}) for k, text in enumerate(ODD_TEXTS)),
        *((f"bad{k}", {"jpg": good, **_about(text)}) for k, text in enumerate(BAD_TEXTS)),
        *((f"broken{k}", {"jpg": data, **_about(["a broken image"])}) for k, data in enumerate(broken)),
        ("textless", {"jpg": good}),
        ("imageless", _about(["no image"])),
        ("torn", {"jpg": good, "txt": "Bär".encode("latin-1"), "json": b'{"caption": "cut o'}),
        ("deep", {"jpg": good, "txt": b"x", "json": b"[" * 100_000}),
        ("../../escaped", {"jpg": good, **_about(["a key that would lead out of a folder"])}),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m sovit.language.generate_files", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("out", type=Path, help="a new or empty folder")
    parser.add_argument("--kind", choices=KINDS, default="json")
    parser.add_argument("--num", type=int, default=64, help="images of the train part")
    parser.add_argument("--test-num", type=int, default=16, help="images of the test part")
    parser.add_argument("--size", type=int, default=64, help="pixels of a side")
    parser.add_argument("--channels", type=int, default=3, choices=(1, 3))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--damage", action="store_true", help="add one of each defect to the train part")
    given = vars(parser.parse_args(arguments))
    try:
        generate(given.pop("out"), given.pop("kind"), **given)
    except (ValueError, OSError) as error:
        print(f"sovit.language.generate_files: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
