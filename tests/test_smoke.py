"""The shipped sweeps for real: every cell can be built, and the smoke star runs, survives a kill, and is fitted."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sovit import records
from sovit.config import REPOSITORY, compose
from sovit.derived import model_geometry, model_options, shape_of
from sovit.flops import num_params
from sovit.launch.sweep import load_sweep
from sovit.lit import engine
from sovit.lit.fit import build_model


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted((REPOSITORY / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_cell_of_every_sweep_builds_on_the_meta_device(file: Path) -> None:
    """The model of each cell, without memory: its parameters are those of the closed form."""
    for overrides in load_sweep(file).cells:
        cfg = compose(overrides)
        with torch.device("meta"):
            model = build_model(cfg)
        built = sum(parameter.numel() for parameter in model.parameters())
        assert built == sum(num_params(shape_of(cfg), **model_geometry(cfg), **model_options(cfg)).values())


def sovit(*arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "sovit.cli", *arguments],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: "subprocess.Popen[str]") -> str:
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 0, output
    return output


@pytest.mark.slow
def test_the_smoke_star_survives_a_kill_and_is_fitted(tmp_path: Path) -> None:
    """The whole way of a user: run, kill -9 of everything in the middle of a cell, run, run again, fit, fit again."""
    run = ("run", "sweeps/star_smoke.yaml", f"runs_dir={tmp_path}", "logger=none")
    killed = sovit(*run)
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("star_smoke/*/segment*.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    begun = [path.parent for path in tmp_path.glob("star_smoke/*/segment*.ckpt")]
    assert begun, "no cell was in the middle of its training"

    assert "all 7 cells are done" in finish(sovit(*run))
    assert "done already" in finish(sovit(*run))
    for directory in begun:
        assert "Going on from step" in (directory / records.LOG).read_text()
    record = records.read_run(begun[0])
    assert record is not None
    shape = f"shape={record['width']}x{record['depth']}x{record['mlp_dim']}"
    undisturbed = compose(["experiment=star_smoke", shape, "logger=none", f"runs_dir={tmp_path / 'undisturbed'}"])
    assert engine.run(undisturbed) == engine.OK
    assert (records.run_dir(undisturbed) / records.EVALS).read_bytes() == (begun[0] / records.EVALS).read_bytes()

    said = finish(sovit("fit", str(tmp_path / "star_smoke")))
    assert "to beat: chance" in said
    fit = json.loads((tmp_path / "star_smoke" / "fit.json").read_text())
    assert fit["kind"] == "star" and fit["center"] == {"width": 32, "depth": 4, "mlp_dim": 128}
    assert (tmp_path / "star_smoke" / "report.html").stat().st_size > 50_000
    assert "Nothing has changed" in finish(sovit("fit", str(tmp_path / "star_smoke")))
    by_run: dict[str, list[float]] = {}
    for point in fit["points"]:
        by_run.setdefault(point["run_id"], []).append(point["error"])
    assert len(by_run) == 7
    assert all(errors[-1] < errors[0] for errors in by_run.values()), "every shape learns"
