"""sovit status: what the files of a sweep say about its cells, time, cost and exponents, live and for scripts."""

import dataclasses
import io
import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sovit import claims, records
from sovit.analysis.law import Law
from sovit.cli import main
from sovit.cli import status as command
from sovit.config import compose
from sovit.launch.local.kept import KEPT
from sovit.launch.watch import status as status_module
from sovit.launch.watch.promise import promised
from sovit.launch.watch.status import CellStatus, SweepStatus, look, target_of, time_left
from sovit.launch.watch.table import status_text

METRIC = ("fractals", 10)
SWEEP = """\
program: sovit.train
command: ["${env}", "${interpreter}", "-m", "${program}", "${args_no_hyphens}"]
method: grid
metric: {name: eval/digits_5shot/error, goal: minimize}
parameters:
  name: {value: made_up}
  logger: {value: none}
  shape: {values: [8x1x8, 16x1x16, 32x1x32]}
"""


def run_id(width: int, depth: int = 1, mlp_dim: int | None = None, seed: int = 0) -> str:
    return f"made_up-w{width:04d}-d{depth:02d}-m{mlp_dim or width:04d}-h04-p08-s{seed}"


def write(
    sweep: Path,
    name: str,
    status: str | None = "done",
    *,
    step: int = 100,
    total: int = 100,
    wall_s: float = 50.0,
    errors: dict[float, float] | None = None,
    trainer: dict[str, Any] | None = None,
    **keys: Any,
) -> Path:
    """A run as the engine leaves it: 0.5 forward GFLOPs an image, 16 images a step. ``errors``: by compute in GFLOPs."""
    directory = sweep / name
    directory.mkdir(parents=True, exist_ok=True)
    config = {"trainer": {"global_batch_size": 16, "num_threads": 2, "accelerator": "cpu"} | (trainer or {})}
    config["center"] = keys.pop("center", None)
    record = {"schema": 1, "run_id": name, "status": status, "reason": None, "config": config, "config_hash": "abc"}
    record["machine"] = {"gpu": None, "cores": 8} if config["trainer"]["accelerator"] == "cpu" else {"gpu": "H100"}
    record |= {"forward_gflops": 0.5, "wall_s": wall_s, "images_per_s": 32.0, "steps_trained": total} | keys
    if status is not None:
        records.write_json(directory / records.RUN, record)
    if status != "done":
        note = {"step": step, "total_steps": total, "images_per_s": 32.0, "wall_s": wall_s}
        records.write_json(directory / records.PROGRESS, note)
    try:
        _, shape, _, seed = records.parse_run_id(name)
    except ValueError:
        return directory
    rows = [
        {**shape.as_dict(), "seed": seed, "step": k, "t_gflops": t, "duration": f"{t} gflops", "dataset": "fractals",
         "shots": 10, "draw": draw, "error": error + 0.01 * draw}
        for k, (t, error) in enumerate((errors or {}).items(), start=1) for draw in (-1, 1)
    ]  # fmt: skip
    records.append_lines(directory / records.EVALS, rows)
    return directory


def seen(sweep: Path) -> dict[str, CellStatus]:
    return {cell.run_id: cell for cell in look(target_of(sweep, [], METRIC)).cells}


def test_runs_without_a_sweep_file_are_shown_by_a_metric_that_they_evaluate(tmp_path: Path) -> None:
    """A text tower has no few-shot error, so its column stood empty."""
    cfg = dataclasses.asdict(compose(["experiment=lit_tiny", "text.encoder=runs/any"]))
    name = "made_up-w0032-d02-m0128-h04-l040-s0"
    write(tmp_path, name, errors={8.0: 0.5, 16.0: 0.3})
    record = records.read_run(tmp_path / name) or {}
    records.write_json(tmp_path / name / records.RUN, record | {"config": cfg})
    evals = tmp_path / name / records.EVALS
    evals.write_text(evals.read_text().replace('"fractals"', '"scenes"').replace('"shots": 10', '"shots": 0'))
    assert target_of(tmp_path, [], METRIC).metric == ("scenes", 0)
    assert seen(tmp_path)[name].error == pytest.approx(0.3)


def printed(sweep: SweepStatus, width: int, **options: Any) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=width, highlight=False).print(status_text(sweep, width=width, **options))
    return file.getvalue().splitlines()


def test_states_progress_time_compute_and_error_of_each_cell(tmp_path: Path) -> None:
    sweep = tmp_path / "made_up"
    write(sweep, run_id(8), errors={10: 0.5, 20: 0.3})
    write(sweep, run_id(16), "diverged", step=30, reason="training loss is nan at step 30", wall_s=10)
    write(sweep, run_id(24), "running", step=20, wall_s=10)
    running = write(sweep, run_id(32), "running", step=20, wall_s=10, errors={10: 0.4})
    with claims.hold(running):
        found = seen(sweep)
    assert [cell.state for cell in found.values()] == ["done", "diverged", "stopped", "running"]
    assert [cell.share for cell in found.values()] == [1.0, 0.3, 0.2, 0.2]
    assert [cell.error for cell in found.values()] == [pytest.approx(0.3), None, None, pytest.approx(0.4)]
    assert [cell.left_s for cell in found.values()] == [None, None, None, 40.0]  # 80 steps at 20 in 10 s
    # 3 times 0.5 forward GFLOPs times 16 images a step
    assert [cell.train_gflops for cell in found.values()] == [2400.0, 720.0, 480.0, 480.0]
    assert sum(cell.device_hours for cell in found.values()) == pytest.approx((50 + 10 + 10 + 10) * 2 / 8 / 3600)
    assert found[run_id(16)].reason == "training loss is nan at step 30"


def test_a_gpu_hour_is_a_gpu_hour_whatever_its_threads(tmp_path: Path) -> None:
    sweep = tmp_path / "made_up"
    write(sweep, run_id(8), wall_s=3600, trainer={"accelerator": "auto", "num_threads": 8})
    write(sweep, run_id(16), wall_s=3600, trainer={"accelerator": "gpu", "num_threads": 8}, machine=None)
    found = look(target_of(sweep, [], METRIC))
    assert [cell.device_hours for cell in found.cells] == [1.0, 1.0]
    assert found.device == "GPU hours" and found.device_hours == 2.0
    assert any("2 GPU hours, $5.00 at $2.50 an hour" in line for line in printed(found, 80, price=2.5))


def cell(state: str, step: int = 0, wall_s: float = 0.0, expected_s: float | None = None, **keys: Any) -> CellStatus:
    return CellStatus("x", state, step=step, total_steps=200, wall_s=wall_s, expected_s=expected_s, **keys)


def test_the_time_left_by_hand() -> None:
    """A quarter of 200 s took 100 and three quarters of 60 took 90: everything takes twice what was expected."""
    slow, quick = cell("running", 50, 100, 200, left_s=300.0), cell("running", 150, 90, 60, left_s=30.0)
    assert time_left([slow, quick]) == 300.0
    waiting = [cell("waiting", expected_s=60.0), cell("waiting", expected_s=100.0)]
    # the quick one's worker takes 2 x 100 s and then 2 x 60 s
    assert time_left([slow, quick, *waiting]) == 30.0 + 200.0 + 120.0
    half = cell("stopped", 100, 0.0, 100.0)  # goes on from its middle
    assert time_left([slow, quick, waiting[1], half]) == 30.0 + 200.0 + 100.0
    # what is over has no time left; its pace counts: 400 s where 100 were expected
    assert time_left([quick, cell("done", 200, 550, 100), waiting[0]]) == pytest.approx(30 + 60 * 640 / 145)


def test_no_time_is_made_up() -> None:
    assert time_left([cell("waiting", expected_s=60.0)]) is None  # nothing runs
    assert time_left([cell("running", 50, 100, left_s=300.0), cell("waiting")]) is None  # no plan for what waits
    assert time_left([cell("running", 0, 1.0)]) is None  # nothing measured, nothing planned
    assert time_left([]) is None
    assert time_left([cell("running", 0, 0.0, 100.0)]) == 100.0  # not measured yet: the plan's word


def test_a_cell_that_cannot_be_read_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = tmp_path / "made_up"
    write(sweep, run_id(8))
    broken = {
        "half": '{"status": "run',
        "empty": "",
        "list": "[]",
        "nothing": "{}",
        "no_config": '{"status": "done", "config_hash": "a"}',
        "odd_config": '{"status": "running", "config_hash": "a", "config": 7}',
        "odd_time": '{"status": "failed", "config_hash": "a", "wall_s": "long", "reason": null}',
    }
    for name, text in broken.items():
        (sweep / name).mkdir()
        (sweep / name / records.RUN).write_text(text)
    torn = write(sweep, run_id(16))
    (torn / records.EVALS).write_text('{"dataset": "fractals"}\nnot json\n')
    torn = write(sweep, run_id(24), errors={10: 0.25})
    with (torn / records.EVALS).open("a") as file:
        file.write('{"dataset": "fra')  # as a kill leaves it
    (sweep / "notes").mkdir()
    assert main(["status", str(sweep)]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "Traceback" not in out
    for name in ("half", "empty", "list", "nothing", "odd_config", "odd_time"):
        assert sum(line.split()[:1] == [name] and "unreadable" in line for line in out.splitlines()) == 1, out
    assert "notes" not in out  # a folder that is no run
    found = seen(sweep)
    assert found[run_id(16)].state == "unreadable" and found[run_id(24)].error == pytest.approx(0.25)
    assert main(["status", str(sweep), "--json"]) == 0
    json.loads(capsys.readouterr().out)


def test_the_keys_of_the_document_are_stable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scripts read it: a key that goes, or changes its type, breaks them. New ones may come."""
    sweep = tmp_path / "made_up"
    write(sweep, run_id(8), errors={10: 0.5})
    write(sweep, run_id(16), "failed", reason="ValueError: x", step=1)
    assert main(["status", str(sweep), "--json", "--price", "3600"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == 1 and len(document["sweeps"]) == 1
    found = document["sweeps"][0]
    number = (int, float)
    kinds = {
        "name": str, "dataset": str, "shots": int, "all_cells_known": bool, "note": type(None), "states": dict,
        "left_s": type(None), "train_gflops": number, "planned_gflops": type(None), "device": str,
        "device_hours": number, "price": number, "cost": number, "best": dict, "exponents": dict, "cells": list,
    }  # fmt: skip
    assert {key for key, kind in kinds.items() if not isinstance(found[key], kind)} == set()
    assert found["cost"] == pytest.approx((50 + 50) * 2 / 8) and found["states"] == {"done": 1, "failed": 1}
    assert found["best"] == {"run_id": run_id(8), "error": pytest.approx(0.5)}
    assert set(found["exponents"]) == {"why", "arms"} and "too few" in found["exponents"]["why"]
    assert set(found["cells"][0]) >= {
        "run_id", "state", "reason", "step", "total_steps", "images_per_s", "wall_s", "left_s", "expected_s",
        "train_gflops", "planned_gflops", "devices", "gpu", "error", "host", "pid", "device_hours",
    }  # fmt: skip
    assert (found["cells"][1]["state"], found["cells"][1]["reason"]) == ("failed", "ValueError: x")


def many(count: int) -> SweepStatus:
    states = ["done", "waiting", "running", "failed", "done"]
    cells = [
        CellStatus(
            run_id(8 + k, 16, 6144), states[k % 5], "OSError: no space left on the device, " * 4 * (k % 5 == 3), 70, 100,
            1e4, 1e5, 123456.0 if k % 5 == 2 else None, 1.0, 1.23e10, 2e10, error=0.123, host="node0007.cluster", pid=31415,
        )
        for k in range(count)
    ]  # fmt: skip
    return SweepStatus("made_up", METRIC, tuple(cells), True)


def test_eighty_columns_hold_everything(tmp_path: Path) -> None:
    lines = printed(many(10), 80, rows=20)
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert text.count("w0010-d16-m6144-h04-p08-s0") == 1 and "34 h 17 min" in text and "70%" in text and "0.123" in text
    assert "w0011-d16-m6144-h04-p08-s0: OSError: no space left on the device" in text
    assert sum(line.endswith("node0007:31415") for line in lines) == 10 and "12.3B" in text
    assert all(word in text for word in ("running", "waiting", "failed", "done"))


def test_what_runs_or_failed_is_shown_first_and_the_rest_is_summed() -> None:
    lines = printed(many(50), 80, rows=24)
    rows = [line for line in lines if line.startswith("w00") and ": " not in line]
    assert len(rows) == 23 and sum("running" in row for row in rows) == sum("failed" in row for row in rows) == 10
    assert "and 27 more: 17 done, 10 waiting" in lines and "and 7 more reasons, without --watch" in lines
    assert len(lines) <= 24 + command.RESERVED - 4  # and 4 for exponents
    assert "made_up: 50 cells, 20 done, 10 running, 10 failed, 10 waiting." in lines


def test_another_machine_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = tmp_path / "made_up"
    directory = write(sweep, run_id(8), "running", step=10)
    elsewhere = claims.Holder("node7", 4711, 0.0, local=False)
    monkeypatch.setattr(claims.Watch, "look", lambda self: claims.Sight(1, elsewhere, certain=True))
    found = look(target_of(sweep, [], METRIC))
    assert (found.cells[0].host, found.cells[0].pid) == ("node7", 4711)
    assert any("node7:4711" in line for line in printed(found, 80))
    monkeypatch.undo()
    with claims.hold(directory):
        assert seen(sweep)[run_id(8)].host is None


def test_a_directory_with_the_sweep_file_beside_its_runs_knows_what_waits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = tmp_path / "made_up"
    write(sweep, run_id(8))
    assert look(target_of(sweep, [], METRIC)).known is False
    (sweep / KEPT).write_text(SWEEP)
    found = look(target_of(sweep, [], METRIC))
    assert found.known and found.metric == ("digits", 5)
    assert [(cell.run_id, cell.state) for cell in found.cells] == [
        (run_id(8), "done"), (run_id(16), "waiting"), (run_id(32), "waiting")
    ]  # fmt: skip
    assert found.planned_gflops and found.cells[2].expected_s
    assert main(["status", str(sweep)]) == 0
    out = capsys.readouterr().out
    assert "3 cells, 1 done, 2 waiting." in out and "Nothing runs; sovit run goes on with what is left." in out

    write(sweep, run_id(8, seed=3))  # seed=3 on the command line: the file does not say what else was meant to run
    found = look(target_of(sweep, [], METRIC))
    assert not found.known and len(found.cells) == 2 and "set on the command line" in found.note
    (sweep / KEPT).write_text(SWEEP.replace("method: grid", "method: gird"))
    found = look(target_of(sweep, [], METRIC))
    assert not found.known and len(found.cells) == 2 and "gird" in found.note


def test_a_sweep_file_takes_the_overrides_it_was_run_with(tmp_path: Path) -> None:
    file = tmp_path / "made_up.yaml"
    file.write_text(SWEEP)
    found = look(target_of(file, ["seed=3", f"runs_dir={tmp_path}"], METRIC))
    assert [cell.run_id for cell in found.cells] == [run_id(8, seed=3), run_id(16, seed=3), run_id(32, seed=3)]
    assert found.states == ["waiting"] * 3
    with pytest.raises(ValueError, match=r"seed=3 goes with a sweep file"):
        target_of(tmp_path, ["seed=3"], METRIC)


@pytest.mark.parametrize("where", [[], ["made_up"], ["nowhere"]])
def test_nothing_there_is_a_sentence(
    where: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "made_up").mkdir()
    for options in ([], ["--json"], ["--watch"]):
        assert main(["status", *where, *options]) == 2
        assert "holds no runs" in capsys.readouterr().err


def test_watching_ends_when_nothing_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It goes on while a cell is held, and shows how the cell ended."""
    sweep = tmp_path / "made_up"
    write(sweep, run_id(8))
    directory = write(sweep, run_id(16), "running", step=10)
    looks = threading.Semaphore(0)
    original = status_module.look

    def counted(target: Any) -> SweepStatus:
        looks.release()
        return original(target)

    monkeypatch.setattr(status_module, "look", counted)
    with claims.hold(directory):
        targets = [target_of(sweep, [], METRIC)]
        watcher = threading.Thread(target=command.watch, args=(targets, None, 0.01), daemon=True)
        watcher.start()
        for _ in range(5):
            assert looks.acquire(timeout=60)
        assert watcher.is_alive()
        write(sweep, run_id(16), "diverged", reason="training loss is nan")
    watcher.join(60)
    assert not watcher.is_alive()
    out = capsys.readouterr().out
    assert "2 cells, 1 done, 1 diverged." in out and "training loss is nan" in out


def test_watching_waits_a_while_for_the_next_cell_and_then_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(command.time, "sleep", slept.append)
    write(tmp_path / "made_up", run_id(8), "running")  # stopped: nobody holds it
    assert main(["status", str(tmp_path / "made_up"), "--watch"]) == 0
    assert slept == [2.0] * 15 and "1 stopped" in capsys.readouterr().out


def test_ctrl_c_ends_watching_without_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command.time, "sleep", interrupt)
    write(tmp_path / "made_up", run_id(8), "running")
    assert main(["status", str(tmp_path / "made_up"), "--watch"]) == 0
    out, err = capsys.readouterr()
    assert "1 stopped" in out and err == ""


def star(sweep: Path, runs: str = "done") -> dict[str, Law]:
    """A star whose errors follow a law exactly but for 0.2% of noise that alternates; s = 0.4 / (0.5 + 0.3)."""
    law = Law(0.06, 0.5, 0.25 * 50**0.4, 0.3, 0.05 * 50**0.4, 0.4, 0.02)
    center = (32, 8, 128)
    shapes = {(*center[:k], center[k] * 2**power // 8, *center[k + 1 :]) for k in range(3) for power in range(7)}
    for number, shape in enumerate(sorted(shapes)):
        x = next((value / middle for value, middle in zip(shape, center, strict=True) if value != middle), 1.0)
        errors = {
            t: float(law.error(x, t)) * (1 + 0.002 * (-1) ** (k + number) + 0.001 * math.sin(number))
            for k, t in enumerate((50.0, 100.0, 200.0, 400.0, 800.0))
        }
        write(sweep, run_id(*shape), runs, errors=errors, center="32x8x128")
    return {"width": law}


def test_points_of_runs_in_progress_promise_the_exponents_a_finished_star_would(tmp_path: Path) -> None:
    star(tmp_path / "made_up", "running")
    found = promised(sorted((tmp_path / "made_up").iterdir()), METRIC)
    assert isinstance(found, dict) and set(found) == {"width", "depth", "mlp_dim"}
    for promise in found.values():
        assert promise.why is None and promise.runs == 6 and promise.points == 30
        assert promise.s == pytest.approx(0.5, rel=0.15) and promise.stderr and promise.stderr < 0.1
        assert promise.lo and promise.hi and promise.lo < promise.s < promise.hi


def test_the_promise_is_the_information_of_the_points(tmp_path: Path) -> None:
    """The standard error is what the sizes and durations carry at the true law, counted here from them alone."""
    import numpy as np

    from sovit.analysis.planning.information import Spread, arm, expect

    star(tmp_path / "made_up")
    found = promised(sorted((tmp_path / "made_up").iterdir()), METRIC)
    assert isinstance(found, dict) and found["depth"].s and found["depth"].stderr
    # an independent count: the same six sizes and five durations, at the true law, with noise of the size put in
    sizes, t = np.array([1, 2, 4, 16, 32, 64]), np.array([50.0, 100, 200, 400, 800])
    x, times, runs = np.repeat(sizes, 5), np.tile(t, 6), np.repeat(np.arange(6), 5)
    law = Law(0.06 * 8**0.5, 0.5, 0.25 * 50**0.4 * 8**-0.3, 0.3, 0.05 * 50**0.4, 0.4, 0.02)
    expected = expect(arm("depth", law, Spread(0.002, 0.0007), x, times, runs))
    assert found["depth"].stderr / found["depth"].s == pytest.approx(expected.log_se, rel=0.1)


def test_too_few_points_are_said_to_be_and_load_nothing_heavy(tmp_path: Path) -> None:
    for width in (8, 16):
        write(tmp_path / "made_up", run_id(width), errors={10: 0.5, 20: 0.4})
    found = promised(sorted((tmp_path / "made_up").iterdir()), METRIC)
    assert found == "4 points so far are too few to fit the law"


def test_a_grid_promises_no_exponents_and_diverged_runs_promise_nothing(tmp_path: Path) -> None:
    for width in (8, 16, 32):
        for depth in (1, 2, 4):
            write(tmp_path / "grid", run_id(width, depth, 64), errors={10: 0.5, 20: 0.4})
    assert promised(sorted((tmp_path / "grid").iterdir()), METRIC) is None
    star(tmp_path / "made_up", "diverged")
    assert promised(sorted((tmp_path / "made_up").iterdir()), METRIC) == "0 points so far are too few to fit the law"


def test_promises_do_not_hold_up_the_display() -> None:
    gate = threading.Event()
    calls: list[int] = []

    def work() -> str:
        calls.append(1)
        assert gate.wait(60)
        return "worked out"

    background = command._Background(work)
    assert background.poll() is None and background.poll() is None  # at once, though the work waits
    gate.set()
    assert background._thread
    background._thread.join(60)
    assert background.poll() == "worked out" and len(calls) == 1  # not again within the minute


def test_composing_is_not_needed_once_all_cells_have_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Composing takes a tenth of a second a cell, and everything in runs/ may be looked at."""
    sweep = tmp_path / "made_up"
    for width in (8, 16, 32):
        write(sweep, run_id(width))
    (sweep / KEPT).write_text(SWEEP)
    monkeypatch.setattr(status_module, "plan", lambda *_: pytest.fail("planned"))
    assert look(target_of(sweep, [], METRIC)).known


def test_the_cells_of_a_plan_have_the_ids_of_this_file() -> None:
    assert records.run_id(compose(["name=made_up", "shape=16x1x16", "logger=none"])) == run_id(16)
