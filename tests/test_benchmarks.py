"""The benchmarks run: nothing else calls them, so what they reach into could change without a word."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def run(tmp_path: Path, name: str, *options: str) -> str:
    """What a benchmark prints, run in an empty folder with a cache of its own."""
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "WANDB_MODE": "disabled"}
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *options]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_contestant_of_a_step_is_timed(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    said = run(tmp_path, "throughput", "--seconds=0", "--block-s=0.01", "--shapes=32x1x128", f"--json={out}")
    [row] = json.loads(out.read_text())["rows"]
    assert row["turns"] == 5
    assert row["step_ms"].keys() == {"run", "timm", "timm_fused", "timm_loop", "update"}
    assert min(row["step_ms"].values()) > 0 and row["peak_flops"] > 0 and 0 < row["utilisation"]["median"] < 1
    assert sum(row["phases"].values()) == pytest.approx(1)
    assert said.count("| 32x1x128 |") == 2  # speeds, and phases


def test_without_memory_for_all_two_contestants_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First timm's default goes, then the run; below two copies nothing is measured."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import throughput

    pages = {"SC_PAGE_SIZE": 1, "SC_AVPHYS_PAGES": 0}
    monkeypatch.setattr(throughput.os, "sysconf", pages.__getitem__)
    options = type(
        "Options", (), {"device": "cpu", "batch": None, "precision": None, "threads": 1, "micro_batch": None}
    )
    cfg = throughput.configuration("32x1x128", options)
    weights = sum(throughput.num_params(throughput.shape_of(cfg), **throughput.model_geometry(cfg)).values())
    found = []
    for copies in (4, 3, 2):
        pages["SC_AVPHYS_PAGES"] = int(weights * (20 * copies - 4) / 0.8) + 1
        found.append(throughput.fitting("32x1x128", options))
    assert found == [((), None), (("timm",), None), (("timm", "run"), None)]
    pages["SC_AVPHYS_PAGES"] //= 2
    assert throughput.fitting("32x1x128", options)[1].startswith("two copies need")


def test_a_cell_is_taken_apart(tmp_path: Path) -> None:
    found = json.loads(
        run(tmp_path, "throughput", "--cell", "shape=16x1x16", "durations.values=[4 steps]").partition("\n")[2]
    )
    assert {"forward", "backward", "evaluation", "resume points"} <= found["shares"].keys()
    assert sum(found["shares"].values()) == pytest.approx(1)


def test_several_cells_at_once_are_timed(tmp_path: Path) -> None:
    said = run(tmp_path, "many", "--shapes=32x1x128", "--at-once=1,2", "--seconds=0.2", "--rounds=1")
    assert said.count("| 32x1x128 |") == 2
