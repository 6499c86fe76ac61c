"""Which GPUs a cell gets: as many as it has processes, the ones with the fewest cells on them.

On a CPU a slot is a worker and names nothing. What memory a GPU has left is not looked at.
"""

from __future__ import annotations

from collections.abc import Sequence

from sovit.launch.plan import Plan
from sovit.launch.processes import wanted
from sovit.launch.sweep import SweepError


class Slots:
    """What is free on this machine for the cells of a plan. Raises ConfigError for a cell that it cannot hold."""

    def __init__(self, plan: Plan, gpus: Sequence[str]) -> None:
        self.free_workers = plan.workers
        most = max((cell.devices for cell in plan.cells), default=1)
        seen = []
        for cell in plan.cells:
            if cell.nodes > 1:
                raise SweepError(
                    f"parallel.nodes={cell.nodes}, but this is one machine; use --launcher slurm, or leave it out."
                )
            what = (cell.config.parallel, cell.config.trainer)
            if what not in seen:  # each may ask nvidia-smi
                seen.append(what)
                wanted(cell.config, {})
        if gpus and most > len(gpus):
            raise SweepError(
                f"parallel.devices={most}, but {len(gpus)} GPUs are visible here; write {len(gpus)} or fewer."
            )
        # Workers beyond the GPUs were asked for: they share. Not more of them on one GPU than that takes.
        shared = -(-plan.workers * most // len(gpus)) if gpus else 0
        self.free = dict.fromkeys(gpus, max(shared, plan.cells_per_gpu))

    def fit(self, devices: int) -> bool:
        """Whether a cell of so many processes could start now."""
        named = sum(room > 0 for room in self.free.values())
        return self.free_workers > 0 and (not self.free or named >= devices)

    def take(self, devices: int) -> tuple[str, ...]:
        """GPUs for a cell that fits, in the machine's order; none on a CPU."""
        self.free_workers -= 1
        order = list(self.free)
        chosen = sorted(order, key=lambda gpu: -self.free[gpu])[:devices]  # a stable sort
        for gpu in chosen:
            self.free[gpu] -= 1
        return tuple(sorted(chosen, key=order.index))

    def give(self, gpus: Sequence[str]) -> None:
        """Take back what a cell had."""
        self.free_workers += 1
        for gpu in gpus:
            self.free[gpu] += 1
