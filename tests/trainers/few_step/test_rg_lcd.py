"""RG-LCD: the loss by hand, the proxy's ranking, what gets a gradient from where, learning."""

from __future__ import annotations

import math

import pytest
import torch
from accelerate import Accelerator
from gaussian_flow import GaussianFlowPolicy
from torch import Tensor

from mmalign.config import ConfigError
from trainers import entry
from trainers.config import ModelConfig, TrainConfig
from trainers.few_step.proxy import PAIRS, preferences, ranking_loss
from trainers.loop import Trainer
from vision_rewards.function import FunctionReward


class Nearness:
    """A differentiable reward: minus the squared distance of a picture's mean to 0.9."""

    def __init__(self, differentiable: bool = True) -> None:
        self.inner = FunctionReward(self.judge, takes="tensor", differentiable=differentiable)
        self.info, self.identity = self.inner.info, "nearness"
        self.score = self.inner.score

    @staticmethod
    def judge(media: Tensor, prompts) -> Tensor:
        return -(media.flatten(1).mean(1) - 0.9).square()


def recipe(kit, folder, algorithm="rg_lcd", **changes) -> TrainConfig:
    values = {
        "algorithm": algorithm, "rollout__kernel": "ode", "forward__draws": 2,
        "forward__guidance_scale": 1.0,
    }  # fmt: skip
    return kit.cheap(folder, **{**values, **changes})


def gaussian(kit, folder, algorithm="rg_lcd", reward=None, trainable=("leap",), **changes):
    changes = {"model": ModelConfig(adapter="full", trainable=trainable), **changes}
    config = recipe(kit, folder, algorithm, **changes)
    judge = reward or Nearness()
    return Trainer(config, GaussianFlowPolicy(), judge, Accelerator(cpu=True), folder)


# --- closed forms ---------------------------------------------------------------------------------


def test_preferences_and_ranking_loss_by_hand():
    expert = torch.tensor([[0.2, 0.1, 0.5], [0.5, 0.4, 0.1]])
    wanted = preferences(expert, 10.0)
    by_hand = [[10 * (row[i] - row[j]) for i, j in PAIRS] for row in expert.tolist()]
    sigmoid = [[1 / (1 + math.exp(-z)) for z in row] for row in by_hand]
    torch.testing.assert_close(wanted, torch.tensor(sigmoid))
    believed = preferences(expert, 10.0, tie_last=0.5)
    assert believed[0].equal(wanted[0]) and believed[1, 0] == wanted[1, 0]  # only the clean one
    torch.testing.assert_close(believed[1, 1:], 0.5 * wanted[1, 1:] + 0.25)
    proxy = torch.tensor([[0.3, -0.2, 0.0]])
    got = ranking_loss(wanted[:1], proxy)
    for n, (i, j) in enumerate(PAIRS):
        p, q = float(wanted[0, n]), 1 / (1 + math.exp(float(proxy[0, j] - proxy[0, i])))
        kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
        assert float(got[0, n]) == pytest.approx(kl, rel=1e-5, abs=1e-7)
    assert ranking_loss(wanted, 10 * expert).abs().max() < 1e-6  # the expert's own order costs 0


def test_without_its_weight_it_is_consistency_distillation_to_the_bit(kit, tmp_path):
    values = []
    for algorithm, objective in (("lcd", {}), ("rg_lcd", {"reward_weight": 0.0})):
        trainer = gaussian(kit, tmp_path, algorithm, objective=objective)
        trainer.train_step()
        metrics = trainer.train_step()
        values.append((metrics["loss"], metrics["grad_norm"], trainer.model.network.leap.item()))
    assert values[0] == values[1]


def test_the_gradient_of_a_direct_reward_by_hand(kit, tmp_path):
    trainer = gaussian(
        kit, tmp_path, objective={"through": "pixels", "reward_weight": 3.0, "clamp": "hard"}
    )
    rollout, _ = trainer.rollouts.sample(0)
    batch, _ = trainer.update.forward.batch(rollout, torch.ones(8), 0)
    loss, metrics = trainer.update.objective.loss(batch)
    plain, target = trainer.update.objective.compared(batch)
    sigma = batch.sigma.view(-1, 1, 1, 1)
    picture = (batch.noised - sigma * batch.velocity).detach()
    torch.testing.assert_close(plain.detach(), picture)
    torch.testing.assert_close(metrics["guided_reward"], -(picture.flatten() - 0.9).square())
    got = torch.autograd.grad(loss.sum(), batch.velocity)[0]
    away = picture - target
    slope = away / (away.square() + 1e-6).sqrt() + 3 * 2 * (picture - 0.9)
    torch.testing.assert_close(got, -sigma * slope, rtol=1e-4, atol=1e-5)


def test_student_and_proxy_learn_apart(kit, tmp_path):
    trainer = gaussian(kit, tmp_path, objective={"proxy": {"updates": 3}})
    proxy = trainer.companion
    for p in proxy.net.parameters():
        p.data.add_(0.05)  # its last layer starts at 0, which would hide a gradient
    rollout, _ = trainer.rollouts.sample(0)
    held = {n: v.clone() for n, v in proxy.net.state_dict().items()}
    trainer.update._accumulate(rollout, torch.ones(8), torch.ones(8, dtype=torch.bool), 8)
    assert all(p.grad is None for p in proxy.net.parameters())
    own = [p.grad.clone() for p in trainer.model.parameters()]
    assert own[0].abs() > 0
    proxy.learn()
    assert all(p.grad.equal(g) for p, g in zip(trainer.model.parameters(), own, strict=True))
    assert any(not v.equal(held[n]) for n, v in proxy.net.state_dict().items())


# --- the run --------------------------------------------------------------------------------------


def test_the_proxy_learns_the_order_of_an_expert_without_gradient(kit, tmp_path):
    options = {"reward_weight": 0.0, "proxy": {"updates": 8, "lr": 0.01, "sharpness": 60.0}}
    trainer = gaussian(
        kit, tmp_path, reward=Nearness(differentiable=False), optim__lr=0.0, objective=options,
        forward__draws=4,
    )  # fmt: skip
    trainer.model.network.leap.data.fill_(1.0)  # a student unlike its target
    agreements = [trainer.train_step()["proxy/agreement"] for _ in range(12)]
    assert sum(agreements[-3:]) / 3 > 0.85 > 0.7 > agreements[0]  # of pictures new to it


@pytest.mark.parametrize("through", ["pixels", "proxy"])
def test_the_reward_rises(kit, tmp_path, through):
    """The mean of the data may move: the reward wants pictures at 0.9, the teacher's are at 0.5."""
    options = {"through": through, "reward_weight": 2.0, "clamp": "hard"}
    options["proxy"] = {"updates": 8, "lr": 0.01, "sharpness": 20.0}
    trainer = gaussian(
        kit, tmp_path, objective=options, trainable=("mean",), optim__lr=0.01, steps=25,
        forward__levels=(0.4, 1.0),
    )  # fmt: skip
    before = float(trainer.model.network.mean.detach())
    trainer.run()
    assert float(trainer.model.network.mean.detach()) > before + 0.05


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective": {"windows": 4}}, "set it to 1"),
        ({"objective": {"reward_weight": -1.0}}, "reward_weight must not be negative"),
        ({"objective": {"through": "pixels"}}, "use clamp: hard"),
        ({"objective": {"proxy": {"tie_last": 2.0}}}, "tie_last must lie in [0, 1]"),
    ],
)
def test_settings_without_a_meaning_are_refused(kit, tmp_path, changes, words):
    with pytest.raises(ConfigError) as caught:
        gaussian(kit, tmp_path, **changes)
    assert words in str(caught.value)


def test_a_reward_without_gradient_is_refused_and_others_are_named(kit, tmp_path):
    options = {"through": "pixels", "clamp": "hard"}
    with pytest.raises(ConfigError, match=r"has none\. Rewards that have: .*shapes_clip"):
        gaussian(kit, tmp_path, reward=Nearness(differentiable=False), objective=options)
    with pytest.raises(ConfigError, match="has none"):
        config = recipe(kit, tmp_path, objective=options)
        entry.build(config, tmp_path, kit.brightness)
