r"""Reward guidance: every prediction is shifted by the reward's gradient (2302.07121).

With :math:`x = a x_0 + b \epsilon` and the guided prediction's :math:`\hat x_0, \hat\epsilon`, each
step moves the clean estimate and lets the noise follow, so that :math:`x` stays what it is:

.. math:: \hat x_0 \mathrel{+}= \Delta, \qquad \hat\epsilon \mathrel{-}= \tfrac{a}{b} \Delta.

* **Forward**: :math:`\Delta = w\, b\, \min(b / a, \text{cap})\, g` with
  :math:`g = \nabla_x r(\hat x_0(x))`, which is :math:`\hat\epsilon \mathrel{-}= w\, b\, g`
  below the cap.  On a flow it reads :math:`u \mathrel{-}= w\, \tfrac{\sigma}{1 - \sigma}\, g`,
  which without a cap would grow beyond all bounds near :math:`\sigma = 1`.
* **Backward**: :math:`m` gradient steps on :math:`\Delta` itself, to raise
  :math:`r(\hat x_0 + \Delta)`; decoder and reward only, no network.
* **Recurrence**: the step is taken ``recurrence`` times, with fresh noise back up to the old level
  in between.

It follows classifier-free guidance, whose weight is left alone.  Gradients are normalised sample by
sample to a root mean square of 1, so that ``strength`` means the same for every reward, size of
latents and batch.  The result is no sample of a stated law; FK steering and DAS give one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmalign.protocols import Parameterisation, Policy, RewardModel, Steered
from mmalign.runtime.progress import track
from mmalign.sampling.fit import deterministic
from mmalign.sampling.process import coefficients
from mmalign.steering.common import Pool, Sampling, values_of
from mmalign.steering.das import check_through
from mmalign.steering.engine import Engine, Watch
from mmalign.steering.gradient import Through, norms, outlook, per_row, reward_gradient
from mmalign.steering.particles import Noise
from mmalign.types import Score


@dataclass(frozen=True, kw_only=True)
class RewardGuidance(Sampling):
    """Guide the sampler of each prompt by a reward's gradient.

    Args:
        n: samples a prompt, the best of which is chosen; a budget may allow fewer.
        strength: ``w`` of the forward shift; 0 is none.
        cap: of ``b / a``.
        backward: gradient steps on the clean estimate; 0 is none.
        backward_rate: length of one, as a root mean square of the latents.
        recurrence: how often each guided step is taken; 1 is once.
        normalise: bring gradients to a root mean square of 1; else ``strength`` and
            ``backward_rate`` multiply the gradients as they are.
        through: ``denoiser`` follows the gradient through the network, ``fixed`` treats the
            prediction as a constant, which costs no backward pass through the network.
        start, stop: shares of the steps between which steps are guided.

    Raises:
        ValueError: an option out of range.
    """

    method: ClassVar[str] = "reward_guidance"

    batch_size: int = 8
    n: int = 1
    strength: float = 0.1
    cap: float = 3.0
    backward: int = 0
    backward_rate: float = 0.05
    recurrence: int = 1
    normalise: bool = True
    through: Through = "denoiser"
    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        self.check(n=1, backward=0, recurrence=1)
        check_through(self.method, self.through)
        for name in ("strength", "cap", "backward_rate"):
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"reward_guidance: {name} must be a number from 0, got {getattr(self, name)}"
                )
        if not 0 <= self.start <= self.stop <= 1:
            raise ValueError(
                "reward_guidance: start and stop must be shares with start <= stop, got "
                f"{self.start} and {self.stop}"
            )

    def guided(self, steps: int) -> range:
        """The steps of a grid of ``steps`` that are guided."""
        if not (self.strength or self.backward):
            return range(0)
        return range(round(self.start * steps), round(self.stop * steps))

    @torch.no_grad()
    def run(
        self, policy: Policy, reward: RewardModel, prompts: Sequence[str], *, budget: Any = None,
        watch: Watch | None = None,
    ) -> Steered:  # fmt: skip
        """Steer one sample per prompt.

        A budget of evaluations, pictures or decodes lowers ``n``. When the time is over, the rest
        of the steps is not guided.

        Raises:
            ValueError: a reward without gradient, or as :class:`~mmalign.steering.engine.Engine`
                says. BudgetError: the budget does not allow one sample.
        """
        engine = self.engine(policy, reward, prompts, budget, watch, gradient=True)
        times, steps = len(self.guided(engine.steps)) * self.recurrence, engine.steps
        pictures = 1 + times * (bool(self.strength) + self.backward)
        evaluations = (steps - len(self.guided(steps)) + times) * engine.evaluations
        n = engine.afford(
            self.n, "sample", nfe=evaluations, reward_calls=pictures, decodes=pictures
        )
        owners = engine.owners(n)
        seeds = engine.seeds(owners, seed=self.seed)
        pool = Pool(engine, len(owners))
        trace: list[dict[str, Any]] = []
        latents = _Run(self, engine, owners, seeds, trace).result()
        pool.add(latents, owners, [{"seed": seed} for seed in seeds])
        return pool.finish(trace)


class _Run:
    """One run of the method: the loop over the sampler's steps."""

    def __init__(
        self, method: RewardGuidance, engine: Engine, owners: Tensor, seeds: Sequence[int],
        trace: list[dict[str, Any]],
    ) -> None:  # fmt: skip
        self.method, self.engine, self.owners, self.trace = method, engine, owners, trace
        self.kind = engine.policy.parameterisation
        self.kernel, self.sigmas = deterministic(self.kind), engine.sigmas()
        self.noise, self.x = Noise(seeds), engine.policy.init_noise(seeds)

    def result(self) -> Tensor:
        """Clean latents."""
        engine, guided = self.engine, self.method.guided(self.engine.steps)
        with track("steps", engine.steps, enabled=engine.watch is None) as advance:
            for n in range(engine.steps):
                on = n in guided and engine.meter.allows()
                for turn in range(self.method.recurrence if on else 1):
                    after = self._step(n, on)
                    if on and turn + 1 < self.method.recurrence:
                        noise = self.noise.draw(after)
                        self.x = renoised(
                            self.kind, after, self.sigmas[n + 1], self.sigmas[n], noise
                        )
                self.x = after
                advance(1)
        return self.x

    def _step(self, n: int, guided: bool) -> Tensor:
        """The state after step ``n`` from where the samples are."""
        sigma, after = self.sigmas[n], self.sigmas[n + 1]
        if guided:
            prediction = self._guided(n, sigma)
        else:
            prediction = self.engine.predict(self.x, sigma, self.owners)
        return self.kernel.step(self.x, sigma, after, prediction).x_next

    def _guided(self, n: int, sigma: Tensor) -> Tensor:
        method, engine = self.method, self.engine
        scores = None
        if method.strength:
            found = outlook(engine, self.x, sigma, self.owners, method.through)
            prediction, clean, scores = found.prediction, found.clean, found.ascent.scores
            scale = forward_scale(self.kind, sigma, method.cap)
            shift = method.strength * scale.to(self.x) * self._direction(found.ascent.gradient)
        else:
            prediction = engine.predict(self.x, sigma, self.owners)
            clean, shift = engine.estimate(self.x, sigma, prediction)[0], torch.zeros_like(self.x)
        for _ in range(method.backward):
            ascent = reward_gradient(engine, clean + shift, self.owners)
            scores = ascent.scores if scores is None else scores
            shift = shift + method.backward_rate * self._direction(ascent.gradient)
        self._record(n, sigma, scores, shift)
        return shifted(self.kind, prediction, sigma, shift)

    def _direction(self, gradient: Tensor) -> Tensor:
        if not self.method.normalise:
            return gradient
        size = norms(gradient) / gradient[0].numel() ** 0.5
        return torch.where(per_row(size > 0, gradient), gradient / per_row(size, gradient), 0.0)

    def _record(self, n: int, sigma: Tensor, scores: Score | None, shift: Tensor) -> None:
        """What the estimates were worth before they were shifted, and by how much they were."""
        assert scores is not None
        values = values_of(scores)
        sizes = (norms(shift) / shift[0].numel() ** 0.5).tolist()
        for prompt in range(len(self.engine.prompts)):
            rows = torch.nonzero(self.owners == prompt).flatten().tolist()
            line: dict[str, Any] = {
                "prompt": prompt, "step": n, "sigma": float(sigma),
                "values": [values[i] for i in rows], "shift": [sizes[i] for i in rows],
            }  # fmt: skip
            notes = [scores.notes[i] for i in rows if scores.notes and values[i] is None]
            self.trace.append(line | ({"notes": notes} if notes else {}))


def forward_scale(kind: Parameterisation, sigma: Tensor, cap: float) -> Tensor:
    """``b min(b / a, cap)``: how far the clean estimate moves for ``b g`` off the noise."""
    a, b = coefficients(kind, sigma)
    return b * torch.minimum(b / a.clamp(min=1e-12), torch.tensor(cap).to(a))


def shifted(kind: Parameterisation, prediction: Tensor, sigma: Tensor, shift: Tensor) -> Tensor:
    """The prediction whose clean estimate is ``shift`` further, at the same state.

    ``x0 = x - b u`` (flow), ``(x - b eps) / a`` (epsilon) or ``a x - b v``.
    """
    a, b = (c.to(prediction) for c in coefficients(kind, sigma))
    return prediction - shift * (a / b if kind == "epsilon" else 1 / b)


def renoised(
    kind: Parameterisation, x: Tensor, sigma: Tensor, wanted: Tensor, noise: Tensor
) -> Tensor:
    """``x`` at level ``sigma`` brought back up to ``wanted`` with fresh ``noise``."""
    a, b = (c.to(x) for c in coefficients(kind, sigma))
    a_up, b_up = (c.to(x) for c in coefficients(kind, wanted))
    kept = a_up / a
    return kept * x + (b_up.square() - (kept * b).square()).clamp(min=0).sqrt() * noise


__all__ = ["RewardGuidance", "forward_scale", "renoised", "shifted"]
