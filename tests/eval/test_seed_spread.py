"""Variances of seeds, moderated over methods: known distribution in, known answer out."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import polygamma

from eval.run_statistics import Pictures, interval_of
from eval.seed_spread import Spread, _inverse_trigamma, spread_of


def test_inverse_trigamma():
    for x in (0.02, 0.5, 1.0, 7.0, 300.0):
        assert _inverse_trigamma(float(polygamma(1, x))) == pytest.approx(x, rel=1e-6)


def test_methods_that_spread_alike_share_one_variance():
    rng = np.random.default_rng(0)
    found = spread_of(list(rng.normal(3, 2.0, (400, 3))))
    assert found is not None and found.freedom > 10
    assert found.variance == pytest.approx(4.0, rel=0.15)


def test_the_prior_of_variances_is_found_again():
    """Variances drawn as ``d0 s0^2 / chi^2(d0)`` give back ``d0`` and ``s0^2``."""
    rng = np.random.default_rng(1)
    true = 6 * 0.25 / rng.chisquare(6, 4000)
    found = spread_of(list(rng.normal(0, 1, (4000, 4)) * np.sqrt(true)[:, None]))
    assert found is not None
    assert found.freedom == pytest.approx(6, rel=0.15)
    assert found.variance == pytest.approx(0.25, rel=0.05)
    assert Spread(0.25, 6.0).moderated(1.0, 2) == pytest.approx(((6 * 0.25 + 2) / 8, 8.0))


def test_methods_that_differ_much_are_left_to_their_own_seeds():
    rng = np.random.default_rng(2)
    found = spread_of(list(rng.normal(0, 1, (200, 3)) * np.exp(rng.normal(0, 3, (200, 1)))))
    assert found is not None and found.freedom < 1


def test_too_few_methods_say_nothing_of_others():
    rows = list(np.random.default_rng(3).normal(size=(5, 3)))
    assert spread_of(rows[:4]) is None and spread_of([*rows[:4], rows[4][:1]]) is None
    assert spread_of(rows) is not None
    assert spread_of([np.ones(3)] * 8) is None
    # Seeds of one method that agree by chance do not make the others' spread 0.
    agreed = spread_of([*rows, np.zeros(3)])
    assert agreed is not None and agreed.variance > 1e-3


@pytest.mark.parametrize("unlike", [0.0, 0.6])
def test_coverage_with_moderated_variances(unlike):
    """Twelve methods of three seeds, alike or with spreads that differ by a factor of two or so.

    Their intervals hold the truth as often as they should and are much narrower than those that
    each method's own seeds give.
    """
    rng, hits, narrower, trials = np.random.default_rng(4), [], [], 25
    asked = Pictures(("task",) * 20, tuple(f"prompt {k}" for k in range(20)))
    for t in range(trials):
        runs = rng.normal(0, 0.2 * np.exp(unlike * rng.normal(size=(12, 1))), (12, 3))
        spread = spread_of(list(runs))
        assert spread is not None
        for own in runs:
            values = np.broadcast_to(own[:, None, None, None], (3, 1, 20, 1))
            variance, freedom = spread.moderated(float(own.var(ddof=1)), 2)
            found, alone = (
                interval_of(lambda c: c.mean((1, 2))[:, 0, 0], [values], asked, samples=400,
                            seed=t, known=known)
                for known in ([(variance / 3, freedom)], ())
            )  # fmt: skip
            hits.append(found.low <= 0 <= found.high)
            narrower.append((found.high - found.low) / (alone.high - alone.low))
    assert 0.90 <= np.mean(hits) <= 0.99
    assert np.median(narrower) < 0.8
