"""``sovit vocabulary``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from typing import Any

from sovit.cli.options import positive

SAID = frozenset({"caption", "captions", "question", "questions", "answer", "answers"})  # keys of texts in JSON


def add(commands: argparse._SubParsersAction) -> None:
    vocabulary = commands.add_parser("vocabulary", help="a vocabulary of your own captions and questions")
    vocabulary.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="texts, one a line; or .json with captions, questions and answers, in whichever layout",
    )
    vocabulary.add_argument("-o", "--out", default="vocabulary.json", help="file to write (default: %(default)s)")
    vocabulary.add_argument(
        "--size", type=positive, default=8192, metavar="N", help="tokens at most (default: %(default)s)"
    )
    vocabulary.set_defaults(command=_vocabulary)


def _vocabulary(arguments: argparse.Namespace) -> int:
    from sovit.language.vocabulary import save, train

    if os.path.realpath(arguments.out) in [os.path.realpath(os.path.expanduser(name)) for name in arguments.files]:
        raise ValueError(f"{arguments.out} is one of the texts; write the vocabulary to another file with -o.")
    counts = {"texts": 0, "words": 0, "characters": 0}

    def counted() -> Iterator[str]:
        for name in arguments.files:
            before = counts["texts"]
            for text in _texts(name):
                counts["texts"] += 1
                counts["words"] += len(text.split())
                counts["characters"] += len(text)
                yield text
            if counts["texts"] == before:
                raise ValueError(f"{name} holds no text; give captions, one a line, or JSON with captions.")

    made = train(counted(), arguments.size)
    save(made, arguments.out)
    print(
        f"{counts['texts']:,} texts, {counts['words']:,} words, {counts['characters']:,} characters: "
        f"{made.size:,} tokens in {arguments.out}"
    )
    if made.size < arguments.size:
        print(f"The texts hold no more than that; --size {arguments.size} was asked for.")
    return 0


def _texts(path: str) -> Iterator[str]:
    """The texts of a file. Raises ValueError if it cannot be read."""
    if path.lower().endswith(".json"):
        from sovit.language.json_files import read_json

        yield from _said(read_json(path, SAID))
        return
    try:
        with open(os.path.expanduser(path), encoding="utf-8-sig") as file:
            yield from filter(None, map(str.strip, file))
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; give captions, one a line, or JSON with captions.") from None


def _said(found: Any) -> Iterator[str]:
    """The strings under a key of SAID, however deep."""
    left = [("", found)]
    while left:
        key, value = left.pop()
        if isinstance(value, str):
            if key in SAID and value.strip():
                yield value
        elif isinstance(value, dict):
            left += reversed(value.items())
        elif isinstance(value, list):
            left += ((key, one) for one in reversed(value))
        elif isinstance(value, tuple):  # (key, value) of an object keyed by ids
            left.append(value)
