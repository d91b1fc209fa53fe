r"""IPO (Azar et al., 2310.12036) on noised pictures: margins regressed onto a finite one.

.. math:: L = \left( z - \frac{1}{2 \tau} \right)^2, \qquad
          z = \frac{\beta}{2} (l_w - l_l), \quad l = w(\sigma) (e_{ref} - e_\theta)

:math:`z` is the difference of log-ratios in the units of Diffusion-DPO: raw differences of errors
are of order 1e-3 and would never be seen beside :math:`1 / (2 \tau)`. Unlike DPO's, the gradient is
0 at a finite margin, so labels without noise do not drive the model ever further from the
reference.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trainers.matching import positive
from trainers.preferences.pairwise import ReferencePairs


@dataclass(frozen=True, kw_only=True)
class Ipo(ReferencePairs):
    """The IPO objective; options of :class:`.pairwise.ReferencePairs`.

    Attributes:
        tau: :math:`\\tau`; the margin wanted is half its inverse.
    """

    tau: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(tau=self.tau)

    def pair_loss(self, z: Tensor) -> Tensor:
        """The loss of pairs whose first won, ``(n,)``."""
        return (z - 1 / (2 * self.tau)).square()
