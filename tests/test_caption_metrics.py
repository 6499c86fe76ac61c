"""CIDEr-D, BLEU, ROUGE-L and their words equal COCO's evaluation; intervals draw images, not captions.

`tests/golden/captions.json` says which programs made its figures. What is not from there is worked out by hand.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from sovit.language.metrics import bleu, cider, exact, interval, rouge, words
from sovit.language.metrics.scores import averaged

GOLDEN = json.loads((Path(__file__).parent / "golden" / "captions.json").read_text(encoding="utf-8"))
CORPORA = {corpus["name"]: corpus for corpus in GOLDEN["corpora"]}
# What `words` admits not to know: every other text must have the words of COCO's tokenizer.
OTHER_WORDS = {
    "<angles> and rock 'n' roll",
    "a tmux.1 of v2.14.2",
    "£5 €5 5¢",
    "a cat 🐱 here",
    "a letter s.",
}


def at_spaces(text: str) -> list[str]:
    """As the reference's ROUGE does: an empty text is one empty word."""
    return text.split(" ")


def test_words_are_those_of_cocos_tokenizer() -> None:
    different = {text for text, expected in GOLDEN["words"] if list(words.split(text)) != expected}
    assert different == OTHER_WORDS


@pytest.mark.parametrize("name", CORPORA)
def test_scores_are_those_of_cocos_evaluation(name: str) -> None:
    corpus: dict[str, Any] = CORPORA[name]
    texts = corpus["candidates"], corpus["references"]
    spaces = corpus["split"] == "spaces"
    split: words.Split = str.split if spaces else words.split
    found = {
        "cider": cider.score(*texts, split=split),
        "rouge_l": rouge.score(*texts, split=at_spaces if spaces else split),
        "bleu": bleu.score(*texts, split=split),
    }
    for metric in ("cider", "rouge_l"):
        assert found[metric].value == pytest.approx(corpus[metric], abs=1e-6)
        assert found[metric].examples == pytest.approx(corpus[f"{metric}_examples"], abs=1e-6)
    expected = np.array(corpus["bleu_examples"])
    for n in range(1, 5):  # bleu_4 is the score, the others follow from the same sums
        assert bleu.of_sums(found["bleu"].parts.sum(0), n) == pytest.approx(corpus["bleu"][n - 1], abs=1e-6)
        assert bleu.of_sums(found["bleu"].parts, n) == pytest.approx(expected[:, n - 1], abs=1e-6)
    assert found["bleu"].value == pytest.approx(corpus["bleu"][3], abs=1e-6)
    assert found["bleu"].examples == pytest.approx(expected[:, 3], abs=1e-6)


def test_cider_by_hand() -> None:
    """Two images, so "a", which is in both, weighs nothing, and every other n-gram log 2."""
    references = [["A cat."], ["A dog."]]
    same = cider.score(["a cat", "a cat"], references)
    assert same.examples == pytest.approx([10 * (1 + 1 + 0 + 0) / 4, 0])
    assert same.value == pytest.approx(2.5)
    # "cat" twice is clipped: 1 / 2. Pairs "a cat", "cat cat" against "a cat": 1 / sqrt(2). One word longer than wanted.
    twice = cider.score(["a cat cat", "a dog"], references)
    assert twice.examples[0] == pytest.approx(10 / 4 * (1 / 2 + 1 / math.sqrt(2)) * math.exp(-1 / 72))


def test_cider_of_one_image_is_nothing_without_a_table() -> None:
    references = [["a cat sits here", "the cat sits"]]
    assert cider.score(["a cat sits here"], references).value == 0
    table = cider.frequencies([*references, ["two dogs"], ["a bird"]])
    assert table.num_images == 3 and table.counts[("a",)] == 2 and table.counts[("cat",)] == 1
    assert cider.score(["a cat sits here"], references, table=table).value > 1


def test_cider_takes_frequencies_from_the_references_of_all_images() -> None:
    corpus = CORPORA["captions"]
    table = cider.frequencies(corpus["references"], split=str.split)
    few = cider.score(corpus["candidates"][:5], corpus["references"][:5], table=table, split=str.split)
    assert few.examples == pytest.approx(corpus["cider_examples"][:5], abs=1e-6)


def test_a_table_that_counts_an_image_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="in 5 of 4 images"):
        cider.Frequencies({("a",): 5}, 4)


def test_bleu_clips_repeated_words() -> None:
    """The example of Papineni et al. (2002), section 2.1.1."""
    references = [["the cat is on the mat", "there is a cat on the mat"]]
    sums = bleu.score(["the the the the the the the"], references).parts.sum(0)
    assert bleu.of_sums(sums, 1) == pytest.approx(2 / 7)


def test_bleu_takes_the_shorter_of_two_lengths_as_close() -> None:
    lengths = bleu.score(["a b c d"], [["a b c d e", "a b c"]]).parts[0, :2]
    assert lengths.tolist() == [4, 3]


def test_bleu_of_fewer_than_four_words_comes_from_cocos_constants() -> None:
    right = bleu.score(["a red cat"], [["a red cat"]])
    assert right.value == pytest.approx((1e-15 / 1e-9) ** (1 / 4), rel=1e-6)


def test_bleu_of_a_corpus_is_not_the_mean_of_its_examples() -> None:
    scores = bleu.score(["a b c d e", "x"], [["a b c d e"], ["p q r s t"]])
    assert scores.examples == pytest.approx([1, 0], abs=1e-3)
    assert scores.value == pytest.approx(math.exp(1 - 10 / 6) * (5 / 6) ** (1 / 4), rel=1e-6)


def test_rouge_may_take_precision_and_recall_from_different_references() -> None:
    found = rouge.score(["a b"], [["a b c d e f", "a"]]).value  # precision 1 of the first, recall 1 of the second
    assert found == pytest.approx(1)
    assert rouge.score(["a x"], [["a b c d"]]).value == pytest.approx(2.44 * 0.5 * 0.25 / (0.25 + 1.44 * 0.5))


def test_rouge_of_no_words_is_one_empty_word() -> None:
    assert rouge.score(["", "", "a"], [["."], ["a"], [""]]).examples.tolist() == [1, 0, 0]


def test_the_longest_common_subsequence_is_that_of_brute_force() -> None:
    rng = np.random.default_rng(0)

    def subsequences(text: Sequence[str]) -> set[tuple[str, ...]]:
        return {kept for n in range(len(text) + 1) for kept in itertools.combinations(text, n)}

    for _ in range(60):
        one, two = ([str(word) for word in rng.integers(4, size=rng.integers(8))] for _ in range(2))
        expected = max(len(kept) for kept in subsequences(one) & subsequences(two))
        assert rouge.in_common(one, two) == expected


def test_exact_match_forgives_case_spaces_and_composition() -> None:
    references = [["red", "blue dog"], ["CAFÉ"], ["STRASSE"], ["cat"]]
    scores = exact.score([" Blue  Dog", "cafe\u0301", "Straße", "cat."], references)
    assert scores.examples.tolist() == [1, 1, 1, 0]
    assert scores.value == pytest.approx(3 / 4)


@pytest.mark.parametrize("score", [cider.score, bleu.score, rouge.score, exact.score])
def test_what_cannot_be_scored_is_one_sentence(score: Any) -> None:
    with pytest.raises(ValueError, match="1 candidates but references of 2"):
        score(["a"], [["a"], ["b"]])
    with pytest.raises(ValueError, match="no candidate"):
        score([], [])
    with pytest.raises(ValueError, match=r"Example 1 has references \[\]"):
        score(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match="Example 0 has references 'a'"):
        score(["a"], ["a"])


def test_captions_of_one_image_are_drawn_together() -> None:
    """Four captions of an image that are right or wrong together say no more than one."""
    values = np.random.default_rng(1).random(40)
    once = interval.bootstrap(averaged(values))
    images = [f"{row}.jpg" for row in range(40) for _ in range(4)]
    four = interval.bootstrap(averaged(np.repeat(values, 4)), images)
    assert (four.lo, four.hi, four.num) == (pytest.approx(once.lo), pytest.approx(once.hi), 160)
    half = 1.96 * values.std() / math.sqrt(40)  # of a mean, in theory
    assert (once.hi - once.lo) / 2 == pytest.approx(half, rel=0.1)
    assert once.lo < values.mean() < once.hi


def test_an_image_with_more_captions_counts_for_more() -> None:
    scores = averaged([1, 1, 1, 0])
    found = interval.bootstrap(scores, ["a", "a", "a", "b"], seed=3)
    assert found.value == 0.75 and (found.lo, found.hi) == (0, 1)  # either image alone is drawn every other time


def test_the_interval_of_bleu_scores_whole_corpora_anew() -> None:
    corpus = CORPORA["captions"]
    candidates, references = corpus["candidates"][:12], corpus["references"][:12]
    scores = bleu.score(candidates, references, split=str.split)
    found = interval.bootstrap(scores, seed=5)
    rng = np.random.default_rng(5)
    values = []
    for _ in range(interval.NUM_DRAWS):
        rows = rng.integers(12, size=12)
        values.append(scores.corpus(scores.parts[rows].sum(0)))
        if len(values) < 20:
            drawn = [candidates[row] for row in rows], [references[row] for row in rows]
            assert bleu.score(*drawn, split=str.split).value == pytest.approx(values[-1])
    assert [found.lo, found.hi] == pytest.approx(np.quantile(values, [0.025, 0.975]))


@pytest.mark.parametrize("count", [0, 1, 7, 40])
def test_a_share_has_wilsons_interval(count: int) -> None:
    found = interval.share([1] * count + [0] * (40 - count))
    expected = binomtest(count, 40).proportion_ci(0.95, method="wilson")
    assert (found.value, found.lo, found.hi, found.num) == pytest.approx((count / 40, expected.low, expected.high, 40))


def test_questions_that_are_right_together_are_worth_one() -> None:
    """Ten images with five questions each: alike within an image, at random, and all right."""
    images = [row for row in range(10) for _ in range(5)]
    alike = interval.share(np.repeat([1, 1, 1, 0, 0, 1, 0, 1, 1, 0], 5), images)
    assert (alike.lo, alike.hi) == pytest.approx(interval.wilson(0.6, 10), abs=0.02)  # 10/9 of the variance: 9 images
    mixed = interval.share([1, 1, 1, 0, 0] * 10, images)
    assert (mixed.lo, mixed.hi) == pytest.approx(interval.wilson(0.6, 50))
    assert interval.share([1] * 50, images).lo == pytest.approx(interval.wilson(1, 10)[0])


def test_an_interval_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        interval.share([])
    with pytest.raises(ValueError, match="zeros and ones"):
        interval.share([0.3, 1])
    with pytest.raises(ValueError, match="2 examples but 1 images"):
        interval.bootstrap(averaged([0, 1]), ["a"])
