"""Batches that do not fit into memory are made smaller, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from gaussian_bed import STEPS, ExactKernel, GaussianPolicy, linear

from mmalign.steering.best_of_n import BestOfN
from mmalign.steering.budget import BudgetError
from mmalign.steering.fk import Fk


class SmallPolicy(GaussianPolicy):
    """Runs out of memory beyond so many rows, as a GPU does."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows, self.batches = rows, []

    def predict(self, latents, sigma, conditioning, guidance_scale):
        self.batches.append(len(latents))
        if len(latents) > self.rows:
            raise torch.OutOfMemoryError("no more")
        return super().predict(latents, sigma, conditioning, guidance_scale)


def test_batches_shrink_to_what_fits(capsys):
    method = Fk(k=7, kernel=ExactKernel(), strength=1.0)
    policy = SmallPolicy(2)
    small = method.run(policy, linear(), ["a", "b"])
    large = method.run(GaussianPolicy(), linear(), ["a", "b"])
    assert small.candidates.data.equal(large.candidates.data) and small.nfe == 14 * STEPS
    assert policy.batches[:3] == [14, 7, 3] and set(policy.batches[4:]) == {1}
    assert "batches of 1" in capsys.readouterr().err


def test_one_row_that_does_not_fit_is_an_error():
    with pytest.raises(torch.OutOfMemoryError):
        BestOfN(n=2).run(SmallPolicy(0), linear(), ["a"])


def test_a_limit_on_memory_needs_a_gpu():
    with pytest.raises(BudgetError, match="the policy is on cpu; leave it out"):
        BestOfN(n=2).run(GaussianPolicy(), linear(), ["a"], budget="memory=8gb")
