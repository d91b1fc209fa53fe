"""The mathematics of the preference objectives on the forward process, against closed forms."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from noised_pairs import batch, gradient

from mmalign.config import ConfigError
from mmalign.sampling import process
from mmalign.types import Score
from trainers.matching import matching_error
from trainers.objective import ForwardBatch
from trainers.preferences.diffusion_dpo import DiffusionDpo
from trainers.preferences.diffusion_kto import DiffusionKto
from trainers.preferences.ipo import Ipo
from trainers.preferences.mapo import Mapo
from trainers.preferences.pairwise import ANCHOR, Refresh

PAIRS = [DiffusionDpo(beta=3.0), DiffusionDpo(beta=3.0, form="hinge"), Ipo(beta=3.0, tau=0.2)]


def swapped(b: ForwardBatch) -> ForwardBatch:
    """Loser and winner in each other's place, everything else as it was."""
    order = torch.tensor([1, 0, 3, 2, 5, 4])
    held = {n: getattr(b, n)[order] for n in ("clean", "noise", "sigma", "noised")}
    velocity = b.velocity.detach()[order].requires_grad_()
    return replace(b, **held, velocity=velocity, others={n: v[order] for n, v in b.others.items()})


def constant(value: float) -> torch.Tensor:
    """The same for each pair."""
    return torch.full((3,), value, dtype=torch.float64)


# --- DPO ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flow", "epsilon", "v"])
@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_dpo_starts_at_log_2_with_a_quarter_of_beta(kind, labels):
    b = batch(same=True, kind=kind)
    loss, metrics = DiffusionDpo(beta=3.0, labels=labels, label_smoothing=0.0).loss(b)
    torch.testing.assert_close(loss, constant(math.log(2)), rtol=0, atol=1e-12)
    assert metrics["implicit_accuracy"].tolist() == [0.5] * 3
    assert metrics["winner_error"].abs().max() == 0 == metrics["loser_error"].abs().max()
    error = matching_error(b, b.velocity)
    wanted = gradient(3.0 / 4 * (error[0::2] - error[1::2]), b)
    torch.testing.assert_close(gradient(DiffusionDpo(beta=3.0).loss(b)[0], b), wanted)


def test_dpo_by_hand():
    b = batch()
    e, r = (matching_error(b, v).detach() for v in (b.velocity, b.others["reference"]))
    away = e - r
    z = -1.5 * (away[0::2] - away[1::2])
    loss, metrics = DiffusionDpo(beta=3.0).loss(b)
    torch.testing.assert_close(loss, -torch.sigmoid(z).log())
    torch.testing.assert_close(metrics["margin"], z)
    torch.testing.assert_close(metrics["winner_error"], away[0::2])
    torch.testing.assert_close(metrics["loser_error"], away[1::2])
    assert metrics["implicit_accuracy"].tolist() == (z > 0).double().tolist()
    hinge, _ = DiffusionDpo(beta=3.0, form="hinge").loss(b)
    torch.testing.assert_close(hinge, (1 - z).clamp_min(0))
    ipo, _ = Ipo(beta=3.0, tau=0.2).loss(b)
    torch.testing.assert_close(ipo, (z - 2.5).square())


@pytest.mark.parametrize("objective", PAIRS)
def test_swapping_a_pair_flips_its_margin(objective):
    b = batch()
    loss, metrics = objective.loss(b)
    other, back = objective.loss(swapped(b))
    torch.testing.assert_close(back["margin"], -metrics["margin"], rtol=0, atol=0)
    torch.testing.assert_close(back["winner_error"], metrics["loser_error"], rtol=0, atol=0)
    assert not torch.allclose(loss, other)
    # A label that is wrong with probability 1/2 says nothing: both orders cost the same.
    half = replace(b, advantage=torch.zeros(6))
    soft = replace(objective, labels="soft")
    torch.testing.assert_close(soft.loss(half)[0], soft.loss(swapped(half))[0])
    torch.testing.assert_close(soft.loss(half)[0], (loss + other) / 2)


@pytest.mark.parametrize("objective", PAIRS)
def test_labels_weigh_both_outcomes(objective):
    b = batch(advantage=torch.tensor([0.5, -0.5] * 3))  # won with probability 3/4
    win, lose = objective.loss(b)[0], objective.loss(swapped(b))[0]
    soft, _ = replace(objective, labels="soft").loss(b)
    torch.testing.assert_close(soft, 0.75 * win + 0.25 * lose)
    smooth, _ = replace(objective, label_smoothing=0.1).loss(b)
    torch.testing.assert_close(smooth, 0.9 * win + 0.1 * lose)


def test_equal_pictures_teach_nothing():
    b = batch()
    twice = {n: getattr(b, n)[[0, 0, 2, 2, 4, 4]] for n in ("clean", "noised")}
    leaf = b.velocity.detach()[::2].requires_grad_()
    velocity = leaf.repeat_interleave(2, 0)
    others = {"reference": b.others["reference"][[0, 0, 2, 2, 4, 4]]}
    loss, _ = DiffusionDpo(beta=50.0).loss(replace(b, **twice, velocity=velocity, others=others))
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(2)), rtol=0, atol=1e-12)
    assert torch.autograd.grad(loss.sum(), leaf)[0].abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["flow", "v"])
@pytest.mark.parametrize("of", ["noise", "clean"])
def test_errors_of_other_quantities(kind, of):
    """The margin from the network's own error, weighed, is that of the converted prediction."""
    b = batch(kind=kind)

    def error(prediction: torch.Tensor) -> torch.Tensor:
        clean, noise = process.split(kind, b.noised, b.sigma, prediction.double())
        away = noise - b.noise if of == "noise" else clean - b.clean
        return away.square().flatten(1).mean(1)

    gain = error(b.others["reference"]) - error(b.velocity.detach())
    margin = DiffusionDpo(beta=2.0, error=of).loss(b)[1]["margin"]
    torch.testing.assert_close(margin, gain[0::2] - gain[1::2], rtol=1e-5, atol=1e-6)


def test_a_step_widens_the_margin():
    b = batch(same=True)
    moved = b.velocity.detach() - 0.1 * gradient(DiffusionDpo(beta=3.0).loss(b)[0], b)
    after = replace(b, velocity=moved)
    assert bool((DiffusionDpo(beta=3.0).loss(after)[1]["margin"] > 0).all())
    wrong = replace(b, velocity=2 * b.velocity.detach() - moved)
    assert bool((DiffusionDpo(beta=3.0).loss(wrong)[1]["margin"] < 0).all())


def test_ipo_stops_at_its_margin_and_dpo_never_does():
    b = batch()
    z = float(DiffusionDpo(beta=3.0).loss(b)[1]["margin"].abs().max())
    one = replace(b, velocity=b.velocity.detach().requires_grad_())
    at = DiffusionDpo(beta=3.0).loss(one)[1]["margin"].abs().argmax()
    rows = slice(2 * int(at), 2 * int(at) + 2)
    tau = 1 / (2 * z)
    turned = one if float(DiffusionDpo(beta=3.0).loss(one)[1]["margin"][at]) > 0 else swapped(one)
    for objective, still in ((Ipo(beta=3.0, tau=tau), True), (DiffusionDpo(beta=3.0), False)):
        found = gradient(objective.loss(turned)[0], turned)[rows].abs().max()
        assert (float(found) < 1e-5) == still


def test_the_reference_may_be_refreshed():
    assert DiffusionDpo().needs == {"reference"} and DiffusionDpo().copies == {}
    fresh = DiffusionDpo(reference_every=4)
    assert fresh.needs == {ANCHOR} and [fresh.copies[ANCHOR](u) for u in (3, 4, 8)] == [1, 0, 0]
    assert [Refresh(0)(u) for u in (0, 1, 100)] == [1, 1, 1]
    b = batch(same=True, others={ANCHOR: batch().velocity.detach()})
    assert float(fresh.loss(b)[0][0].detach()) == pytest.approx(math.log(2))
    recipe = SimpleNamespace(optim=SimpleNamespace(updates_per_rollout=3))
    with pytest.raises(ConfigError, match=r"reference_every is 4.*multiple"):
        fresh.check_recipe(recipe)


def test_stopping_on_the_error_of_winners():
    objective = DiffusionDpo(max_winner_error=0.01)
    assert objective.stop({"winner_error": 0.01}) == "" == objective.stop({})
    assert "max_winner_error 0.01" in objective.stop({"winner_error": 0.02})
    assert DiffusionDpo().stop({"winner_error": 9.0}) == ""


# --- KTO ------------------------------------------------------------------------------------------


def with_means(objective: DiffusionKto, b: ForwardBatch) -> ForwardBatch:
    values = objective.statistic(b).detach()
    return replace(b, pooled=values.mean(0, keepdim=True).expand_as(values))


def test_kto_by_hand():
    liked = torch.tensor([1.0, 1.0, -1.0, 0.0, 1.0, -1.0])
    objective = DiffusionKto(beta=2.0, weight_liked=0.5, weight_disliked=1.5)
    b = batch(advantage=liked)
    ratio = (matching_error(b, b.others["reference"]) - matching_error(b, b.velocity)).detach()
    base = ratio[liked != 0].mean().clamp_min(0)
    loss, metrics = objective.loss(with_means(objective, b))
    weight = torch.tensor([0.5, 0.5, 1.5, 0.0, 0.5, 1.5]).double()
    torch.testing.assert_close(loss, weight * (1 - torch.sigmoid(liked * 2 * (ratio - base))))
    assert float(metrics["winner_error"].mean()) == pytest.approx(float(-ratio[liked > 0].mean()))
    assert float(metrics["loser_error"].mean()) == pytest.approx(float(-ratio[liked < 0].mean()))
    # The base is held constant, and is never negative.
    b = with_means(objective, batch(advantage=liked))
    raised = replace(b, pooled=b.pooled * 0)
    if float(ratio[liked != 0].mean()) < 0:
        torch.testing.assert_close(objective.loss(raised)[0], loss)


def test_kto_starts_at_half_its_weight_and_flips_with_the_label():
    objective = DiffusionKto(beta=2.0, weight_disliked=3.0)
    b = with_means(objective, batch(same=True))
    loss, _ = objective.loss(b)
    torch.testing.assert_close(loss, torch.tensor([0.5, 1.5] * 3).double(), rtol=0, atol=1e-12)
    even = DiffusionKto(beta=2.0)
    flipped = replace(b, advantage=-b.advantage)
    torch.testing.assert_close(
        gradient(even.loss(flipped)[0], flipped), -gradient(even.loss(b)[0], b)
    )


def test_kto_labels_are_signs_of_what_was_scored():
    valid = torch.tensor([True, True, False, True])
    advantages = torch.tensor([0.3, -2.0, 1.0, 0.0])
    assert DiffusionKto().weights(advantages, torch.zeros(4), valid).tolist() == [1, -1, 0, 0]


def test_verdicts_are_labels():
    score = Score(torch.tensor([0.5, 0.4, 1.0, 0.0]), torch.tensor([True, True, False, True]))
    outcome = torch.tensor([0.1, -0.2, 0.0, 0.3])
    credit = SimpleNamespace(score=score, outcome=outcome)
    assert DiffusionKto().advantage(credit) is outcome
    assert DiffusionKto(threshold=0.5).advantage(credit).tolist() == [1, -1, 0, -1]


# --- MaPO -----------------------------------------------------------------------------------------


def test_mapo_by_hand():
    b = batch()
    error = matching_error(b, b.velocity).detach()
    phi = [0.5 * e / (math.exp(0.5 * e) - 1) for e in error.tolist()]
    loss, metrics = Mapo(beta=0.2, temperature=7.0).loss(b)
    for k in range(3):
        margin = phi[2 * k] - phi[2 * k + 1]
        wanted = float(error[2 * k]) + 0.2 * math.log1p(math.exp(-7 * margin))
        assert float(loss[k].detach()) == pytest.approx(wanted, rel=1e-9)
        assert float(metrics["margin"][k]) == pytest.approx(margin, rel=1e-9)
        assert float(metrics["implicit_accuracy"][k]) == float(margin > 0)
    assert Mapo().needs == frozenset()


def test_mapo_of_equal_errors():
    b = batch()
    clean, noised, velocity = (
        v[::2].detach().repeat_interleave(2, 0) for v in (b.clean, b.noised, b.velocity)
    )
    equal = replace(b, clean=clean, noised=noised, velocity=velocity)
    loss, _ = Mapo(beta=0.2).loss(equal)
    error = matching_error(equal, velocity)[::2]
    torch.testing.assert_close(loss, error + 0.2 * math.log(2))
    # Where the network is perfect the likelihood is 1, its limit.
    perfect = replace(equal, velocity=equal.target)
    torch.testing.assert_close(Mapo(beta=0.2).loss(perfect)[0], constant(0.2 * math.log(2)))


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: DiffusionDpo(beta=0.0), "beta must be positive"),
        (lambda: DiffusionDpo(label_smoothing=0.5), r"label_smoothing must lie in \[0, 0.5\)"),
        (lambda: DiffusionDpo(reference_every=-1), "reference_every must not be negative"),
        (lambda: Ipo(tau=0.0), "tau must be positive"),
        (lambda: DiffusionKto(weight_liked=0.0), "weight_liked must be positive"),
        (lambda: Mapo(scale=-1.0), "scale must be positive"),
    ],
)
def test_options_that_mean_nothing(build, words):
    with pytest.raises(ValueError, match=words):
        build()
