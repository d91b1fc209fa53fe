r"""The :math:`\lambda`-harmonic reward of subject-driven generation (RPO, Miao et al. 2024).

With :math:`a` the likeness of a picture to the subject's reference pictures and :math:`b` its
fidelity to the text, both brought to [0, 1] by the ranges of the rewards that measure them
(:math:`(\cos + 1) / 2` for cosines),

.. math:: r_\lambda = \frac{1}{\lambda / a + (1 - \lambda) / b}

is :math:`a` for :math:`\lambda = 1`, :math:`b` for :math:`\lambda = 0`, rises with either, and is 0
where one that counts is 0: neither can make up for the other's absence, as in a sum it could.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.types import Media, Score
from vision_rewards.base import Context, PixelReward, Reading
from vision_rewards.cards import info_of
from vision_rewards.similarity import pictures_digest, reference_pictures

Spec = str | Mapping[str, Any]


def harmonic(a: Tensor, b: Tensor, balance: float) -> Tensor:
    """:math:`r_\\lambda` of two measures in [0, 1], elementwise; ``balance`` is ``lambda``."""
    if balance in (0.0, 1.0):  # exactly, and without what does not count
        return a if balance else b
    # Of products instead of quotients, which have no gradient to speak of at 0.
    return a * b / (balance * b + (1 - balance) * a).clamp_min(torch.finfo(a.dtype).tiny)


def without_token(prompt: str, token: str) -> str:
    """``prompt`` without the words that name the subject, which say nothing to a text encoder."""
    if not token:
        return prompt
    return " ".join(re.sub(rf"(?<!\w){re.escape(token)}(?!\w)", " ", prompt).split())


class LambdaHarmonic(PixelReward):
    """``r_lambda`` of a reward of likeness and one of fidelity; parts ``likeness``, ``fidelity``.

    Args:
        references: pictures of the subject, as
            :func:`~vision_rewards.similarity.reference_pictures` takes them; ``None`` asks for
            ``context["reference"]`` of each sample.
        balance: ``lambda`` in [0, 1]: near 1 identity counts, near 0 the text.
        token: the words by which the generator knows the subject; the text is judged without.
        image: a reward of likeness to ``context["reference"]``: ``clip_i`` or ``dino_i`` of any
            checkpoint, as a name or with options.
        text: a reward of picture and prompt: ``clip_score``, ``shapes_clip``, a judge ....
        device: where the networks live; ``None`` follows the media.

    Raises:
        ValueError: ``balance`` is out of range, or a part is open-ended or takes the wrong things.
    """

    info = info_of("lambda_harmonic")

    def __init__(
        self,
        references: Any = None,
        *,
        balance: float = 0.5,
        token: str = "sks",
        image: Spec = "clip_i",
        text: Spec = "clip_score",
        device: str | None = None,
    ) -> None:
        super().__init__(device)
        from vision_rewards.factory import load_reward

        if not 0 <= balance <= 1:
            raise ValueError(f"balance must lie in [0, 1], got {balance}: 1 is all likeness")
        self.balance, self.token = float(balance), token
        self.source = references
        self.references = None if references is None else reference_pictures(references)
        self.image, self.text = load_reward(image), load_reward(text)
        _check_part("image", self.image, ("reference",))
        _check_part("text", self.text, ("prompt",))
        parts = (self.image.info, self.text.info)
        self.info = replace(
            self.info,
            differentiable=all(i.differentiable for i in parts),
            deterministic=all(i.deterministic for i in parts),
            needs=("prompt", "reference") if references is None else ("prompt",),
        )

    @property
    def identity(self) -> str:
        """Both parts, the balance, the token and the references where they are its own."""
        own = "" if self.references is None else pictures_digest(self.references)
        said = f"{self.balance:g}-{self.token!r}-{own}"
        return f"{self.info.name}@{said}({self.image.identity}; {self.text.identity})"

    def networks(self) -> Sequence[nn.Module]:
        """Those of the two parts."""
        found = (getattr(part, "networks", None) for part in (self.image, self.text))
        return [n for networks in found if networks is not None for n in networks()]

    def read(self, pixels: Tensor, prompts: Sequence[str], context: Context) -> Reading:
        """``r_lambda`` of pixels ``(B, 3, H, W)``."""
        media = Media(pixels)
        given = [{"reference": c.get("reference", self.references)} for c in context]
        bare = [without_token(p, self.token) for p in prompts]
        a = self.image.score(media, bare, given)
        b = self.text.score(media, bare)
        likeness, fidelity = _unit(a, self.image), _unit(b, self.text)
        parts = {"likeness": likeness.detach(), "fidelity": fidelity.detach()}
        blank = ("",) * len(media)
        notes = [x or y for x, y in zip(a.notes or blank, b.notes or blank, strict=True)]
        return Reading(harmonic(likeness, fidelity, self.balance), parts, notes)


def _unit(score: Score, reward: Any) -> Tensor:
    """Scores in [0, 1] by the reward's range; NaN where unscored."""
    low, high = reward.info.range
    value = ((score.value - low) / (high - low)).clamp(0, 1)
    return torch.where(score.valid, value, torch.nan)


def _check_part(option: str, reward: Any, needs: tuple[str, ...]) -> None:
    info = reward.info
    if None in info.range:
        raise ValueError(
            f"{option}={info.name!r} has the open range {info.range}, but a harmonic mean needs "
            "values that are never negative; use a reward of a closed range, as a cosine"
        )
    if tuple(info.needs) != needs or info.scope != "pointwise":
        found = ", ".join(info.needs) or "pixels"
        raise ValueError(
            f"{option}={info.name!r} is a {info.scope} reward of {found}; it must be a pointwise "
            f"reward of {', '.join(needs)}"
        )
