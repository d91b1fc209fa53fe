"""What the diffusion families share: the variance-preserving schedule, told as noise levels.

A network trained on ``x = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps`` knows integer times ``t``; the
suite knows noise levels.  Here ``sigma = sqrt(1 - abar_t)``, so that ``alpha = sqrt(1 - sigma^2)``
is the signal that is left.  Levels are in double precision: at high noise alpha is the small
difference of two numbers near 1, and in single precision a picture would carry its rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmalign.policies.base import PipelinePolicy
from mmalign.runtime.log import say

_PARAMETERISATIONS = {"epsilon": "epsilon", "v_prediction": "v"}


class DiffusionPolicy(PipelinePolicy):
    """Policy over a UNet pipeline with a ``DDIMScheduler``; ``epsilon`` or ``v``.

    The times visited are the scheduler's own: its spacing, offset, and final noise level, which is
    not 0 with ``set_alpha_to_one=False`` (Stable Diffusion 1.x, SDXL).

    Raises:
        ValueError: another scheduler, one that clips, a prediction of another type, or a network
            distilled for consistency sampling.
    """

    component = "unet"

    def __init__(self, pipeline: Any, **options: Any) -> None:
        _check_scheduler(pipeline.scheduler, self.family)
        if pipeline.unet.config.get("time_cond_proj_dim") is not None:
            raise ValueError(
                f"the {self.family} policy cannot sample a UNet with time_cond_proj_dim (a latent "
                "consistency model): it is trained for another sampler than DDIM. Use the model "
                "that it was distilled from"
            )
        kind = pipeline.scheduler.config.prediction_type
        self.parameterisation = _PARAMETERISATIONS[kind]  # type: ignore[assignment]
        super().__init__(pipeline, **options)
        self.levels = (1 - pipeline.scheduler.alphas_cumprod.double()).sqrt()

    def times(self, sigma: Tensor) -> Tensor:
        """The integer time whose noise level is nearest to ``sigma``; int64, of its shape."""
        levels = self.levels.to(sigma.device)
        return (sigma.double().unsqueeze(-1) - levels).abs().argmin(-1)

    def sigmas(self, steps: int) -> Tensor:
        """Noise levels of the scheduler's times and its final one, ``(steps + 1,)`` fp64.

        Each step leads to the next time of the grid.  So do the stock scheduler's own steps with
        ``leading`` spacing, and with ``trailing`` where ``steps`` divides the training times; in
        the other cases it steps by a fixed length that misses the time it visits next.

        Raises:
            ValueError: more steps than the scheduler has times.
        """
        config = self.pipeline.scheduler.config
        total = config.num_train_timesteps
        if not 1 <= steps <= total - config.get("steps_offset", 0):
            raise ValueError(
                f"steps is {steps}; the scheduler of {self.name} has {total} times from offset "
                f"{config.get('steps_offset', 0)}, so steps must lie in "
                f"1..{total - config.get('steps_offset', 0)}"
            )
        # A fresh scheduler: the pipeline's own carries state between calls.
        scheduler = type(self.pipeline.scheduler).from_config(config)
        scheduler.set_timesteps(steps)
        last = int(scheduler.timesteps[-1]) - total // steps
        kept = scheduler.alphas_cumprod[last] if last >= 0 else scheduler.final_alpha_cumprod
        visited = scheduler.alphas_cumprod[scheduler.timesteps]
        # MPS has no double precision; there the grid stays on the CPU.
        device = "cpu" if self.device.type == "mps" else self.device
        return (1 - torch.cat([visited, kept.view(1)]).double()).sqrt().to(device)


def use_ddim(pipeline: Any) -> None:
    """Give a freshly loaded pipeline the DDIM scheduler of its own noise schedule, and say so.

    Published checkpoints name a faster sampler (PNDM, Euler); their noise schedule is the same.
    """
    from diffusers import DDIMScheduler

    scheduler = pipeline.scheduler
    kind = type(scheduler).__name__
    if kind == "DDIMScheduler" or "DDIMScheduler" not in _compatible(scheduler):
        return
    # What samplers without clipping do not mention, DDIM would take to be on.
    clip = scheduler.config.get("clip_sample", False)
    pipeline.scheduler = DDIMScheduler.from_config(scheduler.config, clip_sample=clip)
    say(f"sampling with DDIM in place of {kind}, on the same noise schedule")


def _compatible(scheduler: Any) -> set[str]:
    return {str(getattr(c, "__name__", c)) for c in getattr(scheduler, "compatibles", ())}


def _check_scheduler(scheduler: Any, family: str) -> None:
    """Only plain DDIM: the suite's kernels are DDIM steps without clipping."""
    kind, config = type(scheduler).__name__, scheduler.config
    fix = (
        "set pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, "
        "clip_sample=False, thresholding=False)"
    )
    if kind != "DDIMScheduler":
        raise ValueError(f"the {family} policy needs a DDIMScheduler, got {kind}; {fix}")
    for option in ("clip_sample", "thresholding"):
        if config.get(option):
            raise ValueError(
                f"the scheduler of the {family} policy has {option} on, which changes the mean of "
                f"a step behind the density's back; {fix}"
            )
    allowed = " or ".join(_PARAMETERISATIONS)
    if config.prediction_type not in _PARAMETERISATIONS:
        raise ValueError(
            f"the {family} policy needs prediction_type {allowed}, got {config.prediction_type!r}"
        )
    if config.prediction_type == "epsilon" and scheduler.alphas_cumprod[-1] <= 0:
        raise ValueError(
            f"the {family} policy cannot use epsilon-prediction on a schedule that ends in pure "
            "noise (rescale_betas_zero_snr): the clean picture is 0 / 0 there. Use "
            "rescale_betas_zero_snr=False, or a model trained for v_prediction"
        )
