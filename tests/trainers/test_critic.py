"""The critic: what it sees, when it learns, and that it says what reward to expect."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from mmalign.config import ConfigError
from mmalign.runtime.log import read_jsonl
from mmalign.types import Conditioning, Score
from trainers import entry
from trainers.config import AdvantageConfig
from trainers.critic import CriticConfig, ValueNet, prompt_summary, states_of
from trainers.loop import Trainer
from vision_rewards.function import FunctionReward

DPOK = {"critic": {"updates": 30, "lr": 3e-3}}


def line(kit, folder, algorithm: str = "dpok", objective=None, **changes) -> Trainer:
    """A trainer of two parameters, with a critic."""
    changes = {"images_per_prompt": 16, "rollout__steps": 4, **changes}
    config = kit.cheap(folder, objective=DPOK if objective is None else objective, **changes)
    config = replace(config, algorithm=algorithm)
    return Trainer(config, kit.LinePolicy(), kit.brightness, Accelerator(cpu=True), folder)


def scored(values: torch.Tensor, unscored: int = 0) -> Score:
    values = values.clone()
    values[:unscored] = torch.nan
    return Score.of(values)


# --- the network ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 16, 16), (3, 9, 5), (4, 3, 8, 8), (8, 20)])
def test_network_takes_latents_of_any_shape_and_expects_nothing_at_first(shape):
    net = ValueNet(torch.Size(shape), 6, 8)
    x, prompt = torch.randn(3, *shape), torch.randn(3, 6)
    assert net(x, torch.rand(3), prompt).equal(torch.zeros(3))
    torch.nn.init.normal_(net.value[-1].weight)
    values = net(x, torch.tensor([0.2, 0.2, 0.9]), prompt)
    assert values.shape == (3,)
    assert not torch.allclose(net(x, torch.full((3,), 0.2), prompt)[2], values[2])  # level
    assert not torch.allclose(net(x, torch.tensor([0.2, 0.2, 0.9]), -prompt), values)  # prompt
    assert sum(p.numel() for p in net.parameters()) < 10_000


def test_prompts_are_summed_up_by_the_pooled_embedding_or_the_mean_token():
    tokens, pooled = torch.randn(2, 5, 3), torch.randn(2, 4)
    assert prompt_summary(Conditioning({"embeds": tokens, "pooled": pooled})).equal(pooled)
    torch.testing.assert_close(prompt_summary(Conditioning({"embeds": tokens})), tokens.mean(1))


# --- rewards and states ---------------------------------------------------------------------------


def test_rewards_are_normalised_clipped_and_masked(kit, tmp_path):
    objective = {"critic": {"reward_clip": 1.5}}
    trainer = line(kit, tmp_path, objective=objective, images_per_prompt=4)
    rollout, _ = trainer.rollouts.sample(0)
    values = torch.tensor([9.0, 1, 2, 3, 4, 5, 6, 30])
    shaped, expected = trainer.critic(rollout, scored(values, 1))
    assert shaped[0] == 0 and shaped[-1] == 1.5 and expected.shape == (8, 3)
    known = values[1:].double()
    wanted = ((known - known.mean()) / (known.std(unbiased=False) + 1e-4)).clamp(-1.5, 1.5)
    torch.testing.assert_close(shaped[1:], wanted.float(), rtol=1e-5, atol=1e-5)
    # Neither scale nor offset of a reward says anything.
    other = line(kit, tmp_path, objective=objective, images_per_prompt=4)
    scaled, _ = other.critic(rollout, scored(100 * values - 7, 1))
    torch.testing.assert_close(scaled, shaped, rtol=1e-3, atol=1e-3)


def test_states_are_those_that_the_update_sees(kit, tmp_path):
    reverse = line(kit, tmp_path)
    rollout, _ = reverse.rollouts.sample(0)
    states, levels = states_of(rollout, None)
    assert states.equal(rollout.latents) and levels[5].equal(torch.tensor([1.0, 0.75, 0.5]))
    forward = line(kit, tmp_path, "ac_flow", {}, forward__draws=2)
    rollout, _ = forward.rollouts.sample(0)
    states, levels = states_of(rollout, forward.update.forward)
    for k in range(2):
        batch, _ = forward.update.forward.batch(rollout, torch.ones(32), k)
        assert batch.noised.equal(states[:, k]) and batch.sigma.equal(levels[:, k])


def test_a_rollout_is_judged_before_it_is_learned_from(kit, tmp_path):
    """What the critic says of a rollout does not depend on that rollout's rewards."""
    found = []
    for sign in (1.0, -1.0):
        trainer = line(kit, tmp_path)
        rollout, _ = trainer.rollouts.sample(0)
        _, first = trainer.critic(rollout, scored(torch.arange(32.0)))
        again, _ = trainer.rollouts.sample(1)
        found.append(trainer.critic(again, scored(sign * torch.arange(32.0)))[1])
        assert not first.any() and found[-1].abs().max() > 0.05
    assert found[0].equal(found[1])


def test_unscored_samples_teach_nothing(kit, tmp_path):
    trainers = [line(kit, tmp_path) for _ in range(2)]
    rollout, _ = trainers[0].rollouts.sample(0)
    other = replace(rollout, latents=rollout.latents.clone())
    other.latents[:4] += 3
    for trainer, seen in zip(trainers, (rollout, other), strict=True):
        trainer.critic(seen, scored(torch.arange(32.0), 4))
    one, two = (dict(t.critic.net.named_parameters()) for t in trainers)
    assert all(p.equal(two[n]) for n, p in one.items())
    # And where nothing is scored, nothing changes.
    trainers[0].critic(rollout, scored(torch.zeros(32), 32))
    assert all(p.equal(two[n]) for n, p in one.items())


def test_critic_leaves_the_runs_random_numbers_alone(kit, tmp_path):
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    first = line(kit, tmp_path)
    rollout, _ = first.rollouts.sample(0)
    first.critic(rollout, scored(torch.arange(32.0)))
    assert torch.rand(4).equal(wanted)
    second = line(kit, tmp_path)  # from another random state
    fresh = line(kit, tmp_path, seed=1)
    third = line(kit, tmp_path)
    pairs = zip(second.critic.net.parameters(), third.critic.net.parameters(), strict=True)
    same = [a.equal(b) for a, b in pairs]
    assert all(same)
    assert not fresh.critic.net.look[0].weight.equal(second.critic.net.look[0].weight)


# --- learning -------------------------------------------------------------------------------------


def test_later_states_tell_more_of_the_reward(kit, tmp_path):
    """With noise at every step, the picture's brightness is decided little by little."""
    trainer = line(kit, tmp_path, rollout__kernel_options={"noise_level": 0.5})
    for step in range(25):
        rollout, _ = trainer.rollouts.sample(step)
        score, _ = trainer.rollouts.score(rollout)
        shaped, expected = trainer.critic(rollout, score)
    left = (shaped[:, None] - expected).var(0) / shaped.var()
    assert left[2] < 0.5 and left[2] < left[1] < left[0]


def test_critic_tells_prompts_apart(kit, tmp_path):
    """A reward of the prompt alone is explained after a few rollouts."""

    def stars(media, prompts):
        return torch.tensor([float("star" in p) for p in prompts]) + 0.01 * media.flatten(1).mean(1)

    file = tmp_path / "prompts.txt"
    file.write_text("a photo of a red star\na photo of two circles\n")
    config = kit.cheap(tmp_path / "run", objective=DPOK, steps=6, prompts__source=str(file))
    reward = FunctionReward(stars, takes="tensor")
    folder = entry.train(replace(config, algorithm="dpok"), reward=reward)
    log = read_jsonl(folder / "metrics.jsonl")
    assert log[0]["critic/explained"] == pytest.approx(0, abs=1e-6)
    assert log[-1]["critic/explained"] > 0.9 and log[-1]["critic/error"] < 0.1 < 0.9 < log[0][
        "critic/error"
    ]  # fmt: skip


# --- what it does not go with ---------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"std": "group"}, {"baseline": "tracker"}])
def test_settings_of_group_advantages_are_refused(kit, tmp_path, changes):
    with pytest.raises(ConfigError, match="with a critic"):
        line(kit, tmp_path, advantage=AdvantageConfig(**changes))
    line(kit, tmp_path, objective={}, advantage=AdvantageConfig(**changes))  # fine without one


@pytest.mark.parametrize(
    "options", [{"lr": 0.0}, {"width": 0}, {"updates": 0}, {"reward_clip": 0.0}]
)
def test_impossible_options_are_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} must be positive"):
        CriticConfig(**options)
