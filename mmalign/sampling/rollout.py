"""Stochastic trajectories: recorded once, replayed exactly under changed weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmalign.protocols import Kernel, Policy
from mmalign.sampling.fit import deterministic, fitted
from mmalign.sampling.generate import autocast, evaluations
from mmalign.types import Conditioning, Rollout, Step


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How trajectories are sampled and which of their steps are recorded.

    Attributes:
        kernel: the stochastic kernel; any kernel where nothing is recorded and no step is noisy.
        steps: length of the grid.
        guidance_scale: the policy *is* the guided velocity; replay uses the same scale.
        record: recorded (trainable) steps, ascending; the last step of the grid, which leads to
            the clean picture where there is no density, is never among them. Empty, with
            ``noisy`` given, where only the clean result is wanted.
        noisy: steps on which the stochastic kernel acts; ``None`` means the recorded ones. Every
            other step is deterministic and consumes no randomness.
        keep_means: keep the means of the recorded transitions too.
    """

    kernel: Kernel
    steps: int
    guidance_scale: float
    record: tuple[int, ...]
    noisy: tuple[int, ...] | None = None
    keep_means: bool = False

    def __post_init__(self) -> None:
        if not self.kernel.stochastic and (self.record or self.noisy != ()):
            raise ValueError(
                "trajectories need a stochastic kernel: flow_sde, dance_sde or cps for flow "
                "models, ddim with eta above 0 for diffusion models"
            )
        if not self.record and self.noisy is None:
            raise ValueError("a plan must record at least one step, or name its noisy steps")
        if list(self.record) != sorted(set(self.record)):
            raise ValueError(f"recorded steps must ascend without repeats, got {self.record}")
        if self.record and not 0 <= self.record[0] <= self.record[-1] <= self.steps - 2:
            raise ValueError(
                f"recorded steps {self.record} must lie in 0..{self.steps - 2}: step "
                f"{self.steps - 1} of {self.steps} leads to sigma 0 and has no density"
            )
        if self.noisy is not None and not set(self.record) <= set(self.noisy):
            raise ValueError("every recorded step must be a noisy step")

    @property
    def stochastic_steps(self) -> frozenset[int]:
        """Steps on which noise is added."""
        return frozenset(self.record if self.noisy is None else self.noisy)


@torch.no_grad()
def collect(
    policy: Policy,
    prompts: Sequence[str],
    groups: Tensor,
    seeds: Sequence[int],
    plan: Plan,
    encode: Callable[[Sequence[str]], Conditioning] | None = None,
    *,
    init_seeds: Sequence[int] | None = None,
    batch_size: int = 64,
    dtype: torch.dtype | None = None,
    version: int = 0,
) -> Rollout:
    """Sample trajectories and record the steps of ``plan``.

    Args:
        prompts, groups, seeds: ``B`` each. All randomness of a sample derives from its seed.
        encode: how prompts become conditioning (a cache, say); ``policy.encode`` by default.
        init_seeds: seeds of the initial noise where it differs from ``seeds`` (DanceGRPO shares it
            in a group). Rows that agree in prompt and initial noise share the deterministic steps
            before the first noisy one.
        batch_size: rows per network call.
        dtype: autocast precision; the update must use the same for the ratio to start at 1.
    """
    if plan.stochastic_steps:  # else the kernel is never asked
        plan = replace(plan, kernel=fitted(plan.kernel, policy))
    policy.denoiser.eval()
    starts = list(seeds if init_seeds is None else init_seeds)
    parts = []
    with autocast(policy.device, dtype):
        for at in range(0, len(prompts), batch_size):
            rows = slice(at, at + batch_size)
            conditioning = (encode or policy.encode)(prompts[rows])
            parts.append(
                _trajectory(
                    policy, tuple(prompts[rows]), groups[rows], tuple(seeds[rows]),
                    starts[rows], plan, conditioning, version,
                )
            )  # fmt: skip
    return Rollout.cat(parts) if len(parts) > 1 else parts[0]


def _trajectory(
    policy: Policy, prompts: tuple[str, ...], groups: Tensor, seeds: tuple[int, ...],
    starts: Sequence[int], plan: Plan, conditioning: Conditioning, version: int,
) -> Rollout:  # fmt: skip
    sigmas = policy.sigmas(plan.steps)
    scale, noisy = plan.guidance_scale, plan.stochastic_steps
    ode = deterministic(policy.parameterisation)
    x, first, nfe = _shared_prefix(policy, prompts, starts, plan, conditioning, sigmas)
    # One generator per sample: a sample's noise does not depend on who shares its batch.
    generators = [torch.Generator().manual_seed(s ^ _NOISE_STREAM) for s in seeds]
    states: list[Tensor] = []
    nexts: list[Tensor] = []
    means: list[Tensor] = []
    log_probs: list[Tensor] = []
    for k in range(first, plan.steps):
        velocity = policy.predict(x, sigmas[k], conditioning, scale)
        nfe += evaluations(len(x), scale, conditioning)
        if k in noisy:
            noise = torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators])
            step = plan.kernel.step(x, sigmas[k], sigmas[k + 1], velocity, noise.to(x.device))
        else:
            step = ode.step(x, sigmas[k], sigmas[k + 1], velocity)
        if k in plan.record:
            if step.log_prob is None:
                raise ValueError(f"step {k} has no density: the kernel adds no noise there")
            states.append(x)
            nexts.append(step.x_next)
            if plan.keep_means:
                means.append(step.mean)
            log_probs.append(step.log_prob)
        x = step.x_next
    return Rollout(
        prompts=prompts,
        groups=groups,
        seeds=seeds,
        sigmas=sigmas,
        steps=plan.record,
        latents=_stacked(states, x),
        next_latents=_stacked(nexts, x),
        log_probs=_stacked(log_probs, x.new_empty(len(x))),
        final=x,
        media=policy.decode(x),
        conditioning=conditioning,
        guidance_scale=scale,
        policy_version=version,
        nfe=nfe,
        means=_stacked(means, x) if plan.keep_means else None,
    )


def _stacked(rows: list[Tensor], like: Tensor) -> Tensor:
    """Recorded values ``(B, S, ...)``; where nothing was recorded, ``S`` is 0."""
    return torch.stack(rows, 1) if rows else like.unsqueeze(1)[:, :0]


_NOISE_STREAM = 0x5DEECE66D  # keeps the steps' noise apart from the initial noise of the same seed


def _shared_prefix(
    policy: Policy, prompts: tuple[str, ...], starts: Sequence[int], plan: Plan,
    conditioning: Conditioning, sigmas: Tensor,
) -> tuple[Tensor, int, int]:  # fmt: skip
    """Run the steps before the first noisy one, once per distinct (prompt, initial noise)."""
    first = min(plan.stochastic_steps, default=plan.steps)
    keys = list(zip(prompts, starts, strict=True))
    distinct = {key: i for i, key in reversed(list(enumerate(keys)))}
    rows = sorted(distinct.values())
    x = policy.init_noise([starts[i] for i in rows])
    cond, ode = conditioning[rows], deterministic(policy.parameterisation)
    for k in range(first):
        velocity = policy.predict(x, sigmas[k], cond, plan.guidance_scale)
        x = ode.step(x, sigmas[k], sigmas[k + 1], velocity).x_next
    place = {i: n for n, i in enumerate(rows)}
    nfe = first * evaluations(len(rows), plan.guidance_scale, cond)
    return x[[place[distinct[key]] for key in keys]], first, nfe


def replay(
    policy: Policy,
    rollout: Rollout,
    index: int,
    kernel: Kernel,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Step, Tensor]:
    """Evaluate recorded step ``index`` (position in ``rollout.steps``) under the current weights.

    Returns:
        The step, whose ``log_prob`` carries gradients, and the predicted velocity.
    """
    k = rollout.steps[index]
    x = rollout.latents[:, index]
    with autocast(policy.device, dtype):
        velocity = policy.predict(
            x, rollout.sigmas[k], rollout.conditioning, rollout.guidance_scale
        )
    step = fitted(kernel, policy).step(
        x,
        rollout.sigmas[k],
        rollout.sigmas[k + 1],
        velocity,
        x_next=rollout.next_latents[:, index],
    )
    return step, velocity
