"""VGPO's weights and anchor, TurningPoint-GRPO's credit: hand-made values, closed forms."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from mmalign.config import ConfigError
from mmalign.types import Score
from trainers.advantages import group_advantage
from trainers.config import AdvantageConfig
from trainers.credit import Credit, History
from trainers.loop import Trainer
from trainers.objective import build_objective
from trainers.turning_point_grpo import TurningPointGrpo, balanced, turning_points
from trainers.vgpo import Vgpo
from vision_rewards.function import FunctionReward


def credit(values, final=None, **changes) -> Credit:
    """Evidence of samples of two prompts with these values of their states."""
    values = torch.tensor(values)
    final = values[:, -1] if final is None else torch.tensor(final)
    rows, steps = len(values), values.shape[1] - 1
    groups = torch.arange(rows) // max(rows // 2, 1)
    known = torch.ones(rows, dtype=torch.bool)
    fields = {
        "score": Score(final, known),
        "groups": groups,
        "outcome": group_advantage(final, known, groups),
        "steps": tuple(range(steps)),
        "options": AdvantageConfig(),
        "values": values,
        "valid": torch.ones_like(values, dtype=torch.bool),
        "lowest": 0.0,
        "history": (0.5, 0.25),
    }
    return Credit(**{**fields, **changes})


# --- VGPO -----------------------------------------------------------------------------------------


def test_weights_are_discounted_values_over_their_mean():
    values = torch.tensor([[0.4, 0.2, 0.6]])
    got = Vgpo(gamma=0.5).weights(values, values > 0, 0.0)
    q = torch.tensor([[0.4 + 0.5 * (0.2 + 0.5 * 0.6), 0.2 + 0.5 * 0.6, 0.6]])
    torch.testing.assert_close(got, q / q.mean())
    torch.testing.assert_close(got.mean(1), torch.ones(1))
    shifted = Vgpo(gamma=0.5).weights(values - 3.0, values > 0, -3.0)
    torch.testing.assert_close(shifted, got)


def test_equal_values_without_discount_and_anchor_are_grpo():
    seen = credit([[0.9, 0.3, 0.3, 0.3], [0.1, 0.7, 0.7, 0.7]] * 2)
    got = Vgpo(gamma=0.0, absolute=0.0).advantage(seen)
    assert seen.outcome.abs().max() > 0.5
    torch.testing.assert_close(got, seen.outcome[:, None].expand(4, 3))


def test_groups_without_spread_are_pushed_by_the_anchor():
    """One group is equally good, the other equally bad; nothing to compare within either."""
    seen = credit([[0.1, 0.5, 0.9]] * 2 + [[0.1, 0.5, 0.2]] * 2)
    assert not seen.outcome.any()
    got = Vgpo(absolute=0.4, gamma=0.0).advantage(seen)
    wanted = 0.4 * (torch.tensor([0.9, 0.9, 0.2, 0.2]) - 0.5) / (0.25 + 1e-4)
    torch.testing.assert_close(got.mean(1), wanted)
    assert (got[:2] > 0).all() and (got[2:] < 0).all()
    # A spread that vanishes must not blow the relative term up.
    for spread in (1e-3, 1e-5, 1e-7):
        near = credit([[0.1, 0.5, 0.9], [0.1, 0.5, 0.9 + spread]] * 2)
        assert Vgpo(absolute=0.0).advantage(near).abs().max() < 2.5


def test_unscored_states_weigh_one_and_unscored_samples_nothing():
    seen = credit([[0.1, 0.5, 0.9], [0.3, 0.2, 0.4]] * 2)
    valid = torch.ones_like(seen.valid)
    valid[0, 1] = False
    known = torch.tensor([True, True, True, False])
    score = Score(torch.where(known, seen.score.value, torch.nan), known)
    outcome = group_advantage(score.value, known, seen.groups)
    got = Vgpo(absolute=0.5).advantage(replace(seen, valid=valid, score=score, outcome=outcome))
    assert got[0, 0] == got[0, 1] and got[1, 0] != got[1, 1]
    assert not got[3].any() and torch.isfinite(got).all()


def test_history_is_a_moving_mean_and_deviation_that_resumes():
    history = History(decay=0.75)
    known = torch.tensor([True, True, False])
    first = history(Score(torch.tensor([1.0, 3.0, torch.nan]), known))
    assert first == pytest.approx((2.0, 1.0))
    again = History(decay=0.75)
    again.load_state_dict(history.state_dict())
    for h in (history, again):
        mean, deviation = h(Score(torch.tensor([6.0, 6.0, 0.0]), known))
        assert mean == pytest.approx(0.75 * 2 + 0.25 * 6)
        assert deviation == pytest.approx((0.75 * 5 + 0.25 * 36 - mean**2) ** 0.5)
    assert history(Score(torch.zeros(3), ~known & False))[0] == pytest.approx(mean)


def test_a_reward_without_a_lower_end_is_refused(kit, tmp_path):
    config = kit.cheap(tmp_path, algorithm="vgpo")
    with pytest.raises(ConfigError, match="compose: sigmoid or rank, or use dense_grpo"):
        Trainer(config, kit.LinePolicy(), kit.brightness, Accelerator(cpu=True), tmp_path)
    for options in ({"gamma": 1.5}, {"absolute": -0.1}, {"completion_steps": -2}):
        (name,) = options
        with pytest.raises(ConfigError, match=f"objective: {name} must"):
            build_objective("vgpo", options)


def bounded(media, prompts):
    """Brightness through a sigmoid: between 0 and 1."""
    return torch.sigmoid(media.flatten(1).mean(1))


def test_resumed_vgpo_is_the_run_never_stopped(kit, tmp_path):
    reward = FunctionReward(bounded, takes="tensor", range=(0.0, 1.0))

    def run(folder, steps):
        config = kit.cheap(
            folder, algorithm="vgpo", steps=steps, save_every=2, rollout__steps=4,
            optim__lr=0.05, objective={"clip_range": 0.2},
        )  # fmt: skip
        trainer = Trainer(config, kit.LinePolicy(), reward, Accelerator(cpu=True), folder)
        trainer.resume()
        trainer.run()
        return trainer

    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "parts", 2)
    again = run(tmp_path / "parts", 4)
    assert again.history.state_dict() == whole.history.state_dict()
    assert again.history.mean not in (None, 0.0)
    for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert a.equal(b)


# --- TurningPoint-GRPO ----------------------------------------------------------------------------


def test_the_worked_example():
    values, final = torch.tensor([[0.5, 0.4, 0.6, 0.7]]), torch.tensor([0.7])
    points, credits = turning_points(values, final)
    assert points.tolist() == [[False, True, False]]
    assert credits[0, 1] == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("values", "final", "turns"),
    [
        ([0.5, 0.6, 0.7, 0.9], 0.9, [0]),  # always upwards: the first step began it
        ([0.5, 0.4, 0.3, 0.2], 0.2, [0]),  # always downwards, likewise
        ([0.5, 0.4, 0.8, 0.7], 0.7, []),  # turned, but what followed went the other way
        ([0.5, 0.6, 0.4, 0.3], 0.3, [1]),  # turned down for good
        ([0.5, 0.5, 0.6, 0.7], 0.7, []),  # a step that did nothing is no wrong step
        ([0.5, 0.4, 0.6, 0.5], 0.5, []),  # nothing came of it on the whole
        ([0.5, 0.4, torch.nan, 0.7], 0.7, []),
    ],
)
def test_where_trajectories_turn(values, final, turns):
    points, _ = turning_points(torch.tensor([values]), torch.tensor([final]))
    assert torch.nonzero(points[0]).flatten().tolist() == turns


def test_as_many_raises_as_losses_are_kept():
    points = torch.tensor([[True, True, False], [True, False, True], [False, True, False]])
    credits = torch.tensor([[0.1, 0.5, 9.0], [-0.2, -9.0, 0.3], [9.0, -0.4, 0.0]])
    kept = balanced(points, credits)
    assert kept.tolist() == [[False, True, False], [True, False, True], [False, True, False]]
    assert not balanced(points, credits.abs()).any()


def test_without_turning_points_credit_is_dense():
    values = [[0.5, 0.5, 0.6, 0.7], [0.2, 0.4, 0.3, 0.1]] * 2
    seen = credit(values)
    gains, valid = seen.gains()
    torch.testing.assert_close(gains.sum(1), seen.values[:, -1] - seen.values[:, 0])
    points, credits = turning_points(seen.values, seen.score.value)
    assert points.any()
    free = TurningPointGrpo(balance=False).advantage(seen)
    rewards = torch.where(points, credits, gains)
    for k in range(3):
        wanted = group_advantage(rewards[:, k], valid[:, k], seen.groups)
        torch.testing.assert_close(free[:, k], wanted)
    # Both turning points are losses, so balance keeps neither: gains alone are left.
    dense = TurningPointGrpo().advantage(seen)
    for k in range(3):
        torch.testing.assert_close(
            dense[:, k], group_advantage(gains[:, k], valid[:, k], seen.groups)
        )
