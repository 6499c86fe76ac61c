"""The Adafactor of "Scaling Vision Transformers" (arXiv 2106.04560, Sec. 3.4), on whole and on sharded parameters.

On plain tensors it is timm's ``AdafactorBigVision`` to the last bit, in the setting that `sovit.optim` uses. That one
cannot step DTensors, which is what ``fully_shard`` makes of parameters. Here a shard is updated with the statistics of
the whole parameter: which two dimensions are factored goes by the whole shape, and means over a dimension that is spread
over processes are summed up among them, in two all-reduces a step for all parameters together.

Not here: update clipping, scaling by the parameter's size, and weight decay that is not relative to the learning rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, zeros


class Adafactor(torch.optim.Optimizer):
    """p -= lr (m + weight_decay p), m the running mean of g / sqrt(v), v the second moment, factored where it pays.

    ``momentum`` is the decay of m. That of v is ``min(beta2_cap, 1 - i^-decay_rate)`` at the i-th update. v is factored
    over the two largest dimensions if both reach ``min_dim_size_to_factor``. ``eps`` is added to squared gradients.

    The state of a parameter is ``step``, ``exp_avg`` (m, in float32 at least), and either ``exp_avg_sq`` (v) or its means
    over one of the two dimensions each, ``exp_avg_sq_r`` and ``exp_avg_sq_c``. For a DTensor all but ``step`` are DTensors
    too, sharded like the parameter, and replicated where the sharded dimension is the one averaged over.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        min_dim_size_to_factor: int = 32,
        decay_rate: float = 0.8,
        beta2_cap: float = 0.999,
        momentum: float = 0.9,
        eps: float = 1e-30,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "min_dim_size_to_factor": min_dim_size_to_factor,
            "decay_rate": decay_rate,
            "beta2_cap": beta2_cap,
            "momentum": momentum,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        updates = [
            _Update(parameter, self.state[parameter], group)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        factored = [update for update in updates if update.dims is not None]
        for update in updates:
            update.observe()
        _sum_up([mean for update in factored for mean in update.new_means])
        for update in factored:
            update.take_means()
        _sum_up([update.mean_of_rows for update in factored])
        for update in updates:
            update.apply()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state. Unlike torch's own it does not round the momentum to the parameter's precision."""
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for key, parameter in zip(saved, chain.from_iterable(g["params"] for g in self.param_groups), strict=True):
            momentum = state_dict["state"].get(key, {}).get("exp_avg")
            if momentum is not None and momentum.dtype != parameter.dtype:
                self.state[parameter]["exp_avg"] = momentum.to(parameter.device, copy=True)


class _Update:
    """One parameter's update, in the three parts between which processes add up their sums."""

    def __init__(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        self.group, self.sharded = group, parameter
        self.dims = _factored(parameter.shape, group["min_dim_size_to_factor"])
        if not state:
            state |= _new_state(parameter.grad, self.dims)
        state["step"].add_(1)
        self.state = {key: _local(value) for key, value in state.items()}
        self.parameter, self.grad = _local(parameter), _local(parameter.grad)
        self.weight = 1 - min(group["beta2_cap"], 1.0 - self.state["step"].item() ** -group["decay_rate"])

    def observe(self) -> None:
        """Take the squared gradient into the second moment, or its means over rows and columns."""
        squares = self.grad.square() + self.group["eps"]
        if self.dims is None:
            self.state["exp_avg_sq"].lerp_(squares, self.weight)
        else:
            column, row = self.dims
            self.new_means = (_Mean(squares, row, self.sharded), _Mean(squares, column, self.sharded))

    def take_means(self) -> None:
        assert self.dims is not None
        for key, mean in zip(("exp_avg_sq_r", "exp_avg_sq_c"), self.new_means, strict=True):
            self.state[key].lerp_(mean.value, self.weight)
        self.mean_of_rows = _Mean(self.state["exp_avg_sq_r"], self.dims[0], self.sharded)

    def apply(self) -> None:
        """Move the parameter. The order of the operations is timm's: another one rounds otherwise."""
        if self.dims is None:
            direction = self.grad * self.state["exp_avg_sq"].rsqrt()
        else:
            rows = (self.state["exp_avg_sq_r"] / self.mean_of_rows.value).rsqrt()
            direction = self.grad * rows * self.state["exp_avg_sq_c"].rsqrt()
        momentum, lr, decay = self.state["exp_avg"], self.group["lr"], self.group["weight_decay"]
        momentum.lerp_(direction.to(momentum.dtype), 1 - self.group["momentum"])
        direction = momentum.to(self.grad.dtype) * lr
        if decay != 0:
            self.parameter.mul_(1.0 - lr * decay)
        self.parameter.sub_(direction)


class _Mean:
    """The mean over one dimension of a tensor laid out like a parameter; if that is sharded, first this process's part."""

    def __init__(self, values: Tensor, dim: int, like: Tensor) -> None:
        self.groups: tuple[dist.ProcessGroup, ...] = ()
        if isinstance(like, DTensor):
            mesh = like.device_mesh
            self.groups = tuple(mesh.get_group(i) for i, kind in enumerate(like.placements) if kind.is_shard(dim))
        if self.groups:
            self.value = values.sum(dim, keepdim=True) / like.shape[dim]
        else:
            self.value = values.mean(dim, keepdim=True)


def _sum_up(means: Sequence[_Mean]) -> None:
    """Add up the parts of the processes, in one all-reduce for all that are spread over the same ones."""
    spread: dict[Any, list[_Mean]] = {}
    for mean in means:
        if mean.groups:
            spread.setdefault((mean.groups, mean.value.dtype), []).append(mean)
    for (groups, _), together in spread.items():
        flat = torch.cat([mean.value.flatten() for mean in together])
        for group in groups:
            dist.all_reduce(flat, group=group)
        for mean, part in zip(together, flat.split([mean.value.numel() for mean in together]), strict=True):
            mean.value = part.view_as(mean.value)


def _factored(shape: Sequence[int], smallest: int) -> tuple[int, int] | None:
    """The second largest and the largest dimension, the later one of equals, or None if the moment is kept whole."""
    order = sorted(range(len(shape)), key=lambda dim: (shape[dim], dim))
    if len(shape) < 2 or shape[order[-2]] < smallest:
        return None
    return order[-2], order[-1]


def _new_state(grad: Tensor, dims: tuple[int, int] | None) -> dict[str, Tensor]:
    state = {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(grad, dtype=_momentum_dtype(grad))}
    if dims is None:
        return state | {"exp_avg_sq": torch.zeros_like(grad)}
    column, row = dims
    return state | {"exp_avg_sq_r": _zeros(grad, row), "exp_avg_sq_c": _zeros(grad, column)}


def _momentum_dtype(grad: Tensor) -> torch.dtype:
    return torch.promote_types(grad.dtype, torch.float32)


def _zeros(grad: Tensor, averaged: int) -> Tensor:
    """Zeros for means over one dimension; where a mesh dimension shards it, all its processes hold the same."""
    shape = [1 if dim == averaged else size for dim, size in enumerate(grad.shape)]
    if not isinstance(grad, DTensor):
        return grad.new_zeros(shape)
    placements = [Replicate() if kind.is_shard(averaged) else kind for kind in grad.placements]
    return zeros(shape, dtype=grad.dtype, device_mesh=grad.device_mesh, placements=placements)


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value
