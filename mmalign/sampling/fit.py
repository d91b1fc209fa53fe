"""Which kernels fit which policies, and the deterministic kernel of each parameterisation."""

from __future__ import annotations

from typing import Any

from mmalign.protocols import Kernel, Parameterisation, Policy
from mmalign.registry import KERNELS
from mmalign.sampling.ddim import DdimKernel
from mmalign.sampling.kernels import OdeKernel


class KernelMismatchError(ValueError):
    """A kernel whose formulas belong to another kind of model than the policy's."""


def parameterisations(kernel: Any) -> tuple[Parameterisation, ...]:
    """What predictions a kernel (or its class) understands: its ``fits``, by default flow."""
    return getattr(kernel, "fits", ("flow",))


def kernels_for(parameterisation: Parameterisation) -> tuple[str, ...]:
    """Names of the registered kernels that fit."""
    return tuple(
        e.name for e in KERNELS if parameterisation in parameterisations(KERNELS.load(e.name))
    )


def fitted(kernel: Kernel, policy: Policy) -> Kernel:
    """``kernel`` as it understands the predictions of ``policy``.

    Raises:
        KernelMismatchError: it cannot; names the kernels that can.
    """
    wanted = policy.parameterisation
    known = parameterisations(kernel)
    if wanted not in known:
        raise KernelMismatchError(
            f"kernel {type(kernel).__name__} is made for {' and '.join(known)} models, but "
            f"{policy.name} predicts {wanted}; kernels that fit: {', '.join(kernels_for(wanted))}"
        )
    bound = getattr(kernel, "bound", None)
    return kernel if bound is None else bound(wanted)  # type: ignore[no-any-return]


def deterministic(parameterisation: Parameterisation) -> Kernel:
    """The kernel without noise, which plain generation uses: Euler's step, or DDIM at eta 0."""
    return (
        OdeKernel() if parameterisation == "flow" else DdimKernel(eta=0.0).bound(parameterisation)
    )
