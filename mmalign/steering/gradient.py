r"""Reward gradients for steering: at clean latents, at noisy states, through whole samplers.

Rows never interact, so every gradient is taken batch by batch and only one batch's graph is ever
held.  Decoder and reward run in fp32 whatever the denoiser's precision: a gradient that passes
through them is small and is summed over many pixels.  Weights get no gradient.  Backward passes are
not counted in ``nfe``; one costs about as much as two evaluations, three where the forward pass is
computed again to save memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmalign.protocols import Kernel
from mmalign.sampling.chain import Switch, links, predictor, run
from mmalign.sampling.decoding import decoded
from mmalign.steering.engine import Engine, on_cpu, scored
from mmalign.types import Media, Score

Through = Literal["denoiser", "fixed"]


@dataclass(frozen=True)
class Ascent:
    """Where the reward of ``B`` samples rises.

    Attributes:
        media: decoded, on the policy's device.
        scores: without gradient, on the CPU.
        gradient: ``(B, ...)`` fp32; 0 for a sample that was not scored or has no finite gradient.
    """

    media: Media
    scores: Score
    gradient: Tensor

    @staticmethod
    def cat(parts: list[Ascent]) -> Ascent:
        """Joined along the batch."""
        return Ascent(
            Media.cat([p.media for p in parts]),
            Score.cat([p.scores for p in parts]),
            torch.cat([p.gradient for p in parts]),
        )


@dataclass(frozen=True)
class Outlook:
    """A noisy state's prediction and clean estimate, and its reward's ascent at the state."""

    prediction: Tensor
    clean: Tensor
    ascent: Ascent


Judge = Callable[[Engine, Tensor, Tensor], Ascent]  # (engine, clean latents, owners)


def batches(rows: int, size: int) -> list[slice]:
    """Consecutive slices of at most ``size`` rows."""
    return [slice(at, min(at + size, rows)) for at in range(0, rows, size)]


def reward_gradient(engine: Engine, latents: Tensor, owners: Tensor) -> Ascent:
    """Scores of clean ``latents`` and the gradient there.

    The decoder's activations are computed again for the backward pass, so that they and the
    reward's are never held together.
    """
    engine.meter.decodes += len(latents)
    device, parts = engine.policy.device, []
    for rows in batches(len(latents), engine.batch_size):
        leaf = latents[rows].detach().float().requires_grad_(True)
        ready = torch.autocast(device.type, enabled=False)
        with engine.meter.work(), torch.enable_grad(), ready:
            pixels = decoded(engine.policy, leaf)
            score = engine.score(Media(pixels), owners[rows])
            gradient = _ascent(score, leaf)
        parts.append(Ascent(Media(pixels.detach()), on_cpu(score), gradient))
    return Ascent.cat(parts)


def outlook(
    engine: Engine, x: Tensor, sigma: Tensor, owners: Tensor, through: Through = "denoiser"
) -> Outlook:
    """Prediction at ``x``, its clean estimate, and the gradient of the estimate's reward at ``x``.

    Args:
        sigma: scalar noise level of all rows.
        through: ``denoiser`` follows the prediction into the network; ``fixed`` holds it fixed, so
            that only the explicit ``x`` of the clean estimate counts.
    """
    predictions, cleans, parts = [], [], []
    for rows in batches(len(x), engine.batch_size):
        leaf = x[rows].detach().clone().requires_grad_(True)
        with torch.set_grad_enabled(through == "denoiser"):
            prediction = engine.predict(leaf, sigma, owners[rows])
        with torch.enable_grad():
            clean, _ = engine.estimate(leaf, sigma, prediction)
        found = reward_gradient(engine, clean.detach(), owners[rows])
        gradient = _pulled_back(engine, clean, leaf, found.gradient)
        parts.append(Ascent(found.media, found.scores, gradient))
        predictions.append(prediction.detach())
        cleans.append(clean.detach())
    return Outlook(torch.cat(predictions), torch.cat(cleans), Ascent.cat(parts))


def sampler_gradient(
    engine: Engine, noises: Tensor, owners: Tensor, kernel: Kernel,
    judge: Judge = reward_gradient,
) -> Ascent:  # fmt: skip
    """Scores of what ``noises`` lead to, and the gradient with respect to all of them.

    Each step's activations are computed again for the backward pass.

    Args:
        noises: ``(B, 1, ...)``, the initial noise alone, or ``(B, steps + 1, ...)``, with one for
            each step of ``kernel``.
        judge: scores and gradient at clean latents.
    """
    parts = []
    for rows in batches(len(noises), engine.batch_size):
        leaf = noises[rows].detach().clone().requires_grad_(True)
        with torch.enable_grad():
            clean = sample(engine, leaf, owners[rows], kernel)
        found = judge(engine, clean.detach(), owners[rows])
        gradient = _pulled_back(engine, clean, leaf, found.gradient)
        parts.append(Ascent(found.media, found.scores, gradient))
    return Ascent.cat(parts)


def sample(engine: Engine, noises: Tensor, owners: Tensor, kernel: Kernel) -> Tensor:
    """Clean latents of ``noises`` (see :func:`sampler_gradient`), checkpointed step by step.

    The last step of a flow model is that of the ODE, so that no noise is left in the picture.
    """
    sigmas, given = engine.sigmas(), engine.conditioning(owners)
    drawn, count = noises.shape[1] > 1, len(sigmas) - 1
    chain = links(
        engine.policy, kernel, sigmas, [Switch()] * count,
        noises=noises[:, 1:] if drawn else None,
        last=engine.policy.parameterisation == "flow",
    )  # fmt: skip
    predict = predictor(engine.policy, given, engine.guidance_scale, dtype=engine.dtype)
    with engine.meter.work():
        clean = run(predict, noises[:, 0], chain).clean
    # Counted here: in the predictor, the backward pass would count it again.
    engine.meter.nfe += count * len(noises) * engine.evaluations
    return clean


def norms(x: Tensor) -> Tensor:
    """Euclidean norm of each row, ``(B,)``."""
    return x.flatten(1).norm(dim=1)


def per_row(value: Tensor, x: Tensor) -> Tensor:
    """``(B,)`` shaped to broadcast against ``x`` ``(B, ...)``."""
    return value.view(-1, *([1] * (x.ndim - 1)))


def clipped(gradient: Tensor, limit: float | Tensor) -> Tensor:
    """Each row shortened to norm ``limit`` (one for all, or ``(B,)``) where it is longer."""
    scale = (limit / norms(gradient).clamp(min=1e-30)).clamp(max=1.0)
    return gradient * per_row(scale, gradient)


def _ascent(score: Score, leaf: Tensor) -> Tensor:
    """Gradient of each row's own reward: the sum keeps rows apart, as scores are."""
    if not score.value.requires_grad:  # nothing was scored
        return torch.zeros_like(leaf)
    total = torch.where(scored(score), score.value, 0.0).sum()
    (found,) = torch.autograd.grad(total, leaf, allow_unused=True)
    return torch.zeros_like(leaf) if found is None else _usable(found)


def _pulled_back(engine: Engine, clean: Tensor, leaf: Tensor, gradient: Tensor) -> Tensor:
    """The gradient at clean latents, brought back to what they were made of."""
    with engine.meter.work():
        (found,) = torch.autograd.grad(clean, leaf, gradient.to(clean))
    return _usable(found)


def _usable(gradient: Tensor) -> Tensor:
    """fp32; rows that are not finite become 0."""
    finite = torch.isfinite(gradient).flatten(1).all(1)
    return torch.where(per_row(finite, gradient), gradient, 0.0).float()
