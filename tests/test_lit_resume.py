"""A text tower's run goes on exactly, and not with another image tower or vocabulary."""

import json
from pathlib import Path

import pytest
import torch

from small_cells import content, pretend_stop
from sovit import records
from sovit.config import ConfigError, compose
from sovit.language import vocabulary
from sovit.lit import engine, teacher, text_targets, trained
from text_cells import image_tower, text_overrides


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few images to evaluate on."""
    monkeypatch.setattr(text_targets, "NAMED_PER_CLASS", 2)
    monkeypatch.setattr(text_targets, "NUM_SCENES", 16)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_tower(tmp_path_factory.mktemp("encoder"))


def test_a_tower_stopped_amid_an_epoch_ends_as_an_undisturbed_one(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, metrics and rows, bit for bit; 40 scenes in batches of 16, so that step 7 lies inside an epoch."""
    own = ("trainer.keep_checkpoint=true", "data.num_workers=2")
    whole, halves = (compose(text_overrides(tmp_path / name, encoder, *own)) for name in ("whole", "halves"))
    assert engine.run(whole) == engine.OK
    with monkeypatch.context() as patch:
        pretend_stop(patch, 7)
        assert engine.run(halves) == engine.STOPPED
    hashed = []
    real = teacher.weights_hash
    monkeypatch.setattr(teacher, "weights_hash", lambda tensors: hashed.append(1) or real(tensors))
    assert engine.run(halves) == engine.OK
    assert len(hashed) == 1, "the image tower is loaded and hashed once a start"
    assert content(whole) == content(halves)
    one, other = (trained.load(records.run_dir(cfg)).weights.tensors for cfg in (whole, halves))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def stopped(encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Overrides of a run that was stopped; its image tower and vocabulary lie where something else can be put."""
    (tmp_path / "encoder").symlink_to(encoder)
    vocabulary.save(vocabulary.load(None), tmp_path / "words.json")
    given = text_overrides(tmp_path, tmp_path / "encoder", f"text.vocabulary={tmp_path / 'words.json'}")
    with monkeypatch.context() as patch:
        pretend_stop(patch, 5)
        assert engine.run(compose(given)) == engine.STOPPED
    return given


def test_a_tower_does_not_go_on_with_another_image_tower(stopped: list[str], tmp_path: Path) -> None:
    other = image_tower(tmp_path / "other", "seed=1")
    (tmp_path / "encoder").unlink()
    (tmp_path / "encoder").symlink_to(other)
    with pytest.raises(ConfigError, match=r"text\.encoder=.* has other weights than when run-.* began"):
        engine.run(compose(stopped))


def test_a_tower_does_not_go_on_with_another_vocabulary(stopped: list[str], tmp_path: Path) -> None:
    words = json.loads((tmp_path / "words.json").read_text())
    (tmp_path / "words.json").write_text(json.dumps(words, indent=0))  # as many tokens, another file
    with pytest.raises(ConfigError, match=r"text\.vocabulary is another than when run-.*, of as many tokens"):
        engine.run(compose(stopped))
    vocabulary.save(vocabulary.train(["a picture of words"] * 3, 300), tmp_path / "words.json")
    with pytest.raises(ConfigError, match=r"of \d+ tokens and not \d+; put it back"):
        engine.run(compose(stopped))
