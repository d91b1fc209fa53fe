"""The variance that training seeds give a number, moderated by all methods of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from eval.methods.read import Comparison
from eval.seed_spread import spread_of

# From means of rows at the points of the budget, (N, P), to one number for each, (N,).
OfRuns = Callable[[np.ndarray], np.ndarray]
# Measures that are read from results; others would have a judge look at every picture of all rows.
READ = ("accuracy", "partial")


def at_end(means: np.ndarray) -> np.ndarray:
    """The end of the budget."""
    return means[:, -1]


def gained(means: np.ndarray) -> np.ndarray:
    """The end minus the start."""
    return means[:, -1] - means[:, 0]


def over_curve(means: np.ndarray) -> np.ndarray:
    """The mean over the points after the start."""
    return np.asarray(means[:, 1:].mean(1))


def known_variances(
    comparison: Comparison, of: OfRuns, sides: Sequence[tuple[str, float]],
    measure: str = "accuracy",
) -> list[tuple[float, float]]:  # fmt: skip
    """For :func:`eval.run_statistics.interval_of`: variance and degrees of freedom of each side.

    Empty where seeds have to speak for themselves: too few methods, steering, whose seeds are
    noise of the same prompts, or a measure that takes a judge.

    Args:
        of: the number that a side contributes.
        sides: methods, each with the factor that its mean over seeds counts by.
    """
    if comparison.steering or measure not in READ:
        return []
    runs = {name: of(comparison.means(name, measure)) for name in comparison.methods}
    spread = spread_of(list(runs.values()))
    if spread is None or any(len(runs[name]) < 2 for name, _ in sides):
        return []
    found = []
    for name, factor in sides:
        own = runs[name]
        variance, freedom = spread.moderated(float(own.var(ddof=1)), len(own) - 1)
        found.append((factor**2 * variance / len(own), freedom))
    return found
