"""The few-shot ridge evaluator against independent solves, refits and simulation."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge as SklearnRidge

from sovit import fewshot
from sovit.fewshot import LOO_GRID, FewshotRow, fewshot_errors, fit_ridge, summarise, support_indices


def clusters(num_classes=6, per_class=20, width=9, noise=1.0, seed=0):
    """Features around a random centre for each class, class labels in order, and more of both for a test set."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(num_classes, width))
    labels = np.repeat(np.arange(num_classes), per_class)
    # A constant feature too, as dead units give: its standard deviation is zero.
    features, test = (
        np.column_stack([centres[labels] + noise * rng.normal(size=(len(labels), width)), np.full(len(labels), 3.0)])
        for _ in range(2)
    )
    return torch.from_numpy(features), labels, torch.from_numpy(test), labels


def augmented(features, labels, num_classes):
    """The regression problem in numpy, from the words of the papers: design matrix and targets."""
    x = features.numpy()
    x = (x - x.mean(0)) / (np.sqrt(np.mean((x - x.mean(0)) ** 2, 0)) + 1e-5)
    return np.column_stack([x, np.full(len(x), 100.0)]), 2 * np.eye(num_classes)[labels] - 1


@pytest.mark.parametrize("per_class", [1, 20], ids=["dual", "primal"])
@pytest.mark.parametrize("l2", [0.01, 1024.0])
def test_solution_equals_a_dense_solve_and_sklearn(per_class, l2):
    """One image a class (N=6 < D+1=11) takes the dual, twenty the primal: both equal solve() on the normal equations."""
    features, labels, *_ = clusters(per_class=per_class)
    x, y = augmented(features, labels, 6)
    weights = fit_ridge(features, labels, 6, l2).weights[0].numpy()
    np.testing.assert_allclose(weights, np.linalg.solve(x.T @ x + l2 * np.eye(11), x.T @ y), rtol=1e-7, atol=1e-10)
    sklearn = SklearnRidge(alpha=l2, fit_intercept=False, solver="svd").fit(x, y)
    np.testing.assert_allclose(weights, sklearn.coef_.T, rtol=1e-7, atol=1e-10)


def test_switch_from_dual_to_primal_counts_the_bias_column(monkeypatch):
    """D + 1 = 11 columns: 10 images decompose a 10x10 matrix, 11 and 12 images an 11x11 one."""
    sizes = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: sizes.append(len(matrix)) or eigh(matrix))
    features, labels, *_ = clusters(num_classes=1, per_class=12)
    for num in (10, 11, 12):
        fit_ridge(features[:num], labels[:num], 1, 1.0)
    assert sizes == [10, 11, 11]


@pytest.mark.parametrize("per_class", [1, 20], ids=["dual", "primal"])
def test_one_eigendecomposition_serves_every_l2(monkeypatch, per_class):
    features, labels, test, _ = clusters(per_class=per_class)
    apart = [fit_ridge(features, labels, 6, l2) for l2 in LOO_GRID]
    calls = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: calls.append(1) or eigh(matrix))
    together = fit_ridge(features, labels, 6, LOO_GRID)
    assert len(calls) == 1
    fit_ridge(features, labels, 6, "loo")
    assert len(calls) == 2
    assert together.l2_reg == LOO_GRID
    predictions = together.predict(test)
    for i, alone in enumerate(apart):
        torch.testing.assert_close(together.weights[i], alone.weights[0])
        assert torch.equal(predictions[i], alone.predict(test)[0])


def test_prediction_standardises_the_test_set_by_the_support():
    """Against the score written out; the test features are shifted, so their own statistics would answer otherwise."""
    features, labels, test, _ = clusters(noise=2.0)
    test = test * 3 + 1
    ridge = fit_ridge(features, labels, 6, 5.0)
    x = features.numpy()
    z = (test.numpy() - x.mean(0)) / (x.std(0) + 1e-5)
    scores = np.column_stack([z, np.full(len(z), 100.0)]) @ ridge.weights[0].numpy()
    assert np.array_equal(ridge.predict(test)[0].numpy(), scores.argmax(1))


def test_float32_agrees_with_float64_at_the_published_l2():
    features, labels, test, _ = clusters()
    single, double = (fit_ridge(features, labels, 6, 1024.0, dtype) for dtype in (torch.float32, torch.float64))
    assert single.weights.dtype == torch.float32
    torch.testing.assert_close(single.weights.double(), double.weights, rtol=1e-3, atol=1e-5)
    assert torch.equal(single.predict(test), double.predict(test))


def leave_one_out_errors(features, labels, num_classes):
    """Refits without one image at a time, for every l2; standardised once, by all images."""
    x, y = augmented(features, labels, num_classes)
    errors = []
    for l2 in LOO_GRID:
        error = 0.0
        for i in range(len(x)):
            xi, yi = np.delete(x, i, 0), np.delete(y, i, 0)
            w = np.linalg.solve(xi.T @ xi + l2 * np.eye(x.shape[1]), xi.T @ yi)
            error += np.sum((y[i] - x[i] @ w) ** 2)
        errors.append(error)
    return errors


@pytest.mark.parametrize("noise", [0.05, 1.0, 4.0])
@pytest.mark.parametrize("per_class", [1, 5, 12])
def test_leave_one_out_is_that_of_refits(per_class, noise):
    """The chosen l2 is the one 30 x N refits choose, primal (N=30, 72) and dual (N=6), early and late in the grid."""
    features, labels, *_ = clusters(per_class=per_class, noise=noise, width=8)
    errors = leave_one_out_errors(features, labels, 6)
    assert fit_ridge(features, labels, 6, "loo").l2_reg == (LOO_GRID[int(np.argmin(errors))],)


def test_leave_one_out_takes_the_larger_of_equal_l2(monkeypatch):
    """Targets that are all equal and no eigenvalue but zero leave the same residual whatever l2."""
    z, right, eigenvalues = torch.ones(3, 1).double(), torch.zeros(1, 2).double(), torch.zeros(1).double()
    monkeypatch.setattr(fewshot, "LOO_GRID", tuple(2.0**k for k in range(30, 40)))  # H_ii = 1 / l2 rounds to nothing
    targets = torch.ones(3, 2, dtype=torch.float64) * 1e-160  # squares underflow to exactly zero
    assert fewshot._leave_one_out(z, right, eigenvalues, targets) == 2.0**39


def test_noisier_features_are_given_a_larger_l2():
    chosen = [fit_ridge(*clusters(per_class=5, noise=noise)[:2], 6, "loo").l2_reg[0] for noise in (0.05, 1.0, 8.0)]
    assert chosen == sorted(chosen)
    assert chosen[0] < chosen[-1]


def test_supports_are_nested_balanced_and_drawn_as_published():
    """One generator per draw, permuting class after class: written out once more here."""
    labels = np.random.default_rng(5).permutation(np.repeat(np.arange(4), [30, 12, 25, 3]))
    rng = np.random.default_rng(2)
    expected = [rng.permutation(np.where(labels == c)[0]) for c in range(4)]
    large, small = support_indices(labels, 4, 25, draw=2), support_indices(labels, 4, 5, draw=2)
    for c in range(4):
        assert np.array_equal(large[c], expected[c][:25])
        assert np.array_equal(small[c], large[c][:5])
    assert [len(positions) for positions in large] == [25, 12, 25, 3]
    assert not np.array_equal(small[0], support_indices(labels, 4, 5, draw=1)[0])


def test_scores_on_one_draw_are_those_of_its_support():
    """fewshot_errors end to end against numpy, with two classes short of images."""
    features, labels, test, test_labels = clusters(noise=2.0)
    keep = np.delete(np.arange(120), np.r_[3:20, 25:40])  # class 0 has 3 images left, class 1 has 5
    features, labels = features[keep], labels[keep]
    rows = fewshot_errors(features, labels, test, test_labels, 6, shots=(4, 1), num_draws=2, l2=8.0)
    assert [(row.shots, row.draw) for row in rows] == [(4, 0), (1, 0), (4, 1), (1, 1)]
    for row in rows:
        rng = np.random.default_rng(row.draw)
        chosen = np.concatenate([rng.permutation(np.where(labels == c)[0])[: row.shots] for c in range(6)])
        x, y = augmented(features[chosen], labels[chosen], 6)
        w = np.linalg.solve(x.T @ x + 8.0 * np.eye(11), x.T @ y)
        own = features[chosen].numpy()
        z = np.column_stack([(test.numpy() - own.mean(0)) / (own.std(0) + 1e-5), np.full(120, 100.0)])
        error = np.mean((z @ w).argmax(1) != test_labels)
        assert row.error == pytest.approx(error, abs=1e-12)
        assert row.stderr == pytest.approx(math.sqrt(error * (1 - error) / 120))
        assert row.l2_reg == 8.0
    assert rows == fewshot_errors(features, labels, test, test_labels, 6, shots=(4, 1), num_draws=2, l2=8.0)


@pytest.mark.parametrize("l2", [1024.0, "loo"])
def test_renaming_classes_does_not_change_the_fit(l2):
    """The same support under permuted class numbers gives the same predictions, renamed."""
    features, labels, test, _ = clusters(noise=2.0)
    names = np.random.default_rng(1).permutation(6)
    plain, renamed = fit_ridge(features, labels, 6, l2), fit_ridge(features, names[labels], 6, l2)
    assert renamed.l2_reg == plain.l2_reg
    assert np.array_equal(renamed.predict(test)[0].numpy(), names[plain.predict(test)[0].numpy()])


def test_random_features_give_chance_and_separable_ones_no_error():
    rng = np.random.default_rng(0)
    train, test = (torch.from_numpy(rng.normal(size=(n, 12))) for n in (400, 4000))
    labels, test_labels = np.arange(400) % 8, np.arange(4000) % 8
    for row in fewshot_errors(train, labels, test, test_labels, 8):
        assert row.error == pytest.approx(7 / 8, abs=4 * row.stderr)
    features, labels, test, test_labels = clusters(noise=0.01)
    for shots, l2 in (((1, 5, 10), 1.0), ((5, 10), "loo")):  # at one shot leave-one-out never sees the class
        rows = fewshot_errors(features, labels, test, test_labels, 6, shots=shots, num_draws=2, l2=l2)
        assert {(row.error, row.stderr) for row in rows} == {(0.0, 0.0)}


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
def test_labels_of_any_integer_type_and_features_of_any_precision(dtype):
    """Labels of 0 and 1 in uint8 must not act as a mask."""
    features, labels, test, test_labels = clusters(num_classes=2, noise=3.0)
    wanted = fewshot_errors(features.float(), labels, test.float(), test_labels, 2)
    features, test = features.float(), test.float()
    assert wanted == fewshot_errors(features, labels.astype(dtype), test, test_labels.astype(dtype), 2)


def test_summary_of_rows_worked_by_hand():
    """Errors .1, .2, .3 with stderr .03: s^2 = .01, so sqrt(.01 / 3 + .0009); one draw keeps its own stderr."""
    rows = [FewshotRow(10, k, 1.0, e, 0.03) for k, e in enumerate((0.1, 0.2, 0.3))] + [FewshotRow(1, 0, 1.0, 0.5, 0.04)]
    ten, one = summarise(rows)
    assert (ten.shots, ten.num_draws, ten.error) == (10, 3, pytest.approx(0.2))
    assert ten.stderr == pytest.approx(math.sqrt(0.01 / 3 + 0.0009))
    assert (one.shots, one.num_draws, one.error, one.stderr) == (1, 1, 0.5, pytest.approx(0.04))


def test_summary_stderr_covers_both_lucks_and_is_conservative():
    """2000 simulated evaluations, images of unequal difficulty seen by 3 draws of unequal quality: the mean of
    stderr^2 lies between the true variance of the mean error and that plus one unshared binomial term."""
    rng = np.random.default_rng(0)
    num_test, means, claimed, unshared = 200, [], [], []
    for _ in range(2000):
        difficulty, quality = rng.normal(size=num_test), 0.2 * rng.normal(size=(3, 1))
        probability = 1 / (1 + np.exp(-2 * difficulty - quality))
        errors = (rng.random((3, num_test)) < probability).mean(1)
        rows = [FewshotRow(5, k, 1.0, e, math.sqrt(e * (1 - e) / num_test)) for k, e in enumerate(errors)]
        (summary,) = summarise(rows)
        means.append(summary.error)
        claimed.append(summary.stderr**2)
        unshared.append(np.mean(probability * (1 - probability)) / num_test)
    truth = np.var(means, ddof=1)  # its own relative standard error is sqrt(2 / 1999) = 3%
    assert 0.95 * truth < np.mean(claimed) < 1.1 * (truth + np.mean(unshared))


def test_draws_of_two_data_sets_are_not_averaged():
    with pytest.raises(ValueError, match="Draw 0 of 5 shots occurs twice"):
        summarise([FewshotRow(5, 0, 1.0, 0.1, 0.01), FewshotRow(5, 0, 2.0, 0.2, 0.01)])


def test_class_without_images_is_named():
    with pytest.raises(ValueError, match="Class 2 of 4 has no image"):
        support_indices(np.array([0, 1, 3, 3]), 4, 1, 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"l2": 0.0}, "l2=0.0 is not positive"),
        ({"l2": float("nan")}, "l2=nan is not positive"),
        ({"shots": (1, 0)}, "at least 1"),
        ({"num_draws": 0}, "num_draws=0"),
        ({"num_classes": 5}, "Labels from 0 to 5 do not fit 5 classes"),
        ({"train_labels": np.zeros(120)}, "float64 are not a vector of whole numbers"),
        ({"test_features": torch.zeros(7, 10)}, r"\(7, 10\) do not match 120 labels"),
        ({"train_features": torch.full((120, 10), math.nan)}, "NaN or infinite"),
        ({"test_features": torch.full((120, 10), math.inf)}, "NaN or infinite"),
        ({"test_features": torch.zeros(0, 10), "test_labels": np.zeros(0, int)}, "test set is empty"),
    ],
)
def test_bad_input_is_named(change, words):
    features, labels, test, test_labels = clusters()
    arguments = {
        "train_features": features,
        "train_labels": labels,
        "test_features": test,
        "test_labels": test_labels,
        "num_classes": 6,
    }
    with pytest.raises(ValueError, match=words):
        fewshot_errors(**(arguments | change))
