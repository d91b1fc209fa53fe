"""What an objective sees of some samples: one recorded step, or their clean latents noised anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mmalign.config import from_dict
from mmalign.protocols import Kernel, Parameterisation
from mmalign.registry import OBJECTIVES
from mmalign.sampling import process
from mmalign.sampling.kernels import Reduce
from mmalign.sampling.replay import Transitions
from mmalign.types import Step
from trainers.probe import Probe

Process = Literal["reverse", "forward", "gradient"]

# Needs that add no term of their own to the loss: where the advantage is 0, the loss is 0 too.
NO_LOSS = frozenset({"values", "children", "history", "noise", "old_mean", "gain"})


@dataclass(frozen=True)
class StepBatch:
    """Recorded steps, one of each of ``b`` samples (objectives of the reverse process).

    Attributes:
        log_prob: ``(b,)`` under the current weights, with gradient.
        old_log_prob: ``(b,)`` under the weights that sampled.
        advantage: ``(b,)``, or ``(b, K)`` where the objective makes ``K`` of them.
        step: the replayed transition (mean, std, clean estimate).
        velocity: ``(b, ...)`` the prediction behind it, with gradient.
        reference: the same transition under the reference model, no gradient; ``None`` unless the
            objective needs it.
        reference_velocity: likewise.
        h: ``sigma - sigma_next`` of the steps, ``(b,)``, or a scalar where all are the same step.
        old_mean: ``(b, ...)`` mean of the transition under the policy that sampled; ``None``
            unless the objective needs it.
        old_velocity: ``(b, ...)`` the prediction of that policy; likewise.
        shift: ``(b, ...)`` what guidance added to the mean; ``None`` where nothing guided.
        pooled: ``(b, K)`` what the objective's ``couple`` made of its ``statistic`` of all steps of
            all samples of a group; ``None`` for objectives without. The reference is spared then.
        gain: ``|d mean / d prediction|``, a number for each step, shaped like ``h``; ``None``
            unless the objective needs it.
        reduce: what log-probabilities are over the elements of latents: the kernel's
            ``log_prob_reduce``.
    """

    log_prob: Tensor
    old_log_prob: Tensor
    advantage: Tensor
    step: Step
    velocity: Tensor
    reference: Step | None
    reference_velocity: Tensor | None
    h: Tensor
    old_mean: Tensor | None = None
    old_velocity: Tensor | None = None
    shift: Tensor | None = None
    pooled: Tensor | None = None
    gain: Tensor | None = None
    reduce: Reduce = "mean"

    def over_elements(self, values: Tensor) -> Tensor:
        """The mean over latent elements, ``(b,)``, or the sum where densities are true ones."""
        flat = values.flatten(1)
        return flat.sum(1) if self.reduce == "sum" else flat.mean(1)


@dataclass(frozen=True)
class ForwardBatch:
    """One draw of (noise level, noise) for ``b`` samples (objectives of the forward process).

    Attributes:
        clean: ``(b, ...)`` the latents that the rollout ended in.
        noise: ``(b, ...)`` standard normal.
        sigma: ``(b,)`` noise levels.
        noised: ``(b, ...)`` the state at ``sigma``, by the process of the parameterisation.
        velocity: ``(b, ...)`` prediction at ``noised``, with gradient: a velocity, or whatever the
            parameterisation says.
        advantage: ``(b,)``, or what the objective's ``weights`` made of it.
        others: the prediction under each version of the weights that the objective needs:
            ``reference``, and the names of its ``copies``. No gradient.
        pooled: ``(b, K)`` fp64, the mean of the objective's ``statistic`` over each sample's group,
            on all processes; ``None`` for objectives without one.
        parameterisation: what predictions are; see :mod:`mmalign.sampling.process`.
        maps: ``(b, 1, h, w)`` weight of each place, for objectives that make maps of regions; or
            the class of each place, for those that make conditions of pictures.
        probe: predictions at other states, for objectives that distil.
        errors: ``(b,)`` fp64, matching errors of versions of the weights that are known without a
            pass; these have no prediction in ``others``.
    """

    clean: Tensor
    noise: Tensor
    sigma: Tensor
    noised: Tensor
    velocity: Tensor
    advantage: Tensor
    others: Mapping[str, Tensor]
    pooled: Tensor | None = None
    parameterisation: Parameterisation = "flow"
    maps: Tensor | None = None
    probe: Probe | None = None
    errors: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def probing(self) -> Probe:
        """The probe; an error where the batch was made without one."""
        if self.probe is None:
            raise RuntimeError("this batch has no probe: the update's noising makes it")
        return self.probe

    @property
    def target(self) -> Tensor:
        """What the network should have predicted; for flow models ``noise - clean``."""
        return process.target(self.parameterisation, self.clean, self.noise, self.sigma)

    def estimate(self, prediction: Tensor) -> Tensor:
        """The clean latents that a prediction at ``noised`` stands for, in its precision."""
        noised = self.noised.to(prediction.dtype)
        return process.split(self.parameterisation, noised, self.sigma, prediction)[0]

    @property
    def level(self) -> Tensor:
        """``sigma``, shaped to broadcast against latents."""
        return self.sigma.reshape(-1, *([1] * (self.clean.ndim - 1)))


@torch.no_grad()
def gain_of(kernel: Kernel, given: Transitions) -> Tensor:
    """``|d mean / d prediction|`` of steps, ``(b,)``, or a scalar where all are the same step."""
    zero = torch.zeros(given.sigma.numel(), 1, device=given.x.device)
    levels = given.sigma, given.sigma_next
    ends = [kernel.step(zero, *levels, zero + v, noise=zero).mean for v in (0.0, 1.0)]
    return (ends[1] - ends[0]).abs().reshape(given.sigma.shape)


def build_objective(name: str, options: Any) -> Any:
    """An objective by registered name with its options, strictly checked."""
    return from_dict(OBJECTIVES.load(name), options, where="objective")


def keeps_reference(objective: Any) -> bool:
    """Whether the model before training is wanted: in every batch, or whenever it is asked for."""
    return "reference" in objective.needs or bool(getattr(objective, "keeps_reference", False))


def process_of(objective: Any) -> Process:
    """The objective's ``process``: ``reverse`` (recorded steps) unless it says otherwise.

    ``forward`` noises clean latents anew, ``gradient`` follows that of the reward.
    """
    process: Process = getattr(objective, "process", "reverse")
    if process not in get_args(Process):
        allowed = ", ".join(get_args(Process))
        raise ValueError(
            f"{type(objective).__name__}.process is {process!r}; it must be one of {allowed}"
        )
    return process
