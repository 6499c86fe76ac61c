"""A run survives damaged resume points, full and read-only disks, jumping clocks, and kills between any two writes."""

import errno
import functools
import multiprocessing
import os
import random
import resource
import shutil
import subprocess
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from small_cells import content, in_child, overrides, small, stop_at
from sovit import claims, records
from sovit.config import ConfigError, RunConfig
from sovit.lit import checkpoints, engine
from sovit.lit.module import LitClassifier

STOPS = {"ema": 20, "cooled": 26}  # after how many steps in all; the second is in the last branch
POINTS = {
    "ema": ["segment000-step00000016.ckpt", "segment000-step00000020.ckpt"],
    "cooled": ["segment002-step00000012.ckpt", "segment004-step00000018.ckpt", "segment005-step00000020.ckpt"],
}


def options(weights: str) -> tuple[str, ...]:
    return (f"eval.weights={weights}", "model.drop_path_rate=0.2", "shape=16x2x16")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[bytes]]:
    found = {}
    for weights in STOPS:
        cfg = small(tmp_path_factory.mktemp("undisturbed"), *options(weights))
        assert engine.run(cfg) == engine.OK
        found[weights] = content(cfg)
    return found


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs directories with a run that was stopped, to be copied."""
    found = {}
    for weights, step in STOPS.items():
        found[weights] = tmp_path_factory.mktemp("stopped")
        with stop_at(step):
            assert engine.run(small(found[weights], *options(weights))) == engine.STOPPED
    return found


def resumable(stopped: dict[str, Path], weights: str, tmp_path: Path, *more: str) -> tuple[RunConfig, Path]:
    """A configuration, and its run directory with a stopped run in it."""
    shutil.copytree(stopped[weights], tmp_path / "runs")
    cfg = small(tmp_path / "runs", *options(weights), *more)
    return cfg, records.run_dir(cfg)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("*.ckpt"))


def flip_a_bit(path: Path) -> None:
    """In the middle of the largest tensor: between the entries of the archive there is padding that nobody reads."""
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        entry = max(archive.infolist(), key=lambda entry: entry.file_size)
    header = entry.header_offset
    start = header + 30 + int.from_bytes(data[header + 26 : header + 28], "little")
    start += int.from_bytes(data[header + 28 : header + 30], "little")
    data[start + entry.file_size // 2] ^= 16
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "cut in half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "a flipped bit": flip_a_bit,
    "text": lambda path: path.write_text("no archive"),
    "another archive": lambda path: torch.save({"weights": torch.zeros(3)}, path),
    "a list": lambda path: torch.save([1, 2], path),
}


@pytest.mark.parametrize("weights", STOPS)
def test_two_generations_are_kept_and_the_trunk_ends_that_branches_need(
    stopped: dict[str, Path], tmp_path: Path, weights: str
) -> None:
    _, directory = resumable(stopped, weights, tmp_path)
    assert names(directory) == POINTS[weights]
    assert not list(directory.glob(".*.tmp"))


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("weights", STOPS)
def test_a_damaged_newest_point_sends_the_run_to_the_one_before(
    stopped: dict[str, Path],
    undisturbed: dict[str, list[bytes]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    weights: str,
    damage: str,
) -> None:
    cfg, directory = resumable(stopped, weights, tmp_path)
    before, newest = POINTS[weights][-2:]
    DAMAGE[damage](directory / newest)
    assert engine.run(cfg) == engine.OK
    out = capsys.readouterr().out
    assert f"{newest} is unusable: " in out
    assert f"Going back to {before}." in out
    assert content(cfg) == undisturbed[weights]
    assert not names(directory)


def test_a_damaged_trunk_sends_the_branches_that_left_it_back_too(
    stopped: dict[str, Path], undisturbed: dict[str, list[bytes]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only where a later branch needs it: the branch itself could be finished, the run could not."""
    cfg, directory = resumable(stopped, "cooled", tmp_path)
    flip_a_bit(directory / POINTS["cooled"][1])
    assert engine.run(cfg) == engine.OK  # the newest is in the last branch and needs no trunk any more
    assert "unusable" not in capsys.readouterr().out
    assert content(cfg) == undisturbed["cooled"]

    again = small(tmp_path / "again", *options("cooled"))
    with stop_at(17):  # in the second of three branches
        engine.run(again)
    directory = records.run_dir(again)
    assert names(directory) == [
        "segment000-step00000006.ckpt", "segment002-step00000012.ckpt", "segment003-step00000015.ckpt"
    ]  # fmt: skip
    flip_a_bit(directory / "segment002-step00000012.ckpt")
    capsys.readouterr()
    assert engine.run(again) == engine.OK
    out = capsys.readouterr().out
    assert "segment003-step00000015.ckpt is unusable: the trunk it left, segment002-step00000012.ckpt" in out
    assert "Going back to segment000-step00000006.ckpt." in out
    assert content(again) == undisturbed["cooled"]


@pytest.mark.parametrize("weights", STOPS)
def test_with_no_point_left_the_run_starts_from_scratch_and_says_so(
    stopped: dict[str, Path],
    undisturbed: dict[str, list[bytes]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    weights: str,
) -> None:
    cfg, directory = resumable(stopped, weights, tmp_path)
    for name in POINTS[weights]:
        flip_a_bit(directory / name)
    assert engine.run(cfg) == engine.OK
    out = capsys.readouterr().out
    assert out.count("is unusable") == len(POINTS[weights])
    assert "No resume point is left; starting from scratch." in out and "Going on" not in out
    assert content(cfg) == undisturbed[weights]


@pytest.mark.parametrize("name", records.GROWING)
@pytest.mark.parametrize("keep", [0.97, 0.3, 0.0])
def test_a_record_file_that_was_cut_sends_the_run_back_to_where_it_still_fits(
    stopped: dict[str, Path],
    undisturbed: dict[str, list[bytes]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    keep: float,
) -> None:
    cfg, directory = resumable(stopped, "ema", tmp_path)
    path = directory / name
    os.truncate(path, int(path.stat().st_size * keep))
    assert engine.run(cfg) == engine.OK
    assert f"is unusable: {name} holds " in capsys.readouterr().out
    assert content(cfg) == undisturbed["ema"]


def test_a_row_that_somebody_changed_is_written_again(
    stopped: dict[str, Path], undisturbed: dict[str, list[bytes]], tmp_path: Path
) -> None:
    cfg, directory = resumable(stopped, "ema", tmp_path)
    path = directory / records.EVALS
    path.write_bytes(path.read_bytes().replace(b'"draw": 1', b'"draw": 7', 1))
    assert engine.run(cfg) == engine.OK
    assert content(cfg) == undisturbed["ema"]


def test_any_flipped_bit_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    """torch.load alone returns another weight for most of them."""
    original = {"weights": torch.arange(40.0), "step": 3, "name": "x"}
    path = tmp_path / "point.ckpt"
    checkpoints.write(path, original, lambda: None)
    whole, draw = path.read_bytes(), random.Random(0)
    noticed = silent = 0
    for position in draw.sample(range(len(whole)), 400):
        data = bytearray(whole)
        data[position] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        try:
            found = checkpoints.read(path)
        except checkpoints.Unusable:
            noticed += 1
            continue
        silent += 1
        assert torch.equal(found.pop("weights"), original["weights"]), position
        assert found == {"step": 3, "name": "x"}, position
    assert noticed > 50 and silent, (noticed, silent)


def test_a_checkpoint_is_moved_into_place_only_while_the_run_is_ours(tmp_path: Path) -> None:
    def lost() -> None:
        raise claims.Lost("taken over")

    path = tmp_path / "point.ckpt"
    checkpoints.write(path, {"a": 1}, lambda: None)
    before = path.read_bytes()
    with pytest.raises(claims.Lost):
        checkpoints.write(path, {"a": 2}, lost)
    assert path.read_bytes() == before and names(tmp_path) == ["point.ckpt"] and len(os.listdir(tmp_path)) == 1


def test_unfinished_files_of_a_killed_process_are_removed(stopped: dict[str, Path], tmp_path: Path) -> None:
    cfg, directory = resumable(stopped, "ema", tmp_path)
    for name in ("segment000-step00000024.ckpt", records.RUN, records.PROGRESS):
        (directory / f".{name}.tmp").write_text("half of")
    assert engine.run(cfg) == engine.OK
    assert not list(directory.glob(".*.tmp"))


def test_a_kept_checkpoint_is_the_last(tmp_path: Path) -> None:
    cfg = small(tmp_path, "trainer.keep_checkpoint=true")
    assert engine.run(cfg) == engine.OK
    assert names(records.run_dir(cfg)) == ["segment000-step00000024.ckpt"]


def test_a_run_that_loses_its_claim_writes_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At whichever of its writes it finds out."""
    calls: list[int] = []
    at: dict[str, tuple[int, int]] = {}
    lost_at = 0

    def files(directory: Path) -> dict[str, tuple[int, int]]:
        found = {path.name: path.stat() for path in directory.iterdir() if not path.name.startswith(".")}
        return {name: (stat.st_mtime_ns, stat.st_size) for name, stat in found.items()}

    def check(self: claims.Claim) -> None:
        calls.append(1)
        if lost_at and len(calls) >= lost_at:
            if not at:
                at.update(files(self.directory))
            raise claims.Lost(f"{self.directory.name} was taken over.")

    monkeypatch.setattr(claims.Claim, "check", check)
    assert engine.run(small(tmp_path / "whole")) == engine.OK
    for lost_at in range(1, len(calls) + 1):
        calls.clear()
        at.clear()
        cfg = small(tmp_path / str(lost_at))
        assert engine.run(cfg) == engine.LOCKED
        assert files(records.run_dir(cfg)) == at, lost_at
        assert "was taken over" in capsys.readouterr().out
        assert not list(records.run_dir(cfg).glob(".*.tmp"))


# ---- full disks


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def child(prepare: Callable[[], None], given: list[str], log: Path) -> int:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sovit.launch.preload"])
    process = context.Process(target=in_child, args=(prepare, given, str(log)))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def sizes(cfg: RunConfig) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in records.run_dir(cfg).iterdir()}


@pytest.mark.parametrize("blocked", ["claim", "run.json", "evals.jsonl", "ckpt"])
def test_a_full_disk_stops_a_cell_with_a_sentence_and_the_same_command_goes_on(
    stopped: dict[str, Path], undisturbed: dict[str, list[bytes]], tmp_path: Path, blocked: str
) -> None:
    """RLIMIT_FSIZE makes every write beyond a size fail as a full disk does, after writing a part."""
    cfg, directory = resumable(stopped, "ema", tmp_path)
    held = sizes(cfg)
    limit = {
        "claim": 0,
        "run.json": held["run.json"] // 2,
        "evals.jsonl": held["evals.jsonl"] + 1000,
        "ckpt": held["segment000-step00000020.ckpt"] * 2 // 3,
    }[blocked]
    good = {name: (directory / name).read_bytes() for name in POINTS["ema"]}
    log = tmp_path / "log"
    code = child(functools.partial(limit_files, limit), overrides(tmp_path / "runs", *options("ema")), log)
    said = log.read_text() if log.exists() else ""
    assert code == engine.STOPPED, said
    assert "Traceback" not in said
    assert not list(directory.glob(".*.tmp"))
    assert {name: (directory / name).read_bytes() for name in names(directory)}.items() >= good.items()
    if blocked != "claim":  # under that limit the log takes nothing either
        assert blocked in said and "free some space; the same command goes on" in said, said
    assert engine.run(cfg) == engine.OK
    assert content(cfg) == undisturbed["ema"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_too_full_for_the_done_mark_leaves_a_run_to_go_on_with(
    tmp_path: Path,
    undisturbed: dict[str, list[bytes]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
) -> None:
    """The training is over and its record cannot be written: the next process has only that left to do."""
    write = records.write_json

    def full(path: Path, content: Any, **more: Any) -> None:
        if content.get("status") == records.DONE:
            raise OSError(number, os.strerror(number), str(path))
        write(path, content, **more)

    cfg = small(tmp_path, *options("ema"))
    with monkeypatch.context() as patch:
        patch.setattr(records, "write_json", full)
        assert engine.run(cfg) == engine.STOPPED
    assert "free some space; the same command goes on" in capsys.readouterr().out
    assert (records.read_run(records.run_dir(cfg)) or {})["status"] == records.RUNNING
    steps: list[int] = []
    monkeypatch.setattr(LitClassifier, "training_step", lambda *_: steps.append(1))
    assert engine.run(cfg) == engine.OK
    assert not steps and content(cfg) == undisturbed["ema"]
    record = records.read_run(records.run_dir(cfg))
    assert record and record["status"] == records.DONE and record["evals_bytes"] == len(content(cfg)[0])


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 KiB."""
    place = tmp_path / "tmpfs"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "sovit", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"no mount: {error}")
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_small_disk_that_is_made_larger(tmpfs: Path, undisturbed: dict[str, list[bytes]], tmp_path: Path) -> None:
    (tmpfs / "ballast").write_bytes(bytes(150_000))
    log = tmpfs / "log.txt"  # which cannot be written either
    code = child(nothing, overrides(tmpfs / "runs", *options("ema")), log)
    assert code == engine.STOPPED, log.read_text()
    assert "Traceback" not in log.read_text()
    subprocess.run(["mount", "-o", "remount,size=8m", str(tmpfs)], check=True)
    cfg = small(tmpfs / "runs", *options("ema"))
    assert engine.run(cfg) == engine.OK
    assert content(cfg) == undisturbed["ema"]


def nothing() -> None:
    """Nothing to prepare."""


def test_a_read_only_directory_is_one_sentence(tmpfs: Path, tmp_path: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(tmpfs)], check=True)
    log = tmp_path / "log"
    assert child(nothing, overrides(tmpfs / "runs"), log) == engine.ERROR
    said = log.read_text()
    assert "Read-only file system" in said and "make it writable, or give another runs_dir" in said
    assert said.count("\n") == 1, said


def test_a_run_directory_that_turns_read_only_is_one_sentence(tmpfs: Path, tmp_path: Path) -> None:
    """With everything of a stopped run in it."""
    subprocess.run(["mount", "-o", "remount,size=8m", str(tmpfs)], check=True)
    with stop_at(5):
        engine.run(small(tmpfs / "runs"))
    subprocess.run(["mount", "-o", "remount,ro", str(tmpfs)], check=True)
    log = tmp_path / "log"
    assert child(nothing, overrides(tmpfs / "runs"), log) == engine.ERROR
    said = log.read_text()
    assert "Read-only file system" in said and "Traceback" not in said and said.count("\n") == 1, said


def test_a_file_where_the_runs_should_be_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs").write_text("a file")
    assert engine.run(small(tmp_path / "runs")) == engine.ERROR
    assert "cannot be written (Not a directory)" in capsys.readouterr().out


# ---- records, clocks, moments


def test_a_done_run_whose_evaluations_are_gone_is_trained_again(
    tmp_path: Path, undisturbed: dict[str, list[bytes]], capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = small(tmp_path, *options("ema"), "trainer.keep_checkpoint=true")
    engine.run(cfg)
    path = records.run_dir(cfg) / records.EVALS
    rows = path.read_text().splitlines(keepends=True)
    path.write_text("".join(rows[:-1]))
    capsys.readouterr()
    assert engine.run(cfg) == engine.OK
    assert "was done, but evals.jsonl holds" in capsys.readouterr().out
    assert content(cfg) == undisturbed["ema"]
    assert engine.run(cfg) == engine.OK
    assert "is done already" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"status": "done"', "\xff"])
def test_a_record_that_cannot_be_read_is_one_sentence(tmp_path: Path, text: str) -> None:
    cfg = small(tmp_path)
    records.run_dir(cfg).mkdir(parents=True)
    (records.run_dir(cfg) / records.RUN).write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"run\.json .*; delete it and run the cell again\."):
        engine.run(cfg)


def test_an_unreadable_progress_note_stops_nothing(tmp_path: Path) -> None:
    cfg = small(tmp_path)
    records.run_dir(cfg).mkdir(parents=True)
    (records.run_dir(cfg) / records.PROGRESS).write_text("")  # after a power cut
    assert engine.run(cfg) == engine.OK


def test_a_clock_that_jumps_by_days_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, list[bytes]]
) -> None:
    days = iter([86_400.0 * random.Random(0).choice([-9, -2, 3, 40]) for _ in range(10**5)])
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + next(days))
    cfg = small(tmp_path, *options("ema"))
    with stop_at(13):
        assert engine.run(cfg) == engine.STOPPED
    assert engine.run(cfg) == engine.OK
    record = records.read_run(records.run_dir(cfg))
    assert record and 0 < record["wall_s"] < 600 and 0 < record["images_per_s"] < 1e7
    assert content(cfg) == undisturbed["ema"]


def test_what_could_explain_other_digits_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    cfg = small(tmp_path)
    engine.run(cfg)
    record = records.read_run(records.run_dir(cfg))
    assert record is not None
    assert record["machine"].keys() > {"cpu", "cores", "gpus", "torch", "instructions", "python", "numpy", "lightning"}
    assert record["machine"]["cpu"] and record["environment"]["MKL_CBWR"] == "COMPATIBLE"
    assert record["config"]["trainer"]["num_threads"] == 1 and record["data_fingerprint"] and record["code_version"]
