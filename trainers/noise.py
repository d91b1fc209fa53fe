"""Kernels with parameters of their own, and the objectives that train them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from mmalign.config import ConfigError
from mmalign.protocols import Policy
from mmalign.sampling.learned import LearnedKernel
from trainers.config import TrainConfig


def learnable(kernel: Any, objective: Any, policy: Policy, config: TrainConfig) -> Any:
    """The kernel of a run: with parameters for its grid, where it has any to train.

    Raises:
        ConfigError: the kernel has parameters and the objective trains none, or the reverse.
    """
    wanted = "noise" in objective.needs
    found = isinstance(kernel, LearnedKernel)
    if wanted and not found:
        raise ConfigError(
            f"algorithm {config.algorithm!r} learns the noise of steps, which kernel "
            f"{config.rollout.kernel!r} does not let it; use rollout.kernel learned"
        )
    if found and not wanted:
        raise ConfigError(
            f"rollout.kernel is {config.rollout.kernel!r}, but algorithm {config.algorithm!r} does "
            "not train its noise; use algorithm reinflow, or another kernel"
        )
    if not found:
        return kernel
    channels = policy.init_noise([0]).shape[1]
    return kernel.learnable(policy.sigmas(config.rollout.steps).to(policy.device), channels)


def parameters_of(kernel: Any) -> Mapping[str, nn.Parameter]:
    """What a kernel has to train, as ``kernel.<name>``; empty for most."""
    own: Mapping[str, nn.Parameter] = getattr(kernel, "parameters", {})
    return {f"kernel.{name}": parameter for name, parameter in own.items()}
