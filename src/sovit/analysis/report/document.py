"""A report as data: sections of paragraphs, lists, tables and figures, written out as HTML, Markdown and JSON alike.

The three are made from one `Document`, so they cannot say different things. All text in it is plain and still to be
escaped; `document` makes what is hidden in it visible, for run ids, reasons and configurations are untrusted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from sovit.analysis.report.words import visible

SCHEMA = 1


@dataclass(frozen=True)
class Cell:
    """What stands in a table's cell, and the ``value`` behind it for the JSON twin (the text, if None).

    ``tone``: "", "soft", "good", "doubt" or "bad"; ``code``: a name to be copied, such as a run id.
    """

    text: str
    value: Any = None
    tone: str = ""
    code: bool = False


@dataclass(frozen=True)
class Column:
    key: str
    title: str
    numeric: bool = False


@dataclass(frozen=True)
class Table:
    """``stacks``: on a phone every row becomes a card instead of scrolling sideways. ``folded``: behind a click."""

    kind: ClassVar[str] = "table"
    key: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""
    stacks: bool = False
    folded: str = ""


@dataclass(frozen=True)
class Paragraph:
    kind: ClassVar[str] = "paragraph"
    text: str
    tone: str = ""


@dataclass(frozen=True)
class Bullets:
    kind: ClassVar[str] = "bullets"
    items: tuple[Cell, ...]
    title: str = ""


@dataclass(frozen=True)
class Commands:
    """Lines for a shell, made of known words and checked names only."""

    kind: ClassVar[str] = "commands"
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Figure:
    """Panels drawn elsewhere: (name, what is to be seen, in words). ``legend``: (class of its mark, label)."""

    kind: ClassVar[str] = "figure"
    key: str
    caption: str
    panels: tuple[tuple[str, str], ...]
    legend: tuple[tuple[str, str], ...] = ()


Block = Table | Paragraph | Bullets | Commands | Figure


@dataclass(frozen=True)
class Section:
    key: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Document:
    """``answer``: the verdict in sentences; ``first``: what stands beneath it on the first screen."""

    kind: str
    title: str
    lead: str
    answer: tuple[Cell, ...]
    first: tuple[Block, ...]
    sections: tuple[Section, ...]


def document(
    kind: str, title: str, lead: str, answer: Sequence[Cell], first: Iterable[Block | None], sections: Iterable[Section]
) -> Document:
    """A document without empty sections and without hidden characters."""
    kept = tuple(section for section in sections if section.blocks)
    made = Document(kind, title, lead, tuple(answer), tuple(block for block in first if block), kept)
    return _visible(made)


def section(key: str, title: str, *blocks: Block | None) -> Section:
    """A section of those blocks that there are."""
    return Section(key, title, tuple(block for block in blocks if block))


def table(
    key: str,
    columns: Sequence[Column],
    rows: Iterable[Sequence[Cell | str]],
    caption: str = "",
    *,
    stacks: bool = False,
    folded: str = "",
) -> Table | None:
    """A table, or None without rows. A plain string is a cell of that text."""
    cells = tuple(tuple(cell if isinstance(cell, Cell) else Cell(cell) for cell in row) for row in rows)
    return Table(key, tuple(columns), cells, caption, stacks, folded) if cells else None


def bullets(items: Iterable[Cell | str], title: str = "") -> Bullets | None:
    """A list, or None without items."""
    cells = tuple(item if isinstance(item, Cell) else Cell(item) for item in items)
    return Bullets(cells, title) if cells else None


def pairs(key: str, rows: Iterable[tuple[Cell | str, Cell | str]], caption: str = "", folded: str = "") -> Table | None:
    """A table of names and values."""
    return table(key, (Column("name", ""), Column("value", "")), rows, caption, stacks=True, folded=folded)


def as_json(document: Document) -> dict[str, Any]:
    """The document as plain values: every table a list of rows by column key, numbers as numbers where there are any.

    Tables and figures of the first screen stand under the section "answer".
    """
    first = Section("answer", "", document.first)
    return {
        "schema": SCHEMA,
        "kind": document.kind,
        "title": document.title,
        "lead": document.lead,
        "answer": [cell.text for cell in document.answer],
        "sections": {part.key: _section_json(part) for part in (first, *document.sections)},
    }


def _section_json(part: Section) -> dict[str, Any]:
    found: dict[str, Any] = {"title": part.title, "text": [], "tables": {}, "figures": {}}
    for block in part.blocks:
        if isinstance(block, Paragraph):
            found["text"].append(block.text)
        elif isinstance(block, Bullets):
            found["text"] += [item.text for item in block.items]
        elif isinstance(block, Commands):
            found["text"] += block.lines
        elif isinstance(block, Table):
            keys = [column.key for column in block.columns]
            found["tables"][block.key] = {
                "columns": {column.key: column.title for column in block.columns},
                "caption": block.caption,
                "rows": [{key: _value(cell) for key, cell in zip(keys, row, strict=True)} for row in block.rows],
            }
        else:
            found["figures"][block.key] = {"caption": block.caption, "shows": [shows for _, shows in block.panels]}
    return {key: value for key, value in found.items() if value}


def _value(cell: Cell) -> Any:
    return cell.text if cell.value is None else cell.value


def _visible(item: Any) -> Any:
    """A copy with `words.visible` applied to every string, keys of the JSON twin included."""
    if isinstance(item, str):
        return visible(item)
    if isinstance(item, tuple | list):
        return type(item)(_visible(part) for part in item)
    if isinstance(item, dict):
        return {_visible(key): _visible(part) for key, part in item.items()}
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        return type(item)(**{f.name: _visible(getattr(item, f.name)) for f in dataclasses.fields(item)})
    return item
