"""What a trained pair of towers knows without further training: classification by class names, and retrieval both ways.

A class is the mean of its names' embeddings in several prompts, as CLIP's (arXiv 2103.00020, section 3.1.4): each is
normalised, their mean is normalised again. Retrieval follows COCO's rule: an image has found a text if any of its own is
among the first k.

Equal scores are no luck: a query whose right answer ties with others counts by its chance of being among the first k if
ties were broken at random. So embeddings that are all alike score the chance level, not 100 %. Scores closer than _SAME
are equal: that is the rounding of float32.

Not here: images, towers, files of class names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sovit.language.metrics.interval import wilson
from sovit.language.prompts import SLOT, prompts
from sovit.language.vocabulary import Vocabulary

# Prompts for photographs, in the manner of CLIP's. Those of the embedded scenes are sovit.lit.text_targets'.
PHOTO_TEMPLATES = (
    "a photo of a {}.",
    "a photo of the {}.",
    "a picture that shows a {}.",
    "a close view of a {}.",
    "a small {} in a photo.",
    "a large {} in a photo.",
    "{}",
)
KS = (1, 5, 10)

_SAME = 1e-6
_BLOCK = 2**22  # scores at once: 16 MiB


@dataclass(frozen=True)
class Share:
    """A share of ``num`` queries with its 95 % interval, and what guessing would give."""

    value: float
    lo: float
    hi: float
    num: int
    chance: float


def check_templates(templates: Sequence[str]) -> None:
    """Raise ValueError unless there are templates, each with the place {} for a class name once."""
    if not templates:
        raise ValueError("There is no template; give one at least, such as 'a photo of a {}.'.")
    for template in templates:
        if template.count(SLOT) != 1:
            raise ValueError(
                f"Template {template!r} has {template.count(SLOT)} places {{}} for a class name; it needs 1."
            )


@torch.no_grad()
def class_weights(
    encode: Callable[[Tensor], Tensor],
    vocabulary: Vocabulary,
    classes: Sequence[str],
    templates: Sequence[str],
    length: int,
    *,
    batch_size: int = 256,
) -> Tensor:
    """[K, D] one unit row for each class: the normalised mean of its normalised prompts.

    ``encode``: tokens [B, ``length``] on the CPU to embeddings [B, D]; ``batch_size``: texts at once, or those of one class
    if that is more. Underscores in a name become spaces. Prompts longer than ``length`` are cut as the vocabulary cuts.
    Raises ValueError for no classes, an empty name, a template without a place for it, and embeddings that are not finite.
    """
    check_templates(templates)
    if not classes:
        raise ValueError("There is no class; give the names of the classes, one a line.")
    each = max(1, batch_size // len(templates))
    rows = []
    for first in range(0, len(classes), each):
        some = classes[first : first + each]
        names = [in_words(name) for name in some]
        if not all(names):
            raise ValueError(f"{some[names.index('')]!r} is no class name; every class needs a word.")
        tokens, _ = vocabulary.batch([text for name in names for text in prompts(templates, name)], length)
        found = _unit(encode(tokens), "The embeddings of class names")
        rows.append(F.normalize(found.unflatten(0, (len(some), len(templates))).mean(1), dim=1))
    return torch.cat(rows)


def in_words(name: str) -> str:
    """The name of a class as its prompts have it."""
    return " ".join(name.replace("_", " ").split())


@torch.no_grad()
def predictions(images: Tensor, weights: Tensor) -> Tensor:
    """int64 [N]: the class of each image [N, D] whose row of ``weights`` [K, D] is closest; the first of equal ones."""
    images, weights = _pair(images, weights, "images", "class weights")
    return torch.cat([scores.argmax(1) for _, scores in _blocks(images, weights)])


@torch.no_grad()
def errors(images: Tensor, weights: Tensor, labels: Tensor, ks: Sequence[int] = (1,)) -> dict[int, Share]:
    """The top-k error of zero-shot classification for each k, with Wilson's interval over the images.

    ``images`` [N, D] and ``weights`` [K, D] as of :func:`class_weights`; ``labels`` [N] below K. Raises ValueError.
    """
    images, weights = _pair(images, weights, "images", "class weights")
    labels = _numbers(labels, len(images), len(weights), "label", "class").to(images.device)
    hits = _hits(
        images, weights, ks, lambda rows: labels[rows, None] == torch.arange(len(weights), device=labels.device)
    )
    found = {}
    for k, row in zip(ks, hits, strict=True):
        right = _share(row, min(1.0, k / len(weights)))
        found[k] = Share(1 - right.value, 1 - right.hi, 1 - right.lo, right.num, 1 - right.chance)
    return found


@torch.no_grad()
def recalls(
    images: Tensor, texts: Tensor, owner: Tensor | Sequence[int], ks: Sequence[int] = KS
) -> dict[str, dict[int, Share]]:
    """Recall at each k, ``image_to_text`` and ``text_to_image``, with intervals and exact chance levels.

    ``images`` [N, D], ``texts`` [M, D], ``owner`` [M] the image that each text belongs to; an image may have several, or
    none, and is then no query. Intervals are Wilson's; texts of one image are found or missed together, so those of texts
    count as many as they are worth (Kish's design effect, between the number of images and that of texts). Neither says how
    far another training would be. In blocks: memory grows with N + M. Raises ValueError.
    """
    images, texts = _pair(images, texts, "images", "texts")
    owner = _numbers(torch.as_tensor(owner), len(texts), len(images), "owner", "image").to(images.device)
    counts = torch.bincount(owner, minlength=len(images))
    asked = counts.nonzero()[:, 0]
    every = torch.arange(len(images), device=images.device)
    to_text = _hits(images[asked], texts, ks, lambda rows: asked[rows, None] == owner)
    to_image = _hits(texts, images, ks, lambda rows: owner[rows, None] == every)
    return {
        "image_to_text": {
            k: _share(row, _chance(len(texts), counts[asked], k)) for k, row in zip(ks, to_text, strict=True)
        },
        "text_to_image": {
            k: _share(row, min(1.0, k / len(images)), owner) for k, row in zip(ks, to_image, strict=True)
        },
    }


def _hits(queries: Tensor, candidates: Tensor, ks: Sequence[int], right: Callable[[slice], Tensor]) -> list[Tensor]:
    """float64 [N] for each k: the chance that a right candidate is among a query's first k, 0 or 1 unless there are ties.

    ``right(rows)`` is bool [rows, M]: which candidates are right for those queries, one at least.
    """
    for k in ks:
        if k < 1:
            raise ValueError(f"k={k} is below 1; ask for the first k answers.")
    parts: list[list[Tensor]] = [[] for _ in ks]
    for rows, scores in _blocks(queries, candidates):
        mine = right(rows)
        best = scores.masked_fill(~mine, -torch.inf).amax(1, keepdim=True)
        above = (scores > best + _SAME).sum(1)  # none of them is right
        level = scores >= best - _SAME
        tied = (level & mine).sum(1).double()
        wrong = (level & ~mine).sum(1).double() - above
        for part, k in zip(parts, ks, strict=True):
            drawn = (k - above).clamp(min=0).double()  # places left for those that tie
            part.append(1 - _none_right(wrong, tied, drawn))
    return [torch.cat(part) for part in parts]


def _none_right(wrong: Tensor, right: Tensor, drawn: Tensor) -> Tensor:
    """C(wrong, drawn) / C(wrong + right, drawn): the chance that none of those drawn is right; float64."""
    chance = torch.ones_like(wrong)
    for number in range(int(drawn.max())):
        share = (wrong - number).clamp(min=0) / (wrong + right - number).clamp(min=1)
        chance = torch.where(number < drawn, chance * share, chance)
    return chance


def _chance(num: int, right: Tensor, k: int) -> float:
    """The mean over queries with ``right`` of ``num`` candidates each, of which k are drawn."""
    right = right.double()
    return float((1 - _none_right(num - right, right, torch.full_like(right, k))).mean())


def _share(hits: Tensor, chance: float, groups: Tensor | None = None) -> Share:
    """The mean of hits [N], with Wilson's interval; ``groups`` [N]: which of them belong together."""
    num, value = len(hits), float(hits.mean())
    worth = float(num)
    if groups is not None:
        _, group = groups.unique(return_inverse=True)
        sizes = torch.bincount(group).double()
        least = num**2 / float(sizes.square().sum())
        sums = torch.zeros_like(sizes).index_add_(0, group, hits - value)
        variance = float(sums.square().sum()) / num**2 * len(sizes) / max(1, len(sizes) - 1)
        spread = value * (1 - value)
        worth = min(num, max(least, spread / variance if variance else num)) if spread > 0 else least
    lo, hi = wilson(value, worth)
    return Share(value, lo, hi, num, chance)


def _blocks(queries: Tensor, candidates: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of queries, and their scores against all candidates."""
    step = max(1, _BLOCK // len(candidates))
    for first in range(0, len(queries), step):
        rows = slice(first, min(first + step, len(queries)))
        yield rows, queries[rows] @ candidates.T


def _pair(one: Tensor, other: Tensor, name: str, other_name: str) -> tuple[Tensor, Tensor]:
    if one.ndim != 2 or other.ndim != 2 or one.shape[1] != other.shape[1] or not one.numel() or not other.numel():
        raise ValueError(
            f"The {name} {list(one.shape)} and the {other_name} {list(other.shape)} are to be rows of one width, "
            "one at least of each."
        )
    kind = torch.promote_types(torch.promote_types(one.dtype, other.dtype), torch.float32)
    other = other.to(one.device)
    return _unit(one.to(kind), f"The {name}"), _unit(other.to(kind), f"The {other_name}")


def _unit(rows: Tensor, name: str) -> Tensor:
    bad = int((~rows.isfinite().all(1)).sum())
    if bad:
        raise ValueError(f"{name} hold {bad} of {len(rows)} rows that are not finite: the training has diverged.")
    return F.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=1)


def _numbers(values: Tensor, num: int, below: int, name: str, of: str) -> Tensor:
    if values.ndim != 1 or len(values) != num or values.is_floating_point():
        raise ValueError(
            f"{num} rows need as many whole numbers, one {name} each, not {list(values.shape)} {values.dtype}."
        )
    if int(values.min()) < 0 or int(values.max()) >= below:
        raise ValueError(
            f"The {name}s go from {int(values.min())} to {int(values.max())}, but there are {below}: 0 is the first {of}."
        )
    return values.long()
