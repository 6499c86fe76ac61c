"""The smallest runs of a text tower: a few steps on the embedded scenes, against an image tower that was hardly trained."""

from __future__ import annotations

from pathlib import Path

from small_cells import overrides, small
from sovit import records
from sovit.lit import engine

TEXT = (
    *("model=text_tiny", "data=scenes", "data.num_examples=40", "eval.datasets=[scenes]", "optim.loss=sigmoid"),
    *("text.length=12", "optim.lr=1e-2"),
)
OF_IMAGES = ("data.num_classes", "data.num_heldout", "eval.shots")  # of small cells; the scenes' world is the usual one


def image_tower(home: Path, *given: str) -> Path:
    """The folder of a run on images that keeps its resume point."""
    cfg = small(home, "name=encoder", "durations.values=[4 steps]", "trainer.keep_checkpoint=true", *given)
    assert engine.run(cfg) == engine.OK
    return records.run_dir(cfg)


def text_overrides(home: Path, encoder: Path, *given: str) -> list[str]:
    every = overrides(home, *(text for text in TEXT if text.split("=")[0] not in ("model", "data")), *given)
    mine = [text for text in every if text.partition("=")[0] not in OF_IMAGES]
    return ["model=text_tiny", "data=scenes", f"text.encoder={encoder}", *mine]
