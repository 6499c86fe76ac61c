"""Real cells that kill themselves at chosen moments, for the chaos test.

What a cell is to die of stands in ``<root>/schedule/<run id>``, one moment a line; a death is noted in ``<root>/kills``
just before it. A process takes the first moment that its cell has not died of yet, so nothing is lost if it is killed
from outside before, and the schedule is kept by the same means as anything else here: files.

Imported by the test, by the cells, and by runners that are started to be killed (``python chaos_cells.py ROOT WORKERS``).
"""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from small_cells import overrides
from sovit import claims, records
from sovit.config import compose
from sovit.launch.local.runner import run_sweep
from sovit.launch.plan import Plan, plan
from sovit.launch.sweep import Sweep

TARGET = "chaos_cells:run"
PRELOAD = ["sovit.launch.preload", "chaos_cells"]
LEASE_S = 2.0

EARLY = (
    "before the first step",
    "in a step",
    "in an evaluation",
    "between two halves of a row",
    "half-way through a checkpoint",
    "between checkpoint and rename",
    "after a rename",
    "half-way through a claim",
    "after a claim",
)
LATE = ("before the done mark", "before the done mark", "after the done mark")  # each reached once the training is over

CELL = (
    "durations.values=[10 steps,20 steps,30 steps,40 steps,60 steps,80 steps]",
    "eval.datasets=[digits]",
    "eval.shots=[1]",
    "trainer.checkpoint_every_s=1e-9",
    "name=chaos",
)


def made(root: Path, num_cells: int, workers: int, folder: str = "runs") -> Plan:
    """A plan of cells, evaluated with averaged and with cooled weights by turns."""
    cells = [
        overrides(root / folder, *CELL, f"seed={i // 2}", f"eval.weights={('ema', 'cooled')[i % 2]}", f"tag=c{i}")
        for i in range(num_cells)
    ]
    return plan(Sweep("chaos", Path("chaos.yaml"), {"name": "eval/digits_1shot/error"}, cells), workers=workers)


def go(root: Path, num_cells: int, workers: int) -> int:
    return run_sweep(
        made(root, num_cells, workers), target=TARGET, preload=PRELOAD, metric=("digits", 1), lease=LEASE_S
    )


def note(root: Path, run_id: str, moment: str) -> None:
    """One line with one write, which the kernel keeps whole."""
    file = os.open(root / "kills", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    os.write(file, f"{run_id}\t{moment}\n".encode())
    os.close(file)


def kills(root: Path) -> list[tuple[str, str]]:
    path = root / "kills"
    return [(run, moment) for run, moment in (line.split("\t") for line in path.read_text().splitlines())]


def run(given: list[str]) -> int:
    """The target: the engine, with one moment at which it dies."""
    cfg = compose(given)
    run_id, root = records.run_id(cfg), Path(cfg.runs_dir).parent
    schedule = (root / "schedule" / run_id).read_text().splitlines()
    died = sum(name == run_id and moment != "from outside" for name, moment in kills(root))
    if died < len(schedule):
        moment, _, count = schedule[died].partition("\t")
        arm(moment, int(count), lambda: die(root, run_id, moment))
    assert claims.hold.__wrapped__.__kwdefaults__  # type: ignore[attr-defined]
    claims.hold.__wrapped__.__kwdefaults__ |= {"lease": LEASE_S, "beat": LEASE_S / 5}  # type: ignore[attr-defined]
    from sovit.lit import engine

    return engine.run(cfg)


def die(root: Path, run_id: str, moment: str) -> None:
    note(root, run_id, moment)
    os.kill(os.getpid(), signal.SIGKILL)


def arm(moment: str, count: int, die: Callable[[], None]) -> None:
    """Patch this process so that it dies the ``count``-th time it comes to a moment."""
    import torch

    from sovit.lit import evaluation, module

    left = [count]

    def due() -> bool:
        left[0] -= 1
        return left[0] == 0

    def before(place: Any, name: str, wanted: Callable[..., bool] = lambda *_, **__: True) -> None:
        original = getattr(place, name)

        def patched(*args: Any, **kwargs: Any) -> Any:
            if wanted(*args, **kwargs) and due():
                die()
            return original(*args, **kwargs)

        setattr(place, name, patched)

    def after(place: Any, name: str, wanted: Callable[..., bool] = lambda *_, **__: True) -> None:
        original = getattr(place, name)

        def patched(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if wanted(*args, **kwargs) and due():
                die()
            return result

        setattr(place, name, patched)

    def to_checkpoint(source: Any, target: Any) -> bool:
        return str(target).endswith(".ckpt")

    def done(path: Path, content: Any, **_: Any) -> bool:
        return bool(content.get("status") == records.DONE)

    def half_checkpoint(content: Any, sink: Any) -> None:
        if due():
            whole = io.BytesIO()
            save(content, whole)
            sink.file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
            sink.file.flush()
            die()
        save(content, sink)

    def half_row(self: records.GrowingFiles, name: str, rows: list[dict[str, Any]]) -> None:
        if due():
            data = records.as_lines(rows).encode()
            with (self.directory / name).open("r+b") as file:
                file.seek(self.marks[name][0])
                file.write(data[: len(data) - 20])
            die()
        append(self, name, rows)

    save, append = torch.save, records.GrowingFiles.append
    if moment == "before the first step":
        before(module.LitClassifier, "training_step")
    elif moment == "in a step":
        before(module.LitClassifier, "on_before_optimizer_step")
    elif moment == "in an evaluation":
        before(evaluation, "extract")
    elif moment == "between two halves of a row":
        records.GrowingFiles.append = half_row  # type: ignore[method-assign]
    elif moment == "half-way through a checkpoint":
        torch.save = half_checkpoint
    elif moment == "between checkpoint and rename":
        before(os, "replace", to_checkpoint)
    elif moment == "after a rename":
        after(os, "replace", to_checkpoint)
    elif moment == "half-way through a claim":
        before(os, "write", lambda file, data: len(data) == claims.SIZE)
    elif moment == "after a claim":
        after(claims, "_create")
    elif moment == "before the done mark":
        before(records, "write_json", done)
    elif moment == "after the done mark":
        after(records, "write_json", done)
    else:
        raise ValueError(moment)


if __name__ == "__main__":
    for _ in range(100):
        if go(Path(sys.argv[1]), int(sys.argv[2]), workers=2) == 0:
            break
