"""Mean intersection over union and pixel accuracy from counts of each image, with intervals from drawing images anew."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

REPLICATES = 1000


def counts(
    predicted: NDArray[np.integer], labels: NDArray[np.integer], num_classes: int, ignore: int
) -> NDArray[np.int64]:
    """Pixels [3, num_classes] of one image: rightly labelled, predicted, and truly of each class. Pixels whose label is
    ``ignore`` count nowhere."""
    seen = labels != ignore
    predicted, labels = predicted[seen], labels[seen]
    every = (labels[predicted == labels], predicted, labels)
    return np.stack([np.bincount(values, minlength=num_classes) for values in every])


def scores(of_images: NDArray[np.integer]) -> dict[str, float | None]:
    """{"miou", "accuracy"} of the sums of counts [images, 3, classes] over all images.

    Classes that are neither labelled nor predicted anywhere are left out of the mean. None where there is no pixel.
    """
    return _scores(of_images.sum(0))


def _scores(sums: NDArray[Any]) -> dict[str, float | None]:
    hits, predicted, labelled = sums.astype(np.float64)
    union = predicted + labelled - hits
    there = union > 0
    if not there.any():
        return {"miou": None, "accuracy": None}
    return {"miou": float((hits[there] / union[there]).mean()), "accuracy": float(hits.sum() / labelled.sum())}


def with_intervals(of_images: NDArray[np.integer], seed: int = 0) -> dict[str, Any]:
    """{"miou", "accuracy"}, each {"value", "lo", "hi", "num"} with the 95 % percentile interval of drawing images anew,
    and "classes", the intersection over union of each class, None of one that does not occur."""
    found = scores(of_images)
    num = len(of_images)
    rng = np.random.default_rng(seed)
    flat, shape = of_images.reshape(num, -1).astype(np.float64), of_images.shape[1:]
    times = (np.bincount(rng.integers(num, size=num), minlength=num) for _ in range(REPLICATES))
    drawn = [_scores((drawn_times @ flat).reshape(shape)) for drawn_times in times]
    result: dict[str, Any] = {}
    for key, value in found.items():
        values = [float(one[key]) for one in drawn if one[key] is not None]  # type: ignore[arg-type]
        lo, hi = np.quantile(values, [0.025, 0.975]).tolist() if values else (None, None)
        result[key] = {"value": value, "lo": lo, "hi": hi, "num": num}
    hits, predicted, labelled = of_images.sum(0).tolist()
    unions = [p + t - h for h, p, t in zip(hits, predicted, labelled, strict=True)]
    result["classes"] = [h / u if u else None for h, u in zip(hits, unions, strict=True)]
    return result


def one_class(of_images: NDArray[np.integer]) -> dict[str, float | None]:
    """The scores of calling every pixel the class that has most of them: what a segmentation must beat."""
    labelled = of_images[:, 2]
    common = int(labelled.sum(0).argmax())
    guessed = np.zeros_like(of_images)
    guessed[:, 0, common] = labelled[:, common]
    guessed[:, 1, common] = labelled.sum(1)
    guessed[:, 2] = labelled
    return scores(guessed)
