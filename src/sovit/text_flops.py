"""FLOPs and parameters of a text tower in closed form, by group: a transformer over tokens, and a projection.

Conventions as in `sovit.flops`: one multiply-add is 2 FLOP, and only matrix products count. Looking up a token's embedding
is none. Every text costs its full length, padding included, as it is computed. The module is
`sovit.language.tower`; what of this is in a run's compute t says `sovit.families.text`.
"""

from __future__ import annotations

from typing import Protocol

from sovit.shape import check_positive

TEXT_POOLS = ("last", "map", "avg")


class TowerShape(Protocol):
    """What a text tower's shape must tell; no patches."""

    @property
    def width(self) -> int: ...
    @property
    def depth(self) -> int: ...
    @property
    def mlp_dim(self) -> int: ...
    @property
    def num_heads(self) -> int: ...


def tower_flops(shape: TowerShape, *, length: int, embed_dim: int, pool: str = "last") -> dict[str, int]:
    """Forward FLOPs per text of ``length`` tokens, by group; the sum of the values is the total.

    ``embed_dim``: of the embedding that the projection makes. ``pool``: ``last`` (the end of the text), ``map`` (attention
    pooling head) or ``avg``. Raises ValueError for an unknown pool or a size below 1.
    """
    check_text_pool(pool)
    _check(length=length, embed_dim=embed_dim)
    width, depth, mlp_dim = shape.width, shape.depth, shape.mlp_dim
    map_head = 4 * length * width**2 + 4 * width**2 + 4 * length * width + 4 * width * mlp_dim
    return {
        "attention_projections": depth * 8 * length * width**2,
        "attention_products": depth * 4 * length**2 * width,
        "mlp": depth * 4 * length * width * mlp_dim,
        "map_head": map_head if pool == "map" else 0,
        "projection": 2 * width * embed_dim,
    }


def tower_params(
    shape: TowerShape, *, vocabulary_size: int, length: int, embed_dim: int, pool: str = "last", bias: bool = True
) -> dict[str, int]:
    """Trained parameters, by group; the sum of the values is the total of the real module.

    ``loss``: log scale and, unless ``bias`` is False, bias of the contrastive loss. Errors as for :func:`tower_flops`.
    """
    check_text_pool(pool)
    _check(vocabulary_size=vocabulary_size, length=length, embed_dim=embed_dim)
    width, depth, mlp_dim = shape.width, shape.depth, shape.mlp_dim
    attention, mlp = 4 * width**2 + 4 * width, 2 * width * mlp_dim + mlp_dim + width
    return {
        "token_embedding": vocabulary_size * width,
        "positions": length * width,
        "attention_projections": depth * attention,
        "mlp": depth * mlp,
        "norms": depth * 4 * width + 2 * width,
        "map_head": width + attention + 2 * width + mlp if pool == "map" else 0,
        "projection": (width + 1) * embed_dim,
        "loss": 1 + bias,
    }


def check_text_pool(pool: str) -> None:
    """Raise ValueError unless ``pool`` is one of ``TEXT_POOLS``."""
    if pool not in TEXT_POOLS:
        raise ValueError(f"pool={pool!r} is unknown for texts; use one of {', '.join(TEXT_POOLS)}.")


def _check(**sizes: int) -> None:
    for name, value in sizes.items():
        check_positive(name, value)
