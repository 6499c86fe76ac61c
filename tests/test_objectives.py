"""Objectives without labels: each is what it says, and a run with one resumes and spreads as any other does."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from rank_cells import run_ranks
from small_cells import content, small, stop_at
from sovit import records
from sovit.config import ConfigError, compose
from sovit.lit import engine, trained
from sovit.lit.teacher import weights_hash
from sovit.models.vit import build_vit, features
from sovit.objectives import Distilled, Masked, distillation_loss, hidden_patches
from sovit.shape import Shape
from test_parallel import CELL, DDP, DURATIONS, FSDP, assert_same_run


def vit(**options: Any) -> torch.nn.Module:
    """12 x 12 pixels in three colours, nine patches; a head that is not zero."""
    torch.manual_seed(0)
    model = build_vit(Shape(8, 2, 12, 2, 4), image_size=12, num_classes=48, pool="avg", **options).double()
    torch.nn.init.normal_(model.head.weight)
    return model


IMAGES = torch.randn(5, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", [{}, {"block": "parallel", "qk_norm": True, "norm": "rmsnorm"}])
def test_the_masked_loss_is_that_of_a_loop_over_images_and_patches(options: dict[str, Any]) -> None:
    model = vit(**options).requires_grad_(False)
    found = Masked(seed=3, num_hidden=4, patch_size=4)(model, IMAGES, 100)
    squares, count = 0.0, 0
    for number, image in enumerate(IMAGES):
        [hidden] = hidden_patches(3, 100 + number, 1, 9, 4).tolist()
        seen = image.clone()
        for patch in hidden:
            row, column = divmod(patch, 3)
            seen[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 0.0
        [tokens] = model.forward_features(seen[None])
        for patch in hidden:
            row, column = divmod(patch, 3)
            pixels = image[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].reshape(-1)
            wanted = (pixels - pixels.mean()) / math.sqrt(pixels.var() + 1e-6)
            guess = model.head.weight @ tokens[patch] + model.head.bias
            assert guess.shape == (48,)
            squares += float(((guess - wanted) ** 2).sum())
            count += len(pixels)
    assert float(found) == pytest.approx(squares / count, rel=1e-12)


def test_hidden_pixels_are_not_seen() -> None:
    """Brightness and contrast of a hidden patch, which its normed target does not have, change nothing; those of a patch
    that is seen do."""
    objective, model = Masked(seed=3, num_hidden=4, patch_size=4), vit().requires_grad_(False)
    hidden = hidden_patches(3, 0, 5, 9, 4)
    before = float(objective(model, IMAGES, 0))
    for patch in range(9):
        changed, row, column = IMAGES.clone(), patch // 3, patch % 3
        changed[0, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].mul_(3.0).add_(1.0)
        same = abs(float(objective(model, changed, 0)) - before) < 1e-5
        assert same == (patch in hidden[0].tolist()), patch


def test_masks_are_a_function_of_seed_and_image_alone() -> None:
    """Else a resumed run, or one of more processes, would hide other patches."""
    whole = hidden_patches(7, 1000, 600, 16, 5)
    assert torch.equal(torch.cat([hidden_patches(7, 1000 + n, 50, 16, 5) for n in range(0, 600, 50)]), whole)
    assert all(len(set(row)) == 5 for row in whole.tolist())
    counts = torch.bincount(whole.flatten(), minlength=16)  # 187.5 each, standard deviation 11
    assert (counts - 187.5).abs().max() < 45
    assert not torch.equal(hidden_patches(8, 1000, 600, 16, 5), whole)
    assert len({tuple(row) for row in whole.tolist()}) > 400


def test_distillation_is_cross_entropy_where_the_teacher_is_sure() -> None:
    logits = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 4, 2, 2, 1, 3])
    sure = 1e3 * F.one_hot(labels, 5).double()
    torch.testing.assert_close(distillation_loss(logits, sure, 1.0), F.cross_entropy(logits, labels))


def test_distillation_is_the_divergence_by_hand() -> None:
    """(3/4, 1/4) against (1/2, 1/2): 3/4 log 3/2 + 1/4 log 1/2. Twice the logits at twice the temperature are the same
    probabilities, four times the loss."""
    teacher, student = torch.tensor([[math.log(3.0), 0.0]] * 2), torch.zeros(2, 2)
    by_hand = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert float(distillation_loss(student, teacher, 1.0)) == pytest.approx(by_hand, rel=1e-5)
    assert float(distillation_loss(2 * student, 2 * teacher, 2.0)) == pytest.approx(4 * by_hand, rel=1e-5)
    assert float(distillation_loss(student, teacher, 1.0)) != pytest.approx(
        float(distillation_loss(teacher, student, 1.0)), rel=1e-2
    )


def test_a_teacher_gets_no_gradient_and_no_place_in_the_state() -> None:
    from sovit.lit.module import LitClassifier

    objective = Distilled(vit(), 1.0, "abc")
    module = LitClassifier(
        vit(), loss=None, objective=objective, optimizer=torch.optim.AdamW, lr_scale=float, clip_norm=None
    )
    assert not any("teacher" in name for name in module.state_dict())
    module.loss_of(IMAGES + 0.1, torch.zeros(5)).backward()
    assert all(parameter.grad is None for parameter in objective.teacher.parameters())


MASKED = "optim.loss=masked"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 24 steps that keeps its last resume point."""
    cfg = small(tmp_path_factory.mktemp("teacher"), "trainer.keep_checkpoint=true", "optim.lr=1e-2")
    assert engine.run(cfg) == engine.OK
    return records.run_dir(cfg)


def given(objective: str, teacher: Path) -> tuple[str, ...]:
    return (MASKED,) if objective == "masked" else ("optim.loss=distilled", f"optim.teacher={teacher}")


@pytest.mark.parametrize("objective", ["masked", "distilled"])
def test_a_stopped_run_ends_as_an_undisturbed_one(objective: str, teacher: Path, tmp_path: Path) -> None:
    whole, halves = (small(tmp_path / name, *given(objective, teacher)) for name in ("whole", "halves"))
    assert engine.run(whole) == engine.OK
    with stop_at(11):
        assert engine.run(halves) == engine.STOPPED
    assert engine.run(halves) == engine.OK
    assert content(halves) == content(whole)
    losses = [row["train/loss"] for row in records.read_lines(records.run_dir(whole) / records.METRICS)]
    assert objective == "distilled" or losses[-1] < losses[0]  # so young a teacher has little to tell


def test_a_masked_run_can_be_loaded_and_costs_what_a_supervised_one_does(tmp_path: Path, teacher: Path) -> None:
    """Compute t is the encoder's, so that equal t means equal steps whatever the objective."""
    cfg = small(tmp_path, MASKED, "trainer.keep_checkpoint=true", "optim.mask_ratio=0.75")
    assert engine.run(cfg) == engine.OK
    found = trained.load(records.run_dir(cfg))
    assert found.model.head.out_features == 8 * 8  # pixels of a patch, not the 8 classes
    assert features(found.model, torch.zeros(2, 1, 16, 16)).shape == (2, 16)
    compute = [[row["t_gflops"] for row in records.read_lines(path / records.EVALS)]
               for path in (records.run_dir(cfg), teacher)]  # fmt: skip
    assert compute[0] == compute[1]


def test_a_run_does_not_go_on_with_another_teacher(teacher: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """The weights are a part of the run, wherever the file that holds them lies."""
    place = tmp_path / "teacher"
    place.symlink_to(teacher)
    cfg = small(tmp_path, "optim.loss=distilled", f"optim.teacher={place}")
    with stop_at(11):
        assert engine.run(cfg) == engine.STOPPED
    other = small(tmp_path / "other", "trainer.keep_checkpoint=true", "seed=1", "durations.values=[2 steps]")
    assert engine.run(other) == engine.OK
    place.unlink()
    place.symlink_to(records.run_dir(other))
    try:
        assert engine.run(cfg) == engine.ERROR
    except ConfigError as error:  # if the engine looks before it trains
        said = str(error)
    else:
        said = (records.read_run(records.run_dir(cfg)) or {})["reason"]
    assert "optim.teacher" in said and "other weights" in said


def test_a_teacher_is_its_weights_not_its_file() -> None:
    first, second = vit().state_dict(), vit().state_dict()
    assert weights_hash(dict(reversed(first.items()))) == weights_hash(second)
    second["head.bias"][0] += 1e-9
    assert weights_hash(first) != weights_hash(second)


REFUSED = {
    "distilled without a teacher": (["optim.loss=distilled"], "optim.teacher has no value"),
    "a teacher without distillation": (["optim.teacher=x"], "no effect on optim.loss=softmax"),
    "a temperature without distillation": (["optim.temperature=2"], "no effect on optim.loss=softmax"),
    "a mask without masking": (["optim.mask_ratio=0.6"], "no effect on optim.loss=softmax"),
    "everything hidden": ([MASKED, "optim.mask_ratio=0.9"], "of 4 patches hides none or all"),
    "nothing hidden": ([MASKED, "optim.mask_ratio=0.1"], "of 4 patches hides none or all"),
    "a head nobody trains": ([MASKED, "model.pool=map"], "write model.pool=avg"),
    "mixed labels nobody reads": ([MASKED, "data=imagefolder", "data.root=x", "data.num_classes=4", "data.mixup=0.2",
                                   "model.channels=3"], "mixes labels"),
    "an unknown loss": (["optim.loss=maskd"], "masked"),
}  # fmt: skip


@pytest.mark.parametrize("label", REFUSED)
def test_an_objective_without_meaning_is_refused_in_a_sentence(label: str) -> None:
    overrides, wanted = REFUSED[label]
    with pytest.raises(ConfigError, match=wanted):
        compose(overrides)


UNFIT = {
    "other classes": (["data.num_classes=9"], "data.num_classes=8, this run 9"),
    "other images": (["model.image_size=24"], "model.image_size=16, this run 24"),
}


@pytest.mark.parametrize("label", UNFIT)
def test_a_teacher_that_does_not_fit_is_refused_in_a_sentence(label: str, teacher: Path, tmp_path: Path) -> None:
    from sovit.lit.teacher import teacher_of

    overrides, wanted = UNFIT[label]
    with pytest.raises(ConfigError, match=wanted):
        teacher_of(small(tmp_path, *given("distilled", teacher), *overrides))


def test_runs_recorded_before_these_objectives_keep_their_hash_and_each_setting_changes_it() -> None:
    cfg = compose([])
    assert records.config_hash(cfg) == "412264f7f3a9d38a"  # before there was any but softmax and sigmoid
    changed = [{"loss": "masked"}, {"loss": "masked", "mask_ratio": 0.75}, {"loss": "distilled", "teacher": "a"},
               {"loss": "distilled", "teacher": "b"}, {"loss": "distilled", "teacher": "a", "temperature": 2.0}]  # fmt: skip
    hashes = {
        records.config_hash(dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, **values)))
        for values in changed
    }
    assert len(hashes) == 5


@pytest.mark.parametrize("objective", ["masked", "distilled"])
def test_a_run_over_several_processes_is_that_of_one(objective: str, tmp_path: Path) -> None:
    """Begun by shards, stopped in the middle, ended by copies with micro-batches; in float64 to 1e-12."""

    def run(name: str, *more: str, world: int = 1, **options: Any) -> tuple[list[int], Path]:
        overrides = [*CELL, DURATIONS, f"runs_dir={tmp_path / name}", *more]
        codes = run_ranks(overrides, world, tmp_path / f"{name}.log", **options)
        return codes, next((tmp_path / name / "t").glob("t-*"))

    mine = given(objective, run("teacher", "seed=1")[1] if objective == "distilled" else tmp_path)
    codes, alone = run("alone", *mine)
    assert codes == [0]
    assert run("spread", *mine, *FSDP, world=2, stop_after=3)[0] == [75, 75], (tmp_path / "spread.log").read_text()
    codes, spread = run("spread", *mine, *DDP, "parallel.micro_batch=4", world=2)
    assert codes == [0, 0], (tmp_path / "spread.log").read_text()
    assert_same_run(spread, alone)
