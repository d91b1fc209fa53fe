r"""Original-prompt-centred guidance (Parrot, Lee et al., 2401.05675).

An expanded prompt :math:`\hat c` adds detail and loses content. Guidance keeps both prompts:

.. math:: \epsilon = w_1\, \epsilon(c) + (1 - w_1 - w_2)\, \epsilon(\varnothing)
   + w_2\, \epsilon(\hat c)

and the same for velocities; the weights sum to 1. :math:`w_2 = 0` is plain guidance with
:math:`w_1`, and :math:`\hat c = c` is plain guidance with :math:`w_1 + w_2`. A step takes three
network evaluations.

The paper uses :math:`w_1 = w_2 = 5` on Stable Diffusion 1.5, a total of 10, which over-saturates
models made for less. Keep the total at what the model is made for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmalign.protocols import Policy
from mmalign.types import Conditioning

_ORIGINAL = "original."  # prefix of the tensors of the prompt as the user wrote it


def _same(name: str) -> Any:
    """The policy's own attribute, visible on the class: contracts are checked there."""
    return property(lambda self: getattr(self.policy, name))


class OriginalCentred:
    """A policy that follows an expanded prompt without leaving the user's own.

    It is a view of ``policy``: whatever it does not say itself, the policy says.

    Args:
        policy: the generator; it must have an unconditional branch.
        original_weight, refined_weight: :math:`w_1` and :math:`w_2`; guidance scales that a caller
            gives are not used.
        expand: the expanded prompt of a prompt, for :meth:`encode`.
    """

    branches = 3  # network evaluations of one prediction

    name, family, media = _same("name"), _same("family"), _same("media")
    parameterisation, sampler, device = _same("parameterisation"), _same("sampler"), _same("device")
    denoiser, unused_modules = _same("denoiser"), _same("unused_modules")
    init_noise, sigmas, decode = _same("init_noise"), _same("sigmas"), _same("decode")

    def __init__(
        self,
        policy: Policy,
        original_weight: float = 5.0,
        refined_weight: float = 5.0,
        expand: Callable[[str], str] | None = None,
    ) -> None:
        self.policy, self.expand = policy, expand
        self.original_weight, self.refined_weight = original_weight, refined_weight

    def __getattr__(self, name: str) -> Any:
        if name == "policy":  # while it is being copied or unpickled
            raise AttributeError(name)
        return getattr(self.policy, name)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts and their expansions.

        Raises:
            ValueError: no unconditional branch, or a prompt that the text encoder does not take.
        """
        refined = [p if self.expand is None else self.expand(p) for p in prompts]
        return paired(self.policy.encode(prompts), self.policy.encode(refined), self.policy.name)

    def predict(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, guidance_scale: float = 1
    ) -> Tensor:
        """The three branches in one network call, combined; fp32, shaped like ``latents``."""
        refined, original = _parted(conditioning.positive)
        nothing, _ = _parted(conditioning.negative or {})
        given = {k: torch.cat([nothing[k], original[k], refined[k]]) for k in refined}
        levels = sigma.repeat(3) if sigma.ndim else sigma
        x = torch.cat([latents] * 3)
        # A guidance scale of 1 is the bare network: guiding is linear and is done here.
        out = self.policy.predict(x, levels, Conditioning(given), 1.0)
        null, own, new = out.chunk(3)
        return null + self.original_weight * (own - null) + self.refined_weight * (new - null)


def paired(
    original: Conditioning, refined: Conditioning, name: str = "this policy"
) -> Conditioning:
    """Conditioning of two wordings of the same prompts, one row a prompt.

    Raises:
        ValueError: there is no unconditional branch to guide away from.
    """
    if original.negative is None or refined.negative is None:
        raise ValueError(
            f"original-prompt-centred guidance needs an unconditional branch, which {name} lacks "
            "(guidance-distilled models have none); leave keep out to generate from the new "
            "wording alone"
        )
    both = {f"{_ORIGINAL}{k}": v for k, v in original.positive.items()}
    null = {f"{_ORIGINAL}{k}": v for k, v in original.negative.items()}
    return Conditioning({**refined.positive, **both}, {**refined.negative, **null})


def _parted(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    refined = {k: v for k, v in tensors.items() if not k.startswith(_ORIGINAL)}
    original = {k: tensors[f"{_ORIGINAL}{k}"] for k in refined}
    return refined, original


__all__ = ["OriginalCentred", "paired"]
