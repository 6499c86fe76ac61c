"""Retrieval both ways by a text tower and its image tower: recall at 1, 5 and 10.

An image has found its captions if any of them is among the first k (`sovit.language.zeroshot`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sovit.config import ConfigError
from sovit.downstream.zeroshot import check_size, check_tower, locked_of
from sovit.language.examples import TextImages
from sovit.language.zeroshot import recalls
from sovit.lit.callbacks import Diverged
from sovit.lit.text_evaluation import encoder_of, image_features, texts_of
from sovit.lit.text_targets import SCENES, caption_file, captioned, scenes_of
from sovit.lit.trained import Trained
from sovit.schema import RECALL_AT

WAYS = {"image_to_text": "a caption by its image", "text_to_image": "an image by its caption"}


@dataclass
class Config:
    name: str = "retrieval"
    data: str = SCENES
    images: str | None = None


def check(cfg: Config, trained: Trained) -> None:
    check_tower(trained, cfg.name)
    if cfg.data != SCENES and not cfg.data.endswith(".json"):
        raise ConfigError(f"task.data: {cfg.data!a} is not known; write {SCENES}, or the path of a .json of captions.")
    if cfg.data == SCENES and cfg.images is not None:
        raise ConfigError(f"task.images={cfg.images} has no effect on the embedded scenes; write null.")
    check_size(cfg.data, trained)


def depends(trained: Trained, cfg: Config) -> list[str]:
    return [locked_of(trained).sha256, _source(cfg, trained).fingerprint]


def run(trained: Trained, cfg: Config, work: Path) -> dict[str, Any]:
    """Recall at each k both ways, with intervals and chance, and what could not be used."""
    source, locked = _source(cfg, trained), locked_of(trained)
    target = captioned(source, SCENES if cfg.data == SCENES else Path(cfg.data).stem)
    images = image_features(locked, trained.model, target.images)
    try:
        texts = texts_of(target, encoder_of(trained.model), locked.vocabulary, trained.cfg.text.length)
        found = recalls(images, texts, target.owner, RECALL_AT)
    except (Diverged, ValueError) as error:
        raise ConfigError(f"{error}.".replace("..", ".")) from None
    _, cut = locked.vocabulary.batch(target.texts, trained.cfg.text.length)
    return {
        "dataset": target.name,
        "num_images": len(target.images),
        "num_texts": len(target.texts),
        "num_cut": cut,
        "length": trained.cfg.text.length,
        "left_out": {"count": source.left_out.count, "named": source.left_out.named[:10]},
        "interval": "95 %, Wilson; captions of one image count as many as they are worth",
        "recall": {way: {str(k): asdict(share) for k, share in shares.items()} for way, shares in found.items()},
        "encoder": locked.encoder.record(),
        "vocabulary": locked.record()["vocabulary"],
    }


def text(result: dict[str, Any]) -> list[str]:
    lines = [
        f"{result['dataset']}, {result['num_images']:,} images with {result['num_texts']:,} captions",
        f"{'finding':<24} {'recall':<10} {'value':>6}  {'95 % interval':<15} {'chance':>7}",
    ]
    for way, shares in result["recall"].items():
        for k, share in shares.items():
            lines.append(
                f"{WAYS[way]:<24} at {k:<7} {share['value']:>6.3f}  {share['lo']:.3f} .. {share['hi']:.3f}  "
                f"{share['chance']:>7.3f}"
            )
    if result["num_cut"]:
        lines.append(f"{result['num_cut']:,} captions had more than {result['length']} tokens and were cut.")
    if result["left_out"]["count"]:
        name, reason = result["left_out"]["named"][0]
        lines.append(f"{result['left_out']['count']:,} entries could not be used, such as {name!a} ({reason}).")
    return lines


def _source(cfg: Config, trained: Trained) -> TextImages:
    return scenes_of(trained.cfg) if cfg.data == SCENES else caption_file(trained.cfg, cfg.data, cfg.images)
