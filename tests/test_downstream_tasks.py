"""`sovit eval` on a small trained run: the frame, and the tasks on frozen features."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from small_cells import small
from sovit import records
from sovit.cli import main
from sovit.config import ConfigError
from sovit.data import generate
from sovit.data.stream import FewShotSet
from sovit.downstream import attributes, class_map, corruptions, fewshot, heads, probe, sets, tasks
from sovit.downstream.corrupt import KINDS, corrupt
from sovit.fewshot import fit_ridge
from sovit.lit import engine
from sovit.lit.evaluation import extract
from sovit.lit.trained import Trained, load


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cfg = small(tmp_path_factory.mktemp("runs"), "trainer.keep_checkpoint=true")
    assert engine.run(cfg) == 0
    return records.run_dir(cfg)


@pytest.fixture(scope="module")
def trained(run_of: Path) -> Trained:
    return load(run_of)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "pictures"
    generate.generate(out, classes=3, images=8, test_images=6, size=20)
    return out


def result(run_of: Path, *overrides: str, **options: Any) -> dict[str, Any]:
    found = tasks.evaluate(run_of, overrides, **options)
    assert found.lines and all(isinstance(line, str) for line in found.lines)
    assert json.loads(found.path.read_text()) == json.loads(json.dumps(found.content))
    return found.content["result"]


# --- the frame


def test_every_recipe_composes_and_gives_every_key_a_value() -> None:
    for recipe in tasks.recipes():
        if tasks.read_yaml(tasks.CONF_DIR / "task" / f"{recipe}.yaml")["name"] in OURS:
            task, cfg = tasks.compose([f"task={recipe}"])
            assert isinstance(cfg, task.Config) and cfg.name in OURS


OURS = ("fewshot", "probe", "variants", "corruptions", "calibration", "ood", "fairness")


@pytest.mark.parametrize("name", OURS)
def test_the_recipe_named_after_a_task_holds_its_defaults(name: str) -> None:
    task, cfg = tasks.compose([f"task={name}"])
    assert cfg == task.Config()


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([], "No task is given; write task=NAME with one of calibration,"),
        (["task=fewsho"], "task=fewsho is not known; did you mean 'fewshot'?"),
        (["task=fewshot", "task=ood"], "task is given twice"),
        (["data=digits"], "'data' is not a key of an evaluation"),
        (["task=ood", "task.heads=own"], "'task.heads' is not a key of task=ood; did you mean 'task.head'?"),
        (["task=ood", "task.name=probe"], "task.name is ood in ood.yaml"),
        (["task=ood", "task.head"], "task.head gives task.head no value"),
        (["task=fewshot", "task.data=digits"], r"task.data=digits is not a list; write task.data=\[digits\]"),
        (["task=fewshot", "task.shots=[1.5]"], r"task.shots\[0\]=1.5 is not a whole number"),
        (["task=fewshot", "task.shots=[0]"], "must be different whole numbers of at least 1"),
        (["task=fewshot", "task.l2_reg=lo"], "task.l2_reg='lo' is neither a number nor loo or rank"),
        (["task=fewshot", "task.data=[digit]"], "task.data: 'digit' is not known; did you mean 'digits'?"),
        (["task=fewshot", "task.data=[./nowhere]"], "task.data: nowhere is no folder"),
        (["task=probe", "task.mixup=0.1"], "task.aug=none takes features once"),
        (["task=probe", "task.loss=sigmoids"], "'sigmoids' is not a choice; did you mean 'sigmoid'?"),
        (["task=calibration", "task.head=own"], "task.head=own knows the 8 training classes, and digits has others"),
        (["task=ood", "task.out=[digits]"], "task.out names digits, which is task.data itself"),
        (["task=corruptions", "task.kinds=[fogg]"], "'fogg' is no corruption; did you mean 'fog'?"),
        (["task=corruptions", "task.severities=[6]"], "from 1 to 5"),
        (["task=corruptions", "task.against=nowhere"], "task.against: nowhere is not there"),
        (["task=fairness", "task.data=fractals"], "fractals has no attributes"),
        (["task=fairness", "task.data=./x"], "task.attributes has no value"),
        (["task=variants", "task.class_map=./none"], "task.class_map=none cannot be read"),
    ],
)
def test_bad_input_is_one_sentence(run_of: Path, overrides: list[str], told: str, capsys: Any) -> None:
    with pytest.raises(ConfigError, match=told) as refused:
        tasks.evaluate(run_of, overrides)
    assert "\n" not in str(refused.value)
    assert main(["eval", str(run_of), *overrides]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_result_is_kept_and_made_anew_when_asked_or_when_the_images_change(
    run_of: Path, tmp_path: Path, capsys: Any
) -> None:
    data = tmp_path / "few"
    generate.generate(data, classes=2, images=3, test_images=2, size=16)
    given = ["task=fewshot", f"task.data=[{data}]", "task.shots=[1]"]
    first = tasks.evaluate(run_of, given)
    assert first.fresh and first.path.parent == run_of / "downstream"
    assert [path.name for path in first.path.parent.iterdir() if path.name.startswith(".")] == []  # no work left
    again = tasks.evaluate(run_of, given)
    assert not again.fresh and again.content == json.loads(first.path.read_text()) and again.lines == first.lines
    assert tasks.evaluate(run_of, given, again=True).fresh
    first.path.write_text(json.dumps({**first.content, "result": {"rows": [{}]}}))  # of an older form
    assert tasks.evaluate(run_of, given).content == first.content
    other = tasks.evaluate(run_of, given, average=False)
    assert other.fresh and other.path != first.path and other.content["weights"] == "trained"
    (data / "test" / "class000" / "more.jpg").write_bytes((next((data / "test" / "class001").iterdir())).read_bytes())
    sets.open_images.cache_clear()
    assert tasks.evaluate(run_of, given).fresh
    assert main(["eval", str(run_of), *given]) == 0
    assert "was there; --again makes it anew" in capsys.readouterr().out
    assert main(["eval", str(run_of), *given, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["task"] == "fewshot"


def test_results_of_an_exported_file_lie_beside_it(run_of: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    assert main(["export", str(run_of), str(out)]) == 0
    found = tasks.evaluate(out, ["task=fewshot", "task.data=[digits]", "task.shots=[1]"])
    assert found.path.parent == tmp_path / "model.safetensors.evals"
    same = tasks.evaluate(run_of, ["task=fewshot", "task.data=[digits]", "task.shots=[1]"])
    assert same.content["result"] == found.content["result"] and same.path.name == found.path.name


def test_a_killed_evaluation_goes_on_and_ends_with_the_same_result(
    run_of: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["task=corruptions", "task.kinds=[fog,contrast]", "task.severities=[1,5]", "task.num_images=30"]
    whole = result(run_of, *given)
    calls: list[tuple[str, int]] = []

    def dying(images: torch.Tensor, kind: str, severity: int, **options: Any) -> torch.Tensor:
        calls.append((kind, severity))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return corrupt(images, kind, severity, **options)

    monkeypatch.setattr(corruptions, "corrupt", dying)
    with pytest.raises(KeyboardInterrupt):
        tasks.evaluate(run_of, given, again=True)
    assert tasks.evaluate(run_of, given, again=True).content["result"] == whole
    assert calls[3:5] == [("contrast", 1), ("contrast", 5)]  # fog is not done twice


# --- few-shot


def test_fewshot_repeats_the_evaluation_of_training(run_of: Path) -> None:
    found = result(run_of, "task=fewshot")["draws"]
    rows = [row for row in records.read_lines(run_of / records.EVALS) if row["step"] == 24]
    key = ("dataset", "shots", "draw")
    assert {tuple(row[k] for k in key): row["error"] for row in found} == {
        tuple(row[k] for k in key): row["error"] for row in rows
    }
    assert len(found) == len(rows) == 12


def test_fewshot_of_a_users_folder_by_name_of_the_folder(run_of: Path, folder: Path) -> None:
    found = result(run_of, "task=fewshot", f"task.data=[digits,{folder}]", "task.shots=[1,5]", "task.l2_reg=rank")
    rows = {(row["dataset"], row["shots"]): row for row in found["rows"]}
    assert rows["pictures", 5]["num_test"] == 18 and rows["pictures", 5]["chance"] == pytest.approx(2 / 3)
    assert all(0 <= row["lo"] <= row["error"] <= row["hi"] <= 1 for row in rows.values())
    for shots in (1, 5):  # one l2 for both
        assert len({row["l2_reg"] for row in found["draws"] if row["shots"] == shots}) == 1


def test_the_rank_is_not_the_mean_accuracy() -> None:
    """Worked by hand: ranks (1, 2, 3), (3, 2, 1), (1, 3, 2) have the means 5/3, 7/3, 2."""
    accuracy = np.array([[0.1, 0.2, 0.99], [0.53, 0.52, 0.51], [0.3, 0.5, 0.4]])
    assert accuracy.mean(0).argmax() == 2 and fewshot.best_by_rank(accuracy) == 1
    assert fewshot.best_by_rank(np.array([[0.5, 0.5, 0.1]])) == 1  # the stronger penalty of equals


def test_rank_without_images_left_over_is_refused() -> None:
    one = FewShotSet("few", torch.zeros(4, 1), torch.tensor([0, 0, 1, 1]), torch.zeros(0), torch.zeros(0), 2)
    with pytest.raises(ConfigError, match="needs images of few beyond the 2 shots"):
        fewshot.by_mean_rank([(torch.randn(4, 3), one)], [2], 1)


# --- heads


def test_heads_are_what_they_are_made_of(trained: Trained) -> None:
    train, test = sets.parts("digits", trained.cfg)
    x = extract(trained.model, train.images[:200]).double()
    y = train.labels[:200]
    seen = extract(trained.model, test.images[:100]).double()
    ridge = fit_ridge(x, y, 10, 4.0)
    head = heads.ridge(x.numpy(), y, 10, 4.0)
    assert (head(seen.numpy()).argmax(1) == ridge.predict(seen)[0].numpy()).all()
    own = heads.own(trained)(seen.numpy())
    assert own == pytest.approx(trained.model(test.images[:100]).numpy(), abs=1e-5)


def test_logistic_regression_solves_its_own_equations(trained: Trained) -> None:
    """At the minimum the gradient of log loss + |W|^2 / 2 is zero; for two classes too."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((80, 4)) * [1, 2, 3, 4] + 1
    for classes in (2, 3):
        y = np.arange(80) % classes
        head = heads.logistic(x, y, classes)
        z = (x - x.mean(0)) / (x.std(0) + 1e-5)
        weight = head.slope * (x.std(0) + 1e-5)[:, None]
        p = np.exp(head(x) - head(x).max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        residual = p - np.eye(classes)[y]
        assert residual.sum(0) == pytest.approx(np.zeros(classes), abs=0.02)
        gradient = z.T @ residual + weight
        kept = gradient[:, 1:] if classes == 2 else gradient
        assert kept == pytest.approx(np.zeros_like(kept), abs=0.02)


def test_folds_divide_every_class() -> None:
    labels = np.repeat([0, 1], [10, 7])
    fold = heads.folds(labels, 3)
    assert np.bincount(fold[:10]).tolist() == [4, 3, 3] and np.bincount(fold[10:]).tolist() == [3, 2, 2]


def test_held_out_takes_of_every_class_and_leaves_some() -> None:
    labels = np.repeat([0, 1, 2], [100, 10, 1])
    out = heads.held_out(labels, 0.1)
    assert np.bincount(labels[out], minlength=3).tolist() == [10, 1, 0]


# --- probe


def _cfg(**given: Any) -> probe.Config:
    return probe.Config(**{"lr": [0.1, 0.02], "weight_decay": [0.0, 0.05], "epochs": [2], "batch_size": 7, **given})


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_points_side_by_side_train_as_sgd_written_out(tmp_path: Path, loss: str) -> None:
    """Against the update rule by hand: v = 0.9 v + g + wd w, w -= lr v, the rate warmed up and then on a cosine."""
    rng = np.random.default_rng(0)
    x, y = torch.tensor(rng.standard_normal((20, 3))).float(), torch.tensor(rng.integers(4, size=20))
    cfg, grid = _cfg(loss=loss, head_bias=-1.0), [(0.1, 0.0), (0.02, 0.05)]
    order: list[Any] = []

    def batch(rows: Any, keys: Any) -> Any:
        order.append(rows)
        return x[torch.from_numpy(rows)], F.one_hot(y[torch.from_numpy(rows)], 4).float()

    weights, biases = probe._train(cfg, grid, 2, np.arange(20), 3, 4, batch, torch.device("cpu"), tmp_path)
    assert sorted(np.concatenate(order[:3])) == list(range(20))  # an epoch is every image once
    for g, (lr, decay) in enumerate(grid):
        w, b = np.zeros((3, 4)), np.full(4, -1.0)
        vw, vb = np.zeros_like(w), np.zeros_like(b)
        for step, rows in enumerate(order):
            xb, target = x[rows].double().numpy(), np.eye(4)[y[rows]]
            z = xb @ w + b
            p = 1 / (1 + np.exp(-z)) if loss == "sigmoid" else np.exp(z) / np.exp(z).sum(1, keepdims=True)
            residual = (p - target) / len(rows)
            vw = 0.9 * vw + xb.T @ residual + decay * w
            vb = 0.9 * vb + residual.sum(0)
            warm = round(0.1 * 6)
            scale = min(1, step / warm) * (1 + np.cos(np.pi * max(0, step - warm) / (6 - warm))) / 2
            w, b = w - lr * scale * vw, b - lr * scale * vb
        assert weights[g].numpy() == pytest.approx(w, abs=1e-6) and biases[g].numpy() == pytest.approx(b, abs=1e-6)


def test_the_probe_goes_on_between_the_points_of_its_grid(run_of: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["task=probe", "task.aug=crop", "task.flip=true", "task.mixup=0.2", "task.epochs=[1,2]", "task.heldout=0.9"]
    whole = result(run_of, *given)
    trained_on: list[int] = []
    plain = probe._batches

    def dying(kept: Any, size: int, key: int) -> Any:
        trained_on.append(key)
        if len(trained_on) == 3:
            raise KeyboardInterrupt
        return plain(kept, size, key)

    monkeypatch.setattr(probe, "_batches", dying)
    with pytest.raises(KeyboardInterrupt):
        tasks.evaluate(run_of, given, again=True)
    assert tasks.evaluate(run_of, given, again=True).content["result"] == whole
    assert len(trained_on) == 4 and trained_on[2] == trained_on[3]  # two epochs were done, the third begins again


def test_the_probe_learns_chooses_by_the_held_out_part_and_says_where_the_range_ends(run_of: Path) -> None:
    found = result(run_of, "task=probe", "task.lr=[1e-5,0.03]", "task.epochs=[20]")
    assert found["top1"]["lo"] > 0.3 > found["top1"]["chance"]  # a barely trained model still tells digits apart
    best = max(found["grid"], key=lambda point: (point["heldout_accuracy"], -point["heldout_loss"]))
    assert found["chosen"] == best and best["lr"] == 0.03
    assert found["at_edge"] == ["lr"] and found["num_train"] + found["num_heldout"] == 600


def test_inception_crops_of_a_folder_are_of_the_models_size(trained: Trained, folder: Path) -> None:
    from sovit.downstream.probe_views import augmented, roomy

    train, _ = sets.parts(str(folder), trained.cfg)
    images = roomy(str(folder), train, trained.cfg, "inception")
    rows, keys = np.arange(4), np.arange(4).astype(np.uint64) + 9
    labels = torch.from_numpy(train.labels[:4])
    made, targets = augmented(images, rows, labels, 3, keys, "inception", True, 0.3, 16)
    assert made.shape == (4, 1, 16, 16) and targets.sum(1) == pytest.approx(np.ones(4))
    assert images[0:1].shape[-1] == 18 and made.abs().max() <= 1.0001
    again, _ = augmented(images, rows, labels, 3, keys, "inception", True, 0.3, 16)
    assert torch.equal(made, again)


# --- variants


def test_variants_of_the_same_classes_are_plain_accuracy(run_of: Path, trained: Trained) -> None:
    found = result(run_of, "task=variants")
    train, test = sets.parts("digits", trained.cfg)
    x, seen = (extract(trained.model, part.images).double().numpy() for part in (train, test))  # type: ignore[arg-type]
    right = heads.logistic(x, train.labels, 10)(seen).argmax(1) == test.labels
    assert found["top1"]["value"] == pytest.approx(right.mean())
    assert found["top1"]["chance"] == pytest.approx(0.1) and found["top5"]["chance"] == pytest.approx(0.5)


def test_a_map_renames_merges_and_leaves_out_classes(run_of: Path, folder: Path, tmp_path: Path) -> None:
    """Classes 000 and 001 of the folder are 3 of the digits, 002 is left out; another digit may be right too."""
    path = tmp_path / "map.txt"
    path.write_text("# a comment\nclass000\t3\nclass001\t3\t5  # or five\n")
    found = result(run_of, "task=variants", f"task.data={folder}", f"task.class_map={path}")
    assert found["num_classes"] == 2 and found["left_out_images"] == 6 and found["left_out_classes"] == 1
    assert found["top1"]["n"] == 12 and found["top1"]["chance"] == pytest.approx((0.5 + 1) / 2)
    free = result(run_of, "task=variants", f"task.data={folder}", f"task.class_map={path}", "task.restrict=false")
    assert free["num_classes"] == 10 and free["top1"]["chance"] == pytest.approx(0.15)
    assert free["top1"]["value"] <= found["top1"]["value"]


def test_labels_of_single_images_count_as_in_real(run_of: Path, folder: Path, tmp_path: Path) -> None:
    own = ("--", f"task.data={folder}", f"task.train={folder}")[1:]
    plain = result(run_of, "task=variants", *own)
    assert plain["num_classes"] == 3 and plain["top1"]["n"] == 18
    _, test = sets.parts(str(folder), load(run_of).cfg)
    assert test.file_names is not None
    names = [test.file_names(k) for k in range(18)]
    everything = {"labels": {name: ["class000", "class001", "class002"] for name in names[:10]} | {names[10]: []}}
    path = tmp_path / "real.json"
    path.write_text(json.dumps(everything))
    found = result(run_of, "task=variants", *own, f"task.class_map={path}")
    assert found["top1"] == {**found["top1"], "value": 1.0, "n": 10, "chance": 1.0}  # all of them are right
    path.write_text(json.dumps({"labels": {name: [2] for name in names}}))  # by number
    assert result(run_of, "task=variants", *own, f"task.class_map={path}")["labels"] == "of single images"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("class000\t11", "leads to '11', which is no class of the classifier"),
        ("klass000\t1", "'klass000' is no class of the data set; did you mean 'class000'?"),
        ("class000", "line 1: write VARIANT_CLASS CLASSIFIER_CLASS"),
        ("class000 1\nclass000 2", "line 2: 'class000' is given twice"),
        ("{", "is not valid JSON"),
        ('{"clases": {}}', "'clases' is no entry of a class map; did you mean 'classes'?"),
        ('{"labels": {"nowhere.jpg": ["1"]}}', "'nowhere.jpg' is no image of the data set"),
        ('{"classes": {"class000": 1.5}}', "leads to .*; give the name of a class"),
        ("{}", "maps nothing"),
        ("", "maps nothing"),
    ],
)
def test_a_map_that_does_not_match_is_one_sentence(
    run_of: Path, folder: Path, tmp_path: Path, content: str, told: str
) -> None:
    path = tmp_path / "map"
    path.write_text(content)
    with pytest.raises(ConfigError, match=told):
        tasks.evaluate(run_of, ["task=variants", f"task.data={folder}", f"task.class_map={path}"])


def test_classes_that_do_not_match_are_one_sentence(run_of: Path, folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"The class 'class000' is none of the classifier's 10, such as '0'; give a task"
    ):
        tasks.evaluate(run_of, ["task=variants", f"task.data={folder}"])
    with pytest.raises(ConfigError, match="pictures has 3 classes, but the model was trained on 8"):
        tasks.evaluate(run_of, ["task=calibration", "task.head=own", f"task.data={folder}"])


def test_the_right_classes_by_hand() -> None:
    found = class_map.ClassMap({"a": ["x"], "b": ["x", "2"]}, {"n1": ["y"], "n2": []})
    right, known = class_map.right_classes(
        found, "f", ["a", "b"], np.array([0, 1, 0]), ["n0", "n1", "n2"], ["x", "y", "z", "w"]
    )
    assert right.tolist() == [[True, False, False, False], [False, True, False, False], [False] * 4]
    assert known.tolist() == [True, True, True, False]


# --- corruptions


@pytest.mark.parametrize("kind", KINDS)
def test_a_corruption_is_a_function_of_image_number_kind_and_severity(kind: str) -> None:
    smooth = torch.linspace(0, 9, 24)
    images = (smooth[:, None].sin() * smooth.cos() * 0.8).expand(5, 3, 24, 24).contiguous()
    far = []
    for severity in (1, 2, 3, 4, 5):
        found = corrupt(images, kind, severity, seed=3)
        assert found.shape == images.shape and found.isfinite().all() and found.abs().max() <= 1
        levels = (found + 1) * 127.5
        assert (levels - levels.round()).abs().max() < 1e-4  # bytes
        assert torch.equal(found[2:4], corrupt(images[2:4], kind, severity, first=2, seed=3))
        far.append((found - images).square().mean().sqrt().item())
    assert far == sorted(far) and far[0] > 0.002 and far[4] > 1.3 * far[0]
    grey = images[:, :1]
    assert corrupt(grey, kind, 3).shape == grey.shape
    draws_nothing = {"defocus_blur", "zoom_blur", "gaussian_blur", "brightness", "contrast", "pixelate", "jpeg"}
    other = corrupt(images, kind, 3, seed=4)
    assert torch.equal(other, corrupt(images, kind, 3, seed=3)) == (kind in draws_nothing)
    assert torch.equal(other[0], other[1]) == (kind in draws_nothing)  # two images, two draws


def test_a_run_against_itself_has_a_mean_corruption_error_of_one(run_of: Path) -> None:
    given = ["task=corruptions", "task.kinds=[gaussian_noise]", "task.severities=[3]", "task.num_images=50"]
    found = result(run_of, *given, f"task.against={run_of}")
    assert found["mean_corruption_error"] == {"value": 1.0, "lo": 1.0, "hi": 1.0}
    pixels = result(run_of, *given)
    assert (
        pixels["baseline"]["what"] == "ridge regression on raw pixels" and pixels["mean_corruption_error"]["value"] > 0
    )
    assert pixels["rows"][0]["error"]["value"] == found["rows"][0]["errors"][0]["value"]


# --- calibration, out-of-distribution, fairness


def test_calibration_of_a_fitted_head_and_of_the_models_own(run_of: Path) -> None:
    found = result(run_of, "task=calibration")
    assert found["num_test"] == 1197 and 100 < found["num_heldout"] < 140
    assert found["after"]["nll"]["value"] < found["blind"]["nll"]
    own = result(run_of, "task=calibration", "task.head=own", "task.data=training")
    assert own["num_classes"] == 8 and own["num_test"] + own["num_heldout"] == 2048
    assert own["after"]["nll"]["value"] <= own["before"]["nll"]["value"] + 0.01


def test_unseen_images_of_the_training_classes_are_none_the_run_was_trained_on(trained: Trained) -> None:
    from sovit.lit.data import train_stream

    fit, test = sets.parts("training", trained.cfg)
    seen = train_stream(trained.cfg).__getitems__(range(24 * 16))[0]  # type: ignore[union-attr]
    known = {image.numpy().tobytes() for image in seen}
    for part in (fit, test):
        assert len(part.classes) == 8 and not known & {image.numpy().tobytes() for image in part.images[0:500]}


def test_ood_tells_digits_from_fractals(run_of: Path, folder: Path) -> None:
    found = result(run_of, "task=ood", f"task.out=[fractals,{folder}]")
    rows = {(row["out"], row["score"]): row for row in found["rows"]}
    assert len(rows) == 8 and {out for out, _ in rows} == {"fractals", "pictures"}
    row = rows["fractals", "mahalanobis"]
    assert row["auroc"]["value"] > 0.8 and row["auroc"]["lo"] < row["auroc"]["value"] < row["auroc"]["hi"]
    assert row["aupr"]["chance"] == pytest.approx(1197 / (1197 + row["num_out"]))


def test_fairness_of_the_digits_pays_for_parity(run_of: Path) -> None:
    found = result(run_of, "task=fairness", "task.levels=[0,1]")
    strict, free = found["rows"]
    assert strict["parity"]["value"] < 0.1 and strict["accuracy"]["value"] < free["accuracy"]["value"] + 0.03
    assert [one["group"] for one in found["groups"]] == ["thin", "bold"]
    plain = found["plain"]
    n = [one["accuracy"]["n"] for one in found["groups"]]
    mean = sum(one["accuracy"]["value"] * k for one, k in zip(found["groups"], n, strict=True)) / sum(n)
    assert plain["accuracy"]["value"] == pytest.approx(mean) and plain["accuracy"]["value"] > found["chance"]


def _csv(folder: Path, path: Path, *, columns: tuple[str, ...] = ("file", "sex", "smiling")) -> None:
    rows = [
        (f"{part}/{file.parent.name}/{file.name}", "ab"[k % 2], ("no", "yes")[k // 2 % 2])
        for part in ("train", "test")
        for k, file in enumerate(sorted((folder / part).rglob("*.jpg")))
    ]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def test_fairness_reads_groups_and_answers_beside_the_images(run_of: Path, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "faces.csv"
    _csv(folder, path)
    given = [
        "task=fairness",
        f"task.data={folder}",
        f"task.attributes={path}",
        "task.attribute=sex",
        "task.label=smiling",
    ]
    found = result(run_of, *given)
    assert found["yes"] == "smiling=yes" and [one["group"] for one in found["groups"]] == ["a", "b"]
    assert sum(one["accuracy"]["n"] for one in found["groups"]) == 18
    truly = [one["yes_truth"] for one in found["groups"]]  # 18 images: no no yes yes no no ...
    assert truly == pytest.approx([4 / 9, 4 / 9])
    with pytest.raises(ConfigError, match=r"faces\.csv has no column 'gender'; choose from sex, smiling"):
        tasks.evaluate(run_of, [*given[:3], "task.attribute=gender", "task.label=smiling"])
    with pytest.raises(ConfigError, match=r"task\.positive='y' is no answer of .*choose from no, yes"):
        tasks.evaluate(run_of, [*given, "task.positive=y"])
    path.write_text("file,sex,smiling\nnone.jpg,a,yes\nother.jpg,b,no\n")
    with pytest.raises(ConfigError, match="names no image of pictures; its first column holds names such as class000/"):
        tasks.evaluate(run_of, given)


def test_a_table_with_three_answers_or_a_line_twice_is_refused(trained: Trained, folder: Path, tmp_path: Path) -> None:
    train, test = sets.parts(str(folder), trained.cfg)
    path = tmp_path / "t.csv"
    for content, told in (
        ("f,g,l\na,1,0\nb,2,1\nc,1,2\n", "holds 3 answers"),
        ("f,g,l\na,1,0\nb,1,1\n", "holds one group, '1'"),
        ("f,g,l\na,1,0\na,2,1\n", "line 3: 'a' is there twice"),
        ("f,g,l\n", "holds no line"),
    ):
        path.write_text(content)
        with pytest.raises(ConfigError, match=told):
            attributes.from_csv(path, "g", "l", None, train, test)
