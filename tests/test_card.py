"""A shape card says what the run's files say, with its uncertainty, and shows foreign text as text."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from PIL import Image

from made_run import RESULT, STEP, add_result, make_run
from sovit import records
from sovit.cli import main
from sovit.config import ConfigError, compose
from sovit.lit import trained
from sovit.lit.data import data_fingerprint
from sovit.ship import card, readme
from sovit.ship.export import About, export

TINY = (
    "name=t", "logger=none", "shape=16x2x40", "model.num_heads=2", "model.patch_size=8", "model.image_size=16",
    "data.num_classes=6",
)  # fmt: skip
ARM = {"s": {"estimate": 0.38, "lo": 0.26, "hi": 0.55}, "identified": True, "why": None, "cutoff_range": [0.29, 0.44]}
STAR = {
    "schema": 1, "kind": "star", "sweep": "star_tiny", "metric": {"dataset": "fractals", "shots": 10}, "level": 0.95,
    "points": [], "warnings": ["structure is left in the residuals"],
    "arms": {
        "width": ARM, "depth": ARM | {"s": {"estimate": 0.45, "lo": 0.0, "hi": None}},
        "mlp_dim": ARM | {"s": None, "identified": False, "why": "the minimum is at the edge"},
    },
}  # fmt: skip
GROWTH = {"estimate": 0.22, "lo": 0.2, "hi": 0.24, "source": "star_tiny", "split": 1 / 3, "growth": 0.073}
PREDICTION: dict[str, Any] = {
    "schema": 1, "kind": "prediction", "rule": "paper", "t_gflops": 2560.0, "budget": "--compute 2560", "origin": None,
    "exponents": {"width": GROWTH, "depth": GROWTH, "mlp_dim": GROWTH}, "step": None,
    "optimum": {"width": 17.0, "depth": 2.2, "mlp_dim": 39.0},
    "region": {"level": 0.95, "box": {name: {"lo": 9.0, "hi": None} for name in ("width", "depth", "mlp_dim")}, "open": []},
    "extrapolation": {"factor": 10.0, "largest_t_gflops": 256.0, "fit": "star_tiny"}, "held_out": [],
    "geometry": {}, "regret_by": "by the star's laws", "notes": ["an extrapolation"],
    "candidates": [
        {"width": 16, "depth": 3, "mlp_dim": 40, "label": "first", "regret": 0.001},
        {"width": 16, "depth": 2, "mlp_dim": 40, "label": "second", "regret": 0.002},
    ],
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "runs", *TINY)[0]


def made(run: Path, **options: Any) -> dict[str, Any]:
    """A card, through the JSON it is written as."""
    return json.loads(json.dumps(card.make(trained.load(run), **options), allow_nan=False))


def page(found: dict[str, Any]) -> str:
    return readme.text(found, library="timm", task="image-classification", code=["model"], notes=[], checked="Loaded.")


def text_of(markdown: str) -> str:
    """What a reader sees, without markup."""
    inline = [token for token in MarkdownIt("commonmark").enable("table").parse(markdown) if token.children]
    return " ".join(child.content for token in inline for child in token.children or [])


def test_compute_is_forward_flops_times_images_and_training_three_of_it(run: Path) -> None:
    """The products of one image counted by torch, which knows nothing of the closed form."""
    from torch.utils.flop_counter import FlopCounterMode

    from sovit.models.vit import build_vit

    cfg = compose(list(TINY))
    found = made(run)
    with torch.device("meta"):
        model = build_vit(
            trained.load(run).shape, image_size=16, channels=1, num_classes=6, pool="avg", fused_attention=False  # type: ignore[arg-type]
        )  # fmt: skip
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 1, 16, 16))
    images = STEP * cfg.trainer.global_batch_size
    assert found["compute"]["images_seen"] == images
    assert found["compute"]["t_gflops"] == pytest.approx(counter.get_total_flops() * images / 1e9, rel=1e-12)
    assert found["compute"]["train_gflops"] == pytest.approx(3 * found["compute"]["t_gflops"], rel=1e-12)
    assert found["num_params"] == sum(parameter.numel() for parameter in model.parameters())
    row = records.read_lines(run / records.EVALS)[-1]
    assert found["compute"]["t_gflops"] == pytest.approx(row["t_gflops"], rel=1e-12)


def test_few_shot_errors_are_those_of_the_last_evaluation_with_standard_errors(run: Path) -> None:
    found = made(run)["evaluations"]
    five, ten = found["fewshot"]
    errors = np.array([1 / 5, 1 / 5 + 0.01, 1 / 5 + 0.02])
    assert (five["dataset"], five["shots"], ten["shots"]) == ("digits", 5, 10)
    assert five["error"] == pytest.approx(errors.mean())
    assert five["stderr"] == pytest.approx(math.sqrt(errors.var(ddof=1) / 3 + 0.01**2))
    assert (five["chance"], five["pixels"], ten["pixels"]) == (0.9, 0.5, 0.4)
    assert (found["step"], found["weights"], found["note"]) == (STEP, "average", None)
    assert "0.2100 ± 0.0115" in page(made(run))


def test_errors_of_other_weights_are_not_passed_off_as_these(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "runs", *TINY, evaluated=STEP - 20)
    found = json.loads(json.dumps(card.make(trained.load(run, average=False))))
    note = found["evaluations"]["note"]
    assert "after 100 steps, not 120" in note and "of the average weights, not the trained ones" in note
    assert "Measured after 100 steps" in page(found)


def test_results_of_sovit_eval_are_in_the_card_if_they_are_of_these_weights(run: Path, tmp_path: Path) -> None:
    add_result(run, config={"name": "other", "data": f"{tmp_path}/birds"})
    add_result(run, "earlier-00000000", step=STEP - 1)
    add_result(run, "trained-00000000", weights="trained")
    found = made(run)
    [result] = found["evaluations"]["downstream"]
    assert result["result"] == RESULT and result["config"]["data"] == "./birds"
    assert "error: 0.25" in page(found) and "stderr: 0.0125" in page(found)
    export(run, tmp_path / "w.safetensors")
    beside = tmp_path / "w.safetensors.evals"
    beside.mkdir()
    add_result(run, "later-00000000").rename(beside / "later-00000000.json")
    names = [one["file"] for one in made(tmp_path / "w.safetensors")["evaluations"]["downstream"]]
    assert names == ["calibration-00000000.json", "later-00000000.json"]


def test_fits_and_a_prediction_beside_the_run_are_found_and_named(run: Path) -> None:
    (run.parent / "fit.json").write_text(json.dumps(STAR))
    (run.parent / "prediction.json").write_text(json.dumps(PREDICTION))
    found = made(run)
    assert found["choice"]["prediction"]["candidate"] == {"place": 2, "label": "second", "regret": 0.002}
    exponents = found["choice"]["fits"][0]["exponents"]
    assert exponents["width"]["lo"] == 0.26 and not found["choice"]["fits"][0]["named"]
    said = page(found)
    for words in (
        "candidate 2 of 2", "0.22 [0.20, 0.24]", "9.0 to open", "10 times the largest compute", "0.2%", "an extrapolation",
        "0.38 [0.26, 0.55]", "0.45 [open, open]", "not identified: the minimum is at the edge",
        "which did not choose its shape",
        "structure is left in the residuals",
    ):  # fmt: skip
        assert words in said, words


def test_an_origin_and_a_step_are_said_with_how_sure_they_are(run: Path, tmp_path: Path) -> None:
    about = {"schema": 1, "sweep": "g", "metric": {"dataset": "fractals", "shots": 10}, "points": [], "why": None}
    origin = {"width": 32, "depth": 2, "mlp_dim": 64, "t0_gflops": 32.0, "share": 0.3685}
    step = {"estimate": 0.53, "lo": 0.4, "hi": 0.7}
    fits = {
        "grid": about | {"kind": "grid", "origin": origin, "extend": []},
        "none": about | {"kind": "grid", "origin": None, "extend": [], "why": "too few shapes"},
        "diagonal": about
        | {
            "kind": "diagonal",
            "level": 0.95,
            "direction": {},
            "origin": origin,
            "step": step,
            "num_runs": 7,
            "anchor": {},
        },
    }
    for name, fit in fits.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(fit))
    said = page(made(run, fits=[tmp_path / f"{name}.json" for name in fits]))
    for words in ("32x2x64, best at 32 GFLOPs, elected by 37% of the draws", "too few shapes", "0.53 [0.40, 0.70]"):
        assert words in said, words


def test_the_prediction_of_sovit_optimize_is_found_from_the_runs_of_its_proof(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "runs", *TINY[1:], "name=mine_proof")
    (tmp_path / "runs" / "mine").mkdir()
    (tmp_path / "runs" / "mine" / "prediction.json").write_text(json.dumps(PREDICTION))
    assert made(run)["choice"]["prediction"]["candidate"]["place"] == 2


def test_files_that_are_named_count_instead_and_must_be_sound(run: Path, tmp_path: Path) -> None:
    (run.parent / "fit.json").write_text("{")
    (run.parent / "prediction.json").write_text(json.dumps(PREDICTION))
    assert made(run)["choice"]["fits"] == []
    assert "not used: fit.json is not valid JSON" in page(made(run)).replace("\\", "")
    other = tmp_path / "other.json"
    other.write_text(json.dumps(PREDICTION | {"candidates": PREDICTION["candidates"][:1]}))
    found = made(run, prediction=other)
    assert found["choice"]["prediction"]["candidate"] is None and "none of the candidates" in page(found)
    for option, content, words in (
        ("prediction", None, "does not exist"),
        ("prediction", "{", "is not valid JSON"),
        ("prediction", json.dumps(STAR), "is no prediction"),
        ("fits", None, "does not exist"),
        ("fits", json.dumps(STAR | {"arms": {"width": {}}}), "lacks what sovit fit writes"),
        ("fits", json.dumps({"kind": "recipe"}), "is no fit"),
    ):
        path = tmp_path / "bad.json"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(content)
        with pytest.raises(ConfigError, match=words):
            made(run, **{option: [path] if option == "fits" else path})


HOSTILE = (
    "\n---\nlicense: mit\n---\n<script>alert(1)</script> | <img src=x> [a](http://evil.example) `x` \u202eetad ![i](x) "
    "&lt;b&gt;"
)


def test_foreign_text_stays_text_in_the_card_and_in_its_front_matter(run: Path, tmp_path: Path) -> None:
    """Rendered by a Markdown implementation that lets HTML through, as some sites do."""
    found = made(run, licence=HOSTILE)
    found["classes"] = {"num": 6, "names": [HOSTILE, "```", "| a", "* b", "<b>", "c"], "why": None}
    found["training"] |= {"data": HOSTILE, "fingerprint": HOSTILE}
    found["evaluations"]["fewshot"][0]["dataset"] = HOSTILE
    found["evaluations"]["downstream"] = [
        {
            "task": HOSTILE,
            "config": {HOSTILE: HOSTILE},
            "lines": ["```", "</code></pre><script>", HOSTILE],
            "result": {},
        },
        {"task": "t", "config": {}, "lines": [], "result": {HOSTILE: [1], "<script>": HOSTILE}},
    ]
    found["choice"] = {"prediction": PREDICTION | {"notes": [HOSTILE], "candidate": None, "candidates": 2}, "fits": []}
    front, text = page(found).removeprefix("---\n").split("---\n", 1)
    about = yaml.safe_load(front)
    assert about["license"] == "other" and about["license_name"].startswith("--- license: mit --- <script>")
    renderer = MarkdownIt("commonmark", {"html": True, "linkify": False}).enable("table")
    html = renderer.render(text)
    for tag in ("<script", "<img", "<a ", "<b>", "javascript:"):
        assert tag not in html, tag
    assert "\u202e" not in page(found) and "[U+202E]" in html.replace("\\", "")
    assert html.count("<h2>") == 6 and html.count("<h1>") == 1
    assert "<script>alert(1)</script>" in text_of(text)


@pytest.mark.parametrize(
    ("given", "front"),
    [
        (None, {"license": "unknown"}),
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("ours: 2026", {"license": "other", "license_name": "ours: 2026"}),
    ],
)
def test_a_licence_is_what_was_given_or_said_to_be_unknown(given: str | None, front: dict[str, str], run: Path) -> None:
    text = page(made(run, licence=given))
    found = yaml.safe_load(text.split("---\n")[1])
    assert front.items() <= found.items() and ("license_name" in found) == (len(front) == 2)
    assert ("nobody has said under which terms" in text) == (given is None)


def test_nothing_that_is_shipped_tells_where_files_lie(tmp_path: Path) -> None:
    """The configuration, the results and the exported weights of a run on image files hold no absolute path."""
    pictures = _pictures(tmp_path / "secret" / "pictures")
    run, _ = make_run(tmp_path / "secret" / "runs", *_on(pictures))
    add_result(run, config={"data": str(pictures)}, result={"where": str(pictures)})
    export(run, tmp_path / "m")
    export(run, tmp_path / "w.safetensors")
    files = [tmp_path / "w.safetensors", *(tmp_path / "m").iterdir()]
    assert len(files) == 5
    for file in files:
        assert b"secret" not in file.read_bytes(), file
    assert json.loads((tmp_path / "m" / "card.json").read_text())["training"]["data"] == "./pictures"
    assert trained.load(tmp_path / "w.safetensors").cfg.data.root == "./pictures"


def test_class_names_are_those_of_the_training_images_while_they_are_the_same(tmp_path: Path) -> None:
    pictures = _pictures(tmp_path / "pictures")
    cfg = compose(_on(pictures))
    run, _ = make_run(tmp_path / "runs", *_on(pictures), data_fingerprint=data_fingerprint(cfg))
    assert made(run)["classes"]["names"] == ["cat", "dog"]
    export(run, tmp_path / "m", about=About(licence="mit"))
    assert json.loads((tmp_path / "m" / "config.json").read_text())["label_names"] == ["cat", "dog"]
    assert "Classes: 2: cat, dog." in (tmp_path / "m" / "README.md").read_text()
    record = records.read_run(run)
    records.write_json(run / "run.json", {**(record or {}), "data_fingerprint": "imagefolder-000000000000"})
    found = made(run)["classes"]
    assert found["names"] is None and "not those of the run any more" in found["why"]


@pytest.mark.parametrize(
    ("lines", "words"),
    [("a\nb\n", "names 2 classes; the model has 6"), ("a\na\nb\nc\nd\ne\n", "'a' twice"), (None, "cannot be read")],
)
def test_a_list_of_classes_must_fit(lines: str | None, words: str, run: Path, tmp_path: Path) -> None:
    if lines is not None:
        (tmp_path / "classes.txt").write_text(lines)
    with pytest.raises(ConfigError, match=words):
        made(run, class_list=tmp_path / "classes.txt")


def test_a_card_of_another_version_is_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(card, "SCHEMA", 99)
        export(run, tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match="this version does not know"):
        made(tmp_path / "w.safetensors")


def test_an_exported_file_that_carries_no_card_says_what_it_knows(run: Path, tmp_path: Path) -> None:
    """As files did that were written before there were cards."""
    from safetensors.torch import save_file

    weights = trained.read(run)
    about = {"step": "120", "weights": "average", "run_id": "t", "config": json.dumps(weights.config)}
    save_file(weights.tensors, tmp_path / "old.safetensors", about)
    found = made(tmp_path / "old.safetensors")
    assert found["training"]["fingerprint"] is None and found["code"]["commit"] is None
    assert "No few-shot evaluation is known." in page(found) and found["compute"]["step"] == 120


def test_the_command_says_how_to_load_and_refuses_in_one_sentence(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run), str(tmp_path / "m"), "--license", "mit", "--format", "timm"]) == 0
    said = capsys.readouterr().out
    assert f"folder = {str(tmp_path / 'm')!r}  #" in said and "are equal" in said
    text = (tmp_path / "m" / "README.md").read_text()
    assert "folder = 'm'" in text and str(tmp_path) not in text
    for arguments, words in (
        ([str(tmp_path / "nothing"), str(tmp_path / "n")], "is not there"),
        ([str(run), str(tmp_path / "m")], "--overwrite"),
        ([str(run), str(tmp_path / "n"), "--license", " "], "--license is empty"),
    ):
        assert main(["export", *arguments]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


def _pictures(folder: Path) -> Path:
    for name in ("dog", "cat"):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(folder / name / "1.png")
    return folder


def _on(pictures: Path) -> list[str]:
    return [*TINY[:-1], "data=imagefolder", f"data.root={pictures}", "data.num_classes=2"]


def test_every_field_of_the_configuration_is_in_the_card(run: Path) -> None:
    assert made(run)["training"]["config"].keys() == dataclasses.asdict(compose(list(TINY))).keys()
