"""Plain deterministic generation: what evaluation and the user's eye look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from mmalign.protocols import Policy
from mmalign.runtime.seeds import stable_seed
from mmalign.sampling.fit import deterministic
from mmalign.sampling.renoise import ConsistencyKernel
from mmalign.types import Conditioning, Media


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[None]:
    """``torch.autocast`` in ``dtype``, or nothing for ``None`` and fp32."""
    if dtype is None or dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype)


def evaluations(rows: int, guidance_scale: float, conditioning: Conditioning) -> int:
    """Network evaluations of one call: guidance doubles them where there are two branches."""
    return rows * (2 if guidance_scale > 1 and conditioning.negative is not None else 1)


@torch.no_grad()
def integrate(
    policy: Policy,
    latents: Tensor,
    sigmas: Tensor,
    conditioning: Conditioning,
    guidance_scale: float,
) -> Tensor:
    """Deterministic steps along ``sigmas``; returns the last state."""
    kernel = deterministic(policy.parameterisation)
    for k in range(len(sigmas) - 1):
        prediction = policy.predict(latents, sigmas[k], conditioning, guidance_scale)
        latents = kernel.step(latents, sigmas[k], sigmas[k + 1], prediction).x_next
    return latents


@torch.no_grad()
def renoised(
    policy: Policy,
    latents: Tensor,
    sigmas: Tensor,
    conditioning: Conditioning,
    guidance_scale: float,
    seeds: Sequence[int],
) -> Tensor:
    """Multistep consistency sampling along ``sigmas``; returns the last state.

    Fresh noise depends on the seed alone, as the initial one does.
    """
    kernel = ConsistencyKernel().bound(policy.parameterisation)
    generators = [torch.Generator().manual_seed(stable_seed("renoise", s)) for s in seeds]
    for k in range(len(sigmas) - 1):
        prediction = policy.predict(latents, sigmas[k], conditioning, guidance_scale)
        noise = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in generators])
        noise = noise.to(latents.device)
        latents = kernel.step(latents, sigmas[k], sigmas[k + 1], prediction, noise).x_next
    return latents


@torch.no_grad()
def generate(
    policy: Policy,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int | None = None,
    guidance_scale: float | None = None,
    dtype: torch.dtype | None = None,
    encode: Callable[[Sequence[str]], Conditioning] | None = None,
) -> tuple[Media, int]:
    """Generate one sample per (prompt, seed) with the deterministic sampler.

    A policy whose ``sampler.renoise`` is on is sampled by :func:`renoised` instead. In fp32 the
    result otherwise equals the stock pipeline's for the same seeds, steps and guidance.

    Args:
        prompts, seeds: ``B`` each; noise depends on the seed alone, never on the batch.
        steps, guidance_scale: ``None`` takes the policy's recommended sampler.
        dtype: autocast precision; ``None`` leaves the weights' own.
        encode: how prompts become conditioning (a cache, say); ``policy.encode`` by default.

    Returns:
        The media and the number of network evaluations spent.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts for {len(seeds)} seeds")
    steps = steps or policy.sampler.steps
    scale = policy.sampler.guidance_scale if guidance_scale is None else guidance_scale
    policy.denoiser.eval()
    with autocast(policy.device, dtype):
        conditioning = (encode or policy.encode)(prompts)
        given = policy.init_noise(seeds), policy.sigmas(steps), conditioning, scale
        fresh = policy.sampler.renoise
        latents = renoised(policy, *given, seeds) if fresh else integrate(policy, *given)
        media = policy.decode(latents)
    return media, steps * evaluations(len(seeds), scale, conditioning)
