"""The task trains, says and scores; killed anywhere it ends the same; its decoder file serves again where it fits."""

import dataclasses
import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from sovit.data.sources import LeftOut
from sovit.downstream import multitask, spoken
from sovit.downstream.frozen_tokens import FrozenTokens, tokens
from sovit.downstream.multitask import check, depends, run, text
from sovit.downstream.multitask_config import Config, Files
from sovit.downstream.spoken import Asked, by_chance, scored
from sovit.downstream.tasks import TASKS, compose
from sovit.language.examples import Question
from sovit.language.files import open_texts
from sovit.language.scenes import scenes
from sovit.language.vocabulary import save, train
from sovit.lit.trained import Trained
from sovit.strict import ConfigError
from trained_cells import untrained

TINY = Config(
    num_train=24,
    num_test=12,
    steps=4,
    global_batch_size=6,
    width=8,
    depth=1,
    mlp_dim=8,
    num_heads=2,
    length=24,
    max_tokens=8,
    dropout=0.1,
)


@pytest.fixture(scope="module", autouse=True)
def few_at_once() -> Iterator[None]:
    """More than one batch of texts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spoken, "AT_ONCE", 24)
        yield


@pytest.fixture(scope="module")
def trained() -> Trained:
    return untrained()


@pytest.fixture(scope="module")
def whole(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("whole")
    check(TINY, trained)
    return run(trained, TINY, folder / ".multitask-00000000.work"), folder


def test_every_figure_has_an_interval_and_its_chance(whole: tuple[dict[str, Any], Path]) -> None:
    result = whole[0]
    json.dumps(result, allow_nan=False)
    assert list(result["log_perplexity"]) == ["mean", "caption", "vqa", "ocr_vqa", "gqa"]
    for one in result["log_perplexity"].values():
        assert one["lo"] < one["value"] < one["hi"] and one["chance"] > 0
        assert one["below_chance"]["value"] == pytest.approx(one["chance"] - one["value"])
    assert [(one["task"], one["metric"]) for one in result["scores"]] == [
        ("caption", "CIDEr-D"),
        ("caption", "BLEU-4"),
        ("caption", "ROUGE-L"),
        ("vqa", "VQA accuracy"),
        ("vqa", "exact match"),
        ("ocr_vqa", "exact match"),
        ("gqa", "exact match"),
    ]
    for one in result["scores"]:
        assert one["lo"] <= one["value"] <= one["hi"] and one["chance"] >= 0
    assert len(result["said"]) == 8
    shown = "\n".join(text(result))
    assert "below blind" in shown and result["blind_caption"][:20] in shown


class Killed(BaseException):
    """A process that is gone."""


def dying(function: Callable[..., Any], after: int) -> Callable[..., Any]:
    calls = iter(range(10_000))

    def wrapped(*arguments: Any, **options: Any) -> Any:
        if next(calls) == after:
            raise Killed
        return function(*arguments, **options)

    return wrapped


@pytest.mark.parametrize(
    ("where", "name", "after"),
    [
        ("sovit.language.training", "_step", 3),  # in the middle of the decoder's training
        ("sovit.language.training", "_step", 6),  # of the blind one's
        ("sovit.downstream.spoken", "_texts", 2),  # of what it says
        ("sovit.downstream.multitask", "scored", 0),  # just before the end
    ],
)
def test_killed_at_any_moment_it_ends_with_the_same_result(
    trained: Trained,
    whole: tuple[dict[str, Any], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    name: str,
    after: int,
) -> None:
    module = importlib.import_module(where)
    eager = dataclasses.replace(TINY, checkpoint_every_s=0)
    work = tmp_path / ".multitask-00000000.work"
    steps: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(module, name, dying(getattr(module, name), after))
        with pytest.raises(Killed):
            run(trained, eager, work)
    assert (work / "resume.ckpt").exists()
    step = multitask.train_decoder
    monkeypatch.setattr(multitask, "train_decoder", lambda *a, **k: (steps.append(1), step(*a, **k))[1])
    assert run(trained, eager, work) == whole[0]
    assert len(steps) == {3: 2, 6: 1}.get(after, 0) if name == "_step" else not steps, "what was done was done again"


def test_the_decoders_file_gives_the_same_scores_without_training(
    trained: Trained, whole: tuple[dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, folder = whole
    file = folder / result["decoder"]["file"]
    monkeypatch.setattr(multitask, "train_decoder", None)
    cfg = dataclasses.replace(TINY, decoder=str(file))
    check(cfg, trained)
    again = run(trained, cfg, tmp_path / "work")
    for key in ("log_perplexity", "scores", "said"):
        assert again[key] == result[key]
    assert "another encoder" not in "\n".join(text(again))
    longer = dataclasses.replace(cfg, length=64)  # the recipe's default: texts are cut to what the file reads
    check(longer, trained)
    assert run(trained, longer, tmp_path / "longer")["log_perplexity"] == result["log_perplexity"]
    other = untrained(seed=1)
    object.__setattr__(other.weights, "run_id", "another")
    assert "trained on another encoder" in "\n".join(text(run(other, cfg, tmp_path / "other")))
    assert depends(trained, cfg) != depends(trained, TINY)


def test_a_decoder_for_something_else_is_one_sentence(
    trained: Trained, whole: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    file = whole[1] / whole[0]["decoder"]["file"]
    cfg = dataclasses.replace(TINY, decoder=str(file))
    save(train(["a few words", "a few others"], 300), tmp_path / "words.json")
    for changed, of, message in (
        (cfg, untrained("shape=24x1x16", "model.num_heads=4"), "tokens of width 16, and this encoder gives 24"),
        (dataclasses.replace(cfg, vocabulary=str(tmp_path / "words.json")), trained, "another vocabulary"),
        (dataclasses.replace(cfg, decoder=str(tmp_path / "words.json")), trained, "cannot be read"),
        (dataclasses.replace(cfg, decoder=str(tmp_path / "none")), trained, "cannot be read"),
        (dataclasses.replace(cfg, max_tokens=40), trained, "reads 24 tokens.* task.max_tokens=40; give 16 or fewer"),
    ):
        with pytest.raises(ConfigError, match=message):
            check(changed, of)


def test_chance_is_the_commonest_answer_to_the_question_and_else_of_the_task() -> None:
    known = [
        ("vqa", "how many?", ("2", "2", "3")),
        ("vqa", "how many?", ("2",)),
        ("vqa", "how many?", ("1",)),
        ("vqa", "is it?", ("no",)),
        ("vqa", "is there?", ("no",)),
        ("vqa", "was there?", ("no",)),
        ("gqa", "how many?", ("5",)),
    ]
    source: Any = SimpleNamespace(questions=[Question(k, *one, str(k)) for k, one in enumerate(known)])
    wanted = [Asked(0, "vqa", asked, ("1",)) for asked in ("how many?", "who?")]
    wanted += [
        Asked(0, "gqa", "how many?", ("1",)),
        Asked(0, "ocr_vqa", "which?", ("1",)),
        Asked(0, "caption", "", ("x",)),
    ]
    assert by_chance(source, wanted, "a thing") == ["2", "no", "5", "", "a thing"]


def test_a_perfect_speaker_scores_what_is_perfect() -> None:
    source = scenes("test", num=12)
    wanted = spoken.asked(source, ["caption", "vqa", "gqa"])
    assert sum(one.task == "caption" for one in wanted) == 12
    said = [one.references[0] for one in wanted]
    nothing = ["" for _ in wanted]
    found = {(one["task"], one["metric"]): one for one in scored(wanted, said, nothing)}
    for name in (("caption", "BLEU-4"), ("caption", "ROUGE-L"), ("vqa", "VQA accuracy"), ("gqa", "exact match")):
        assert found[name]["value"] == pytest.approx(1) and found[name]["chance"] == 0
    assert found["caption", "CIDEr-D"]["value"] > 2 and found["caption", "CIDEr-D"]["chance"] == 0


def test_tokens_are_the_encoders_and_kept_pieces_are_the_same(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = scenes("train", num=9)
    expected = tokens(trained.model, source.images(range(9)))
    assert expected.shape == (9, 4, 16)
    monkeypatch.setattr("sovit.downstream.frozen_tokens.PIECE", 4)
    rows = [3, 8, 3, 0]
    kept = FrozenTokens(trained.model, source, tmp_path, "train")
    torch.testing.assert_close(kept(rows), expected[rows], rtol=0, atol=1e-6)
    assert len(list(tmp_path.glob("train-*.safetensors"))) == 3
    monkeypatch.setattr(FrozenTokens, "_made", lambda self, rows: expected[rows] if len(rows) == 1 else None)
    assert torch.equal(FrozenTokens(trained.model, source, tmp_path, "train")(rows), kept(rows))
    monkeypatch.undo()
    monkeypatch.setattr("sovit.downstream.frozen_tokens.IN_MEMORY", 0)
    flown = FrozenTokens(trained.model, source, tmp_path / "none", "train")
    torch.testing.assert_close(flown(rows), expected[rows], rtol=0, atol=1e-6)
    assert not (tmp_path / "none").exists()


def test_images_that_cannot_be_read_are_counted_after_a_kill_too(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sovit.downstream.frozen_tokens.PIECE", 2)
    files = write_files(tmp_path / "train", 6)
    (tmp_path / "train" / "images" / "3.png").write_bytes(b"no image")

    def left_out() -> LeftOut:
        source = open_texts(str(files.images), gqa=files.gqa, size=16, channels=1)
        FrozenTokens(trained.model, source, tmp_path / "work", "train")
        return source.left_out

    first = left_out()
    assert first.count == 1 and first.named[0][0] == "3.png"
    assert left_out() == first  # from the pieces that the first has left


def test_a_question_cannot_command_the_terminal(whole: tuple[dict[str, Any], Path]) -> None:
    said = [one | {"question": "what\x1b[2J?"} for one in whole[0]["said"]]
    left_out = {"train": {"count": 1, "named": [["a\x1b]0;b\x07.png", "it is empty"]]}}
    assert "\x1b" not in "\n".join(text(whole[0] | {"said": said, "left_out": left_out}))


def write_files(folder: Path, num: int) -> Files:
    """Bright and dark pictures with captions in COCO's layout and questions in GQA's."""
    (folder / "images").mkdir(parents=True)
    images, annotations, questions = [], [], {}
    for k in range(num):
        Image.new("L", (20, 20), 220 if k % 2 else 30).save(folder / "images" / f"{k}.png")
        images.append({"id": k, "file_name": f"{k}.png"})
        annotations.append({"id": k, "image_id": k, "caption": "a bright one" if k % 2 else "a dark one"})
        questions[str(k)] = {"imageId": str(k), "question": "is it bright?", "answer": "yes" if k % 2 else "no"}
    annotations.append({"id": num, "image_id": 0, "caption": " "})
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    (folder / "gqa.json").write_text(json.dumps(questions))
    return Files(str(folder / "images"), captions=str(folder / "captions.json"), gqa=str(folder / "gqa.json"))


def test_files_of_the_users_own_are_learnt_to_the_end(tmp_path: Path) -> None:
    cfg = dataclasses.replace(
        TINY,
        data="files",
        train=write_files(tmp_path / "train", 16),
        test=write_files(tmp_path / "test", 8),
        steps=80,
        width=16,
        global_batch_size=8,
        lr=2e-2,
        dropout=0.0,
        beams=2,
    )
    trained = untrained(seed=2)
    check(cfg, trained)
    result = run(trained, cfg, tmp_path / "work")
    assert result["left_out"]["test"]["count"] == 1 and "test: could not be used: 1, such as" in "\n".join(text(result))
    assert list(result["log_perplexity"]) == ["mean", "caption", "gqa"] and result["texts"]["gqa"] == [16, 8]
    found = {(one["task"], one["metric"]): one for one in result["scores"]}
    assert found["gqa", "exact match"]["value"] == 1
    assert found["gqa", "exact match"]["chance"] == 0.5
    assert result["log_perplexity"]["gqa"]["hi"] < result["log_perplexity"]["gqa"]["chance"]


def test_bad_values_are_one_sentence_each(trained: Trained, tmp_path: Path) -> None:
    files = write_files(tmp_path / "train", 4)
    for changed, message in (
        ({"data": "scene"}, "did you mean 'scenes'"),
        ({"width": 9}, "task.width=9 is not divisible into task.num_heads=2"),
        ({"steps": None}, "give one of the two"),
        ({"epochs": 2.0}, "give one of the two"),
        ({"lr": 0.0}, "task.lr=0.0 and task.clip_norm=1.0 must be positive"),
        ({"length": 10}, "leaves too little for a question"),
        ({"beams": 0}, "task.beams=0 must be at least 1"),
        ({"gqa": -1.0}, "task.gqa=-1.0 must not be negative"),
        ({"image_size": 20}, "the nearest size that is: 16"),
        ({"caption": 0.0, "vqa": 0.0, "ocr_vqa": 0.0, "gqa": 0.0}, "no task to train and to test on"),
        ({"train": files}, "task.train.images goes with task.data=files"),
        ({"data": "files", "train": files}, "task.test.images has no value"),
        ({"data": "files", "train": files, "test": Files(str(tmp_path / "none"))}, "task.test: "),
        ({"vocabulary": str(tmp_path / "none.json")}, "task.vocabulary: .* cannot be read"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            check(dataclasses.replace(TINY, **changed), trained)
        assert "\n" not in str(error.value)


def test_the_shipped_recipes_compose_and_the_published_one_is_the_papers() -> None:
    assert "multitask" in TASKS
    for name in ("multitask", "multitask_published"):
        _, cfg = compose([f"task={name}", "task.test.captions=x.json"])
        assert cfg.test.captions == "x.json" and cfg.train.captions is None
    _, cfg = compose(["task=multitask_published"])
    assert (cfg.optimizer, cfg.epochs, cfg.steps, cfg.clip_norm, cfg.label_smoothing) == ("adafactor", 50, None, 1, 0.1)
    assert (cfg.lr, cfg.warmup, cfg.dropout, cfg.depth, cfg.global_batch_size) == (3e-4, 0.1, 0.1, 2, 512)
    assert cfg.lr * cfg.weight_decay == pytest.approx(1e-4, rel=1e-3)
