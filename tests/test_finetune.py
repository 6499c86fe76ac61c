"""Fine-tuning does the published recipe, goes on exactly where it was killed, and never looks at the test part to choose."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import zoom

from sovit.config import CONF_DIR
from sovit.data.generate import generate
from sovit.downstream import finetune, tasks, training_images
from sovit.downstream.adapted import adapted, check_size, resample
from sovit.downstream.finetune import Config, check, errors, layer_groups, run, text
from sovit.downstream.rates import wilson
from sovit.downstream.training import Recipe, ResumeFile, train
from sovit.lit.trained import Trained
from sovit.models.vit import features
from sovit.strict import ConfigError, read_yaml
from trained_cells import untrained

TINY = Config(
    lr=[0.1, 0.3], steps=6, global_batch_size=8, warmup_steps=2, heldout=0.1, min_area=0.5, mixup=0.2, randaugment_ops=1
)


@pytest.fixture(scope="module")
def trained() -> Trained:
    return untrained()


class Killed(BaseException):
    pass


def small_test_part(patch: pytest.MonkeyPatch) -> None:
    """The first hundred test images: what is tested does not hang on their number."""
    full = training_images.parts

    def few(data: str, cfg: Any, heldout: float) -> training_images.Parts:
        found = full(data, cfg, heldout)
        test = dataclasses.replace(found.test, images=found.test.images[0:100], labels=found.test.labels[:100])
        return dataclasses.replace(found, test=test)

    patch.setattr(finetune, "parts", few)


def test_the_recipes_are_those_of_table_8() -> None:
    by_size: dict[int, tuple[float, int, float]] = {224: (0.85, 0, 0.0), 384: (0.9, 2, 0.2), 518: (0.9, 2, 0.2)}
    for size, (decay, ops, mixup) in by_size.items():
        recipe = read_yaml(CONF_DIR / "task" / f"finetune_{size}.yaml")
        assert (recipe["layer_decay"], recipe["randaugment_ops"], recipe["mixup"]) == (decay, ops, mixup)
        assert (recipe["image_size"], recipe["global_batch_size"], recipe["steps"]) == (size, 512, 50_000)
        assert (recipe["lr"], recipe["warmup_steps"], recipe["clip_norm"]) == ([0.03], 500, 1.0)
        assert (recipe["loss"], recipe["head_bias"], recipe["heldout"]) == ("sigmoid", -6.9, 0.02)
        assert (recipe["min_area"], recipe["flip"], recipe["randaugment_magnitude"]) == (0.05, True, 10)


def test_every_recipe_of_what_trains_or_renders_composes() -> None:
    for recipe in ("finetune", "finetune_224", "finetune_384", "finetune_518"):
        assert isinstance(tasks.compose([f"task={recipe}"])[1], Config)
    for recipe in ("segment", "cue_conflict"):
        task, cfg = tasks.compose([f"task={recipe}"])
        assert cfg == task.Config()


def test_the_rate_falls_by_one_factor_a_layer_from_the_head_down() -> None:
    model = untrained("shape=16x3x16", "model.pool=map").model.requires_grad_(True)
    scale = {id(p): group["lr_scale"] for group in layer_groups(model, 0.5) for p in group["params"]}
    of = {name: scale[id(parameter)] for name, parameter in model.named_parameters()}
    assert len(of) == len(scale), "a parameter is left out or in two groups"
    assert of["head.weight"] == of["head.bias"] == of["attn_pool.latent"] == 1
    layers = ["patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.1.mlp.fc1.bias", "blocks.2.mlp.fc2.weight"]
    for below, above in zip(layers, [*layers[1:], "head.weight"], strict=True):
        assert of[below] == 0.5 * of[above]
    assert of["pos_embed"] == of["patch_embed.proj.weight"] and of["norm.weight"] == of["blocks.2.mlp.fc2.weight"]
    assert {p["lr_scale"] for p in layer_groups(model, 1.0)} == {1.0}


def test_at_its_own_size_the_model_is_the_same(trained: Trained) -> None:
    images = torch.randn(5, 1, 16, 16)
    for rule in ("bilinear", "bicubic"):
        copy = adapted(trained, image_size=16, num_classes=8, head_bias=-6.9, positions=rule).eval()
        torch.testing.assert_close(features(copy, images), features(trained.model, images), atol=1e-6, rtol=0)  # type: ignore[arg-type]
        assert torch.equal(copy(images), torch.full((5, 8), -6.9)), "the classifier starts at its bias"
        copy.head.load_state_dict(trained.model.head.state_dict())  # type: ignore[union-attr]
        torch.testing.assert_close(copy(images), trained.model(images), atol=1e-6, rtol=0)
    assert resample(trained.model.pos_embed, 2, "bilinear") is trained.model.pos_embed  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [2, 3, 5, 8, 11])
def test_bilinear_positions_are_scipys_zoom(size: int) -> None:
    table = torch.randn(1, 25, 6, generator=torch.Generator().manual_seed(size))
    expected = zoom(table[0].reshape(5, 5, 6).numpy(), (size / 5, size / 5, 1), order=1).reshape(1, size * size, 6)
    np.testing.assert_allclose(resample(table, size, "bilinear").numpy(), expected, atol=1e-6)


def test_a_larger_image_keeps_every_other_weight(trained: Trained) -> None:
    large = adapted(trained, image_size=40, num_classes=3)
    state = large.state_dict()
    for name, tensor in trained.weights.tensors.items():
        assert name in ("pos_embed", "head.weight", "head.bias") or torch.equal(state[name], tensor), name
    assert large(torch.randn(2, 1, 40, 40)).shape == (2, 3)


@pytest.mark.parametrize(("size", "near"), [(20, 16), (21, 24), (3, 8), (100, 96)])
def test_a_size_that_the_patch_does_not_divide_names_the_nearest(trained: Trained, size: int, near: int) -> None:
    with pytest.raises(ConfigError, match=rf"task.image_size={size} .* 8 pixels; .* that is: {near}\.$"):
        check(dataclasses.replace(TINY, image_size=size), trained)
    check_size(trained, near)


def test_what_a_model_was_trained_by_does_not_matter() -> None:
    """A masked model's head tells pixels; it is replaced like any other."""
    masked = untrained("optim.loss=masked", "model.pool=avg")
    assert masked.model(torch.zeros(1, 1, 16, 16)).shape == (1, 64)
    check_size(masked, 24)
    assert adapted(masked, image_size=24, num_classes=3)(torch.zeros(1, 1, 24, 24)).shape == (1, 3)


def test_a_model_that_cannot_change_its_size_is_refused_one() -> None:
    mixer = untrained("model=mixer_tiny", "shape=16x2x8x16")
    check_size(mixer, 16)
    assert adapted(mixer, image_size=16, num_classes=3)(torch.zeros(1, 1, 16, 16)).shape == (1, 3)
    with pytest.raises(ConfigError, match=r"task.image_size=32: at another size than 16 pixels more .* give 16"):
        check_size(mixer, 32)


def test_the_loop_is_sgd_with_momentum_clipping_and_cosine(tmp_path: Path) -> None:
    """Against the update written out: v = 0.9 v + clipped gradient, w -= rate v."""
    target = torch.tensor([3.0, -2.0])
    model = torch.nn.Linear(2, 1, bias=False, dtype=torch.float64)
    torch.nn.init.zeros_(model.weight)
    recipe = Recipe(lr=0.3, steps=7, warmup_steps=2, clip_norm=1.0)
    groups = [{"params": list(model.parameters()), "lr_scale": 0.5}]

    def losses(k: int) -> Any:
        for part in (0.25, 0.75):  # two micro-batches
            yield part * (k + 1) * (model.weight[0] - target).square().sum()

    train(model, groups, recipe, lambda k: iter(range(k, 7)), losses, ResumeFile(tmp_path / "none", 1e9), "x")
    w, v = np.zeros(2), np.zeros(2)
    for k in range(7):
        gradient = 2 * (k + 1) * (w - target.numpy())
        gradient *= min(1.0, 1 / np.linalg.norm(gradient))
        v = 0.9 * v + gradient
        w -= 0.15 * min(1, k / 2) * 0.5 * (1 + math.cos(math.pi * max(0, k - 2) / 5)) * v
    np.testing.assert_allclose(model.weight[0].detach().numpy(), w, rtol=1e-5)


@pytest.mark.parametrize("step", [1, 5, 8])
def test_killed_at_any_step_it_ends_with_the_same_numbers(
    step: int, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_test_part(monkeypatch)
    whole = run(trained, TINY, tmp_path / "whole")
    eager = dataclasses.replace(TINY, checkpoint_every_s=0)
    calls = iter(range(1, 100))
    finish = finetune.finish

    def dying(*arguments: Any) -> Any:
        if next(calls) > step:
            raise Killed
        return finish(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "finish", dying)
        with pytest.raises(Killed):
            run(trained, eager, tmp_path / "cut")
    begun: list[int] = []

    def counting(*arguments: Any) -> Any:
        begun.append(1)
        return finish(*arguments)

    monkeypatch.setattr(finetune, "finish", counting)
    assert run(trained, eager, tmp_path / "cut") == whole
    assert len(begun) == 12 - step, "steps were made twice"
    json.dumps(whole, allow_nan=False)


def test_a_damaged_resume_file_is_named_and_begun_again(
    trained: Trained, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small_test_part(monkeypatch)
    once = dataclasses.replace(TINY, lr=[0.1], steps=3)
    (tmp_path / "resume.ckpt").write_bytes(b"half a file")
    assert run(trained, once, tmp_path) == run(trained, once, tmp_path / "new")
    assert "Starting anew" in capfd.readouterr().err


def test_the_test_part_chooses_nothing(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_test_part(monkeypatch)
    one = run(trained, TINY, tmp_path / "one")
    few = finetune.parts

    def no_class(*arguments: Any) -> training_images.Parts:
        found = few(*arguments)
        return dataclasses.replace(found, test=dataclasses.replace(found.test, labels=found.test.labels * 0 + 10))

    monkeypatch.setattr(finetune, "parts", no_class)
    other = run(trained, TINY, tmp_path / "other")
    assert (one["lr"], one["trials"]) == (other["lr"], other["trials"])
    assert one["error"]["value"] < other["error"]["value"] == 1
    assert one["lr"] == min(one["trials"], key=lambda trial: trial["heldout"]["value"])["lr"]


def test_held_out_images_are_not_trained_on(trained: Trained, tmp_path: Path) -> None:
    generate(tmp_path / "data", classes=2, images=10, test_images=3, size=24)
    for data, num in (("digits", 600), (str(tmp_path / "data"), 20)):
        found = training_images.parts(data, trained.cfg, 0.2)
        assert (len(found.train), len(found.heldout)) == (0.8 * num, 0.2 * num)
        kept = [found.train.read(k) for k in range(len(found.train))]
        every = training_images.parts(data, trained.cfg, 0.0).train
        assert set(kept) < {every.read(k) for k in range(len(every))}
        counts = np.bincount(every.labels) - np.bincount(found.train.labels)
        assert (counts == np.bincount(found.heldout.labels, minlength=len(counts))).all()


def test_an_embedded_image_survives_its_way_through_a_file(trained: Trained) -> None:
    found = training_images.parts("digits", trained.cfg, 0.1)
    from sovit.data.decode import opened, pixels

    image = np.asarray(pixels(*opened(found.train.read(3)), 1))
    grey = (found.heldout.images[0:1] + 1) * 127.5
    assert image.shape == grey.shape[2:] and image.std() > 10


def test_errors_are_counted_over_all_images(trained: Trained) -> None:
    part = training_images.parts("digits", trained.cfg, 0.0).test
    model = adapted(trained, image_size=16, num_classes=10).eval()
    torch.nn.init.normal_(model.head.weight)  # type: ignore[union-attr, arg-type]
    wrong = sum(int(model(part.images[k : k + 1]).argmax()) != label for k, label in enumerate(part.labels[:50]))
    assert errors(model, dataclasses.replace(part, images=part.images[0:50], labels=part.labels[:50])) == wrong
    assert wilson(0, 10)[0] == 0 and wilson(5, 10)[0] == pytest.approx(
        0.2366, abs=1e-4
    )  # Newcombe 1998: 0.2366, 0.7634


def test_a_folder_with_damaged_files_is_trained_on_at_another_size(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trained = untrained("model.channels=3")
    data = tmp_path / "pictures"
    generate(data, classes=2, images=12, test_images=4, size=24, damage=True)
    cfg = dataclasses.replace(
        TINY,
        data=str(data),
        image_size=24,
        steps=4,
        lr=[0.03],
        loss="softmax",
        mixup=0.0,
        micro_batch=3,
        start="random",
    )
    check(cfg, trained)
    result = run(trained, cfg, tmp_path / "work")
    assert (result["image_size"], result["num_classes"], result["error"]["num"]) == (24, 2, 8)
    assert any("truncated.jpg" in name for name in result["unusable"])
    assert any("files could not be used" in line for line in text(result))
    capfd.readouterr()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": [0.1, 0.1]}, "different positive"),
        ({"lr": [0.1, 0.3], "heldout": 0.0}, "nothing to choose among"),
        ({"heldout": 0.0001}, "holds out 0 of 600"),
        ({"loss": "sigmod"}, "did you mean 'sigmoid'"),
        ({"data": "digit"}, "did you mean 'digits'"),
        ({"data": "???"}, "task.data has no value"),
        ({"data": "./nowhere"}, "task.data: .*nowhere is no folder"),
        ({"warmup_steps": 6}, "leaves nothing of task.steps=6"),
        ({"layer_decay": 1.5}, "at most 1"),
        ({"global_batch_size": 7}, "is odd"),
        ({"image_size": 264, "data": "fractals"}, "up to 256"),
    ],
)
def test_bad_input_is_one_sentence(changes: dict[str, Any], message: str, trained: Trained, tmp_path: Path) -> None:
    cfg = dataclasses.replace(TINY, **changes)
    with pytest.raises(ConfigError, match=message):
        check(cfg, trained)
        finetune.depends(trained, cfg)
        run(trained, cfg, tmp_path)


def test_a_rate_that_diverges_is_passed_over_or_refused(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_test_part(monkeypatch)
    wild = dataclasses.replace(TINY, lr=[1e30, 0.1], clip_norm=None, loss="softmax")
    result = run(trained, wild, tmp_path / "one")
    assert [trial["diverged"] for trial in result["trials"]] == [True, False] and result["lr"] == 0.1
    with pytest.raises(ConfigError, match="diverged"):
        run(trained, dataclasses.replace(wild, lr=[1e30]), tmp_path / "two")
