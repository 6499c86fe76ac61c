"""The report at W&B: it holds the panels promised, and draws nothing that runs do not log."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sovit import cli
from test_wandb import begin, ended, server, sovit  # noqa: F401  (a fixture)
from wandb_server import ENTITY, PROJECT, Server

PATH = f"{ENTITY}/{PROJECT}"
IN = f"logger.project={PROJECT}"


def inside(tree: Any, key: str) -> Iterator[Any]:
    """Every value under a key, however deep."""
    if isinstance(tree, dict):
        yield from (value for name, value in tree.items() if name == key)
        tree = list(tree.values())
    if isinstance(tree, list):
        for item in tree:
            yield from inside(item, key)


@pytest.mark.slow
def test_the_report_draws_what_runs_log_and_is_written_once(server: Server, tmp_path: Path) -> None:  # noqa: F811
    """Two real runs, the center and one beside it; and a run of another sweep."""
    cells = [begin(tmp_path, server.environment, f"shape={shape}", IN) for shape in ("16x2x16", "24x2x16")]
    assert [ended(cell) for cell in cells] == [0, 0]
    server._run("other", PROJECT, None).update(state="finished", group="other", starts=1)
    command = ("wandb", "dashboard", PATH)
    log = tmp_path / "said"
    assert "other, tiny; say which with --sweep" in sovit(server, log, *command).text
    wrong = sovit(server, log, *command, "--sweep", "tiny", "--shots", "3")
    assert wrong.code == 2 and "they log eval/digits_1shot/error, eval/digits_5shot/error" in wrong.text
    for expected in ("Written", "Brought up to date"):
        made = sovit(server, log, *command, "--sweep", "tiny", "--shots", "5")
        assert made.code == 0 and expected in made.text, made.text
    (view,) = server.views
    assert view["displayName"] == "sovit: tiny" and view["type"] == "runs"
    spec = json.loads(view["spec"])

    kinds = list(inside(spec, "viewType"))
    wanted = {"Run History Line Plot": 5, "Scatter Plot": 4, "Parallel Coordinates Plot": 1}
    assert {kind: kinds.count(kind) for kind in kinds} == wanted
    lines = [config for config in inside(spec, "config") if "metrics" in config]
    assert [(line["xAxis"], *line["metrics"]) for line in lines] == [
        *[("t_gflops", "eval/fractals_5shot/error")] * 3,
        ("trainer/global_step", "train/loss"),
        ("trainer/global_step", "perf/images_per_s"),
    ]
    rows = [row for run in server.runs.values() for row in server.history(run["name"])]
    in_rows = {key for row in rows for key in row}
    assert {key for line in lines for key in (line["xAxis"], *line["metrics"])} <= in_rows
    runs = [run for run in server.runs.values() if run["group"] == "tiny"]
    for run in runs:
        config = server.config(run["name"])
        accessors = [*inside(spec, "accessor"), *inside(spec, "yAxis")]
        for accessor in accessors:
            section, _, key = accessor.partition(":")
            assert key in run["summary"] if section == "summary" else key.removesuffix(".value") in config, accessor
    scatters = [config for config in inside(spec, "config") if "yAxis" in config]
    prefix = "summary:isocompute/fractals_5shot/error/"
    assert [(scatter["xAxis"], scatter["yAxis"].removeprefix(prefix)) for scatter in scatters] == [
        ("config:width.value", f"{steps} steps") for steps in (8, 16, 24)
    ] + [("config:forward_gflops.value", "summary:images_per_s")]
    on_arm = [found["value"] for found in inside_filters(spec) if found["key"]["name"] == "arm"]
    assert on_arm == [["center", "width"]] * 2
    assert all(group == "tiny" for group in (f["value"] for f in inside_filters(spec) if f["key"]["name"] == "group"))


def inside_filters(spec: Any) -> Iterator[dict[str, Any]]:
    for found in inside(spec, "filters"):
        if isinstance(found, list):
            yield from found


def test_the_isocompute_points_are_the_errors_of_the_rows(tmp_path: Path) -> None:
    """By hand: the mean over the draws, every duration but the untrained one."""
    from sovit.launch.wandb.run import isocompute

    rows = [
        {"step": step, "duration": duration, "dataset": "fractals", "shots": 5, "draw": draw, "error": error,
         "t_gflops": 1.0, "examples_seen": 1}
        for step, duration, draw, error in
        [(0, "init", 0, 0.9), (8, "2.5 gflops", 0, 0.5), (8, "2.5 gflops", 1, 0.25), (16, "5 gflops", 0, 0.125)]
    ]  # fmt: skip
    (tmp_path / "evals.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert isocompute(tmp_path) == {
        "isocompute/fractals_5shot/error/2,5 gflops": 0.375,
        "isocompute/fractals_5shot/error/5 gflops": 0.125,
    }


def test_without_the_library_or_a_login_it_says_so_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert cli.main(["wandb", "dashboard", PATH]) == 2
    assert re.fullmatch(r"sovit wandb: .*run `wandb login`.*\n", capsys.readouterr().err)
    monkeypatch.setitem(__import__("sys").modules, "wandb_workspaces.reports.v2", None)
    assert cli.main(["wandb", "dashboard", PATH]) == 2
    assert re.fullmatch(r"sovit wandb: The dashboard needs wandb-workspaces.*\n", capsys.readouterr().err)
