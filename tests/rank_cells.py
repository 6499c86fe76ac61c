"""Runs a cell in several processes of this machine, forked from one server that has everything imported once."""

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from sovit.launch.processes import free_port

LIMIT_S = 240.0


def run_ranks(
    overrides: Sequence[str],
    world: int,
    log: Path,
    *,
    stop_after: int | None = None,
    fail: dict[str, Any] | None = None,
) -> list[int]:
    """Exit codes of the ``world`` processes of a cell; what they say goes to ``log``.

    ``stop_after``: the last process is told to stop after so many steps. ``fail``: arguments of `_fail`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sovit.launch.preload"])
    port = free_port()
    ranks = [
        context.Process(target=_rank, args=(list(overrides), rank, world, port, str(log), stop_after, fail))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    left = {process.sentinel for process in ranks}
    while left:
        ended = set(wait(left, timeout=LIMIT_S))
        if not ended:
            break
        left -= ended
    for process in ranks:
        process.kill()
        process.join()
    return [process.exitcode for process in ranks]


def _rank(
    overrides: list[str],
    rank: int,
    world: int,
    port: int,
    log: str,
    stop_after: int | None,
    fail: dict[str, Any] | None,
) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if world > 1:
        words = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in words.items()} | {"MASTER_ADDR": "127.0.0.1"})
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    from sovit.lit import engine

    if stop_after is not None and rank == world - 1:
        engine._stop_on_signals = lambda: _stop_after(stop_after)
    if fail is not None:
        _fail(rank, **fail)
    sys.exit(engine.run_cell(overrides))


@contextlib.contextmanager
def _stop_after(steps: int) -> Iterator[Any]:
    asked = iter(range(1, 10**9))
    yield lambda: next(asked) >= steps


def _fail(rank: int, *, above: int) -> None:
    """Have the model be out of memory for more than ``above`` images in training."""
    import torch
    from timm.models.vision_transformer import VisionTransformer

    original = VisionTransformer.forward

    def forward(self: Any, images: Any, *arguments: Any) -> Any:
        if self.training and len(images) > above:
            raise torch.OutOfMemoryError(f"{len(images)} images")
        return original(self, images, *arguments)

    VisionTransformer.forward = forward
