"""From predictions for a batch of judgements to the loss and to probabilities of outcomes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vision_rewards.training import losses
from vision_rewards.training.config import LossConfig
from vision_rewards.training.heads import Prediction
from vision_rewards.training.table import Batch

# The papers' own: PAL's hinge, Social Reward, SoliReward.
MARGINS = {"hinge": 1.0, "triplet": 0.3, "cross_prompt": 3.0}
TIES = {"davidson": 1.0, "rao_kupper": 5.0}
# Losses that fix neither the zero nor the unit of the score.
OPEN_SCALE = (
    "bradley_terry", "gaussian", "davidson", "rao_kupper", "hinge", "plackett_luce",
    "cross_prompt",
)  # fmt: skip
# Losses whose score is a log-odds of the label or outcome, so that probabilities mean something.
LOGISTIC = ("bradley_terry", "gaussian", "davidson", "rao_kupper", "bce", "focal")


class Objective(nn.Module):
    """A loss by name, with its parameters (Davidson's nu is learned).

    Predictions are for ``B * K`` cells in the order of ``batch.cells.flatten()``.
    """

    def __init__(self, name: str, config: LossConfig) -> None:
        super().__init__()
        self.name, self.config = name, config
        self.margin = MARGINS.get(name, 0.0) if config.margin is None else config.margin
        ties = TIES.get(name, 1.0) if config.ties is None else config.ties
        self.log_ties = nn.Parameter(torch.tensor(math.log(ties)))
        self.log_ties.requires_grad_(name == "davidson")

    def forward(self, prediction: Prediction, batch: Batch) -> Tensor:
        """The loss, a scalar: the mean over the samples by their weights."""
        value = prediction.value.view(batch.cells.shape)
        if self.name == "cross_prompt":
            return self._cross_prompt(value[:, 0], batch)
        if self.name == "plackett_luce":
            each = losses.plackett_luce(value, batch.target)
        elif value.shape[1] == 1:
            each = self._single(value[:, 0], batch.target[:, 0])
        else:
            each = self._pair(value, prediction.std, batch)
            each = each + self.config.centre * losses.centre(value)
        return losses.weighted_mean(each, batch.weight)

    def _single(self, value: Tensor, target: Tensor) -> Tensor:
        config = self.config
        if self.name in ("mse", "huber"):
            delta = None if self.name == "mse" else config.huber_delta
            return losses.regression(value, target, delta)
        y = target * (1 - config.smoothing) + (1 - target) * config.smoothing
        gamma = 0.0 if self.name == "bce" else config.focal_gamma
        return losses.focal(value, y, gamma, config.focal_alpha)

    def _cross_prompt(self, value: Tensor, batch: Batch) -> Tensor:
        config, y = self.config, batch.target[:, 0]
        weight = batch.weight
        loss = losses.cross_prompt(value, y, self.margin, config.win_win, config.smoothing, weight)
        return loss + config.bce * losses.weighted_mean(losses.focal(value, y, 0.0), weight)

    def _pair(self, value: Tensor, std: Tensor | None, batch: Batch) -> Tensor:
        d, q = self.logit(value, std), preference(batch.target)
        margin = self.margin + batch.margin
        if self.name in ("davidson", "rao_kupper"):
            # The margin is asked of the winner: it shifts the outcomes towards the loser.
            shifted = d - margin * (2 * q - 1).sign()
            target = batch.target * (1 - self.config.smoothing) + self.config.smoothing / 3
            return losses.cross_entropy(self._with_ties(shifted), target)
        if self.name == "hinge":
            return losses.hinge(d, q, margin)
        if self.name == "triplet":
            return losses.triplet(d, q, margin)
        return losses.bradley_terry(d, q, margin, self.config.smoothing)

    def logit(self, value: Tensor, std: Tensor | None) -> Tensor:
        """Log-odds ``(B,)`` that a beats b, without ties, from scores ``(B, 2)``."""
        d = value[:, 0] - value[:, 1]
        if std is None:
            return d
        std = std.view(value.shape)
        return losses.gaussian_logit(d, std[:, 0], std[:, 1])

    def _with_ties(self, d: Tensor) -> Tensor:
        if self.name == "davidson":
            return losses.davidson_log_probabilities(d, self.log_ties)
        return losses.rao_kupper_log_probabilities(d, self.log_ties)

    def outcomes(self, value: Tensor, std: Tensor | None) -> Tensor:
        """Probabilities ``(B, 3)`` of win, tie and lose from scores ``(B, 2)``."""
        d = self.logit(value, std)
        if self.name in ("davidson", "rao_kupper"):
            return self._with_ties(d).exp()
        return torch.stack([d.sigmoid(), torch.zeros_like(d), (-d).sigmoid()], -1)


def preference(outcome: Tensor) -> Tensor:
    """``q (B,)``: the probability that a is better, a tie counting half."""
    return outcome[:, 0] + outcome[:, 1] / 2
