"""Every caption and every answer is true: judged by reading the text, with the facts of the scene and nothing else."""

import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from sovit.language.examples import TASKS
from sovit.language.scenes import scenes

TRAIN = scenes("train", num=4000)
TEST = scenes("test", num=1500)
COUNT = {"no": 0, "one": 1, "two": 2, "three": 3, "four": 4}
SYNONYM = {"top": "upper", "bottom": "lower"}
DIGIT = re.compile(r"[0-9]")


# A reader of its own: a scene is a dictionary {(column, line): (name, size, brightness)}, as one would note it by hand.


def noted(facts):
    where = {"left": 0, "right": 1, "upper": 0, "lower": 1}
    scene = {}
    for thing in facts.things:
        line, column = thing.place.split()
        scene[where[column], where[line]] = (thing.name, thing.size, thing.brightness)
    return scene


def spot(line, column):
    return ("left", "right").index(column), ("upper", "lower").index(SYNONYM.get(line, line))


def place_of(scene, name):
    (place,) = [place for place, thing in scene.items() if thing[0] == name]
    return place


def holds(scene, first, relation, second):
    (x, y), (u, v) = first, second
    return {"left of": x < u, "right of": x > u, "above": y < v, "below": y > v}[relation]


def members(scene, group):
    tests = {
        "digits": lambda thing: DIGIT.fullmatch(thing[0]),
        "fractals": lambda thing: not DIGIT.fullmatch(thing[0]),
        "things": lambda thing: True,
    }
    test = tests.get(group) or (lambda thing: group.removesuffix(" things") in thing[1:])
    return sum(bool(test(thing)) for thing in scene.values())


ONE = r"(?:(small|large) )?(?:(dim|bright) )?(\w+)"


def caption_holds(scene, text):
    """Whether a caption is true, by what kind of sentence it is. Raises if it is of no kind."""
    names = sorted(thing[0] for thing in scene.values())
    if found := re.fullmatch(rf"just a {ONE} (?:on the (left|right)|in the (upper|lower) half)", text):
        size, light, name, side, half = found.groups()
        (((x, y), thing),) = scene.items()
        return (
            thing == (name, size, light)
            and side in (None, ("left", "right")[x])
            and half in (None, ("upper", "lower")[y])
        )
    if found := re.fullmatch(rf"a {ONE} (left of|right of|above|below) a {ONE}", text):
        *first, relation, size, light, name = found.groups()
        places = [place_of(scene, one[-1]) for one in (first, (size, light, name))]
        said = [(first[2], first[0], first[1]), (name, size, light)]
        return [scene[place] for place in places] == said and holds(scene, places[0], relation, places[1])
    if found := re.fullmatch(r"(\w+) (fractal|digit)s? and (\w+) (fractal|digit)s?", text):
        one, kind, two, other = found.groups()
        return kind != other and all(
            members(scene, f"{group}s") == COUNT[count] for count, group in ((one, kind), (two, other))
        )
    if found := re.fullmatch(r"(?:(\w+) things?: |a picture of )(.+)", text):
        count, rest = found.groups()
        said = [re.fullmatch(r"an? (\w+)", part)[1] for part in re.split(r", | and ", rest)]
        return sorted(said) == names and COUNT.get(count, len(said)) == len(said)
    complete = []
    for part in re.split(r", | and |; ", text):
        if found := re.fullmatch(rf"(?:in the )?(\w+) (left|right)(?: is a|:) {ONE}", part):
            line, column, size, light, name = found.groups()
        elif found := re.fullmatch(rf"a {ONE} in the (upper|lower) (left|right)", part):
            size, light, name, line, column = found.groups()
        else:
            size, light, name = re.fullmatch(rf"a {ONE}", part).groups()
            assert (size is None) != (light is None), text  # "a small moru", not "a moru"
            line = None
        thing = scene[place_of(scene, name)]
        if size not in (None, thing[1]) or light not in (None, thing[2]):
            return False
        if line is not None and scene.get(spot(line, column)) != (name, size, light):
            return False
        complete.append(name)
    return sorted(complete) == names


THERE = r"the thing in the (\w+) (\w+)"


def answer_to(scene, question):
    """The answer to a question. Raises if it is of no kind."""

    def at(name):
        return place_of(scene, name)

    def attributes(place):
        return scene[place][1:]

    def called(line, column):
        return scene[spot(line, column)][0]

    def yes(truth):
        return "yes" if truth else "no"

    def beyond(name, relation):
        (x, y), step = at(name), {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}[relation]
        place = x + step[0], y + step[1]
        assert place in [(0, 0), (0, 1), (1, 0), (1, 1)], question  # within the picture
        return place

    more = {"brighter": "bright", "dimmer": "dim", "larger": "large", "smaller": "small"}
    relation = "(left of|right of|above|below)"
    digits = [scene[x, y][0] for y in (0, 1) for x in (0, 1) if (x, y) in scene and DIGIT.fullmatch(scene[x, y][0])]
    rules = {
        r"what is in the (\w+) (\w+)\?": lambda a, b: scene.get(spot(a, b), ("nothing",))[0],
        r"how many (.+) are there\?": lambda a: str(members(scene, a)),
        r"where is the (\w+)\?": lambda a: f"{('upper', 'lower')[at(a)[1]]} {('left', 'right')[at(a)[0]]}",
        r"is there an? (\w+)\?": lambda a: yes(a in [thing[0] for thing in scene.values()]),
        r"is there anything in the (\w+) (\w+)\?": lambda a, b: yes(spot(a, b) in scene),
        r"is the (\w+) (\w+) or (\w+)\?": lambda a, b, c: next(word for word in attributes(at(a)) if word in (b, c)),
        r"which digit is in the (\w+) (\w+)\?": lambda a, b: DIGIT.fullmatch(scene[spot(a, b)][0])[0],
        r"which digits are written, line by line\?": lambda: " ".join(digits) or "none",
        r"which is the (highest|lowest) digit\?": lambda a: {"highest": max, "lowest": min}[a](digits),
        r"which digit is (\w+)\?": lambda a: only(name for name in digits if a in attributes(at(name))),
        rf"is the (\w+) {relation} the (\w+)\?": lambda a, b, c: yes(holds(scene, at(a), b, at(c))),
        rf"is {THERE} (\w+er) than {THERE}\?": lambda a, b, c, d, e: yes(
            ahead(called(a, b), more[c], called(d, e)) == called(a, b)
        ),
        r"which is (\w+er), the (\w+) or the (\w+)\?": lambda a, b, c: ahead(b, more[a], c),
        rf"are {THERE} and {THERE} of the same (size|brightness)\?": lambda a, b, c, d, e: yes(
            attributes(spot(a, b))[e == "brightness"] == attributes(spot(c, d))[e == "brightness"]
        ),
        r"are there more (.+) than (.+)\?": lambda a, b: yes(members(scene, a) > members(scene, b)),
        rf"what is directly {relation} the (\w+)\?": lambda a, b: scene.get(beyond(b, a), ("nothing",))[0],
        rf"is the thing directly {relation} the (\w+) (\w+) or (\w+)\?": lambda a, b, c, d: next(
            word for word in attributes(beyond(b, a)) if word in (c, d)
        ),
        rf"is {THERE} (small|large) and (dim|bright)\?": lambda a, b, c, d: yes(attributes(spot(a, b)) == (c, d)),
        r"is the (\w+) in the (\w+) half\?": lambda a, b: yes(
            b in (("left", "right")[at(a)[0]], ("upper", "lower")[at(a)[1]])
        ),
    }

    def only(values):
        (value,) = values
        return value

    def ahead(first, word, second):
        return only(name for name in (first, second) if word in attributes(at(name)))  # one of the two is, not both

    (answer,) = [rule(*match.groups()) for form, rule in rules.items() if (match := re.fullmatch(form, question))]
    return answer


# ---------------------------------------------------------------------------------------------------------- truth


@pytest.mark.parametrize("source", [TRAIN, TEST], ids=["train", "test"])
def test_every_caption_is_true(source):
    for row in range(len(source)):
        scene, captions = noted(source.facts(row)), source.captions(row)
        assert len(captions) == 5 and len(set(captions)) == 5
        for text in captions:
            assert caption_holds(scene, text), (scene, text)


@pytest.mark.parametrize("source", [TRAIN, TEST], ids=["train", "test"])
def test_every_answer_is_true(source):
    for question in source.questions:
        answer = answer_to(noted(source.facts(question.row)), question.text)
        assert Counter(question.answers).most_common(1)[0][0] == answer, question
    assert {question.task for question in source.questions} == set(TASKS[1:])


def test_the_reader_notices_a_false_caption_and_a_false_answer():
    """Swapping left with right, or small with large, makes most captions false."""
    scene = noted(TRAIN.facts(0))
    mirrored = {(1 - x, y): thing for (x, y), thing in scene.items()}
    other = {
        place: (name, "large" if size == "small" else "small", light) for place, (name, size, light) in scene.items()
    }
    for wrong in (mirrored, other):
        assert sum(not caption_holds(wrong, text) for text in TRAIN.captions(0)) >= 3
    assert answer_to({(0, 0): ("moru", "small", "dim")}, "where is the moru?") == "upper left"
    assert answer_to({(0, 1): ("7", "small", "dim")}, "what is directly above the 7?") == "nothing"


def test_answers_of_a_vqa_question_mean_the_same():
    same = {
        "top left": "upper left",
        "top right": "upper right",
        "bottom left": "lower left",
        "bottom right": "lower right",
    }
    same |= {word: str(number) for word, number in COUNT.items() if number} | {"zero": "0", "it is empty": "nothing"}
    for question in TRAIN.questions:
        assert len(question.answers) == (10 if question.task == "vqa" else 1)
        assert len({same.get(answer, answer) for answer in question.answers}) == 1


# ------------------------------------------------------------------------------------------------ nothing to guess


def template(text):
    return re.sub(
        r"(upper|lower) (left|right)", "PLACE", re.sub(r"\b(an? |the )(\w{4}|\d)\b(?! than)", r"\1NAME", text)
    )


def test_answers_cannot_be_guessed_from_the_questions():
    """The most common answer, in the train part, to a text; or to its template, if the text is rare."""
    by_text, by_template = defaultdict(Counter), defaultdict(Counter)
    for question in TRAIN.questions:
        by_text[question.text][question.answers[0]] += 1
        by_template[question.task, template(question.text)][question.answers[0]] += 1
    right = defaultdict(list)
    for question in TEST.questions:
        counts = by_text[question.text]
        if counts.total() < 10:
            counts = by_template[question.task, template(question.text)]
        right[question.task].append(counts.most_common(1)[0][0] == question.answers[0])
    assert all(np.mean(right[task]) < most for task, most in (("vqa", 0.45), ("ocr_vqa", 0.3), ("gqa", 0.5)))


def test_of_two_answers_both_are_as_likely_whatever_the_template():
    counts = defaultdict(Counter)
    for question in TRAIN.questions:
        if question.answers[0] in ("yes", "no"):
            counts[template(question.text)][question.answers[0]] += 1
    assert len(counts) > 10
    for text, both in counts.items():
        assert abs(both["yes"] - both.total() / 2) < 4 * (both.total() / 4) ** 0.5, (text, both)


def test_a_scene_has_two_questions_of_each_kind():
    counts = Counter((question.row, question.task) for question in TRAIN.questions)
    for task, least in (("vqa", 2), ("gqa", 2), ("ocr_vqa", 1)):
        assert {counts[row, task] for row in range(len(TRAIN))} == {least, 2}
    ids = [question.id for source in (TRAIN, TEST) for question in source.questions]
    assert len(ids) == len(set(ids))
    assert [question.row for question in TRAIN.questions] == sorted(question.row for question in TRAIN.questions)
