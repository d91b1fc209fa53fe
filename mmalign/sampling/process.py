"""The noising process of each parameterisation: ``x = a x0 + b eps``, and what networks predict.

================  =====================  =========  ================
parameterisation  a                      b          network predicts
================  =====================  =========  ================
``flow``          ``1 - sigma``          ``sigma``  ``eps - x0``
``epsilon``       ``sqrt(1 - sigma^2)``  ``sigma``  ``eps``
``v``             ``sqrt(1 - sigma^2)``  ``sigma``  ``a eps - b x0``
================  =====================  =========  ================
"""

from __future__ import annotations

from torch import Tensor

from mmalign.protocols import Parameterisation


def kept_signal(sigma: Tensor) -> Tensor:
    """``abar = 1 - sigma^2`` of a variance-preserving process, fp32, of ``sigma``'s shape.

    Taken in double precision: where a policy gives its levels in double, this returns the very
    numbers of its schedule.
    """
    exact = sigma.double() if sigma.device.type != "mps" else sigma
    return (1 - exact.square()).clamp(min=0).float()


def coefficients(parameterisation: Parameterisation, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """``(a, b)`` of ``x = a x0 + b eps``, fp32, of ``sigma``'s shape."""
    if parameterisation == "flow":
        return 1 - sigma.float(), sigma.float()
    abar = kept_signal(sigma)
    # Both from abar, as the stock schedulers take them, so that results agree bit for bit.
    return abar.sqrt(), (1 - abar).sqrt()


def like(value: Tensor, x: Tensor) -> Tensor:
    """A scalar or ``(B,)`` tensor on ``x``'s device, shaped to broadcast against ``x``."""
    if x.device.type == "mps":
        value = value.float()
    value = value.to(x.device)
    return value.reshape(-1, *([1] * (x.ndim - 1))) if value.ndim else value


def noised(parameterisation: Parameterisation, x0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
    """The state at noise level ``sigma`` (scalar or ``(B,)``) of clean ``x0`` under ``eps``."""
    a, b = coefficients(parameterisation, like(sigma, x0))
    return a * x0 + b * eps


def target(parameterisation: Parameterisation, x0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
    """What the network should predict at :func:`noised`; ``sigma`` is scalar or ``(B,)``."""
    if parameterisation == "flow":
        return eps - x0
    if parameterisation == "epsilon":
        return eps
    a, b = coefficients(parameterisation, like(sigma, x0))
    return a * eps - b * x0


def split(
    parameterisation: Parameterisation, x: Tensor, sigma: Tensor, prediction: Tensor
) -> tuple[Tensor, Tensor]:
    """Clean picture and noise that a prediction stands for: ``(x0_hat, eps_hat)``, like ``x``.

    ``sigma`` is scalar or ``(B,)``. ``epsilon`` has no clean picture at ``sigma = 1``.
    """
    a, b = coefficients(parameterisation, like(sigma, x))
    if parameterisation == "flow":
        return x - b * prediction, x + a * prediction
    if parameterisation == "epsilon":
        return (x - b * prediction) / a, prediction
    return a * x - b * prediction, a * prediction + b * x


def jump(
    parameterisation: Parameterisation,
    x: Tensor,
    sigma: Tensor,
    prediction: Tensor,
    sigma_next: Tensor,
) -> Tensor:
    """The state at ``sigma_next`` of the same clean picture and the same noise, like ``x``.

    ``a' x0_hat + b' eps_hat``: Euler's step of a flow model and DDIM's step of the others. Levels
    are scalar or ``(B,)``.
    """
    clean, noise = split(parameterisation, x, sigma, prediction)
    return noised(parameterisation, clean, noise, sigma_next)
