r"""Ctrl-U: a picture must show the condition it was made from, where that can be told (2410.11236).

A ControlNet is given a condition :math:`c`, here the segmentation :math:`F` of a clean picture
:math:`x_0`, and learns to make the picture.  Beside the usual loss it is rewarded for what
:math:`F` finds again in its clean estimate (as ControlNet++ does, 2404.07987).  Estimates from high
noise mislead :math:`F`; two that are nearly the same question, of one picture and one noise at
neighbouring times, tell where.  With :math:`P, Q` of shape classes x places,

.. math:: P = \mathrm{softmax}\,F(\hat x_0(x_t)), \qquad Q = \mathrm{softmax}\,F(\hat x_0(x_{t+1}))

.. math:: V = u \sum_{classes} KL(Q \| P), \qquad
    L_r = \mathrm{mean}_{valid}\,\big(-\log P_c\, e^{-V}\big)

.. math:: L = |v_\theta - v|^2 + [t \le t_{max}]\,\big(\lambda L_r + \mathrm{mean}\, V\big)

:math:`V` pays for itself: it lowers the reward's say and costs what it comes to, so that it has a
gradient, through both estimates, and is never a mere weight.  Places that belong to no class
clearly are left out of :math:`L_r`.  :math:`\lambda` rises linearly over ``ramp`` updates.

The segmentation is that of the shapes world's colours (:mod:`mmalign.shapes.segments`), with
which conditions are made as well.  Not here: other conditions (edges, depth), whose :math:`V` is a
squared difference.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from mmalign.config import ConfigError
from mmalign.protocols import Policy
from mmalign.sampling.decoding import Clamp, decoded
from mmalign.sampling.process import noised, split
from mmalign.shapes.segments import UNKNOWN, Segments
from mmalign.types import Media, Rollout
from trainers.config import AdvantageConfig, TrainConfig
from trainers.matching import matching_error, not_negative, positive
from trainers.objective import ForwardBatch, Process


def uncertainty(first: Tensor, second: Tensor, scale: float = 1.0) -> Tensor:
    """``V`` ``(b, H, W)`` of logits ``(b, K, H, W)`` at ``t`` and at ``t + 1``."""
    p, q = first.float().log_softmax(1), second.float().log_softmax(1)
    return scale * (q.exp() * (q - p)).sum(1)


def rectified(first: Tensor, labels: Tensor, doubt: Tensor) -> Tensor:
    """``L_r`` ``(b,)`` of logits at ``t``, labels ``(b, H, W)`` and ``V``; 0 without valid ones."""
    valid = (labels != UNKNOWN).float()
    wrong = F.cross_entropy(first.float(), labels.clamp_min(0), reduction="none")
    total = (valid * wrong * (-doubt).exp()).flatten(1).sum(1)
    return total / valid.flatten(1).sum(1).clamp_min(1)


@dataclass(frozen=True, kw_only=True)
class CtrlU:
    """The Ctrl-U objective.

    Attributes:
        reward_weight: :math:`\\lambda`; at 0 the loss is the ControlNet's own, without ``V``.
        uncertainty: :math:`u`; at 0 the reward is ControlNet++'s.
        t_max: the noise level above which neither is there.
        apart: the difference of the two levels, one of 1000 training times.
        ramp: updates until :math:`\\lambda` is reached.
        temperature: of the segmentation.
        clamp, decode_chunk: as for every reward gradient.
    """

    process: ClassVar[Process] = "forward"
    sampler: ClassVar[str] = "current"  # without a condition it is the generator as it was
    needs: ClassVar[frozenset[str]] = frozenset()

    reward_weight: float = 0.1
    uncertainty: float = 1.0
    t_max: float = 0.4
    apart: float = 1e-3
    ramp: int = 0
    temperature: float = 0.02
    clamp: Clamp = "straight_through"
    decode_chunk: int = 0

    def __post_init__(self) -> None:
        positive(apart=self.apart, temperature=self.temperature)
        not_negative(
            reward_weight=self.reward_weight, uncertainty=self.uncertainty, ramp=self.ramp,
            decode_chunk=self.decode_chunk,
        )  # fmt: skip
        if not 0 < self.t_max < 1 or self.t_max + self.apart > 1:
            raise ConfigError(
                f"objective.t_max is {self.t_max} and objective.apart {self.apart}; both levels "
                "must lie in (0, 1]"
            )

    @property
    def segments(self) -> Segments:
        """``F``."""
        return Segments(self.temperature)

    def check_recipe(self, config: TrainConfig) -> None:
        """Refuse what means nothing to a ControlNet. Raises :class:`ConfigError`."""
        name = f"algorithm {config.algorithm!r}"
        if config.model.adapter != "full":
            raise ConfigError(
                f"model.adapter is {config.model.adapter!r}, but {name} trains a ControlNet, which "
                "is an adapter already; use adapter: full"
            )
        own, sampled = config.forward.guidance_scale, config.rollout.guidance_scale
        if (sampled if own is None else own) != 1.0:
            raise ConfigError(
                f"forward.guidance_scale is {own}, but {name} follows a prediction without "
                "guidance; set forward.guidance_scale to 1.0"
            )
        if config.advantage != AdvantageConfig():
            raise ConfigError(f"{name} has no advantages; remove the section advantage")

    def check_policy(self, policy: Policy) -> None:
        """Refuse a policy that follows no condition. Raises :class:`ConfigError`."""
        if not hasattr(policy, "controlled") or policy.parameterisation != "flow":
            raise ConfigError(
                f"policy {policy.name!r} follows no picture; ctrl_u needs a flow model with a "
                "ControlNet: shapes-control, or a folder of a StableDiffusion3ControlNetPipeline"
            )

    def weights(self, advantages: Tensor, groups: Tensor, valid: Tensor) -> Tensor:
        """Every sample teaches the same."""
        return torch.ones_like(advantages)

    @torch.no_grad()
    def conditioned(self, policy: Any, rollout: Rollout) -> Rollout:
        """The rollout with the segmentation of its clean pictures as condition, and as ``maps``."""
        labels = self.segments.labels(policy.decode(rollout.final.float()).data)
        followed = policy.controlled(rollout.conditioning, Media(self.segments.paint(labels)))
        return replace(rollout, conditioning=followed, maps=labels.unsqueeze(1).float())

    def strength(self, updates: int) -> float:
        """``lambda`` after so many updates."""
        return self.reward_weight * min(1.0, (updates + 1) / max(self.ramp, 1))

    def loss(self, batch: ForwardBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Per-sample loss ``(b,)`` and metrics; those of the reward are 0 above ``t_max``."""
        loss = matching_error(batch, batch.velocity)
        found = {"denoise": loss.detach()}
        if self.reward_weight == 0:
            return loss, found
        rows = (batch.sigma <= self.t_max).nonzero().flatten()
        names = ("rewarded", "consistency", "uncertainty", "recovered")
        found |= {name: torch.zeros_like(loss) for name in names}
        if not len(rows):
            return loss, found
        first, doubt = self._seen(batch, rows)
        assert batch.maps is not None
        labels = batch.maps[rows, 0].long()
        reward, cost = rectified(first, labels, doubt), doubt.flatten(1).mean(1)
        right = ((first.argmax(1) == labels).flatten(1).sum(1)).double()
        right = right / (labels != UNKNOWN).flatten(1).sum(1).clamp_min(1)
        parts = (torch.ones_like(right), reward.detach(), cost.detach(), right)
        for name, part in zip(names, parts, strict=True):
            found[name][rows] = part.to(loss)
        added = self.strength(batch.probing.version) * reward + cost
        return loss.index_add(0, rows, added.to(loss)), found

    def _seen(self, batch: ForwardBatch, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the clean estimates at ``t`` of some rows, and ``V``, both with gradient.

        Without ``uncertainty`` nothing is asked at ``t + 1``, and ``V`` is 0.
        """
        probe, kind = batch.probing, batch.parameterisation
        estimates = batch.estimate(batch.velocity)[rows]
        if self.uncertainty > 0:
            later = batch.sigma[rows] + self.apart
            x = noised(kind, batch.clean[rows], batch.noise[rows], later)
            beside = split(kind, x, later, probe.call(x, later, rows=rows))[0]
            estimates = torch.cat([estimates, beside])
        with torch.autocast(estimates.device.type, enabled=False):
            pixels = decoded(probe.policy, estimates.float(), self.clamp, self.decode_chunk)
            seen = self.segments.logits(pixels)
        first, second = seen[: len(rows)], seen[-len(rows) :]  # the same where only one was asked
        return first, uncertainty(first, second, self.uncertainty)
