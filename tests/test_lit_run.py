"""A text tower as a run: what it is trained on and judged by, its records, and what is refused."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from sovit import cli, records
from sovit.analysis.points import load_points
from sovit.config import ConfigError, compose
from sovit.data.order import mix
from sovit.derived import eval_steps, shape_of
from sovit.families.text import TextShape
from sovit.flops import forward_gflops
from sovit.language.contrastive import softmax_loss
from sovit.language.pairs import PairStream
from sovit.launch.plan import plan
from sovit.launch.sweep import COMMAND, PROGRAM, load_sweep
from sovit.lit import engine, text_targets, trained
from sovit.lit.fit import build_model, build_module
from sovit.lit.layout import Layout
from sovit.lit.pairs import pairs_of
from sovit.lit.ranks import Ranks
from sovit.models.vit import features
from sovit.schedule import Segment
from text_cells import image_tower, text_overrides

WORDS = ("a dark square", "a grey square", "a bright square", "an almost white square")


@pytest.fixture(autouse=True, scope="module")
def few() -> None:
    """Few images to evaluate on."""
    patch = pytest.MonkeyPatch()
    patch.setattr(text_targets, "NAMED_PER_CLASS", 2)
    patch.setattr(text_targets, "NUM_SCENES", 16)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_tower(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def tower(encoder: Path, tmp_path_factory: pytest.TempPathFactory, few: None) -> Path:
    cfg = compose(
        text_overrides(
            tmp_path_factory.mktemp("tower"), encoder, "trainer.keep_checkpoint=true", "trainer.log_every_n_steps=1"
        )
    )
    assert engine.run(cfg) == engine.OK
    return records.run_dir(cfg)


def test_the_first_loss_is_that_of_all_pairs_by_hand(tower: Path) -> None:
    """-1/B sum_ij log sigmoid(z_ij (t cos_ij + b)), of the images and captions that are pairs."""
    record = records.read_run(tower)
    cfg = compose(text_overrides(tower.parents[1], Path(record["encoder"]["source"])))
    torch.manual_seed(cfg.seed)
    model, locked = build_model(cfg), trained.load(tower).locked
    source = pairs_of(cfg)
    stream = PairStream(source, locked.vocabulary, cfg.text.length, int(mix(cfg.data.seed, cfg.seed)))
    batch = stream.__getitems__(range(16))
    rows = batch.rows.tolist()
    said = [source.captions(row)[choice] for row, choice in zip(rows, batch.choices.tolist(), strict=True)]
    tokens, _ = locked.vocabulary.batch(said, cfg.text.length)
    with torch.no_grad():
        x = features(locked.encoder.model, source.images(rows)).double().numpy()
        y = model(tokens).double().numpy()
    cosines = (x / np.linalg.norm(x, axis=1)[:, None]) @ (y / np.linalg.norm(y, axis=1)[:, None]).T
    z = 2 * np.eye(16) - 1
    loss = np.log1p(np.exp(-z * (10 * cosines - 10))).sum() / 16
    first = records.read_lines(tower / records.METRICS)[0]
    assert first["train/loss"] == pytest.approx(loss, rel=1e-5)


def test_rows_and_records_say_what_was_measured_and_against_what(tower: Path, encoder: Path) -> None:
    rows, run = records.read_lines(tower / records.EVALS), records.read_run(tower)
    names = ["scenes", *(f"scenes_{way}_at{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10))]
    assert [row["dataset"] for row in rows] == names * 4
    assert [row["step"] for row in rows[:: len(names)]] == [0, 8, 16, 24]
    assert all(0 <= row["error"] <= 1 and row["stderr"] > 0 and row["shots"] == 0 for row in rows)
    chance = {name: found["chance"] for name, found in run["baselines"].items()}
    assert chance["scenes"] == 1 - 1 / 16
    assert chance["scenes_text_to_image_at5"] == pytest.approx(1 - 5 / 16)
    # of 80 captions five are an image's own: none of ten drawn without replacement is
    assert chance["scenes_image_to_text_at10"] == pytest.approx(math.comb(75, 10) / math.comb(80, 10))
    assert run["encoder"]["run_id"] == encoder.name and run["encoder"]["embed_dim"] == 16
    found = trained.load(tower)
    assert run["vocabulary"] == {"size": found.locked.vocabulary.size, "sha256": found.locked.vocabulary.identity}
    assert run["num_params"] == sum(parameter.numel() for parameter in found.model.parameters())
    assert records.parse_run_id(tower.name) == ("run", TextShape(16, 1, 16, 4, 12), "", 0)
    points, _ = load_points(tower.parent, "scenes", 0)
    assert {point.family for point in points} == {"text"} and len(points) == 3


def test_the_last_row_is_what_the_saved_average_makes_of_the_images(tower: Path) -> None:
    """Recomputed without the evaluator: mean of normalised prompts, cosines, the class that is closest."""
    found = trained.load(tower)
    target = text_targets.named_scenes(found.cfg)
    with torch.no_grad():
        images = features(found.locked.encoder.model, target.images).double()
        classes = []
        for name in target.classes:
            tokens, _ = found.locked.vocabulary.batch([text.replace("{}", name) for text in target.templates], 12)
            each = found.model(tokens).double()
            classes.append((each / each.norm(dim=1, keepdim=True)).mean(0))
    cosines = F.normalize(images, dim=1) @ F.normalize(torch.stack(classes), dim=1).T
    wrong = (cosines.argmax(1) != target.labels).double().mean()
    row = [row for row in records.read_lines(tower / records.EVALS) if row["dataset"] == "scenes"][-1]
    assert row["weights"] == "ema" and row["error"] == pytest.approx(float(wrong), abs=1e-9)


@pytest.mark.parametrize("pool", ["last", "map"])
def test_compute_is_what_torch_counts_but_for_the_projection(pool: str, encoder: Path, tmp_path: Path) -> None:
    cfg = compose(text_overrides(tmp_path, encoder, f"text.pool={pool}", "shape=24x2x40"))
    model = build_model(cfg).requires_grad_(False)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # the counter does not see it on a CPU
    counter = FlopCounterMode(display=False)
    with counter:
        model(torch.ones(3, 12, dtype=torch.int64))
    gflops = forward_gflops(shape_of(cfg), 16, channels=1, pool=pool)
    assert counter.get_total_flops() / 3 == pytest.approx(1e9 * gflops + 2 * 24 * 16)


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_micro_batches_change_no_gradient(loss: str, encoder: Path, tmp_path: Path) -> None:
    """A batch is one contrast: parts of it taken by themselves would have fewer negatives."""
    cfg = compose(text_overrides(tmp_path, encoder, f"optim.loss={loss}", "trainer.precision=64-true"))
    tokens = torch.randint(3, 200, (16, 12), generator=torch.Generator().manual_seed(0))
    images = torch.rand(16, 1, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    found = []
    for size in (16, 4):
        torch.manual_seed(0)
        module = build_module(cfg, Segment("trunk", 0, 1, 1, 0, ()), Layout(size, 16 // size, "none", False), Ranks())
        value = module.gradients(images, tokens, 0, None)
        found.append((value, {name: p.grad for name, p in module.model.named_parameters()}))
    (one, mine), (other, theirs) = found
    torch.testing.assert_close(other, one, rtol=1e-12, atol=0)
    for name in mine:
        torch.testing.assert_close(theirs[name], mine[name], rtol=1e-10, atol=1e-13, msg=name)
    if loss == "softmax":
        assert "bias" not in mine
        with torch.no_grad():
            texts = F.normalize(module.model(tokens), dim=1)
            own = softmax_loss(module.locked.images(images), texts, module.model.log_scale)
        torch.testing.assert_close(own, one)


REFUSED = {
    "no encoder": (["text.encoder=null"], "text.encoder has no value"),
    "images without texts": (["data=fractals"], "data=fractals has no texts"),
    "texts for a model of images": (["model=tiny"], "no effect on model.family=tiny|no effect on model.family=vit"),
    "another loss": (["optim.loss=masked"], "optim.loss=masked is for images"),
    "two results of one name": (
        ["eval.datasets=[scenes,./scenes.json]"],
        "two results would be called scenes_image_to",
    ),
    "a name that means a decoder": (["eval.datasets=[./multitask/]"], "would be called as the results of metric=multi"),
    "pooling of another library's tower": (["text.tower=any", "text.pool=map"], "text.pool=map has no effect"),
    "a typo": (["text.lenght=3"], "did you mean 'text.length'"),
    "a bias without a use": (["optim.loss=softmax", "text.init_bias=-5"], "no effect on optim.loss=softmax"),
    "few-shot sets": (["eval.datasets=[fractals]"], "'fractals' is not known"),
    "a metric of images": (["metric=multitask"], "metric=multitask judges the tokens of images"),
    "pooling of images": (["model.pool=avg"], "model.pool=avg has no effect on model.family=text"),
    "shots": (["eval.shots=[1,5]"], r"eval.shots=\[1, 5\] has no effect on model.family=text"),
    "draws": (["eval.num_draws=7"], "eval.num_draws=7 has no effect on model.family=text"),
    "augmentation": (["data.flip=false"], "data.flip=False has no effect on data=scenes"),
    "a locked tower that is drawn": (["text.locked=true"], "text.locked=true would keep a tower as it was drawn"),
    "no room": (["text.length=1"], "text.length=1 leaves no token"),
    "another size": (["model.image_size=32"], "model.image_size=16, this run 32; write model.image_size=16"),
    "a vocabulary that is not there": (["text.vocabulary=nowhere.json"], "nowhere.json cannot be read"),
    "a tower that is not there": (["text.tower=nowhere", "optim.lr_rule=constant"], "nowhere"),
}


@pytest.mark.parametrize("label", REFUSED)
def test_what_cannot_be_is_refused_in_a_sentence(label: str, encoder: Path, tmp_path: Path) -> None:
    given, sentence = REFUSED[label]
    every = [
        text for text in text_overrides(tmp_path, encoder) if text.split("=")[0] not in {g.split("=")[0] for g in given}
    ]
    with pytest.raises(ConfigError, match=sentence) as raised:
        engine.run(compose([*every, *given]))
    assert str(raised.value).count(". ") == 0 and "\n" not in str(raised.value)


def test_runs_recorded_before_texts_keep_their_hash_and_each_setting_changes_it(encoder: Path, tmp_path: Path) -> None:
    assert records.config_hash(compose([])) == "412264f7f3a9d38a"  # of the default, before there was a group of texts
    cfg = compose(text_overrides(tmp_path, encoder))
    changed = {"length": 9, "pool": "avg", "vocabulary": "v", "encoder": "e", "init_bias": -9.0, "templates": "t"}
    hashes = {records.config_hash(cfg)} | {
        records.config_hash(dataclasses.replace(cfg, text=dataclasses.replace(cfg.text, **{key: value})))
        for key, value in changed.items()
    }
    assert len(hashes) == 1 + len(changed)
    younger = json.loads(json.dumps(dataclasses.asdict(compose([]))))
    del younger["text"]
    assert records.with_younger(younger)["text"] == dataclasses.asdict(compose([]))["text"]


def test_other_uses_of_a_model_refuse_a_text_tower(tower: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for command in (
        ["eval", str(tower), "task=fewshot"],
        ["export", str(tower), str(tmp_path / "x")],
        ["bench", str(tower)],
    ):
        assert cli.main(command) == 2
        said = capsys.readouterr().err.strip()
        assert said.count("\n") == 0 and "model.family=text" in said, said


def test_a_sweep_over_widths_is_planned_and_shown(encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    parameters = {"experiment": "lit_tiny", "text.encoder": str(encoder), "runs_dir": str(tmp_path / "runs")}
    fixed = {key: {"value": value} for key, value in parameters.items()}
    sweep = {"program": PROGRAM, "command": COMMAND, "method": "grid",
             "parameters": fixed | {"shape": {"values": ["16x1x16", "24x1x16"]}},
             "metric": {"name": "eval/scenes_0shot/error", "goal": "minimize"}}  # fmt: skip
    path = tmp_path / "towers.yaml"
    path.write_text(json.dumps(sweep))
    cells = plan(load_sweep(path)).cells
    assert [cell.shape.width for cell in cells] == [16, 24]
    length, batch = cells[0].config.text.length, cells[0].config.trainer.global_batch_size
    assert cells[0].images == batch * max(eval_steps(cells[0].config))
    gflops = length * (8 * 16**2 + 4 * length * 16 + 4 * 16 * 16) / 1e9
    assert cells[0].forward_gflops == pytest.approx(gflops)
    assert cli.main(["plan", str(path), "--no-measure"]) == 0
    assert cli.main(["status", str(path)]) == 0
    assert "w0024-d01-m0016-h04-l040" in capsys.readouterr().out


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve grey squares of four kinds in COCO's layout, one caption of a picture that is not there, and by class."""
    folder = tmp_path_factory.mktemp("pictures")
    images, captions = [{"id": 99, "file_name": "gone.png"}], [{"id": 99, "image_id": 99, "caption": "gone"}]
    for k in range(12):
        image = Image.fromarray(np.full((20, 20, 3), 20 + 70 * (k % 4), np.uint8))
        image.save(folder / f"{k}.png")
        (folder / "classes" / WORDS[k % 4]).mkdir(parents=True, exist_ok=True)
        image.save(folder / "classes" / WORDS[k % 4] / f"{k}.png")
        images.append({"id": k, "file_name": f"{k}.png"})
        captions.append(
            {"id": k, "image_id": k, "caption": f"{WORDS[k % 4]}, the {k}th of so many that no tower reads on"}
        )
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    return folder


def test_pictures_of_ones_own_train_and_judge_a_tower(
    pictures: Path, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """In epochs; what is not there and what was cut is said."""
    given = [text for text in text_overrides(tmp_path, encoder) if not text.startswith(("data", "durations", "eval.d"))]
    own = [
        *("data=coco", f"data.root={pictures}", f"data.captions={pictures / 'captions.json'}", "data.num_workers=0"),
        *("durations.values=[2 epochs,50 examples]", "trainer.global_batch_size=4", "data.num_examples=12"),
        *("durations.first=null", "durations.last=null", "durations.num=null", "schedule.warmup_steps=1"),
        f"eval.datasets=[{pictures / 'classes'},{pictures / 'captions.json'}]",
    ]
    given = [text for text in given if text.split("=")[0] not in {other.split("=")[0] for other in own}]
    cfg = compose([*given, *own])
    assert list(eval_steps(cfg)) == [6, 12]
    assert engine.run(cfg) == engine.OK
    rows = records.read_lines(records.run_dir(cfg) / records.EVALS)
    assert {row["dataset"] for row in rows} == {
        "classes",
        *(f"captions_{way}_at{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)),
    }
    said = capsys.readouterr()
    assert "gone.png" in said.out + said.err
    assert "48 of 48 captions had more than text.length=12 tokens and were cut" in said.out
    with pytest.raises(ConfigError, match=r"data\.num_examples=13, but .* holds 12 images with captions"):
        engine.run(
            compose([*given, *(text.replace("num_examples=12", "num_examples=13") for text in own), "name=other"])
        )


def test_an_epoch_needs_a_number_of_pairs(encoder: Path, tmp_path: Path) -> None:
    given = text_overrides(tmp_path, encoder, "durations.values=[2 epochs]")
    assert list(eval_steps(compose(given))) == [5]  # of 40 scenes in batches of 16
    with pytest.raises(ConfigError, match=r"2 epochs needs data\.num_examples"):
        compose(["durations.values=[2 epochs]", "durations.first=null", "durations.last=null", "durations.num=null"])
