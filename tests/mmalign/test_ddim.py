"""The diffusion kernel against the stock scheduler and against closed forms."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch.distributions import Normal

from mmalign.policies.sd import SDPolicy
from mmalign.policies.tiny import tiny_sd
from mmalign.protocols import Kernel
from mmalign.sampling import (
    CpsKernel,
    DdimKernel,
    FlowSdeKernel,
    KernelMismatchError,
    OdeKernel,
    build_kernel,
    fitted,
)
from mmalign.sampling.fit import deterministic, kernels_for
from mmalign.sampling.process import coefficients, noised, split, target

M, Q = 0.7, 0.25  # mean and variance of the data
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PREDICTION = {"epsilon": "epsilon", "v": "v_prediction"}
kinds = pytest.mark.parametrize("kind", ["epsilon", "v"])


def scheduler(kind: str = "epsilon", steps: int = 10, **options) -> DDIMScheduler:
    made = DDIMScheduler(
        prediction_type=PREDICTION[kind], clip_sample=False, **{**SCHEDULE, **options}
    )
    made.set_timesteps(steps)
    return made


def levels(stock: DDIMScheduler) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    """``(time, sigma, sigma_next)`` of the stock scheduler's own steps."""
    jump = stock.config.num_train_timesteps // stock.num_inference_steps
    found = []
    for t in stock.timesteps.tolist():
        after = stock.alphas_cumprod[t - jump] if t >= jump else stock.final_alpha_cumprod
        pair = (stock.alphas_cumprod[t], after)
        found.append((t, *((1 - a.double()).sqrt() for a in pair)))
    return found


# --- the stock scheduler --------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    "options",
    [{"set_alpha_to_one": False, "steps_offset": 1}, {}, {"timestep_spacing": "trailing"}],
)
def test_every_step_is_the_stock_schedulers_bit_for_bit(kind, eta, options):
    stock, kernel = scheduler(kind, **options), DdimKernel(eta=eta, parameterisation=kind)
    generator = torch.Generator().manual_seed(0)
    for t, sigma, after in levels(stock):
        x, out, noise = torch.randn(3, 2, 4, 5, 5, generator=generator)
        wanted = stock.step(out, t, x, eta=eta, variance_noise=noise if eta else None)
        step = kernel.step(x, sigma, after, out, noise)
        assert step.x_next.equal(wanted.prev_sample) and step.x0.equal(wanted.pred_original_sample)
        variance = stock._get_variance(t, t - 100)
        assert float(step.std) == pytest.approx(eta * math.sqrt(variance), rel=1e-6, abs=1e-9)


def test_full_noise_on_the_full_grid_is_the_ancestral_posterior():
    stock = scheduler(steps=1000)
    ancestral = DDPMScheduler(variance_type="fixed_small", clip_sample=False, **SCHEDULE)
    for t, sigma, after in levels(stock)[:-1:50]:
        wanted = math.sqrt(ancestral._get_variance(t))
        assert float(DdimKernel().deviation(sigma, after)) == pytest.approx(wanted, rel=2e-5)


def test_from_pure_noise_nothing_is_undefined():
    """A schedule that ends in pure noise: all signal is gone, and all noise may be renewed."""
    stock = scheduler("v", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    t, sigma, after = levels(stock)[0]
    assert float(sigma) == 1
    x, out, noise = torch.randn(3, 2, 4)
    for eta in (0.0, 0.5, 1.0):
        step = DdimKernel(eta=eta, parameterisation="v").step(x, sigma, after, out, noise)
        assert torch.isfinite(step.x_next).all() and step.x0.equal(-out)
    assert step.mean.sub((1 - after**2).sqrt() * -out).abs().max() < 1e-3  # its noise is new
    wanted = stock.step(out, t, x, eta=0.5, variance_noise=noise).prev_sample
    half = DdimKernel(eta=0.5, parameterisation="v").step(x, sigma, after, out, noise)
    assert half.x_next.equal(wanted)


# --- marginals ------------------------------------------------------------------------------------


def score_noise(x: torch.Tensor, sigma: torch.Tensor, variance: float) -> torch.Tensor:
    """``E[eps | x]`` for data ``N(M, variance)``, exactly."""
    a, b = coefficients("epsilon", sigma)
    return b * (x - a * M) / (a**2 * variance + b**2)


def walk(eta: float, steps: int, variance: float) -> tuple[float, float]:
    """Mean and variance at sigma 0, exactly, as every step is affine in ``x``."""
    grid = torch.linspace(1.45, 0, steps + 1, dtype=torch.float64).sin()
    a, b = coefficients("epsilon", grid[0])
    mean, spread = float(a) * M, float(a) ** 2 * variance + float(b) ** 2
    probe = torch.tensor([[0.0], [1.0]])
    for sigma, after in pairwise(grid):
        out = score_noise(probe, sigma, variance)
        step = DdimKernel(eta=eta).step(probe, sigma, after, out, torch.zeros_like(probe))
        offset, slope = float(step.mean[0]), float(step.mean[1] - step.mean[0])
        mean, spread = offset + slope * mean, slope**2 * spread + float(step.std) ** 2
    return mean, spread


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_marginal_of_gaussian_data(eta):
    """Any share of noise reaches the data's distribution, with an error of one over steps."""
    errors = []
    for steps in (20, 80, 320):
        mean, variance = walk(eta, steps, Q)
        errors.append(abs(mean - M) + abs(variance - Q))
    assert errors[0] > 1e-3  # few steps are not expected to agree
    assert errors[1] < 0.4 * errors[0] and errors[2] < 0.4 * errors[1] and errors[2] < 7e-3


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_marginal_of_a_point_is_exact_for_any_number_of_steps(eta, steps):
    mean, variance = walk(eta, steps, 0.0)
    assert mean == pytest.approx(M, abs=1e-5) and variance == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_one_step_keeps_signal_and_total_noise_on_schedule(eta):
    """All data at ``M``: from ``N(a M, b^2)`` exactly to ``N(a' M, b'^2)``."""
    sigma, after = torch.tensor([0.9, 0.6], dtype=torch.float64)
    x = torch.linspace(-2, 2, 5).view(-1, 1)
    step = DdimKernel(eta=eta).step(x, sigma, after, score_noise(x, sigma, 0.0), x)
    slope = float((step.mean[1] - step.mean[0]) / (x[1] - x[0]))
    total = slope**2 * float(sigma) ** 2 + float(step.std) ** 2
    assert total == pytest.approx(float(after) ** 2, rel=1e-5)


# --- the density ----------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_log_probability_is_the_normal_density(kind, reduce):
    kernel = DdimKernel(eta=0.8, log_prob_reduce=reduce, parameterisation=kind)
    x, out, noise = torch.randn(3, 3, 4, 5, 5)
    sigma, after = torch.tensor([0.95, 0.6, 0.3]), torch.tensor([0.9, 0.5, 0.1])
    step = kernel.step(x, sigma, after, out, noise)
    density = Normal(step.mean, step.std.expand_as(x)).log_prob(step.x_next).flatten(1)
    wanted = density.mean(1) if reduce == "mean" else density.sum(1)
    torch.testing.assert_close(step.log_prob, wanted)
    again = kernel.step(x, sigma, after, out, x_next=step.x_next)
    assert again.log_prob.equal(step.log_prob) and again.mean.equal(step.mean)
    for i in range(3):
        row = slice(i, i + 1)
        one = kernel.step(x[row], sigma[i], after[i], out[row], noise[row])
        torch.testing.assert_close(one.x_next, step.x_next[row])


@kinds
def test_gradient_reaches_the_mean_and_not_the_sample(kind):
    """``d log p / d prediction`` in closed form, through mean and density."""
    x, out, noise = torch.randn(3, 2, 4).double()
    sigma, after = torch.tensor([0.8, 0.5], dtype=torch.float64)
    kernel = DdimKernel(parameterisation=kind)
    drawn = kernel.step(x, sigma, after, out, noise)
    out, sample = out.requires_grad_(), drawn.x_next.clone().requires_grad_()
    kernel.step(x, sigma, after, out, x_next=sample).log_prob.sum().backward()
    a, b, a2 = (float(v) for v in ((1 - sigma**2).sqrt(), sigma, (1 - after**2).sqrt()))
    kept = math.sqrt(float(after) ** 2 - float(drawn.std) ** 2)
    slope = kept - a2 * b / a if kind == "epsilon" else kept * a - a2 * b
    wanted = noise / drawn.std * slope / 4
    torch.testing.assert_close(out.grad, wanted, rtol=1e-4, atol=1e-6)
    assert sample.grad is None


def test_no_density_where_nothing_is_random():
    x, out, noise = torch.randn(3, 2, 4)
    last = DdimKernel().step(x, torch.tensor(0.1), torch.tensor(0.0), out, noise)
    assert last.log_prob is None and last.x_next.equal(last.mean)
    still = DdimKernel(eta=0)
    assert not still.stochastic and DdimKernel(eta=0.1).stochastic
    assert still.step(x, torch.tensor(0.5), torch.tensor(0.4), out).log_prob is None
    with pytest.raises(ValueError, match="eta above 0"):
        still.step(x, torch.tensor(0.5), torch.tensor(0.4), out, x_next=x)
    for given in ({}, {"noise": x, "x_next": x}):
        with pytest.raises(ValueError, match="exactly one"):
            DdimKernel().step(x, torch.tensor(0.5), torch.tensor(0.4), out, **given)


# --- parameterisations ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flow", "epsilon", "v"])
def test_splitting_undoes_noising(kind):
    x0, eps = torch.randn(2, 3, 4, 5)
    sigma = torch.tensor([0.1, 0.5, 0.9])
    x = noised(kind, x0, eps, sigma)
    again = split(kind, x, sigma, target(kind, x0, eps, sigma))
    torch.testing.assert_close(again, (x0, eps), rtol=1e-4, atol=1e-5)
    a, b = coefficients(kind, sigma)
    assert torch.allclose(a + b if kind == "flow" else a**2 + b**2, torch.ones(3))


def test_noising_is_the_stock_schedulers():
    stock = scheduler("v")
    x0, eps = torch.randn(2, 3, 4)
    times = torch.tensor([10, 500, 999])
    sigma = (1 - stock.alphas_cumprod[times].double()).sqrt()
    torch.testing.assert_close(noised("v", x0, eps, sigma), stock.add_noise(x0, eps, times))
    torch.testing.assert_close(target("v", x0, eps, sigma), stock.get_velocity(x0, eps, times))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_both_predictions_of_one_truth_make_one_step(eta):
    x0, eps, noise = torch.randn(3, 2, 4)
    sigma, after = torch.tensor([0.8, 0.5], dtype=torch.float64)
    made = [
        DdimKernel(eta=eta, parameterisation=kind).step(
            noised(kind, x0, eps, sigma), sigma, after, target(kind, x0, eps, sigma), noise
        )
        for kind in ("epsilon", "v")
    ]
    torch.testing.assert_close(made[0].x_next, made[1].x_next, rtol=1e-4, atol=1e-5)


@kinds
def test_kernels_fit_parameterisations(kind, tiny_policy):
    policy = SDPolicy(tiny_sd(prediction_type=PREDICTION[kind]), name="model-x")
    bound = fitted(DdimKernel(eta=0.3), policy)
    assert bound == DdimKernel(eta=0.3, parameterisation=kind) and isinstance(bound, Kernel)
    for kernel in (OdeKernel(), CpsKernel(), FlowSdeKernel()):
        with pytest.raises(KernelMismatchError, match=rf"x predicts {kind}; .* consistency, ddim$"):
            fitted(kernel, policy)
        assert fitted(kernel, tiny_policy) is kernel
    with pytest.raises(KernelMismatchError, match=r"epsilon and v models.*flow_sde"):
        fitted(DdimKernel(), tiny_policy)
    assert not deterministic(kind).stochastic and isinstance(deterministic("flow"), OdeKernel)
    assert kernels_for(kind) == ("consistency", "ddim") and "ddim" not in kernels_for("flow")


def test_bad_options():
    with pytest.raises(ValueError, match=r"\[0, 1\], got 1.5"):
        build_kernel("ddim", eta=1.5)
    with pytest.raises(ValueError, match="policy sets it"):
        build_kernel("ddim", parameterisation="flow")
