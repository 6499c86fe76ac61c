"""A cell's W&B run against a stand-in server: what it says, and that no kill, outage or stop makes it two or loses a row."""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sovit import records
from sovit.config import RunConfig, compose
from sovit.launch.wandb import run as wandb_run
from sovit.shape import Shape
from wandb_server import ENTITY, PROJECT, Server

SMALL = [
    "name=tiny",
    "shape=16x1x16",
    "center=16x2x16",
    "data.num_classes=8",
    "data.num_heldout=4",
    "durations.values=[8 steps,16 steps,24 steps]",
    "durations.first=null",
    "durations.last=null",
    "durations.num=null",
    "schedule.warmup_steps=4",
    "eval.shots=[1,5]",
    "trainer.global_batch_size=16",
    "trainer.log_every_n_steps=4",
]
KEEPING = "trainer.checkpoint_every_s=1e-9"  # a resume point after every step
AGENT = {"WANDB_SWEEP_ID": "sweep1", "WANDB_RUN_ID": "r1"}


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server().start()
    yield server
    server.stop()
    assert server.unknown == []


def until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.02)


def small(runs_dir: Path, overrides: Iterable[str]) -> list[str]:
    """The overrides of a small cell; the later of two for one key is taken."""
    by_key = {text.partition("=")[0]: text for text in (*SMALL, f"runs_dir={runs_dir}", *overrides)}
    return list(by_key.values())


def _become(environment: dict[str, str], log: str) -> None:
    """Take over an environment, as far as W&B is concerned, and write to a log."""
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        del os.environ[name]
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def _cell(overrides: list[str], environment: dict[str, str], log: str, pause_at: int) -> None:
    _become(environment, log)
    from sovit.lit import engine
    from sovit.lit.module import LitClassifier

    steps, original = iter(range(1, 10**9)), LitClassifier.training_step

    def training_step(self: Any, *batch: Any) -> Any:
        if next(steps) == pause_at:
            Path(f"{log}.waits").touch()
            until(lambda: Path(f"{log}.go").exists(), "it may go on")
        return original(self, *batch)

    LitClassifier.training_step = training_step  # type: ignore[method-assign]
    sys.exit(engine.run_cell(overrides))


def _process(target: Callable[..., None], *arguments: Any) -> Any:
    """A process forked from one that has everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sovit.lit.engine", "wandb"])
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def begin(runs_dir: Path, environment: dict[str, str], *overrides: str, pause_at: int = 0) -> Any:
    """A cell in a process of its own. It waits before a step of its own counting, if told so, for a file ``log.go``."""
    runs_dir.mkdir(exist_ok=True)
    return _process(_cell, small(runs_dir, overrides), environment, str(runs_dir / "log"), pause_at)


def ended(process: Any) -> int:
    process.join(150)
    assert process.exitcode is not None, "the cell hangs"
    return process.exitcode


def run(runs_dir: Path, environment: dict[str, str], *overrides: str) -> int:
    return ended(begin(runs_dir, environment, *overrides))


def cell(runs_dir: Path, *overrides: str) -> tuple[RunConfig, Path]:
    cfg = compose(small(runs_dir, overrides))
    return cfg, records.run_dir(cfg)


def metrics(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what hangs on the clock."""
    return {key: value for key, value in row.items() if not key.startswith(("_time", "_run", "perf/"))}


def local(directory: Path) -> list[dict[str, Any]]:
    """The rows as the local files have them."""
    rows = enumerate(wandb_run.rows(directory))
    return [{**values, "trainer/global_step": step, "_step": number} for number, (step, values) in rows]


def assert_whole(server: Server, run_id: str, directory: Path) -> None:
    """Every row once, in order, as in the local files."""
    found = [metrics(row) for row in server.history(run_id)]
    assert [row["_step"] for row in found] == list(range(len(found)))
    expected = local(directory)
    assert len(found) == len(expected)
    for row, wanted in zip(found, expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-6)


class Said(NamedTuple):
    """How a command ended, and what it wrote to standard output and error."""

    code: int
    text: str


def _command(arguments: tuple[str, ...], environment: dict[str, str], log: str) -> None:
    _become(environment, log)
    from sovit import cli

    sys.exit(cli.main(arguments))


def sovit(server: Server, log: Path, *arguments: str, **environment: str) -> Said:
    """A command of sovit in a process of its own, forked as the cells are."""
    log.unlink(missing_ok=True)
    process = _process(_command, arguments, server.environment | environment, str(log))
    return Said(ended(process), log.read_text())


@pytest.mark.parametrize(
    ("center", "arm"),
    [(None, None), ("32x4x128", "center"), ("16x4x128", "width"), ("32x2x128", "depth"), ("32x4x64", "mlp_dim"),
     ("16x2x128", "several"), ("So400m/14", "several")],
)  # fmt: skip
def test_the_arm_is_the_one_dimension_that_differs(center: str | None, arm: str | None) -> None:
    assert wandb_run.arm(Shape(32, 4, 128, 4, 8), center) == arm


def test_a_run_tells_its_cell_in_numbers_and_its_errors_over_compute(server: Server, tmp_path: Path) -> None:
    cfg, directory = cell(tmp_path)
    assert run(tmp_path, server.environment) == 0
    (run_id,) = server.runs
    kept = server.runs[run_id]
    assert run_id == f"{records.run_id(cfg)}-{records.config_hash(cfg)}"
    assert (kept["state"], kept["exitcode"], kept["group"], kept["jobType"]) == ("finished", 0, "tiny", "depth")
    assert kept["tags"] == ["tiny", "seed0", "depth"] and kept["displayName"] == directory.name
    config = server.config(run_id)
    numbers = {"width": 16, "depth": 1, "mlp_dim": 16, "num_heads": 4, "patch_size": 8, "seed": 0}
    assert {key: config[key] for key in numbers} == numbers
    assert config["forward_gflops"] == pytest.approx(2.176e-5) and (config["shape"], config["arm"]) == (
        "16x1x16",
        "depth",
    )
    assert config["cfg"]["trainer"]["global_batch_size"] == 16
    assert_whole(server, run_id, directory)
    evaluated = [row for row in server.history(run_id) if "eval/fractals_5shot/error" in row]
    assert [row["t_gflops"] for row in evaluated] == pytest.approx([16 * step * 2.176e-5 for step in (0, 8, 16, 24)])
    assert kept["summary"]["eval/fractals_5shot/error"] == evaluated[-1]["eval/fractals_5shot/error"]
    assert kept["summary"]["status"] == "done"
    axes = {item.get("1", item.get("2")): item.get("5") for item in kept["config"]["_wandb"]["value"]["m"]}
    names = [item.get("1") for item in kept["config"]["_wandb"]["value"]["m"]]
    assert names[axes["eval/*"] - 1] == "t_gflops" and names[axes["train/*"] - 1] == "trainer/global_step"
    for name in (records.RUN, records.EVALS, records.METRICS):
        assert kept["files"][name] == (directory / name).read_bytes()
    pushed = sovit(server, tmp_path / "said", "wandb", "push", str(tmp_path / "tiny"))
    assert "0 runs sent, 1 were there already" in pushed.text and kept["starts"] == 1, pushed.text


def test_a_killed_cell_goes_on_as_one_run_without_doubled_rows(server: Server, tmp_path: Path) -> None:
    """SIGKILL under an agent, then a process without one, which would take another id if the cell's were not noted.

    One cell is evaluated with averaged weights, the other with cooled ones, whose rows go back in the steps.
    """
    kinds = {"ema": "r1", "cooled": "r2"}
    cells = {run_id: (tmp_path / weights, (KEEPING, f"eval.weights={weights}")) for weights, run_id in kinds.items()}
    killed = [
        begin(runs_dir, server.environment | AGENT | {"WANDB_RUN_ID": run_id}, *overrides, pause_at=14)
        for run_id, (runs_dir, overrides) in cells.items()
    ]
    until(lambda: all(name in server.runs and len(server.history(name)) > 2 for name in cells), "rows have arrived")
    for process in killed:
        process.kill()
        process.join()
    sent = {name: len(server.history(name)) for name in cells}
    going_on = [begin(runs_dir, server.environment, *overrides) for runs_dir, overrides in cells.values()]
    assert [ended(process) for process in going_on] == [0, 0]
    assert set(server.runs) == set(cells)
    for run_id, (runs_dir, overrides) in cells.items():
        assert (server.runs[run_id]["state"], server.runs[run_id]["sweep"]) == ("finished", "sweep1")
        assert_whole(server, run_id, cell(runs_dir, *overrides)[1])
        assert len(server.history(run_id)) > sent[run_id]
        assert "Going on from step" in (runs_dir / "log").read_text()


def test_another_agent_does_not_make_a_second_run(server: Server, tmp_path: Path) -> None:
    _, directory = cell(tmp_path)
    wandb_run.note(directory_made(directory), wandb_run.Identity("first", ENTITY, PROJECT))
    assert run(tmp_path, server.environment | AGENT) == 0
    assert list(server.runs) == ["first"] and server.runs["first"]["sweep"] == "sweep1"


def directory_made(directory: Path) -> Path:
    directory.mkdir(parents=True)
    return directory


def test_a_cell_stopped_by_a_signal_is_handed_out_again(server: Server, tmp_path: Path) -> None:
    _, directory = cell(tmp_path)
    process = begin(tmp_path, server.environment | AGENT, pause_at=14)
    until((tmp_path / "log.waits").exists, "it trains")
    os.kill(process.pid, signal.SIGTERM)
    (tmp_path / "log.go").touch()
    assert ended(process) == 75
    kept = server.runs["r1"]
    assert (kept["state"], kept["exitcode"], kept["preempting"]) == ("preempted", 75, True)
    record = records.read_run(directory)
    assert record is not None and record["status"] == records.RUNNING


@pytest.mark.full
def test_a_cell_stopped_at_w_and_b_is_not_handed_out_again(server: Server, tmp_path: Path) -> None:
    """It trains until it is stopped; W&B's client asks every 15 s."""
    process = begin(tmp_path, server.environment | AGENT, "durations.values=[1000000 steps]")
    until(lambda: "r1" in server.runs and server.runs["r1"]["starts"], "it has begun")
    server.stop_run("r1")
    assert ended(process) == 75
    kept = server.runs["r1"]
    assert (kept["state"], kept["exitcode"], kept["preempting"]) == ("killed", 75, False)


def test_a_server_that_fails_for_a_while_misses_nothing(server: Server, tmp_path: Path) -> None:
    _, directory = cell(tmp_path)
    server.fail_next = 3
    assert run(tmp_path, server.environment | AGENT) == 0
    assert server.fail_next == 0, "the client never met an error"
    assert_whole(server, "r1", directory)
    assert server.runs["r1"]["state"] == "finished"


def test_a_server_gone_for_good_does_not_hold_a_run_and_gets_all_of_it_afterwards(
    server: Server, tmp_path: Path
) -> None:
    """Gone in the middle for one cell and from the start for another; a push makes it whole, a second sends nothing."""
    _, directory = cell(tmp_path)
    impatient = server.environment | AGENT | {"WANDB_FINISH_TIMEOUT": "3"}
    process = begin(tmp_path, impatient, pause_at=14)
    until(lambda: "r1" in server.runs and server.runs["r1"]["history"], "rows have arrived")
    server.stop()
    (tmp_path / "log.go").touch()
    assert ended(process) == 0
    absent = server.environment | {"WANDB_FINISH_TIMEOUT": "3"}
    assert run(tmp_path, absent, "shape=24x1x16", "logger.init_timeout_s=2") == 0
    said = (tmp_path / "log").read_text()
    assert "W&B does not have everything of this run" in said and "sovit wandb push" in said
    assert "W&B could not start online" in said
    refused = sovit(server, tmp_path / "said", "wandb", "push", str(tmp_path / "tiny"))
    assert refused.code == 2 and "W&B does not answer" in refused.text and "Traceback" not in refused.text

    server.start()
    pushed = sovit(server, tmp_path / "said", "wandb", "push", str(tmp_path / "tiny"))
    assert pushed.code == 0, pushed.text
    assert "2 runs sent, 0 were there already" in pushed.text
    other, offline = cell(tmp_path, "shape=24x1x16")
    assert_whole(server, "r1", directory)
    assert_whole(server, f"{records.run_id(other)}-{records.config_hash(other)}", offline)
    assert {run["state"] for run in server.runs.values()} == {"finished"} and len(server.runs) == 2
    requests = len(server.requests)
    again = sovit(server, tmp_path / "said", "wandb", "push", str(tmp_path / "tiny"))
    assert "0 runs sent, 2 were there already" in again.text and len(server.requests) == requests


def test_pull_rebuilds_the_records_and_overwrites_nothing(server: Server, tmp_path: Path) -> None:
    server.sweeps["sweep1"] = {"name": "sweep1", "config": "method: grid", "state": "FINISHED", "method": "grid",
                               "project": PROJECT, "cells": [], "queue": []}  # fmt: skip
    _, directory = cell(tmp_path / "a")
    assert run(tmp_path / "a", server.environment | AGENT) == 0
    for name, state in (("r2", "running"), ("r3", "finished"), ("r4", "finished")):
        server._run(name, PROJECT, "sweep1")["state"] = state
    hostile = {**json.loads(server.runs["r1"]["files"][records.RUN]), "run_id": "../../../x-w1-d1-m1-h1-p1-s0"}
    server.runs["r4"]["files"] = {records.RUN: json.dumps(hostile).encode(), records.EVALS: b""}
    to = tmp_path / "b"
    path = f"{ENTITY}/{PROJECT}/sweep1"
    pulled = sovit(server, tmp_path / "said", "wandb", "pull", path, "--runs-dir", str(to), "--name", "copy")
    assert pulled.code == 1, pulled.text
    for sentence in (
        "1 runs pulled",
        "r2: W&B says running",
        "r3: has no run.json",
        "sovit import wandb",
        "no name of a run",
    ):
        assert sentence in pulled.text
    copy = to / "copy" / directory.name
    for name in (records.RUN, records.EVALS, records.METRICS):
        assert (copy / name).read_bytes() == (directory / name).read_bytes()
    assert sorted(path.name for path in to.iterdir()) == ["copy"] and [*to.glob("copy/*")] == [copy]
    assert (
        "0 runs sent, 1 were there already" in sovit(server, tmp_path / "said", "wandb", "push", str(to / "copy")).text
    )
    (copy / records.EVALS).write_text("mine\n")
    pulled = sovit(server, tmp_path / "said", "wandb", "pull", path, "--runs-dir", str(to), "--name", "copy")
    assert "holds other records" in pulled.text and (copy / records.EVALS).read_text() == "mine\n"


@pytest.mark.parametrize("mode", ["disabled", "offline"])
def test_wandb_mode_keeps_a_run_off_the_network(server: Server, tmp_path: Path, mode: str) -> None:
    _, directory = cell(tmp_path)
    assert run(tmp_path, server.environment | {"WANDB_MODE": mode}, "logger.mode=online") == 0
    assert server.requests == []
    assert bool(list(directory.glob("wandb/offline-run-*"))) == (mode == "offline")


def test_without_a_login_push_and_pull_say_so_in_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from sovit.launch.wandb import records as wandb_records

    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with contextlib.suppress(KeyError):
        monkeypatch.delenv("WANDB_MODE")
    with pytest.raises(ValueError, match="run `wandb login`"):
        wandb_records.connect()
