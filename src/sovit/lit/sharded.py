"""A resume point in parts: every process writes what it holds, and any number of processes can go on from it.

A folder of safetensors files, one for each process that holds something of its own, an ``index.json`` that says which
rows of which tensor lie where, and ``rest.pt`` with what is no tensor of the model. torch's own distributed checkpoints
would do the same, but their index is a pickle, which runs whatever a stranger put into it; here nothing is unpickled
but plain values. Only the first dimension of a tensor is ever cut, as FSDP2 does.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sovit import records
from sovit.config import ConfigError
from sovit.lit.ranks import Ranks

INDEX, REST = "index.json", "rest.pt"
SCHEMA = 1
NOT_PLAIN = "holds Python objects beside plain values, which may run anything as they are read; it is not loaded"
MODEL, OPTIMIZER, AVERAGE = "model.", "optimizer.", "average."  # what a tensor's name begins with


class Damaged(RuntimeError):
    """A folder that holds no whole resume point; the message is a clause that says why."""


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds; shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rows_of(tensor: Tensor) -> tuple[int, int]:
    """Which rows of the whole tensor this process holds: ``start, stop``. A number without dimensions is one row."""
    num = tensor.shape[0] if tensor.ndim else 1
    if not isinstance(tensor, DTensor):
        return 0, num
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    for axis, placement in enumerate(tensor.placements):
        if placement.is_shard():
            assert placement.is_shard(0)
            chunk = -(
                -num // tensor.device_mesh.size(axis)
            )  # as torch.chunk cuts: the last parts may be short or empty
            start = min(coordinate[axis] * chunk, num)
            return start, min(start + chunk, num)
    return 0, num


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """The part of a tensor, whole or sharded as ``like`` is, that this process holds of ``like``."""
    if isinstance(whole, DTensor):
        return whole.to_local()
    start, stop = rows_of(like)
    return (whole[start:stop] if whole.ndim else whole).reshape(local(like).shape)


def alike(part: Tensor, like: Tensor) -> Tensor:
    """A tensor sharded as ``like`` is, of which this process holds ``part``; shares its memory."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by name, ``optimizer.<parameter>.<what>``: the live tensors."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{OPTIMIZER}{names[parameter]}.{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def optimizer_values(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """What the optimiser's state holds beside tensors, by parameter: counters, say."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    values = {
        names[parameter]: {key: value for key, value in state.items() if not isinstance(value, Tensor)}
        for parameter, state in optimizer.state.items()
    }
    return {name: found for name, found in values.items() if found}


def param_groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The optimiser's groups with the names of their parameters, as plain values."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return [
        {
            **{key: value for key, value in group.items() if key != "params"},
            "params": [names[p] for p in group["params"]],
        }
        for group in optimizer.param_groups
    ]


def write(
    directory: Path, tensors: Mapping[str, Tensor], rest: Mapping[str, Any], ranks: Ranks, check: Callable[[], None]
) -> None:
    """Write a resume point, called by every process: beside its place, moved there in one step by the first process.

    ``check`` is called by the first process just before the move. Raises OSError with the folder's name.
    """
    scratch = records.scratch_of(directory)
    ranks.tell(lambda: _empty(scratch))
    name = f"rank{ranks.rank:05d}.safetensors"
    mine = {key: tensor for key, tensor in tensors.items() if _writes(tensor, ranks)}
    error: OSError | None = None
    entry = None
    try:
        if mine:
            _save(scratch / name, mine)
            entry = {**_sum(scratch / name), "rows": {key: rows_of(tensor) for key, tensor in mine.items()}}
    except OSError as problem:
        error = problem
    entries = ranks.every((error, name, entry))
    errors = [failed for failed, _, _ in entries if failed is not None]
    if errors:
        ranks.tell(lambda: _remove(scratch))
        raise records.named(errors[0], directory)

    def finish() -> None:
        torch.save(dict(rest), scratch / REST)
        index = {
            "schema": SCHEMA,
            "tensors": {key: {"shape": list(t.shape), "dtype": str(t.dtype)[6:]} for key, t in tensors.items()},
            "files": {name: entry for _, name, entry in entries if entry} | {REST: _sum(scratch / REST)},
        }
        (scratch / INDEX).write_text(json.dumps(index))
        for path in scratch.iterdir():
            _flush(path)
        check()
        os.replace(scratch, directory)
        records.sync_directory(directory.parent)

    ranks.tell(finish)


def _writes(tensor: Tensor, ranks: Ranks) -> bool:
    """Whether this process is the one that writes its part: of copies, only the first."""
    if not isinstance(tensor, DTensor):
        return ranks.first
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    copies = [place for place, placement in zip(coordinate, tensor.placements, strict=True) if placement.is_replicate()]
    start, stop = rows_of(tensor)
    return not any(copies) and stop > start


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    try:
        save_file({key: local(tensor).detach().cpu().contiguous() for key, tensor in tensors.items()}, path)
    except SafetensorError as error:
        code = re.search(r"code: (\d+)", str(error))
        raise OSError(
            int(code[1]) if code else 5, os.strerror(int(code[1])) if code else str(error), str(path)
        ) from None
    mode = path.parent.stat().st_mode & 0o666  # as the other files of the run; safetensors makes it its writer's alone
    path.chmod(mode)


def _sum(path: Path) -> dict[str, int]:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            checksum = zlib.crc32(block, checksum)
    return {"bytes": path.stat().st_size, "crc32": checksum}


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _empty(directory: Path) -> None:
    _remove(directory)
    directory.mkdir()


def _remove(directory: Path) -> None:
    import shutil

    shutil.rmtree(directory, ignore_errors=True)


def read_index(directory: Path) -> dict[str, Any]:
    """The index of a resume point, once every file in it is known to be whole. Raises Damaged, and ConfigError if a later
    version wrote it, which can go on from it.
    """
    try:
        index = json.loads((directory / INDEX).read_text())
        schema, files = index["schema"], index["files"]
    except FileNotFoundError:
        raise Damaged(f"it has no {INDEX}") from None
    except (ValueError, KeyError, TypeError):
        raise Damaged(f"its {INDEX} cannot be read") from None
    if type(schema) is int and schema > SCHEMA:
        raise ConfigError(
            f"{directory} has schema {schema}, and this version reads schema {SCHEMA}; use the version that wrote it, or "
            "delete it."
        )
    if schema != SCHEMA:
        raise Damaged(f"its schema {schema!a} is none")
    for name, entry in files.items():
        path = directory / name
        if Path(name).name != name or not path.is_file():
            raise Damaged(f"{name} is missing")
        if _sum(path) != {key: entry[key] for key in ("bytes", "crc32")}:
            raise Damaged(f"{name} does not match its checksum")
    return index


def read_rest(directory: Path) -> dict[str, Any]:
    """What is no tensor of the model. Raises Damaged, and runs nothing that a pickle asks for."""
    try:
        rest = torch.load(directory / REST, map_location="cpu", weights_only=True)
    except (PermissionError, MemoryError):
        raise
    except pickle.UnpicklingError:
        raise Damaged(f"{REST} {NOT_PLAIN}") from None
    except Exception as error:  # whatever the first wrong byte leads to
        said = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        raise Damaged(f"{REST} cannot be read ({type(error).__name__}: {said})") from None
    if not isinstance(rest, dict):
        raise Damaged(f"{REST} holds no values of a run")
    return rest


def read_into(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill live tensors, whole or in parts, from a resume point. Raises Damaged if one is missing or has another shape."""
    index = read_index(directory)
    with torch.no_grad():
        for key, tensor in tensors.items():
            entry = index["tensors"].get(key)
            if entry is None:
                raise Damaged(f"it holds no {key}")
            if entry["shape"] != list(tensor.shape):
                raise Damaged(f"{key} has shape {entry['shape']} in it, not {list(tensor.shape)}")
            start, stop = rows_of(tensor)
            if stop > start:
                local(tensor).copy_(_rows(directory, index, key, start, stop).reshape(local(tensor).shape))


def read_whole(directory: Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Whole tensors by name, on the CPU; ``names`` None: all of them."""
    index = read_index(directory)
    found = {}
    for key in index["tensors"] if names is None else names:
        shape = index["tensors"][key]["shape"]
        found[key] = _rows(directory, index, key, 0, shape[0] if shape else 1).reshape(shape)
    return found


def _rows(directory: Path, index: Mapping[str, Any], key: str, start: int, stop: int) -> Tensor:
    """Rows start .. stop - 1 of a tensor, from the files that hold them."""
    parts = []
    for name, entry in index["files"].items():
        first, last = entry.get("rows", {}).get(key, (0, 0))
        low, high = max(first, start), min(last, stop)
        if low < high:
            with safe_open(directory / name, framework="pt") as file:
                if index["tensors"][key]["shape"]:
                    parts.append((low, file.get_slice(key)[low - first : high - first]))
                else:
                    parts.append((low, file.get_tensor(key).reshape(1)))
    parts.sort(key=lambda part: part[0])
    rows = torch.cat([rows for _, rows in parts]) if parts else torch.empty(0)
    if len(rows) != stop - start:
        raise Damaged(f"rows {start} to {stop - 1} of {key} are not all in it")
    return rows
