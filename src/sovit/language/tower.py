"""A text tower from scratch: token embedding, learned positions, timm's blocks, pooling, projection, two numbers of a loss.

Blocks, norms and first weights as those of a ViT (`sovit.models.vit`), after big_vision's text transformer
(google-research/big_vision, models/proj/image_text/text_transformer.py). Attention is not causal, and unlike there it
does not see what follows the end of a text: an embedding does not depend on how far a text is padded.

Not here: the vocabulary, the image tower, the loss (`sovit.language.contrastive`), towers of other libraries
(`sovit.language.external`).
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Attention, AttentionPoolLatent, LayerNorm, get_act_layer, lecun_normal_
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from sovit.language.contrastive import BIAS, LOG_SCALE
from sovit.models.initial import check_init, init_all
from sovit.shape import check_heads, check_positive
from sovit.text_flops import TowerShape, check_text_pool


class TextTower(nn.Module):
    """Texts to embeddings; built by :func:`build_tower`.

    ``blocks``: timm's, one after another. ``log_scale`` and ``bias``, [1] each, are those of the contrastive loss; ``bias``
    is None where the loss has none. ``embed_dim`` is the width, as timm's models call it; ``output_dim`` that of the
    embedding.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        shape: TowerShape,
        *,
        vocabulary_size: int,
        length: int,
        embed_dim: int,
        pool: str,
        eos: int,
        drop_path_rate: float,
        has_bias: bool,
    ) -> None:
        super().__init__()
        width = shape.width
        self.embed_dim, self.output_dim, self.length = width, embed_dim, length
        self.pool, self.eos = pool, eos
        self.token_embed = nn.Embedding(vocabulary_size, width)
        self.pos_embed = nn.Parameter(torch.empty(1, length, width))
        # timm takes int(width * ratio): mlp_dim / width comes out one short for 5 % of pairs, such as (448, 976).
        alike: Any = {
            "num_heads": shape.num_heads,
            "mlp_ratio": (shape.mlp_dim + 0.5) / width,
            "qkv_bias": True,
            "act_layer": get_act_layer("gelu_tanh"),
            "norm_layer": LayerNorm,
        }
        rates = [drop_path_rate * k / max(1, shape.depth - 1) for k in range(shape.depth)]
        self.blocks = nn.ModuleList(Block(width, drop_path=rate, **alike) for rate in rates)
        self.norm = LayerNorm(width)
        self.attn_pool = AttentionPoolLatent(width, **alike) if pool == "map" else None
        self.head = nn.Linear(width, embed_dim)
        self.log_scale = nn.Parameter(torch.empty(1))  # [1]: FSDP2 does not shard a parameter without dimensions
        self.register_parameter("bias", nn.Parameter(torch.empty(1)) if has_bias else None)

    def get_classifier(self) -> nn.Module:
        """None: the projection is decayed as the body is (`sovit.optim.param_groups` asks every model)."""
        return nn.Identity()

    # Where weights are sharded, each of the four methods below gathers them and lets them go: none calls another.

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, output_dim], not normalised, of tokens [B, L], each text with its end and then padding; L <= ``length``."""
        return self._pooled(self._features(tokens), tokens, project=True)

    def forward_contrast(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Embeddings with log scale and bias: what a loss needs, while all three are there."""
        bias = None if self.bias is None else self.bias.clone()
        return self._pooled(self._features(tokens), tokens, project=True), self.log_scale.clone(), bias

    def forward_features(self, tokens: Tensor) -> Tensor:
        """Normed tokens [B, L, width]; what stands after the end of a text means nothing."""
        return self._features(tokens)

    def forward_head(self, features: Tensor, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, output_dim], or [B, width] before the projection, of ``forward_features`` of the same tokens."""
        return self._pooled(features, tokens, project=not pre_logits)

    def _features(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        if length > self.length:
            raise ValueError(f"Texts of {length} tokens are longer than length={self.length}; cut them to it.")
        x = self.token_embed(tokens) + self.pos_embed[:, :length]
        mask = in_text(tokens, self.eos)[:, None, None]
        for block in self.blocks:
            x = block(x, attn_mask=mask)
        return self.norm(x)

    def _pooled(self, features: Tensor, tokens: Tensor, *, project: bool) -> Tensor:
        inside = in_text(tokens, self.eos)
        if self.attn_pool is not None:
            mask = inside[:, None, None]
            if not self.attn_pool.fused_attn:  # timm adds it to the logits here, and converts it in its blocks only
                mask = torch.zeros_like(mask, dtype=features.dtype).masked_fill(~mask, -torch.inf)
            pooled = self.attn_pool(features, attn_mask=mask)
        else:
            pooled = mean_of(features, inside) if self.pool == "avg" else at_end(features, inside)
        return self.head(pooled) if project else pooled


def in_text(tokens: Tensor, eos: int) -> Tensor:
    """bool [B, L]: up to and with the first ``eos``; all of a text that has none."""
    ends = (tokens == eos).int()
    return ends.cumsum(1) - ends == 0


def at_end(features: Tensor, inside: Tensor) -> Tensor:
    """[B, D] of features [B, L, D]: that of each text's last token; ``inside`` as :func:`in_text` gives it."""
    last = (inside.sum(1) - 1)[:, None, None]
    return features.gather(1, last.expand(-1, -1, features.shape[2]))[:, 0]


def mean_of(features: Tensor, inside: Tensor) -> Tensor:
    """[B, D] of features [B, L, D]: the mean over each text's tokens."""
    weights = inside.unsqueeze(-1).to(features.dtype)
    return (features * weights).sum(1) / weights.sum(1)


def build_tower(
    shape: TowerShape,
    *,
    vocabulary_size: int,
    length: int,
    embed_dim: int,
    eos: int,
    pool: str = "last",
    init: str = "fan_in",
    log_scale: float = LOG_SCALE,
    bias: float | None = BIAS,
    drop_path_rate: float = 0.0,
    fused_attention: bool = True,
) -> TextTower:
    """Build and initialise a text tower, on the current default device.

    ``length``: the most tokens of a text, with its end. ``eos``: the id of that end. ``embed_dim``: of the embedding, the
    image tower's. ``pool``: ``last`` (the token of the end), ``map`` (attention pooling) or ``avg`` (mean of the text's
    tokens). ``log_scale`` and ``bias`` begin at the published values; ``bias`` None leaves it out, for a loss that has
    none. ``drop_path_rate`` and ``fused_attention`` as for `sovit.models.vit.build_vit`.

    ``init`` draws matrices and biases as for every family (`sovit.models.initial`). Tokens are normal with std 1 under
    ``fan_in``, so that the residual stream begins as a ViT's, and with 1 / sqrt(width) under ``big_vision`` (flax's
    default); positions with 0.5 and 1 / sqrt(width), the probe as a ViT's; the projection is truncated normal with
    std 1 / sqrt(width), its bias zero. Weights depend on torch's generator and the arguments alone; nothing is drawn on
    the meta device. Raises ValueError for an unknown argument or a size that cannot be.
    """
    check_text_pool(pool)
    check_init(init)
    for name, value in (("vocabulary_size", vocabulary_size), ("length", length), ("embed_dim", embed_dim)):
        check_positive(name, value)
    check_heads(shape.width, shape.num_heads)
    if not 0 <= eos < vocabulary_size:
        raise ValueError(f"eos={eos} is no token of a vocabulary of {vocabulary_size}.")
    if not 0 <= drop_path_rate < 1:
        raise ValueError(f"drop_path_rate={drop_path_rate} is not in [0, 1).")
    device = torch.get_default_device()
    with torch.device("meta"):  # the draws of the constructors would be thrown away
        tower = TextTower(
            shape,
            vocabulary_size=vocabulary_size,
            length=length,
            embed_dim=embed_dim,
            pool=pool,
            eos=eos,
            drop_path_rate=drop_path_rate,
            has_bias=bias is not None,
        )
    for module in tower.modules():
        if isinstance(module, Attention | AttentionPoolLatent):
            module.fused_attn = fused_attention  # type: ignore[misc]  # final for TorchScript only
    _assert_built(tower, shape)
    if device.type != "meta":
        tower.to_empty(device=device)
        _init(tower, init, log_scale, bias)
    return tower


@torch.no_grad()
def _init(tower: TextTower, init: str, log_scale: float, bias: float | None) -> None:
    init_all(tower, list(tower.blocks), init=init, head_bias=0.0)
    small = tower.embed_dim**-0.5
    big_vision = init == "big_vision"
    nn.init.normal_(tower.token_embed.weight, std=small if big_vision else 1.0)
    nn.init.normal_(tower.pos_embed, std=small if big_vision else 0.5)
    if tower.attn_pool is not None:
        probe = tower.attn_pool.latent
        if big_vision:
            nn.init.xavier_uniform_(probe[0])
        else:
            nn.init.normal_(probe)
    lecun_normal_(tower.head.weight)
    nn.init.constant_(tower.log_scale, log_scale)
    if tower.bias is not None and bias is not None:
        nn.init.constant_(tower.bias, bias)


def _assert_built(tower: TextTower, shape: TowerShape) -> None:
    pools = [] if tower.attn_pool is None else [tower.attn_pool]
    blocks: list[Any] = list(tower.blocks)
    assert len(blocks) == shape.depth
    for block in [*blocks, *pools]:
        assert block.mlp.fc1.weight.shape == (shape.mlp_dim, shape.width)
        assert block.mlp.fc2.weight.shape == (shape.width, shape.mlp_dim)
    for attention in [*(block.attn for block in blocks), *pools]:
        assert attention.num_heads == shape.num_heads
        assert attention.proj.weight.shape == (shape.width, shape.width)
