r"""What a stock diffusers scheduler's tables say: noise levels, clean estimates, noises.

Schedulers keep their levels in four ways; all become the suite's ``sigma`` in [0, 1] with
``x = a x0 + b eps`` (see :mod:`mmalign.sampling.process`) and a ``scale`` that takes the suite's
state to the scheduler's own.

=============================================  ======================  =====================
scheduler                                      sigma                   scale
=============================================  ======================  =====================
flow matching, ``use_flow_sigmas``             as in its table         1
DDIM, DDPM, PNDM, LCM (``alphas_cumprod``)     sqrt(1 - abar)          1
UniPC, DPM++, DEIS (``sigmas = b / a``)        s / sqrt(1 + s^2)       1
Euler, Heun, LMS, KDPM2 (``sigmas = b / a``)   s / sqrt(1 + s^2)       sqrt(1 + s^2)
=============================================  ======================  =====================
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmalign.protocols import Parameterisation

_KINDS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "epsilon"}


def is_flow(scheduler: Any) -> bool:
    """Whether the states are ``(1 - sigma) x0 + sigma eps``."""
    config = scheduler.config
    return (
        "FlowMatch" in type(scheduler).__name__
        or bool(config.get("use_flow_sigmas"))
        or str(config.get("prediction_type", "")).startswith("flow")
    )


def parameterisation(scheduler: Any) -> Parameterisation:
    """What predictions are, after :func:`canonical`.

    Raises:
        ValueError: a scheduler whose states or predictions are of no known kind.
    """
    if is_flow(scheduler):
        return "flow"
    kind = scheduler.config.get("prediction_type")
    # Other tables than these (EDM's own preconditioning, consistency models) mean something else.
    known = hasattr(scheduler, "sigmas") or hasattr(scheduler, "alphas_cumprod")
    if kind not in _KINDS or not known or "sigma_data" in scheduler.config:
        raise ValueError(
            f"{type(scheduler).__name__} with prediction_type {kind!r} cannot be steered: its "
            "states are of no kind known here. Use a scheduler that predicts "
            f"{', '.join(_KINDS)} or flow: DDIM, Euler, UniPC, DPM++, flow-match Euler ..."
        )
    return _KINDS[kind]  # type: ignore[return-value]


def step_index(scheduler: Any, timestep: Any, after: int) -> int:
    """The number of the step that starts at ``timestep``, the first one past ``after``.

    Some schedulers visit a time twice; those that count their steps themselves are asked.
    """
    if hasattr(scheduler, "_init_step_index"):
        if scheduler.step_index is None:
            scheduler._init_step_index(timestep)
        return int(scheduler.step_index)
    times = torch.as_tensor(scheduler.timesteps).cpu()
    found = torch.nonzero(times == torch.as_tensor(timestep).cpu()).flatten().tolist()
    if not found:
        raise ValueError(f"time {timestep} is none of the scheduler's: {times.tolist()}")
    return next((n for n in found if n > after), found[0])


def level(scheduler: Any, index: int) -> tuple[Tensor, Tensor]:
    """``(sigma, scale)`` before step ``index``, scalars in fp64 on the CPU.

    The level after the last step is that of ``index = len(timesteps)``.
    """
    one = torch.ones((), dtype=torch.float64)
    if hasattr(scheduler, "sigmas"):
        sigma = torch.as_tensor(scheduler.sigmas[index]).double().cpu()
        if is_flow(scheduler):
            return sigma, one
        length = (1 + sigma.square()).sqrt()
        preserving = hasattr(scheduler, "_sigma_to_alpha_sigma_t")
        return sigma / length, one if preserving else length
    kept = torch.as_tensor(_kept(scheduler, index)).double().cpu()
    return (1 - kept).clamp(min=0).sqrt(), one


def _kept(scheduler: Any, index: int) -> Any:
    """``abar`` of a scheduler that keeps a table of them."""
    times, table = scheduler.timesteps, scheduler.alphas_cumprod
    if index < len(times):
        return table[int(times[index])]
    # Where the fixed stride leads from the last time, as the native step has it.
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    last = int(times[-1]) - stride
    return table[last] if last >= 0 else getattr(scheduler, "final_alpha_cumprod", 1.0)


def canonical(scheduler: Any, x: Tensor, sigma: Tensor, output: Tensor) -> Tensor:
    """A network's output as what :func:`parameterisation` says; ``x`` is the suite's state."""
    if is_flow(scheduler) or scheduler.config.prediction_type != "sample":
        return output
    a, b = (1 - sigma.square()).sqrt(), sigma
    return (x - a.to(x) * output) / b.to(x)
