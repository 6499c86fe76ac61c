"""The notebooks run from top to bottom, leave nothing behind, and what they say of their own figures is true."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("[0-9]*.ipynb"))


def code_cells(path: Path) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a notebook as Jupyter would; returns its names, what it printed and what it displayed."""

    def execute(path: Path) -> tuple[dict[str, Any], str, list[str]]:
        shown: list[str] = []
        jupyter = ModuleType("IPython.display")  # comes with the notebook's server, not with sovit
        jupyter.SVG = jupyter.HTML = str  # type: ignore[attr-defined]
        jupyter.display = shown.append  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "IPython.display", jupyter)
        monkeypatch.chdir(FOLDER)
        before = sorted(FOLDER.rglob("*"))
        names: dict[str, Any] = {}
        for number, cell in enumerate(code_cells(path)):
            exec(compile("".join(cell["source"]), f"{path.name}, code cell {number}", "exec"), names)
        assert sorted(FOLDER.rglob("*")) == before
        printed = capsys.readouterr()
        assert not printed.err
        return names, printed.out, shown

    return execute


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_stores_no_output_and_defines_nothing(path: Path) -> None:
    """What a notebook defines nobody tests; it belongs into the package."""
    for cell in code_cells(path):
        assert cell["outputs"] == [] and cell["execution_count"] is None
        nodes = list(ast.walk(ast.parse("".join(cell["source"]))))
        assert not [node for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda)]


def test_the_star_notebook_holds_what_it_promises(run: Any) -> None:
    names, printed, shown = run(FOLDER / "01_star_sweep.ipynb")
    assert len(shown) == 2 and all("<svg" in figure for figure in shown)
    assert not names["STAR"].exists()
    assert len(re.findall(r"truth 0\.\d\d, fitted .* holds$", printed, re.M)) == 3
    by_run, by_point = (int(count) for count in re.findall(r"holds the truth in (\d+) of 100 arms", printed))
    assert by_run >= 90 > 80 >= by_point  # 95 within three standard errors; far too sure
    assert "star_tiny-w0064-d04-m0128-h04-p08-s0 lies" in printed  # the run that was broken
    even, uneven = re.findall(r"even +depth s = (\S+) .*warnings: 0$", printed, re.M)
    assert float(uneven) < 0.75 * float(even)
    scattered, *promised = (int(share) for share in re.findall(r"(?:by| runs +) ?(\d+)%", printed))
    base, durations, seeds, wide, narrow = promised
    assert base == pytest.approx(scattered, rel=0.25)
    assert durations >= 0.9 * base and seeds == pytest.approx(base / np.sqrt(2), rel=0.05) and wide < base
    assert narrow / base == pytest.approx(4, rel=0.1)


def tiny_gflops(width: float, depth: float, mlp_dim: float) -> float:
    """2 FLOP a multiply-add: 4 tokens of 64 pixels, blocks of 4 + 2 products and attention, a classifier of 256."""
    block = 4 * (8 * width**2 + 4 * width * mlp_dim) + 4 * 4**2 * width
    return (2 * 4 * 64 * width + depth * block + 2 * 256 * width) / 1e9


@pytest.mark.slow
def test_the_prediction_notebook_holds_what_it_promises(run: Any) -> None:
    """The truth's best shapes and the wasted shares by a search of its own, from the law as the notebook writes it."""
    names, printed, shown = run(FOLDER / "02_grid_and_prediction.ipynb")
    assert len(shown) == 3 and not names["RUNS"].exists()
    law = {"alpha": np.array([13, 0.065, 0.17]), "a": np.array([1.9, 0.73, 0.24]), "beta": 125.0, "c": 0.65}

    def excess(log_x: Any, t: float) -> float:
        x = np.exp(log_x)
        return float(law["alpha"] @ x ** -law["a"] + law["beta"] * (t / tiny_gflops(*x)) ** -law["c"])

    def least(t: float) -> Any:
        return minimize(excess, np.log([50, 7, 400]), (t,), "Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-13})

    rows = re.findall(r"^  (.+?) +width +([\d.]+) +depth +([\d.]+) +MLP +(\d+) +wastes +([\d.]+)%$", printed, re.M)
    assert [row[0] for row in rows] == 2 * ["paper's step", "fitted step", "flops law", "truth"]
    for number, (_, *sizes, wasted) in enumerate(rows):
        t, x = 256.0 * (10, 100)[number // 4], np.log([float(size) for size in sizes])
        spared = np.linspace(0, 0.9, 181)  # the share of t with which the best shape is as good
        reached = [least(t * (1 - share)).fun for share in spared]
        assert float(wasted) / 100 == pytest.approx(
            np.interp(excess(x, t), reached, spared), abs=0.01
        )  # sizes are printed rounded
    for paper, fitted, flops, truth in (rows[:4], rows[4:]):
        assert float(paper[-1]) > 4 * float(fitted[-1]) > 4 * float(flops[-1]) and float(truth[-1]) == 0
    for row, t in ((rows[3], 2560.0), (rows[7], 25600.0)):
        assert [float(size) for size in row[1:4]] == pytest.approx(np.exp(least(t).x), rel=2e-2)


def test_the_published_notebook_runs_and_shows_its_figures(run: Any) -> None:
    """Its rows for the published rule: one fitted number, t0 near 3.5e9 GFLOPs, So400m's depth a fifth too large."""
    _, printed, shown = run(FOLDER / "03_published_numbers.ipynb")
    assert len(shown) == 2 and all("<svg" in figure for figure in shown)
    rule = next(line for line in printed.splitlines() if re.match(r"t\^\(s/3\) .*1 fitted", line))
    assert re.search(r"t0 = 3\.[3-7]e\+09", rule) and "+20%" in rule
