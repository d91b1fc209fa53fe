"""The kernel whose noise is learned: Euler plus noise, bounds, densities, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal

from mmalign.sampling import OdeKernel, build_kernel

GRID = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0])


def test_frozen_noise_is_eulers_step_plus_noise():
    """No correction of the drift: the mean is the deterministic step's to the last bit."""
    x, v, noise = torch.randn(3, 2, 4, 5, 5)
    sigma, after = GRID[1], GRID[2]
    kernel = build_kernel("learned", std_init=0.3)
    step = kernel.step(x, sigma, after, v, noise)
    euler = OdeKernel().step(x, sigma, after, v)
    assert step.mean.equal(euler.x_next) and step.x0.equal(euler.x0)
    assert step.x_next.equal(euler.x_next + torch.tensor(0.3) * noise)
    # Learning starts from that very kernel.
    for channels in (False, True):
        options = {"std_init": 0.3, "per_channel": channels}
        learning = build_kernel("learned", **options).learnable(GRID, 4)
        torch.testing.assert_close(learning.step(x, sigma, after, v, noise).x_next, step.x_next)


@pytest.mark.parametrize("per_channel", [False, True])
def test_each_step_has_a_deviation_of_its_own(per_channel):
    kernel = build_kernel("learned", std_min=0.1, std_max=0.4, per_channel=per_channel)
    learning = kernel.learnable(GRID, 3)
    assert learning.phi.shape == (3, 3 if per_channel else 1)  # the last step is never noisy
    with torch.no_grad():
        learning.phi.copy_(torch.arange(learning.phi.numel()).reshape(learning.phi.shape) / 9)
    x, v, noise = torch.randn(3, 3, 3, 2, 2)
    for k in range(3):
        step = learning.step(x, GRID[k], GRID[k + 1], v, noise)
        share = 0.5 * (1 + torch.tanh(learning.phi[k]))
        wanted = 0.1 * (0.4 / 0.1) ** share
        std = step.std.flatten().expand_as(wanted)
        torch.testing.assert_close(std, wanted)
        density = Normal(step.mean, step.std).log_prob(step.x_next).flatten(1).mean(1)
        torch.testing.assert_close(step.log_prob, density)
    # Rows at levels of their own get their own deviations.
    rows = learning.step(x, GRID[[2, 0, 1]], GRID[[3, 1, 2]], v, noise)
    for row, k in enumerate((2, 0, 1)):
        one = learning.step(x, GRID[k], GRID[k + 1], v, noise)
        torch.testing.assert_close(rows.x_next[row], one.x_next[row])
        torch.testing.assert_close(rows.log_prob[row], one.log_prob[row])


@pytest.mark.parametrize(("value", "bound"), [(-40.0, 0.1), (40.0, 0.4)])
def test_no_parameter_leads_past_the_bounds(value, bound):
    learning = build_kernel("learned", std_min=0.1, std_max=0.4).learnable(GRID, 1)
    with torch.no_grad():
        learning.phi.fill_(value)
    torch.testing.assert_close(learning.stds, torch.full((3, 1), bound))


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_gradient_of_the_log_probability_in_the_noise(reduce):
    """``d log p / d s = (z^2 - 1) / s``, the term of ``-ln s`` included."""
    kernel = build_kernel("learned", log_prob_reduce=reduce, per_channel=True)
    learning = kernel.learnable(GRID, 4)
    x, v, noise = torch.randn(3, 5, 4, 3, 3)
    step = learning.step(x, GRID[1], GRID[2], v, noise)
    (got,) = torch.autograd.grad(step.log_prob.sum(), learning.phi)
    s = learning.stds[1]
    slope = 0.5 * math.log(0.5 / 0.05) * (1 - torch.tanh(learning.phi[1]).square()) * s
    wanted = ((noise.square() - 1) / s[:, None, None]).sum((0, 2, 3)) * slope
    if reduce == "mean":
        wanted = wanted / (4 * 3 * 3)
    torch.testing.assert_close(got[1], wanted.detach(), rtol=1e-4, atol=1e-4)
    assert not got[[0, 2]].any()


@pytest.mark.parametrize(
    "options",
    [{"std_min": 0.0}, {"std_min": 0.5, "std_max": 0.5}, {"std_init": 0.5}, {"std_init": 0.01}],
)
def test_impossible_bounds_are_refused(options):
    with pytest.raises(ValueError, match="learned std"):
        build_kernel("learned", **options)
