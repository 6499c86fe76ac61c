"""Questions about an embedded scene and their answers, all true, of three kinds of SoViT's multitask decoder.

``vqa``: what, how many, where, is there, with ten answers in VQA's layout; ``ocr_vqa``: which digits are written; ``gqa``:
comparison and relation. An answer cannot be guessed from its question: where two answers are possible both are equally
likely, because the answer is drawn first, or because the sides of the comparison are in random order.

"Left of" compares columns and "above" rows, wherever else the two things are; "directly" left or above is the next quarter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sovit.language.facts import BRIGHTNESSES, DIGIT, DIGITS, FRACTAL, NAMES, PLACES, SIZES, Dice, Facts, Thing
from sovit.language.sentences import NUMBERS, OTHERS, SIDES, with_article

PER_TASK = 2  # questions of a task and scene, at most
ANSWERS = 10  # to a vqa question: people agree in most, and word some differently
NOTHING, NONE = "nothing", "none"

_MORE = {"brightness": ("dimmer", "brighter"), "size": ("smaller", "larger")}
_ORDERED = {"brightness": BRIGHTNESSES, "size": SIZES}
_HALVES = (("upper", "lower"), ("left", "right"))
_COUNTS = dict(zip("01234", ("zero", *NUMBERS[1:]), strict=True))
_OTHER_WORDS = OTHERS | _COUNTS | {NOTHING: "it is empty"}

Asked = tuple[str, str]  # question and answer


def questions(facts: Facts, dice: Dice) -> list[tuple[str, str, tuple[str, ...]]]:
    """(task, question, answers) of a scene: up to PER_TASK of each task, of different makers."""
    found = []
    for task, makers in _MAKERS.items():
        asked: list[Asked] = []
        for maker in dice.order(makers):
            one = maker(facts, dice) if len(asked) < PER_TASK else None
            if one is not None:
                asked.append(one)
        found += [(task, text, _answers(task, answer)) for text, answer in asked]
    return found


def _answers(task: str, answer: str) -> tuple[str, ...]:
    """Ten of a vqa question, two of them in other words where there are any; otherwise the one."""
    if task != "vqa":
        return (answer,)
    return (answer,) * (ANSWERS - 2) + (_OTHER_WORDS.get(answer, answer),) * 2


def _what(facts: Facts, dice: Dice) -> Asked:
    empty = [place for place in PLACES if place not in {thing.place for thing in facts.things}]
    if empty and not dice.below(6):
        return f"what is in the {dice.pick(empty)}?", NOTHING
    thing = dice.pick(facts.things)
    return f"what is in the {thing.place}?", thing.name


def _how_many(facts: Facts, dice: Dice) -> Asked:
    group, counted = dice.pick(_groups(facts))
    if not dice.below(4):
        group, counted = "things", len(facts.things)
    return f"how many {group} are there?", str(counted)


def _where(facts: Facts, dice: Dice) -> Asked:
    thing = dice.pick(facts.things)
    return f"where is the {thing.name}?", thing.place


def _is_there(facts: Facts, dice: Dice) -> Asked:
    present = [thing.name for thing in facts.things]
    names = dice.pick((NAMES, DIGITS))
    inside, outside = ([name for name in names if (name in present) == wanted] for wanted in (True, False))
    if not inside:  # a scene of the other kind alone
        inside = present
        outside = [name for name in (NAMES if present[0] in NAMES else DIGITS) if name not in present]
    yes = dice.below(2)
    return f"is there {with_article(dice.pick(inside if yes else outside))}?", _yes(yes)


def _is_filled(facts: Facts, dice: Dice) -> Asked | None:
    filled = [thing.place for thing in facts.things]
    if len(filled) == len(PLACES):
        return None
    yes = dice.below(2)
    place = dice.pick(filled if yes else [place for place in PLACES if place not in filled])
    return f"is there anything in the {place}?", _yes(yes)


def _which_way(facts: Facts, dice: Dice) -> Asked:
    thing = dice.pick(facts.things)
    field = dice.pick(tuple(_ORDERED))
    return f"is the {thing.name} {' or '.join(dice.order(_ORDERED[field]))}?", getattr(thing, field)


def _digit_at(facts: Facts, dice: Dice) -> Asked | None:
    digits = facts.of_kind(DIGIT)
    if not digits:
        return None
    thing = dice.pick(digits)
    return f"which digit is in the {thing.place}?", thing.name


def _written(facts: Facts, dice: Dice) -> Asked:
    return "which digits are written, line by line?", " ".join(d.name for d in facts.of_kind(DIGIT)) or NONE


def _greatest(facts: Facts, dice: Dice) -> Asked | None:
    digits = [thing.name for thing in facts.of_kind(DIGIT)]
    if len(digits) < 2:
        return None
    return dice.pick((("which is the highest digit?", max(digits)), ("which is the lowest digit?", min(digits))))


def _digit_that_is(facts: Facts, dice: Dice) -> Asked | None:
    found = [
        (word, same[0].name)
        for field, words in _ORDERED.items()
        for word in words
        if len(same := [thing for thing in facts.of_kind(DIGIT) if getattr(thing, field) == word]) == 1
    ]
    if not found:
        return None
    word, name = dice.pick(found)
    return f"which digit is {word}?", name


def _is_beside(facts: Facts, dice: Dice) -> Asked | None:
    if len(facts.things) < 2:
        return None
    first, second = dice.order(facts.things)[:2]
    axis = dice.pick([axis for axis in (0, 1) if first.along(axis) != second.along(axis)])
    side = dice.below(2)
    return f"is the {first.name} {SIDES[axis][side]} the {second.name}?", _yes(first.along(axis) == side)


def _is_more(facts: Facts, dice: Dice) -> Asked | None:
    found = _unequal(facts, dice)
    if found is None:
        return None
    field, first, second = found
    more = dice.below(2)
    more_of_first = _ORDERED[field].index(getattr(first, field))
    return f"is {_there(first)} {_MORE[field][more]} than {_there(second)}?", _yes(more == more_of_first)


def _which_is_more(facts: Facts, dice: Dice) -> Asked | None:
    found = _unequal(facts, dice)
    if found is None:
        return None
    field, first, second = found
    more = dice.below(2)
    answer = first if _ORDERED[field].index(getattr(first, field)) == more else second
    return f"which is {_MORE[field][more]}, the {first.name} or the {second.name}?", answer.name


def _is_same(facts: Facts, dice: Dice) -> Asked | None:
    if len(facts.things) < 2:
        return None
    first, second = dice.order(facts.things)[:2]
    field = dice.pick(("size", "brightness"))
    same = getattr(first, field) == getattr(second, field)
    return f"are {_there(first)} and {_there(second)} of the same {field}?", _yes(same)


def _are_more(facts: Facts, dice: Dice) -> Asked | None:
    groups = _groups(facts)
    found = [pair for pair in (groups[:2], groups[2:4], groups[4:]) if pair[0][1] != pair[1][1]]
    if not found:
        return None
    (first, count), (second, other) = dice.order(dice.pick(found))
    return f"are there more {first} than {second}?", _yes(count > other)


def _beside(facts: Facts, dice: Dice) -> Asked | None:
    if len(facts.things) < 2:
        return None
    found = [(word, thing, other) for thing in facts.things for word, other in _neighbours(facts, thing)]
    filled, empty = ([one for one in found if (one[2] is None) == wanted] for wanted in (False, True))
    word, thing, other = dice.pick(empty if empty and (not filled or not dice.below(6)) else filled)
    return f"what is directly {word} the {thing.name}?", other.name if other else NOTHING


def _like_the_one_beside(facts: Facts, dice: Dice) -> Asked | None:
    found = [(word, thing, other) for thing in facts.things for word, other in _neighbours(facts, thing) if other]
    if not found:
        return None
    word, thing, other = dice.pick(found)
    field = dice.pick(tuple(_ORDERED))
    words = " or ".join(dice.order(_ORDERED[field]))
    return f"is the thing directly {word} the {thing.name} {words}?", getattr(other, field)


def _is_both(facts: Facts, dice: Dice) -> Asked:
    thing = dice.pick(facts.things)
    pairs = [(size, brightness) for size in SIZES for brightness in BRIGHTNESSES]
    true = (thing.size, thing.brightness)
    yes = dice.below(2)
    size, brightness = true if yes else dice.pick([pair for pair in pairs if pair != true])
    return f"is {_there(thing)} {size} and {brightness}?", _yes(yes)


def _is_on_side(facts: Facts, dice: Dice) -> Asked:
    thing = dice.pick(facts.things)
    axis, side = dice.below(2), dice.below(2)
    return f"is the {thing.name} in the {_HALVES[axis][side]} half?", _yes(thing.along(axis) == side)


_MAKERS: dict[str, Sequence[Callable[[Facts, Dice], Asked | None]]] = {
    "vqa": (_what, _how_many, _where, _is_there, _is_filled, _which_way),
    "ocr_vqa": (_digit_at, _written, _greatest, _digit_that_is),
    "gqa": (
        *(_is_beside, _is_more, _which_is_more, _is_same, _are_more, _beside, _like_the_one_beside),
        *(_is_both, _is_on_side),
    ),
}


def _there(thing: Thing) -> str:
    """A thing by its place, for questions that do not ask for names: small encoders tell places before names."""
    return f"the thing in the {thing.place}"


def _yes(value: int | bool) -> str:
    return "yes" if value else "no"


def _neighbours(facts: Facts, thing: Thing) -> list[tuple[str, Thing | None]]:
    """The two quarters that share an edge with a thing's: on which side of it they lie, and what is there."""
    return [
        (SIDES[0][1 - thing.row], facts.at(1 - thing.row, thing.column)),
        (SIDES[1][1 - thing.column], facts.at(thing.row, 1 - thing.column)),
    ]


def _unequal(facts: Facts, dice: Dice) -> tuple[str, Thing, Thing] | None:
    """A random pair of things that differ in size or brightness, in random order, and in what they differ."""
    found = [
        (field, first, second)
        for field in _ORDERED
        for first in facts.things
        for second in facts.things
        if getattr(first, field) != getattr(second, field)
    ]
    return dice.pick(found) if found else None


def _groups(facts: Facts) -> list[tuple[str, int]]:
    """Three pairs of opposite groups, and how many things are of each."""
    words = (("kind", DIGIT, FRACTAL), ("size", *SIZES), ("brightness", *BRIGHTNESSES))
    return [
        (f"{word}{'s' if field == 'kind' else ' things'}", sum(getattr(thing, field) == word for thing in facts.things))
        for field, *both in words
        for word in both
    ]
