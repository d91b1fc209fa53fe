"""Metrics of rewards against examples worked out by hand from their definitions."""

import math

import numpy as np
import pytest

from eval.metrics.agreement import calibration, position_bias, swap_consistency
from eval.metrics.correlation import krcc, logistic_fit, plcc, srcc
from eval.metrics.pairs import (
    acc_plus,
    accuracy_with_ties,
    accuracy_without_ties,
    best_threshold,
    half_credit_points,
    inversion_score,
    ranked_pairs,
    strict_points,
    threshold_points,
)
from eval.metrics.resampling import bootstrap_statistic, paired_permutation_test
from eval.metrics.selection import (
    best_of_n,
    swapped_preference,
    vote_of,
    vote_point,
    win_rate,
)
from eval.statistics import bootstrap_mean

LABELS, DIFFERENCES = [1, -1, 0, 0, 1], [2.0, -1.0, 0.5, 0.2, -0.3]


def test_strict_and_half_credit_leave_human_ties_out():
    labels, differences = [1, 1, -1, -1, 0], [0.5, 0.0, -2.0, 1.0, 3.0]
    assert strict_points(labels, differences).tolist() == [1, 0, 1, 0]
    assert half_credit_points(labels, differences).tolist() == [1, 0.5, 1, 0]
    assert accuracy_without_ties(labels, differences) == 0.5
    assert math.isnan(accuracy_without_ties([0, 0], [1.0, 2.0]))


def test_tie_calibration_by_hand():
    """Without ties 2 of 5 are right; at 0.2 three, at 0.3 three, at 0.5 four, at 1 three."""
    assert accuracy_with_ties(LABELS, DIFFERENCES) == pytest.approx(4 / 5)
    assert accuracy_with_ties(LABELS, DIFFERENCES, "compat") == pytest.approx(4 / 5)


def test_tie_calibration_without_human_ties_needs_no_ties():
    assert accuracy_with_ties([1, -1], [0.5, -3.0]) == 1.0
    # The published script always predicts at least one tie.
    assert accuracy_with_ties([1, -1], [0.5, -3.0], "compat") == 0.5


def test_published_tie_calibration_depends_on_the_order_of_equal_differences():
    assert accuracy_with_ties([0, 1], [0.5, 0.5]) == accuracy_with_ties([1, 0], [0.5, 0.5]) == 0.5
    assert accuracy_with_ties([0, 1], [0.5, 0.5], "compat") == 1.0
    assert accuracy_with_ties([1, 0], [0.5, 0.5], "compat") == 0.5


def test_tie_calibration_agrees_with_trying_every_threshold():
    rng = np.random.default_rng(0)
    for _ in range(20):
        h, d = rng.integers(-1, 2, 30), rng.normal(0, 1, 30).round(1)
        tried = []
        for epsilon in (-1.0, *np.unique(np.abs(d))):
            tied = np.abs(d) <= epsilon
            tried.append(((tied & (h == 0)) | (~tied & (h * d > 0))).mean())
        assert accuracy_with_ties(h, d) == pytest.approx(max(tried))


def test_pick_a_pic_points():
    """Probabilities 0.645 and 0.355 differ by 0.29: a tie at a threshold of 0.4, not at 0.2."""
    close = 2 * math.atanh(0.29)
    labels, differences = [1, 0, -1, 0], [close, close, close, 0.0]
    assert threshold_points(labels, differences, 0.2).tolist() == [1, 0.5, 0, 1]
    assert threshold_points(labels, differences, 0.4).tolist() == [0.5, 1, 0.5, 1]
    assert best_threshold([0, 0], [close, -close]) == 0.3
    assert best_threshold([1, -1], [close, -close]) == 0.0


def test_inversions_forgive_ties_on_either_side():
    assert inversion_score([3, 2, 1], [0.9, 0.5, 0.1]) == 1
    assert inversion_score([3, 2, 1], [0.1, 0.5, 0.9]) == 0
    assert inversion_score([4, 3, 2, 1], [4.0, 2.0, 3.0, 1.0]) == pytest.approx(5 / 6)
    assert inversion_score([2, 2, 1], [0.0, 1.0, 0.5]) == pytest.approx(2 / 3)
    assert inversion_score([3, 2, 1], [0.5, 0.5, 0.5]) == 1
    assert inversion_score([3, 1, 2], [0.5, 0.5, 0.5], "order") == pytest.approx(2 / 3)
    assert inversion_score([3, 1, 2], [0.5, 0.5, 0.5], "half") == 0.5
    assert inversion_score([3, 1, 1], [0.5, 0.5, 0.5], "half") == pytest.approx(2 / 3)
    assert inversion_score([3, 2, 1], [0.5, 0.9, 0.5], "order") == pytest.approx(2 / 3)
    assert math.isnan(inversion_score([1], [1.0]))


def test_pairs_of_a_ranking():
    labels, differences = ranked_pairs([3, 1, 1], [0.2, 0.5, 0.1])
    assert labels == [1, 1, 0]
    assert differences == pytest.approx([-0.3, 0.1, 0.4])


def test_acc_plus_asks_for_all_pairs_of_a_question():
    assert acc_plus([1, 1, 1, 0, 1], ["a", "a", "b", "b", "c"]) == pytest.approx(2 / 3)
    assert math.isnan(acc_plus([], []))


def test_correlations_by_hand():
    """One exchange among four: rho = 1 - 6 * 2 / (4 * 15) = 0.8, tau = (5 - 1) / 6."""
    assert srcc([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    assert krcc([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(4 / 6)
    # Four concordant pairs, one tie on each side: 4 / sqrt(5 * 5).
    assert krcc([1, 1, 2, 3], [1, 2, 2, 3]) == pytest.approx(0.8)
    assert plcc([1, 2, 3], [2, 4, 6]) == pytest.approx(1)
    assert all(math.isnan(f([1, 1, 1], [1, 2, 3])) for f in (srcc, krcc, plcc))
    assert math.isnan(srcc([1, 2], [1, 2]))


def test_a_logistic_fit_straightens_a_bent_scale():
    x = np.linspace(-3, 3, 30)
    y = 1 + 4 / (1 + np.exp(-2 * x))
    fitted = logistic_fit(x, y)
    assert fitted is not None
    np.testing.assert_allclose(fitted, y, atol=1e-4)
    assert plcc(x, y, fit=True) == pytest.approx(1, abs=1e-6)
    assert plcc(x, y) < 0.97
    assert plcc(-x, y, fit=True) == pytest.approx(1, abs=1e-4)  # a falling scale is fitted too
    assert math.isnan(plcc([1, 2, 3, 4], [1, 3, 2, 4], fit=True))  # as many values as parameters


def test_best_of_n_shares_ties():
    assert best_of_n([0.1, 0.9, 0.3, 0.2], [1, 0, 0, 0]) == 0
    assert best_of_n([0.9, 0.9, 0.3, 0.2], [1, 0, 0, 0]) == 0.5
    assert best_of_n([0.5] * 4, [1, 0, 0, 0]) == 0.25
    with pytest.raises(ValueError, match="1 scores for 2 qualities"):
        best_of_n([1.0], [1, 0])


def test_votes_accept_a_plain_tie_for_both_kinds():
    assert vote_point("A>B", "A>B") == 1 and vote_point("A>B", "B>A") == 0
    assert vote_point("A=B=Bad", "A=B") == vote_point("A=B=Good", "A=B") == 1
    assert vote_point("A=B=Bad", "A=B=Good") == 0 and vote_point("A>B", "A=B") == 0
    assert vote_point("A=B=Good", None) == 0
    assert [vote_of(d, 0.1) for d in (0.5, -0.5, 0.1)] == ["A>B", "B>A", "A=B"]


def test_win_rate_and_order():
    assert win_rate([1, 0, 0.5, 1]) == 0.625
    assert swapped_preference(0.9, 0.3) == pytest.approx(0.6)
    assert swap_consistency([0.9, 0.2, 0.5, 0.5], [0.8, 0.7, 0.5, 0.6]) == 0.5
    assert position_bias([0.9, 0.6], [0.1, 0.6]) == pytest.approx(0.2)
    assert all(math.isnan(f([], [])) for f in (swap_consistency, position_bias))


def test_calibration_by_hand():
    sure = calibration([0.9] * 10, [1] * 9 + [0])
    assert sure["ece"] == pytest.approx(0)
    assert calibration([0.9] * 10, [1] * 5 + [0] * 5)["ece"] == pytest.approx(0.4)
    # A preference of 0.1 for the first is one of 0.9 for the second.
    assert calibration([0.1] * 10, [0] * 9 + [1])["ece"] == pytest.approx(0)
    assert calibration([0.5] * 4, [1, 1, 1, 0])["ece"] == pytest.approx(0)


def test_bootstrap_of_a_mean_agrees_with_that_of_means():
    values = np.random.default_rng(0).normal(0, 1, 300)
    units = [f"p{i % 60}" for i in range(300)]
    found = bootstrap_statistic(lambda rows: values[rows].mean(), units, samples=2000)
    known = bootstrap_mean(values, units)
    assert (found.unit, found.clusters, found.n) == ("prompt", 60, 300)
    assert found.mean == pytest.approx(known.mean)
    assert (found.low, found.high) == pytest.approx((known.low, known.high), abs=0.02)


def test_bootstrap_says_where_there_is_no_interval():
    few = bootstrap_statistic(lambda rows: float(len(rows)), ["a", "b"])
    assert few.mean == 2 and not few.defined and few.unit == "none"
    undefined = bootstrap_statistic(lambda rows: math.nan, ["a"] * 20)
    assert math.isnan(undefined.mean) and not undefined.defined
    one = bootstrap_statistic(lambda rows: float(rows.mean()), ["the prompt"] * 20)
    assert one.unit == "sample" and one.defined


def test_permutation_test_is_exact_where_it_can_be():
    """Of the 2^3 swaps of three units, two are as extreme as three gains of one."""
    assert paired_permutation_test([1, 1, 1], [0, 0, 0], ["a", "b", "c"]) == pytest.approx(2 / 8)
    assert paired_permutation_test([1, 1, 1], [0, 0, 0], ["a", "a", "b"]) == pytest.approx(2 / 4)
    assert paired_permutation_test([1, 0], [1, 0], ["a", "b"]) == 1
    rng = np.random.default_rng(1)
    better, worse = rng.random(200) < 0.8, rng.random(200) < 0.6
    units = list(range(200))
    assert paired_permutation_test(better, worse, units) < 0.01
    assert paired_permutation_test(better, worse, units) == paired_permutation_test(
        better, worse, units
    )
