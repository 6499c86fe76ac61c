"""A training loop on one device that goes on where it was killed, for the tasks that train a model or a part of one.

SGD with momentum, gradients clipped, a linear warm-up and a cosine to zero (SoViT, arXiv 2305.13035, table 8). It is not
Lightning's Trainer: several short trainings share one resume file here with the best weights so far, nothing is spread
over devices, and what is left without those is this loop.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sovit.lit import checkpoints
from sovit.schedule import learning_rate_scale


@dataclass(frozen=True)
class Recipe:
    """Of one training. ``clip_norm`` None: gradients are not clipped."""

    lr: float
    steps: int
    warmup_steps: int
    clip_norm: float | None = 1.0
    momentum: float = 0.9

    def scale(self, step: int) -> float:
        return learning_rate_scale(
            step, kind="cosine", total_steps=self.steps, warmup_steps=self.warmup_steps, timescale=1, cooldown_steps=0
        )


class ResumeFile:
    """What a killed process left, a mapping of tensors and plain values; an unusable file counts as none, and is named.

    Written whole beside its place and moved there, at most every ``every_s`` seconds where `due` is asked.
    """

    def __init__(self, path: Path, every_s: float) -> None:
        self.path, self.every_s, self.written = path, every_s, time.monotonic()
        self.content: dict[str, Any] = {}
        if path.exists():
            try:
                self.content = checkpoints.read(path)
            except checkpoints.Unusable as error:
                print(f"{path} is unusable: {error}. Starting anew.", file=sys.stderr, flush=True)

    def due(self) -> bool:
        return time.monotonic() - self.written >= self.every_s

    def write(self, **changes: Any) -> None:
        """Change some entries, those that become None go, and write all. Raises OSError."""
        self.content = {key: value for key, value in (self.content | changes).items() if value is not None}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        checkpoints.write(self.path, self.content, lambda: None)
        self.written = time.monotonic()


def train(
    model: nn.Module,
    groups: Iterable[dict[str, Any]],
    recipe: Recipe,
    batches: Callable[[int], Iterator[Any]],
    losses: Callable[[Any], Iterable[Tensor]],
    resume: ResumeFile,
    name: str,
    *,
    look_at: Collection[int] = (),
    look: Callable[[], dict[str, Any]] = dict,
) -> list[dict[str, Any]]:
    """Train the parameters of ``groups`` of ``model`` in place; returns a row for every step of ``look_at``.

    ``groups`` as of a torch optimiser, with the factor ``lr_scale`` (1 if left out) on the recipe's rate. ``batches(k)``
    gives the batches from step k on, ``losses(batch)`` the terms whose sum is the loss, each followed by its own backward
    pass. A row is {"step", "loss"} of the step just made with what ``look()`` adds. A loss that is not finite at such a
    step ends the training there, with loss None in the last row. The state goes to the entry ``name`` of ``resume``, and the
    training goes on from there if it is there already.
    """
    groups = [
        {key: value for key, value in group.items() if key != "lr_scale"} | {"lr": recipe.lr * group.get("lr_scale", 1)}
        for group in groups
    ]
    optimizer = torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum)
    rates = [group["lr"] for group in optimizer.param_groups]
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    begin, rows = 0, []
    state = resume.content.get(name)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        begin, rows = state["step"], list(state["rows"])
    if rows and rows[-1]["loss"] is None:
        return rows
    for step, batch in zip(range(begin, recipe.steps), batches(begin), strict=False):
        optimizer.zero_grad(set_to_none=True)
        loss: Tensor | float = 0.0
        for term in losses(batch):
            term.backward()
            loss = loss + term.detach()
        if recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_(trained, recipe.clip_norm)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * recipe.scale(step)
        optimizer.step()
        if step + 1 in look_at:
            value = float(loss)
            rows.append({"step": step + 1, "loss": value if math.isfinite(value) else None, **look()})
            if rows[-1]["loss"] is None:
                break
        if resume.due():
            now = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1, "rows": rows}
            resume.write(**{name: now})
    return rows
