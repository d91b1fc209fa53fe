"""Completions: where the deterministic sampler would take the states of a recorded trajectory.

A completion of the state before or after a recorded step is the clean sample that follows if no
noise were added from there on.  Its reward is the state's value; differences of values are the
credit of the step between them (DenseGRPO, TurningPoint-GRPO, VGPO).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmalign.protocols import Policy
from mmalign.sampling.fit import deterministic
from mmalign.sampling.generate import autocast, evaluations
from mmalign.types import Rollout


def remaining_grid(sigmas: Tensor, start: int, steps: int = 0) -> Tensor:
    """The rest of the grid from index ``start``, thinned to at most ``steps`` steps: ``(n + 1,)``.

    0 keeps all of it, so that a completion takes the very steps that a trajectory without noise
    would take; 1 leaves one step to the end, the one-step clean estimate.

    Raises:
        ValueError: ``steps`` is negative, or nothing remains after ``start``.
    """
    left = len(sigmas) - 1 - start
    if steps < 0:
        raise ValueError(f"completion steps must be 0 (all that remain) or more, got {steps}")
    if left < 1:
        raise ValueError(f"no step remains after index {start} of a grid of {len(sigmas) - 1}")
    if steps == 0 or steps >= left:
        return sigmas[start:]
    chosen = [start + round(left * i / steps) for i in range(steps + 1)]
    return sigmas[chosen]


def states_of(rollout: Rollout, positions: Sequence[int]) -> tuple[Tensor, list[int]]:
    """States by position and their grid indices: ``(B, M, ...)`` and ``M`` ints.

    Position ``j`` is the state before recorded step ``j``; position ``S`` the one after the last.

    Raises:
        ValueError: the recorded steps are not consecutive, so a state is the end of no recorded
            step and the start of none.
    """
    steps = rollout.steps
    if not steps or steps != tuple(range(steps[0], steps[0] + len(steps))):
        raise ValueError(f"completions need consecutive recorded steps, got {steps}")
    every = torch.cat([rollout.latents, rollout.next_latents[:, -1:]], 1)
    return every[:, list(positions)], [steps[0] + j for j in positions]


def children_of(rollout: Rollout, positions: Sequence[int]) -> tuple[Tensor, list[int]]:
    """States that recorded steps led to, by position, and their grid indices.

    Where a rollout branches they are not those that the next steps started from.
    """
    return rollout.next_latents[:, list(positions)], [rollout.steps[j] + 1 for j in positions]


@torch.no_grad()
def complete(
    policy: Policy,
    rollout: Rollout,
    positions: Sequence[int],
    *,
    steps: int = 0,
    children: bool = False,
    batch_size: int = 64,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, int]:
    """Clean latents that the states at ``positions`` lead to, without noise.

    States of all noise levels share network calls: a row carries its own level.

    Args:
        positions: see :func:`states_of`, or with ``children`` :func:`children_of`.
        steps: of each completion, at most; 0 is the whole remaining grid.
        batch_size: rows per network call.
        dtype: autocast precision, that of the rollout.

    Returns:
        ``(B, M, ...)`` and the network evaluations spent.
    """
    states, starts = (children_of if children else states_of)(rollout, positions)
    grids = [remaining_grid(rollout.sigmas, k, steps) for k in starts]
    policy.denoiser.eval()
    # Longest first: the rows of a batch that are still on their way are always its head.
    order = sorted(range(len(positions)), key=lambda j: -len(grids[j]))
    tasks = [(row, j) for j in order for row in range(len(rollout))]
    result, nfe = torch.empty_like(states), 0
    with autocast(policy.device, dtype):
        for at in range(0, len(tasks), batch_size):
            rows, columns = (list(c) for c in zip(*tasks[at : at + batch_size], strict=True))
            ends, spent = _advance(policy, rollout, states, grids, rows, columns)
            result[rows, columns] = ends
            nfe += spent
    return result, nfe


def _advance(
    policy: Policy, rollout: Rollout, states: Tensor, grids: list[Tensor],
    rows: list[int], columns: list[int],
) -> tuple[Tensor, int]:  # fmt: skip
    """Take one batch of states to the end of their grids."""
    kernel, x, nfe = deterministic(policy.parameterisation), states[rows, columns], 0
    conditioning, scale = rollout.conditioning[rows], rollout.guidance_scale
    for i in range(len(grids[columns[0]]) - 1):
        live = sum(i < len(grids[j]) - 1 for j in columns)
        sigma, after = (torch.stack([grids[j][k] for j in columns[:live]]) for k in (i, i + 1))
        given = conditioning[slice(0, live)]
        prediction = policy.predict(x[:live], sigma, given, scale)
        moved = kernel.step(x[:live], sigma, after, prediction).x_next
        x = torch.cat([moved, x[live:]])
        nfe += evaluations(live, scale, given)
    return x, nfe
