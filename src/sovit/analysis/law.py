"""The scaling law of one shape dimension x (width, depth or MLP dimension) at compute t.

    f(x, t) = alpha x^-a + (beta x^b + xi) t^-c + eps        (SoViT, arXiv 2305.13035, Eq. 2)

f is an error in [0, 1]; t is forward FLOPs per image times images seen, in GFLOPs. For fixed t and positive
alpha, a, beta, b the law falls up to one x and rises after it (quasiconvex, Appendix A.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Law:
    """Eq. 2 in raw units: x as counted, t in GFLOPs. Coefficients may be 0; exponents are positive."""

    alpha: float
    a: float
    beta: float
    b: float
    xi: float
    c: float
    eps: float

    def __post_init__(self) -> None:
        for name, value in self.as_dict().items():
            positive = name in "abc"
            if not math.isfinite(value) or value < 0 or (positive and value == 0):
                raise ValueError(f"{name}={value!r} is not a finite number {'above' if positive else 'of at least'} 0.")

    def as_dict(self) -> dict[str, float]:
        return dict(vars(self))

    @property
    def exponent(self) -> float:
        """s = c / (a + b): the optimum grows as t^s."""
        return self.c / (self.a + self.b)

    def error(self, x: ArrayLike, t: ArrayLike) -> NDArray[np.float64]:
        """f(x, t); x and t broadcast."""
        x, t = np.asarray(x, float), np.asarray(t, float)
        return self.alpha * x**-self.a + (self.beta * x**self.b + self.xi) * t**-self.c + self.eps

    def optimum(self, t: ArrayLike) -> NDArray[np.float64]:
        """The x of least error at compute t (Eq. 4): 0 if alpha is 0, inf if beta is 0 (nan if both are)."""
        t = np.asarray(t, float)
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            gain, cost = np.log(self.alpha) + math.log(self.a), np.log(self.beta) + math.log(self.b)
            return np.asarray(np.exp((gain - cost + self.c * np.log(t)) / (self.a + self.b)))

    def frontier(self, t: ArrayLike) -> NDArray[np.float64]:
        """The error at the optimum of each t (Eq. 5): F x*^-a + xi t^-c + eps with F = alpha (1 + a/b)."""
        t = np.asarray(t, float)
        best = self.alpha * (1 + self.a / self.b) * self.optimum(t) ** -self.a if self.alpha else 0.0
        return best + self.xi * t**-self.c + self.eps
