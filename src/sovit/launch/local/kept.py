"""The copy of a sweep file that lies beside its runs, so that two sweeps of one name do not end up in one analysis.

Two files are one sweep if they vary the same keys and fix the others to the same values; cells may be added. What was
given on the command line is not looked at: the hash of each run's configuration watches over that.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from sovit.launch.sweep import Sweep, SweepError

KEPT = "sweep.yaml"


def refuse_other(sweep: Sweep, directory: Path) -> None:
    """Raise SweepError if the runs in a directory are those of another sweep."""
    kept = directory / KEPT
    if not kept.exists():
        return
    there, here = _parameters(kept), _parameters(sweep.path)
    for key in dict.fromkeys([*here, *there]):
        if _fixed(there, key) != _fixed(here, key):
            raise SweepError(
                f"{directory} holds the runs of another sweep than {sweep.path} ({kept}: {_told(there, key)}; "
                f"here: {_told(here, key)}); give this one a name of its own (name=NEW)."
            )


def keep(sweep: Sweep, directory: Path) -> None:
    """Copy the sweep file beside its runs. Raises SweepError if another sweep was quicker, OSError if it cannot."""
    directory.mkdir(parents=True, exist_ok=True)
    content, kept = sweep.path.read_bytes(), directory / KEPT
    if kept.exists() and kept.read_bytes() == content:
        return
    handle, scratch = tempfile.mkstemp(prefix=f".{KEPT}.", dir=directory)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(scratch, 0o644)  # mkstemp makes files for one user; the directory may be a group's
        with suppress(OSError):  # there is one already, or a file system without hard links
            os.link(scratch, kept)  # unlike a rename, this never takes the place of a file
        refuse_other(sweep, directory)
        os.replace(scratch, kept)
    finally:
        with suppress(OSError):
            os.unlink(scratch)


def _parameters(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        document = None
    parameters = document.get("parameters") if isinstance(document, dict) else None
    if not isinstance(parameters, dict) or not all(isinstance(spec, dict) for spec in parameters.values()):
        raise SweepError(f"{path} is not a sweep file; delete it if it is the copy beside your runs.")
    return parameters


def _fixed(parameters: Mapping[str, Any], key: str) -> tuple[str, Any]:
    """What a sweep says of a key: nothing, that it varies, or its one value."""
    spec = parameters.get(key)
    return ("absent", None) if spec is None else ("fixed", spec["value"]) if "value" in spec else ("varied", None)


def _told(parameters: Mapping[str, Any], key: str) -> str:
    kind, value = _fixed(parameters, key)
    return {"absent": f"no {key}", "varied": f"{key} varies", "fixed": f"{key}: {value}"}[kind]
