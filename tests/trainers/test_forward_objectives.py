"""The mathematics of the forward-process objectives, against closed forms."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from mmalign.config import ConfigError
from trainers import entry
from trainers.ac_flow import AcFlow
from trainers.awm import Awm
from trainers.config import Decay
from trainers.crd import Crd
from trainers.dgpo import Dgpo
from trainers.diffusion_nft import DiffusionNft, optimality
from trainers.matching import clean_error, distance, matching_error, weighed
from trainers.objective import ForwardBatch, build_objective
from trainers.reward_weighted import Raft, RewardWeighted

ADVANTAGE = torch.tensor([1.5, -2.0, 0.5, 0.0, -1.0, 1.0])  # sums to 0 in each half
ALL = torch.ones(6, dtype=torch.bool)


def batch(same: bool = False, **changes) -> ForwardBatch:
    """Six samples of six latents; ``same`` makes all versions of the weights agree."""
    torch.manual_seed(4)
    clean, noise, velocity = torch.randn(3, 6, 1, 2, 3).unbind(0)
    sigma = torch.tensor([0.1, 0.3, 0.5, 0.6, 0.8, 1.0])
    level = sigma.reshape(-1, 1, 1, 1)
    others = {n: torch.randn_like(velocity) for n in ("old", "reference", "average")}
    values = {
        "clean": clean, "noise": noise, "sigma": sigma,
        "noised": (1 - level) * clean + level * noise, "velocity": velocity.requires_grad_(),
        "advantage": ADVANTAGE,
        "others": {n: velocity.detach() for n in others} if same else others,
    }  # fmt: skip
    return ForwardBatch(**{**values, **changes})


def gradient(loss: torch.Tensor, b: ForwardBatch) -> torch.Tensor:
    """Gradient of a sum of per-sample losses on the velocity, sample by sample."""
    return torch.autograd.grad(loss.sum(), b.velocity, retain_graph=True)[0]


def per_sample(values: torch.Tensor) -> torch.Tensor:
    """``(b,)`` shaped to weigh latents."""
    return values.float().reshape(-1, 1, 1, 1)


# --- errors ---------------------------------------------------------------------------------------


def test_the_clean_error_is_the_matching_error_times_the_level_squared():
    b = batch()
    plain = clean_error(b, b.velocity, adaptive=False)
    torch.testing.assert_close(plain, b.sigma.double() ** 2 * matching_error(b, b.velocity))
    by_hand = (b.noised - b.level * b.velocity - b.clean).flatten(1)
    wanted = by_hand.square().mean(1) / by_hand.abs().mean(1)
    torch.testing.assert_close(clean_error(b, b.velocity).float(), wanted)
    # The divisor is held constant: the gradient is that of the numerator alone.
    got = gradient(clean_error(b, b.velocity), b)
    torch.testing.assert_close(
        got, gradient(plain / by_hand.abs().mean(1).detach(), b), rtol=1e-4, atol=1e-6
    )


def test_forms_of_the_error():
    error, sigma = torch.tensor([0.0, 0.5, 4.0]).double(), torch.tensor([0.5, 0.2, 1.0])
    forms = {f: weighed(error, sigma, f) for f in ("plain", "sigma", "sigma2", "huber", "ghuber")}
    torch.testing.assert_close(forms["sigma2"], sigma.double() ** 2 * error)
    torch.testing.assert_close(forms["sigma"], sigma.double() * forms["plain"])
    assert all(value[0] == 0 for value in forms.values())
    c = 0.01**0.5
    assert float(forms["huber"][2]) == pytest.approx((4 + c**2) ** 0.5 - c)
    assert float(forms["ghuber"][2]) == pytest.approx(4 * (4**0.25 - 1e-10**0.25), rel=1e-6)


# --- weighted matching ----------------------------------------------------------------------------

GROUPS = torch.tensor([4, 4, 4, 9, 9, 9])


def test_raft_keeps_the_best_of_each_group_with_mean_weight_one():
    advantage = torch.tensor([0.2, 1.0, -1.2, 0.5, 0.5, -1.0])
    got = Raft().weights(advantage, GROUPS, ALL)
    assert got.tolist() == [0, 3, 0, 1.5, 1.5, 0]  # a tie keeps both
    assert Raft(top=2).weights(advantage, GROUPS, ALL).tolist() == [1.5, 1.5, 0, 1.5, 1.5, 0]
    assert Raft(top=9).weights(advantage, GROUPS, ALL).tolist() == [1.0] * 6


@pytest.mark.parametrize("objective", [Raft(), RewardWeighted()])
def test_flat_groups_and_unscored_samples_get_no_weight(objective):
    advantage = torch.tensor([0.1, 0.1, 0.1, -1.0, -2.0, 0.0])
    valid = torch.tensor([True, True, True, True, True, False])
    got = objective.weights(advantage, GROUPS, valid)
    assert not got[:3].any() and got[5] == 0  # the 0 of an unscored sample is not the best
    assert got[3] > got[4] and float(got[3] + got[4]) == pytest.approx(2)


def test_exponential_weights_are_a_softmax_of_the_reward():
    reward = torch.tensor([1.0, 2.0, 4.0, 0.0, 0.3, 0.9])
    centred = reward - torch.tensor([7 / 3] * 3 + [0.4] * 3)
    got = RewardWeighted(temperature=0.5).weights(centred, GROUPS, ALL)
    raw = (reward / 0.5).exp()
    wanted = torch.cat([3 * raw[:3] / raw[:3].sum(), 3 * raw[3:] / raw[3:].sum()])
    torch.testing.assert_close(got, wanted)


def test_samples_below_the_floor_are_left_out():
    """Weights of a group keep mean 1; those of 0 make no pass, the W2 term's included."""
    rewards = torch.tensor([0.0, 1.0, 1.2, 0.9])
    groups, valid = torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.bool)
    whole = RewardWeighted(temperature=0.2).weights(rewards, groups, valid)
    kept = RewardWeighted(temperature=0.2, floor=0.7).weights(rewards, groups, valid)
    assert whole.min() > 0 and kept.tolist()[0] == 0 and kept[3] == 0
    torch.testing.assert_close(kept[1:3], whole[1:3] * 4 / whole[1:3].sum())
    assert RewardWeighted(w2_beta=0.3, floor=0.1).zero_without_advantage
    assert not RewardWeighted(w2_beta=0.3).zero_without_advantage
    with pytest.raises(ConfigError, match="floor is 1"):
        RewardWeighted(floor=1.0)
    judged = AcFlow(temperature=0.5, floor=0.5).weights(torch.tensor([[0.0, -1.0]]), groups[:1],
                                                        valid[:1])  # fmt: skip
    assert judged.tolist() == [[1.0, 0.0]]


def test_weighted_matching_gradient():
    b = batch()
    loss, metrics = RewardWeighted(w2_beta=0.3).loss(b)
    error = matching_error(b, b.velocity)
    pull = 2 / 6 * 0.3 * (b.velocity - b.others["reference"])
    got = gradient(loss, b)
    torch.testing.assert_close(got, per_sample(ADVANTAGE) * gradient(error, b) + pull)
    assert metrics["reference_distance"].equal(distance(b.velocity, b.others["reference"]).detach())
    assert Raft().needs == frozenset() and Raft(w2_beta=0.1).needs == {"reference"}


def test_reweighted_optimum_of_a_gaussian():
    """Data N(m, q), reward ``x``: the weights tilt the mean by ``q / tau`` and nothing else.

    The best linear velocity at one level then is that of N(m + q / tau, q), in closed form.
    """
    torch.manual_seed(0)
    m, q, tau, s, n = 0.5, 0.49, 0.7, 0.6, 200_000
    clean, noise = m + q**0.5 * torch.randn(n).double(), torch.randn(n).double()
    noised = (1 - s) * clean + s * noise
    weights = RewardWeighted(temperature=tau).weights(clean - m, torch.zeros(n), ALL.new_ones(n))
    features = torch.stack([noised, torch.ones(n)], 1)
    parameters = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    b = ForwardBatch(
        clean=clean.unsqueeze(1), noise=noise.unsqueeze(1), sigma=torch.full((n,), s),
        noised=noised.unsqueeze(1), velocity=(features @ parameters).unsqueeze(1),
        advantage=weights, others={},
    )  # fmt: skip
    loss, _ = RewardWeighted(temperature=tau).loss(b)
    (slope,) = torch.autograd.grad(loss.mean(), parameters, create_graph=True)
    hessian = torch.stack([torch.autograd.grad(g, parameters, retain_graph=True)[0] for g in slope])
    optimum = -torch.linalg.solve(hessian, slope.detach())  # quadratic: one Newton step
    mean, variance = m + q / tau, (1 - s) ** 2 * q + s**2
    gain = (s - (1 - s) * q) / variance
    wanted = torch.tensor([gain, -mean - gain * (1 - s) * mean]).double()
    torch.testing.assert_close(optimum, wanted, atol=0.02, rtol=0)
    assert abs(float(wanted[1]) + m + gain * (1 - s) * m) > 0.5  # far from the untilted one


# --- DiffusionNFT ---------------------------------------------------------------------------------


def test_nft_gradient_at_the_old_policy():
    for strength in (0.1, 1.0):
        b = batch(same=True)
        objective = DiffusionNft(strength=strength, kl_beta=0.0)
        loss, _ = objective.loss(b)
        r = optimality(ADVANTAGE, 5.0)
        error = gradient(clean_error(b, b.velocity), b)
        wanted = per_sample(5 * (2 * r - 1)) * error
        torch.testing.assert_close(gradient(loss, b), wanted, rtol=1e-4, atol=1e-6)
        assert gradient(loss, b)[3].abs().max() < 1e-7 < error[3].abs().max()  # r = 1/2
        torch.testing.assert_close(loss, 5 / strength * clean_error(b, b.velocity))


def test_nft_with_certain_samples_is_weighted_matching_of_the_implicit_policy():
    b = batch(advantage=torch.full((6,), 7.0))
    loss, _ = DiffusionNft(kl_beta=0.0).loss(b)  # strength 1: the positive policy is the model
    torch.testing.assert_close(loss, 5 * clean_error(b, b.velocity))
    loss, _ = DiffusionNft(kl_beta=0.0).loss(replace(b, advantage=-b.advantage))
    mirrored = 2 * b.others["old"] - b.velocity
    torch.testing.assert_close(loss, 5 * clean_error(b, mirrored.double()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0])
def test_nft_optimum_is_the_stated_step_towards_the_positive_policy(strength):
    """Many targets at one noised point, whose mean is the old velocity, and a free velocity."""
    torch.manual_seed(1)
    n, s = 64, 0.5
    targets = torch.randn(n, 1)
    targets -= targets.mean()
    advantage = torch.randn(n) + targets[:, 0]
    old = torch.zeros(1)
    noised = torch.zeros(n, 1)
    clean = noised - s * targets
    v = torch.zeros(1, requires_grad=True)
    b = ForwardBatch(
        clean=clean, noise=clean + targets, sigma=torch.full((n,), s), noised=noised,
        velocity=v.expand(n, 1), advantage=advantage, others={"old": old.expand(n, 1)},
    )  # fmt: skip
    loss, _ = DiffusionNft(strength=strength, kl_beta=0.0, adaptive=False).loss(b)
    (slope,) = torch.autograd.grad(loss.mean(), v, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, v)
    r = optimality(advantage, 5.0).float()
    positive_policy = (r * targets[:, 0]).sum() / r.sum()
    wanted = 2 / strength * r.mean() * positive_policy
    torch.testing.assert_close((-slope / curvature).detach(), wanted.reshape(1))
    assert wanted.abs() > 0.05


def test_optimality_is_a_clipped_line():
    advantage = torch.tensor([-9.0, -5.0, 0.0, 2.5, 5.0, 9.0])
    assert optimality(advantage, 5.0).tolist() == [0, 0, 0.5, 0.75, 1, 1]


# --- AWM ------------------------------------------------------------------------------------------


def test_awm_gradient_at_ratio_one_is_weighted_matching():
    b = batch(same=True)
    objective = Awm(error="plain", advantage_max=1.0, kl_beta=0.0, average_beta=0.0)
    loss, metrics = objective.loss(b)
    wanted = per_sample(ADVANTAGE) * gradient(matching_error(b, b.velocity), b)
    torch.testing.assert_close(gradient(loss, b), wanted)
    assert metrics["ratio"].equal(torch.ones(6).double()) and not metrics["clip"].any()
    assert not gradient(loss, b)[3].any()  # advantage 0


@pytest.mark.parametrize("error", ["plain", "sigma", "sigma2", "huber", "ghuber"])
def test_awm_ratio_and_score_follow_the_form_of_the_error(error):
    b = batch()
    loss, metrics = Awm(error=error, kl_beta=0.0, average_beta=0.0, clip_range=1e9).loss(b)
    now, old = (
        weighed(matching_error(b, v), b.sigma, error) for v in (b.velocity, b.others["old"])
    )
    torch.testing.assert_close(metrics["ratio"], (old - now).exp().detach())
    score = gradient(-now, b)
    wanted = -per_sample(ADVANTAGE / 5 * metrics["ratio"]) * score
    torch.testing.assert_close(gradient(loss, b), wanted, rtol=1e-4, atol=1e-6)


def test_awm_clip_stops_only_moves_that_already_went_far_enough():
    b = batch()
    loss, metrics = Awm(error="plain", clip_range=0.2, kl_beta=0.0, average_beta=0.0).loss(b)
    ratio = metrics["ratio"]
    far = ((ADVANTAGE > 0) & (ratio > 1.2)) | ((ADVANTAGE < 0) & (ratio < 0.8))
    assert far.any() and not far.all()
    still = gradient(loss, b).flatten(1).abs().amax(1) == 0
    assert still.equal(far | (ADVANTAGE == 0)) and metrics["clip"].bool().equal(far)


def test_awm_anchors_pull_to_reference_and_average():
    b = batch(advantage=torch.zeros(6))
    loss, _ = Awm(kl_beta=0.5, average_beta=2.0).loss(b)
    away = 0.5 * (b.velocity - b.others["reference"]) + 2.0 * (b.velocity - b.others["average"])
    torch.testing.assert_close(gradient(loss, b), 2 / 6 * away)
    assert Awm(kl_beta=0.0, average_beta=0.0).needs == {"old"}
    assert set(Awm().copies) == {"old", "average"} and Awm().copies["old"](10**6) == 0


# --- DGPO -----------------------------------------------------------------------------------------


def pooled(objective, b: ForwardBatch) -> ForwardBatch:
    """The batch as one group, with the means that the loop would hand in."""
    mean = objective.statistic(b).detach().mean(0, keepdim=True)
    return replace(b, pooled=mean.expand(6, -1))


def test_dgpo_gradient_is_that_of_the_softplus_of_the_group():
    b = batch()
    objective = Dgpo(strength=3.0, clip_range=1e9, kl_beta=0.0)
    loss, metrics = objective.loss(pooled(objective, b))
    gain = matching_error(b, b.velocity) - matching_error(b, b.others["reference"])
    preference = torch.nn.functional.softplus(3.0 * (ADVANTAGE.double() * gain).mean())
    wanted = torch.autograd.grad(preference, b.velocity, retain_graph=True)[0] / 3.0
    torch.testing.assert_close(gradient(loss, b) / 6, wanted)
    assert metrics["preference"].unique().numel() == 1


def test_dgpo_at_the_reference():
    b = batch(same=True)
    objective = Dgpo()
    _, metrics = objective.loss(pooled(objective, b))
    assert (metrics["preference"] == 0.5).all() and not metrics["clip"].any()


def test_dgpo_is_blind_to_an_error_that_a_group_shares():
    """Two more elements, wrong by 3 under the current weights only: every error rises by 18 / 8."""
    b, objective = batch(), Dgpo()

    def widened(value: torch.Tensor, more: float = 0.0) -> torch.Tensor:
        return torch.cat([value, torch.full((6, 1, 2, 1), more)], -1)

    wide = replace(
        b, clean=widened(b.clean), noise=widened(b.noise), velocity=widened(b.velocity, 3.0),
        others={n: widened(v) for n, v in b.others.items()},
    )  # fmt: skip
    rise = matching_error(wide, wide.velocity) - 6 / 8 * matching_error(b, b.velocity)
    torch.testing.assert_close(rise, torch.full((6,), 18 / 8).double())
    got, before = objective.statistic(wide).mean(0), objective.statistic(b).mean(0)
    torch.testing.assert_close(got, 6 / 8 * before)


def test_dgpo_stops_samples_that_went_far_enough():
    b = batch()
    objective = Dgpo(clip_range=0.05, kl_beta=0.0)
    loss, metrics = objective.loss(pooled(objective, b))
    ratio = metrics["ratio"]
    far = ((ADVANTAGE > 0) & (ratio > 1.05)) | ((ADVANTAGE < 0) & (ratio < 0.95))
    assert far.any() and not far.all()
    still = gradient(loss, b).flatten(1).abs().amax(1) == 0
    assert still.equal(far | (ADVANTAGE == 0))


# --- CRD ------------------------------------------------------------------------------------------


def test_crd_at_the_old_policy_regresses_onto_the_centred_target():
    b = batch(same=True)
    objective = Crd(kl_beta=0.0, kl_least=0.0, strength=2.0)
    loss, metrics = objective.loss(pooled(objective, b))
    y = optimality(ADVANTAGE, 5.0)
    torch.testing.assert_close(loss.mean(), 5 / 2 * y.var(unbiased=False))
    assert not metrics["implicit_reward"].any()
    wanted = per_sample(2 * 5 * (y - y.mean())) * gradient(clean_error(b, b.velocity), b)
    torch.testing.assert_close(gradient(loss, b), wanted, rtol=1e-4, atol=1e-6)


def test_crd_is_blind_to_what_a_group_shares():
    b = batch()
    objective = Crd(kl_beta=0.0, kl_least=0.0)
    loss, _ = objective.loss(pooled(objective, b))
    shifted = replace(b, advantage=ADVANTAGE + 1.0)  # nothing is clipped: y moves by 0.1
    again, _ = objective.loss(pooled(objective, shifted))
    torch.testing.assert_close(again, loss)


def test_crd_anchor_grows_with_the_reward():
    b = batch(same=False, advantage=torch.tensor([-9.0, 9.0, 0, 0, 0, 0]))
    objective = Crd(kl_beta=0.1, kl_least=0.02)
    with_anchor, _ = objective.loss(pooled(objective, b))
    free, _ = replace(objective, kl_beta=0.0, kl_least=0.0).loss(pooled(objective, b))
    away = distance(b.velocity, b.others["reference"])
    share = torch.tensor([0.02, 0.1, 0.06, 0.06, 0.06, 0.06]).double()
    torch.testing.assert_close(with_anchor - free, share * away, rtol=1e-6, atol=1e-7)


# --- decay and options ----------------------------------------------------------------------------


def test_decay_schedules_of_the_papers():
    assert [Decay()(u) for u in (0, 5)] == [0, 0]
    first = Decay(rate=0.001, cap=0.5)
    assert [first(u) for u in (0, 1, 499, 10**4)] == pytest.approx([0, 0.001, 0.499, 0.5])
    late = Decay(flat=75, rate=0.0075, cap=0.999)
    assert [late(u) for u in (74, 75, 85, 10**4)] == pytest.approx([0, 0, 0.075, 0.999])
    crd = Crd().copies["old"]
    assert crd(0) == 0.25 and crd(100) == pytest.approx(0.75) and math.isclose(crd(999), 0.999)


@pytest.mark.parametrize(("name", "copy"), [("shapes_awm", "average"), ("shapes_dgpo", "old")])
def test_copies_of_short_recipes_stay_behind(name, copy):
    """By a third of an update and more once a few are made; an exact copy holds nothing."""
    config = entry.resolve_recipe(name)
    decay = build_objective(config.algorithm, dict(config.objective)).copies[copy]
    lag = 0.0
    for update in range(1, 11):
        lag = decay(update) * (lag + 1)
    assert lag == pytest.approx(0.3 / 0.7, rel=0.01)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("raft", {"top": 0}, "top must be positive"),
        ("raft", {"temperature": 1.0}, "unknown key 'objective.temperature'"),
        ("reward_weighted", {"temperature": 0.0}, "temperature must be positive"),
        ("reward_weighted", {"w2_beta": -1.0}, "w2_beta must not be negative"),
        ("diffusion_nft", {"strength": 0.0}, "strength must be positive"),
        ("diffusion_nft", {"old_decay": {"cap": 1.0}}, "0 <= start <= cap < 1"),
        ("awm", {"average_decay": {"rate": 0.01}}, "a rate needs a cap above start"),
        ("dgpo", {"old_decay": {"cap": 0.5}}, "such a cap a rate"),
        ("diffusion_nft", {"old_decay": {"rat": 1.0}}, "Did you mean 'objective.old_decay.rate'"),
        ("awm", {"error": "gruber"}, "Did you mean 'ghuber'"),
        ("awm", {"clip_range": 0.0}, "clip_range must be positive"),
        ("dgpo", {"kl_beta": -0.1}, "kl_beta must not be negative"),
        ("crd", {"kl_beta": 0.1, "kl_least": 0.2}, "must not exceed kl_beta"),
    ],
)  # fmt: skip
def test_impossible_options_are_refused(name, options, words):
    with pytest.raises(ConfigError) as caught:
        build_objective(name, options)
    assert words in str(caught.value)
