"""Few-shot linear regression on frozen features (`sovit.fewshot`), on several data sets.

``l2_reg=rank`` is the older public variant: for each number of shots ONE l2 for all data sets, the one with the best mean
rank of accuracy. That variant ranked on the test sets; here the images that a draw leaves over of the support pool rank,
and test data choose nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata

from sovit.config import ConfigError
from sovit.data.stream import FewShotSet
from sovit.derived import fewshot_name
from sovit.downstream import sets
from sovit.fewshot import LOO_GRID, fewshot_errors, fit_ridge, summarise, support_indices
from sovit.lit.evaluation import extract
from sovit.lit.trained import Trained

MOST_PIXELS = 2**28  # numbers of a data set whose raw pixels are a baseline


@dataclass
class Config:
    name: str = "fewshot"
    data: list[str] = field(default_factory=lambda: ["fractals", "digits"])
    shots: list[int] | None = None  # null: as in training
    num_draws: int | None = None  # null: as in training
    l2_reg: float | str | None = None  # null: as in training; a number, loo, or rank


def check(cfg: Config, trained: Trained) -> None:
    shots, draws, l2 = _settings(cfg, trained)
    if not cfg.data or len({fewshot_name(data) for data in cfg.data}) < len(cfg.data):
        raise ConfigError(f"task.data={cfg.data} must name at least one data set, and none of them alike.")
    for data in cfg.data:
        sets.check(data, trained.cfg)
    if not shots or min(shots) < 1 or len(set(shots)) < len(shots):
        raise ConfigError(f"task.shots={shots} must be different whole numbers of at least 1.")
    if draws < 1:
        raise ConfigError(f"task.num_draws={draws} must be at least 1.")
    if isinstance(l2, str) and l2 not in ("loo", "rank"):
        raise ConfigError(f"task.l2_reg={l2!a} is neither a number nor loo or rank.")
    if not isinstance(l2, str) and not l2 > 0:
        raise ConfigError(f"task.l2_reg={l2} must be positive.")


def depends(trained: Trained, cfg: Config) -> dict[str, str]:
    return {data: sets.fingerprint(data, trained.cfg) for data in cfg.data}


def run(trained: Trained, cfg: Config, work: Path) -> dict[str, Any]:
    """Rows by data set and shots: mean error over the draws with a 95 % interval, chance, and the ridge on raw pixels."""
    shots, draws, l2 = _settings(cfg, trained)
    found = [sets.fewshot(data, trained.cfg, shots=shots) for data in cfg.data]
    for one in found if cfg.shots is not None else ():
        least = int(np.bincount(one.train_labels.numpy(), minlength=one.num_classes).min())
        if shots[-1] > least:
            raise ConfigError(
                f"task.shots asks for {shots[-1]} images of each class, but {one.name} has {least} of one to draw from; "
                "ask for fewer."
            )
    features = [(extract(trained.model, one.train_images), extract(trained.model, one.test_images)) for one in found]
    chosen: dict[int, float | str] = dict.fromkeys(shots, l2)
    if l2 == "rank":
        chosen = dict(by_mean_rank([(x, one) for (x, _), one in zip(features, found, strict=True)], shots, draws))
    rows, every = [], []
    for one, (train, test) in zip(found, features, strict=True):
        pixels = _pixels(one, shots, draws, "loo" if l2 == "rank" else l2)  # l2 of features is none of pixels
        for num in shots:
            of_draws = _errors(one, train, test, num, draws, chosen[num])
            [mean] = summarise(of_draws)
            rows.append(
                {
                    "dataset": one.name,
                    "shots": num,
                    "error": mean.error,
                    "stderr": mean.stderr,
                    "lo": max(0.0, mean.error - 1.96 * mean.stderr),
                    "hi": min(1.0, mean.error + 1.96 * mean.stderr),
                    "chance": 1 - 1 / one.num_classes,
                    "pixels": pixels and pixels[num],
                    "num_test": len(one.test_labels),
                }
            )
            every += [{"dataset": one.name, **asdict(row)} for row in of_draws]
    return {
        "l2_reg": l2,
        "num_draws": draws,
        "interval": "95 %, normal: draws and test images",
        "rows": rows,
        "draws": every,
    }


def text(result: dict[str, Any]) -> list[str]:
    lines = [f"{'data set':<20} {'shots':>5} {'error':>7}  {'95 % interval':<15} {'pixels':>7} {'chance':>7}"]
    for row in result["rows"]:
        pixels = "-" if row["pixels"] is None else f"{row['pixels']:.3f}"
        lines.append(
            f"{row['dataset']:<20} {row['shots']:>5} {row['error']:>7.3f}  {row['lo']:.3f} .. {row['hi']:.3f}  "
            f"{pixels:>7} {row['chance']:>7.3f}"
        )
    l2s = sorted({f"{row['l2_reg']:g}" for row in result["draws"]}, key=float)
    return [*lines, f"mean of {result['num_draws']} draws; l2_reg={result['l2_reg']}: {', '.join(l2s)}"]


def by_mean_rank(
    pools: Sequence[tuple[torch.Tensor, FewShotSet]], shots: Sequence[int], num_draws: int
) -> dict[int, float]:
    """For each number of shots the l2 of `LOO_GRID` with the best mean rank of accuracy over the data sets.

    ``pools``: features (N, D) of each support pool, and the data set. Accuracy is the mean over draws, counted on the
    images of the pool that are in no support of the draw. Raises ConfigError if a draw leaves none over.
    """
    accuracy = np.zeros((len(shots), len(pools), len(LOO_GRID)))
    for p, (pool, one) in enumerate(pools):
        labels = one.train_labels.numpy()
        for draw in range(num_draws):
            support = support_indices(labels, one.num_classes, max(shots), draw)
            rest = np.setdiff1d(np.arange(len(labels)), np.concatenate(support))
            if not len(rest):
                raise ConfigError(
                    f"task.l2_reg=rank needs images of {one.name} beyond the {max(shots)} shots to rank on; ask for fewer."
                )
            for s, num in enumerate(shots):
                rows = np.concatenate([positions[:num] for positions in support])
                ridge = fit_ridge(pool[torch.from_numpy(rows)], labels[rows], one.num_classes, LOO_GRID)
                right = ridge.predict(pool[torch.from_numpy(rest)]).cpu().numpy() == labels[rest]
                accuracy[s, p] += right.mean(1) / num_draws
    return {num: LOO_GRID[best_by_rank(accuracy[s])] for s, num in enumerate(shots)}


def best_by_rank(accuracy: NDArray[np.float64]) -> int:
    """The column of ``accuracy`` (data sets, candidates) with the best mean rank in its rows, the last one of equals."""
    ranks = rankdata(accuracy, axis=1).mean(0)
    return int(np.flatnonzero(ranks == ranks.max())[-1])


def _settings(cfg: Config, trained: Trained) -> tuple[list[int], int, float | str]:
    own = trained.cfg.eval
    shots = own.shots if cfg.shots is None else cfg.shots
    draws = own.num_draws if cfg.num_draws is None else cfg.num_draws
    return sorted(shots), draws, own.l2_reg if cfg.l2_reg is None else cfg.l2_reg


def _errors(
    one: FewShotSet, train: torch.Tensor, test: torch.Tensor, num: int, draws: int, l2: float | str
) -> list[Any]:
    labels = one.train_labels, one.test_labels
    return fewshot_errors(train, labels[0], test, labels[1], one.num_classes, [num], draws, l2)  # type: ignore[arg-type]


def _pixels(one: FewShotSet, shots: Sequence[int], draws: int, l2: float | str) -> dict[int, float] | None:
    """Errors of the same regression on raw pixels, or None where they are too many to hold."""
    images = one.train_images, one.test_images
    if not all(isinstance(part, torch.Tensor) and math.prod(part.shape) <= MOST_PIXELS for part in images):
        return None
    train, test = (part[:].flatten(1) for part in images)
    return {num: summarise(_errors(one, train, test, num, draws, l2))[0].error for num in shots}
