"""The processes of one run: who is first, and what they tell each other beside gradients.

The first process owns the run's records; all of them take the same decisions at the same step. What they exchange here
goes through the CPU, so that no step waits for a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sovit.launch.processes import Place

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)  # for which one process may leave the others waiting: a checkpoint, an evaluation


class PortTaken(RuntimeError):
    """Another program listens where the processes were to meet; the message says where."""


@dataclass
class Ranks:
    """Process ``rank`` of ``world``. ``local_world`` of them share this node."""

    rank: int = 0
    world: int = 1
    local_world: int = 1
    _pending: tuple[Any, Tensor] | None = field(default=None, repr=False)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def tell(self, make: Callable[[], T]) -> T:
        """What ``make`` returns in the first process, or raises there, in all of them."""
        if self.world == 1:
            return make()
        said: list[Any] = [None, None]
        if self.first:
            try:
                said[0] = make()
            except Exception as error:
                said[1] = error
        dist.broadcast_object_list(said, src=0, device=torch.device("cpu"))
        if said[1] is not None:
            raise said[1]
        return said[0]

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes; a value that is not finite anywhere is not finite in the sum of positive ones."""
        if self.world == 1:
            return values
        summed = values.clone()
        dist.all_reduce(summed)
        return summed

    def agree(self, *wishes: bool) -> tuple[bool, ...]:
        """What some process wished for at the step before; alone, what this one wishes now. Never waits for long.

        To be called at every step by every process: the answer to a call arrives while the next step is computed.
        """
        if self.world == 1:
            return wishes
        answer = self.settle() or (False,) * len(wishes)
        flags = torch.tensor(wishes, dtype=torch.uint8)
        self._pending = (dist.all_reduce(flags, op=dist.ReduceOp.MAX, async_op=True), flags)
        return answer

    def settle(self) -> tuple[bool, ...] | None:
        """The answer that is still under way, if there is one; before anything else is exchanged at the end of a segment."""
        if self._pending is None:
            return None
        work, flags = self._pending
        work.wait()
        self._pending = None
        return tuple(bool(flag) for flag in flags)

    def every(self, value: T) -> list[T]:
        """The values of all processes, in the order of the ranks."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def share(self, num: int) -> slice:
        """This process's part of ``num`` things: ``ceil(num / world)`` of them, fewer or none for the last processes."""
        most = -(-num // self.world)
        return slice(min(self.rank * most, num), min((self.rank + 1) * most, num))

    def collect(self, part: Tensor, num: int) -> Tensor:
        """The ``num`` rows of which every process brings its `share`, padded to ``ceil(num / world)`` rows.

        On the CPU, in the first process; elsewhere empty.
        """
        part = part.cpu().contiguous()
        if self.world == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self.world)] if self.first else None
        dist.gather(part, parts, dst=0)
        return part[:0] if parts is None else torch.cat(parts)[:num]


@contextmanager
def joined(place: Place | None) -> Iterator[Ranks]:
    """The processes of this run, connected; a run of one process needs no connection."""
    if place is None or place.world == 1:
        yield Ranks()
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, rank=place.rank, world_size=place.world, timeout=TIMEOUT)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error):
            raise PortTaken(f"port {os.environ['MASTER_PORT']} is taken by another program.") from None
        raise
    try:
        yield Ranks(place.rank, place.world, place.local_world)
    finally:
        dist.destroy_process_group()
