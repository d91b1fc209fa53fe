r"""Guidance of noisy steps by the gradient of a reward (Euphonium, 2602.04928).

The mean of a step of length :math:`h` from :math:`x` moves by

.. math:: c\,h\,\hat g, \qquad \hat g = \frac{\nabla_x r(\hat x_0(x))}{\|\nabla_x r(\hat x_0(x))\|}

where :math:`\hat x_0` is the one-step clean estimate and the norm is taken sample by sample, so
that who shares the batch changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from mmalign.protocols import Policy, RewardModel
from mmalign.sampling.generate import evaluations
from mmalign.sampling.process import split
from mmalign.types import Conditioning, Score

Through = Literal["fixed", "denoiser"]


@dataclass(frozen=True)
class State:
    """``B`` samples before one step: latents ``(B, ...)``, and the prediction made there."""

    x: Tensor
    sigma: Tensor
    sigma_next: Tensor
    prediction: Tensor
    conditioning: Conditioning
    guidance_scale: float
    prompts: Sequence[str]


@dataclass(frozen=True)
class Push:
    """What guidance adds to the mean, ``(B, ...)``; network evaluations and pictures it took."""

    shift: Tensor
    nfe: int
    pictures: int


class Guide(Protocol):
    """Says where the mean of a step should move."""

    def __call__(self, policy: Policy, state: State) -> Push:
        """The shift of each sample, without gradient; it must not depend on the batch."""
        ...


@dataclass(frozen=True, kw_only=True)
class RewardGuide:
    """Ascent of a differentiable reward at the one-step clean estimate.

    A sample that the reward does not score, or whose gradient is 0, is left where it was.

    Attributes:
        reward: pointwise and differentiable.
        strength: ``c``; the shift has norm ``c h`` over all elements of a sample.
        through: ``fixed`` holds the prediction fixed, so that the gradient costs one backward pass
            through decoder and reward; ``denoiser`` follows it into the network as well, at one
            more network call.
    """

    reward: RewardModel
    strength: float
    through: Through = "fixed"

    def __call__(self, policy: Policy, state: State) -> Push:
        """The shift ``c h g / |g|``; weights get no gradient."""
        for module in _modules(policy, self.reward):
            module.eval()
        x, nfe = state.x.detach().clone().requires_grad_(True), 0
        prediction, given = state.prediction.detach(), state.conditioning
        with torch.enable_grad():
            if self.through == "denoiser":
                prediction = policy.predict(x, state.sigma, given, state.guidance_scale)
                nfe = evaluations(len(x), state.guidance_scale, given)
            clean, _ = split(policy.parameterisation, x, state.sigma, prediction)
            gradient = _ascent(self.reward.score(policy.decode(clean), state.prompts), x)
        h = (state.sigma - state.sigma_next).to(x.device, torch.float32)
        return Push(self.strength * h * unit(gradient), nfe, len(x))


def unit(gradient: Tensor) -> Tensor:
    """Each row divided by its norm; rows that are 0 or not finite become 0."""
    flat = gradient.flatten(1)
    norm = flat.norm(dim=1, keepdim=True)
    usable = torch.isfinite(flat).all(1, keepdim=True) & (norm > 0) & torch.isfinite(norm)
    return torch.where(usable, flat / norm, 0.0).view_as(gradient)


def _ascent(score: Score, x: Tensor) -> Tensor:
    """Gradient of each sample's own reward; the sum keeps samples apart, as scores are."""
    if not score.value.requires_grad:  # nothing was scored
        return torch.zeros_like(x)
    total = torch.where(score.valid, score.value, 0.0).sum()
    return torch.autograd.grad(total, x)[0]


def _modules(policy: Policy, reward: Any) -> Iterator[nn.Module]:
    """Decoder and reward networks; a guard and a composition hold theirs inside."""
    decoder = getattr(policy, "decoder", None)
    if decoder is not None:
        yield decoder()
    yield from _networks(reward)


def _networks(reward: Any) -> Iterator[nn.Module]:
    yield from getattr(reward, "networks", tuple)()
    parts = [part for part, _ in getattr(reward, "components", {}).values()]
    inner = getattr(reward, "reward", None)
    for part in [*parts, *([] if inner is None else [inner])]:
        yield from _networks(part)
