"""The report's page, its twins, and what a browser makes of them.

The tests that need Chromium drive a headless one over a pipe (DevTools protocol, messages ended by NUL), so that no
other package is needed; they are skipped where there is none.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import fcntl
import hashlib
import json
import math
import os
import re
import select
import shutil
import signal
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markdown_it import MarkdownIt

from sovit.analysis.forecast.diagonal import fit_diagonal
from sovit.analysis.grid import fit_grid
from sovit.analysis.points import Point, load_points
from sovit.analysis.report import drawing, sections
from sovit.analysis.report import page as report
from sovit.analysis.report.contents import contents
from sovit.analysis.report.document import as_json
from sovit.analysis.report.words import visible
from sovit.analysis.star import fit_star
from sovit.flops import forward_gflops
from sovit.shape import Shape
from test_report import write_star

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>"
NAMES = (
    EVIL,
    '"><svg onload=alert(3)>',
    "' onmouseover='alert(4)",
    "javascript:alert(5)",
    "[x](javascript:alert(6)) ![y](http://evil.invalid/y.png) <http://evil.invalid>",
    "`| a | b |\n---|---\n# heading",
    "\x1b[31mred\x07\x00 \u202egnp.exe\u2066\u200b \ud800 \ufeff",
    "{{ 7 * 7 }} {% raw %} ${7*7} </style></title></svg>",
    "$(touch /tmp/pwned); `id` && rm -rf ~",
    "x" * 400,
)
HIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")


class Page(HTMLParser):
    """Tags, attributes, text, tables and headings as a parser of HTML sees them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.parts: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.sections: list[tuple[str, str]] = []  # heading, and all that follows it
        self._cell: list[str] | None = None
        self._heading = self._skip = False
        self.feed(text)
        self.text = " ".join(" ".join(self.parts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell = []
        elif tag == "h2":
            self._heading = True
            self.sections.append(("", ""))
        self._skip = tag in ("style", "caption") or (self._skip and tag not in ("table", "tbody", "p", "section"))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._cell is not None:
            self.tables[-1][-1].append(" ".join("".join(self._cell).split()))
            self._cell = None
        elif tag == "h2":
            self._heading = False
        elif tag in ("style", "caption"):
            self._skip = False

    def handle_data(self, data: str) -> None:
        self.parts.append(data)
        if self._cell is not None and not self._skip:
            self._cell.append(data)
        if self.sections:
            heading, rest = self.sections[-1]
            self.sections[-1] = (heading + data, rest) if self._heading else (heading, rest + data)


def rendered(markdown: str) -> Page:
    """The Markdown twin as a reader's renderer shows it, one that lets HTML pass and makes links."""
    return Page(MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("page") / "star_tiny"
    write_star(directory)
    return directory


@pytest.fixture(scope="module")
def _star(sweep: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    points, exclusions = load_points(sweep, "fractals", 10)
    found = fit_star(points, sweep="star_tiny", dataset="fractals", shots=10, exclusions=exclusions).as_dict()
    found["forecast"] = FORECAST
    found["checks"] = [
        {"check": "quasiconvexity", "dimension": "width", "verdict": "holds", "sentence": "no dip", "p": 0.41},
        {"check": "held out", "dimension": "depth", "verdict": "fails", "sentence": "3.1% above", "p": 0.0004},
    ]
    return json.loads(json.dumps(found, allow_nan=False)), report.read_runs(sweep)


@pytest.fixture
def star(_star: tuple[dict[str, Any], list[dict[str, Any]]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    return copy.deepcopy(_star)


FORECAST: dict[str, Any] = {
    "kind": "prediction", "rule": "paper", "t_gflops": 2560.0, "budget": "10 times the largest",
    "origin": {"width": 24.0, "depth": 2.0, "mlp_dim": 64.0, "t0_gflops": 45.0, "share": 0.58},
    "exponents": {
        arm: {"estimate": 0.3, "lo": 0.2, "hi": 0.4, "split": 1 / 3, "growth": 0.1} for arm in ("width", "depth", "mlp_dim")
    },
    "step": None, "optimum": {"width": 27.01, "depth": 3.34, "mlp_dim": 116.2},
    "region": {"level": 0.95, "box": {"width": {"lo": 24.5, "hi": 46.4}, "depth": {"lo": 2.6, "hi": None}}},
    "extrapolation": {"factor": 9.6, "fit": "star_tiny"}, "regret_by": "by the laws of the star",
    "candidates": [
        {"width": 24, "depth": 3, "mlp_dim": 112, "heads": [[6, 4]], "num_params": 52336, "forward_gflops": 0.0385,
         "images": 66453, "regret": 0.045, "label": "the rule, rounded"},
    ],
    "notes": ["the origin is taken as it is"],
}  # fmt: skip


def whole_points(shapes: list[tuple[int, int, int]], times: tuple[float, ...]) -> list[Point]:
    """Points of a law whose best shape grows with compute, with a little noise that the run shares."""
    rng = np.random.default_rng(5)
    points = []
    for width, depth, mlp_dim in shapes:
        luck = 0.01 * rng.standard_normal()
        for t in times:
            images = t / forward_gflops(Shape(width, depth, mlp_dim, 1, 8), 16, channels=1, pool="avg", num_classes=256)
            error = 4.9 * width**-1.2 + 0.12 / depth + 1.85 * mlp_dim**-0.8 + 25 * images**-0.4 + 0.03
            error *= math.exp(luck + 0.005 * rng.standard_normal())
            name = f"sweep-w{width:04d}-d{depth:02d}-m{mlp_dim:04d}-h04-p08-s0"
            points.append(Point(name, width, depth, mlp_dim, 0, t, f"{t:g} gflops", error, 0.006, 3))
    return points


def grid_fit() -> dict[str, Any]:
    shapes = [(w, d, m) for w in (16, 24, 32, 48) for d in (1, 2, 3, 4) for m in (32, 64, 128, 256)]
    points = whole_points(shapes, (16.0, 23.0, 32.0, 45.0))
    return fit_grid(points, sweep="grid_tiny", dataset="fractals", shots=10).as_dict()


def diagonal_fit() -> dict[str, Any]:
    shapes = [(12, 1, 32), (16, 2, 48), (20, 2, 76), (24, 3, 116), (32, 4, 180), (40, 6, 276)]
    points = whole_points(shapes, (45.0, 64.0, 91.0, 128.0, 181.0, 256.0))
    return fit_diagonal(points, sweep="diagonal_tiny", dataset="fractals", shots=10).as_dict()


def joint_fit() -> dict[str, Any]:
    """As the contract has it, so that no fit of nine parameters is waited for."""
    points = whole_points([(16, 1, 32), (24, 2, 64), (32, 3, 128)], (45.0, 91.0))
    rows = [vars(point) | {"sweep": "a", "used": True, "why_not": None} for point in points]
    rows[0] |= {"used": False, "why_not": "error 0.7 is above the cut-off 0.6"}
    s = {"estimate": 0.2, "lo": 0.15, "hi": 0.26, "method": "REML"}
    sizes = {"width": 40.0, "depth": 2.8, "mlp_dim": 140.0}
    optimum = [{"t_gflops": 91.0 * k, "factor": float(k), **{n: v * k**0.2 for n, v in sizes.items()}} for k in (1, 10)]
    return {
        "schema": 1, "kind": "joint", "law": "flops", "sweeps": ["a", "b"], "metric": {"dataset": "fractals", "shots": 10},
        "level": 0.95, "parameters": {"alpha_width": 5.5, "c": 0.4}, "exponents": dict.fromkeys(sizes, s), "why": None,
        "geometry": {"image_size": 16, "patch_size": 8}, "sigma": 0.01, "tau": 0.012, "num_runs": 3, "jackknife": None,
        "optimum": optimum,
        "held_out": {"fitted_up_to": 45.0, "t_gflops": [91.0, 91.0], "num_points": 3, "rms": 0.014, "bias": 0.001},
        "flags": [], "warnings": ["a warning"], "points": rows, "excluded": [{"run_id": "r", "reason": "failed: memory"}],
    }  # fmt: skip


OTHERS = {"grid": grid_fit, "diagonal": diagonal_fit, "joint": joint_fit}


@pytest.fixture(scope="module")
def others() -> dict[str, dict[str, Any]]:
    return {kind: json.loads(json.dumps(made(), allow_nan=False)) for kind, made in OTHERS.items()}


@pytest.fixture(scope="module")
def written(
    tmp_path_factory: pytest.TempPathFactory, _star: tuple[dict[str, Any], list[dict[str, Any]]], others: dict
) -> dict[str, Path]:
    """Kind -> directory of a written report."""
    out = tmp_path_factory.mktemp("reports")
    report.write_report(*_star, out / "star")
    for kind, fit in others.items():
        report.write_report(fit, [], out / kind)
    return {kind: out / kind for kind in ("star", *others)}


def hostile(star: tuple[dict[str, Any], list[dict[str, Any]]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Every place a report takes text from, filled with names that try something."""
    fit, runs = star
    del fit["arms"]["mlp_dim"]  # two arms hold every kind of name, and drawing takes time
    fit["points"] = [point for point in fit["points"] if point["arm"] != "mlp_dim"]
    rename = {}
    for k, run in enumerate(runs):
        rename[run["run_id"]] = f"{k} {NAMES[k % len(NAMES)]}"
        run |= {"run_id": rename[run["run_id"]], "reason": NAMES[-k % len(NAMES)], "code_version": NAMES[k % 3]}
        run["config"]["optim"]["name"] = NAMES[k % len(NAMES)]
        run["config"][EVIL] = EVIL
        run["sweep"] = run["status"] = EVIL
    for k, point in enumerate(fit["points"]):
        point["run_id"] = rename[point["run_id"]]
        if not point["used"]:
            point["why_not"] = NAMES[k % len(NAMES)]
    fit["excluded"] = [{"run_id": name, "reason": name} for name in NAMES]
    fit["warnings"] = list(NAMES)
    fit["fit"] |= {"law": EVIL, "loss": EVIL, "bounds": {EVIL: [EVIL, None]}}
    fit["arms"]["width"] |= {"identified": False, "why": EVIL, "flags": [EVIL]}
    fit["metric"]["dataset"] = "<script>$x$"
    fit["sweep"] = "star_tiny</title><script>alert(7)</script>; rm -rf ~"
    fit["checks"] = [{"check": EVIL, "dimension": EVIL, "verdict": EVIL, "sentence": name, "p": EVIL} for name in NAMES]
    fit["forecast"] = copy.deepcopy(FORECAST) | {"notes": list(NAMES), "budget": EVIL, "regret_by": EVIL}
    fit["forecast"]["candidates"][0]["label"] = EVIL
    fit["command"] = ["sovit", "fit", "$(reboot)"]
    return fit, runs


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory, _star: tuple[dict[str, Any], list[dict[str, Any]]]) -> Path:
    return report.write_report(*hostile(copy.deepcopy(_star)), tmp_path_factory.mktemp("attacked")).parent


def test_hostile_names_stay_text_in_the_page(attacked: Path) -> None:
    page = Page((attacked / report.PAGE).read_text(encoding="utf-8"))
    assert not set(page.tags) & {"script", "img", "iframe", "link", "object", "a href", "base", "form"}
    assert not any(name.startswith("on") or name == "style" for name, _ in page.attributes)
    targets = [value for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert targets and all(value.startswith("#") for value in targets)
    assert page.text.count(EVIL) > 20 and "javascript:alert(5)" in page.text  # shown, not dropped
    assert page.tags.count("title") - sum("svg" in tag for tag in page.tags[:0]) >= 1


def test_hostile_names_stay_text_in_the_twins(attacked: Path) -> None:
    """A renderer of Markdown that lets HTML pass must find none, no link, and no image but the report's own."""
    page = rendered((attacked / report.MARKDOWN).read_text(encoding="utf-8"))
    assert not set(page.tags) & {"script", "a", "svg", "h3", "iframe"}
    assert [value for name, value in page.attributes if name in ("src", "href")] == [report.FIGURE]
    assert page.tags.count("h1") == 1
    assert EVIL in page.text and "[x](javascript:alert(6))" in page.text
    found = json.loads((attacked / report.JSON).read_text(encoding="utf-8"))
    assert EVIL in json.dumps(found["sections"]["left_out"])


@pytest.mark.parametrize("name", [report.PAGE, report.MARKDOWN, report.JSON])
def test_nothing_hidden_reaches_a_report(attacked: Path, name: str) -> None:
    """Controls and bidi overrides would show one name and mean another; lone surrogates cannot even be written."""
    text = (attacked / name).read_text(encoding="utf-8")
    text = json.dumps(json.loads(text), ensure_ascii=False) if name == report.JSON else text
    assert not HIDDEN.search(text)
    assert "[U+202E]gnp.exe" in (text if name != report.MARKDOWN else rendered(text).text)


def test_text_that_is_hidden_becomes_visible_and_other_scripts_stay() -> None:
    assert visible("a\u202eb\x00\u2066") == "a[U+202E]b[U+0000][U+2066]"
    assert visible("two\nlines\tand\xa0more") == "two lines and more"
    assert visible("größe 幅 مدى ± ≤") == "größe 幅 مدى ± ≤"


def test_no_name_from_a_file_becomes_a_command(star: tuple) -> None:
    fit, runs = hostile(star)
    lines, notes = sections.commands(fit, runs)
    assert all(re.fullmatch(r"[A-Za-z0-9_./ =+-]+", line) for line in lines)
    assert lines[-1] == ".venv/bin/sovit fit runs/NAME --shots 10"
    assert any("rm -rf ~" in note for note in notes)


def test_the_commands_reproduce_the_sweep_that_was_fitted(star: tuple) -> None:
    fit, runs = star
    assert sections.commands(fit, runs)[0] == [
        "git checkout 0123456789ab", "make setup", ".venv/bin/sovit run sweeps/star_tiny.yaml",
        ".venv/bin/sovit fit runs/star_tiny --dataset fractals --shots 10",
    ]  # fmt: skip
    runs[0] |= {"seed": 1, "code_version": "0.1.0+0123456789ab+"}
    lines, notes = sections.commands(fit, runs)
    assert [line for line in lines if "run" in line.split()] == [
        ".venv/bin/sovit run sweeps/star_tiny.yaml seed=0", ".venv/bin/sovit run sweeps/star_tiny.yaml seed=1",
    ]  # fmt: skip
    assert "2 versions" in notes[0] and "no commit holds" in notes[1]
    for run in runs:
        run["simulated"] = {"law": {}}
    assert sections.commands(fit, runs)[0] == [".venv/bin/sovit fit runs/star_tiny --dataset fractals --shots 10"]


@pytest.mark.parametrize("kind", ["star", *OTHERS])
def test_the_page_allows_its_own_style_sheet_and_nothing_else(written: dict[str, Path], kind: str) -> None:
    text = (written[kind] / report.PAGE).read_text()
    page = Page(text)
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    sheet = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert len(sheet) == 1
    digest = base64.b64encode(hashlib.sha256(sheet[0].encode()).digest()).decode()
    assert f"default-src &#39;none&#39;; style-src &#39;sha256-{digest}&#39;".replace("&#39;", "'") in policy
    assert not any(name == "style" for name, _ in page.attributes)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {value[1:] for name, value in page.attributes if name == "href"} <= set(ids)
    assert (written[kind] / report.FIGURE).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", ["star", *OTHERS])
def test_the_twins_hold_the_tables_of_the_page(written: dict[str, Path], kind: str) -> None:
    """Cell by cell, as independent parsers read the three files."""
    page = Page((written[kind] / report.PAGE).read_text())
    twin = rendered((written[kind] / report.MARKDOWN).read_text())
    assert len(page.tables) > 4
    shown = [[row for row in table if any(row)] for table in page.tables]
    assert [[row for row in table if any(row)] for table in twin.tables] == shown
    found = json.loads((written[kind] / report.JSON).read_text())
    tables = [table for part in found["sections"].values() for table in part.get("tables", {}).values()]
    assert len(tables) == len(shown)
    numbers = 0
    for cells, table in zip(shown, tables, strict=True):
        rows = cells[-len(table["rows"]) :]
        for texts, row in zip(rows, table["rows"], strict=True):
            for text, value in zip(texts, row.values(), strict=True):
                if isinstance(value, str):
                    assert " ".join(value.split()) == text or text == ""  # a group's name stands once
                elif isinstance(value, float) and re.fullmatch(r"-?[\d,.]+", text):
                    assert float(text.replace(",", "")) == pytest.approx(value, rel=0.01, abs=0.006)
                    numbers += 1
    assert numbers > 20
    assert [heading for heading, _ in twin.sections] == [heading for heading, _ in page.sections]


@pytest.mark.parametrize("kind", ["star", *OTHERS])
def test_no_heading_stands_above_nothing(written: dict[str, Path], others: dict, star: tuple, kind: str) -> None:
    """With every optional block, and with all of them taken away."""
    full = Page((written[kind] / report.PAGE).read_text())
    fit = star[0] if kind == "star" else copy.deepcopy(others[kind])
    optional = "forecast checks frontier agreement origins noise held_out parameters geometry fit sigma"
    for key in optional.split():
        fit.pop(key, None)
    for winner in fit.get("winners", []):
        for key in ("share", "smooth", "smooth_share", "runners"):
            winner.pop(key, None)
    fit["points"] = [] if kind == "joint" else fit["points"]
    bare = Page(report.page(contents(fit, []), {}))
    for page in (full, bare):
        assert all(heading.strip() and rest.strip() for heading, rest in page.sections)
    taken = {heading for heading, _ in full.sections} - {heading for heading, _ in bare.sections}
    assert taken >= {
        "star": {"The forecast", "The doubts, tested"}, "grid": {"How sure the best shape is"},
        "diagonal": {"The largest budgets, predicted from the smaller"},
        "joint": {"The largest budgets, predicted from the smaller", "How it was fitted"},
    }[kind]  # fmt: skip


def test_a_fit_of_unknown_kind_is_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match="a fit of kind 'torus' has no report; known are star"):
        contents({"kind": "torus"}, [])


def test_every_point_left_out_stands_with_its_own_reason(written: dict[str, Path], star: tuple) -> None:
    fit, _ = star
    found = json.loads((written["star"] / report.JSON).read_text())["sections"]["left_out"]["tables"]
    unused = {(p["run_id"], p["t_gflops"], p["why_not"]) for p in fit["points"] if not p["used"]}
    assert {(row["run_id"], row["t_gflops"], row["why_not"]) for row in found["excluded_points"]["rows"]} == unused
    assert len(unused) > 5 and len(found["points"]["rows"]) == len(fit["points"])


def test_the_first_screen_names_what_failed_and_how_far_the_forecast_reaches(written: dict[str, Path]) -> None:
    found = json.loads((written["star"] / report.JSON).read_text())
    assert any(
        "27.0 (24.5 to 46.4) x 3.34 (2.60 to open) x 116" in said and "9.6 times" in said for said in found["answer"]
    )
    against = found["sections"]["answer"]["text"]
    assert "depth: 3.1% above" in against and not any("no dip" in said for said in against)
    assert any("What no statistic on these runs can see" in said for said in against)
    rows = found["sections"]["checks"]["tables"]["checks"]["rows"]
    assert [row["p"] for row in rows] == [0.41, 0.0004]


def test_the_document_of_the_checks_is_read_like_a_list_of_them(star: tuple) -> None:
    fit, runs = star
    rows = [
        {"check": "influence", "subject": "width", "verdict": "doubt", "statistic": "", "p": 0.01, "text": "one run"},
        {"check": "center", "subject": "depth", "verdict": "untested", "statistic": "", "p": None, "text": "too few"},
        {"check": "laws", "subject": "depth", "verdict": "no sign", "statistic": "", "p": 0.6, "text": "none better"},
    ]
    fit["checks"] = {"kind": "checks", "rows": rows, "num_tests": 2, "num_doubts": 1, "expected_by_chance": 0.1}
    found = as_json(contents(fit, runs))["sections"]
    assert found["checks"]["text"][0].startswith("2 tests with a p-value, of which about 0.10 would look doubtful")
    assert [row["sentence"] for row in found["checks"]["tables"]["checks"]["rows"]] == [
        "one run",
        "too few",
        "none better",
    ]
    assert "width: one run" in found["answer"]["text"]
    assert not {"depth: too few", "depth: none better"} & set(found["answer"]["text"])


def test_simulated_runs_say_so_before_anything_else(star: tuple) -> None:
    fit, runs = star
    runs[0]["simulated"] = {"law": {}}
    found = report.page(contents(fit, runs), {})
    assert Page(found).text.index("were simulated") < Page(found).text.index("One seed")
    assert "were simulated" in report.text(fit, runs)


def luminance(color: tuple[float, ...]) -> float:
    """Relative luminance of (r, g, b) in 0..255 (WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in color[:3])]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1])
def test_text_and_marks_stand_out_in_both_palettes(theme: int) -> None:
    colors = {name: tuple(bytes.fromhex(code[1:])) for name, code in drawing.palette()[theme].items()}
    for name, color in colors.items():
        if name not in ("back", "line", "grid"):
            least = 3 if "-" in name else 4.5
            assert contrast(color, colors["back"]) >= least, name
    assert len(set(drawing.palette()[0].values())) == len(colors)  # `svg` finds the name by the colour


# In a browser.

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (found := shutil.which(name))), ""
)
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine (apt-get install chromium)")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--mute-audio",
)  # fmt: skip
TEXTS = """(() => {
  const numbers = text => text.match(/[\\d.]+/g).map(Number);
  const back = node => { for (; node; node = node.parentElement) {
    const color = numbers(getComputedStyle(node).backgroundColor);
    if (color.length < 4 || color[3] > 0) return color; } return [255, 255, 255]; };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, element = node.parentElement;
    if (!node.nodeValue.trim() || !element.checkVisibility() || element.closest('[aria-hidden], title')) continue;
    const style = getComputedStyle(element);
    found.push([node.nodeValue.trim(), numbers(element.closest('svg') ? style.fill : style.color), back(element)]);
  }
  return found; })()"""


class Browser:
    """One page of a headless Chromium. ``events``: what it did since it was opened."""

    def __init__(self, profile: Path) -> None:
        self._session, self._next, self._buffer = "", 0, b""
        self.events: list[dict[str, Any]] = []
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
        (read, self._write), (self._read, write) = _pipe(), _pipe()
        quiet = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_WRONLY, 0) for number in (1, 2)]
        ends = [(os.POSIX_SPAWN_DUP2, read, 3), (os.POSIX_SPAWN_DUP2, write, 4)]  # it reads 3 and writes 4
        self._process = os.posix_spawn(CHROMIUM, command, os.environ, file_actions=[*quiet, *ends])
        os.close(read)
        os.close(write)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._next += 1
        message = {"id": self._next, "method": method, "params": params}
        os.write(
            self._write, json.dumps(message | ({"sessionId": self._session} if self._session else {})).encode() + b"\0"
        )
        while (answer := self._receive()).get("id") != self._next:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + 60
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "the browser does not answer"
            self._buffer += os.read(self._read, 1 << 20)
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def open(self, path: Path, *, width: int = 1280, dark: bool = False, media: str = "screen") -> None:
        """Load a file at a window size and in a colour scheme; wait until it is loaded."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 600
        )
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._receive())

    def evaluate(self, script: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def complaints(self) -> list[Any]:
        """Console messages, exceptions and dialogs, violations of the page's policy among them."""
        methods = (
            "Log.entryAdded",
            "Runtime.consoleAPICalled",
            "Runtime.exceptionThrown",
            "Page.javascriptDialogOpening",
        )
        return [event for event in self.events if event.get("method") in methods]

    def requests(self) -> set[str]:
        sent = (event for event in self.events if event.get("method") == "Network.requestWillBeSent")
        return {event["params"]["request"]["url"] for event in sent}

    def close(self) -> None:
        self._session = ""
        with contextlib.suppress(OSError, AssertionError):
            self.call("Browser.close")
        os.close(self._write)
        os.close(self._read)
        deadline = time.monotonic() + 20
        while os.waitpid(self._process, os.WNOHANG)[0] == 0:
            if time.monotonic() > deadline:
                os.kill(self._process, signal.SIGKILL)
            time.sleep(0.02)


def _pipe() -> tuple[int, int]:
    """(read, write), numbered above what the browser is to get them as."""
    ends = os.pipe()
    read, write = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return read, write


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = Browser(tmp_path_factory.mktemp("chromium"))
    yield found
    found.close()


@needs_chromium
@pytest.mark.parametrize("kind", ["star", *OTHERS])
def test_the_page_fits_a_phone_and_a_desk_and_asks_for_nothing(
    browser: Browser, written: dict[str, Path], kind: str
) -> None:
    path = written[kind] / report.PAGE
    for width in (360, 1280):
        browser.open(path, width=width)
        browser.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        assert browser.requests() == {path.resolve().as_uri()}
        assert browser.complaints() == []
    assert browser.evaluate("document.querySelectorAll('svg').length") == len(re.findall("<svg", path.read_text())) > 0
    first = "document.querySelector('.answer').getBoundingClientRect().bottom"
    assert browser.evaluate(first) < 800  # the answer is on the first screen


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_all_text_can_be_read_in_light_and_in_dark(browser: Browser, written: dict[str, Path], dark: bool) -> None:
    """Colours as the browser computes them; inside figures too, whose text must not be dark on dark."""
    browser.open(written["star"] / report.PAGE, dark=dark)
    browser.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    found = browser.evaluate(TEXTS)
    assert len(found) > 700 and any(text == "exponent s" for text, _, _ in found)
    assert all((luminance(tuple(back)) < 0.1) is dark for _, _, back in found)
    poor = [(text, color) for text, color, back in found if contrast(tuple(color), tuple(back)) < 4.5]
    assert poor == []


@needs_chromium
def test_hostile_names_do_nothing_in_a_browser(browser: Browser, attacked: Path) -> None:
    path = attacked / report.PAGE
    browser.open(path, width=360)
    browser.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert browser.complaints() == [] and browser.requests() == {path.resolve().as_uri()}
    assert browser.evaluate("document.querySelectorAll('script, img, [onload], [onerror], [onmouseover]').length") == 0
    assert browser.evaluate("document.title") == "star_tiny</title><script>alert(7)</script>; rm -rf ~ · sovit"
    assert browser.evaluate("document.documentElement.scrollWidth") <= 360
    assert EVIL in browser.evaluate("document.body.innerText")


@needs_chromium
def test_print_is_dark_on_white_and_hides_nothing(browser: Browser, written: dict[str, Path]) -> None:
    browser.open(written["star"] / report.PAGE, dark=True, media="print")
    found = browser.evaluate(TEXTS)
    assert all(back[:3] == [255, 255, 255] for _, _, back in found if back[:3] != [233, 237, 240])
    assert all(contrast(tuple(color), tuple(back)) >= 4.4 for _, color, back in found)
    cells = "[...document.querySelectorAll('details td')].filter(one => one.checkVisibility()).length"
    if browser.evaluate("CSS.supports('selector(details::details-content)')"):  # Chromium 131
        assert browser.evaluate(cells) > 300
