r"""How far a policy has moved from the model before training, at fixed noised latents.

The latents are the states of deterministic trajectories of the model before training, so they lie
where that model works, and every look sees the same ones.  At the state of grid step :math:`k`,

.. math:: d_k = \mathrm{mean}_D (v - v_{ref})^2, \qquad
   KL_k = \mathrm{mean}_D \frac{(\mu - \mu_{ref})^2}{2 s^2},

the latter for the recipe's stochastic kernel, whose two transitions are Gaussians of the same
deviation :math:`s`.  Both are means over steps; the last step has no density and counts for
:math:`d` only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmalign.protocols import Kernel, Policy
from mmalign.sampling import fitted
from mmalign.sampling.conditioning import ConditioningCache
from mmalign.sampling.fit import deterministic
from mmalign.sampling.generate import autocast, evaluations


class Distance:
    """Measures against the weights that the policy holds when :meth:`prepare` is called.

    Args:
        prompts, seeds: ``P`` trajectories.
        steps, guidance_scale: the grid and the guidance of training.
        batch_size: rows of a network call.
        dtype: autocast precision.

    Attributes:
        nfe: network evaluations spent so far.
    """

    def __init__(
        self, policy: Policy, encode: ConditioningCache, prompts: Sequence[str],
        seeds: Sequence[int], *, steps: int, guidance_scale: float, batch_size: int,
        dtype: torch.dtype | None,
    ) -> None:  # fmt: skip
        self.policy, self.encode = policy, encode
        self.prompts, self.seeds = list(prompts), list(seeds)
        self.scale, self.batch_size, self.dtype = guidance_scale, batch_size, dtype
        self.sigmas = policy.sigmas(steps)
        self.states: list[tuple[Tensor, Tensor]] = []  # state and prediction of every grid step
        self.nfe = 0

    @torch.no_grad()
    def prepare(self) -> None:
        """Walk the trajectories under the weights as they are; a second call does nothing."""
        if self.states:
            return
        kernel = deterministic(self.policy.parameterisation)
        x = self.policy.init_noise(self.seeds)
        for k in range(len(self.sigmas) - 1):
            predicted = self._predict(x, k)
            self.states.append((x.cpu(), predicted.cpu()))
            x = kernel.step(x, self.sigmas[k], self.sigmas[k + 1], predicted).x_next

    @torch.no_grad()
    def measure(self, kernel: Kernel) -> tuple[Tensor, Tensor | None]:
        """Mean squared difference of predictions, and KL, of each trajectory: both ``(P,)``.

        The KL is ``None`` for a kernel without density.
        """
        self.prepare()
        away, divergence = [], []
        device = self.policy.device
        for k, (state, reference) in enumerate(self.states):
            x, before = state.to(device), reference.to(device)
            now = self._predict(x, k)
            away.append((now - before).flatten(1).square().mean(1))
            if kernel.stochastic and k < len(self.states) - 1:
                divergence.append(self._kl(fitted(kernel, self.policy), x, now, before, k))
        means = torch.stack(away).mean(0).cpu()
        return means, torch.stack(divergence).mean(0).cpu() if divergence else None

    def _kl(self, kernel: Any, x: Tensor, now: Tensor, before: Tensor, k: int) -> Tensor:
        noise = torch.zeros_like(x)
        ours, theirs = (
            kernel.step(x, self.sigmas[k], self.sigmas[k + 1], p, noise) for p in (now, before)
        )
        apart = (ours.mean - theirs.mean).square() / (2 * ours.std**2)
        return apart.flatten(1).mean(1)  # type: ignore[no-any-return]

    def _predict(self, x: Tensor, k: int) -> Tensor:
        self.policy.denoiser.eval()
        parts = []
        with autocast(self.policy.device, self.dtype):
            for at in range(0, len(x), self.batch_size):
                rows = slice(at, at + self.batch_size)
                conditioning = self.encode(self.prompts[rows])
                self.nfe += evaluations(len(x[rows]), self.scale, conditioning)
                parts.append(self.policy.predict(x[rows], self.sigmas[k], conditioning, self.scale))
        return torch.cat(parts)
