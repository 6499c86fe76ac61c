"""The compiled arithmetic of a fit: non-negative sums of monomials by variable projection.

f_i = sum_j p_j exp(sum_k theta_k logs[j, k, i]),   p_j >= 0,   low_k <= theta_k <= high_k.

For given exponents theta the law is linear in p, so only theta is searched and p solved inside, by non-negative least
squares (Golub and Pereyra 1973; derivative of Kaufman 1975). Log residuals are reached by Gauss-Newton: each pass fits
the law linearised around the last one. The search runs over log theta. `sovit.analysis.varpro` is the way in; numba
takes half a second to import and compiles on first use, so only fits import this module.

Arrays are float64: logs (J, K, n); used (J, K), which of them are not all zero; log_error, inverse_scale (n,); run (n,) of
whole numbers; shrink (one a run), see `Noise`.
``pull`` (2, K): a quadratic penalty pull[1] (log theta - pull[0])^2 on each exponent, zeros for none.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

_jit = njit(cache=True, fastmath={"reassoc", "contract", "arcp", "nsz"}, error_model="numpy")

_PASSES, _STEPS = 40, 80


@_jit
def whiten(row, out, inverse_scale, run, shrink, sums):
    """out = W row, where W W^T is the inverse of diag(scale^2) + ratio^2 within a run."""
    n = row.size
    sums[:] = 0.0
    for i in range(n):
        out[i] = row[i] * inverse_scale[i]
    if not shrink.any():
        return
    for i in range(n):
        sums[run[i]] += out[i] * inverse_scale[i]
    for r in range(sums.size):
        sums[r] *= shrink[r]
    for i in range(n):
        out[i] -= inverse_scale[i] * sums[run[i]]


@_jit
def dot(left, right):
    total = 0.0
    for i in range(left.size):
        total += left[i] * right[i]
    return total


@_jit
def _orthogonalise(columns, rows, target, upper, along):
    """Modified Gram-Schmidt: ``rows`` become an orthonormal basis of ``columns``, the target's residual is left.

    columns = upper^T rows. A column that adds nothing to those before it gets a zero row. Returns nothing.
    """
    num, n = columns.shape
    for j in range(num):
        row = rows[j]
        row[:] = columns[j]
        length = math.sqrt(dot(row, row))
        for i in range(j):
            share = dot(rows[i], row)
            upper[i, j] = share
            for m in range(n):
                row[m] -= share * rows[i, m]
        left = math.sqrt(dot(row, row))
        if left <= 1e-13 * length or left == 0.0:
            upper[j, j] = 0.0
            row[:] = 0.0
        else:
            upper[j, j] = left
            for m in range(n):
                row[m] /= left
        share = dot(row, target)
        along[j] = share
        for m in range(n):
            target[m] -= share * row[m]


@_jit
def _solve(matrix, vector, size):
    """Gaussian elimination with pivoting, in place; the solution is left in ``vector``. False if singular."""
    for k in range(size):
        pivot = k
        for i in range(k + 1, size):
            if abs(matrix[i, k]) > abs(matrix[pivot, k]):
                pivot = i
        if matrix[pivot, k] == 0.0 or not math.isfinite(matrix[pivot, k]):
            return False
        if pivot != k:
            for j in range(size):
                matrix[k, j], matrix[pivot, j] = matrix[pivot, j], matrix[k, j]
            vector[k], vector[pivot] = vector[pivot], vector[k]
        for i in range(k + 1, size):
            factor = matrix[i, k] / matrix[k, k]
            for j in range(k, size):
                matrix[i, j] -= factor * matrix[k, j]
            vector[i] -= factor * vector[k]
    for k in range(size - 1, -1, -1):
        for j in range(k + 1, size):
            vector[k] -= matrix[k, j] * vector[j]
        vector[k] /= matrix[k, k]
    return True


@_jit
def _subset(upper, along, passive, solution):
    """Least squares of ``upper`` p = ``along`` over the passive entries, the others 0, through a small QR."""
    num = along.size
    chosen = 0
    basis = np.zeros((num, num))
    small = np.zeros((num, num))
    share = np.zeros(num)
    index = np.zeros(num, np.int64)
    solution[:] = 0.0
    for j in range(num):
        if not passive[j]:
            continue
        column = basis[chosen]
        length = 0.0
        for m in range(num):
            column[m] = upper[m, j] if m <= j else 0.0
            length += column[m] * column[m]
        for i in range(chosen):
            part = dot(basis[i], column)
            small[i, chosen] = part
            for m in range(num):
                column[m] -= part * basis[i, m]
        left = math.sqrt(dot(column, column))
        if left <= 1e-13 * math.sqrt(length) or left == 0.0:
            column[:] = 0.0
            passive[j] = False
            continue
        small[chosen, chosen] = left
        for m in range(num):
            column[m] /= left
        share[chosen] = dot(column, along)
        index[chosen] = j
        chosen += 1
    for k in range(chosen - 1, -1, -1):
        value = share[k]
        for m in range(k + 1, chosen):
            value -= small[k, m] * solution[index[m]]
        solution[index[k]] = value / small[k, k]


@_jit
def _nnls(upper, along, solution):
    """Lawson and Hanson's non-negative least squares of ``upper`` p = ``along`` (upper triangular, small)."""
    num = along.size
    passive = np.ones(num, np.bool_)
    trial = np.zeros(num)
    _subset(upper, along, passive, trial)
    least = 0.0
    for j in range(num):
        least = min(least, trial[j])
    if least >= 0.0:
        solution[:] = trial
        return
    solution[:] = 0.0
    passive[:] = False
    size = math.sqrt(dot(along, along))
    for _ in range(6 * num):
        best, entering = 0.0, -1
        for j in range(num):
            if passive[j]:
                continue
            slope, length = 0.0, 0.0
            for m in range(j + 1):
                value = along[m]
                for q in range(m, num):
                    value -= upper[m, q] * solution[q]
                slope += upper[m, j] * value
                length += upper[m, j] * upper[m, j]
            if length > 0.0 and slope / math.sqrt(length) > max(best, 1e-14 * size):
                best, entering = slope / math.sqrt(length), j
        if entering < 0:
            return
        passive[entering] = True
        while True:
            _subset(upper, along, passive, trial)
            reach, leaving = 1.0, -1
            for j in range(num):
                if passive[j] and trial[j] <= 0.0:
                    share = solution[j] / (solution[j] - trial[j]) if solution[j] > trial[j] else 0.0
                    if share < reach or leaving < 0:
                        reach, leaving = share, j
            if leaving < 0:
                solution[:] = trial
                break
            for j in range(num):
                solution[j] += reach * (trial[j] - solution[j])
            passive[leaving] = False
            solution[leaving] = 0.0
            if leaving == entering:  # rounding: the variable that came in would leave at once
                return


@_jit
def project(
    log_theta, logs, used, inverse, target, inverse_scale, run, shrink, pull, coefficients, gradient, curvature, moving
):
    """All the arithmetic of one step: the best coefficients at exp(log_theta), and how to move the exponents.

    Minimises |target - W diag(inverse) Phi p|^2 over p >= 0, Phi (n, J) the terms of the law and W the whitening.
    Returns the objective; fills ``coefficients`` (J,), ``gradient`` (K,) of half the objective by log theta, exact, and
    ``curvature`` (K, K) = J^T J with Kaufman's J, which leaves out a term that vanishes with the residual. Without
    ``moving`` these two are left as they are.
    """
    num, num_exponents, n = logs.shape
    columns = np.empty((num, n))
    basis = np.empty((num, n))
    raw = np.empty((num, n))
    sums = np.empty(shrink.size)
    upper = np.zeros((num, num))
    along = np.empty(num)
    residual = target.copy()
    power = np.empty(n)
    scratch = np.empty(n)
    for j in range(num):
        power[:] = 0.0
        for k in range(num_exponents):
            if used[j, k]:
                value = math.exp(log_theta[k])
                for i in range(n):
                    power[i] += value * logs[j, k, i]
        for i in range(n):
            raw[j, i] = math.exp(power[i]) * inverse[i]
        whiten(raw[j], columns[j], inverse_scale, run, shrink, sums)
    _orthogonalise(columns, basis, residual, upper, along)
    _nnls(upper, along, coefficients)
    num_active = 0
    for j in range(num):
        num_active += coefficients[j] > 0.0
    if num_active < num:
        kept = np.empty((num_active, n))
        m = 0
        for j in range(num):
            if coefficients[j] > 0.0:
                kept[m] = columns[j]
                m += 1
        basis = np.empty((num_active, n))
        upper = np.zeros((num_active, num_active))
        along = np.empty(num_active)
        residual[:] = target
        _orthogonalise(kept, basis, residual, upper, along)
    objective = dot(residual, residual)
    for k in range(num_exponents):
        objective += pull[1, k] * (log_theta[k] - pull[0, k]) ** 2
    if not moving:
        return objective
    moves = np.empty((num_exponents, n))
    for k in range(num_exponents):
        power[:] = 0.0
        value = math.exp(log_theta[k])
        for j in range(num):
            factor = value * coefficients[j]
            if used[j, k] and factor > 0.0:
                for i in range(n):
                    power[i] += factor * logs[j, k, i] * raw[j, i]
        whiten(power, scratch, inverse_scale, run, shrink, sums)
        gradient[k] = -dot(scratch, residual)
        for m in range(num_active):
            share = dot(basis[m], scratch)
            for i in range(n):
                scratch[i] -= share * basis[m, i]
        moves[k] = scratch
    for k in range(num_exponents):
        for q in range(k + 1):
            curvature[k, q] = dot(moves[k], moves[q])
            curvature[q, k] = curvature[k, q]
        gradient[k] += pull[1, k] * (log_theta[k] - pull[0, k])
        curvature[k, k] += pull[1, k]
    return objective


@_jit
def log_law(log_theta, logs, used, coefficients, out):
    """log f at each point."""
    num, num_exponents, n = logs.shape
    power = np.empty(n)
    out[:] = 0.0
    for j in range(num):
        if coefficients[j] > 0.0:
            power[:] = 0.0
            for k in range(num_exponents):
                if used[j, k]:
                    value = math.exp(log_theta[k])
                    for i in range(n):
                        power[i] += value * logs[j, k, i]
            for i in range(n):
                out[i] += coefficients[j] * math.exp(power[i])
    for i in range(n):
        out[i] = math.log(out[i])


@_jit
def log_objective(log_theta, log_error, log_fit, inverse_scale, run, shrink, pull):
    """Sum of squares of the whitened log residuals, plus the pull."""
    row = log_error - log_fit
    out = np.empty(row.size)
    whiten(row, out, inverse_scale, run, shrink, np.empty(shrink.size))
    total = dot(out, out)
    for k in range(log_theta.size):
        total += pull[1, k] * (log_theta[k] - pull[0, k]) ** 2
    return total


@_jit
def descend(log_theta, coefficients, logs, used, log_error, log_fit, inverse_scale, run, shrink, pull, low, high):
    """Levenberg-Marquardt in the box, linearised around ``log_fit``; moves log_theta and fills the coefficients.

    ``missing`` learns, by symmetric rank-one updates, what Kaufman's curvature leaves out (as NL2SOL does, Dennis, Gay
    and Welsch 1981); without it steps overshoot to and fro along the valley when runs have large offsets.
    """
    num, num_exponents, n = logs.shape
    inverse = np.exp(-log_fit)
    target = np.empty(n)
    whiten(1.0 + log_error - log_fit, target, inverse_scale, run, shrink, np.empty(shrink.size))
    gradient, trial_gradient = np.empty(num_exponents), np.empty(num_exponents)
    curvature, trial_curvature = np.empty((num_exponents, num_exponents)), np.empty((num_exponents, num_exponents))
    trial_coefficients = np.empty(num)
    missing = np.zeros((num_exponents, num_exponents))
    lifted = np.empty((num_exponents, num_exponents))
    step, trial, surprise = np.empty(num_exponents), np.empty(num_exponents), np.empty(num_exponents)
    free = np.empty(num_exponents, np.int64)
    objective = project(
        log_theta, logs, used, inverse, target, inverse_scale, run, shrink, pull, coefficients, gradient, curvature,
        True,
    )  # fmt: skip
    damping = 1e-4
    for _ in range(_STEPS):
        num_free = 0
        trace, steep = 0.0, False
        for k in range(num_exponents):
            trace += curvature[k, k]
            at_low = log_theta[k] <= low[k] and gradient[k] > 0
            at_high = log_theta[k] >= high[k] and gradient[k] < 0
            if not at_low and not at_high:
                free[num_free] = k
                num_free += 1
                steep = steep or gradient[k] != 0.0
        if not steep:
            break
        downhill = False
        for attempt in range(2):
            step[:] = 0.0
            for u in range(num_free):
                k = free[u]
                for v in range(num_free):
                    q = free[v]
                    lifted[u, v] = curvature[k, q] + (missing[k, q] if attempt == 0 else 0.0)
                lifted[u, u] += damping * max(curvature[k, k], 1e-12 * trace + 1e-300)
                surprise[u] = -gradient[k]
            if _solve(lifted, surprise, num_free):
                for u in range(num_free):
                    step[free[u]] = surprise[u]
                if dot(step, gradient) <= 0.0:
                    downhill = True
                    break
            missing[:] = 0.0
        if not downhill:
            damping *= 10
            if damping > 1e6:
                break
            continue
        for k in range(num_exponents):
            trial[k] = min(max(log_theta[k] + min(max(step[k], -1.0), 1.0), low[k]), high[k])
        trial_objective = project(
            trial, logs, used, inverse, target, inverse_scale, run, shrink, pull,
            trial_coefficients, trial_gradient, trial_curvature, True,
        )  # fmt: skip
        gain = objective - trial_objective
        if not gain > 0:
            missing[:] = 0.0
            damping *= 10
            if damping > 1e6 or gain > -1e-13 * objective:
                break
            continue
        far, along, size, length = 0.0, 0.0, 0.0, 0.0
        for k in range(num_exponents):
            moved = trial[k] - log_theta[k]
            far = max(far, abs(moved))
            surprise[k] = trial_gradient[k] - gradient[k]
            for q in range(num_exponents):
                surprise[k] -= (trial_curvature[k, q] + missing[k, q]) * (trial[q] - log_theta[q])
            along += surprise[k] * moved
            size += surprise[k] ** 2
            length += moved * moved
        if far > 0.3:
            missing[:] = 0.0  # learnt from afar, it misleads
        elif abs(along) > 1e-6 * math.sqrt(size * length):
            for k in range(num_exponents):
                for q in range(num_exponents):
                    missing[k, q] += surprise[k] * surprise[q] / along
        done = gain < 1e-8 * objective and damping < 1e-2
        objective = trial_objective
        log_theta[:] = trial
        coefficients[:] = trial_coefficients
        gradient[:] = trial_gradient
        curvature[:] = trial_curvature
        damping = max(damping / 10, 1e-10)
        if done or objective < 1e-28 * n:
            break
    return objective


@_jit
def polish(log_theta, coefficients, logs, used, log_error, log_fit, inverse_scale, run, shrink, pull, low, high):
    """Gauss-Newton passes from a law until the log objective stands still; moves its arguments, returns the objective."""
    log_law(log_theta, logs, used, coefficients, log_fit)
    best = log_objective(log_theta, log_error, log_fit, inverse_scale, run, shrink, pull)
    trial, trial_coefficients, trial_fit = log_theta.copy(), coefficients.copy(), log_fit.copy()
    for _ in range(_PASSES):
        descend(
            trial, trial_coefficients, logs, used, log_error, trial_fit, inverse_scale, run, shrink, pull, low, high
        )
        log_law(trial, logs, used, trial_coefficients, trial_fit)
        objective = log_objective(trial, log_error, trial_fit, inverse_scale, run, shrink, pull)
        if not objective < best:
            break
        settled = objective >= best * (1 - 1e-9)
        best = objective
        log_theta[:] = trial
        coefficients[:] = trial_coefficients
        log_fit[:] = trial_fit
        if settled:
            break
    return best


@_jit
def fit_many(grid, group, starts, logs, used, log_errors, inverse_scale, run, shrink, pull, low, high):
    """Fit each of ``log_errors`` (R, n): objectives (R, S), log exponents (R, K) and coefficients (R, J) of the best.

    With a ``grid`` (G, K) of log exponents the starts are cold: for each value of ``group`` (G,), 0 to S - 1, the grid
    point of least projected objective on relative errors. A cold start first descends on relative errors; if it
    arrives where an earlier one did, the passes that follow would repeat that one's, and its end is taken. Without a
    grid (G = 0) the starts are ``starts`` (S, K), for every data set the same.
    """
    num, num_exponents, n = logs.shape
    cold = grid.shape[0] > 0
    num_starts = group.max() + 1 if cold else starts.shape[0]
    num_sets = log_errors.shape[0]
    objectives = np.empty((num_sets, num_starts))
    best_theta, best_coefficients = np.empty((num_sets, num_exponents)), np.empty((num_sets, num))
    thetas, coefficients = np.empty((num_starts, num_exponents)), np.zeros((num_starts, num))
    met = np.empty((num_starts, num_exponents))
    least = np.empty(num_starts)
    gradient, curvature = np.empty(num_exponents), np.empty((num_exponents, num_exponents))
    log_fit, target, trial = np.empty(n), np.empty(n), np.empty(num)
    whiten(np.ones(n), target, inverse_scale, run, shrink, np.empty(shrink.size))
    for r in range(num_sets):
        log_error = log_errors[r]
        inverse = np.exp(-log_error)
        least[:] = np.inf
        if not cold:
            thetas[:] = starts
        for g in range(grid.shape[0] if cold else num_starts):
            theta = grid[g] if cold else thetas[g]
            value = project(
                theta, logs, used, inverse, target, inverse_scale, run, shrink, pull, trial, gradient, curvature, False
            )
            s = group[g] if cold else g
            if value < least[s] or not cold:
                least[s] = value
                thetas[s] = theta
                coefficients[s] = trial
        for s in range(num_starts):
            earlier = -1
            if cold:
                descend(
                    thetas[s], coefficients[s], logs, used, log_error, log_error,
                    inverse_scale, run, shrink, pull, low, high,
                )  # fmt: skip
                met[s] = thetas[s]
                for q in range(s):
                    if np.abs(met[q] - met[s]).max() < 1e-3:
                        earlier = q
            if earlier >= 0:
                objectives[r, s] = objectives[r, earlier]
                thetas[s] = thetas[earlier]
                coefficients[s] = coefficients[earlier]
            else:
                objectives[r, s] = polish(
                    thetas[s], coefficients[s], logs, used, log_error, log_fit,
                    inverse_scale, run, shrink, pull, low, high,
                )  # fmt: skip
        best = 0
        for s in range(num_starts):
            if objectives[r, s] < objectives[r, best] or not math.isfinite(objectives[r, best]):
                best = s
        best_theta[r] = thetas[best]
        best_coefficients[r] = coefficients[best]
    return objectives, best_theta, best_coefficients


@_jit
def log_det_information(jacobian, inverse_scale, run, shrink):
    """log det of J^T V^-1 J for a Jacobian given as (parameters, n), directions without information left out."""
    num, n = jacobian.shape
    columns, basis = np.empty((num, n)), np.empty((num, n))
    sums = np.empty(shrink.size)
    total = 0.0
    for j in range(num):
        whiten(jacobian[j], columns[j], inverse_scale, run, shrink, sums)
    for j in range(num):
        row = basis[j]
        row[:] = columns[j]
        length = math.sqrt(dot(row, row))
        for _ in range(2):
            for i in range(j):
                share = dot(basis[i], row)
                for m in range(n):
                    row[m] -= share * basis[i, m]
        left = math.sqrt(dot(row, row))
        if left <= 1e-10 * length or left == 0.0:
            row[:] = 0.0
            continue
        total += 2 * math.log(left)
        for m in range(n):
            row[m] /= left
    return total
