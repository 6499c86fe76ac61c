"""Where an export goes: a name is free or may be replaced, and what appears under it is whole.

What is written lies in a hidden folder beside the place until it is complete, then it is moved there in one step. A killed
export leaves that folder, which the next one to the same place removes. Not here: what is written.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from sovit import claims, records
from sovit.config import ConfigError


def check(out: Path, *, folder: bool, overwrite: bool, own: Collection[str] = ()) -> None:
    """Raise ConfigError unless ``out`` can become a file or a ``folder``.

    ``own``: names in a folder that ``overwrite`` may take away with it, of which the first is always there; one that holds
    anything else is not replaced.
    """
    if not out.name:
        raise ConfigError(f"{out} has no name; give the export one.")
    if not out.parent.is_dir():
        raise ConfigError(f"{out.parent} is no folder; make it first.")
    if not (out.exists() or out.is_symlink()):
        return
    if not folder and out.is_dir():
        raise ConfigError(f"{out} is a folder; choose another name for the file.")
    if folder and not out.is_dir():
        raise ConfigError(f"{out} is a file; choose another name for the folder.")
    if not overwrite:
        raise ConfigError(f"{out} is there already; choose another name, or add --overwrite.")
    if folder:
        names = {entry.name for entry in out.iterdir()}
        foreign = sorted(names - set(own)) or ([] if next(iter(own)) in names or not names else sorted(names))
        if foreign:
            raise ConfigError(f"{out} holds {foreign[0]!a}, which is not of an export; choose another name.")


@contextmanager
def landing(out: Path) -> Iterator[Path]:
    """A path to write a file or a folder to, which is moved to ``out`` at the end; nothing is, if that raises.

    Raises ConfigError if another process writes to the same place.
    """
    work = out.with_name(f".{out.name}.export")
    new, old = work / "new", work / "old"
    try:
        with claims.hold(work):
            try:
                _remove(new)
                _remove(old)
                inner = new / out.name
                new.mkdir()
                yield inner
                _sync(inner)
                if out.is_dir():  # a folder cannot replace one that holds something
                    old.mkdir()
                    out.replace(old / out.name)
                inner.replace(out)
                records.sync_directory(out.parent)
            finally:
                _remove(work)
    except claims.Held as error:
        raise ConfigError(f"{error} Wait for it, or choose another name.") from None


def _sync(path: Path) -> None:
    """Make a file, or a folder of files, survive a power cut."""
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        with file.open("rb") as content:
            os.fsync(content.fileno())
    if path.is_dir():
        records.sync_directory(path)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
