"""The law that knows its FLOPs, as a value: the exact cost of a shape, the terms, the best shape for a budget.

    f(x, n) = sum_k alpha_k x_k^-a_k + beta n^-c + eps,      n = t / F(x)

x = (width, depth, MLP dimension); t is forward FLOPs per image times images seen, in GFLOPs; F(x), forward GFLOPs an
image, is the closed form of `sovit.flops`, here for sizes that need not be whole.

In log x every term is the exponential of a convex function, because F has only positive terms (a geometric program;
Boyd, Kim, Vandenberghe and Hassibi 2007). So at a given t the error has one minimum over shapes, found by Newton's
method. Fitting is in `sovit.analysis.forecast.flops_fit` and `sovit.analysis.forecast.joint`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sovit.analysis.points import DIMENSIONS
from sovit.flops import forward_flops
from sovit.shape import Shape

IMAGES = "images"
AXES = (*DIMENSIONS, IMAGES)
EXPONENTS = (*(f"a_{name}" for name in DIMENSIONS), "c")
_NEWTON = 200
Array = NDArray[np.float64]

# F is a polynomial in (width, depth, mlp_dim): exponents of its monomials, and six shapes that determine them.
_MONOMIALS = np.array([[1, 0, 0], [2, 0, 0], [1, 0, 1], [1, 1, 0], [2, 1, 0], [1, 1, 1]])
_PROBES = ((1, 1, 1), (2, 1, 1), (1, 1, 2), (1, 2, 1), (2, 2, 1), (1, 2, 2))


@dataclass(frozen=True)
class Geometry:
    """What the cost of a shape depends on besides its three dimensions; ``num_heads`` only names shapes, it is free."""

    image_size: int
    patch_size: int
    num_heads: int
    channels: int = 3
    pool: str = "map"
    num_classes: int = 0

    @cached_property
    def cost(self) -> Array:
        """Forward FLOPs an image for each of the six monomials, read off the closed form at six shapes."""
        flops = [
            sum(
                forward_flops(
                    Shape(*x, num_heads=1, patch_size=self.patch_size), self.image_size,
                    channels=self.channels, pool=self.pool, num_classes=self.num_classes,
                ).values()
            )
            for x in _PROBES
        ]  # fmt: skip
        table = np.prod(np.array(_PROBES, float)[:, None, :] ** _MONOMIALS, axis=2)
        return np.rint(np.linalg.solve(table, flops))

    def forward_gflops(self, x: ArrayLike) -> Array:
        """F(x) for (..., 3) sizes, which need not be whole."""
        return np.asarray(np.exp(np.log(np.asarray(x, float)) @ _MONOMIALS.T) @ self.cost / 1e9)

    def log_cost(self, log_x: Array) -> tuple[float, Array, Array]:
        """log F at (3,) log sizes, with its gradient and Hessian: mean and covariance of the monomials' exponents."""
        terms = self.cost * np.exp(_MONOMIALS @ log_x)
        share = terms / terms.sum()
        slope = share @ _MONOMIALS
        return math.log(terms.sum() / 1e9), slope, (_MONOMIALS.T * share) @ _MONOMIALS - np.outer(slope, slope)


@dataclass(frozen=True)
class Form:
    """Which terms the law has beside eps: three sizes and images, and for each interaction the product of its terms.

    ``interactions``: groups of two or more of `AXES`. An interaction has a coefficient of its own, and the exponents of
    the terms it multiplies. Raises ValueError for an unknown or repeated one.
    """

    interactions: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        for number, group in enumerate(self.interactions):
            if len(set(group)) < 2 or not set(group) <= set(AXES):
                raise ValueError(f"interaction {tuple(group)} is not known; give two or more of {', '.join(AXES)}.")
            if any(set(group) == set(other) for other in self.interactions[:number]):
                raise ValueError(f"the interaction {tuple(group)} is given twice; give it once.")

    @property
    def coefficients(self) -> tuple[str, ...]:
        products = ("_".join(("gamma", *sorted(group, key=AXES.index))) for group in self.interactions)
        return (*(f"alpha_{name}" for name in DIMENSIONS), "beta", *products, "eps")

    @property
    def members(self) -> Array:
        """(J, 4): 1 where a term falls with width, depth, mlp_dim or the images."""
        groups = [*((axis,) for axis in AXES), *self.interactions, ()]
        return np.array([[float(axis in group) for axis in AXES] for group in groups])

    @property
    def num_parameters(self) -> int:
        return len(self.coefficients) + len(EXPONENTS)


PLAIN = Form()


@dataclass(frozen=True)
class FlopsLaw:
    """A law of a form: term j is p_j exp(-sum_k members_jk theta_k (u_k - center_k)), u = log (width, depth, mlp_dim, n).

    ``coefficients`` (J,): p, each term's error at the center; ``exponents`` (4,): theta; ``center`` (4,).
    """

    form: Form
    coefficients: Array
    exponents: Array
    center: Array
    geometry: Geometry

    @cached_property
    def _powers(self) -> Array:
        """(J, 4): minus the power of width, depth, mlp_dim and n in each term."""
        return self.form.members * self.exponents

    def error(self, x: ArrayLike, t: ArrayLike) -> Array:
        """f for (..., 3) sizes at t GFLOPs, which broadcast."""
        x = np.asarray(x, float)
        log_n = np.log(np.asarray(t, float)) - np.log(self.geometry.forward_gflops(x))
        u = np.stack(np.broadcast_arrays(*np.moveaxis(np.log(x), -1, 0), log_n), -1) - self.center
        return np.asarray(np.exp(-u @ self._powers.T) @ self.coefficients)

    def error_by_parameter(self, x: ArrayLike, t: float) -> Array:
        """d f by every parameter at (..., 3) sizes and t, (..., J + 4): coefficients, then exponents."""
        x = np.asarray(x, float)
        log_n = math.log(t) - np.log(self.geometry.forward_gflops(x))
        u = np.concatenate([np.log(x), log_n[..., None]], -1) - self.center
        by_coefficient = np.exp(-u @ self._powers.T)
        by_exponent = -((by_coefficient * self.coefficients) @ self.form.members) * u
        return np.concatenate([by_coefficient, by_exponent], -1)

    def has_optimum(self) -> bool:
        """Whether every dimension and the images gain something: without, the best shape is infinite or vanishes."""
        return bool(np.all((self.coefficients @ (self._powers > 0)) > 0))

    def _at(self, log_x: Array, t: float) -> tuple[Array, Array, Array, Array, Array]:
        """At one shape: terms (J,), their log-gradients by log x (J, 3), the Hessian of the law (3, 3), the gradient
        (3,) of log F, and u - center (4,)."""
        log_f, slope, bend = self.geometry.log_cost(log_x)
        u = np.append(log_x, math.log(t) - log_f) - self.center
        terms = self.coefficients * np.exp(-self._powers @ u)
        slopes = self._powers[:, 3:] * slope - self._powers[:, :3]
        return terms, slopes, (slopes.T * terms) @ slopes + float(terms @ self._powers[:, 3]) * bend, slope, u

    def optimum(self, t: float) -> Array:
        """The (3,) sizes, not rounded, of least error at t GFLOPs; raises ValueError if the law has none."""
        log_x: Array = np.array(self.center[:3])
        step: Array = np.zeros(3)
        value, size = math.inf, 0.0
        for _ in range(_NEWTON if self.has_optimum() else 0):
            terms, slopes, hessian, _, _ = self._at(log_x + step, t)
            if (trial := float(terms[:-1].sum())) > value * (1 + 1e-14):
                step /= 2
                continue
            log_x += step
            value = trial
            step = np.asarray(-np.linalg.solve(hessian, terms @ slopes), float)
            size = float(np.abs(step).max())
            if size < 1e-10:
                return np.asarray(np.exp(log_x))
            step *= min(1.0, 2.0 / size)
        raise ValueError("the law has no best shape: a dimension, or the images, gain nothing; see its flags.")

    def frontier(self, t: float) -> float:
        """The least error at t GFLOPs."""
        return float(self.error(self.optimum(t), t))

    def growth(self, t: float) -> Array:
        """Local growth exponents d log x_k* / d log t of the best shape, (3,)."""
        terms, slopes, hessian, _, _ = self._at(np.log(self.optimum(t)), t)
        return np.asarray(np.linalg.solve(hessian, (self._powers[:, 3] * terms) @ slopes))

    def sensitivity(self, t: float) -> Array:
        """d log x_k* by every parameter, (3, J + 4): coefficients, then exponents (implicit function theorem)."""
        terms, slopes, hessian, slope, u = self._at(np.log(self.optimum(t)), t)
        by_coefficient = slopes.T * np.exp(-self._powers @ u)
        inside = self.form.members * terms[:, None]
        direct = inside.sum(0)[:, None] * np.vstack((-np.eye(3), slope))  # of the slopes' own theta
        by_exponent = (direct - (inside.T @ slopes) * u[:, None]).T
        return -np.linalg.solve(hessian, np.hstack((by_coefficient, by_exponent)))

    def parameters(self) -> dict[str, float]:
        """Coefficients, for x as counted and n in images, and exponents by name."""
        raw = self.coefficients * np.exp(self._powers @ self.center)
        names = (*self.form.coefficients, *EXPONENTS)
        return dict(zip(names, map(float, (*raw, *self.exponents)), strict=True))
