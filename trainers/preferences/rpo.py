r"""RPO (Miao et al., 2407.12164): a subject learned from its pictures, a preference as a check.

Reference pictures of the subject stand beside the model's own pictures of the same prompts. With
the :math:`\lambda`-harmonic reward :math:`r` (:mod:`vision_rewards.subject`) of the reference
picture :math:`x_r` and the generated one :math:`x_g`,

.. math:: q = \mathrm{sigmoid}(\kappa\, (r(x_r) - r(x_g))), \qquad y \sim \mathrm{Bernoulli}(q)

.. math:: z = \frac{\beta}{2} (l_r - l_g), \qquad l = w(\sigma)(e_{ref} - e_\theta)

.. math:: L = s\, e_\theta(x_r) - y \log \mathrm{sigmoid}(z) - (1 - y) \log \mathrm{sigmoid}(-z)

The first term teaches the subject, as DreamBooth does; the others are Diffusion-DPO on the pair,
which says how much better the reference picture really is: hardly, for a prompt that asks for what
it does not show. Which checkpoint is kept is part of the method: the one whose pictures of held-out
prompts have the highest reward (``panel.best``).

Rewards in [0, 1] differ by less than 1: with the published :math:`\kappa = 1` labels are hardly
better than coins.

The published code has no :math:`\beta` (``beta: 2`` here), so that the preference, a difference of
small errors, hardly counts beside the first term; it also draws level and noise for each picture
apart. Here they are shared by a pair, as in every objective of pairs, which takes the noise out of
their difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mmalign.config import ConfigError
from mmalign.runtime.log import say
from trainers.credit import check_labels
from trainers.matching import matching_error, not_negative, positive
from trainers.objective import ForwardBatch
from trainers.pairing import Pairing
from trainers.preferences.pairwise import AgainstReference


@dataclass(frozen=True, kw_only=True)
class Rpo(AgainstReference):
    """The RPO objective; options of :class:`.pairwise.AgainstReference`.

    Attributes:
        beta: :math:`\\beta`; smaller than for objectives without the first term.
        references: pictures of the subject: a folder, a file, or ``shapes:NAME``.
        sharpness: :math:`\\kappa`, how much a difference of rewards says about who is preferred.
        similarity: :math:`s`, weight of the error on reference pictures.
        subject_prompt: what the reference pictures really show (``a photo of a v star``); the first
            term then teaches them under this prompt alone. Without it, under the prompts of the
            recipe, as published.
        subject_share: share of a step's pairs that have ``subject_prompt``, in the place of theirs.
        outcomes: ``drawn`` draws :math:`y` anew at every use of a pair; ``expected`` has :math:`q`
            in its place, which is the mean of the loss over such draws.
    """

    paired: ClassVar[bool] = True
    pairing: ClassVar[Pairing] = "given"  # the reference picture first, whoever is preferred
    keep_ties: ClassVar[bool] = True

    beta: float = 20.0
    references: str = ""
    sharpness: float = 1.0
    similarity: float = 1.0
    subject_prompt: str = ""
    subject_share: float = 0.5
    outcomes: Literal["drawn", "expected"] = "drawn"

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative(similarity=self.similarity)
        positive(sharpness=self.sharpness)
        if not 0 < self.subject_share <= 1:
            raise ValueError(
                f"subject_share must be above 0 and at most 1, got {self.subject_share}"
            )

    def check_recipe(self, config: Any) -> None:
        """Refuse a run without a subject, or with pictures that nobody would look at.

        Raises:
            ConfigError: names the setting and what to do.
        """
        super().check_recipe(config)
        check_labels(config.advantage, config.algorithm)
        if config.panel is None or not config.panel.best:
            say(
                "note: early stopping is part of RPO, but without panel.best the last model is "
                "kept, not the best one; give the section panel with best: reward and patience"
            )
        if not self.references:
            raise ConfigError(
                f"algorithm {config.algorithm!r} learns a subject from its pictures; give "
                "objective.references: a folder of them, or shapes:striped_star"
            )
        if config.pairs is not None:
            raise ConfigError(
                f"algorithm {config.algorithm!r} pairs the subject's pictures with the model's "
                "own; remove the section pairs"
            )
        if config.rollout.overlap:
            raise ConfigError(
                "rollout.overlap scores pictures while the next are drawn, but those of the "
                "subject are scored too; set it to false"
            )
        if config.images_per_prompt != 2:
            raise ConfigError(
                f"images_per_prompt is {config.images_per_prompt}, but a pair is one reference "
                "picture and one of the model's own; set it to 2"
            )

    def probability(self, reference: Tensor, generated: Tensor) -> Tensor:
        """:math:`q`, that the reference picture is preferred, of the rewards of both ``(n,)``."""
        return torch.sigmoid(self.sharpness * (reference.double() - generated.double()))

    def targets(self, q: Tensor, coins: Tensor) -> Tensor:
        """:math:`y`, or :math:`q` itself, ``(n,)``; ``coins`` are uniform in [0, 1)."""
        return q if self.outcomes == "expected" else (coins < q).double()

    def loss(self, batch: ForwardBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss ``(b / 2,)`` and metrics of each pair; its advantages are ``2 y - 1`` and minus."""
        ratio = self.log_ratio(batch)
        subject, own = ratio[0::2], ratio[1::2]
        z = self.beta / 2 * (subject - own)
        y = (0.5 + (batch.advantage[0::2] - batch.advantage[1::2]).double() / 4).clamp(0, 1)
        preference = y * F.softplus(-z) + (1 - y) * F.softplus(z)
        similarity = matching_error(batch, batch.velocity)[0::2]
        if self.subject_prompt:
            own_prompt = [p == self.subject_prompt for p in batch.probing.prompts[0::2]]
            similarity = similarity * similarity.new_tensor(own_prompt)
        margin = z.detach()
        agrees = torch.where(y >= 0.5, margin, -margin)
        return self.similarity * similarity + preference, {
            "similarity": similarity.detach(),
            "preference": preference.detach(),
            "winner_error": -torch.where(y >= 0.5, subject, own).detach(),
            "loser_error": -torch.where(y >= 0.5, own, subject).detach(),
            "margin": margin,
            "implicit_accuracy": (agrees > 0).double() + 0.5 * (agrees == 0).double(),
        }
