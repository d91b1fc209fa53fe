"""Closed forms of every loss."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy.integrate import quad
from torch import Tensor
from torch.nn import functional as F

from mmalign.config import ConfigError
from vision_rewards.training import losses
from vision_rewards.training.config import LossConfig, resolve_loss
from vision_rewards.training.heads import Prediction
from vision_rewards.training.objective import Objective
from vision_rewards.training.table import Batch

D = torch.tensor([-2.0, -0.3, 0.0, 0.7, 4.0], dtype=torch.float64)
ONE = torch.ones_like(D)


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def same(got: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(got, torch.tensor(expected, dtype=got.dtype))


def test_bradley_terry() -> None:
    same(losses.bradley_terry(D, ONE), [-math.log(sigma(d)) for d in D.tolist()])
    same(losses.bradley_terry(D, 0 * D), [-math.log(sigma(-d)) for d in D.tolist()])
    soft = [-(0.3 * math.log(sigma(d)) + 0.7 * math.log(sigma(-d))) for d in D.tolist()]
    same(losses.bradley_terry(D, 0.3 * ONE), soft)
    same(
        losses.bradley_terry(D, ONE, margin=0.57), [-math.log(sigma(d - 0.57)) for d in D.tolist()]
    )
    # Smoothing of a hard label is a soft label of 1 - eps.
    same(losses.bradley_terry(D, ONE, smoothing=0.1), losses.bradley_terry(D, 0.9 * ONE).tolist())


def test_soft_labels_are_fitted_by_their_log_odds() -> None:
    d = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([d], max_iter=50)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = losses.bradley_terry(d, torch.tensor([0.8])).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert d.item() == pytest.approx(math.log(0.8 / 0.2), abs=1e-3)


@pytest.mark.parametrize(
    "model",
    [
        lambda d: losses.davidson_log_probabilities(d, torch.tensor(math.log(0.6))),
        lambda d: losses.rao_kupper_log_probabilities(d, torch.tensor(math.log(5.0))),
    ],
)
def test_outcomes_with_ties_are_probabilities(model) -> None:
    p = model(D).exp()
    torch.testing.assert_close(p.sum(-1), ONE)
    torch.testing.assert_close(p.flip(-1), model(-D).exp())  # a and b change places
    assert p[2, 1] == p[:, 1].max()  # a tie is likeliest between equals


def test_davidson_by_hand() -> None:
    nu = 0.6
    z = [math.exp(d / 2) + math.exp(-d / 2) + nu for d in D.tolist()]
    p = losses.davidson_log_probabilities(D, torch.tensor(nu).log().double()).exp()
    same(p[:, 0], [math.exp(d / 2) / n for d, n in zip(D.tolist(), z, strict=True)])
    same(p[:, 1], [nu / n for n in z])


def test_rao_kupper_by_hand() -> None:
    k = 5.0
    log_k = torch.tensor(k, dtype=torch.float64).log()
    win, tie = torch.eye(3, dtype=torch.float64)[:2].repeat_interleave(len(D), 0).chunk(2)
    logs = losses.rao_kupper_log_probabilities(D, log_k)
    # pi_a / (pi_a + k pi_b), the authors' form.
    same(losses.cross_entropy(logs, win), [-math.log(math.exp(d) / (math.exp(d) + k)) for d in D])
    expected = [
        -math.log(sigma(d - math.log(k))) - math.log(sigma(-d - math.log(k))) - math.log(k * k - 1)
        for d in D.tolist()
    ]
    same(losses.cross_entropy(logs, tie), expected)


def test_gaussian_preference_matches_the_integral() -> None:
    for d, a, b in itertools.product((-1.5, 0.0, 2.0), (0.1, 1.0), (0.5, 2.0)):
        s = math.hypot(a, b)

        def integrand(x: float, d: float = d, s: float = s) -> float:
            return sigma(d + s * x) * math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

        exact = quad(integrand, -12, 12)[0]
        logit = losses.gaussian_logit(*torch.tensor([d, a, b]))
        assert float(logit.sigmoid()) == pytest.approx(exact, abs=0.02)
    same(losses.gaussian_logit(D, 0 * D, 0 * D), D.tolist())  # no doubt: Bradley-Terry


def test_triplet_is_social_rewards_distance_form() -> None:
    torch.manual_seed(0)
    t, p, n = F.normalize(torch.randn(3, 16, 8, dtype=torch.float64), dim=-1)
    direct = F.relu((t - p).square().sum(-1) - (t - n).square().sum(-1) + 0.3)
    d = (t * p).sum(-1) - (t * n).sum(-1)
    torch.testing.assert_close(losses.triplet(d, torch.ones_like(d)), direct)
    torch.testing.assert_close(losses.triplet(-d, torch.zeros_like(d)), direct)


def test_hinge_and_centre() -> None:
    same(losses.hinge(D, ONE), [max(0.0, 1 - d) for d in D.tolist()])
    same(losses.hinge(D, 0 * D), [max(0.0, 1 + d) for d in D.tolist()])
    same(losses.centre(torch.tensor([[1.0, -1.0], [2.0, 1.0]])), [0.0, 9.0])


def test_plackett_luce_sums_to_one_over_all_rankings() -> None:
    scores = torch.tensor([[0.3, -1.0, 2.0, 0.5]], dtype=torch.float64)
    orders = torch.tensor(list(itertools.permutations(range(4))), dtype=torch.float64)
    nll = losses.plackett_luce(scores.expand(len(orders), -1), orders)
    assert float((-nll).exp().sum()) == pytest.approx(1.0)


def test_plackett_luce_by_hand() -> None:
    scores = torch.tensor([[1.0, 0.0, -1.0]] * 4, dtype=torch.float64, requires_grad=True)
    nan = math.nan
    ranks = [[1.0, 2, 3], [1, 2, 2], [1, 2, nan], [2, 1, 1]]
    e, one, i = math.e, 1.0, 1 / math.e
    all_three = e + one + i
    expected = [
        -math.log(e / all_three) - math.log(one / (one + i)),
        -math.log(e / all_three),  # best one of three
        -math.log(e / (e + one)),  # a missing item: Bradley-Terry
        -math.log(one / all_three) - math.log(i / all_three),  # a tie before the last
    ]
    got = losses.plackett_luce(scores, torch.tensor(ranks, dtype=torch.float64))
    same(got, expected)
    got.sum().backward()
    assert torch.isfinite(scores.grad).all()


def test_focal_and_cross_entropy() -> None:
    y = torch.tensor([1.0, 0, 1, 0, 1], dtype=torch.float64)
    bce = F.binary_cross_entropy_with_logits(D, y, reduction="none")
    torch.testing.assert_close(losses.focal(D, y, gamma=0.0), bce)
    p = [sigma(d) if t else sigma(-d) for d, t in zip(D.tolist(), y.tolist(), strict=True)]
    alpha = [0.25 if t else 0.75 for t in y.tolist()]
    by_hand = [-a * (1 - q) ** 2 * math.log(q) for a, q in zip(alpha, p, strict=True)]
    same(losses.focal(D, y, 2.0, 0.25), by_hand)


def test_regression() -> None:
    target = torch.zeros_like(D)
    same(losses.regression(D, target), [d * d for d in D.tolist()])
    huber = [d * d / 2 if abs(d) <= 1 else abs(d) - 0.5 for d in D.tolist()]
    same(losses.regression(D, target, 1.0), huber)


def test_cross_prompt_by_hand() -> None:
    scores = torch.tensor([2.0, 1.0, -1.0], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([1.0, 1.0, 0.0])
    win_lose = -(math.log(sigma(3 - 3)) + math.log(sigma(2 - 3))) / 2
    win_win = -math.log(sigma(1 - 3)) - math.log(sigma(-1 - 3))
    assert losses.cross_prompt(scores, y).item() == pytest.approx(win_lose + win_win)
    assert losses.cross_prompt(scores, y, win_win=0.0).item() == pytest.approx(win_lose)
    alone = losses.cross_prompt(scores[2:], y[2:])
    assert alone.item() == 0.0
    alone.backward()
    assert scores.grad is not None and not scores.grad.any()


def test_weights_of_cross_prompt_pairs() -> None:
    """A sample of weight 2 counts as if it stood there twice; one of weight 0 as if it did not."""
    scores, y = torch.tensor([2.0, 1.0, -1.0, 0.5]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    twice = losses.cross_prompt(scores[[0, 1, 2, 3, 3]], y[[0, 1, 2, 3, 3]])
    weighed = losses.cross_prompt(scores, y, weight=torch.tensor([1.0, 1.0, 1.0, 2.0]))
    assert weighed.item() == pytest.approx(twice.item())
    without = losses.cross_prompt(scores[1:], y[1:])
    off = losses.cross_prompt(scores, y, weight=torch.tensor([0.0, 1.0, 1.0, 1.0]))
    assert off.item() == pytest.approx(without.item())
    objective = Objective("cross_prompt", LossConfig(bce=1.0))
    cells, zero = torch.arange(4)[:, None], torch.zeros(4)
    batch = Batch(
        cells, cells >= 0, y[:, None], torch.tensor([0.0, 1, 1, 1]), zero, zero.long()
    )  # fmt: skip
    bce = losses.focal(scores[1:], y[1:], 0.0).mean()
    assert objective(Prediction(scores), batch).item() == pytest.approx((without + bce).item())


def test_the_win_win_term_pulls_passed_samples_together() -> None:
    scores = torch.tensor([3.0, -2.0], requires_grad=True)
    losses.cross_prompt(scores, torch.ones(2)).backward()
    assert scores.grad[0] > 0 > scores.grad[1]


def pairs(outcomes: list[list[float]], margin: float = 0.0) -> Batch:
    n = len(outcomes)
    return Batch(
        torch.arange(2 * n).view(n, 2),
        torch.ones(n, 2, dtype=torch.bool),
        torch.tensor(outcomes),
        torch.ones(n),
        torch.full((n,), margin),
        torch.full((n,), -1),
    )


def test_objectives_use_weights_and_margins() -> None:
    batch = pairs([[1.0, 0, 0], [0, 0, 1.0]], margin=0.5)
    value = torch.tensor([1.0, 0.0, 2.0, 0.0])
    objective = Objective("bradley_terry", LossConfig(margin=0.25))
    first = -math.log(sigma(1 - 0.75))
    # The loser of the second pair is ahead; its margin asks b to lead by 0.75.
    second = -math.log(sigma(-2 - 0.75))
    assert float(objective(Prediction(value), batch)) == pytest.approx((first + second) / 2)
    heavy = Batch(**{**batch.__dict__, "weight": torch.tensor([1.0, 3.0])})
    assert float(objective(Prediction(value), heavy)) == pytest.approx((first + 3 * second) / 4)


def test_davidson_learns_how_often_people_tie() -> None:
    torch.manual_seed(0)
    batch = pairs([[0, 1.0, 0]] * 30 + [[1.0, 0, 0]] * 35 + [[0, 0, 1.0]] * 35)
    objective = Objective("davidson", LossConfig())
    optimizer = torch.optim.Adam(objective.parameters(), 0.1)
    for _ in range(200):
        optimizer.zero_grad()
        objective(Prediction(torch.zeros(200)), batch).backward()
        optimizer.step()
    assert objective.outcomes(torch.zeros(1, 2), None)[0, 1].item() == pytest.approx(0.3, abs=1e-3)


def test_a_loss_for_other_data_is_refused() -> None:
    with pytest.raises(ConfigError, match="'focal' cannot use pairs; use bradley_terry"):
        resolve_loss(LossConfig(name="focal"), "pairs")
    assert resolve_loss(LossConfig(), "rankings") == "plackett_luce"
