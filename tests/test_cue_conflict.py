"""An observer of shapes has shape bias 1 and one of textures 0; error consistency is Cohen's kappa, within its bounds."""

import csv
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import cohen_kappa_score

from sovit.downstream import cue_conflict, cues
from sovit.downstream.consistency import bounds, error_consistency, kappa
from sovit.downstream.cue_conflict import Config, biases, check, run, text
from sovit.downstream.rates import wilson
from sovit.lit.trained import Trained
from sovit.strict import ConfigError
from trained_cells import untrained

TINY = Config(shots=4, per_pair=1)


@pytest.fixture(scope="module")
def trained() -> Trained:
    return untrained()


def seen(silhouette: float, texture: float) -> Any:
    """Features that show the silhouette and the texture with these strengths, in place of a model's."""

    def features(trained: Trained, images: cues.Drawings) -> dict[str, torch.Tensor]:
        found = torch.zeros(len(images), cues.NUM)
        for row, (shape, filling) in enumerate(images.wanted):
            for category, strength in ((shape, silhouette), (filling, texture)):
                if category is not None:
                    found[row, category] += strength
        return {"model": found, "pixels": found.flip(1)}

    return features


@pytest.mark.parametrize("taught", ["each", "both"])
def test_who_sees_one_cue_decides_by_it(taught: str, trained: Trained, tmp_path: Path, monkeypatch: Any) -> None:
    cfg = dataclasses.replace(TINY, taught=taught, per_pair=2)
    for strengths, bias in (((1.0, 0.1), 1.0), ((0.1, 1.0), 0.0)):
        monkeypatch.setattr(cue_conflict, "_features", seen(*strengths))
        found = run(trained, cfg, tmp_path)["observers"]["model"]
        assert found["shape_bias"]["value"] == bias
        assert (found["shape"], found["texture"], found["neither"]) == ((112, 0, 0) if bias else (0, 112, 0))


def test_how_well_a_cue_is_known_tells_one_that_is_not_seen(trained: Trained, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(cue_conflict, "_features", seen(1.0, 0.0))
    known = run(trained, TINY, tmp_path)["observers"]["model"]["known"]
    assert known["shape"]["value"] == known["shape_alone"]["value"] == 1
    assert known["texture"]["value"] == known["texture_alone"]["value"] == 1 / 8


def test_biases_of_decisions_written_down() -> None:
    made = [cues.Trial(0, 0, 1), cues.Trial(1, 0, 2), cues.Trial(2, 3, 1), cues.Trial(3, 3, 0), cues.Trial(4, 3, 5)]
    found = biases(np.array([0, 2, 3, 3, 7]), made)
    assert (found["shape"], found["texture"], found["neither"]) == (3, 1, 1)
    assert found["shape_bias"]["value"] == 0.75
    assert (found["shape_bias"]["lo"], found["shape_bias"]["hi"]) == wilson(3, 4)
    assert found["by_shape"][cues.SHAPES[0]]["value"] == 0.5
    assert found["by_shape"][cues.SHAPES[3]] == {
        "value": 1.0,
        **dict(zip(("lo", "hi"), wilson(2, 2), strict=True)),
        "num": 2,
    }
    assert found["by_texture"][cues.TEXTURES[1]]["num"] == 2
    assert found["by_shape"][cues.SHAPES[5]]["value"] is None


def test_kappa_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    for accuracy, copied in itertools.product((0.2, 0.5, 0.9), (0.0, 0.5, 1.0)):
        first = rng.random(400) < accuracy
        second = np.where(rng.random(400) < copied, first, rng.random(400) < 0.6)
        found = error_consistency(first, second)
        assert found["kappa"] == pytest.approx(cohen_kappa_score(first, second))
        assert found["least"] - 1e-12 <= found["kappa"] <= found["largest"] + 1e-12
        assert found["lo"] <= found["kappa"] <= found["hi"]
        assert found["squared"] == pytest.approx(found["accuracy_difference"] ** 2)


def test_a_hand_worked_kappa() -> None:
    """Both right 20, first alone 5, second alone 10, both wrong 15: observed 0.7, expected 0.5, kappa 0.4."""
    first = np.repeat([True, True, False, False], [20, 5, 10, 15])
    second = np.repeat([True, False, True, False], [20, 5, 10, 15])
    found = error_consistency(first, second)
    assert (found["observed"], found["expected"]) == (pytest.approx(0.7), pytest.approx(0.5))
    assert found["kappa"] == pytest.approx(0.4)
    # The large-sample standard error of Fleiss, Cohen and Everitt (1969) for this table is 0.128.
    assert found["hi"] - found["lo"] == pytest.approx(2 * 1.96 * 0.128, rel=0.08)


def test_the_bounds_of_kappa_are_those_of_every_table_with_these_accuracies() -> None:
    num = 12
    for right, other in itertools.product(range(1, num), repeat=2):
        values = []
        for both in range(max(0, right + other - num), min(right, other) + 1):
            together = (both + num - right - other + both) / num
            values.append(kappa(together, right / num, other / num))
        assert bounds(right / num, other / num) == pytest.approx((min(values), max(values)))  # type: ignore[type-var]
    assert kappa(1.0, 1.0, 1.0) is None and kappa(1.0, 0.0, 0.0) is None
    assert error_consistency(np.ones(5, bool), np.ones(5, bool))["lo"] is None


def test_every_silhouette_meets_every_texture_of_another_category() -> None:
    made = cues.trials(3)
    assert len({trial.name for trial in made}) == len(made) == 3 * 8 * 7
    pairs = [(trial.shape, trial.texture) for trial in made]
    assert all(pairs.count((a, b)) == 3 * (a != b) for a in range(8) for b in range(8))


def test_an_image_shows_its_cues_at_any_size() -> None:
    def drawn(shape: int | None, texture: int | None, size: int, index: int = 5, part: int = 2) -> np.ndarray:
        return cues.draw(shape, texture, size, seed=0, part=part, index=index).astype(float)

    for k in range(8):
        small, large = drawn(k, None, 16), drawn(k, None, 64)
        coarse = large.reshape(16, 4, 16, 4).mean((1, 3))
        assert np.corrcoef(small.ravel(), coarse.ravel())[0, 1] > 0.95, "the same trial at two sizes shows two places"
        inside = drawn(k, None, 32) > 150
        assert 0.15 < inside.mean() < 0.65
        filled = drawn(k, (k + 1) % 8, 32)
        assert filled[inside].std() > 2 * drawn(k, None, 32)[inside].std(), "the silhouette is not filled"
        assert np.median(filled[~inside]) < 70, "the texture leaves its silhouette"
        for other in range(8):
            if other != k:
                assert np.abs(drawn(k, None, 32) - drawn(other, None, 32)).mean() > 5
                assert np.abs(drawn(None, k, 32) - drawn(None, other, 32)).mean() > 5
    outlines = [drawn(None, 3, 32, index=k) > 100 for k in range(20)]
    assert np.mean([(one != other).mean() for one, other in itertools.combinations(outlines, 2)]) > 0.1
    assert (drawn(1, 2, 16) == drawn(1, 2, 16)).all()
    assert (drawn(1, 2, 16) != drawn(1, 2, 16, part=0)).any() and (drawn(1, 2, 16) != drawn(1, 2, 16, index=6)).any()


def test_a_decision_table_written_is_one_that_can_be_compared_with(trained: Trained, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    cfg = dataclasses.replace(TINY, images=str(folder))
    check(cfg, trained)
    first = run(trained, cfg, tmp_path)
    table = list(csv.DictReader((folder / "trials.csv").read_text().splitlines()))
    assert {row["image"]: row["decision"] for row in table} == first["decisions"]
    image = np.asarray(Image.open(folder / table[3]["image"]))
    assert image.shape == (16, 16) and (image == cues.draw(0, 4, 16, seed=0, part=2, index=3)).all()

    again = dataclasses.replace(TINY, against=str(folder / "trials.csv"))
    check(again, trained)
    found = run(trained, again, tmp_path)["consistency"]["trials"]
    assert found["observed"] == 1 and found["kappa"] in (1, None) and found["accuracy_difference"] == 0
    json.dumps(first, allow_nan=False)
    assert text(first)


def test_human_decisions_are_compared_observer_by_observer(trained: Trained, tmp_path: Path) -> None:
    made = cues.trials(1)
    rows = [("subj", "imagename", "object_response")]
    rows += [("s1", f"run/{trial.name}", cues.SHAPES[trial.shape]) for trial in made[:40]]
    rows += [("s2", trial.name, "na") for trial in made]
    path = tmp_path / "humans.csv"
    path.write_text("\n".join(",".join(row) for row in rows))
    cfg = dataclasses.replace(TINY, against=str(path))
    check(cfg, trained)
    found = run(trained, cfg, tmp_path)["consistency"]
    assert found["s1"]["num"] == 40 and found["s1"]["accuracies"][1] == 1
    assert found["s2"]["num"] == 56 and found["s2"]["accuracies"][1] == 0
    assert cue_conflict.depends(trained, cfg) != cue_conflict.depends(trained, TINY)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("image\na.png", "has no column called decision"),
        ("image,decision\na.png,disc", "'a.png' is no trial"),
        ("image,decision\n0000-disc-horizontal.png,na", "holds no decision for disc"),
        ("image,decision\n0000-disc-horizontal.png,disc\n0000-disc-horizontal.png,bar", "judges 0000.* twice"),
    ],
)
def test_a_wrong_table_is_one_sentence(table: str, message: str, trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(table)
    with pytest.raises(ConfigError, match=message):
        check(dataclasses.replace(TINY, against=str(tmp_path / "t.csv")), trained)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"taught": "eech"}, "did you mean 'each'"),
        ({"shots": 3}, "must be even"),
        ({"per_pair": 0}, "not in 1 .. 1000"),
        ({"against": "nowhere"}, "is not there"),
        ({"against": "nowhere.csv"}, "cannot be read"),
    ],
)
def test_bad_input_is_one_sentence(changes: dict[str, Any], message: str, trained: Trained) -> None:
    with pytest.raises(ConfigError, match=message):
        check(dataclasses.replace(TINY, **changes), trained)


def test_images_are_not_mixed_with_something_else(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds something else"):
        check(dataclasses.replace(TINY, images=str(tmp_path)), trained)
    with pytest.raises(ConfigError, match="sees 8 pixels"):
        check(TINY, untrained("model.image_size=8"))
