"""The closed forms of the law against numbers that do not use them."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from sovit.analysis.law import Law

WIDTH = Law(alpha=60.0, a=1.1, beta=4e-3, b=0.49, xi=0.4, c=0.35, eps=0.15)
LAWS = [WIDTH, Law(0.3, 0.45, 0.02, 0.33, 0.0, 0.35, 0.0), Law(0.5, 0.3, 1e-3, 0.9, 2.0, 0.65, 0.1)]
COMPUTE = [10.0, 300.0, 1e4]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("t", COMPUTE)
def test_closed_form_optimum_is_the_numeric_argmin(law, t):
    expected = minimize_scalar(lambda log_x: law.error(math.exp(log_x), t), bounds=(-20, 25), method="bounded",
                               options={"xatol": 1e-10})  # fmt: skip
    assert math.log(law.optimum(t)) == pytest.approx(expected.x, abs=1e-5)


@pytest.mark.parametrize("law", LAWS)
def test_frontier_is_the_error_at_the_optimum(law):
    t = np.array(COMPUTE)
    np.testing.assert_allclose(law.frontier(t), law.error(law.optimum(t), t), rtol=1e-12)


@pytest.mark.parametrize("law", LAWS)
def test_optimum_grows_with_the_exponent(law):
    assert law.optimum(3200.0) / law.optimum(100.0) == pytest.approx(32.0**law.exponent, rel=1e-12)


@pytest.mark.parametrize("law", LAWS)
def test_law_falls_to_the_optimum_and_rises_after_it(law):
    for t in COMPUTE:
        best = float(law.optimum(t))
        below, above = best * np.geomspace(1e-3, 1, 40), best * np.geomspace(1, 1e3, 40)
        assert np.all(np.diff(law.error(below, t)) < 0)
        assert np.all(np.diff(law.error(above, t)) > 0)


def test_without_cost_the_optimum_is_infinite_and_without_gain_it_is_zero():
    assert Law(0.3, 0.5, 0.0, 0.5, 0.1, 0.4, 0.1).optimum(100.0) == math.inf
    law = Law(0.0, 0.5, 0.1, 0.5, 0.1, 0.4, 0.1)
    assert law.optimum(100.0) == 0.0
    assert law.frontier(100.0) == pytest.approx(0.1 * 100.0**-0.4 + 0.1)


@pytest.mark.parametrize(("name", "value"), [("alpha", -1.0), ("a", 0.0), ("eps", math.nan), ("c", math.inf)])
def test_meaningless_parameters_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name}="):
        Law(**(WIDTH.as_dict() | {name: value}))
