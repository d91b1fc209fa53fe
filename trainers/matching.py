r"""Errors of a prediction on a draw of the forward process, shared by the objectives that match it.

All are per sample, ``(b,)``, a mean over the elements of the latents, in fp64: objectives subtract
such errors from each other where they nearly agree.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from trainers.objective import ForwardBatch

ErrorForm = Literal["plain", "sigma", "sigma2", "huber", "ghuber"]

HUBER_WIDTH = 0.1  # of the pseudo-Huber form: errors well above its square grow like a distance
GHUBER_POWER = 0.25
_TINY = 1e-10


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference over elements, ``(b,)``."""
    return (a.double() - b.double()).square().flatten(1).mean(1)


def matching_error(batch: ForwardBatch, velocity: Tensor) -> Tensor:
    r""":math:`l = \mathrm{mean}_D (v - v^*)^2` with the target :math:`v^*` of the parameterisation.

    :math:`\epsilon - x_0` for flow models, :math:`\epsilon` or :math:`\alpha\epsilon - \sigma x_0`
    for diffusion models.
    """
    return distance(velocity, batch.target)


def weighed(error: Tensor, sigma: Tensor, form: ErrorForm) -> Tensor:
    r"""The error in one of AWM's forms (2509.25050).

    ``plain`` :math:`l`; ``sigma`` :math:`\sigma l`; ``sigma2`` :math:`\sigma^2 l`; ``ghuber``
    :math:`\sigma ((l + \varepsilon)^p - \varepsilon^p) / p` with :math:`p = 1/4`; ``huber``
    :math:`\sigma (\sqrt{l + c^2} - c)`, the pseudo-Huber form, for which the source gives no
    formula.
    """
    if form == "plain":
        return error
    sigma = sigma.double()
    if form == "sigma2":
        return sigma.square() * error
    if form == "huber":
        return sigma * ((error + HUBER_WIDTH**2).sqrt() - HUBER_WIDTH)
    if form == "ghuber":
        return sigma * ((error + _TINY) ** GHUBER_POWER - _TINY**GHUBER_POWER) / GHUBER_POWER
    return sigma * error


def clean_error(batch: ForwardBatch, velocity: Tensor, adaptive: bool = True) -> Tensor:
    r"""Error of the clean estimate, :math:`\mathrm{mean}_D (\hat x_0 - x_0)^2`.

    That is :math:`\sigma^2 l` for flow and v-prediction and :math:`(\sigma / \alpha)^2 l` for
    epsilon-prediction. ``adaptive`` divides by the mean absolute difference, held constant, so that
    all noise levels count about equally (DiffusionNFT, 2509.16117).
    """
    difference = (batch.estimate(velocity.double()) - batch.clean.double()).flatten(1)
    error = difference.square().mean(1)
    if not adaptive:
        return error
    return error / difference.detach().abs().mean(1).clamp_min(1e-5)


def not_negative(**options: float) -> None:
    """Refuse negative options, by name."""
    for name, value in options.items():
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")


def positive(**options: float) -> None:
    """Refuse options that are not above 0, by name."""
    for name, value in options.items():
        if value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")
