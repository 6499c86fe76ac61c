"""A small text decoder that looks at the tokens of an image encoder: pre-norm, causal, with cross-attention.

    x = embedding[token] + position
    x += self_attention(norm(x));  x += cross_attention(norm(x), memory);  x += mlp(norm(x))      depth times
    logits = norm(x) @ head

where memory = projection(norm((tokens of the encoder - mean) / deviation)). Two blocks are SoViT's (arXiv 2305.13035,
table 6, after the LiT decoder of arXiv 2303.17376). The paper prints no width. Here the decoder has one of its own, the same
for every encoder, so that of two encoders only the projection of their tokens differs and a log-perplexity compares the
encoders. Mean and deviation of each feature are those of training tokens (`Decoder.standardise`): what all tokens have in
common, often most of a feature, says nothing of an image, and would have to be learnt away. The embedding
and the head are two matrices (untied); the head starts at zero, so that an untrained decoder gives every token the same
probability. Dropout is on the embeddings and on what each branch adds, not on attention.

Knows token ids only: texts are the vocabulary's business, loss and training those of `sovit.language.training`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers import GELUTanh, Mlp
from torch import Tensor, nn

from sovit.models.initial import fan_in_normal

EPS = 1e-6  # of the LayerNorms, as in the encoder
_LEAST_STD = 1e-5  # added to deviations, as in few-shot evaluation
KeysValues = tuple[Tensor, Tensor]  # [B, heads, S, width / heads] each


@dataclass(frozen=True)
class Cache:
    """What earlier tokens leave for later ones. Padding has its place in ``past`` and is not ``valid``."""

    memory: tuple[KeysValues, ...]  # of the encoder's tokens, a block each; computed once
    past: tuple[KeysValues, ...]  # of the tokens so far, a block each; grows
    valid: Tensor  # bool [B, S]

    def take(self, rows: Tensor) -> Cache:
        """The texts ``rows`` instead of 0 .. B - 1, each still with the image in its own place."""
        return replace(self, past=tuple((k[rows], v[rows]) for k, v in self.past), valid=self.valid[rows])

    def repeat(self, times: int) -> Cache:
        """Every image and its text ``times`` times in a row."""

        def of(pairs: tuple[KeysValues, ...]) -> tuple[KeysValues, ...]:
            return tuple((k.repeat_interleave(times, 0), v.repeat_interleave(times, 0)) for k, v in pairs)

        return Cache(of(self.memory), of(self.past), self.valid.repeat_interleave(times, 0))


class Attention(nn.Module):
    """Attention of x to keys and values that `keys_values` has made of a source."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def keys_values(self, source: Tensor) -> KeysValues:
        keys, values = self.kv(source).chunk(2, -1)
        return self._heads(keys), self._heads(values)

    def forward(self, x: Tensor, keys_values: KeysValues, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        found = F.scaled_dot_product_attention(self._heads(self.q(x)), *keys_values, attn_mask=mask, is_causal=causal)
        return self.proj(found.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class Block(nn.Module):
    def __init__(self, width: int, mlp_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width, EPS) for _ in range(3))
        self.self_attn, self.cross_attn = Attention(width, num_heads), Attention(width, num_heads)
        self.mlp = Mlp(width, mlp_dim, act_layer=GELUTanh)
        self.drop = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, memory: KeysValues, past: KeysValues | None, mask: Tensor | None
    ) -> tuple[Tensor, KeysValues]:
        """x [B, n, width] and the keys and values of all tokens so far. Without ``past`` and ``mask``: causal."""
        normed = self.norm1(x)
        now = self.self_attn.keys_values(normed)
        if past is not None:
            now = torch.cat([past[0], now[0]], 2), torch.cat([past[1], now[1]], 2)
        x = x + self.drop(self.self_attn(normed, now, mask, causal=mask is None))
        x = x + self.drop(self.cross_attn(self.norm2(x), memory))
        return x + self.drop(self.mlp(self.norm3(x))), now


class Decoder(nn.Module):
    """See the module; built by :func:`build_decoder`."""

    memory_mean: Tensor
    memory_std: Tensor

    def __init__(
        self,
        *,
        encoder_width: int,
        vocabulary_size: int,
        width: int,
        depth: int,
        mlp_dim: int,
        num_heads: int,
        length: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.length = length
        self.embedding = nn.Embedding(vocabulary_size, width)
        self.positions = nn.Parameter(torch.empty(length, width))
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, mlp_dim, num_heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width, EPS)
        self.head = nn.Linear(width, vocabulary_size)
        self.register_buffer("memory_mean", torch.empty(encoder_width))
        self.register_buffer("memory_std", torch.empty(encoder_width))
        self.memory_norm = nn.LayerNorm(encoder_width, EPS)
        self.memory_proj = nn.Linear(encoder_width, width)

    def forward(self, tokens: Tensor, memory: Tensor) -> Tensor:
        """Logits [B, L, V] of the token after each of ``tokens`` [B, L], which sees those up to it and ``memory``
        [B, T, encoder_width]. Padding belongs after the text; its logits mean nothing, and nothing hangs on it."""
        return self.head(self.states(tokens, memory))

    def states(self, tokens: Tensor, memory: Tensor) -> Tensor:
        """What the head makes logits of, [B, L, width]."""
        memory = self._project(memory)
        x = self._embed(tokens, torch.arange(tokens.shape[1], device=tokens.device))
        for block in self._blocks():
            x, _ = block(x, block.cross_attn.keys_values(memory), None, None)
        return self.norm(x)

    @torch.no_grad()
    def standardise(self, memory: Tensor) -> None:
        """Keep mean and deviation of each feature of some training tokens [N, T, encoder_width]."""
        std, mean = torch.std_mean(memory.double(), (0, 1), correction=0)
        self.memory_mean.copy_(mean)
        self.memory_std.copy_(std)

    def start(self, memory: Tensor) -> Cache:
        """The cache of images [B, T, encoder_width] and no text."""
        memory = self._project(memory)
        kept = tuple(block.cross_attn.keys_values(memory) for block in self._blocks())
        empty = tuple((k[:, :, :0], v[:, :, :0]) for k, v in kept)
        return Cache(kept, empty, torch.zeros(len(memory), 0, dtype=torch.bool, device=memory.device))

    def extend(self, tokens: Tensor, cache: Cache, valid: Tensor | None = None) -> tuple[Tensor, Cache]:
        """Logits [B, n, V] after each of n more tokens [B, n], and the cache with them in it.

        ``valid`` bool [B, n]: which are text and not padding; a text's tokens are numbered without the padding.
        """
        if valid is None:
            valid = torch.ones_like(tokens, dtype=torch.bool)
        before = cache.valid.sum(1, keepdim=True)
        x = self._embed(tokens, (before + valid.cumsum(1) - 1).clamp(min=0))
        known = torch.cat([cache.valid, valid], 1)
        num, total = tokens.shape[1], known.shape[1]
        reach = torch.ones(num, total, dtype=torch.bool, device=tokens.device).tril(total - num)
        itself = torch.eye(num, total, dtype=torch.bool, device=tokens.device).roll(total - num, 1)
        mask = (reach & known[:, None]) | itself  # padding sees itself, as attention to nothing is not a number
        past = []
        for block, images, texts in zip(self._blocks(), cache.memory, cache.past, strict=True):
            x, now = block(x, images, texts, mask[:, None])
            past.append(now)
        return self.head(self.norm(x)), Cache(cache.memory, tuple(past), known)

    def _blocks(self) -> list[Block]:
        return cast(list[Block], list(self.blocks))

    def _project(self, memory: Tensor) -> Tensor:
        standard = (memory - self.memory_mean) / (self.memory_std + _LEAST_STD)
        return self.memory_proj(self.memory_norm(standard))

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.drop(self.embedding(tokens) + self.positions[positions])


def build_decoder(
    *,
    encoder_width: int,
    vocabulary_size: int,
    width: int,
    depth: int = 2,
    mlp_dim: int,
    num_heads: int,
    length: int,
    dropout: float = 0.0,
) -> Decoder:
    """A decoder of texts of up to ``length`` tokens, its weights drawn from torch's generator.

    Matrices are normal with std 1 / sqrt(fan in), those that write to the residual stream divided by sqrt(3 depth) too, as
    a block has three branches; embeddings and positions normal with std 1 / sqrt(2), so that their sum has variance 1; norms
    the identity, biases and the head zero. What depends on the encoder's width is drawn last: all else is the same for every
    encoder. Raises ValueError for a size that cannot be.
    """
    sizes = {
        "encoder_width": encoder_width,
        "vocabulary_size": vocabulary_size,
        "width": width,
        "depth": depth,
        "mlp_dim": mlp_dim,
        "num_heads": num_heads,
        "length": length,
    }
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}={value} of the decoder must be at least 1.")
    if width % num_heads:
        raise ValueError(f"width={width} of the decoder is not divisible into num_heads={num_heads}.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout} is not in [0, 1).")
    with torch.device("meta"):
        decoder = Decoder(**sizes, dropout=dropout)
    decoder.to_empty(device=torch.get_default_device())
    _init_weights(decoder)
    return decoder


@torch.no_grad()
def _init_weights(decoder: Decoder) -> None:
    for name, module in decoder.named_modules():  # the projection of the memory is the last of them
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            fan_in_normal(module.weight)
            nn.init.zeros_(module.bias)
            if name.startswith("blocks.") and name.endswith((".proj", ".fc2")):
                module.weight.div_(math.sqrt(3 * len(decoder.blocks)))
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=math.sqrt(0.5))
            nn.init.normal_(decoder.positions, std=math.sqrt(0.5))
    nn.init.zeros_(decoder.head.weight)
    nn.init.zeros_(decoder.memory_mean)
    nn.init.ones_(decoder.memory_std)
