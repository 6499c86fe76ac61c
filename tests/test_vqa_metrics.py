"""VQA accuracy equals the official evaluation, its traits included; `tests/golden/vqa.json` says what made its figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sovit.language.metrics import vqa

GOLDEN = json.loads((Path(__file__).parent / "golden" / "vqa.json").read_text(encoding="utf-8"))


def test_accuracies_are_those_of_the_official_evaluation() -> None:
    candidates, answers, expected = zip(*GOLDEN["cases"], strict=True)
    found = vqa.score(candidates, answers)
    assert found.examples == pytest.approx(expected, abs=1e-6)
    assert found.value == pytest.approx(sum(expected) / len(expected), abs=1e-6)


def test_answers_are_made_plain_as_in_the_official_evaluation() -> None:
    wrong = [(answer, vqa.normalised(answer), plain) for answer, plain in GOLDEN["normalised"]]
    assert [row for row in wrong if row[1] != row[2]] == []


def test_each_person_is_left_out_in_turn() -> None:
    """8 x yes and 2 x no: "no" is (8 x 2/3 + 2 x 1/3) / 10, the authors' own example; three of ten make 0.9, four 1."""
    people = ["yes"] * 8 + ["no"] * 2
    assert vqa.score(["no", "yes", "maybe"], [people] * 3).examples == pytest.approx([0.6, 1, 0])
    for same, expected in ((1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0)):
        given = ["cat"] * same + [f"dog {n}" for n in range(10 - same)]
        assert vqa.score(["cat"], [given]).value == pytest.approx(expected)


def test_articles_and_number_words_do_not_matter() -> None:
    people = ["The two cats.", "2 cats", "two cats", "2 Cats!", *(f"x{n}" for n in range(6))]
    assert vqa.score(["a 2 cats"], [people]).value == 1


def test_answers_that_all_people_share_are_compared_as_they_are() -> None:
    assert vqa.score(["A", "a", "A."], [["A"] * 10] * 3).examples.tolist() == [1, 0, 0]
    assert vqa.score(["A", "a", "A."], [["A"] * 9 + ["B"]] * 3).examples.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("answer", "plain"),
    [
        ("left/right", "left right"),  # within a word: a space
        ("left /right", "left right"),  # beside a space: nothing
        ("t-shirt", "t shirt"),
        ("t-shirt - blue", "tshirt blue"),  # one beside a space takes all of its kind along
        ("t-shirt, blue", "t shirt blue"),  # but none of another kind
        ("x-/y-z/-w", "x y z w"),  # spaces are those of the answer, not those that marks have become
    ],
)
def test_marks_part_words_unless_one_of_the_kind_is_beside_a_space(answer: str, plain: str) -> None:
    assert vqa.normalised(answer) == plain


def test_a_number_with_a_comma_drops_every_mark() -> None:
    assert vqa.normalised("1,000 t-shirts/caps") == "1000 tshirtscaps"


def test_a_period_stays_before_a_digit_only() -> None:
    assert [vqa.normalised(text) for text in ("3.5", ".5", "3.", "3.5.", "u.s.a.")] == ["3.5", ".5", "3", "3.5", "usa"]


def test_the_33rd_period_stays() -> None:
    assert vqa.normalised("b." * 33) == "b" * 33 + "."


def test_contractions_get_their_apostrophe_back() -> None:
    found = [vqa.normalised(text) for text in ("Dont", "oclock", "couldnt've", "couldn'tve", "yall'd've", "its", "ill")]
    assert found == ["don't", "o'clock", "couldn't've", "couldn't've", "y'all'd've", "its", "ill"]


def test_somebodyd_is_the_wrong_way_round() -> None:
    assert vqa.normalised("somebody'd") == vqa.normalised("somebodyd") == "somebodyd"


def test_none_is_zero() -> None:
    assert vqa.normalised("None") == vqa.normalised("zero") == vqa.normalised("0") == "0"


def test_a_question_with_one_answer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Question 1 has one answer.*exact match"):
        vqa.score(["a", "b"], [["a", "b"], ["b"]])
