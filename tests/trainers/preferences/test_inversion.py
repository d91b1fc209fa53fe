"""DDIM-InPO's inversion on Gaussian data, whose exact network is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mmalign.policies.load import load_policy
from mmalign.sampling import process
from mmalign.sampling.generate import integrate
from mmalign.types import Conditioning
from trainers.preferences.inpo import inverted

SPREAD = 0.6  # deviation of the data


class Exact:
    """The exact flow network of data N(0, SPREAD^2)."""

    name, family, parameterisation = "exact", "exact", "flow"
    device, denoiser = torch.device("cpu"), nn.Identity()
    calls = 0

    def sigmas(self, steps: int) -> Tensor:
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)

    def predict(self, x: Tensor, sigma: Tensor, conditioning, guidance_scale: float) -> Tensor:
        self.calls += len(x)
        assert guidance_scale == 1.0
        kept = (1 - sigma) * SPREAD**2
        return x * (sigma - kept) / (sigma**2 + (1 - sigma) * kept)


def conditioning(rows: int) -> Conditioning:
    return Conditioning({"none": torch.zeros(rows, 1)})


def data(rows: int = 400) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return SPREAD * torch.randn(rows, 1, 1, 1, generator=generator, dtype=torch.float64)


def test_inverting_and_sampling_again_comes_back():
    policy, clean, errors = Exact(), data(), []
    for steps in (10, 20, 40):
        grid = policy.sigmas(steps)
        ones = torch.ones(len(clean), dtype=torch.float64)
        noise, nfe = inverted(policy, clean, conditioning(400), ones, grid)
        assert nfe == 400 * steps
        back = integrate(policy, noise, grid, conditioning(400), 1.0)
        errors.append(float((back - clean).abs().mean()))
    assert errors[0] < 0.2 and errors[1] < 0.65 * errors[0] and errors[2] < 0.65 * errors[1]
    assert abs(float(noise.std()) - 1) < 0.08  # what the data came from


def test_each_row_stops_at_its_own_level():
    policy, clean = Exact(), data(4)
    grid = policy.sigmas(5)
    sigma = grid[[4, 3, 0, 4]]  # the lowest level, the second, the highest
    states, nfe = inverted(policy, clean, conditioning(4), sigma, grid)
    assert nfe == policy.calls == 1 + 2 + 5 + 1
    alone = [
        inverted(policy, clean[i : i + 1], conditioning(1), sigma[i : i + 1], grid)[0]
        for i in range(4)
    ]
    torch.testing.assert_close(states, torch.cat(alone), rtol=0, atol=0)
    one = policy.predict(clean[:1], grid[5], None, 1.0)
    torch.testing.assert_close(states[0], (clean[:1] + grid[4] * one)[0])


def test_the_network_errs_less_where_it_was_inverted_to():
    policy, clean = Exact(), data()
    grid = policy.sigmas(20)
    sigma = grid[torch.arange(400) % 20]
    level = sigma.reshape(-1, 1, 1, 1)
    states, _ = inverted(policy, clean, conditioning(400), sigma, grid)
    implied = (states - (1 - level) * clean) / level
    random = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1)).double()

    def error(noise: Tensor) -> float:
        x = process.noised("flow", clean, noise, sigma).double()
        return float((policy.predict(x, level, None, 1.0) - (noise - clean)).square().mean())

    assert error(implied) < 0.4 * error(random)


@pytest.mark.parametrize("name", ["tiny-sd", "tiny-sd3"])
def test_stock_networks_are_inverted_along_their_own_grid(name):
    policy = load_policy(name, device="cpu")
    clean, grid = policy.init_noise([0, 1]) * 0.5, policy.sigmas(16)
    cond = policy.encode(["a red star", "a blue circle"])
    states, nfe = inverted(policy, clean, cond, grid[[8, 12]], grid)
    assert nfe == 8 + 4 and bool(torch.isfinite(states).all())
    back = integrate(policy, states[:1], grid[8:], cond[:1], 1.0)
    far = float((states[:1] - clean[:1]).abs().mean())
    assert float((back - clean[:1]).abs().mean()) < 0.3 * far
