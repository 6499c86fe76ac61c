"""Captions and questions in files say what they say, and what is wrong with them is counted and named, never followed."""

import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sovit.data.decode import opened, pixels
from sovit.data.generate import BROKEN, ODD
from sovit.data.images import Unreadable
from sovit.data.views import TestView, to_float
from sovit.language import pair_shards
from sovit.language.examples import TASKS
from sovit.language.files import FileTexts, open_pairs, open_texts
from sovit.language.generate_files import BAD_TEXTS, ODD_TEXTS, generate, main, picture
from sovit.language.image_files import LINK, MISSING, OUTSIDE
from sovit.language.json_files import read_json
from sovit.language.prompts import prompts, read_templates
from sovit.language.scenes import scenes
from sovit.language.texts import LONGEST, Questions, TextLists, Texts

SIZE, NUM = 16, 6
JSON = ("captions", "questions", "annotations", "ocr_vqa", "gqa")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A damaged train part and a whole test part of both kinds."""
    out = tmp_path_factory.mktemp("texts")
    for kind in ("json", "pairs"):
        generate(out / kind, kind, num=NUM, test_num=NUM, size=SIZE, damage=True)
    return out


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    open_pairs.cache_clear()
    yield


def everything(part: Path, *, split: str | None = None) -> FileTexts:
    files = {name: str(part / f"{name}.json") for name in JSON}
    return open_texts(str(part / "images"), **files, split=split, size=SIZE)


def rewritten(path: Path, to: Path, change: Callable[[Any], Any]) -> str:
    """A copy of a JSON file after a change."""
    tree = json.loads(path.read_text())
    to.write_text(json.dumps(change(tree) or tree))
    return str(to)


def one_image(folder: Path, *names: str) -> Path:
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    for name in names or ("a.jpg",):
        Image.new("RGB", (20, 20), (200, 10, 10)).save(images / name)
    return images


def captioned(folder: Path, images: list[Any], captions: list[Any]) -> str:
    path = folder / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": captions}))
    return str(path)


# ------------------------------------------------------------------------------------------------------ what is read


def test_files_say_what_the_scenes_they_were_written_from_say(made: Path) -> None:
    """Oracle: the scenes. Every caption, question and answer of all four layouts, on the right picture, and no other."""
    source, found = scenes("test", num=NUM, size=SIZE, channels=3), everything(made / "json" / "test")
    assert found.left_out.count == 0 and len(found) == NUM
    assert [found.captions(row) for row in range(NUM)] == [source.captions(row) for row in range(NUM)]
    asked = {(q.row, q.task, q.text): q.answers for q in source.questions}
    answered = {(q.row, q.task, q.text): q.answers for q in found.questions}
    assert answered.keys() == asked.keys() and {q.task for q in found.questions} == set(TASKS) - {"caption"}
    for key, answers in answered.items():
        assert answers == (asked[key] if key[1] == "vqa" else asked[key][:1])
    assert [q.row for q in found.questions] == sorted(q.row for q in found.questions)
    assert len({(q.task, q.id) for q in found.questions}) == len(found.questions)
    expected, seen = source.images(range(NUM)), found.images(range(NUM))
    apart = (seen[:, None] - expected[None]).abs().flatten(2).mean(2)
    assert apart.argmin(1).tolist() == list(range(NUM)) and apart.diagonal().max() < 0.05  # what JPEG changes


def test_shards_say_what_the_scenes_they_were_written_from_say(made: Path) -> None:
    source = scenes("test", num=NUM, size=SIZE, channels=3)
    for key, number in ((None, 1), ("json.caption", 5)):
        found = open_pairs("pairs", str(made / "pairs"), split="test", text_key=key, size=SIZE)
        assert [found.captions(row) for row in range(len(found))] == [source.captions(r)[:number] for r in range(NUM)]
        assert found.left_out.count == 0 and len(found.questions) == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its shards open
def test_shards_are_read_as_webdataset_reads_them(made: Path) -> None:
    import webdataset

    found = open_pairs("pairs", str(made / "pairs"), split="train", size=SIZE)
    path = str(made / "pairs" / "train-000000.tar")
    every = [
        (sample["jpg"], " ".join(sample["txt"].decode().split())[:LONGEST])
        for sample in webdataset.WebDataset([path], shardshuffle=False)
        if "jpg" in sample and sample.get("txt", b"").strip() and "torn" not in sample["__key__"]
    ]
    assert [(found.pictures.read(k), found.captions(k)[0]) for k in range(len(found))] == every
    assert found.pictures.name(len(found) - 1) == "train-000000.tar/../../escaped.jpg"  # a name, never a path


def test_a_picture_is_seen_as_an_evaluation_sees_it(made: Path) -> None:
    """Oracle: the view of the few-shot sets. Odd files are decoded, those that are no images are grey and named."""
    found = everything(made / "json" / "train")
    names = [found.pictures.name(row) for row in range(len(found))]
    assert set(ODD) | set(BROKEN) <= set(names)
    rows = [names.index(name) for name in (*ODD, *BROKEN)]
    before = found.left_out.count
    seen = found.images(rows)
    for image, row in zip(seen, rows, strict=True):
        if names[row] in BROKEN:
            assert (image == 0).all()
        else:
            assert torch.equal(image, to_float(TestView(SIZE, 3)(found.pictures.read(row))))
    found.images(rows)
    assert found.left_out.count - before == len(BROKEN)  # each once, however often it is asked for
    assert {name for name, reason in found.left_out.named if "grey image stands in" in reason} == set(BROKEN)
    grey = open_texts(
        str(made / "json/train/images"), captions=str(made / "json/train/captions.json"), size=8, channels=1
    )
    assert grey.images([0]).shape == (1, 1, 8, 8)
    threaded = everything(made / "json" / "train")
    threaded.threads = 3
    assert torch.equal(threaded.images(rows), seen)


def test_an_image_of_several_files_is_one_row(tmp_path: Path) -> None:
    """COCO and VQA speak of the same images; two entries of one file, and ./ before a name, are that image as well."""
    images = one_image(tmp_path, "COCO_train_000000000007.jpg", "b.jpg")
    captions = captioned(
        tmp_path,
        [
            {"id": 1, "file_name": "b.jpg"},
            {"id": 2, "file_name": "./b.jpg"},
            {"id": "x", "file_name": "../images/b.jpg"},
        ],
        [{"image_id": k, "caption": f"{k}"} for k in (1, 2, "x")],
    )
    (tmp_path / "q.json").write_text(
        json.dumps({"questions": [{"question_id": 1, "image_id": 7, "question": "What?"}]})
    )
    (tmp_path / "a.json").write_text(
        json.dumps({"annotations": [{"question_id": 1, "image_id": 7, "answers": [{"answer": "b"}, {"answer": "b"}]}]})
    )
    (tmp_path / "g.json").write_text(json.dumps({"5": {"imageId": "b", "question": "Who?", "answer": "nobody"}}))
    found = open_texts(
        str(images),
        captions=captions,
        questions=str(tmp_path / "q.json"),
        annotations=str(tmp_path / "a.json"),
        gqa=str(tmp_path / "g.json"),
        size=8,
    )
    assert len(found) == 2 and found.captions(0) == ("1", "2") and found.captions(1) == ()
    assert [(q.row, q.text, q.answers) for q in found.questions] == [(0, "Who?", ("nobody",)), (1, "What?", ("b", "b"))]
    assert found.captioned().tolist() == [0]
    assert [name for name, reason in found.left_out.named if reason == OUTSIDE] == ["../images/b.jpg"]


def test_a_number_that_two_files_end_in_is_settled_by_the_part_or_not_at_all(tmp_path: Path) -> None:
    images = one_image(tmp_path, "COCO_train2014_000000000007.jpg", "COCO_val2014_000000000007.jpg", "09.png")

    def asked(part: str | None, image: int) -> FileTexts:
        question = {"question_id": 1, "image_id": image, "question": "What?"}
        other = {"question_id": 2, "image_id": 9, "question": "What?"}
        (tmp_path / "q.json").write_text(json.dumps({"data_subtype": part, "questions": [question, other]}))
        answers = [{"question_id": k, "answers": ["it"]} for k in (1, 2)]  # plain texts do as well
        (tmp_path / "a.json").write_text(json.dumps({"annotations": answers}))
        questions, annotations = str(tmp_path / "q.json"), str(tmp_path / "a.json")
        return open_texts(str(images), questions=questions, annotations=annotations, size=8)

    assert asked("val2014", 7).pictures.name(0) == "COCO_val2014_000000000007.jpg"
    doubtful = asked(None, 7)
    assert len(doubtful) == 1 and doubtful.pictures.name(0) == "09.png"
    assert "it could be COCO_train2014_000000000007.jpg or COCO_val2014" in doubtful.left_out.named[0][1]


def test_ocr_vqa_finds_local_files_only_and_picks_its_part(tmp_path: Path) -> None:
    images = one_image(tmp_path, "one.png", "two.jpg")
    book = {"questions": ["Who wrote it?"], "answers": ["nobody"]}
    path = tmp_path / "ocr.json"
    path.write_text(
        json.dumps({
            "one": {**book, "split": 1, "imageURL": "http://images.invalid/x.jpg"},
            "named": {**book, "split": 3, "imageURL": "http://images.invalid/a/two.jpg?size=7"},
            "far": {**book, "split": 3, "imageURL": "http://images.invalid/far.jpg"},
            "up": {**book, "split": 3, "imageURL": "http://images.invalid/.."},
        })
    )  # fmt: skip
    found = open_texts(str(images), ocr_vqa=str(path), split="test", size=8)
    assert [found.pictures.name(row) for row in range(len(found))] == ["two.jpg"]
    assert found.left_out.named == [("image far", MISSING), ("image up", OUTSIDE)]
    assert len(open_texts(str(images), ocr_vqa=str(path), size=8)) == 2
    with pytest.raises(ValueError, match="'dev' is no part of OCR-VQA; choose train, val, test"):
        open_texts(str(images), ocr_vqa=str(path), split="dev", size=8)


# --------------------------------------------------------------------------------------------------------- bad input


def test_every_defect_is_counted_and_named(made: Path) -> None:
    found = everything(made / "json" / "train", split="train")
    reasons = dict(found.left_out.named)
    outside = str((made / "json" / "train" / "outside.jpg").resolve())
    expected = {
        "../outside.jpg": OUTSIDE,
        outside: OUTSIDE,
        "../../../../etc/passwd": OUTSIDE,
        "image ../../../etc/passwd": OUTSIDE,
        "image ../outside": OUTSIDE,
        "link_out.jpg": LINK,
        "folder_out/outside.jpg": LINK,
        "missing.jpg": MISSING,
        "image 777777": MISSING,
        "folder.jpg": "it is no file",
        "image 1 of captions.json": "its id is there twice",
        "caption 2 of captions.json": "its id is there twice",
        "caption 40000 of captions.json": "its image 999999 is not in the file",
        "caption 40001 of captions.json": "it is missing",
        "annotation 0 of annotations.json": "its id is there twice",
        "question 0 of questions.json": "its id is there twice",
        "uneven of ocr_vqa.json": "it has not as many answers as questions",
        "nowhere of ocr_vqa.json": "its split is none of 1, 2, 3",
        "question none of gqa.json": "it has no answer",
    }
    assert {name: reasons[name] for name in expected} == expected
    assert sum(reason == "it has no file name" for reason in reasons.values()) == 2
    about = [reason for name, reason in reasons.items() if name.startswith("caption 3")]  # of BAD_TEXTS and the longest
    assert sorted(about) == [
        "it is empty", "it is empty", "it is missing", "it is no text", "it is no text",
        f"only its first {LONGEST:,} characters are used",
    ]  # fmt: skip
    questions = [reason for name, reason in reasons.items() if name.startswith("question 50")]
    assert sorted(questions) == ["it has no answer"] * 2 + ["it is empty", "its annotation is for another image"]
    assert any(reason == "its question is not in questions.json" for reason in reasons.values())
    assert len(found) == NUM + len(ODD) + len(BROKEN) and found.left_out.count == len(found.left_out.named)


def test_scripts_emoji_and_enormous_texts_survive(made: Path) -> None:
    captions = everything(made / "json" / "train").captions(0)
    assert captions[5:] == tuple(" ".join(text.split())[:LONGEST] for text in ODD_TEXTS)
    shards = open_pairs("pairs", str(made / "pairs"), split="train", text_key="json.caption", size=SIZE)
    assert [shards.captions(NUM + k)[0] for k in range(len(ODD_TEXTS))] == list(captions[5:])
    assert len(captions[-1]) == LONGEST


def test_shards_count_what_is_no_pair(made: Path) -> None:
    def left_out(key: str | None) -> dict[str, str]:
        found = open_pairs("pairs", str(made / "pairs"), split="train", text_key=key, size=SIZE)
        assert (
            len(found) + found.left_out.count == NUM + len(ODD_TEXTS) + len(BAD_TEXTS) + 7 + 1
        )  # a text is cut, not out
        return {name.removeprefix("train-000000.tar/"): reason for name, reason in found.left_out.named}

    plain, tree = left_out(None), left_out("json.caption")
    assert plain["textless"] == "it has no .txt" and tree["textless"] == "it has no .json"
    assert plain["imageless"] == tree["imageless"] == "it has no image"
    assert plain["torn.txt"] == "its text is not UTF-8" and tree["torn.json"] == "its .json is no whole JSON"
    assert tree["deep.json"] == "its .json is no whole JSON" and "deep.txt" not in plain
    assert [tree[f"bad{k}.json"] for k in range(4)] == ["it is empty", "it is empty", "it is missing", "it is no text"]
    assert "bad4.json" not in tree  # a list of captions


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("captions", b'{"images": [{"id": 1, "file', "captions.json is no whole JSON file"),
        ("captions", b"", "captions.json is no whole JSON file"),
        ("captions", b"\xff\xfe{}", "captions.json is not UTF-8 text"),
        ("captions", b"[" * 200_000, "captions.json is nested too deeply"),
        ("captions", b'{"images": [], "x": ' + b"9" * 5000 + b"}", "captions.json is no whole JSON file"),
        ("captions", b"[1, 2]", 'captions.json is not a COCO captions file: it has no list "images"'),
        ("captions", b'{"questions": []}', 'a COCO captions file: it has no list "images", but questions'),
        ("captions", b'{"images": {}, "annotations": []}', 'it has no list "images", but annotations, images'),
        ("captions", b'{"7": {"imageId": "1"}}', "not a COCO captions file: it has no list \"images\", but 7"),
        ("questions", b'{"annotations": []}', 'questions.json is not the questions of VQA: it has no list "questions"'),
        ("annotations", b'{"questions": []}', "annotations.json is not the annotations of VQA"),
        ("ocr_vqa", b'{"images": [], "annotations": []}', "ocr_vqa.json is not an OCR-VQA file: it is not one object keyed"),
        ("ocr_vqa", b'{"1": {"imageId": "x"}}', 'not an OCR-VQA file: none of its 1 entries has a "questions"'),
        ("gqa", b"{}", "gqa.json is not the questions of GQA: it is not one object keyed by ids"),
        ("gqa", b'{"1": {"questions": ["x"]}}', 'not the questions of GQA: none of its 1 entries has a "imageId"'),
        ("gqa", None, "gqa.json cannot be read (No such file or directory)"),
    ],
)  # fmt: skip
def test_a_file_of_another_layout_is_refused_in_a_sentence(
    file: str, content: bytes | None, says: str, made: Path, tmp_path: Path
) -> None:
    part = tmp_path / "part"
    shutil.copytree(made / "json" / "test", part)
    (part / f"{file}.json").unlink()
    if content is not None:
        (part / f"{file}.json").write_bytes(content)
    with pytest.raises(ValueError) as error:
        everything(part)
    assert says in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


def test_all_images_missing_is_one_sentence(made: Path, tmp_path: Path) -> None:
    path = str(made / "json" / "test" / "captions.json")
    with pytest.raises(ValueError, match=f"None of the {NUM} images that {path} names can be used") as error:
        open_texts(str(one_image(tmp_path)), captions=path, size=8)
    assert f"is {tmp_path}/images the folder they lie in?" in str(error.value)
    empty = captioned(tmp_path, [{"id": 1, "file_name": "a.jpg"}], [{"image_id": 1, "caption": " "}])
    with pytest.raises(
        ValueError, match=r"says nothing that can be used: 1 entries were left out, such as caption number"
    ):
        open_texts(str(tmp_path / "images"), captions=empty, size=8)


def test_what_does_not_go_together_is_refused(made: Path, tmp_path: Path) -> None:
    part = made / "json" / "test"
    images, captions, questions = (str(part / name) for name in ("images", "captions.json", "questions.json"))
    for arguments, says in (
        ({"questions": questions}, "questions of VQA are given without annotations"),
        ({"annotations": questions}, "annotations of VQA are given without questions"),
        ({}, "No file says anything of the images"),
        ({"captions": captions, "split": "train"}, "picks from an OCR-VQA file, and none is given"),
    ):
        with pytest.raises(ValueError, match=says):
            open_texts(images, **arguments, size=8)
    with pytest.raises(ValueError, match="nowhere is no folder"):
        open_texts(str(tmp_path / "nowhere"), captions=captions, size=8)
    for kind, root, options, says in (
        ("coco", images, {}, "give the path of a COCO captions file"),
        ("coco", images, {"captions": captions, "split": "x"}, "'x' goes with shards"),
        ("pairs", str(made / "pairs"), {"captions": captions}, "goes with kind coco"),
        ("shards", images, {}, "'shards' is no kind of images with captions; choose pairs or coco"),
        ("pairs", images, {}, "holds no .tar files"),
        ("pairs", str(made / "pairs"), {"text_key": "json"}, "write the ending of the text files"),
        ("pairs", str(made / "pairs"), {"text_key": "cls", "split": "train"}, "holds no images with captions in .cls"),
    ):
        with pytest.raises(ValueError, match=says):
            open_pairs(kind, root, **options, size=8)


def test_a_folder_that_goes_away_ends_in_a_sentence(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "json" / "test", tmp_path / "part")
    found = everything(tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "images")
    with pytest.raises(Unreadable, match=r"None of 6 images in a row of .* can be read, the last one .*No such file"):
        found.images(range(len(found)))


def test_names_never_lead_out_of_the_folder(tmp_path: Path) -> None:
    """A link within the folder is followed; one to a folder or file outside, and a chain of links, are not."""
    images = one_image(tmp_path, "a.jpg")
    secret = one_image(tmp_path / "other", "secret.jpg") / "secret.jpg"
    (images / "inside.jpg").symlink_to("a.jpg")
    (images / "direct.jpg").symlink_to(secret)
    (images / "chained.jpg").symlink_to("direct.jpg")
    (images / "sub").symlink_to(secret.parent)
    (images / "deeper").mkdir()
    (images / "deeper" / "back.jpg").symlink_to("../../other/images/secret.jpg")
    (images / "loop.jpg").symlink_to("loop.jpg")
    os.mkfifo(images / "pipe.jpg")  # to open it would wait for ever
    refused = {
        "direct.jpg": LINK, "chained.jpg": LINK, "sub/secret.jpg": LINK, "deeper/back.jpg": LINK,
        "x/../../other/images/secret.jpg": OUTSIDE, str(secret): OUTSIDE, "..": OUTSIDE, "": "it has no file name",
        "a.jpg\0": "its file name is no text", "pipe.jpg": "it is no file", "loop.jpg": MISSING, "a" * 5000: MISSING,
        "\ud800.jpg": MISSING,
    }  # fmt: skip
    names = ["a.jpg", "inside.jpg", "deeper/../a.jpg", *refused]
    path = captioned(
        tmp_path,
        [{"id": k, "file_name": name} for k, name in enumerate(names)],
        [{"image_id": k, "caption": str(k)} for k in range(len(names))],
    )
    found = open_texts(str(images), captions=path, size=8)
    assert [found.pictures.name(row) for row in range(len(found))] == ["a.jpg", "inside.jpg"]
    assert found.captions(0) == ("0", "2") and [reason for _, reason in found.left_out.named] == list(refused.values())
    (tmp_path / "linked").symlink_to(images)  # the folder itself may be a link
    assert len(open_texts(str(tmp_path / "linked"), captions=path, size=8)) == 2


# ------------------------------------------------------------------------------------------- fingerprints and packing


def test_the_fingerprint_changes_with_names_sizes_and_texts(made: Path, tmp_path: Path) -> None:
    part = tmp_path / "part"
    shutil.copytree(made / "json" / "test", part)
    marks = [everything(part).fingerprint]
    assert everything(made / "json" / "test").fingerprint == marks[0]

    def changed(name: str, change: Callable[[Any], None]) -> None:
        rewritten(part / f"{name}.json", part / f"{name}.json", change)
        marks.append(everything(part).fingerprint)

    changed("captions", lambda tree: tree["annotations"][3].update(caption="another"))
    changed("questions", lambda tree: tree["questions"][1].update(question="another?"))
    changed("annotations", lambda tree: tree["annotations"][1]["answers"][7].update(answer="another"))
    changed("gqa", lambda tree: next(iter(tree.values())).update(answer="another"))
    first = sorted((part / "images").iterdir())[0]
    first.write_bytes(first.read_bytes() + b"\0")
    marks.append(everything(part).fingerprint)
    os.rename(first, first.with_name("other.jpg"))
    changed("captions", lambda tree: tree["images"][0].update(file_name="other.jpg"))
    assert len(set(marks)) == len(marks)


def test_the_fingerprint_of_shards_changes_with_a_text_of_the_same_length(tmp_path: Path) -> None:
    source, marks = scenes("train", num=2, size=8, channels=3), []
    for text in ("one", "two"):
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            for name, data in (("0.jpg", b"image"), ("0.txt", text.encode())):
                (tmp_path / name).write_bytes(data)
                tar.add(tmp_path / name, name)
        open_pairs.cache_clear()
        found = open_pairs("pairs", str(tmp_path), size=8)
        assert found.captions(0) == (text,)
        marks.append(found.fingerprint)
    assert marks[0] != marks[1] and picture(source.images([0])[0]).size == (8, 8)


def test_a_shard_of_pairs_is_walked_once_and_refused_when_cut(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "set" / "a.tar"
    path.parent.mkdir()
    shutil.copy(made / "pairs" / "test-000000.tar", path)
    walked: list[str] = []
    honest = pair_shards.read_pairs
    monkeypatch.setattr(pair_shards, "read_pairs", lambda path, *rest: walked.append(path) or honest(path, *rest))

    def opened_again() -> FileTexts:
        open_pairs.cache_clear()
        return open_pairs("pairs", str(path.parent), size=8)

    first, second = opened_again(), opened_again()
    assert len(walked) == 1 and first.fingerprint == second.fingerprint
    assert [first.captions(k) for k in range(NUM)] == [second.captions(k) for k in range(NUM)]
    for file in pair_shards.cache_folder().iterdir():
        file.write_bytes(b"torn")
    assert len(opened_again()) == NUM and len(walked) == 2
    with tarfile.open(path) as tar:
        places = [member.offset for member in tar.getmembers()]
    whole = path.read_bytes()
    for data in (
        whole[: places[-1] + 100],
        whole[: places[4]] + b"\x99" * 512 + whole[places[4] + 512 :],
        b"no tar" * 99,
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"The shard .*a.tar cannot be read .* leave it out"):
            opened_again()


def test_packed_texts_come_back_as_they_were() -> None:
    odd = ["", "plain", "größte 猫 🐈", "half \ud83d of a pair"]
    assert [Texts(odd)[k] for k in range(4)] == [*odd[:3], "half � of a pair"]
    lists = [["a"], [], ["b", "", "c"]]
    packed = TextLists(lists)
    assert [list(packed[k]) for k in range(3)] == lists and packed.lengths().tolist() == [1, 0, 3]
    assert (
        len({TextLists(each).digest() for each in (lists, [["a"], ["b"], ["", "c"]], [["a"], [], ["b", "c", ""]])}) == 3
    )
    questions = Questions([0, 2], ["gqa", "vqa"], ["Q", "R"], [["x"], ["y", "z"]], ["1", "2"])
    assert [q.answers for q in questions] == [("x",), ("y", "z")] and questions[-1].id == "2"
    assert (
        questions[0:1][0].task == "gqa"
        and questions.digest()
        != Questions([0, 1], ["gqa", "vqa"], ["Q", "R"], [["x"], ["y", "z"]], ["1", "2"]).digest()
    )
    with pytest.raises(IndexError):
        questions[2]


def test_a_key_that_is_there_twice_is_seen(tmp_path: Path) -> None:
    """Python's own parser keeps the last in silence."""
    path = tmp_path / "gqa.json"
    path.write_text('{"1": {"imageId": "a", "question": "Q", "answer": "x"}, "1": {"imageId": "a", "question": "R", '
                    '"answer": "y", "semantic": [{"operation": "?", "answer": "z"}]}}')  # fmt: skip
    found = open_texts(str(one_image(tmp_path)), gqa=str(path), size=8)
    assert [q.text for q in found.questions] == ["Q"]
    assert found.left_out.named == [("question 1 of gqa.json", "its id is there twice")]


def test_nothing_that_was_not_asked_for_is_kept_of_a_json_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(
        '\ufeff{"annotations": [{"question_id": 1, "answers": [{"answer": "no", "answer_id": 1}], "x": [{}]}]}'
    )
    assert read_json(str(path), ("question_id", "answers", "answer")) == {
        "annotations": [{"question_id": 1, "answers": ["no"]}]
    }


def test_the_generator_says_what_it_cannot_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert main([str(tmp_path / "full")]) == 2 and "is not empty" in capsys.readouterr().err
    assert main([str(tmp_path / "new"), "--num", "0"]) == 2 and "0 images" in capsys.readouterr().err
    levels = np.asarray(pixels(*opened((lambda file: file.read_bytes())(one_image(tmp_path) / "a.jpg"))))
    assert levels.shape == (20, 20, 3)
    assert picture(torch.tensor([[[-1.0, 1.0]]])).getpixel((1, 0)) == 255


# ----------------------------------------------------------------------------------------------------------- prompts


def test_templates_are_lines_with_a_place_for_the_class(tmp_path: Path) -> None:
    path = tmp_path / "templates.txt"
    path.write_text("a photo of a {}.\n  ein   Bild von {}, 🐈\n\n")
    assert read_templates(path) == ("a photo of a {}.", "ein Bild von {}, 🐈")
    assert prompts(read_templates(path), "{0.__class__}")[0] == "a photo of a {0.__class__}."  # nothing is formatted


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a photo\n", "Line 1 of .* is 'a photo', which has no place {} for the class"),
        (b"{}\n{} and {}\n", "Line 2 of .* has 2 places {} for the class; it needs one"),
        (b"a {c} of {}\n", "Line 1 of .* which has other braces than {}"),
        (b"a {{}}\n", "which has other braces than {}"),
        (b"a {}\n\nb {}\n", "Line 2 of .* is empty"),
        (b"a {}\nb {}\na  {}\n", "Lines 1 and 3 of .* are the same"),
        (b"", "Line 1 of .* is empty"),
        (b"\xff{}", "is not UTF-8 text"),
        (None, "cannot be read"),
    ],
)
def test_a_line_that_is_no_template_is_named(content: bytes | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / "templates.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=says):
        read_templates(path)
