"""Prompt templates for zero-shot classification, one a line: ``a photo of a {}.``

The class goes where ``{}`` is, as it stands; nothing is formatted, so that no name of a class can do harm. The classes
come from `sovit.data.sources.read_class_list`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

SLOT = "{}"


def read_templates(path: str | Path) -> tuple[str, ...]:
    """The lines of a text file. Raises ValueError if it cannot be read, or a line is no template or there twice."""
    try:
        lines = Path(path).expanduser().read_text("utf-8-sig").rstrip().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(f"The templates {path} cannot be read ({reason}); give a text file, one a line.") from None
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        template = " ".join(line.split())
        shown = ascii(template[:80]) if not template.isprintable() else f"'{template[:80]}'"
        if not template:
            raise ValueError(
                f"Line {number} of {path} is empty; drop it, or write a template such as 'a photo of a {{}}.'"
            )
        if template.count(SLOT) != 1:
            lacks = f"{template.count(SLOT)} places {{}}" if SLOT in template else "no place {}"
            raise ValueError(f"Line {number} of {path} is {shown}, which has {lacks} for the class; it needs one.")
        if re.search("[{}]", template.replace(SLOT, "")):
            raise ValueError(f"Line {number} of {path} is {shown}, which has other braces than {{}}; write {{}} alone.")
        if template in seen:
            raise ValueError(f"Lines {seen[template]} and {number} of {path} are the same, {shown}; drop one.")
        seen[template] = number
    return tuple(seen)


def prompts(templates: Sequence[str], name: str) -> list[str]:
    """Every template with the class in it."""
    return [template.replace(SLOT, name) for template in templates]
