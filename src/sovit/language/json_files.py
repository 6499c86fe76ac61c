"""JSON files of gigabytes, read without what nobody asked for.

The annotations of VQA hold four million answers with a number and a confidence each, the questions of GQA a program for
each; dropping these while parsing takes a third of the memory. An object of which nothing was asked for becomes its
(key, value) pairs, so that a key that is there twice is seen.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

TOP = frozenset({"images", "annotations", "questions"})  # lists that tell the layouts apart


class Entries(list[tuple[str, Any]]):
    """The (key, value) pairs of an object without a wanted key, to tell it from a list."""


def read_json(path: str, wanted: Collection[str]) -> Any:
    """What a file holds: of each object the wanted keys only, an object of an answer alone as that answer.

    Raises ValueError if it cannot be read or is not whole.
    """
    keep, intern = TOP | set(wanted), sys.intern

    def trimmed(pairs: list[tuple[str, Any]]) -> Any:
        found = {key: value for key, value in pairs if key in keep}
        if len(found) == 1 and "answer" in found:
            answer = found["answer"]
            return intern(answer) if type(answer) is str else answer  # few answers are given many times
        return found or Entries(pairs)

    try:
        with uncollected(), open(os.path.expanduser(path), encoding="utf-8-sig") as file:
            return json.loads(file.read(), object_pairs_hook=trimmed)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); give the path of a JSON file.") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; give a JSON file, unpacked.") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply to be one of the known layouts; give another file.") from None
    except ValueError as error:
        raise ValueError(f"{path} is no whole JSON file ({error}); get it again.") from None


@contextmanager
def uncollected() -> Iterator[None]:
    """Without Python's search for cycles: among millions of new objects it would take half of the time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def list_of(found: Any, key: str, path: str, expected: str) -> list[Any]:
    """The list under a key of the whole file. Raises ValueError, naming the layout that was expected."""
    if isinstance(found, dict) and type(found.get(key)) is list:
        return found[key]
    raise ValueError(f'{path} is not {expected}: it has no list "{key}"{_instead(found)}.')


def entries_of(found: Any, path: str, expected: str) -> list[tuple[str, Any]]:
    """The (key, value) pairs of a file that is one object keyed by ids. Raises ValueError as `list_of` does."""
    if isinstance(found, Entries) and found:
        return found
    raise ValueError(f"{path} is not {expected}: it is not one object keyed by ids{_instead(found)}.")


def _instead(found: Any) -> str:
    if isinstance(found, dict):
        return f", but {', '.join(sorted(found))}"
    keys = [key for key, _ in found[:3]] if isinstance(found, Entries) else []
    return f", but {', '.join(ascii(key)[1:-1][:40] for key in keys)}" if keys else ""
