"""The fit against known laws, a general optimiser and numeric derivatives."""

import numpy as np
import pytest
from scipy.optimize import approx_fprime, least_squares, nnls

from sovit.analysis import kernel
from sovit.analysis.fit import BOX, Noise, Prior, fit_law, law_logs
from sovit.analysis.law import Law


def design(num_sizes=7, num_durations=14, size_range=5.0, t_range=32.0):
    """Every size at every duration, around x = 100 and t = 1000 GFLOPs; runs are sizes."""
    x = 100 * size_range ** np.linspace(-0.5, 0.5, num_sizes)
    t = 1000 * t_range ** np.linspace(-0.5, 0.5, num_durations)
    run = np.repeat(np.arange(num_sizes), num_durations)
    return np.repeat(x, num_durations), np.tile(t, num_sizes), run


def centred_law(a=0.45, b=0.328, c=0.35, eps=0.15, beta=0.07, xi=0.03, off=1.0):
    """A law given in units of x = 100 and t = 1000, whose optimum at t = 1000 is x = 100 * off."""
    alpha = beta * b / a * off ** (a + b)
    return Law(alpha * 100**a, a, beta * 100**-b * 1000**c, b, xi * 1000**c, c, eps)


@pytest.mark.parametrize(("a", "b", "c"), [(1.1, 0.49, 0.35), (0.45, 0.328, 0.35), (0.3, 0.283, 0.35), (2.0, 1.0, 0.6)])
def test_known_exponents_come_back_from_noiseless_errors(a, b, c):
    law = centred_law(a, b, c)
    x, t, _ = design()
    fit = fit_law(x, t, law.error(x, t))
    assert fit.law.as_dict() == pytest.approx(law.as_dict(), rel=1e-4)
    assert fit.law.exponent == pytest.approx(c / (a + b), rel=1e-6)
    assert fit.flags == ()
    assert fit.converged == 1.0


def test_eighteen_points_of_the_paper_suffice():
    """6 sizes x 3 durations, compute proportional to size: s within a few percent at 0.1% noise."""
    law = centred_law(1.1, 0.6, 0.45)
    x, images, _ = design(6, 3, 6.0, 8.0)
    t = images * x / 100
    fit = fit_law(x, t, law.error(x, t) * np.exp(1e-3 * np.random.default_rng(0).normal(size=len(x))))
    assert fit.law.exponent == pytest.approx(law.exponent, rel=0.05)


def random_problem(rng):
    """Truths as hard as they come: weak exponents, constant cost, optimum off the arm's middle, few sizes."""
    share = rng.uniform(0, 0.8)
    law = centred_law(
        a=np.exp(rng.uniform(np.log(0.1), np.log(2))), b=np.exp(rng.uniform(np.log(0.1), np.log(1.5))),
        c=rng.uniform(0.15, 0.9), beta=0.1 * (1 - share), xi=0.1 * share, off=np.exp(rng.uniform(-1, 1)),
    )  # fmt: skip
    x, t, run = design(int(rng.choice([5, 7])), 14, rng.uniform(3, 8))
    sigma = float(rng.choice([0.005, 0.01, 0.02]))
    return x, t, run, law.error(x, t) * np.exp(sigma * rng.normal(size=len(x))), sigma


def general_optimum(x, t, error, noise, starts, seed):
    """Best objective of scipy's bounded trust region over all seven log parameters."""
    log_x, log_t, log_error = (np.log(v) - np.log(v).mean() * centre for v, centre in ((x, 1), (t, 1), (error, 0)))

    def pieces(p):
        alpha, a, beta, b, xi, c, eps = np.exp(p)
        size, decay = alpha * np.exp(-a * log_x), np.exp(-c * log_t)
        return size, beta * np.exp(b * log_x) * decay, xi * decay, np.full_like(log_x, eps)

    def residual(p):
        return noise.whiten(log_error - np.log(sum(pieces(p))))

    def jacobian(p):
        size, cost, data, floor = pieces(p)
        a, b, c = np.exp(p[[1, 3, 5]])
        columns = (size, -a * log_x * size, cost, b * log_x * cost, data, -c * log_t * (cost + data), floor)
        return -noise.whiten(np.column_stack(columns) / sum(pieces(p))[:, None])

    low = np.log([1e-9, BOX[0], 1e-9, BOX[0], 1e-9, BOX[0], 1e-9])
    high = np.log([10, BOX[1], 10, BOX[1], 10, BOX[1], 10])
    rng = np.random.default_rng(seed)
    first = np.log([0.1, 0.5, 0.1, 0.5, 0.05, 0.4, 0.1])
    ends = []
    for _ in range(starts):
        start = np.clip(first + 0.8 * rng.normal(size=7), low + 0.01, high - 0.01)
        ends.append(2 * least_squares(residual, start, jacobian, bounds=(low, high), max_nfev=300).cost)
    return min(ends)


def test_no_optimum_is_missed_on_forty_hard_truths():
    """Objective within 0.1 chi-square of the best of four general starts, in both noise models."""
    rng = np.random.default_rng(20)
    for case in range(40):
        x, t, run, error, sigma = random_problem(rng)
        noise = Noise(run, 1.0 * (case % 2), np.ones(len(x)))
        fit = fit_law(x, t, error, noise=noise)
        assert fit.objective <= general_optimum(x, t, error, noise, 4, case) + 0.1 * sigma**2, case


def project(exponents, logs, inverse, target, noise, pull=None):
    """(objective, coefficients, gradient, curvature) of the projected problem, by log exponents."""
    num, num_exponents, _ = logs.shape
    coefficients, gradient = np.empty(num), np.empty(num_exponents)
    curvature = np.empty((num_exponents, num_exponents))
    pull = np.zeros((2, num_exponents)) if pull is None else pull
    objective = kernel.project(
        np.log(exponents), logs, np.any(logs != 0, axis=2), inverse, target,
        noise.inverse_scale, noise.run, noise.shrink, pull,
        coefficients, gradient, curvature, True,
    )  # fmt: skip
    return objective, coefficients, gradient, curvature


def test_gradient_of_the_projected_objective_is_exact():
    x, t, run = design()
    rng = np.random.default_rng(1)
    log_x, log_t = np.log(x / 100), np.log(t / 1000)
    noise = Noise(run, 0.7, rng.uniform(0.5, 2, len(x)))
    error = centred_law().error(x, t) * np.exp(0.05 * rng.normal(size=len(x)))
    target = noise.whiten(np.ones(len(x)))
    pull = np.array([[-1.0, 0.0, -1.0], [0.3, 0.0, 0.1]])
    for held, exponents in (
        (None, (0.5, 0.4, 0.3)),
        (None, (0.1, 1.5, 0.8)),
        (None, (2.0, 0.1, 0.2)),
        (0.4, (0.5, 0.3)),
    ):
        logs = law_logs(log_x, log_t, held)
        args = (logs, 1 / error, target, noise, pull[:, : logs.shape[1]])
        _, _, gradient, curvature = project(exponents, *args)
        numeric = approx_fprime(np.log(exponents), lambda u, args=args: project(np.exp(u), *args)[0] / 2, 1e-7)
        np.testing.assert_allclose(gradient, numeric, rtol=1e-4, atol=1e-6)
        assert np.linalg.eigvalsh(curvature).min() > -1e-12


def test_projected_objective_and_coefficients_equal_scipys_nnls():
    """Random exponents, offsets between runs, and terms of which one to three end at 0."""
    x, t, run = design()
    log_x, log_t = np.log(x / 100), np.log(t / 1000)
    rng = np.random.default_rng(2)
    patterns = set()
    for case in range(60):
        noise = Noise(run, float(rng.choice([0.0, 1.0, 10.0])), rng.uniform(0.5, 2, len(x)))
        law = centred_law(xi=0.03 * (case % 2), eps=0.15 * (case % 3 > 0), off=float(rng.choice([0.01, 1.0, 100.0])))
        error = law.error(x, t) * np.exp(0.1 * rng.normal(size=len(x)))
        exponents = np.exp(rng.uniform(np.log(0.05), np.log(2), 3))
        logs, target = law_logs(log_x, log_t), noise.whiten(np.ones(len(x)))
        objective, coefficients, _, _ = project(exponents, logs, 1 / error, target, noise)
        columns = noise.whiten((np.exp(np.einsum("jkn,k->jn", logs, exponents)) / error).T)
        expected, norm = nnls(columns, target)
        assert objective == pytest.approx(norm**2, rel=1e-9)
        np.testing.assert_allclose(columns @ coefficients, columns @ expected, atol=1e-7)
        patterns.add(tuple(coefficients > 0))
    assert len(patterns) >= 5


def test_log_residuals_are_stationary_not_those_of_the_first_pass():
    """The end is a minimum of the log objective: nudging any parameter raises it (relative-error weights would not)."""
    x, t, _ = design()
    error = centred_law().error(x, t) * np.exp(0.1 * np.random.default_rng(3).normal(size=len(x)))
    fit = fit_law(x, t, error)
    for name, value in fit.law.as_dict().items():
        for factor in (0.999, 1.001):
            nudged = Law(**(fit.law.as_dict() | {name: value * factor}))
            assert np.sum((np.log(error) - np.log(nudged.error(x, t))) ** 2) >= fit.objective * (1 - 1e-9)


def test_same_optimum_for_20_points_and_for_2000():
    """A mean-reduced loss stops earlier the more points there are."""
    law = centred_law(0.8, 0.5)
    x, t, _ = design(5, 4)
    error = law.error(x, t) * np.exp(0.01 * np.random.default_rng(4).normal(size=20))
    few, many = fit_law(x, t, error), fit_law(*(np.tile(v, 100) for v in (x, t, error)))
    assert many.objective == pytest.approx(100 * few.objective, rel=1e-6)
    assert many.law.exponent == pytest.approx(few.law.exponent, rel=1e-4)


def test_units_of_size_and_compute_do_not_matter():
    law = centred_law()
    x, t, _ = design()
    error = law.error(x, t) * np.exp(0.01 * np.random.default_rng(5).normal(size=len(x)))
    plain, scaled = fit_law(x, t, error), fit_law(x * 37, t * 1e-9, error)
    assert scaled.law.exponent == pytest.approx(plain.law.exponent, rel=1e-6)
    np.testing.assert_allclose(scaled.law.error(x * 37, t * 1e-9), plain.law.error(x, t), rtol=1e-7)


def test_degenerate_fits_are_flagged():
    x, t, _ = design()
    noise = np.exp(0.003 * np.random.default_rng(6).normal(size=len(x)))
    # Falling in x wherever it was measured: the optimum is far above the arm.
    above = fit_law(x, t, centred_law(1.0, 0.5, off=40.0).error(x, t) * noise)
    assert "optimum outside the data" in above.flags
    steep = fit_law(x, t, 0.2 + 1e-3 * (x / x.max()) ** -9 + 0.05 * (x / 100) ** 0.5 * (t / 1000) ** -0.4)
    assert "a at its upper bound" in steep.flags
    # Nothing falls with x: no gain from size.
    assert "alpha=0" in fit_law(x, t, 0.2 + 0.05 * (x / 100) ** 0.8 * (t / 1000) ** -0.4).flags
    assert "beta=0" in fit_law(x, t, 0.2 * (x / 100) ** -0.4 + 0.05 * (t / 1000) ** -0.4).flags


def test_a_floor_at_zero_and_one_at_the_smallest_error_are_flagged():
    x, t, _ = design(5, 8)
    convex = 0.3 * np.exp(-0.15 * np.log(t / 1000) + 0.02 * np.log(t / 1000) ** 2) + 0.02 * np.log(x / 100) ** 2
    falling = 0.3 * np.exp(-0.3 * np.log(t / 1000) - 0.05 * np.log(t / 1000) ** 2) + 0.02 * np.log(x / 100) ** 2
    assert "eps=0" in fit_law(x, t, falling).flags
    flat = fit_law(x, t, 0.3 + 1e-3 * (convex - convex.min()))
    assert "eps at the smallest error" in flat.flags


def test_whitening_is_the_inverse_covariance():
    rng = np.random.default_rng(7)
    run = rng.integers(0, 4, 15)
    run[:4] = range(4)
    scale, ratio = rng.uniform(0.5, 2, 15), 1.7
    noise = Noise(run, ratio, scale)
    covariance = np.diag(scale**2) + ratio**2 * (run[:, None] == run)
    whitener = noise.whiten(np.eye(15))
    np.testing.assert_allclose(whitener.T @ whitener, np.linalg.inv(covariance), atol=1e-12)
    assert noise.log_det() == pytest.approx(np.linalg.slogdet(covariance)[1])


def test_holding_the_exponent_costs_nothing_at_the_optimum_and_something_elsewhere():
    x, t, _ = design()
    error = centred_law().error(x, t) * np.exp(0.005 * np.random.default_rng(8).normal(size=len(x)))
    free = fit_law(x, t, error)
    held = fit_law(x, t, error, exponent=free.law.exponent)
    assert held.objective == pytest.approx(free.objective, rel=1e-6)
    for factor in (0.5, 2.0):
        held = fit_law(x, t, error, exponent=factor * free.law.exponent)
        assert held.law.exponent == pytest.approx(factor * free.law.exponent)
        assert held.objective > 1.01 * free.objective


def test_jacobian_of_the_log_law_equals_its_numeric_derivative():
    x, t, _ = design()
    law = centred_law()
    fit = fit_law(x, t, law.error(x, t) * np.exp(0.01 * np.random.default_rng(9).normal(size=len(x))))
    centre_x, centre_t = np.exp(np.log(x).mean()), np.exp(np.log(t).mean())
    p = fit.law
    normalised = [
        p.alpha * centre_x**-p.a,
        p.a,
        p.beta * centre_x**p.b * centre_t**-p.c,
        p.b,
        p.xi * centre_t**-p.c,
        p.c,
        p.eps,
    ]
    numeric = approx_fprime(normalised, lambda v: np.log(Law(*v).error(x / centre_x, t / centre_t)), 1e-7)
    np.testing.assert_allclose(fit.jacobian, numeric, rtol=1e-4, atol=1e-5)


def test_a_prior_pulls_by_its_weight_against_the_noise():
    """A prior much sharper than the data holds b where it says; one much wider changes nothing."""
    x, t, _ = design()
    error = centred_law().error(x, t) * np.exp(0.01 * np.random.default_rng(10).normal(size=len(x)))
    free = fit_law(x, t, error)
    sharp = fit_law(x, t, error, priors={"b": Prior(0.9, 1e-4)}, sigma=0.01)
    wide = fit_law(x, t, error, priors={"b": Prior(0.9, 1e3)}, sigma=0.01)
    assert sharp.law.b == pytest.approx(0.9, rel=1e-3)
    assert wide.law.exponent == pytest.approx(free.law.exponent, rel=1e-4)
    with pytest.raises(ValueError, match="among a, b, c"):
        fit_law(x, t, error, priors={"s": Prior(0.4, 0.1)}, sigma=0.01)


@pytest.mark.parametrize(
    ("x", "t", "error", "words"),
    [
        (np.ones(5), np.arange(1, 6), np.full(5, 0.5), "at least 8"),
        (np.ones(9), np.arange(1, 10), np.full(9, 0.5), "at least two values"),
        (np.arange(9), np.arange(1, 10), np.full(9, 0.5), "x holds 0.0"),
        (np.arange(1, 10), np.arange(1, 10), np.r_[0.0, np.full(8, 0.5)], "error holds 0.0"),
        (np.arange(1, 10), np.arange(1, 9), np.full(9, 0.5), "three equal vectors"),
    ],
)
def test_points_that_cannot_be_fitted_are_refused_in_words(x, t, error, words):
    with pytest.raises(ValueError, match=words):
        fit_law(x, t, error)
