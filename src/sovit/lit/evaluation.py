"""Few-shot evaluation of a model in training: from its features on every target to rows of ``evals.jsonl``."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.loggers import Logger

from sovit import metric, records
from sovit.config import RunConfig
from sovit.data.stream import FewShotSet, Slices
from sovit.derived import eval_steps, model_geometry, shape_of
from sovit.fewshot import fewshot_errors, summarise, support_indices
from sovit.flops import forward_gflops
from sovit.lit.callbacks import Diverged
from sovit.lit.data import data_fingerprint, fewshot_sets
from sovit.lit.multitask import Multitask, tokens
from sovit.lit.ranks import Ranks
from sovit.models.vit import features

EVAL_BATCH = 512  # 1024 no longer fit a core's cache for wide MLPs
EVAL_BYTES = 2**28  # of a batch of images that are made when they are asked for


class Evaluation:
    """Few-shot evaluation of a model on every target; appends its rows to ``evals.jsonl`` and tells the loggers."""

    def __init__(
        self,
        cfg: RunConfig,
        growing: records.GrowingFiles | None,
        loggers: Sequence[Logger],
        ranks: Ranks,
        run_id: str,
    ) -> None:
        self.cfg, self.growing, self.loggers, self.ranks = cfg, growing, loggers, ranks
        self.durations = {0: "init", **eval_steps(cfg)}
        shape = shape_of(cfg)
        self.gflops = forward_gflops(shape, **model_geometry(cfg))
        self.fields = {
            "schema": records.SCHEMA,
            "run_id": run_id,
            "sweep": cfg.name,
            **shape.as_dict(),
            "image_size": cfg.model.image_size,
            "seed": cfg.seed,
        }
        self.prepare()

    def prepare(self) -> None:
        """Make ready what the model is evaluated on. Raises ConfigError."""
        self.targets = fewshot_sets(self.cfg, self.ranks.rank)
        self.drawn = [_drawn(target, self.cfg) for target in self.targets]
        self.multitask = Multitask(self.cfg) if self.cfg.eval.multitask else None

    def __call__(self, model: torch.nn.Module, step: int, weights: str) -> None:
        """Raises Diverged if the features are not finite."""
        examples = step * self.cfg.trainer.global_batch_size
        compute = examples * self.gflops
        about = {
            **self.fields,
            "step": step,
            "examples_seen": examples,
            "forward_gflops": self.gflops,
            "t_gflops": compute,
            "duration": self.durations[step],
            "weights": weights,
        }
        rows, metrics = self.scored(model, step)
        if self.growing is not None:
            self.growing.append(records.EVALS, [{**about, **row} for row in rows])
        for logger in self.loggers:
            logger.log_metrics({"t_gflops": compute, "examples_seen": examples, **metrics}, step)

    def scored(self, model: torch.nn.Module, step: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """Rows of ``evals.jsonl``, from the data set on, and metrics for the loggers. Raises as a call does."""
        rows: list[dict[str, Any]] = []
        metrics: dict[str, float] = {}
        for target, (rows_drawn, images_drawn) in zip(self.targets, self.drawn, strict=True):
            support = extract(model, images_drawn, self.ranks)
            train = support.new_zeros(len(target.train_labels), support.shape[1])
            if self.ranks.first:  # the others are given no features
                train[rows_drawn] = support
            test = extract(model, target.test_images, self.ranks)
            found = self.ranks.tell(functools.partial(self._errors_of, target, train, test, step))
            rows += [{"dataset": target.name, **dataclasses.asdict(row)} for row in found]
            for summary in summarise(found):
                metrics[metric.key(target.name, summary.shots)] = summary.error
        if self.multitask is not None:
            scores = self._scores(self.multitask, model, step)
            rows += scores
            for name in dict.fromkeys(score["dataset"] for score in scores):
                values = [score["error"] for score in scores if score["dataset"] == name]
                metrics[metric.key(name, 0)] = sum(values) / len(values)
        return rows, metrics

    def _scores(self, multitask: Multitask, model: torch.nn.Module, step: int) -> list[dict[str, Any]]:
        """The rows of a decoder on the model's tokens; the first process trains it, the others wait."""
        train, test = (extract(model, part, self.ranks, tokens) for part in (multitask.train, multitask.test))
        device = next(model.parameters()).device

        def scores() -> list[dict[str, Any]]:
            if not (train.isfinite().all() and test.isfinite().all()):
                raise Diverged(f"tokens are not finite at step {step}", step)
            return multitask.scores(train.to(device), test.to(device))

        return self.ranks.tell(scores)

    def _errors_of(self, target: FewShotSet, train: torch.Tensor, test: torch.Tensor, step: int) -> list[Any]:
        if not (train.isfinite().all() and test.isfinite().all()):
            raise Diverged(f"features are not finite at step {step}", step)
        return self._errors(target, train, test)

    def baselines(self, shared: Path) -> dict[str, Any]:
        """What an error must beat: chance, and the same ridge regression on raw pixels, per data set and shots.

        The same for every cell of a sweep, so the first one to get here leaves them in the file ``shared``.
        """
        depends = {
            "data": data_fingerprint(self.cfg),
            "image": (self.cfg.model.image_size, self.cfg.model.channels),
            **{key: value for key, value in vars(self.cfg.eval).items() if key not in ("weights", "ema_horizon")},
        }
        if self.multitask is not None:
            depends |= self.multitask.depends(shape_of(self.cfg).patch_size)
        key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]
        with suppress(ValueError):
            known = (records.read_object(shared) or {}).get(key)
            if known is not None:
                return known
        found = {}
        for target in self.targets:
            pixels = None  # of images too many to hold
            if isinstance(target.train_images, torch.Tensor) and isinstance(target.test_images, torch.Tensor):
                train, test = target.train_images.flatten(1), target.test_images.flatten(1)
                pixels = {str(row.shots): row.error for row in summarise(self._errors(target, train, test))}
            found[target.name] = {"chance": 1 - 1 / target.num_classes, "pixels": pixels}
        if self.multitask is not None:
            found |= self.multitask.baselines(shape_of(self.cfg).patch_size)
        with suppress(OSError):  # two cells at once: the same numbers
            records.write_json(shared, {key: found})
        return found

    def _errors(self, target: FewShotSet, train: torch.Tensor, test: torch.Tensor) -> list[Any]:
        return fewshot_errors(
            train,
            target.train_labels,
            test,
            target.test_labels,
            target.num_classes,
            shots=self.cfg.eval.shots,
            num_draws=self.cfg.eval.num_draws,
            l2=self.cfg.eval.l2_reg,  # type: ignore[arg-type]
        )


def _drawn(target: FewShotSet, cfg: RunConfig) -> tuple[torch.Tensor, torch.Tensor | Slices]:
    """Rows of the pool that some draw takes, and their images: the others need no features."""
    images, labels = target.train_images, np.asarray(target.train_labels)
    if not isinstance(images, torch.Tensor):  # few are left over where images are read for the draws
        return torch.arange(len(images)), images
    draws = [
        support_indices(labels, target.num_classes, max(cfg.eval.shots), draw) for draw in range(cfg.eval.num_draws)
    ]
    rows = torch.from_numpy(np.unique(np.concatenate([positions for draw in draws for positions in draw])))
    return rows, images[rows]


@torch.no_grad()
def extract(
    model: torch.nn.Module,
    images: torch.Tensor | Slices,
    ranks: Ranks | None = None,
    of: Callable[..., torch.Tensor] | None = None,
) -> torch.Tensor:
    """Pre-logits (N, width) of images (N, channels, size, size), in batches, as float32 on the CPU.

    ``of(model, images)``: what is made of a batch instead.

    ``images`` is a tensor, or anything with a length whose slices are tensors. Every process works on its share, in the
    same number of batches, and the first one gets them all.
    """
    ranks = ranks or Ranks()
    weights = next(model.parameters())
    mine, most = ranks.share(len(images)), -(-len(images) // ranks.world)
    size = EVAL_BATCH
    if not isinstance(images, torch.Tensor):
        size = min(EVAL_BATCH, max(16, EVAL_BYTES // (4 * images[:1].numel())))
    parts = []
    for start in range(mine.start, mine.start + most, size):
        batch = images[start : min(start + size, mine.stop)] if start < mine.stop else images[:0]
        num = min(size, mine.start + most - start)
        if len(batch) < num:  # a sharded model is computed by all processes together
            batch = torch.cat([batch, batch.new_zeros(num - len(batch), *batch.shape[1:])])
        found = (of or features)(model, batch.to(weights.device, weights.dtype))  # type: ignore[arg-type]
        parts.append(found.float().cpu())
    return ranks.collect(torch.cat(parts), len(images))
