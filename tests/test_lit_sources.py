"""Whole runs of text towers on files of pairs, and with towers of other libraries."""

from pathlib import Path

import pytest
import torch

from small_cells import content, pretend_stop
from sovit import records
from sovit.config import ConfigError, compose
from sovit.language.generate_files import generate
from sovit.lit import engine, text_targets, trained
from sovit.lit.towers import OPEN_CLIP
from sovit.schema import RECALL_AT, WAYS
from test_external_tower import SPECIAL, open_clip_saved, saved
from text_cells import image_tower, text_overrides


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few images to evaluate on."""
    monkeypatch.setattr(text_targets, "NAMED_PER_CLASS", 2)
    monkeypatch.setattr(text_targets, "NUM_SCENES", 16)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_tower(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 pairs in a folder and in shards, of which some are damaged."""
    out = tmp_path_factory.mktemp("files")
    for kind in ("json", "pairs"):
        generate(out / kind, kind, num=40, test_num=8, size=24, channels=1, damage=kind == "pairs")
    (out / "json" / "test" / "captions.json").rename(out / "json" / "test" / "images" / "captions.json")  # beside them
    return out


def stopped_and_whole(
    given: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch, step: int = 7
) -> tuple[trained.Trained, trained.Trained]:
    """The towers of an undisturbed run and of one that was stopped and gone on with, whose records must be equal."""
    whole, halves = (compose([*given[name], "trainer.keep_checkpoint=true"]) for name in ("whole", "halves"))
    assert engine.run(whole) == engine.OK
    with monkeypatch.context() as patch:
        pretend_stop(patch, step)
        assert engine.run(halves) == engine.STOPPED
    assert engine.run(halves) == engine.OK
    assert content(whole) == content(halves)
    one, other = (trained.load(records.run_dir(cfg)) for cfg in (whole, halves))
    assert all(torch.equal(tensor, other.weights.tensors[name]) for name, tensor in one.weights.tensors.items())
    return one, other


@pytest.mark.parametrize("kind", ["coco", "pairs"])
def test_a_run_on_files_of_pairs_learns_and_goes_on_exactly(
    kind: str, encoder: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Judged by the captions of the folder's other part: a result for each way of retrieval."""
    train, captions = files / "json" / "train", files / "json" / "test" / "images" / "captions.json"
    own = {
        "coco": [f"data.root={train / 'images'}", f"data.captions={train / 'captions.json'}"],
        "pairs": [f"data.root={files / 'pairs'}", "data.split=train", "data.text_key=json.caption"],
    }[kind]
    own += [f"eval.datasets=[{captions}]", "data.num_examples=null", "durations.values=[20 steps,100 steps]"]
    given = {}
    for name in ("whole", "halves"):
        every = text_overrides(tmp_path / name, encoder, *own)
        given[name] = [f"data={kind}" if text == "data=scenes" else text for text in every]
    one, _ = stopped_and_whole(given, monkeypatch, step=23)
    rows = records.read_lines(records.run_dir(one.cfg) / records.METRICS)
    assert rows[-1]["train/loss"] < 0.9 * rows[0]["train/loss"]
    found = records.read_lines(records.run_dir(one.cfg) / records.EVALS)
    assert {row["dataset"] for row in found} == {f"captions_{way}_at{k}" for way in WAYS for k in RECALL_AT}
    assert all(0 <= row["error"] <= 1 for row in found) and {row["step"] for row in found} == {0, 20, 100}


@pytest.mark.parametrize("locked", [False, True])
@pytest.mark.parametrize("kind", [*SPECIAL, "open_clip"])
def test_a_run_with_a_tower_of_another_library_goes_on_exactly(
    kind: str, locked: bool, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BERT's has dropout, which must not hang on where the run was stopped. A locked tower ends as its file."""
    place = tmp_path / kind
    place.mkdir()
    if kind == "open_clip":
        _, config, _ = open_clip_saved(place, custom=False)
        config.rename(place / OPEN_CLIP[0])
        (place / "model.safetensors").rename(place / OPEN_CLIP[1])
    else:
        saved(place, kind)
    own = [f"text.tower={place}", "shape=16x2x20", "model.num_heads=2", "text.length=9", "optim.lr_rule=constant"]
    own += [f"text.locked={str(locked).lower()}"]
    given = {name: text_overrides(tmp_path / name, encoder, *own) for name in ("whole", "halves")}
    one, _ = stopped_and_whole(given, monkeypatch)
    first = engine_start(given["whole"], tmp_path / "first")
    moved = {name for name, tensor in one.weights.tensors.items() if not torch.equal(tensor, first[name])}
    of_library = {name for name in first if name.startswith("model.")}
    assert moved and of_library
    assert not moved & of_library if locked else len(moved & of_library) > len(of_library) / 2


def engine_start(given: list[str], home: Path) -> dict[str, torch.Tensor]:
    """The weights before the first step."""
    from sovit.lit.fit import build_model

    every = [text for text in given if not text.startswith("runs_dir=")]
    return dict(build_model(compose([*every, f"runs_dir={home}"])).state_dict())


def test_rates_by_shape_are_refused_for_another_librarys_tower(encoder: Path, tmp_path: Path) -> None:
    """Before anything is loaded; it used to fail at the first step."""
    with pytest.raises(ConfigError, match=r"optim\.lr_rule=by_shape .* write optim\.lr_rule=constant"):
        compose(text_overrides(tmp_path, encoder, "text.tower=any"))
