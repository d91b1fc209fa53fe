r"""Reward-guided latent consistency distillation, RG-LCD (Li et al., 2403.11027).

Consistency distillation (:mod:`trainers.few_step.consistency`), and the reward of the picture that
the student sees at once:

.. math:: L = L_{CD} - \lambda\, R(f_\theta(x_\sigma, \sigma), c)

Only the student's one pass carries the gradient. With ``through: pixels`` :math:`R` is the recipe's
reward of the decoded picture, which has to be differentiable and invites noise that the reward
alone sees. With ``through: proxy`` it is a small network :math:`R_\phi` on latents, constant while
it guides, which learns alongside to rank as the recipe's reward, the *expert* :math:`R_E`, does. Of
each draw three pictures are compared, the student's, its target and the clean one the draw was
noised from,

.. math:: L_\phi = \mathrm{mean}_{i < j}\, KL\big(\mathrm{sigmoid}(k (R_E^i - R_E^j))
    \,\|\, \mathrm{sigmoid}(R_\phi^i - R_\phi^j)\big)

The expert needs no gradient then: any reward that judges single pictures will do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from mmalign.sampling.decoding import Clamp
from trainers.companion import Setting
from trainers.few_step.consistency import ConsistencyDistillation, pseudo_huber
from trainers.few_step.guides import PixelGuide
from trainers.few_step.proxy import LatentProxy, ProxyConfig
from trainers.matching import not_negative
from trainers.objective import ForwardBatch


@dataclass(frozen=True, kw_only=True)
class RewardGuidedConsistency(ConsistencyDistillation):
    """The RG-LCD objective; the other options are consistency distillation's.

    Attributes:
        reward_weight: :math:`\\lambda`; at 0 the loss is consistency distillation's to the bit.
        through: what the gradient of the reward goes through, ``proxy`` or ``pixels``.
        proxy: the latent proxy and how it learns.
        clamp: with ``pixels``, how pictures are brought to [0, 1].
    """

    reward_weight: float = 1.0
    through: Literal["proxy", "pixels"] = "proxy"
    proxy: ProxyConfig = field(default_factory=ProxyConfig)
    clamp: Clamp = "straight_through"

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative(reward_weight=self.reward_weight)
        if self.windows > 1:
            raise ValueError(
                f"windows is {self.windows}, but a reward judges pictures, at which only a path "
                "in one piece ends; set it to 1"
            )

    def companion(self, setting: Setting) -> LatentProxy | PixelGuide:
        """Who says what the reward of clean latents is."""
        if self.through == "pixels":
            return PixelGuide(self.clamp, setting)
        return LatentProxy(self.proxy, setting)

    def loss(self, batch: ForwardBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Per-sample loss ``(b,)`` and per-sample metrics."""
        own, target = self.compared(batch)
        loss = pseudo_huber(own, target, self.huber)
        gap = (own.detach() - target).abs().flatten(1).mean(1)
        metrics = {"gap": gap, "consistency": loss.detach()}
        guide = batch.probing.companion
        guide.show((own.detach(), target, batch.clean), batch.probing)
        if self.reward_weight > 0:
            reward = guide.reward(own, batch.probing)
            loss = loss - self.reward_weight * reward
            metrics["guided_reward"] = reward.detach()
        return loss, metrics
