r"""DRTune: a few steps anywhere in the sampler, their inputs held constant (2405.00760).

``K`` of the steps up to the last one taken have a gradient, and no network ever sees where its
input came from:

.. math:: \frac{dr}{d\theta} = \sum_{i \in S} \frac{\partial r}{\partial x_N}
          A_{N-1} \cdots A_{i+1} B_i \frac{\partial f_i}{\partial\theta}.

Without products of Jacobians the gradient cannot explode, and early steps, which decide what is in
the picture, are taught at the cost of ``K`` evaluations. The steps are equally far apart from a
random first one. With ``early`` ``M`` above 1 the chain ends at a random one of the last ``M``
steps, where the reward sees the clean estimate.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from mmalign.sampling.chain import Switch
from trainers.gradient.objective import Path, RewardGradient, at_most


@dataclass(frozen=True, kw_only=True)
class DrTune(RewardGradient):
    """Deep reward tuning.

    Attributes:
        train_steps: :math:`K`.
        early: :math:`M`; 1 takes all steps.
    """

    train_steps: int = 4
    early: int = 1

    def path(self, steps: int, rng: Random) -> Path:
        """``K`` steps of the first ``steps - m`` have a gradient, ``m < M`` being drawn."""
        count = steps - rng.randrange(self.early)
        apart = count / self.train_steps
        offset = rng.random() * apart
        chosen = {min(int(offset + n * apart), count - 1) for n in range(self.train_steps)}
        return Path(sparse(count, chosen), sees="final" if count == steps else "estimate")

    def check_steps(self, steps: int) -> None:
        """Refuse more steps than there are."""
        at_most(steps, early=self.early)
        at_most(steps - self.early + 1, train_steps=self.train_steps)


def sparse(count: int, chosen: set[int], leak: float = 0.0) -> tuple[Switch, ...]:
    """``count`` switches: the steps ``chosen`` have a gradient, with their inputs held constant.

    Args:
        leak: share of the input's gradient that the last of them lets pass.
    """
    first, last = min(chosen), max(chosen)
    kinds = []
    for k in range(count):
        if k in chosen:
            kinds.append(Switch(detach_input=True, leak=leak if k == last else 0.0))
        else:
            kinds.append(Switch(no_grad=k < first, detach_output=k > first))
    return tuple(kinds)
