"""Training a decoder on the frozen tokens of an encoder, and the log-perplexities that judge the encoder by it.

`multitask` is the whole of it in one call, for the evaluation of a sweep's cell. A log-perplexity is the mean over the
tokens of the answers, eos among them, of their negative log-likelihood in nats, without label smoothing; the metric of the
paper is its unweighted mean over the tasks (SoViT, arXiv 2305.13035, section 3). Standard errors count images as drawn and
keep all the texts of one image together; they leave out the luck of the decoder's own training, for which take more seeds.

Everything hangs on the arguments alone: the generators that draw first weights and dropout are set at every step, and given
back as they were. Batch k is a function of (seed, k), so a training goes on exactly where its state was taken.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from sovit.adafactor import Adafactor
from sovit.data.order import mix
from sovit.language.decoder import Decoder, build_decoder
from sovit.language.mixture import NOTHING, Batch, Examples, Ids, Mixture, collate
from sovit.schedule import learning_rate_scale

MEAN = "mean"  # the name of the unweighted mean over the tasks
OPTIMIZERS = ("adamw", "adafactor")
AT_ONCE = 256  # examples whose losses are computed together
STANDARD = 256  # images whose tokens give mean and deviation
SHARES = {"caption": 0.1, "vqa": 0.3, "ocr_vqa": 0.3, "gqa": 0.3}  # a caption has the tokens of several answers
BETAS = (0.9, 0.98)  # of AdamW: these trainings are short
_FIRST, _DROPOUT = 1, 2  # streams of random numbers

MemoryOf = Callable[[Sequence[int]], Tensor]  # rows of images -> their tokens [B, T, encoder_width], on the device


@dataclass(frozen=True)
class Recipe:
    """The decoder and its training. ``lr`` falls along a cosine to zero after a linear warm-up over the share ``warmup`` of
    the steps; ``weight_decay`` is relative to it and of matrices only (`sovit.optim`)."""

    width: int = 64
    depth: int = 2
    mlp_dim: int = 128
    num_heads: int = 4
    length: int = 48  # tokens of a prompt and its answer
    dropout: float = 0.0
    optimizer: str = "adamw"
    lr: float = 6e-3
    weight_decay: float = 1e-4
    steps: int = 500
    batch_size: int = 32
    warmup: float = 0.1
    clip_norm: float | None = 1.0
    label_smoothing: float = 0.0
    seed: int = 0  # of the first weights, the order and dropout
    bfloat16: bool = False  # mixed precision
    shares: Mapping[str, float] | None = field(default_factory=lambda: dict(SHARES))  # in the mixture; None: all alike


@dataclass(frozen=True)
class Score:
    """A log-perplexity in nats per token over ``num`` examples with ``num_tokens`` tokens; ``name``: of a task, or MEAN."""

    name: str
    value: float
    stderr: float | None  # None of a single image
    num_tokens: int
    num: int


class NotFinite(ValueError):
    """The training diverged; the message is one sentence."""


def multitask(
    tokens_train: Tensor,
    tokens_test: Tensor,
    train: Examples,
    test: Examples,
    vocabulary: Ids,
    recipe: Recipe,
    *,
    blind: bool = False,
) -> list[Score]:
    """Log-perplexities on ``test`` of a decoder trained on ``train``: the mean over the tasks first, then every task's.

    ``tokens_train`` [N, T, D] and ``tokens_test`` [M, T, D]: the frozen encoder's, row by row of the sources, on the device
    to compute on. ``train`` and ``test`` have the same tasks (`sovit.language.mixture.in_common`). ``blind``: the decoder
    sees zeros instead, which gives the chance level. A function of the arguments alone. Raises NotFinite.
    """
    decoder = train_decoder(_seen(tokens_train, blind), train, vocabulary, recipe, tokens_train.shape[-1])
    return scores(losses(decoder, _seen(tokens_test, blind), test, vocabulary, recipe))


def blind(memory_of: MemoryOf) -> MemoryOf:
    """Zeros in place of the tokens: the decoder of it sees no image."""
    return lambda rows: torch.zeros_like(memory_of(rows))


def train_decoder(
    memory_of: MemoryOf,
    examples: Examples,
    vocabulary: Ids,
    recipe: Recipe,
    encoder_width: int,
    *,
    state: Mapping[str, Any] | None = None,
    after: Callable[[int, float, Callable[[], dict[str, Any]]], None] | None = None,
) -> Decoder:
    """A decoder trained by the recipe, in evaluation mode, on the device of what ``memory_of`` gives.

    ``after(steps made, loss, snapshot)`` is called after every step; what
    ``snapshot()`` gave goes on from there as ``state``, exactly. Raises NotFinite.
    """
    some = memory_of(_some_rows(examples))
    device = some.device
    shares = recipe.shares and {task: recipe.shares.get(task, 0.0) for task in examples.of}
    mixture = Mixture(
        examples, batch_size=recipe.batch_size, pad=vocabulary.pad, seed=recipe.seed, weights=shares or None
    )
    with _generators(device):
        torch.manual_seed(_seed(recipe, _FIRST, 0))
        decoder = decoder_of(recipe, vocabulary, encoder_width).to(device)
        decoder.standardise(some)
        optimizer, begin = _optimizer(decoder, recipe), 0
        if state is not None:
            decoder.load_state_dict(state["decoder"])
            optimizer.load_state_dict(state["optimizer"])
            begin = state["step"]
        decoder.train()
        for step in range(begin, recipe.steps):
            torch.manual_seed(_seed(recipe, _DROPOUT, step))
            loss = _step(decoder, optimizer, mixture.batch(step), memory_of, recipe, step)
            if not math.isfinite(loss):
                raise NotFinite(f"The decoder diverged at step {step} with lr={recipe.lr:g}; give a lower rate.")
            if after is not None:
                after(step + 1, loss, lambda made=step + 1: _state(decoder, optimizer, made))  # type: ignore[misc]
    return decoder.eval()


def decoder_of(recipe: Recipe, vocabulary: Ids, encoder_width: int) -> Decoder:
    """The decoder of a recipe, before training."""
    return build_decoder(
        encoder_width=encoder_width,
        vocabulary_size=vocabulary.size,
        width=recipe.width,
        depth=recipe.depth,
        mlp_dim=recipe.mlp_dim,
        num_heads=recipe.num_heads,
        length=recipe.length,
        dropout=recipe.dropout,
    )


@dataclass(frozen=True)
class Losses:
    """Of the examples of a task: the image, the sum of the negative log-likelihoods in nats, and how many tokens."""

    rows: NDArray[np.int64]
    nats: NDArray[np.float64]
    num_tokens: NDArray[np.int64]


@torch.no_grad()
def losses(
    decoder: Decoder, memory_of: MemoryOf, examples: Examples, vocabulary: Ids, recipe: Recipe
) -> dict[str, Losses]:
    """What every example of every task costs the decoder, without dropout and smoothing."""
    decoder.eval()
    found = {}
    for task, of in examples.of.items():
        order = sorted(range(len(of)), key=lambda k: len(of[k].prompt) + len(of[k].answer))  # little padding
        num_tokens = np.array([len(example.answer) for example in of])
        nats = np.zeros(len(of))
        for start in range(0, len(of), AT_ONCE):
            places = order[start : start + AT_ONCE]
            batch = collate([of[k] for k in places], vocabulary.pad)
            each = _nats(decoder, batch, memory_of, recipe, 0.0).double().cpu().numpy()
            nats[places] = np.add.reduceat(each, np.cumsum([0, *num_tokens[places[:-1]]]))
        found[task] = Losses(np.array([example.row for example in of]), nats, num_tokens)
    return found


def scores(found: Mapping[str, Losses], without: Mapping[str, Losses] | None = None) -> list[Score]:
    """The unweighted mean over the tasks, then every task; with ``without``, how much lower than its they are.

    The standard error of a ratio of sums over images, by linearisation: sqrt(M / (M - 1) sum_i r_i^2) with r_i the sum over
    an image's examples of (nats - value x tokens) / all tokens, M images. That of the mean adds up the r_i of the tasks.
    """
    rows = np.unique(np.concatenate([of.rows for of in found.values()]))
    residuals, result = [], []
    for task, of in found.items():
        total, nats = int(of.num_tokens.sum()), of.nats
        if without is not None:
            nats = without[task].nats - nats
        value = float(nats.sum() / total)
        of_images = np.zeros(len(rows))
        np.add.at(of_images, np.searchsorted(rows, of.rows), (nats - value * of.num_tokens) / total)
        residuals.append(of_images)
        result.append(Score(task, value, _stderr(of_images, len(np.unique(of.rows))), total, len(nats)))
    mean = Score(
        MEAN,
        float(np.mean([score.value for score in result])),
        _stderr(np.mean(residuals, 0), len(rows)),
        sum(score.num_tokens for score in result),
        sum(score.num for score in result),
    )
    return [mean, *result]


def _stderr(residuals: NDArray[np.float64], num: int) -> float | None:
    return float(np.sqrt(num / (num - 1) * np.square(residuals).sum())) if num > 1 else None


def _seen(tokens: Tensor, without: bool) -> MemoryOf:
    def memory_of(rows: Sequence[int]) -> Tensor:
        return tokens[list(rows)]

    return blind(memory_of) if without else memory_of


def _nats(decoder: Decoder, batch: Batch, memory_of: MemoryOf, recipe: Recipe, label_smoothing: float) -> Tensor:
    """Negative log-likelihoods of the answers' tokens, text after text, in float32 at least."""
    memory = memory_of(batch.rows)
    batch = batch.to(memory.device)
    scored = batch.targets != NOTHING
    with torch.autocast(memory.device.type, torch.bfloat16) if recipe.bfloat16 else contextlib.nullcontext():
        logits = decoder.head(decoder.states(batch.tokens, memory.to(decoder.head.weight.dtype))[scored])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, batch.targets[scored], reduction="none", label_smoothing=label_smoothing)


def _step(
    decoder: Decoder,
    optimizer: torch.optim.Optimizer,
    parts: Sequence[Batch],
    memory_of: MemoryOf,
    recipe: Recipe,
    step: int,
) -> float:
    loss = torch.cat([_nats(decoder, part, memory_of, recipe, recipe.label_smoothing) for part in parts]).mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if recipe.clip_norm is not None:
        nn.utils.clip_grad_norm_(decoder.parameters(), recipe.clip_norm)
    scale = learning_rate_scale(
        step,
        kind="cosine",
        total_steps=recipe.steps,
        warmup_steps=round(recipe.warmup * recipe.steps),
        timescale=1,
        cooldown_steps=0,
    )
    for group in optimizer.param_groups:
        group["lr"] = recipe.lr * scale
    optimizer.step()
    return float(loss.detach())


def _optimizer(decoder: Decoder, recipe: Recipe) -> torch.optim.Optimizer:
    if recipe.optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer={recipe.optimizer!r} is unknown; use one of {', '.join(OPTIMIZERS)}.")
    kernels = {id(module.weight) for module in decoder.modules() if isinstance(module, nn.Linear)}
    split: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in decoder.parameters():
        split[id(parameter) in kernels].append(parameter)
    groups = [
        {"params": split[True], "weight_decay": recipe.weight_decay},
        {"params": split[False], "weight_decay": 0.0},
    ]
    if recipe.optimizer == "adafactor":
        return Adafactor(groups, lr=recipe.lr)
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=BETAS, fused=True)


def _some_rows(examples: Examples) -> list[int]:
    """At most STANDARD images, spread over all that have a text."""
    rows = sorted({example.row for of in examples.of.values() for example in of})
    return rows[:: -(-len(rows) // STANDARD)]


def _state(decoder: Decoder, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Any]:
    return {"decoder": decoder.state_dict(), "optimizer": optimizer.state_dict(), "step": step}


def _seed(recipe: Recipe, stream: int, step: int) -> int:
    return int(mix(recipe.seed, stream, step)) % 2**63


@contextlib.contextmanager
def _generators(device: torch.device) -> Iterator[None]:
    """Gives torch's generators back as they were: the caller may be in the middle of a training of its own."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
