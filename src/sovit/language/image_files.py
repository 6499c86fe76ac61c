"""Which file of a folder an entry of a JSON file means, and whether it may be read.

A name is text from somebody's file: one that leads out of the folder, by ``..``, as an absolute path or through a link,
is refused. Opens no image.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from functools import cached_property, lru_cache

from sovit.data.folders import ENDINGS

OUTSIDE = "its name leads out of the folder"
LINK = "it is a link that leads out of the folder"
MISSING = "there is no such file in the folder"
_NUMBER = re.compile(r"(?:.*_)?0*(\d{1,18})", re.DOTALL)  # COCO_train2014_000000000009 is image 9


class Refused(ValueError):
    """A name that gives no image; the message is the reason, in a few words."""


class ImageFolder:
    """The files below ``root``. Raises ValueError if that is no folder."""

    def __init__(self, root: str) -> None:
        if not os.path.isdir(root):
            raise ValueError(f"{root} is no folder; give the folder that the images lie in.")
        self.root = root
        self._real = os.path.realpath(root)
        self._leads_out = lru_cache(maxsize=4096)(self._leads_out_now)

    def place(self, name: object) -> tuple[str, int]:
        """(path below the folder, bytes) of the file of this name. Raises Refused."""
        if not isinstance(name, str) or not name or "\0" in name:
            raise Refused("it has no file name" if name in (None, "") else "its file name is no text")
        path = os.path.normpath(name)
        if os.path.isabs(path) or path == os.curdir or path.split(os.sep, 1)[0] == os.pardir:
            raise Refused(OUTSIDE)
        full = os.path.join(self.root, path)
        if self._leads_out(os.path.dirname(full)):
            raise Refused(LINK)
        try:
            found = os.lstat(full)
            leads_out = stat.S_ISLNK(found.st_mode) and self._leads_out_now(full)
            if stat.S_ISLNK(found.st_mode) and not leads_out:
                found = os.stat(full)
        except (OSError, ValueError):  # ValueError: a name that the file system has no bytes for
            raise Refused(MISSING) from None
        if leads_out:
            raise Refused(LINK)
        if not stat.S_ISREG(found.st_mode):
            raise Refused("it is no file")
        return path, found.st_size

    def first(self, names: Iterable[str]) -> tuple[str, int]:
        """`place` of the first of the names that is there. Raises Refused: the first reason that is not a missing file."""
        reasons = []
        for name in names:
            try:
                return self.place(name)
            except Refused as error:
                reasons.append(str(error))
        raise Refused(next((reason for reason in reasons if reason != MISSING), MISSING))

    def named(self, stem: str) -> tuple[str, int]:
        """The image STEM.jpg, or of another ending that images have. Raises Refused."""
        try:
            return self.first(f"{stem}{ending}" for ending in (".jpg", ".png", *ENDINGS[1:]))
        except Refused:
            if os.path.splitext(stem)[1].lower() in ENDINGS:  # a whole file name
                return self.place(stem)
            raise

    def numbered(self, number: int, part: str = "") -> tuple[str, int]:
        """The image whose name ends in a number, below the folder; of several, the one with ``part`` in its path.

        Raises Refused.
        """
        names = self._numbers.get(number, [])
        chosen = [name for name in names if part and part in name] or names
        if not chosen:
            raise Refused(MISSING)
        if len(chosen) > 1:
            raise Refused(f"it could be {chosen[0]} or {chosen[1]}")
        return self.place(chosen[0])

    @cached_property
    def _numbers(self) -> dict[int, list[str]]:
        """Number -> files; links to folders are not followed."""
        found: dict[int, list[str]] = {}
        for folder, inner, files in os.walk(self.root):
            inner.sort()
            for name in sorted(files):
                stem, ending = os.path.splitext(name)
                match = _NUMBER.fullmatch(stem) if ending.lower() in ENDINGS else None
                if match:
                    path = os.path.relpath(os.path.join(folder, name), self.root)
                    found.setdefault(int(match[1]), []).append(path)
        return found

    def _leads_out_now(self, path: str) -> bool:
        real = os.path.realpath(path)
        return real != self._real and not real.startswith(os.path.join(self._real, ""))
