"""R0: normalised gradients, random noise, distance to the start, learning."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from gaussian_flow import MEAN, GaussianFlowPolicy
from torch import Tensor

from mmalign.config import ConfigError
from mmalign.policies.sd import SDPolicy
from mmalign.policies.tiny import tiny_sd
from mmalign.sampling import CpsKernel, DdimKernel, OdeKernel
from mmalign.sampling.eta import EtaKernel
from trainers import entry
from trainers.config import ModelConfig, TrainConfig
from trainers.few_step.r0 import R0, uphill
from trainers.loop import Trainer
from trainers.model import TrainableModel
from vision_rewards.compositions.combine import WeightedSum
from vision_rewards.function import FunctionReward
from vision_rewards.guard import GuardedReward


def bright(media: Tensor, prompts) -> Tensor:
    return media.flatten(1).mean(1)


def even(media: Tensor, prompts) -> Tensor:
    return -media.flatten(1).var(1)


def reward_of(function, name: str) -> FunctionReward:
    return FunctionReward(function, name, takes="tensor", differentiable=True)


def both(scale: float = 1.0) -> GuardedReward:
    """Two rewards, of which the second may have another scale."""
    louder = reward_of(lambda m, p: scale * even(m, p), "even")
    return GuardedReward(
        WeightedSum({"bright": (reward_of(bright, "bright"), 2.0), "even": (louder, 1.0)})
    )


def recipe(kit, folder, **changes) -> TrainConfig:
    values = {"algorithm": "r0", "rollout__kernel": "ode", "objective": {"clamp": "hard"}}
    return kit.cheap(folder, **{**values, **changes})


def gaussian(kit, folder, reward=None, **changes) -> Trainer:
    changes = {"model": ModelConfig(adapter="full", trainable=("mean",)), **changes}
    config = recipe(kit, folder, **changes)
    judge = reward or GuardedReward(reward_of(bright, "bright"))
    return Trainer(config, GaussianFlowPolicy(), judge, Accelerator(cpu=True), folder)


# --- closed forms ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flow", "epsilon", "v"])
def test_a_share_of_noise_for_each_sample(kind):
    torch.manual_seed(0)
    x, said, noise = torch.randn(3, 3, 2, 4, 4)
    sigma, after, eta = torch.tensor(0.8), torch.tensor(0.5), torch.tensor([0.0, 0.4, 1.0])
    got = EtaKernel(eta=eta).bound(kind).step(x, sigma, after, said, noise)
    for row, share in enumerate(eta.tolist()):
        part = (t[row : row + 1] for t in (x, said, noise))
        one, prediction, drawn = part
        if kind == "flow":
            kernel = CpsKernel(noise_level=share) if share else OdeKernel()
        else:
            kernel = DdimKernel(eta=share).bound(kind)
        wanted = kernel.step(one, sigma, after, prediction, drawn)
        torch.testing.assert_close(got.x_next[row : row + 1], wanted.x_next, rtol=1e-4, atol=1e-5)


def test_each_rewards_gradient_has_length_one_and_its_weight():
    torch.manual_seed(0)
    pixels = torch.rand(3, 3, 4, 4)
    score, slope = uphill(both(), pixels.clone(), [""] * 3, True)
    mean = torch.full_like(pixels, 1 / 48)
    flat = pixels.flatten(1)
    spread = -2 * (flat - flat.mean(1, keepdim=True)) / 47
    wanted = 2 * mean.flatten(1) / mean[0].norm() + spread / spread.norm(dim=1, keepdim=True)
    torch.testing.assert_close(slope.flatten(1), wanted)
    torch.testing.assert_close(score.value, 2 * flat.mean(1) - flat.var(1))
    assert score.parts.keys() == {"bright", "even"}
    _, again = uphill(both(1000.0), pixels.clone(), [""] * 3, True)
    torch.testing.assert_close(again, slope)  # a reward a thousand times as large changes nothing
    assert not torch.allclose(uphill(both(1000.0), pixels.clone(), [""] * 3, False)[1], slope)


def test_a_sample_that_a_part_does_not_score_has_no_gradient():
    def spotty(media: Tensor, prompts) -> Tensor:
        value = bright(media, prompts)
        return torch.where(torch.tensor([True, False, True]), value, torch.nan)

    whole = GuardedReward(
        WeightedSum(
            {
                "bright": (reward_of(bright, "bright"), 1.0),
                "spotty": (reward_of(spotty, "spotty"), 1.0),
            }
        )
    )
    score, slope = uphill(whole, torch.rand(3, 3, 4, 4), [""] * 3, True)
    assert score.valid.tolist() == [True, False, True]
    assert slope[1].eq(0).all() and slope[0].abs().sum() > 0


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_displacement_is_the_distance_of_the_networks_weights(adapter):
    config = ModelConfig(adapter=adapter, lora_rank=3, lora_alpha=6, lora_targets=("to_q", "to_v"))
    policy = SDPolicy(tiny_sd())
    model = TrainableModel(policy, config, needs_reference=True)
    assert float(model.displacement().detach()) == 0
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    if adapter == "full":
        frozen = dict(model._frozen.named_parameters())
        wanted = sum((p - frozen[n]).square().sum() for n, p in model.named_parameters())
    else:
        layers = [m for m in model.network.modules() if hasattr(m, "get_delta_weight")]
        wanted = sum(m.get_delta_weight("default").square().sum() for m in layers)
        assert len(layers) > 2
    torch.testing.assert_close(model.displacement(), wanted, rtol=1e-4, atol=1e-6)
    model.displacement().backward()
    assert all(p.grad is not None for p in model.parameters())


# --- the run --------------------------------------------------------------------------------------


def test_noise_is_the_samples_own_and_none_at_eta_0(kit, tmp_path):
    seeds = (5, 6, 7)
    kernel = R0(eta=(0.2, 0.6)).kernel(seeds)
    assert kernel.eta.unique().numel() == 3 and ((kernel.eta >= 0.2) & (kernel.eta <= 0.6)).all()
    assert R0(eta=(0.2, 0.6)).kernel((7, 5)).eta.equal(kernel.eta[[2, 0]])
    pictures = []
    for eta in ([0.0, 0.0], [1.0, 1.0]):
        trainer = gaussian(kit, tmp_path, objective={"clamp": "hard", "eta": eta})
        rollout, _ = trainer.rollouts.sample(0)
        path = trainer.update.path(rollout)
        chain = trainer.update._chain(rollout, path)
        predict = trainer.update._predict(rollout)
        start = trainer.update._start(rollout, path, predict)
        pictures.append(trainer.update._run(predict, start, chain, path).clean.detach())
    unit = trainer.policy.init_noise(rollout.seeds)
    x = unit
    for k in range(3):
        sigma, after = (trainer.policy.sigmas(3)[i] for i in (k, k + 1))
        with torch.no_grad():
            x = x + (after - sigma) * trainer.policy.predict(x, sigma, rollout.conditioning, 1.0)
    torch.testing.assert_close(pictures[0], x)
    assert not torch.allclose(pictures[1], x)


def test_the_weight_holds_the_model_where_it_was(kit, tmp_path):
    moved = []
    for beta in (0.0, 1.0, 1e4):
        options = {"clamp": "hard", "weight_beta": beta, "eta": [0.0, 0.0]}
        trainer = gaussian(kit, tmp_path, objective=options, optim__lr=0.01, optim__grad_clip=0.0)
        for _ in range(25):
            metrics = trainer.train_step()
        moved.append(abs(trainer.model.network.mean.item() - MEAN))
        assert ("weight_distance" in metrics) == (beta > 0)
    assert moved[0] > 0.15 and moved[2] < 0.02 and moved[2] < moved[1] <= moved[0]


def test_the_weights_own_term_is_there_once_whoever_is_scored(kit, tmp_path):
    def spotty(media: Tensor, prompts) -> Tensor:
        return torch.where(torch.arange(len(media)) % 2 == 0, bright(media, prompts), torch.nan)

    found = []
    for beta in (0.0, 2.0):
        options = {"clamp": "hard", "weight_beta": beta}
        reward = GuardedReward(reward_of(spotty, "spotty"))
        trainer = gaussian(kit, tmp_path, reward=reward, objective=options)
        trainer.model.network.mean.data.add_(0.3)
        rollout, _ = trainer.rollouts.sample(0)
        trainer.update._accumulate(rollout, torch.ones(8), torch.ones(8, dtype=torch.bool), 8)
        assert trainer.update._factor == 2  # half of the samples are scored
        found.append(trainer.update._factor * trainer.model.network.mean.grad)
    assert float(found[1] - found[0]) == pytest.approx(2 * 2.0 * 0.3, rel=1e-4)


@pytest.mark.parametrize("plus", [False, True])
def test_the_reward_rises(kit, tmp_path, plus):
    options = {"clamp": "hard", "on_the_way": plus, "weight_beta": 0.0}
    trainer = gaussian(kit, tmp_path, objective=options, optim__lr=0.02)
    rewards = [trainer.train_step()["reward/mean"] for _ in range(15)]
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 0.5
    if plus:
        lengths = {len(R0(on_the_way=True).path(4, rng).switches) for rng in _generators()}
        assert lengths == {1, 2, 3, 4}


def test_a_generator_of_one_step_learns(kit, tmp_path):
    trainer = gaussian(kit, tmp_path, rollout__steps=1, optim__lr=0.02)
    assert len(trainer.policy.sigmas(1)) == 2
    found = [trainer.train_step() for _ in range(10)]
    assert found[-1]["reward/mean"] > found[0]["reward/mean"] + 0.1
    each = found[0]["images"]
    assert found[0]["nfe"] == 2 * each  # the one evaluation, made again for the backward pass


def _generators():
    from random import Random

    return [Random(n) for n in range(40)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rollout__kernel": "cps"}, "draws its noise by objective.eta"),
        ({"objective": {"eta": [0.5, 1.2]}}, "eta must be two rising numbers"),
        ({"objective": {"margin": 1.0}}, "set normalise to false"),
        ({"objective": {"weight_beta": -1.0}}, "weight_beta is -1.0"),
    ],
)
def test_settings_without_a_meaning_are_refused(kit, tmp_path, changes, words):
    with pytest.raises(ConfigError) as caught:
        gaussian(kit, tmp_path, **changes)
    assert words in str(caught.value)


def test_a_reward_without_gradient_is_refused(kit, tmp_path):
    with pytest.raises(ConfigError, match="has none"):
        entry.build(recipe(kit, tmp_path), tmp_path, kit.brightness)
