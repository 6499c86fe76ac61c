"""How the figures of a report look: palette for light and dark, axes, and matplotlib's figures as SVG and PNG.

A figure is drawn once, in the light palette. `svg` replaces each of its colours by a CSS variable with that colour to
fall back on, so the page decides, and turns style attributes into presentation attributes, so the page may forbid them.
matplotlib is loaded when the first figure is asked for.
"""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np

from sovit.analysis.report.words import visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LIGHT = {
    "ink": "#1f2933",
    "soft": "#52606d",
    "grey": "#636f7c",
    "line": "#d5dbe1",
    "grid": "#e9edf0",
    "back": "#fbfcfc",
    "accent": "#b4431f",
    "blue": "#1f6fb2",
    "good": "#1b7340",
    "doubt": "#8a5a00",
    "bad": "#b3261e",
}
DARK = {
    "ink": "#e4e8ec",
    "soft": "#a5b0bb",
    "grey": "#8a96a3",
    "line": "#38424c",
    "grid": "#232b32",
    "back": "#14181c",
    "accent": "#ff9d6e",
    "blue": "#6cb6f2",
    "good": "#6fd08f",
    "doubt": "#f0b94f",
    "bad": "#ff8f86",
}
# Ramps for ordered values: a colour map and the part of it that stands out from a light page, and from a dark one.
STEPS = 12
RAMPS = {"level": ("plasma", (0.0, 0.62), (0.42, 0.97)), "size": ("viridis", (0.02, 0.58), (0.42, 0.99))}
INK, SOFT, GREY, LINE, GRID, BACK, ACCENT, BLUE = (
    LIGHT[name] for name in ("ink", "soft", "grey", "line", "grid", "back", "accent", "blue")
)
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.edgecolor": GREY,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "text.color": INK,
    "text.parse_math": False,  # a $ in a name is a dollar
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.hashsalt": "sovit",  # the same figure gives the same bytes
    "svg.fonttype": "none",
}
_TICKS = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8)  # of the ticks in one decade of a log axis
_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
_TIPS = "tips:"  # the id of a drawn line whose marks carry words, see `tips`


@functools.cache
def palette() -> tuple[dict[str, str], dict[str, str]]:
    """(light, dark): colour by name; the ramps are level-0 .. level-11 and size-0 .. size-11, from low to high."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    light, dark = dict(LIGHT), dict(DARK)
    for ramp, (name, *ranges) in RAMPS.items():
        for theme, (low, high) in zip((light, dark), ranges, strict=True):
            places = np.linspace(low, high, STEPS)
            theme |= {f"{ramp}-{k}": to_hex(colormaps[name](float(place))) for k, place in enumerate(places)}
    return light, dark


def ramp(values: Sequence[Any], name: str = "level") -> dict[Any, str]:
    """Value -> name of its colour, evenly over the ramp in the order given."""
    if len(values) < 2:
        return {value: f"{name}-{STEPS // 3}" for value in values}
    return {value: f"{name}-{round(k * (STEPS - 1) / (len(values) - 1))}" for k, value in enumerate(values)}


def color(name: str) -> str:
    """The light colour of a name of the palette; `svg` finds the name again by it."""
    return palette()[0][name]


def style() -> Any:
    from matplotlib import rc_context

    return rc_context(STYLE)


def tips(texts: Iterable[str]) -> str:
    """A gid for a line of marks: each mark of it gets one of these texts, shown when pointed at."""
    return _TIPS + "\n".join(visible(text) for text in texts)


def png(figure: Figure, path: Path, dpi: int = 150) -> None:
    with style():
        figure.savefig(path, dpi=dpi, facecolor="white")


def svg(figure: Figure, name: str = "figure", label: str = "") -> str:
    """The figure as an <svg> element for a page: no header, date, style or background of its own.

    ``name`` tells its ids from those of other figures; ``label`` is what it shows, for who cannot see it.
    """
    buffer = io.StringIO()
    with style():
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(f'"{_TIPS}[^"]*"', lambda match: match[0].replace("\n", "&#10;"), text[text.index("<svg") :])
    root = ElementTree.fromstring(text)
    names = {hex_: f"var(--{key}, {hex_})" for key, hex_ in palette()[0].items()}
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{_SVG}metadata", f"{_SVG}style"):
                parent.remove(child)
    ids = {element.get("id"): f"{name}-{k}" for k, element in enumerate(root.iter()) if element.get("id")}
    used = {match for element in root.iter() for value in element.attrib.values() for match in _references(value)}
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        _clean(element, ids, used, names)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib |= {
        "xmlns": _SVG[1:-1],
        "role": "img",
        "aria-label": label,
        "font-family": "system-ui, sans-serif",
        "stroke-linejoin": "round",
    }
    return ElementTree.tostring(root, encoding="unicode")


def _references(value: str) -> list[str]:
    return [bare or in_url for bare, in_url in re.findall(r"^#([\w-]+)$|url\(#([\w-]+)\)", value)]


def _clean(element: Any, ids: dict[Any, str], used: set[str], names: dict[str, str]) -> None:
    """Presentation attributes instead of style, palette names instead of colours, ids of this figure, tips as titles."""
    if element.tag != "text":
        element.text = (element.text or "").strip()
        element.tail = ""
    own = element.attrib.pop("id", "")
    if own in used:
        element.set("id", ids[own])
    if own.startswith(_TIPS):
        texts = own.removeprefix(_TIPS).split("\n")
        marks = [mark for mark in element.iter() if mark.tag.removeprefix(_SVG) == "use"]
        for mark, words in zip(marks, texts, strict=False):
            ElementTree.SubElement(mark, f"{_SVG}title").text = words
    for key in list(element.attrib):
        if key == f"{_XLINK}href":
            element.set("href", element.attrib.pop(key))
    for part in element.attrib.pop("style", "").split(";"):
        key, _, value = (piece.strip() for piece in part.partition(":"))
        if key == "font":
            size = re.search(r"([\d.]+)px", value)
            element.attrib |= {"font-size": size[1]} if size else {}
            if re.search(r"\b(bold|[67]00)\b", value):
                element.set("font-weight", "600")
        elif key and key != "font-family":
            element.set(key, value)
    if re.match(r"rotate\(-?0 ", element.get("transform", "")):
        del element.attrib["transform"]
    for key, value in element.attrib.items():
        if value in names:
            element.set(key, names[value])
        elif key in ("d", "x", "y", "transform", "points"):
            element.set(key, re.sub(r"-?\d+\.\d{3,}", lambda match: f"{float(match[0]):.2f}", value))
        else:
            element.set(key, re.sub(r"#([\w-]+)", lambda match: f"#{ids.get(match[1], match[1])}", value))


def log_axis(axis: Any, low: float, high: float, *, among: Iterable[float] = (), top: float | None = None) -> None:
    """Log scale from low to high, ticks in plain numbers: at the values of ``among``, or at round ones."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    if low >= high:
        low, high = low / 1.1, high * 1.1
    round_ones = [step * 10.0**k for k in range(-9, 16) for step in _TICKS]
    ticks = [value for value in (list(among) or round_ones) if low <= value <= high and (not top or value <= top)]
    if len(ticks) < 2:
        ticks = [value for value in round_ones if low <= value <= high]
    kept: list[float] = []
    apart = math.log(high / low) / (12 if axis.axis_name == "y" else 5 if high > 20000 else 8)
    for tick in ticks:
        if not kept or math.log(tick / kept[-1]) > apart:
            kept.append(tick)
    (axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale)("log")
    (axis.axes.set_xlim if axis.axis_name == "x" else axis.axes.set_ylim)(low, high)
    axis.set_major_locator(FixedLocator(kept))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
