r"""DenseGRPO (2601.20218): every step is credited with the reward that it gained.

The value of a state is the reward of its completion, the picture that follows if no noise is added
any more.  A step from :math:`x_k` to :math:`x_{k+1}` gains

.. math:: \Delta_k = R(x_{k+1}) - R(x_k), \qquad \sum_k \Delta_k = R(x_T) - R(x_0),

and its advantage is :math:`\Delta_k` normalised within the prompt's group at that step.  The loss
is Flow-GRPO's with one advantage a step.  The last value is the reward of the picture itself.

No code was published; formulas are reconstructed from the paper's description.  The calibration of
each step's noise is :mod:`trainers.calibration`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trainers.advantages import step_advantage
from trainers.credit import Credit
from trainers.flow_grpo import FlowGrpo


@dataclass(frozen=True, kw_only=True)
class DenseGrpo(FlowGrpo):
    """The DenseGRPO objective: Flow-GRPO's options, and

    Attributes:
        completion_steps: network calls of a completion, spread over the remaining grid; 0 takes
            the whole of it, 1 is the one-step clean estimate.
    """

    completion_steps: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.completion_steps < 0:
            raise ValueError(
                f"completion_steps must be 0 (all that remain) or more, got {self.completion_steps}"
            )

    @property
    def needs(self) -> frozenset[str]:
        """The values of all states, besides what the KL needs."""
        return super().needs | {"values"}

    def advantage(self, credit: Credit) -> Tensor:
        """Gains normalised group by group and step by step, ``(B, S)``."""
        gains, valid = credit.gains()
        options = credit.options
        return step_advantage(gains, valid, credit.groups, options.std, options.eps)
