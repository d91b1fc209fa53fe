"""Sampling: transition kernels, trajectories that can be replayed, plain generation."""

from mmalign.sampling.generate import generate
from mmalign.sampling.kernels import (
    CpsKernel,
    DanceSdeKernel,
    FlowSdeKernel,
    OdeKernel,
    build_kernel,
)
from mmalign.sampling.rollout import Plan, collect, replay

__all__ = [
    "CpsKernel",
    "DanceSdeKernel",
    "FlowSdeKernel",
    "OdeKernel",
    "Plan",
    "build_kernel",
    "collect",
    "generate",
    "replay",
]
