"""Scoring captions at COCO's size, for benchmarks/language.py: this package's metrics beside pycocoevalcap's."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from sovit.language.metrics import bleu, cider, rouge, words

CAPTIONS = 5  # of an image
SCORERS = {"CIDEr-D": ("cider", "Cider"), "BLEU-4": ("bleu", "Bleu"), "ROUGE-L": ("rouge", "Rouge")}  # pycocoevalcap's

Contestants = tuple[str, dict[str, Callable[[], Any]], dict[str, int]]


def contests(num_images: int, coco: Any) -> Iterator[Contestants]:
    """Name, contestants and what a call gets done, for the words of captions and the three scores."""
    rng = np.random.default_rng(0)
    names = [f"w{n}" for n in range(9000)]  # about as many as COCO's captions have
    chances = 1 / np.arange(2, 9002)

    def captions(num: int) -> list[str]:
        drawn = rng.choice(9000, size=(num, 16), p=chances / chances.sum())
        return [" ".join(names[w] for w in row[:n]) for row, n in zip(drawn, rng.integers(8, 16, num), strict=True)]

    candidates = captions(num_images)
    references = [captions(CAPTIONS) for _ in range(num_images)]
    size = f"{num_images:,} images x {CAPTIONS} captions"
    sentences = [text for given in references for text in given] + candidates
    parted: dict[str, Callable[[], Any]] = {"ours": lambda: [words.split(text) for text in sentences]}
    yield f"words of {len(sentences):,} captions", parted, {"captions": len(sentences)}
    ours = {"CIDEr-D": cider.score, "BLEU-4": bleu.score, "ROUGE-L": rouge.score}
    for name, score in ours.items():
        call = functools.partial(score, candidates, references, split=str.split)
        contestants: dict[str, Callable[[], Any]] = {"ours": call}
        if coco:
            other = coco[name](candidates, references)
            contestants["pycocoevalcap"] = other
            assert abs(call().value - other()) < 1e-6, f"{name}: {call().value} is not {other()}"
        yield f"{name}, {size}", contestants, {"images": num_images}


def reference(folder: str | None) -> Any:
    """COCO's scorers by name: (candidates, references) -> a call that gives the corpus score. None if there are none."""
    if folder:
        sys.path.append(folder)
    try:
        classes = {
            name: getattr(importlib.import_module(f"pycocoevalcap.{module}.{module}"), kind)
            for name, (module, kind) in SCORERS.items()
        }
    except ModuleNotFoundError as error:
        if folder:
            raise SystemExit(f"{folder} holds no pycocoevalcap ({error}); name the folder above it.") from None
        return None

    def scorer(name: str) -> Callable[..., Callable[[], float]]:
        def of(candidates: list[str], references: list[list[str]]) -> Callable[[], float]:
            found = {n: [text] for n, text in enumerate(candidates)}
            given = dict(enumerate(references))
            more = {"verbose": 0} if name == "BLEU-4" else {}

            def call() -> float:
                value = classes[name]().compute_score(given, found, **more)[0]
                return float(value[3] if name == "BLEU-4" else value)

            return call

        return of

    return {name: scorer(name) for name in classes}
