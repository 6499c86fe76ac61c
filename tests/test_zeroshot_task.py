"""`sovit eval` of a text tower: zero-shot classes and retrieval, held against counting by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sovit import cli, records
from sovit.config import ConfigError, compose
from sovit.data.views import TestView, to_float
from sovit.downstream.tasks import evaluate
from sovit.lit import engine, text_targets, trained
from sovit.models.vit import features
from text_cells import image_tower, text_overrides

CLASSES, PER_CLASS = ("dark", "dim", "grey", "light", "pale", "white"), 3


@pytest.fixture(autouse=True, scope="module")
def few() -> None:
    patch = pytest.MonkeyPatch()
    patch.setattr(text_targets, "NAMED_PER_CLASS", 2)
    patch.setattr(text_targets, "NUM_SCENES", 16)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory, few: None) -> Path:
    home = tmp_path_factory.mktemp("towers")
    cfg = compose(text_overrides(home, image_tower(home), "trainer.keep_checkpoint=true"))
    assert engine.run(cfg) == engine.OK
    return records.run_dir(cfg)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stripes of six kinds, as labelled folders and with two captions each."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    images, captions = [], []
    for k in range(len(CLASSES) * PER_CLASS):
        label = k % len(CLASSES)
        pixels = rng.integers(0, 40, (24, 24)) + 30 * label
        pixels[:: 2 + label] += 60
        place = folder / "classes" / f"{label}" / f"{k}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(place)
        images.append({"id": k, "file_name": f"{label}/{k}.png"})
        for said in (f"{CLASSES[label]} stripes", f"number {k} of them"):
            captions.append({"id": len(captions), "image_id": k, "caption": said})
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    (folder / "names.txt").write_text("\n".join(CLASSES))
    (folder / "templates.txt").write_text("a {} picture\nstripes that are {}")
    return folder


def embedded(tower: Path, texts: list[str]) -> torch.Tensor:
    found = trained.load(tower)
    tokens, _ = found.locked.vocabulary.batch(texts, found.cfg.text.length)
    with torch.no_grad():
        return torch.nn.functional.normalize(found.model(tokens).double(), dim=1)


def seen(tower: Path, folder: Path) -> tuple[torch.Tensor, list[int]]:
    """Features of the pictures in the order of their classes, and their labels."""
    encoder, view = trained.load(tower).locked.encoder.model, TestView(16, 1)
    paths = sorted((folder / "classes").glob("*/*.png"), key=lambda path: (path.parent.name, path.name))
    pixels = torch.stack([view(path.read_bytes()) for path in paths])
    with torch.no_grad():
        found = features(encoder, to_float(pixels)).double()
    return torch.nn.functional.normalize(found, dim=1), [int(path.parent.name) for path in paths]


def test_zero_shot_of_a_folder_is_what_counting_gives(tower: Path, pictures: Path) -> None:
    own = (f"task.classes={pictures / 'names.txt'}", f"task.templates={pictures / 'templates.txt'}")
    found = evaluate(tower, ["task=zeroshot", f"task.data={pictures / 'classes'}", *own])
    result = found.content["result"]
    weights = torch.stack(
        [embedded(tower, [f"a {name} picture", f"stripes that are {name}"]).mean(0) for name in CLASSES]
    )
    images, labels = seen(tower, pictures)
    order = (images @ torch.nn.functional.normalize(weights, dim=1).T).argsort(1, descending=True)
    for k in (1, 5):
        right = np.mean([label in row[:k] for row, label in zip(order.tolist(), labels, strict=True)])
        top = result["top"][str(k)]
        assert top["value"] == pytest.approx(right) and top["lo"] <= right <= top["hi"]
        assert top["chance"] == pytest.approx(k / 6)
    guesses = np.array(order[:, 0].tolist())
    for k, row in enumerate(result["classes"]):
        mine = guesses[np.array(labels) == k]
        assert (
            row["class"] == CLASSES[k] and row["num"] == PER_CLASS and row["value"] == pytest.approx((mine == k).mean())
        )
    assert any("2 prompts a class" in line for line in found.lines)
    assert not evaluate(tower, ["task=zeroshot", f"task.data={pictures / 'classes'}", *own]).fresh
    (pictures / "templates.txt").write_text("a {} image\nstripes that are {}")
    assert evaluate(tower, ["task=zeroshot", f"task.data={pictures / 'classes'}", *own]).fresh


def test_what_a_class_is_called_is_printed_and_not_obeyed(tower: Path, pictures: Path, tmp_path: Path) -> None:
    """Else the name of a folder from the internet clears the screen, or writes over the lines above."""
    (tmp_path / "names.txt").write_text("\n".join(["\x1b[2Jred", "\u202eetihw", *CLASSES[2:]]))
    found = evaluate(
        tower, ["task=zeroshot", f"task.data={pictures / 'classes'}", f"task.classes={tmp_path / 'names.txt'}"]
    )
    assert found.content["result"]["classes"][0]["class"] == "\x1b[2Jred"
    assert all(line.isprintable() for line in found.lines)
    assert any("[U+001B][2Jred" in line for line in found.lines)


def test_retrieval_of_a_caption_file_is_what_counting_gives(tower: Path, pictures: Path) -> None:
    given = [f"task.data={pictures / 'captions.json'}", f"task.images={pictures / 'classes'}"]
    result = evaluate(tower, ["task=retrieval", *given]).content["result"]
    assert (result["num_images"], result["num_texts"]) == (18, 36)
    content = json.loads((pictures / "captions.json").read_text())
    names = {image["id"]: image["file_name"] for image in content["images"]}
    images, _ = seen(tower, pictures)
    paths = sorted(names.values())  # as `seen` has them
    owner = [paths.index(names[caption["image_id"]]) for caption in content["annotations"]]
    scores = (images @ embedded(tower, [caption["caption"] for caption in content["annotations"]]).T).numpy()
    # captions that are said of several images tie: one is then among the first k by its share of those orders
    for k in (1, 5, 10):
        hits = []
        for text, image in enumerate(owner):
            hits.append((scores[:, text] > scores[image, text] + 1e-6).sum() < k)
        share = result["recall"]["text_to_image"][str(k)]
        assert share["value"] == pytest.approx(np.mean(hits)) and share["chance"] == pytest.approx(k / 18)
        assert share["lo"] < share["value"] + 1e-9 < share["hi"] + 2e-9


def test_the_embedded_default_has_intervals_and_chance(tower: Path, capsys: pytest.CaptureFixture) -> None:
    for task, chance in (("zeroshot", "0.062"), ("retrieval", "0.062")):
        assert cli.main(["eval", str(tower), f"task={task}"]) == 0
        said = capsys.readouterr().out
        assert "95 % interval" in said and "chance" in said and chance in said


REFUSED = {
    "another number of names": (
        ["task=zeroshot", "task.data=FOLDER", "task.classes=TWO"],
        "holds 2 names, and classes has 6",
    ),
    "a template without a place": (["task=zeroshot", "task.templates=TWO"], "no place {} for the class"),
    "a word": (["task=zeroshot", "task.data=digits"], "'digits' is not known"),
    "no captions": (["task=retrieval", "task.data=FOLDER"], "write scenes, or the path of a .json"),
    "no such file": (["task=retrieval", "task.data=nowhere.json"], "nowhere.json"),
    "images of scenes": (["task=retrieval", "task.images=FOLDER"], "no effect on the embedded scenes"),
}


@pytest.mark.parametrize("label", REFUSED)
def test_what_cannot_be_is_refused_in_a_sentence(label: str, tower: Path, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "two.txt").write_text("one\ntwo")
    given, sentence = REFUSED[label]
    places = {"FOLDER": str(pictures / "classes"), "TWO": str(tmp_path / "two.txt")}
    for word, place in places.items():
        given = [text.replace(word, place) for text in given]
    with pytest.raises(ConfigError) as raised:
        evaluate(tower, given)
    assert sentence in str(raised.value) and "\n" not in str(raised.value)


def test_an_image_tower_alone_and_one_that_has_changed_are_refused(tower: Path, tmp_path: Path) -> None:
    encoder = Path(records.read_run(tower)["encoder"]["source"])
    with pytest.raises(ConfigError, match="has no text tower; train one on it"):
        evaluate(encoder, ["task=zeroshot"])
    moved = image_tower(tmp_path, "seed=1")
    aside = encoder.with_name("aside")
    encoder.rename(aside)
    encoder.symlink_to(moved)
    try:
        with pytest.raises(ConfigError, match=r"text\.encoder=.* has other weights than when run-.* began"):
            trained.load(tower)
    finally:
        encoder.unlink()
        aside.rename(encoder)
