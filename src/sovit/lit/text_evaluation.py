"""Zero-shot evaluation of a text tower in training: classification and retrieval, to rows of ``evals.jsonl``.

A row's ``error`` is 1 - the share that is found: of data set NAME the top-1 error of classification; of
NAME_image_to_text_at1 and so on 1 - the recall at 1, 5 or 10. They know no shots (0) and no draws (0); ``stderr`` is what a
95 % interval of normal shape would have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn

from sovit import metric, records
from sovit.config import RunConfig
from sovit.derived import recall_name
from sovit.language.vocabulary import Vocabulary
from sovit.language.zeroshot import Share, class_weights, errors, recalls
from sovit.lit.callbacks import Diverged
from sovit.lit.evaluation import Evaluation, extract
from sovit.lit.locked import Locked
from sovit.lit.ranks import Ranks
from sovit.lit.text_targets import Captioned, Named, targets_of
from sovit.schema import RECALL_AT

BATCH = 1024  # texts at once, over all processes
_Z = 1.959963984540054  # of a 95 % interval


class TextEvaluation(Evaluation):
    """Zero-shot classification and retrieval on every entry of ``eval.datasets``; else as `Evaluation`.

    The features of the images are computed once a process: they are those of the locked tower.
    """

    def __init__(
        self,
        cfg: RunConfig,
        growing: records.GrowingFiles | None,
        loggers: Sequence[Logger],
        ranks: Ranks,
        run_id: str,
        locked: Locked,
    ) -> None:
        self.locked = locked
        self._features: dict[int, Tensor] = {}
        self.chances: dict[str, float] = {}
        super().__init__(cfg, growing, loggers, ranks, run_id)

    def prepare(self) -> None:
        found = [targets_of(self.cfg, dataset, self.ranks.rank) for dataset in self.cfg.eval.datasets]
        self.judged = [target for targets in found for target in targets]

    def scored(self, model: nn.Module, step: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
        encode = encoder_of(model, self.ranks)
        rows: list[dict[str, Any]] = []
        for number, target in enumerate(self.judged):
            if number not in self._features:
                self._features[number] = image_features(self.locked, model, target.images, self.ranks)
            images, length = self._features[number], self.cfg.text.length
            # All processes embed the texts together, as a sharded tower must be; the first one compares.
            texts = texts_of(target, encode, self.locked.vocabulary, length, step)

            def compare(target: Named | Captioned = target, images: Tensor = images, texts: Tensor = texts) -> Any:
                return shares_of(target, images, texts)

            for name, share in self.ranks.tell(compare).items():
                self.chances[name] = share.chance
                rows.append(
                    {
                        "dataset": name,
                        "shots": 0,
                        "draw": 0,
                        "l2_reg": None,
                        "error": share.value,
                        "stderr": (share.hi - share.lo) / 2 / _Z,
                    }
                )
        return rows, {metric.key(row["dataset"], 0): row["error"] for row in rows}

    def baselines(self, shared: Path) -> dict[str, Any]:
        """The error of guessing, per data set. ``shared`` is not used: they are known without computing anything."""
        if not self.chances:  # a run that went on after its last evaluation
            for target in self.judged:
                self.chances |= {name: share.chance for name, share in _guessed(target).items()}
        return {name: {"chance": chance, "pixels": None} for name, chance in self.chances.items()}


def texts_of(
    target: Named | Captioned,
    encode: Callable[[Tensor], Tensor],
    vocabulary: Vocabulary,
    length: int,
    step: int = 0,
) -> Tensor:
    """Embeddings of the classes [K, D] or the captions [M, D]. Raises Diverged if they are not finite."""
    if isinstance(target, Named):
        try:
            return class_weights(encode, vocabulary, target.classes, target.templates, length, batch_size=BATCH)
        except ValueError as error:
            if "not finite" not in str(error):
                raise
            raise Diverged(f"embeddings are not finite at step {step}", step) from None
    tokens, _ = vocabulary.batch(target.texts, length)
    found = torch.cat([encode(part) for part in tokens.split(BATCH)])
    if not found.isfinite().all():
        raise Diverged(f"embeddings are not finite at step {step}", step)
    return found


def shares_of(target: Named | Captioned, images: Tensor, texts: Tensor) -> dict[str, Share]:
    """Errors with intervals and chance by the name of what is measured."""
    if isinstance(target, Named):
        return {target.name: errors(images, texts, target.labels)[1]}
    found = recalls(images, texts, target.owner, RECALL_AT)
    return {
        recall_name(target.name, way, k): Share(
            1 - share.value, 1 - share.hi, 1 - share.lo, share.num, 1 - share.chance
        )
        for way, shares in found.items()
        for k, share in shares.items()
    }


def _guessed(target: Named | Captioned) -> dict[str, Share]:
    """What embeddings that are all alike give: chance."""
    num = len(target.classes) if isinstance(target, Named) else len(target.texts)
    return shares_of(target, torch.ones(len(target.images), 1), torch.ones(num, 1))


def image_features(locked: Locked, model: nn.Module, images: Any, ranks: Ranks | None = None) -> Tensor:
    """Features [N, embed_dim] float32 on the CPU of the first process, in the precision that the tower trains in."""
    weights = next(model.parameters())
    encoder = locked.encoder.model.to(weights.device, weights.dtype)
    return extract(encoder, images, ranks)


def encoder_of(model: nn.Module, ranks: Ranks | None = None) -> Callable[[Tensor], Tensor]:
    """Tokens [B, length] to embeddings [B, D] float32 on the CPU: every process computes its share, and all get all."""
    ranks = ranks or Ranks()
    device = next(model.parameters()).device

    @torch.no_grad()
    def encode(tokens: Tensor) -> Tensor:
        mine, most = tokens[ranks.share(len(tokens))], -(-len(tokens) // ranks.world)
        if len(mine) < most:  # a sharded model is computed by all processes together
            mine = torch.cat([mine, tokens[:1].expand(most - len(mine), -1)])
        found = model(mine.to(device)).float().cpu()
        if ranks.world == 1:
            return found
        parts = [torch.empty_like(found) for _ in range(ranks.world)]
        dist.all_gather(parts, found.contiguous())
        return torch.cat(parts)[: len(tokens)]

    return encode
