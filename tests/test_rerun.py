"""A run's record is enough to run it again: the same bytes come out, whatever became of conf/, and a change is found."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sovit import config, records, train
from sovit.config import ConfigError, RunConfig, compose
from sovit.launch import rerun

SMALL = [
    "shape=16x1x16",
    "logger=none",
    "name=tiny",
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


def go(arguments: list[str]) -> int:
    return rerun.rerun(*map(Path, arguments))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, seed 0, trained once for this module."""
    from sovit.lit import engine

    cfg = compose([*SMALL, f"runs_dir={tmp_path_factory.mktemp('runs')}"])
    assert engine.run(cfg) == engine.OK
    return records.run_dir(cfg)


@pytest.fixture
def original(trained: Path, tmp_path: Path) -> Path:
    """A copy of that run elsewhere, under another name, to be spoilt by a test."""
    return Path(shutil.copytree(trained, tmp_path / "a copy"))


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Train in this process instead of one of its own, and note what ran."""
    ran: list[str] = []

    def run(file: Path, out: Path, again: Path) -> int:
        ran.append(again.name)
        return train.main(["--rerun", str(file), f"runs_dir={out}"])

    monkeypatch.setattr(rerun, "_train", run)
    yield ran


def change(directory: Path, **keys: Any) -> None:
    record = records.read_run(directory)
    assert record
    records.write_json(directory / records.RUN, {**record, **keys})


def test_a_record_alone_reproduces_the_run_in_a_process_of_its_own(original: Path, tmp_path: Path) -> None:
    """Through the command, from another folder, the copied run's name unlike its id: the same bytes."""
    command = "import sys; from pathlib import Path; from sovit.launch.rerun import rerun; "
    command += f"sys.exit(rerun(Path({str(original)!r}), Path('again')))"
    done = subprocess.run([sys.executable, "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The rerun reproduces the run." in done.stdout and "Traceback" not in done.stderr
    again = tmp_path / "again" / "tiny" / "tiny-w0016-d01-m0016-h04-p08-s0"
    for name in (records.EVALS, records.METRICS):
        assert (again / name).read_bytes() == (original / name).read_bytes()
    assert (again / records.LOG).exists()


def test_conf_as_it_is_now_changes_nothing(
    original: Path, tmp_path: Path, in_process: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even a conf/ that no run could be composed from."""
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "config.yaml").write_text("lr: [\n")
    monkeypatch.setattr(config, "CONF_DIR", tmp_path / "conf")
    assert go([str(original), str(tmp_path / "again")]) == 0
    assert in_process == ["tiny-w0016-d01-m0016-h04-p08-s0"]


def test_a_changed_byte_is_found_and_the_finished_rerun_not_run_twice(
    original: Path, tmp_path: Path, in_process: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(original), str(tmp_path / "again")]
    assert go(arguments) == 0
    evals = original / records.EVALS
    rows = evals.read_text().splitlines(keepends=True)
    row = json.loads(rows[30])
    changed = json.dumps(row | {"error": row["error"] + 1e-9}) + "\n"
    evals.write_text("".join([*rows[:30], changed, *rows[31:]]))
    change(original, torch_version="0.1", machine={"cpu": "an abacus"})
    capsys.readouterr()
    assert go(arguments) == 1
    out = capsys.readouterr().out
    assert "does not reproduce" in out and "is a finished rerun already" in out and len(in_process) == 1
    assert f"evals.jsonl: differs first in line 31 (step {row['step']}, dataset {row['dataset']}" in out
    assert f"error was {row['error'] + 1e-9} and is {row['error']}" in out
    assert "evals.jsonl was changed after the run was finished" in out or "bytes, not the" in out
    assert "torch_version: 0.1 then" in out and "machine.cpu: an abacus then" in out
    assert "metrics.jsonl: equal" in out


def test_an_unfinished_run_is_compared_as_far_as_it_goes(
    original: Path, tmp_path: Path, in_process: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (records.EVALS, records.METRICS):
        content = (original / name).read_bytes()
        (original / name).write_bytes(content[: len(content) // 2])  # in the middle of a line
    change(original, status="running", reason="stopped by a signal at step 12")
    assert go([str(original), str(tmp_path / "again")]) == 0
    out = capsys.readouterr().out
    assert "The original is not finished: running (stopped by a signal at step 12)" in out
    assert "evals.jsonl: equal as far as the original goes, 24 of 48 rows" in out or "of 48 rows" in out


def test_a_diverged_run_diverges_again(
    tmp_path: Path, in_process: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    from sovit.lit import engine

    cfg = compose([*SMALL, "optim.lr=1e18", "optim.clip_norm=null", f"runs_dir={tmp_path / 'runs'}"])
    assert engine.run(cfg) == engine.DIVERGED
    capsys.readouterr()
    assert go([str(records.run_dir(cfg)), str(tmp_path / "again")]) == 0
    assert "Both diverged: " in capsys.readouterr().out


def test_another_verdict_is_no_reproduction(original: Path, tmp_path: Path, in_process: list[str]) -> None:
    again = tmp_path / "again"
    assert go([str(original), str(again)]) == 0
    change(again / "tiny" / "tiny-w0016-d01-m0016-h04-p08-s0", status="diverged", reason="loss is nan")
    same, lines = rerun.compare(original, again / "tiny" / "tiny-w0016-d01-m0016-h04-p08-s0")
    assert not same and any("The original is done, the rerun diverged (loss is nan)" in line for line in lines)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"simulated": {}}, "was simulated, not trained"),
        ({"imported": {}}, "was imported, not trained"),
        ({"schema": 0}, "has schema 0, this version reads 1"),
        ({"config": None}, "holds no configuration"),
        ({"config_hash": "0"}, "does not have the hash it records; either the file or"),
        ({"run_id": "tiny-w0016-d01-m0016-h04-p08-s1"}, "calls itself tiny-w0016-d01-m0016-h04-p08-s1"),
    ],
)
def test_what_cannot_be_run_is_refused_in_a_sentence(original: Path, keys: dict[str, Any], sentence: str) -> None:
    change(original, **keys)
    with pytest.raises(ConfigError) as caught:
        go([str(original), "out"])
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def changed_config(directory: Path, **keys: Any) -> None:
    record = records.read_run(directory)
    assert record
    optim = {key: value for key, value in {**record["config"]["optim"], **keys}.items() if value != "gone"}
    change(directory, config={**record["config"], "optim": optim})


def test_a_record_of_another_schema_is_refused_in_a_sentence(original: Path) -> None:
    changed_config(original, momentum=0.9)
    with pytest.raises(ConfigError, match=r"was written by sovit .* 'optim.momentum' is not a key"):
        go([str(original), "out"])
    changed_config(original, momentum="gone", beta2="gone")  # and it was not the default
    with pytest.raises(ConfigError, match=r"does not have the hash it records; it lacks optim.beta2\."):
        go([str(original), "out"])
    changed_config(original, beta2="0.98")
    with pytest.raises(ConfigError, match=r"optim.beta2=0.98 is not a number but text"):
        go([str(original), "out"])


def test_a_key_that_changes_no_number_may_be_missing(original: Path) -> None:
    """Records from before `center` and `retry_of` were keys can be run again."""
    record = records.read_run(original)
    assert record
    config = {key: value for key, value in record["config"].items() if key not in ("center", "retry_of")}
    change(original, config=config)
    cfg = rerun.recorded_config(original / records.RUN, runs_dir="elsewhere")
    assert isinstance(cfg, RunConfig) and (cfg.center, cfg.runs_dir, cfg.logger.name) == (None, "elsewhere", "none")


def test_a_rerun_never_writes_over_the_original(trained: Path) -> None:
    with pytest.raises(ConfigError, match="is the original; give --out"):
        go([str(trained), str(trained.parents[1])])


def test_no_record_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no run\.json"):
        go([str(tmp_path), "out"])
    (tmp_path / records.RUN).write_text('{"sta')
    with pytest.raises(ConfigError, match="nothing tells what to run"):
        go([str(tmp_path), "out"])


@pytest.mark.parametrize(
    "arguments", [["--rerun"], ["--rerun", "x"], ["--rerun", "x", "seed=1"], ["seed=1", "--rerun"]]
)
def test_train_takes_nothing_beside_a_record(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(arguments) == 2
    assert "write --rerun RUN_JSON runs_dir=DIR" in capsys.readouterr().err


CHILD = (
    "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit({code}))\nprint('ready', flush=True)\n"
)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_cell_and_then_the_command(tmp_path: Path, number: signal.Signals) -> None:
    """The cell is told by SIGTERM, writes its checkpoint and ends; only then does the command, saying how to go on."""
    (tmp_path / "sovit_child.py").write_text(CHILD.format(code=75) + "time.sleep(60)\n")
    runner = (
        "import subprocess, sys\nfrom pathlib import Path\nfrom sovit.launch import rerun\n"
        "original = subprocess.Popen\n"
        "rerun.subprocess.Popen = lambda command, **options: original([sys.executable, 'sovit_child.py'], **options)\n"
        "sys.exit(rerun._train(Path('run.json'), Path('out'), Path('again')))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", runner], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    log, deadline = tmp_path / "again" / records.LOG, time.monotonic() + 60
    while not (log.exists() and "ready" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "the same command goes on" in out
