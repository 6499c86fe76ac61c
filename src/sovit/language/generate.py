"""Texts from a decoder: greedy and beam search, for many images and prompts of many lengths at once.

What can come out is a sequence that ends with eos within ``max_tokens`` tokens, eos counted, or one of exactly that many
without eos. Their probabilities sum to one. A beam's score is log P / lp with lp = ((5 + tokens) / 6)^length_penalty
(arXiv 1609.08144, equation 14); at 0 it is the log-probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sovit.language.decoder import Cache, Decoder


@dataclass(frozen=True)
class Generated:
    """``tokens`` int64 [B, n], eos with them and ``pad`` after it; ``log_probs`` [B] of them, eos counted."""

    tokens: Tensor
    log_probs: Tensor


@torch.no_grad()
def greedy(
    decoder: Decoder, prompts: Sequence[Sequence[int]], memory: Tensor, *, eos: int, pad: int, max_tokens: int
) -> Generated:
    """The likeliest token after each, for prompts [B] and images [B, T, encoder_width].

    Raises ValueError for an empty prompt, or one that leaves less than ``max_tokens`` of the decoder's length.
    """
    logits, cache = _begin(decoder, prompts, memory, pad, max_tokens)
    tokens = torch.full((len(prompts), max_tokens), pad, device=memory.device)
    total = logits.new_zeros(len(prompts))
    going = torch.ones(len(prompts), dtype=torch.bool, device=memory.device)
    for place in range(max_tokens):
        best, chosen = logits.log_softmax(-1).max(-1)
        tokens[going, place] = chosen[going]
        total = total + best.where(going, 0)
        going = going & (chosen != eos)
        if place + 1 == max_tokens or not going.any():
            break
        following, cache = decoder.extend(chosen[:, None], cache)
        logits = following[:, -1]
    return Generated(tokens, total)


@torch.no_grad()
def beam(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    memory: Tensor,
    *,
    eos: int,
    pad: int,
    max_tokens: int,
    beams: int,
    length_penalty: float = 0.0,
) -> Generated:
    """The text of the best score that a beam search finds; otherwise as :func:`greedy`, which one beam is.

    Each step looks at all continuations of the beams of an image. Those that end and are among its ``beams`` best are done,
    and the ``beams`` best that do not end go on, until as many are done or none can do better than the best that is.
    Raises ValueError also for fewer than one beam or a negative penalty.
    """
    if beams < 1 or length_penalty < 0:
        raise ValueError(f"beams={beams} must be at least 1 and length_penalty={length_penalty} at least 0.")
    first, cache = _begin(decoder, prompts, memory, pad, max_tokens)
    num, size, device = len(prompts), first.shape[-1], memory.device
    cache = cache.repeat(beams)
    logits = first.repeat_interleave(beams, 0)
    minus = float("-inf")
    scores = torch.full((num, beams), minus, dtype=first.dtype, device=device)
    scores[:, 0] = 0.0  # one beam to begin with, or all would be the same
    live = torch.full((num, beams, max_tokens), pad, device=device)
    done = Generated(live[:, 0].clone(), scores[:, -1].clone().fill_(minus))
    best = done.log_probs.clone()
    count = torch.zeros(num, dtype=torch.int64, device=device)
    own = beams * torch.arange(num, device=device)[:, None]
    likely = torch.arange(2 * beams, device=device) < beams

    def penalty(tokens: int) -> float:
        return ((5 + tokens) / 6) ** length_penalty

    def finish(
        done: Generated, best: Tensor, texts: Tensor, log_probs: Tensor, tokens: int
    ) -> tuple[Generated, Tensor]:
        """The better of what is done and the best of ``texts`` [num, k, max_tokens]."""
        found, place = log_probs.max(1)
        better = found / penalty(tokens) > best
        text = texts[torch.arange(num, device=device), place]
        done = Generated(text.where(better[:, None], done.tokens), found.where(better, done.log_probs))
        return done, (found / penalty(tokens)).where(better, best)

    for place in range(max_tokens):
        table = (scores[..., None] + logits.log_softmax(-1).view(num, beams, size)).flatten(1)
        values, flat = table.topk(2 * beams)  # at most half of them end
        parents, chosen = flat // size, flat % size
        texts = live.gather(1, parents[..., None].expand(-1, -1, max_tokens)).clone()
        texts[..., place] = chosen
        ends = chosen == eos
        if place + 1 == max_tokens:
            open_to = (count < beams)[:, None] & likely
            done, best = finish(done, best, texts, values.where(open_to, minus), place + 1)
            break
        ended = ends & likely & values.isfinite() & (count < beams)[:, None]
        done, best = finish(done, best, texts, values.where(ended, minus), place + 1)
        count = count + ended.sum(1)
        scores, order = values.where(~ends, minus).topk(beams)
        going = (count < beams) & (scores[:, 0] / penalty(max_tokens) > best)
        count = count.where(going, beams)
        if not going.any():
            break
        live = texts.gather(1, order[..., None].expand(-1, -1, max_tokens))
        rows = (own + parents.gather(1, order)).flatten()
        following, cache = decoder.extend(chosen.gather(1, order).view(-1, 1), cache.take(rows))
        logits = following[:, -1]
    return done


def _begin(
    decoder: Decoder, prompts: Sequence[Sequence[int]], memory: Tensor, pad: int, max_tokens: int
) -> tuple[Tensor, Cache]:
    """The logits [B, V] after the prompts, and the cache with them in it."""
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    if min(lengths) < 1 or max_tokens < 1 or longest + max_tokens - 1 > decoder.length:
        raise ValueError(
            f"Prompts of {min(lengths)} to {longest} tokens and {max_tokens} more do not fit the decoder's "
            f"{decoder.length}; give shorter ones, at least one token each."
        )
    padded = torch.tensor([[*prompt, *[pad] * (longest - len(prompt))] for prompt in prompts], device=memory.device)
    last = torch.tensor(lengths, device=memory.device)
    valid = torch.arange(longest, device=memory.device) < last[:, None]
    logits, cache = decoder.extend(padded, decoder.start(memory), valid)
    return logits[torch.arange(len(prompts), device=memory.device), last - 1], cache
