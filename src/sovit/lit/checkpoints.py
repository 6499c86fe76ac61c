"""Resume points on disk: how they are named, written so that neither a kill nor a full disk leaves half of one, and chosen.

A resume point is a file ``segment003-step00000160.ckpt``, or of a sharded run a folder (`sovit.lit.sharded`); either is
read whatever the run is spread over now. Names sort by age, and what is in its place is never touched again. Kept are the
two newest points and the two newest ends of trunk segments, from which the branches leave: if the newest is damaged, the
run goes on from the one before.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.fabric.plugins import CheckpointIO

from sovit import records
from sovit.config import ConfigError
from sovit.lit import sharded
from sovit.schedule import Segment

GENERATIONS = 2
KEY = "sovit"  # of what a checkpoint carries beside Lightning's own
_NAME = re.compile(r"segment(\d{3,})-step(\d{8,})\.ckpt")


class Unusable(RuntimeError):
    """A resume point that cannot be gone on from; the message says why."""


class ResumePoint(NamedTuple):
    """Where a run stood: in which segment of its plan, after how many updates."""

    segment: int
    step: int

    @property
    def name(self) -> str:
        return f"segment{self.segment:03d}-step{self.step:08d}.ckpt"


def resume_points(directory: Path) -> list[ResumePoint]:
    """The resume points in a run directory, the newest last."""
    matches = (_NAME.fullmatch(path.name) for path in directory.glob("segment*.ckpt"))
    return sorted(ResumePoint(int(match[1]), int(match[2])) for match in matches if match)


def origin(plan: Sequence[Segment], index: int) -> ResumePoint | None:
    """The end of the trunk segment from which a segment leaves; None if it leaves from the random initialisation."""
    if plan[index].start == 0:
        return None
    trunk = max(i for i in range(index) if plan[i].kind == "trunk")
    assert plan[trunk].stop == plan[index].start
    return ResumePoint(trunk, plan[trunk].stop)


def begin(directory: Path, plan: Sequence[Segment], config_hash: str) -> tuple[ResumePoint | None, dict[str, Any]]:
    """The newest usable resume point and what it remembers, or (None, {}): the run starts from scratch.

    Says in a line each which points are unusable and why, and removes them together with unfinished files. Raises
    ConfigError, before anything is removed, if a point belongs to another configuration.
    """
    unusable: list[ResumePoint] = []
    chosen, state = None, {}
    for point in reversed(resume_points(directory)):
        try:
            state = _usable(directory, plan, point, config_hash)
            chosen = point
            break
        except Unusable as error:
            print(f"{point.name} is unusable: {error}.")
            unusable.append(point)
    if unusable:
        print(f"Going back to {chosen.name}." if chosen else "No resume point is left; starting from scratch.")
    for point in unusable:
        remove(directory / point.name)
    for scratch in directory.glob(records.scratch_of(Path("*.*")).name):
        remove(scratch)
    return chosen, state


def remove(path: Path) -> None:
    """Delete a resume point of either kind, or do nothing if it is gone."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _usable(directory: Path, plan: Sequence[Segment], point: ResumePoint, config_hash: str) -> dict[str, Any]:
    """What a resume point remembers. Raises Unusable unless the whole run can go on from it."""
    state = _checked(directory / point.name, config_hash)
    why = records.unlike(directory, state["marks"])
    if why:
        raise Unusable(why)
    following = point.segment + 1
    if plan[point.segment].kind == "branch" and following < len(plan):
        trunk = origin(plan, following)
        if trunk:
            try:
                _checked(directory / trunk.name, config_hash)
            except Unusable as error:
                raise Unusable(f"the trunk it left, {trunk.name}, is unusable: {error}") from None
    return state


def _checked(path: Path, config_hash: str) -> dict[str, Any]:
    state = read(path, mmap=True).get(KEY)
    if state is None:
        raise Unusable("it is no checkpoint of a run")
    if state["config_hash"] != config_hash:
        raise ConfigError(f"{path} belongs to another configuration; choose another name or tag, or delete it.")
    return dict(state)


def read(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """A checkpoint's content, on the CPU. Raises Unusable if it is missing or damaged, ConfigError if a later version's.

    torch does not look at the checksums in the archive: a flipped bit would be a weight like any other. Of a folder the
    content is what is no tensor of the model; `whole` adds the tensors.
    """
    if path.is_dir():
        try:
            sharded.read_index(path)
            return sharded.read_rest(path)
        except sharded.Damaged as error:
            raise Unusable(str(error)) from None
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise Unusable(f"{damaged} in it does not match its checksum")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise Unusable("it is missing") from None
    except (Unusable, PermissionError, MemoryError):
        raise
    except pickle.UnpicklingError:
        raise Unusable(f"it {sharded.NOT_PLAIN}") from None
    except Exception as error:  # a damaged archive raises whatever the first wrong byte leads to
        said = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        raise Unusable(f"it is damaged ({type(error).__name__}: {said})") from None
    if not isinstance(content, dict):
        raise Unusable("it is no checkpoint of a run")
    return content


def whole(directory: Path) -> dict[str, Any]:
    """A folder's resume point as the checkpoint that one process would have written. Raises Unusable."""
    content = read(directory)
    groups, values = content.pop("param_groups"), content.pop("optimizer_values")
    names = [name for group in groups for name in group["params"]]
    state: dict[int, dict[str, Any]] = {number: dict(values.get(name, {})) for number, name in enumerate(names)}
    model, average = {}, {}
    for key, tensor in sharded.read_whole(directory).items():
        name = key.partition(".")[2]
        if key.startswith(sharded.MODEL):
            model[key] = tensor
        elif key.startswith(sharded.AVERAGE):
            average[name] = tensor
        else:
            parameter, _, what = name.rpartition(".")
            state[names.index(parameter)][what] = tensor
    numbers = iter(range(len(names)))
    numbered = [{**group, "params": [next(numbers) for _ in group["params"]]} for group in groups]
    if average:
        content["callbacks"]["Ema"] = average
    return {**content, "state_dict": model, "optimizer_states": [{"state": state, "param_groups": numbered}]}


def by_name(content: dict[str, Any], groups: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tensors, other values of the optimiser) of a single-file checkpoint, named as in a folder.

    ``groups`` are those of the optimiser that goes on, with the parameters' names. Raises Unusable if they do not fit.
    """
    saved = content["optimizer_states"][0]
    names = [name for group in groups for name in group["params"]]
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in saved["param_groups"]]:
        raise Unusable("its optimiser has other groups of parameters")
    tensors = dict(content["state_dict"])
    values: dict[str, dict[str, Any]] = {}
    for number, state in saved["state"].items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{sharded.OPTIMIZER}{names[number]}.{key}"] = value
            else:
                values.setdefault(names[number], {})[key] = value
    return tensors, values


def write(path: Path, content: dict[str, Any], check: Callable[[], None]) -> None:
    """Write a checkpoint beside its place and move it there in one step; ``check`` is called just before the move.

    Raises OSError with the file's name, after removing what it wrote.
    """
    scratch = records.scratch_of(path)
    try:
        with scratch.open("wb") as file:
            sink = _Sink(file)
            torch.save(content, sink)  # type: ignore[arg-type]
            if sink.error is not None:
                raise sink.error
            file.flush()
            os.fsync(file.fileno())
        check()
        os.replace(scratch, path)
        records.sync_directory(path.parent)
    except BaseException as error:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise records.named(error, path) from None
        raise


class _Sink:
    """A file for torch.save that keeps the first error for later: torch turns one into a RuntimeError about itself."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        """The writer of the file does it, where an error can be raised."""


def thin_out(directory: Path, plan: Sequence[Segment]) -> None:
    """Delete the resume points that the newest generations have made superfluous."""
    points = resume_points(directory)
    ends = [point for point in points if point == (point.segment, _end_of_trunk(plan, point.segment))]
    for point in set(points) - {*points[-GENERATIONS:], *ends[-GENERATIONS:]}:
        remove(directory / point.name)


def _end_of_trunk(plan: Sequence[Segment], index: int) -> int | None:
    return plan[index].stop if index < len(plan) and plan[index].kind == "trunk" else None


def delete(directory: Path, *, keep_newest: bool) -> None:
    """Delete the resume points of a finished run, or all but the newest."""
    for point in resume_points(directory)[: -1 if keep_newest else None]:
        remove(directory / point.name)


class CheckpointFiles(CheckpointIO):
    """Lets Lightning write and read checkpoints in the way of this module."""

    def __init__(self, check: Callable[[], None]) -> None:
        self.check = check

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        write(Path(path), checkpoint, self.check)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return whole(Path(path)) if Path(path).is_dir() else read(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        remove(Path(path))
