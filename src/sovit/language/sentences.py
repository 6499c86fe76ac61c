"""Captions of an embedded scene: five, all true. Its questions are made by `sovit.language.questions`.

They differ in order, in wording and in how much they tell, as those of people do: two name every thing with its size,
brightness and place, three tell less.
"""

from __future__ import annotations

from collections.abc import Sequence

from sovit.language.facts import DIGIT, FRACTAL, Dice, Facts, Thing

NUMBERS = ("no", "one", "two", "three", "four")
OTHERS = {
    "upper left": "top left",
    "upper right": "top right",
    "lower left": "bottom left",
    "lower right": "bottom right",
}
SIDES = (("above", "below"), ("left of", "right of"))  # by axis, rows and columns, and place along it


def captions(facts: Facts, dice: Dice) -> tuple[str, ...]:
    """Five sentences of different templates and in random order."""
    whole = (_listed, dice.pick((_labelled, _placed)))
    part = (dice.pick((_counted, _by_kind)), dice.pick((_bare, _lit, _sized)))
    makers = (*whole, *part, _relation if len(facts.things) > 1 else _alone)
    return tuple(maker(facts, dice) for maker in dice.order(makers))


def _listed(facts: Facts, dice: Dice) -> str:
    return _joined([f"{_full(thing)} in the {thing.place}" for thing in dice.order(facts.things)])


def _labelled(facts: Facts, dice: Dice) -> str:
    return ", ".join(
        f"{OTHERS[thing.place]}: {thing.size} {thing.brightness} {thing.name}" for thing in dice.order(facts.things)
    )


def _placed(facts: Facts, dice: Dice) -> str:
    return "; ".join(f"in the {thing.place} is {_full(thing)}" for thing in dice.order(facts.things))


def _alone(facts: Facts, dice: Dice) -> str:
    (thing,) = facts.things
    sides = (f"on the {('left', 'right')[thing.column]}", f"in the {('upper', 'lower')[thing.row]} half")
    return f"just {_full(thing)} {dice.pick(sides)}"


def _relation(facts: Facts, dice: Dice) -> str:
    first, second = dice.order(facts.things)[:2]
    return f"{_full(first)} {dice.pick(_relations(first, second))} {_full(second)}"


def _counted(facts: Facts, dice: Dice) -> str:
    count = len(facts.things)
    return f"{NUMBERS[count]} thing{'s' * (count > 1)}: {_names(facts, dice)}"


def _by_kind(facts: Facts, dice: Dice) -> str:
    counts = [(len(facts.of_kind(kind)), kind) for kind in dice.order((FRACTAL, DIGIT))]
    return _joined([f"{NUMBERS[count]} {kind}{'s' * (count != 1)}" for count, kind in counts])


def _bare(facts: Facts, dice: Dice) -> str:
    return f"a picture of {_names(facts, dice)}"


def _lit(facts: Facts, dice: Dice) -> str:
    return _joined([f"a {thing.brightness} {thing.name}" for thing in dice.order(facts.things)])


def _sized(facts: Facts, dice: Dice) -> str:
    return _joined([f"a {thing.size} {thing.name}" for thing in dice.order(facts.things)])


def _names(facts: Facts, dice: Dice) -> str:
    return _joined([with_article(thing.name) for thing in dice.order(facts.things)])


def _full(thing: Thing) -> str:
    return f"a {thing.size} {thing.brightness} {thing.name}"


def with_article(name: str) -> str:
    return f"{'an' if name == '8' else 'a'} {name}"


def _joined(phrases: Sequence[str]) -> str:
    return " and ".join(part for part in (", ".join(phrases[:-1]), phrases[-1]) if part)


def _relations(first: Thing, second: Thing) -> list[str]:
    """What the first is to the second; of a diagonal pair both hold."""
    return [SIDES[axis][first.along(axis)] for axis in (0, 1) if first.along(axis) != second.along(axis)]
