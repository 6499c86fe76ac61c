"""Two sweeps of one name: told apart by the copy of the file beside the runs."""

import os
import threading
from pathlib import Path

import pytest

from fake_cells import go, plan, starts
from sovit.launch.local.kept import keep, refuse_other
from sovit.launch.sweep import Sweep, SweepError

STAR = """# a comment
method: grid
parameters:
  experiment: {value: star_tiny}
  shape: {values: [32x4x128, 16x4x128]}
  seed: {values: [0]}
"""


def sweep(path: Path, text: str = STAR) -> Sweep:
    path.write_text(text)
    return Sweep("fake", path, {}, [])


def test_the_file_is_kept_beside_the_runs_and_the_same_sweep_goes_on(tmp_path: Path) -> None:
    star, made = sweep(tmp_path / "star.yaml"), plan(tmp_path / "runs", {"a": "done"})
    assert go(made, sweep=star) == 0
    home = tmp_path / "runs" / "fake"
    assert (home / "sweep.yaml").read_text() == STAR
    assert sorted(os.listdir(home)) == ["fake-a", "sweep.yaml"]  # no scratch
    assert (home / "sweep.yaml").stat().st_mode & 0o777 == 0o644
    assert go(made, sweep=star) == 0
    longer = STAR.replace("16x4x128]", "16x4x128, 64x4x128]").replace("[0]", "[0, 1]")
    assert go(plan(tmp_path / "runs", {"a": "done", "b": "done"}), sweep=sweep(tmp_path / "copy.yaml", longer)) == 0
    assert (home / "sweep.yaml").read_text() == longer
    assert starts(tmp_path / "runs") == ["a", "b"]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("star_tiny", "grid_tiny", "experiment: star_tiny; here: experiment: grid_tiny"),
        (
            "shape: {values: [32x4x128, 16x4x128]}",
            "model.width: {values: [16]}",
            "no model.width; here: model.width varies",
        ),
        ("  seed: {values: [0]}\n", "", "seed varies; here: no seed"),
        ("  seed", "  optim.lr: {value: 0.1}\n  seed", "no optim.lr; here: optim.lr: 0.1"),
        ("{values: [0]}", "{value: 0}", "seed varies; here: seed: 0"),
    ],
)
def test_another_sweep_of_the_same_name_is_refused(tmp_path: Path, old: str, new: str, told: str) -> None:
    assert go(plan(tmp_path, {"a": "done"}), sweep=sweep(tmp_path / "star.yaml")) == 0
    assert old in STAR
    other = sweep(tmp_path / "other.yaml", STAR.replace(old, new))
    with pytest.raises(SweepError) as refused:
        go(plan(tmp_path, {"b": "done"}), sweep=other)
    assert all(part in str(refused.value) for part in (told, "other.yaml", "fake/sweep.yaml", "name=NEW"))
    assert starts(tmp_path) == ["a"]
    assert (tmp_path / "fake" / "sweep.yaml").read_text() == STAR


def test_of_two_sweeps_that_begin_at_once_one_is_refused(tmp_path: Path) -> None:
    """Both have found no copy when they write theirs."""
    sweeps = [sweep(tmp_path / f"{n}.yaml", STAR.replace("star_tiny", f"star_{n}")) for n in range(8)]
    refused: list[Sweep] = []
    gate = threading.Barrier(8)

    def begin(one: Sweep) -> None:
        gate.wait()
        try:
            keep(one, tmp_path / "home")
        except SweepError:
            refused.append(one)

    threads = [threading.Thread(target=begin, args=(one,)) for one in sweeps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 7
    [kept] = [one for one in sweeps if one not in refused]
    assert (tmp_path / "home" / "sweep.yaml").read_text() == kept.path.read_text()
    assert os.listdir(tmp_path / "home") == ["sweep.yaml"]


@pytest.mark.parametrize("text", ["", "[]", "parameters: 3", "parameters: {a: 3}", ": :", "\x00"])
def test_a_spoilt_copy_is_one_sentence(tmp_path: Path, text: str) -> None:
    star = sweep(tmp_path / "star.yaml")
    (tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises(SweepError, match=r"sweep.yaml is not a sweep file; delete it"):
        refuse_other(star, tmp_path)
