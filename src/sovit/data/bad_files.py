"""Files that could not be used: each named once in a JSON-lines file beside the run's records, and counted.

A line is {"name": ..., "reason": ...}. The file is for the user; nothing in the run depends on it, so it
is not cut back by a resume, and several processes of a run write one file each.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path

from sovit.data.sources import Images

FILE = "bad_files.jsonl"
MOST = 10_000  # lines of the file; more are counted, but not named
_SAID = 5  # names that are printed as they are found


class BadFiles:
    """What one process has found unreadable, on top of what earlier processes of the run wrote down.

    ``directory`` None: nothing is written. A file that cannot be written is no reason to stop.
    """

    def __init__(self, directory: Path | None, rank: int = 0) -> None:
        self.path = None if directory is None else directory / (FILE if rank == 0 else f"bad_files-{rank}.jsonl")
        self.reasons = {} if directory is None else _read(directory)
        self.beyond = 0  # names that are not kept: at most so many files more
        self.told = ""  # the last summary the user was given
        self._said = 0
        self._listed: dict[tuple[str, str], tuple[int, int]] = {}  # source -> entries named, and counted beyond

    def note(self, name: str, reason: str) -> None:
        """Remember a file; says the first of them on standard error."""
        if name in self.reasons:
            return
        if len(self.reasons) >= MOST:
            self.beyond += 1
            return
        self.reasons[name] = reason
        if self._said < _SAID:
            self._said += 1
            print(f"{_shown(name)} cannot be used: {reason}.", file=sys.stderr, flush=True)
        if self.path is not None:
            with suppress(OSError), self.path.open("a") as file:
                file.write(json.dumps({"name": name, "reason": reason}) + "\n")

    def note_left_out(self, images: Images) -> None:
        """Remember what a source has left out since it was noted last, the listing of its files to begin with."""
        key, left_out = (images.where, images.fingerprint), images.left_out
        named, counted = self._listed.get(key, (0, 0))
        beyond = left_out.count - len(left_out.named)
        self._listed[key] = (len(left_out.named), beyond)
        for name, reason in left_out.named[named:]:
            self.note(f"{images.where}/{name}", reason)
        self.beyond += beyond - counted

    def summary(self, total: int) -> str | None:
        """One sentence such as "3 of 1,234 files could not be used: ...", or None if there were none."""
        if not self.reasons:
            return None
        shown = ", ".join(f"{_shown(name)} ({reason})" for name, reason in list(self.reasons.items())[:3])
        more = f", ... (all in {self.path})" if len(self.reasons) > 3 and self.path else ""
        at_least = "at least " if self.beyond else ""
        return f"{at_least}{len(self.reasons):,} of {total:,} files could not be used: {shown}{more}."


def _read(directory: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in sorted(directory.glob("bad_files*.jsonl"), key=lambda path: (len(path.name), path.name)):
        with suppress(OSError), path.open() as file:
            for line in file:
                with suppress(ValueError, KeyError, TypeError):  # cut off by a kill
                    row = json.loads(line)
                    found.setdefault(row["name"], row["reason"])
    return found


def _shown(name: str) -> str:
    return name if name.isprintable() else ascii(name)
