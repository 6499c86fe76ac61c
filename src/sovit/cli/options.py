"""What several commands share: defaults and the types of arguments."""

from __future__ import annotations

import argparse

DEFAULT_METRIC = ("fractals", 10)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)
