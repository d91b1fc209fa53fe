"""Forward-process objectives on epsilon- and v-prediction models."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from mmalign.config import ConfigError
from mmalign.policies.tiny import tiny_sd
from mmalign.runtime.log import read_jsonl
from trainers import entry
from trainers.config import ForwardConfig, OptimConfig, RolloutConfig, TrainConfig
from trainers.loop import Trainer
from trainers.matching import clean_error, matching_error
from trainers.objective import ForwardBatch
from trainers.reward_weighted import RewardWeighted
from vision_rewards.function import FunctionReward

SIGMA = torch.tensor([0.1, 0.4, 0.6, 0.8, 0.95])
kinds = pytest.mark.parametrize("kind", ["epsilon", "v"])


def by_hand(kind: str, clean: Tensor, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """State and target of a variance-preserving process, written out."""
    signal = (1 - sigma.square()).sqrt()
    noised = signal * clean + sigma * noise
    return noised, noise if kind == "epsilon" else signal * noise - sigma * clean


def batch(kind: str, weight: Tensor) -> ForwardBatch:
    """Five samples of four latents; the prediction is ``weight * noised``."""
    torch.manual_seed(3)
    clean, noise = torch.randn(2, 5, 4).unbind(0)
    noised, _ = by_hand(kind, clean, noise, SIGMA[:, None])
    advantage = torch.tensor([1.0, -0.5, 2.0, 0.3, -1.0])
    return ForwardBatch(
        clean, noise, SIGMA, noised, weight * noised, advantage, {}, parameterisation=kind
    )


@kinds
def test_the_target_is_what_the_clean_latents_are_read_from(kind):
    b = batch(kind, torch.tensor(0.3))
    _, target = by_hand(kind, b.clean, b.noise, SIGMA[:, None])
    torch.testing.assert_close(b.target, target)
    torch.testing.assert_close(b.estimate(b.target), b.clean, rtol=1e-4, atol=1e-5)
    scale = SIGMA.square() / (1 - SIGMA.square()) if kind == "epsilon" else SIGMA.square()
    torch.testing.assert_close(
        clean_error(b, b.velocity, adaptive=False),
        scale.double() * matching_error(b, b.velocity), rtol=1e-4, atol=1e-6,
    )  # fmt: skip


@kinds
def test_gradient_of_weighted_matching_on_a_linear_model(kind):
    weight = torch.tensor(0.3, requires_grad=True)
    b = batch(kind, weight)
    loss, _ = RewardWeighted().loss(b)
    (got,) = torch.autograd.grad(loss.sum(), weight)
    noised, target = by_hand(kind, b.clean, b.noise, SIGMA[:, None])
    slope = (2 * noised * (0.3 * noised - target)).mean(1)
    torch.testing.assert_close(got, (b.advantage * slope).sum())


@kinds
def test_reweighted_optimum_of_a_gaussian(kind):
    """Data N(m, q), reward ``x``: the best linear prediction becomes that of N(m + q / tau, q)."""
    torch.manual_seed(0)
    m, q, tau, s, n = 0.5, 0.49, 0.7, 0.6, 200_000
    a = math.sqrt(1 - s**2)
    clean, noise = m + q**0.5 * torch.randn(n, 1).double(), torch.randn(n, 1).double()
    sigma = torch.full((n,), s, dtype=torch.float64)
    noised, _ = by_hand(kind, clean, noise, sigma[:, None])
    weights = RewardWeighted(temperature=tau).weights(
        clean[:, 0] - m, torch.zeros(n), torch.ones(n, dtype=torch.bool)
    )
    features = torch.cat([noised, torch.ones(n, 1)], 1)
    parameters = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
    b = ForwardBatch(
        clean, noise, sigma, noised, features @ parameters, weights, {}, parameterisation=kind
    )
    loss, _ = RewardWeighted(temperature=tau).loss(b)
    (slope,) = torch.autograd.grad(loss.mean(), parameters, create_graph=True)
    rows = [torch.autograd.grad(g, parameters, retain_graph=True)[0][:, 0] for g in slope[:, 0]]
    found = -torch.linalg.solve(torch.stack(rows), slope.detach())[:, 0]
    # E[eps | x] = s (x - a m') / (a^2 q + s^2), E[x0 | x] = m' + a q (x - a m') / (a^2 q + s^2)
    mean, total = m + q / tau, a**2 * q + s**2
    wanted = torch.tensor([s, -s * a * mean]).double() / total
    if kind == "v":
        data = torch.tensor([a * q / total, mean - a**2 * q * mean / total]).double()
        wanted = a * wanted - s * data
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.02)


# --- levels ---------------------------------------------------------------------------------------


def recipe(kit, folder, algorithm: str, policy: str = "tiny-sd", **changes) -> TrainConfig:
    """The cheap recipe on a UNet, with the deterministic sampler."""
    values = {
        "algorithm": algorithm, "rollout__kernel": "ddim", "rollout__kernel_options": {"eta": 0.0},
        "forward__draws": 2, **changes,
    }  # fmt: skip
    return replace(kit.cheap(folder, **values), policy=policy)


def test_levels_are_those_of_the_models_own_times(kit, tmp_path):
    quantiles = torch.linspace(0, 0.999, 500, dtype=torch.float64)

    def levels(**options):
        config = replace(recipe(kit, tmp_path, "raft"), forward=ForwardConfig(**options))
        trainer = entry.build(config, tmp_path, kit.brightness)
        return trainer.policy, trainer.update.forward.level(quantiles)

    policy, uniform = levels()
    assert policy.times(uniform).tolist() == [int(1000 * q) for q in quantiles]
    _, bounded = levels(levels=(0.5, 0.9))
    within = policy.levels[(policy.levels >= 0.5) & (policy.levels <= 0.9)]
    assert bounded[0] == within[0] and bounded[-1] == within[-1]
    _, normal = levels(times="logit_normal")
    exact = torch.sigmoid(torch.special.ndtri(quantiles[1:]))
    nearest = (exact[:, None] - policy.levels).abs().min(1).values
    torch.testing.assert_close((normal[1:] - exact).abs(), nearest)
    assert torch.isin(normal, policy.levels).all()
    _, grid = levels(times="grid")
    # The last of the sampler's levels is where the picture is, not a time the network is asked at.
    assert grid.unique().flip(0).equal(policy.sigmas(3)[:-1])
    with pytest.raises(ConfigError, match=r"forward.shift is 3.0, but tiny-sd knows only"):
        levels(shift=3.0)


# --- training -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def v_folder(tmp_path_factory):
    """A random pipeline of the Stable Diffusion 2 kind, v-prediction."""
    folder = tmp_path_factory.mktemp("v") / "pipeline"
    tiny_sd(prediction_type="v_prediction").save_pretrained(folder)
    return str(folder)


@kinds
@pytest.mark.parametrize(
    "algorithm", ["raft", "reward_weighted", "diffusion_nft", "awm", "dgpo", "crd"]
)
def test_each_objective_trains_a_stock_unet(kit, tmp_path, v_folder, kind, algorithm):
    policy = "tiny-sd" if kind == "epsilon" else v_folder
    config = recipe(kit, tmp_path, algorithm, policy, optim__lr=1e-3)
    trainer = entry.build(config, tmp_path, kit.brightness)
    assert trainer.policy.parameterisation == kind
    rollout, _ = trainer.rollouts.sample(0)
    drawn, _ = trainer.update.forward.batch(rollout, torch.ones(8), 1)
    sigma = drawn.sigma.reshape(-1, 1, 1, 1)
    noised, target = by_hand(kind, rollout.final.double(), drawn.noise.double(), sigma)
    torch.testing.assert_close(drawn.noised.double(), noised, rtol=0, atol=1e-5)
    torch.testing.assert_close(drawn.target.double(), target, rtol=0, atol=1e-5)
    # The network was asked at the very time of the level.
    asked = trainer.policy.call(
        drawn.noised, trainer.policy.times(drawn.sigma), rollout.conditioning.positive
    )
    torch.testing.assert_close(drawn.velocity, asked)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    metrics = trainer.train_step()
    assert metrics["grad_norm"] > 0 and math.isfinite(metrics["loss"])
    moved = [not p.equal(before[n]) for n, p in trainer.model.named_parameters()]
    assert all(moved)


def test_flow_draws_are_those_of_the_straight_path_to_the_last_bit(kit, tmp_path):
    config = kit.cheap(tmp_path, algorithm="diffusion_nft", rollout__kernel="ode")
    trainer = entry.build(config, tmp_path, kit.brightness)
    rollout, _ = trainer.rollouts.sample(0)
    b, _ = trainer.update.forward.batch(rollout, torch.ones(8), 0)
    level = b.sigma.reshape(-1, 1, 1, 1)
    assert b.sigma.dtype == torch.float32
    assert b.noised.equal((1 - level) * rollout.final + level * b.noise)
    assert b.target.equal(b.noise - rollout.final)
    double = b.velocity.double()
    assert b.estimate(double).equal(b.noised.double() - level.double() * double)


OPTIONS = {
    ("raft", "epsilon"): {},
    ("diffusion_nft", "epsilon"): {"strength": 0.2, "kl_beta": 0.0, "advantage_max": 2.0},
    ("dgpo", "epsilon"): {"kl_beta": 0.0},
    ("reward_weighted", "v"): {"temperature": 0.5},
    ("awm", "v"): {"error": "plain", "advantage_max": 1.0, "kl_beta": 0.0, "average_beta": 0.1},
    ("crd", "v"): {"strength": 0.2, "kl_beta": 0.0, "kl_least": 0.0, "advantage_max": 2.0},
}


@pytest.mark.parametrize(("algorithm", "kind"), OPTIONS)
def test_reward_rises_on_a_bandit(kit, tmp_path, algorithm, kind):
    class Bandit(kit.LinePolicy):
        parameterisation = kind

        def sigmas(self, steps: int) -> Tensor:
            return torch.linspace(0.95, 0.05, steps + 1, dtype=torch.float64)

    config = TrainConfig(
        policy="line", algorithm=algorithm, steps=40, prompts_per_step=4, images_per_prompt=8,
        save_every=1000, objective=OPTIONS[algorithm, kind], model=kit.cheap(tmp_path).model,
        rollout=RolloutConfig(
            steps=4, guidance_scale=1.0, kernel="ddim", kernel_options={"eta": 0.0}
        ),
        forward=ForwardConfig(levels=(0.05, 0.95)),
        optim=OptimConfig(lr=0.05, weight_decay=0.0),
    )  # fmt: skip

    def near_two(media, prompts):
        return -(media.flatten(1).mean(1) - 2).square()

    reward = FunctionReward(near_two, takes="tensor")
    policy = Bandit(slope=0.7 if kind == "epsilon" else 0.0)
    Trainer(config, policy, reward, Accelerator(cpu=True), tmp_path).run()
    rewards = [r["reward/mean"] for r in read_jsonl(tmp_path / "metrics.jsonl")]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 1.0
