"""Known laws to draw simulated sweeps from, and what a fit of such a sweep should find.

`Separable` is SoViT's joint law (arXiv 2305.13035, Eq. 3), whose exponents s_k = c / (a_k + b_k) are exact:

    f(x, t) = sum_k alpha_k x_k^-a_k + t^-c (sum_k beta_k x_k^b_k + xi) + eps

`Flops` is the law of a model whose cost is known, with n = t / F(x) images at F(x) forward GFLOPs an image; its optimum
is no exact power of t, so its exponents are those at one t:

    f(x, t) = sum_k alpha_k x_k^-a_k + beta n^-c + eps

Noise is not part of a truth (`sovit.analysis.simulation.simulate`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sovit.analysis.forecast.joint import Geometry
from sovit.analysis.law import Law
from sovit.analysis.points import DIMENSIONS, Dimensions
from sovit.analysis.star import find_center
from sovit.strict import nearest

Array = NDArray[np.float64]
Triple = tuple[float, float, float]  # a value each for width, depth and mlp_dim

# The published exponents are s = 0.22, 0.45 and 0.60 at c = 0.65; a and b are not published. This split of a + b = c / s
# leaves a U of similar depth in every arm.
EXPONENTS, DECAY, SIZE_EXPONENTS = (0.22, 0.45, 0.60), 0.65, (1.75, 0.85, 0.55)
FLOOR, CEILING = 0.15, 0.58  # errors of a default truth: eps, and the largest of the sweep
_DATA_SHARE = 0.5  # xi t^-c at the middle, over the beta term of one dimension
_SMALLEST = 0.1  # least a_k of the default flops law, where no positive one gives the published exponent
_START = (100.0, 10.0, 100.0)  # of the search for a best shape, which has one answer
_STEPS = 100  # of Newton's method, each of a factor e at most


def _check(parameters: Mapping[str, float | Triple], positive: Sequence[str]) -> None:
    for name, value in parameters.items():
        for number in value if isinstance(value, tuple) else (value,):
            if not math.isfinite(number) or number < 0 or (name in positive and number == 0):
                least = "above" if name in positive else "of at least"
                raise ValueError(f"{name}={number!r} of the truth is not a finite number {least} 0.")


@dataclass(frozen=True)
class Separable:
    """Eq. 3 in raw units: sizes as counted, t in GFLOPs."""

    alpha: Triple
    a: Triple
    beta: Triple
    b: Triple
    xi: float
    c: float
    eps: float

    def __post_init__(self) -> None:
        _check(vars(self), ("a", "b", "c"))

    def error(self, sizes: ArrayLike, t: ArrayLike, forward_gflops: ArrayLike | None = None) -> Array:
        """f for (..., 3) sizes at t GFLOPs; what a shape costs does not matter to this law."""
        sizes = np.asarray(sizes, float)
        data = sizes ** np.array(self.b) @ np.array(self.beta) + self.xi
        return sizes ** -np.array(self.a) @ np.array(self.alpha) + data * np.asarray(t, float) ** -self.c + self.eps

    def arm(self, name: str, center: Sequence[float]) -> Law:
        """The law of one dimension with the others at the center: Eq. 2 exactly, their terms in its xi and eps."""
        k = DIMENSIONS.index(name)
        others = [j for j in range(3) if j != k]
        xi = self.xi + sum(self.beta[j] * center[j] ** self.b[j] for j in others)
        eps = self.eps + sum(self.alpha[j] * center[j] ** -self.a[j] for j in others)
        return Law(self.alpha[k], self.a[k], self.beta[k], self.b[k], xi, self.c, eps)

    def optimum(self, t: float) -> Array:
        """The (3,) sizes of least error at t GFLOPs, not rounded."""
        return np.array([float(self.arm(name, (1, 1, 1)).optimum(t)) for name in DIMENSIONS])

    def growth(self, t: float) -> Array:
        """The (3,) exponents with which the optimum grows, the same at every t."""
        return self.c / (np.array(self.a) + np.array(self.b))

    def arm_optimum(self, t: float, center: Sequence[float]) -> Array:
        """The (3,) best sizes of one dimension each, with the other two at the center: here those of `optimum`."""
        return self.optimum(t)

    def arm_growth(self, t: float, center: Sequence[float]) -> Array:
        """The (3,) exponents of `arm_optimum`."""
        return self.growth(t)

    def frontier(self, t: float) -> float:
        """The least error at t GFLOPs."""
        return float(self.error(self.optimum(t), t))


@dataclass(frozen=True)
class Flops:
    """The law that knows its FLOPs, in raw units: sizes as counted, n in images."""

    alpha: Triple
    a: Triple
    beta: float
    c: float
    eps: float
    geometry: Geometry

    def __post_init__(self) -> None:
        _check({name: value for name, value in vars(self).items() if name != "geometry"}, ("alpha", "a", "beta", "c"))

    def error(self, sizes: ArrayLike, t: ArrayLike, forward_gflops: ArrayLike | None = None) -> Array:
        """f for (..., 3) sizes at t GFLOPs; ``forward_gflops`` an image where they are known already."""
        cost = self.geometry.forward_gflops(sizes) if forward_gflops is None else np.asarray(forward_gflops, float)
        model = np.asarray(sizes, float) ** -np.array(self.a) @ np.array(self.alpha)
        return model + self.beta * (np.asarray(t, float) / cost) ** -self.c + self.eps

    def optimum(self, t: float) -> Array:
        """The (3,) sizes of least error at t GFLOPs, not rounded."""
        return np.exp(self._best((0, 1, 2), t, _START)[0])

    def growth(self, t: float) -> Array:
        """The (3,) local exponents d log x* / d log t of the best shape."""
        return self._best((0, 1, 2), t, _START)[1]

    def frontier(self, t: float) -> float:
        """The least error at t GFLOPs."""
        return float(self.error(self.optimum(t), t))

    def arm_optimum(self, t: float, center: Sequence[float]) -> Array:
        """The (3,) best sizes of one dimension each, with the other two at the center: what a star can see."""
        return np.array([math.exp(self._best((k,), t, center)[0][k]) for k in range(3)])

    def arm_growth(self, t: float, center: Sequence[float]) -> Array:
        """The (3,) local exponents of `arm_optimum`."""
        return np.array([self._best((k,), t, center)[1][0] for k in range(3)])

    def _best(self, free: tuple[int, ...], t: float, center: Sequence[float]) -> tuple[Array, Array]:
        """log sizes (3,) of least error when the dimensions ``free`` may change, and their exponents (len(free),).

        Newton's method: f is convex in log x, for F has only positive terms. The exponents follow from the gradient's
        being 0 at every t (implicit function theorem). Raises ValueError if the optimum is absurdly far.
        """
        rows, a = list(free), np.array(self.a)
        start = np.log(np.array(center, float))

        def parts(log_x: Array) -> tuple[float, Array, Array, Array]:
            """f - eps, its gradient and Hessian, and the derivative of the gradient by log t."""
            gain = np.array(self.alpha) * np.exp(-a * log_x)
            log_cost, slope, bend = self.geometry.log_cost(log_x)
            data = self.beta * math.exp(self.c * (log_cost - math.log(t)))
            hessian = np.diag(a**2 * gain) + data * self.c * (self.c * np.outer(slope, slope) + bend)
            mixed = -data * self.c**2 * slope
            return gain.sum() + data, data * self.c * slope - a * gain, hessian, mixed

        log_x, (value, gradient, hessian, mixed) = start, parts(start)
        for _ in range(_STEPS):
            step = np.zeros(3)
            step[rows] = -np.linalg.solve(hessian[np.ix_(rows, rows)], gradient[rows])
            step /= max(1.0, float(np.abs(step).max()))
            while (trial := parts(log_x + step))[0] > value * (1 + 1e-14):
                step /= 2
            log_x, (value, gradient, hessian, mixed) = log_x + step, trial
            if np.abs(step).max() < 1e-12:
                return log_x, np.asarray(-np.linalg.solve(hessian[np.ix_(rows, rows)], mixed[rows]), float)
        names = " and ".join(DIMENSIONS[k] for k in free)
        raise ValueError(f"the truth has its best {names} absurdly far from the sweep; give it another alpha or beta.")


Truth = Separable | Flops


def middle_compute(t: ArrayLike) -> float:
    """Geometric mean of the compute of all evaluations."""
    return math.exp(float(np.log(np.asarray(t, float)).mean()))


def center_of(sizes: ArrayLike) -> Sequence[float]:
    """The center of a star of (n, 3) sizes; of other sweeps the geometric mean of the distinct sizes by dimension."""
    shapes = {Dimensions(*(int(size) for size in row)) for row in np.asarray(sizes)}
    try:
        return find_center(shapes)
    except ValueError:
        return _middle_sizes(sizes)


def _middle_sizes(sizes: ArrayLike) -> list[float]:
    return [math.exp(float(np.log(np.unique(column)).mean())) for column in np.asarray(sizes, float).T]


def default_truth(law: str, sizes: ArrayLike, t: ArrayLike, forward_gflops: ArrayLike, geometry: Geometry) -> Truth:
    """A truth with exponents like the published ones for a sweep: (n, 3) sizes at (n,) t GFLOPs and GFLOPs an image.

    ``law`` is "separable" or "flops". At the sweep's middle compute the optimum of each dimension is the geometric mean
    of its sizes (of a star: with the other two at the center), and the largest error of the sweep is 0.58, over a floor
    of 0.15. Raises ValueError for another law.
    """
    if law not in _PARAMETERS:
        raise ValueError(f"law={law!r} is not a built-in truth; write separable or flops, or give a YAML file.")
    middle, at = _middle_sizes(sizes), middle_compute(t)
    center = center_of(sizes)

    def make(scale: float, eps: float) -> Truth:
        if law == "separable":
            return _default_separable(scale, eps, middle, at)
        return _default_flops(scale, eps, middle, at, center, geometry)

    return make((CEILING - FLOOR) / float(make(1.0, 0.0).error(sizes, t, forward_gflops).max()), FLOOR)


def _default_separable(scale: float, eps: float, middle: Sequence[float], t: float) -> Separable:
    a, c = SIZE_EXPONENTS, DECAY
    b = tuple(c / s - size for s, size in zip(EXPONENTS, a, strict=True))
    beta = [scale * x**-b_k * t**c for x, b_k in zip(middle, b, strict=True)]
    alpha = [scale * b_k / a_k * x**a_k for x, a_k, b_k in zip(middle, a, b, strict=True)]
    return Separable(_triple(alpha), a, _triple(beta), _triple(b), scale * _DATA_SHARE * t**c, c, eps)


def _default_flops(
    scale: float, eps: float, middle: Sequence[float], t: float, center: Sequence[float], geometry: Geometry
) -> Flops:
    """From d f / d log x_k = 0 along arm k: s_k = c / (a_k + c kappa + bend), kappa = d log F / d log x_k."""
    c = DECAY
    beta = scale * (t / float(geometry.forward_gflops(center))) ** c
    alpha, a = [], []
    for k, (size, s) in enumerate(zip(middle, EXPONENTS, strict=True)):
        here = np.log(np.array(center, float))
        here[k] = math.log(size)
        log_cost, slope, curvature = geometry.log_cost(here)
        a_k = max(_SMALLEST, c / s - c * slope[k] - curvature[k, k] / slope[k])
        a.append(a_k)
        alpha.append(beta * c * slope[k] / a_k * size**a_k * math.exp(c * (log_cost - math.log(t))))
    return Flops(_triple(alpha), _triple(a), beta, c, eps, geometry)


def _triple(values: Iterable[float]) -> Triple:
    width, depth, mlp_dim = (float(value) for value in values)
    return width, depth, mlp_dim


_PARAMETERS = {"separable": ("alpha", "a", "beta", "b", "xi", "c", "eps"), "flops": ("alpha", "a", "beta", "c", "eps")}
_BY_DIMENSION = {"separable": ("alpha", "a", "beta", "b"), "flops": ("alpha", "a")}


def as_dict(truth: Truth) -> dict[str, Any]:
    """JSON-ready parameters, with a value by dimension where there is one for each; `from_dict` reads it back."""
    law = "separable" if isinstance(truth, Separable) else "flops"
    values = {name: getattr(truth, name) for name in _PARAMETERS[law]}
    return {"law": law} | {
        name: dict(zip(DIMENSIONS, value, strict=True)) if isinstance(value, tuple) else value
        for name, value in values.items()
    }


def from_dict(document: Any, geometry: Geometry) -> Truth:
    """The truth that `as_dict` describes. Raises ValueError for a key too many or too few, or a value that is none."""
    law = document.get("law") if isinstance(document, Mapping) else None
    if law not in _PARAMETERS:
        raise ValueError(f"law is {law!r}; write law: separable or law: flops, and its parameters below.")
    _check_keys(document, ("law", *_PARAMETERS[law]), f"a {law} law")
    values: dict[str, Any] = {}
    for name in _PARAMETERS[law]:
        if name in _BY_DIMENSION[law]:
            _check_keys(document[name], DIMENSIONS, name)
            values[name] = _triple(_number(f"{name}.{key}", document[name][key]) for key in DIMENSIONS)
        else:
            values[name] = _number(name, document[name])
    return Separable(**values) if law == "separable" else Flops(**values, geometry=geometry)


def _check_keys(found: Any, expected: Sequence[str], what: str) -> None:
    if not isinstance(found, Mapping):
        raise ValueError(f"{what} is {found!r}; give {', '.join(expected)}.")
    for key in found:
        if key not in expected:
            raise ValueError(f"{key!r} is no part of {what}{nearest(str(key), expected)}")
    missing = [key for key in expected if key not in found]
    if missing:
        raise ValueError(f"{what} lacks {', '.join(missing)}; give every parameter a value, 0 for none.")


def _number(name: str, value: Any) -> float:
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)  # also of text, as which YAML reads 1e-3
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {value!r}, which is not a number.") from None
