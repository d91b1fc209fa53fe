"""Sampling: transition kernels, trajectories that can be replayed, plain generation."""

from mmalign.sampling.ddim import DdimKernel
from mmalign.sampling.fit import KernelMismatchError, fitted
from mmalign.sampling.generate import generate
from mmalign.sampling.kernels import (
    CpsKernel,
    DanceSdeKernel,
    FlowSdeKernel,
    OdeKernel,
    build_kernel,
)
from mmalign.sampling.renoise import ConsistencyKernel
from mmalign.sampling.replay import Transitions, evaluate, recorded, replay
from mmalign.sampling.rollout import Plan, collect

__all__ = [
    "ConsistencyKernel",
    "CpsKernel",
    "DanceSdeKernel",
    "DdimKernel",
    "FlowSdeKernel",
    "KernelMismatchError",
    "OdeKernel",
    "Plan",
    "Transitions",
    "build_kernel",
    "collect",
    "evaluate",
    "fitted",
    "generate",
    "recorded",
    "replay",
]
