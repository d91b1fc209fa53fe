r"""How much training seeds differ, learned from all methods of a comparison together.

Three seeds of a method know next to nothing of their own spread, and Student's quantile of 2
degrees of freedom, 4.3, says so.  But a comparison has tens of methods that were run alike, and
their spreads are of one kind.  Empirical Bayes takes the variances of methods as draws from a
scaled inverse chi-square distribution and moderates each towards it (Smyth 2004, "Linear models and
empirical Bayes methods for assessing differential expression", section 3):

.. math:: \tilde s_m^2 = \frac{d_0 s_0^2 + d_m s_m^2}{d_0 + d_m},
          \qquad \text{degrees of freedom } d_0 + d_m,\quad d_m = S_m - 1.

``d_0`` is what the variances themselves say about how alike they are (moments of their logarithms,
section 6.2 there): where methods differ much it is small and each is left to its own seeds; where
their variances differ no more than chance makes them differ it is large and they share one.  Tens
of variances say little about that themselves, and methods that are taken to be more alike than they
are get intervals that are too narrow, so what the moments give is raised by its standard error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import digamma, polygamma

LEAST_METHODS = 5  # fewer say too little about how spreads differ


@dataclass(frozen=True)
class Spread:
    """What the seeds' variances of methods have in common.

    Attributes:
        variance: ``s_0^2``, of single runs.
        freedom: ``d_0``.
    """

    variance: float
    freedom: float

    def moderated(self, variance: float, freedom: float) -> tuple[float, float]:
        """A method's own variance of single runs, moderated, and its degrees of freedom."""
        together = self.freedom + freedom
        held = self.freedom * self.variance + freedom * variance
        return held / together, together


def spread_of(runs: Sequence[np.ndarray]) -> Spread | None:
    """The common spread of methods, or ``None`` where there are too few.

    Args:
        runs: one number for each seed, ``(S,)``, of each method. Those of one seed are left out.
    """
    runs = [r for r in runs if len(r) > 1]
    if len(runs) < LEAST_METHODS:
        return None
    freedom = np.array([len(r) - 1 for r in runs], float)
    variances = np.array([np.var(r, ddof=1) for r in runs])
    middle = float(np.median(variances))
    if middle <= 0:
        return None
    # Seeds that agree by chance would have a logarithm of minus infinity.
    logs = np.log(np.maximum(variances, 1e-5 * middle))
    centred = logs - digamma(freedom / 2) + np.log(freedom / 2)
    found = float(centred.var(ddof=1))
    unsure = found * math.sqrt(2 / (len(runs) - 1))
    beyond = max(found - float(polygamma(1, freedom / 2).mean()), 0.0) + unsure
    prior = 2 * _inverse_trigamma(beyond)
    scale = float(centred.mean() + digamma(prior / 2) - math.log(prior / 2))
    return Spread(math.exp(scale), prior)


def _inverse_trigamma(value: float) -> float:
    """Where the trigamma function, which falls from infinity to 0, has a value."""
    low, high = 1e-6, 1e6

    def above(log: float) -> float:
        return float(polygamma(1, math.exp(log))) - value

    if above(math.log(low)) <= 0:
        return low
    if above(math.log(high)) >= 0:
        return high
    return math.exp(float(brentq(above, math.log(low), math.log(high))))
