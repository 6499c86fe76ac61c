"""Every figure of the downstream tasks against another implementation, or a case worked by hand."""

import itertools

import numpy as np
import pytest
import sklearn.metrics
import torch
import torchmetrics.functional.classification as tm
from scipy.optimize import minimize

from sovit.downstream.metrics import accuracy, calibration, detection, parity
from sovit.downstream.metrics.proportion import bootstrap, bootstrap_many, share

RNG = np.random.default_rng(0)
LOGITS = 3 * RNG.standard_normal((400, 5))
LABELS = np.where(RNG.random(400) < 0.4, RNG.integers(5, size=400), LOGITS.argmax(1))


def test_a_share_has_wilsons_interval() -> None:
    found = share([1] * 7 + [0] * 3)
    # Wilson 1927 at z = 1.959964: (0.7 + z^2/20 +- z sqrt(0.021 + z^2/400)) / (1 + z^2/10)
    assert (found["value"], found["n"]) == (0.7, 10)
    assert (found["lo"], found["hi"]) == pytest.approx((0.3967781, 0.8922087), abs=1e-6)


def test_the_bootstrap_of_a_mean_is_its_standard_error() -> None:
    values = RNG.random(400)
    half = 1.96 * values.std() / 20
    lo, hi = bootstrap(np.mean, values, num=4000)
    assert (lo, hi) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.004)
    [(lo2, hi2)] = bootstrap_many(lambda rows: [values[rows].mean()], 400, num=4000)
    assert (lo2, hi2) == pytest.approx((lo, hi), abs=0.004)


def test_the_interval_of_a_gap_holds_the_gap_and_stays_above_0() -> None:
    """Resamples of a gap near 0 are larger than the gap, so its percentile interval would lie beside it."""
    values = RNG.standard_normal((400, 8))
    [(lo, hi)] = bootstrap_many(lambda rows: [np.abs(values[rows].mean(0)).sum()], 400)
    assert 0 <= lo < np.abs(values.mean(0)).sum() < hi
    assert bootstrap(lambda x: float(x.max()), np.ones(9)) == (1.0, 1.0)


@pytest.mark.parametrize("bins", [2, 10, 15])
def test_ece_is_torchmetrics(bins: int) -> None:
    probability = calibration.probabilities(LOGITS)
    right = probability.argmax(1) == LABELS
    other = tm.multiclass_calibration_error(torch.tensor(probability), torch.tensor(LABELS), 5, n_bins=bins, norm="l1")
    assert calibration.ece(probability.max(1), right, bins) == pytest.approx(other.item(), abs=1e-6)


def test_ece_of_equal_mass_by_hand() -> None:
    confidence = np.array([0.9, 0.6, 0.7, 0.8])
    right = np.array([True, False, True, False])
    # halves {0.6, 0.7}: 1/2 right, 0.65 claimed; {0.8, 0.9}: 1/2 right, 0.85 claimed
    assert calibration.ece(confidence, right, 2, mass=True) == pytest.approx((0.15 + 0.35) / 2)
    assert calibration.ece(confidence, right, 2) == pytest.approx(0.25)  # all in the upper bin: 0.75 claimed, 0.5 right
    assert np.bincount(calibration.bin_of(RNG.random(103), 10, mass=True)).tolist() in [
        list(c) for c in set(itertools.permutations([10] * 7 + [11] * 3))
    ]


def test_a_confidence_on_an_edge_belongs_to_the_lower_bin() -> None:
    assert calibration.bin_of(np.array([0.0, 0.1, 0.1000001, 0.5, 1.0]), 10).tolist() == [0, 0, 1, 4, 9]


def test_the_reliability_table_adds_up_to_the_ece() -> None:
    probability = calibration.probabilities(LOGITS).max(1)
    right = LOGITS.argmax(1) == LABELS
    rows = calibration.reliability(probability, right, 15)
    assert sum(row["n"] for row in rows) == 400
    assert all(row["from"] < row["confidence"] <= row["to"] and row["lo"] <= row["right"] <= row["hi"] for row in rows)
    gap = sum(row["n"] * abs(row["right"] - row["confidence"]) for row in rows) / 400
    assert gap == pytest.approx(calibration.ece(probability, right, 15))


def test_log_loss_and_brier_score_are_those_of_scikit_learn() -> None:
    probability = calibration.probabilities(LOGITS, 2.0)
    assert calibration.nll(LOGITS, LABELS, 2.0) == pytest.approx(sklearn.metrics.log_loss(LABELS, probability))
    other = sklearn.metrics.brier_score_loss(LABELS, probability, labels=range(5), scale_by_half=False)
    assert calibration.brier(probability, LABELS) == pytest.approx(other)


def test_the_temperature_is_the_one_another_search_finds_and_undoes_a_known_one() -> None:
    sure = np.random.default_rng(1)
    logits = sure.standard_normal((20_000, 4))
    labels = np.array([sure.choice(4, p=p) for p in calibration.probabilities(logits)])
    assert calibration.fit_temperature(3 * logits, labels) == pytest.approx(3, rel=0.05)
    found = calibration.fit_temperature(LOGITS, LABELS)
    other = minimize(
        lambda t: calibration.nll(LOGITS, LABELS, t[0]), [1.0], method="Nelder-Mead", options={"xatol": 1e-9}
    )
    assert found == pytest.approx(other.x[0], rel=1e-5)


SCORES = [
    (RNG.standard_normal(200) + 0.7, RNG.standard_normal(300)),
    (RNG.integers(6, size=120) + 1.0, RNG.integers(6, size=80) * 1.0),  # mostly ties
]


@pytest.mark.parametrize(("inside", "outside"), SCORES)
def test_detection_is_that_of_scikit_learn_with_ties_too(inside: np.ndarray, outside: np.ndarray) -> None:
    truth = np.r_[np.ones(len(inside)), np.zeros(len(outside))]
    scores = np.r_[inside, outside]
    assert detection.auroc(inside, outside) == pytest.approx(sklearn.metrics.roc_auc_score(truth, scores))
    other = sklearn.metrics.average_precision_score(truth, scores)
    assert detection.average_precision(inside, outside) == pytest.approx(other)
    fpr, tpr, _ = sklearn.metrics.roc_curve(truth, scores, drop_intermediate=False)
    assert detection.fpr_at_tpr(inside, outside) == pytest.approx(fpr[tpr >= 0.95].min())


def test_fpr_at_95_percent_lets_exactly_19_of_20_in() -> None:
    assert detection.fpr_at_tpr(np.arange(20.0), np.array([0.0, 0.5, 1.0, 7.0])) == 0.5  # the threshold is 1


def test_mahalanobis_is_the_distance_to_the_nearest_mean() -> None:
    from scipy.spatial.distance import mahalanobis

    features, labels = RNG.standard_normal((60, 3)) * [1, 2, 5], np.arange(60) % 3
    mean, precision = detection.class_gaussians(features, labels, 3)
    found = detection.mahalanobis(mean, precision, features)
    by_hand = [-min(mahalanobis(x, m, precision) ** 2 for m in mean) for x in features]
    assert found == pytest.approx(by_hand)
    assert np.diag(precision)[0] > 3 * np.diag(precision)[2]  # the wide direction counts least


def test_any_of_the_right_classes_counts_and_only_allowed_ones_are_chosen() -> None:
    logits = np.array([[3.0, 2, 1, 0], [0, 1, 2, 3], [3, 0, 1, 2]])
    right = np.array([[0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 0]], bool)
    assert accuracy.hits(logits, right).tolist() == [False, True, False]
    assert accuracy.hits(logits, right, 2).tolist() == [True, True, False]
    allowed = np.array([False, True, True, False])
    assert accuracy.hits(logits, right, 1, allowed).tolist() == [True, True, True]
    assert accuracy.chance(right, 1, np.ones(4, bool)) == pytest.approx((1 / 4 + 2 / 4 + 1 / 4) / 3)
    # two of four at once: 1 right class is among them in 3 of 6 pairs, one of two in 5 of 6
    assert accuracy.chance(right, 2, np.ones(4, bool)) == pytest.approx((3 / 6 + 5 / 6 + 3 / 6) / 3)


def test_top_k_is_that_of_scikit_learn() -> None:
    right = np.eye(5, dtype=bool)[LABELS]
    for k in (1, 2, 4):
        other = sklearn.metrics.top_k_accuracy_score(LABELS, LOGITS, k=k, labels=range(5))
        assert accuracy.hits(LOGITS, right, k).mean() == pytest.approx(other)


def test_mean_corruption_error_divides_kind_by_kind() -> None:
    assert accuracy.mean_corruption_error([[0.1, 0.3], [0.2, 0.2]], [[0.4, 0.4], [0.1, 0.1]]) == pytest.approx(
        (0.5 + 2.0) / 2
    )


TRUTH, GROUP = RNG.random(3000) < 0.45, (RNG.random(3000) < 0.4).astype(np.int64)
TRUTH = np.where(GROUP == 1, RNG.random(3000) < 0.65, TRUTH)
SCORE = 1 / (1 + np.exp(-(2 * TRUTH - 1 + 0.8 * RNG.standard_normal(3000))))


def test_parity_and_odds_are_those_of_torchmetrics() -> None:
    yes = SCORE > 0.5
    rates = tm.binary_groups_stat_rates(torch.tensor(yes).int(), torch.tensor(TRUTH).int(), torch.tensor(GROUP), 2)
    tp, fp, tn, fn = np.array([rates[f"group_{g}"].numpy() for g in (0, 1)]).T
    assert parity.parity_gap(yes * 1.0, GROUP) == pytest.approx(abs(np.diff(tp + fp)[0]), abs=1e-6)
    gaps = [abs(np.diff(tp / (tp + fn))[0]), abs(np.diff(fp / (fp + tn))[0])]
    assert parity.odds_gap(yes * 1.0, TRUTH, GROUP) == pytest.approx(max(gaps), abs=1e-6)


def test_the_fair_rule_keeps_its_level_and_beats_every_pair_of_thresholds_that_does() -> None:
    """Against brute force over one threshold a group, without chance; the rule may draw, so it is at least as good."""
    edges = parity.score_edges(SCORE, 20)
    bins, num = parity.bins_of(SCORE, edges), len(edges) + 1
    for level in (0.0, 0.03, 0.1, 1.0):
        rule = parity.fair_rule(bins, TRUTH, GROUP, num, level)
        yes = rule[GROUP, bins]
        assert (np.diff(rule, axis=1) >= -1e-9).all()
        assert parity.parity_gap(yes, GROUP) <= level + 1e-9
        best = 0.0
        for a, b in itertools.product(range(num + 1), repeat=2):
            hard = (bins >= np.where(GROUP == 0, a, b)) * 1.0
            if parity.parity_gap(hard, GROUP) <= level:
                best = max(best, parity.expected_accuracy(hard, TRUTH))
        assert parity.expected_accuracy(yes, TRUTH) >= best - 1e-9
        if level == 1.0:  # no constraint: the best thresholds themselves
            assert parity.expected_accuracy(yes, TRUTH) == pytest.approx(best)


def test_a_rule_for_no_share_is_one_sentence() -> None:
    with pytest.raises(ValueError, match="give a share"):
        parity.fair_rule(np.zeros(2, int), np.ones(2, bool), np.array([0, 1]), 1, 1.5)
