"""A mixture is a function of (seed, batch), a decoder's training of its arguments, and a log-perplexity of its examples."""

import copy
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sovit.data.sources import LeftOut
from sovit.language.examples import TASKS, Question
from sovit.language.mixture import (
    NOTHING,
    Batch,
    Examples,
    Mixture,
    collate,
    examples_of,
    in_common,
    most_common,
    parted,
    prompt,
)
from sovit.language.training import (
    Losses,
    NotFinite,
    Recipe,
    losses,
    multitask,
    scores,
    train_decoder,
)


class Letters:
    """A vocabulary of letters."""

    pad, bos, eos, size = 0, 1, 2, 131

    def ids(self, text: str) -> list[int]:
        return [3 + ord(letter) for letter in text]


@dataclass
class Squares:
    """Images of one number each, which captions and questions name."""

    num: int = 12
    captioned: bool = True
    name: str = "squares"
    fingerprint: str = "squares"
    left_out: LeftOut = field(default_factory=LeftOut)

    def __len__(self) -> int:
        return self.num

    def images(self, rows: Sequence[int]) -> Tensor:
        return torch.tensor([[[[row / self.num]]] for row in rows])

    def captions(self, row: int) -> tuple[str, ...]:
        return (f"a {row % 3}", f"it is {row % 3}") if self.captioned else ()

    @property
    def questions(self) -> list[Question]:
        return [
            Question(row, task, "which?", (str(row % 3), "9", str(row % 3)), f"{row}-{task}")
            for row in range(self.num)
            for task in TASKS[1:]
        ]


VOCABULARY = Letters()
TINY = Recipe(width=8, depth=1, mlp_dim=8, num_heads=2, length=24, steps=6, batch_size=8, dropout=0.1, shares=None)


def tokens(num: int = 12) -> Tensor:
    """What a good encoder would say of the squares: their number, in a token beside one that says nothing."""
    found = torch.zeros(num, 2, 6)
    found[torch.arange(num), 0, torch.arange(num) % 3] = 3.0
    return found


def test_an_example_is_its_prompt_in_words_and_the_most_common_answer() -> None:
    found = examples_of(Squares(), VOCABULARY, 40)
    first = found.of["vqa"][4]
    assert first.prompt == (1, *VOCABULARY.ids("vqa: which?\n")) and first.answer == (3 + ord("1"), 2)
    assert first.row == 4 and len(found.of["caption"]) == 24 and not found.cut
    assert found.of["caption"][3].prompt == prompt(VOCABULARY, "caption", "") == (1, *VOCABULARY.ids("caption: \n"))
    assert most_common(["b", "a", "a", "b"]) == "b", "of equals the first"


def test_only_the_answer_and_its_end_are_scored() -> None:
    of = examples_of(Squares(), VOCABULARY, 40).of
    batch = collate([of["vqa"][4], of["caption"][1]], pad=0)
    for row, example in enumerate((of["vqa"][4], of["caption"][1])):
        whole = [*example.prompt, *example.answer]
        inputs, targets = batch.tokens[row].tolist(), batch.targets[row].tolist()
        assert inputs[: len(whole) - 1] == whole[:-1] and set(inputs[len(whole) - 1 :]) <= {0}
        assert [target for target in targets if target != NOTHING] == list(example.answer)
        for place, target in enumerate(targets):
            assert target == NOTHING or target == whole[place + 1]
    assert batch.tokens.shape[1] == max(len(e.prompt) + len(e.answer) - 1 for e in (of["vqa"][4], of["caption"][1]))


def test_a_batch_in_two_parts_is_the_same_examples_with_less_padding() -> None:
    of = examples_of(Squares(), VOCABULARY, 40).of
    chosen = [*of["caption"][:3], *of["ocr_vqa"][:5], *of["caption"][3:5]]
    whole, parts = collate(chosen, 0), parted(chosen, 0)

    def texts(batch: Batch) -> list[tuple[int, list[int], list[int]]]:
        rows = zip(batch.rows, batch.tokens.tolist(), batch.targets.tolist(), strict=True)
        return [(row, [k for k in tokens if k], [k for k in targets if k != NOTHING]) for row, tokens, targets in rows]

    assert len(parts) == 2 and sorted(text for part in parts for text in texts(part)) == sorted(texts(whole))
    assert sum(part.tokens.numel() for part in parts) < whole.tokens.numel()
    assert len(parted(chosen[:1], 0)) == 1 and len(parted(chosen[3:8], 0)) == 1


@pytest.mark.parametrize("length", [6, 10, 15])
def test_what_does_not_fit_is_cut_and_counted_and_still_ends(length: int) -> None:
    found = examples_of(Squares(), VOCABULARY, length)
    for task, of in found.of.items():
        for example in of:
            assert len(example.prompt) + len(example.answer) - 1 <= length
            assert example.answer[-1] == VOCABULARY.eos and example.prompt[0] == VOCABULARY.bos
            assert example.prompt[-1] == VOCABULARY.ids("\n")[0]
        whole = examples_of(Squares(), VOCABULARY, 1000).of[task]
        long = sum(len(e.prompt) + len(e.answer) - 1 > length for e in whole)
        assert found.cut.get(task, 0) == long
    assert found.cut


def test_a_batch_is_a_function_of_seed_and_number_and_an_epoch_sees_every_example_once() -> None:
    found = examples_of(Squares(), VOCABULARY, 40)
    weights = {"caption": 3.0, "vqa": 1.0, "gqa": 0.0, "ocr_vqa": 0.5}

    def mixture(seed: int) -> Mixture:
        return Mixture(found, batch_size=9, pad=0, seed=seed, weights=weights)

    one, again, other = mixture(1), mixture(1), mixture(2)
    for _ in range(3):
        again.batch(7)
    for ours, theirs in zip(one.batch(40), again.batch(40), strict=True):
        assert torch.equal(ours.tokens, theirs.tokens) and torch.equal(ours.targets, theirs.targets)
        assert ours.rows == theirs.rows
    assert [part.rows for part in one.batch(40)] != [part.rows for part in other.batch(40)]
    drawn = one.chosen(range(9000))
    counts = Counter(task for task, _ in drawn)
    assert counts["gqa"] == 0
    for task, share in (("caption", 3 / 4.5), ("vqa", 1 / 4.5), ("ocr_vqa", 0.5 / 4.5)):
        assert counts[task] == pytest.approx(9000 * share, rel=0.01)
        of_task = [number for name, number in drawn if name == task]
        size = len(found.of[task])
        for epoch in range(len(of_task) // size):
            assert sorted(of_task[epoch * size : (epoch + 1) * size]) == list(range(size))
    window = Counter(task for task, _ in drawn[500:545])
    assert abs(window["caption"] - 30) <= 1 and abs(window["vqa"] - 10) <= 1, "the turns are not evenly spread"


def test_weights_that_cannot_be_are_one_sentence() -> None:
    found = examples_of(Squares(captioned=False), VOCABULARY, 40)
    for weights, message in (
        ({"caption": 1.0}, "There is no example of 'caption'; there are vqa, ocr_vqa, gqa"),
        ({"vqa": -1.0}, "The weight -1.0 of vqa must not be negative"),
        ({"vqa": 0.0}, "No task has a positive weight"),
    ):
        with pytest.raises(ValueError, match=message):
            Mixture(found, batch_size=2, pad=0, seed=0, weights=weights)
    with pytest.raises(ValueError, match="no caption and no question"):
        Mixture(Examples({}, {}), batch_size=2, pad=0, seed=0)
    both = in_common(found, examples_of(Squares(), VOCABULARY, 40))
    assert [list(part.of) for part in both] == [["vqa", "ocr_vqa", "gqa"]] * 2


def test_a_log_perplexity_is_the_mean_over_the_tokens_of_the_answers() -> None:
    found = examples_of(Squares(num=5), VOCABULARY, TINY.length)
    memory = tokens(5)
    decoder = train_decoder(lambda rows: memory[list(rows)], found, VOCABULARY, TINY, 6)
    result = losses(decoder, lambda rows: memory[list(rows)], found, VOCABULARY, TINY)
    for task, of in found.of.items():
        for k, example in enumerate(of):
            ids = torch.tensor([[*example.prompt, *example.answer]])
            with torch.no_grad():
                log_probs = decoder(ids[:, :-1], memory[example.row : example.row + 1])[0].log_softmax(-1)
            said = [float(log_probs[len(example.prompt) - 1 + j, token]) for j, token in enumerate(example.answer)]
            assert result[task].nats[k] == pytest.approx(-sum(said), abs=1e-5)
            assert result[task].num_tokens[k] == len(example.answer) and result[task].rows[k] == example.row
    mean, *each = scores(result)
    assert mean.value == pytest.approx(np.mean([score.value for score in each]), abs=1e-12)
    for score in each:
        of = result[score.name]
        assert score.value == pytest.approx(of.nats.sum() / of.num_tokens.sum())


def test_the_standard_error_is_that_of_drawing_images_anew() -> None:
    rng = np.random.default_rng(0)
    rows = np.sort(rng.integers(80, size=300))
    image = rng.normal(size=80)

    def of(scale: float) -> Losses:
        num = rng.integers(1, 5, size=300)
        return Losses(rows, num * (2 + image[rows] + scale * rng.normal(size=300)), num)

    found = {"vqa": of(0.5), "gqa": of(1.0)}
    drawn: dict[str, list[float]] = {"mean": [], "vqa": [], "gqa": []}
    for _ in range(2000):
        times = np.bincount(rng.integers(80, size=80), minlength=80)[rows]
        values = {task: (times * one.nats).sum() / (times * one.num_tokens).sum() for task, one in found.items()}
        for name, value in (values | {"mean": np.mean(list(values.values()))}).items():
            drawn[name].append(value)
    for score in scores(found):
        assert score.stderr == pytest.approx(np.std(drawn[score.name]), rel=0.08), score.name
    lower = scores(found, {task: replace(one, nats=one.nats + 0.5 * one.num_tokens) for task, one in found.items()})
    assert all(
        score.value == pytest.approx(0.5) and score.stderr < 1e-12 for score in lower if score.stderr is not None
    )


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_training_goes_on_exactly_and_leaves_the_generators_alone(optimizer: str) -> None:
    found, memory = examples_of(Squares(), VOCABULARY, TINY.length), tokens()
    recipe = replace(TINY, optimizer=optimizer)
    kept: dict[int, Any] = {}

    def train(**options: Any) -> dict[str, Tensor]:
        return train_decoder(lambda rows: memory[list(rows)], found, VOCABULARY, recipe, 6, **options).state_dict()

    torch.manual_seed(5)
    before = torch.get_rng_state()
    whole = train(after=lambda made, loss, snapshot: kept.update({made: copy.deepcopy(snapshot())}))
    assert torch.equal(torch.get_rng_state(), before)
    assert sorted(kept) == [1, 2, 3, 4, 5, 6]
    torch.manual_seed(6)
    for step in (2, 5):
        resumed = train(state=kept[step])
        assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.items())


def test_the_decoder_learns_what_the_tokens_say_and_a_blind_one_cannot() -> None:
    recipe = replace(TINY, steps=100, batch_size=16, lr=1e-2, label_smoothing=0.0, dropout=0.0, width=16)
    train, test = in_common(*(examples_of(Squares(num), VOCABULARY, recipe.length) for num in (30, 21)))
    seen = multitask(tokens(30), tokens(21), train, test, VOCABULARY, recipe)
    blind = multitask(tokens(30), tokens(21), train, test, VOCABULARY, recipe, blind=True)
    assert [score.name for score in seen] == ["mean", *TASKS]
    by_name = {score.name: score for score in blind}
    # One of two captions for each image, of six tokens on average; an answer is one of three letters and its end.
    certain = {"caption": math.log(2) / 6, "vqa": 0, "ocr_vqa": 0, "gqa": 0}
    for name, least in certain.items():
        unseen = least + math.log(3) / (6 if name == "caption" else 2)
        assert least - 0.01 < next(score.value for score in seen if score.name == name) < least + 0.1
        assert unseen - 0.01 < by_name[name].value < unseen + 0.1
    other = multitask(tokens(30), tokens(21).flip(0), train, test, VOCABULARY, recipe, blind=True)
    assert other == blind, "a blind decoder has seen the image"


def test_a_training_that_diverges_is_one_sentence() -> None:
    with pytest.raises(NotFinite, match=r"diverged at step \d+ with lr=0\.006; give a lower rate"):
        found = examples_of(Squares(), VOCABULARY, TINY.length)
        multitask(tokens() * math.nan, tokens(), found, found, VOCABULARY, TINY)
