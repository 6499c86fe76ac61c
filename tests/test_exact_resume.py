"""A run on image files, killed in the middle of an epoch: what it does then is what it would have done."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from rank_cells import run_ranks
from sovit import records
from sovit.data.generate import main as generate
from test_parallel import assert_same_run, state

CELL = [
    *("shape=16x2x32", "name=t", "logger=none", "data=imagefolder", "data.num_classes=4", "data.mixup=0.3"),
    *("data.randaugment_ops=1", "model.channels=3", "eval.datasets=[fractals]", "data.num_heldout=4", "eval.shots=[1]"),
    *("durations.values=[7 steps,14 steps]", "durations.first=null", "durations.last=null", "durations.num=null"),
    *(
        "eval.num_draws=1",
        "trainer.global_batch_size=16",
        "trainer.log_every_n_steps=1",
        "trainer.keep_checkpoint=true",
    ),
    "schedule.warmup_steps=1",
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 classes of 12 images, so that an epoch is three steps; and files that cannot be read."""
    folder = tmp_path_factory.mktemp("images")
    assert generate([str(folder), "--kind", "imagefolder", "--classes", "4", "--images", "12", "--damage"]) == 0
    return folder


def cell(images: Path, runs: Path, *more: str) -> list[str]:
    return [*CELL, f"data.root={images}", "data.split=train", f"runs_dir={runs}", *more]


def directory(runs: Path) -> Path:
    [path] = (runs / "t").glob("t-*")
    return path


@pytest.fixture(scope="module")
def undisturbed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("undisturbed")
    assert run_ranks(cell(images, runs, "data.num_workers=0"), 1, runs / "log") == [0], (runs / "log").read_text()
    return directory(runs)


def assert_same_bytes(found: Path, wanted: Path) -> None:
    for name in records.GROWING:
        assert (found / name).read_bytes() == (wanted / name).read_bytes(), name
    mine, theirs = state(found), state(wanted)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_stopped_in_an_epoch_goes_on_with_the_images_it_would_have_seen(
    workers: int, images: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Weights, optimiser, schedule, order of the data, augmentation, mixtures and metrics, bit for bit."""
    log, ours = tmp_path / "log", cell(images, tmp_path / "runs", f"data.num_workers={workers}")
    assert run_ranks(ours, 1, log, stop_after=4) == [75], log.read_text()
    assert run_ranks(ours, 1, log) == [0], log.read_text()
    assert "Going on from step 4" in log.read_text()
    assert_same_bytes(directory(tmp_path / "runs"), undisturbed)


def alive(pid: int) -> bool:
    return stat(pid)[:1] not in ([], ["Z"])


def stat(pid: int) -> list[str]:
    """State, parent and so on of a process; nothing if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def descendants(pid: int) -> list[int]:
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    children = [one for one in pids if stat(one)[1:2] == [str(pid)]]
    return [one for child in children for one in (child, *descendants(child))]


def test_a_killed_run_with_workers_goes_on_with_the_images_it_would_have_seen(
    images: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """By SIGKILL, its worker processes with it, whatever they had fetched ahead."""
    import multiprocessing

    from rank_cells import _rank

    ours = cell(images, tmp_path / "runs", "data.num_workers=2", "trainer.checkpoint_every_s=0.01")
    log = tmp_path / "log"
    context = multiprocessing.get_context("forkserver")
    for _ in range(2):
        process = context.Process(target=_rank, args=(ours, 0, 1, 0, str(log), None, None))
        process.start()
        deadline = time.monotonic() + 200
        before = len(list((tmp_path / "runs").glob("t/*/segment*.ckpt")))
        while process.is_alive() and time.monotonic() < deadline:
            points = list((tmp_path / "runs").glob("t/*/segment*.ckpt"))
            if len(points) > before or any("00000009" in point.name for point in points):
                break
            time.sleep(0.002)
        workers = descendants(process.pid)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        deadline = time.monotonic() + 60
        while any(map(alive, workers)):
            assert time.monotonic() < deadline, "a killed run leaves its workers behind"
            time.sleep(0.1)
    assert run_ranks(ours, 1, log) == [0], log.read_text()
    assert_same_bytes(directory(tmp_path / "runs"), undisturbed)


def test_another_number_of_processes_takes_the_same_global_batches(images: Path, tmp_path: Path) -> None:
    """In float64: begun by two processes with a worker each, ended by four, against one without workers."""
    exact = "trainer.precision=64-true"
    log = tmp_path / "log"
    assert run_ranks(cell(images, tmp_path / "alone", exact, "data.num_workers=0"), 1, log) == [0], log.read_text()
    spread = cell(images, tmp_path / "spread", exact, "parallel=fsdp")
    assert run_ranks([*spread, "data.num_workers=1"], 2, log, stop_after=4) == [75, 75], log.read_text()
    assert run_ranks([*spread, "data.num_workers=0"], 4, log) == [0] * 4, log.read_text()
    assert_same_run(directory(tmp_path / "spread"), directory(tmp_path / "alone"))
