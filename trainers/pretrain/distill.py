r"""Distils the shapes world's flow generator into one of a few steps without guidance.

The teacher's guided path from noise to picture is cut into ``windows`` equal windows of the noise
level.  The student regresses the chord of each,

.. math:: u(x_a, \sigma_a) = \frac{x_a - x_b}{\sigma_a - \sigma_b},

so that one Euler step crosses the window in which the teacher took many (progressive distillation,
Salimans and Ho, 2202.00512; window by window, Yan et al., 2405.07510), and guidance costs nothing
any more (Meng et al., 2210.03142).  Paths start from noise and from captions alone: no pictures are
needed.  Text encoders and autoencoder stay the teacher's.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmalign.policies.load import load_policy
from mmalign.protocols import Policy
from mmalign.runtime.files import atomic_path
from mmalign.runtime.log import say
from mmalign.sampling.generate import autocast, integrate
from mmalign.shapes import caption, sample_spec
from mmalign.types import Conditioning
from trainers.muon import Muon
from trainers.pretrain.data import TASK_WEIGHTS
from trainers.pretrain.denoiser import Ema, export, make_optimizer
from trainers.pretrain.steps import Stateful, checked, rate_at, resumable_steps


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Dials of :func:`distill`; the defaults made the shipped weights.

    Attributes:
        teacher: a pipeline folder or a shipped name.
        student: where the student starts; by default as the teacher.
        guidance_scale, teacher_steps: how the teacher is sampled.
        windows: steps of the student; divides ``teacher_steps``. One window is the whole path, so
            that the student's picture of a noise is the mean of those the teacher could mean.
        shards, shard_size: paths the teacher takes in all, made while training runs.
    """

    teacher: str = "shapes-flow"
    student: str = ""
    out: str = "runs/shapes-turbo"
    guidance_scale: float = 2.0
    teacher_steps: int = 8
    windows: int = 4
    shards: int = 10
    first_shards: int = 1
    shard_size: int = 256
    steps: int = 600
    batch_size: int = 48
    decay_share: float = 0.6
    muon_lr: float = 8e-4
    adam_lr: float = 4e-4
    ema_decay: float = 0.995
    seed: int = 0
    device: str = "cpu"
    save_every: int = 50

    def __post_init__(self) -> None:
        if self.windows < 1 or self.teacher_steps % self.windows:
            raise ValueError(
                f"windows ({self.windows}) must be at least 1 and divide teacher_steps "
                f"({self.teacher_steps})"
            )


class PathPool:
    """Paths of the guided teacher, made shard by shard and cached on disk."""

    def __init__(self, config: DistillConfig, teacher: Policy) -> None:
        self.config, self.teacher = config, teacher
        self.folder = Path(config.out) / "paths"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.states: list[Tensor] = []
        self.given: list[Conditioning] = []

    def grow_for(self, step: int) -> None:
        """Add the shards that ``step`` draws from, at steps the configuration alone decides."""
        c = self.config
        interval = max(1, int(0.7 * c.steps) // max(1, c.shards))
        while len(self.states) < min(c.shards, c.first_shards + step // interval):
            index = len(self.states)
            captions = shard_captions(c, index)
            path = self.folder / f"{index:04d}.npy"
            if not path.exists():
                states = self.paths(captions, c.seed * 1_000_003 + index * c.shard_size)
                with atomic_path(path) as partial, open(partial, "wb") as file:
                    np.save(file, states.half().cpu().numpy())
            self.states.append(torch.from_numpy(np.load(path)))
            with torch.no_grad():
                self.given.append(self.teacher.encode(captions))

    @torch.no_grad()
    def paths(self, captions: list[str], seed: int) -> Tensor:
        """States at the borders of the windows, ``(N, windows + 1, ...)``, from noise to data."""
        c = self.config
        grid = torch.linspace(1, 0, c.teacher_steps + 1, device=self.teacher.device)
        each = c.teacher_steps // c.windows
        parts = []
        for at in range(0, len(captions), 64):
            some = captions[at : at + 64]
            x = self.teacher.init_noise([seed + at + i for i in range(len(some))])
            states, given = [x], self.teacher.encode(some)
            with autocast(self.teacher.device, torch.bfloat16):
                for w in range(0, c.teacher_steps, each):
                    window = grid[w : w + each + 1]
                    x = integrate(self.teacher, x, window, given, c.guidance_scale)
                    states.append(x)
            parts.append(torch.stack(states, 1))
        return torch.cat(parts)

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor, Conditioning]:
        """States, their noise levels ``(B,)``, chords and conditioning: a function of the step."""
        c = self.config
        rng = np.random.default_rng((c.seed, step))
        shard = rng.integers(len(self.states), size=c.batch_size)
        row = rng.integers(c.shard_size, size=c.batch_size)
        window = rng.integers(c.windows, size=c.batch_size)
        picks = list(zip(shard.tolist(), row.tolist(), window.tolist(), strict=True))
        start = torch.stack([self.states[s][r, w] for s, r, w in picks]).float()
        end = torch.stack([self.states[s][r, w + 1] for s, r, w in picks]).float()
        given = Conditioning.cat([self.given[s][[r]] for s, r, _ in picks])
        device = self.teacher.device
        sigma = 1 - torch.from_numpy(window).float() / c.windows
        chord = (start - end) * c.windows
        return start.to(device), sigma.to(device), chord.to(device), given


def shard_captions(config: DistillConfig, index: int) -> list[str]:
    """Training captions of one shard."""
    rng = random.Random(f"shapes distill {config.seed} {index}")
    tasks = rng.choices(list(TASK_WEIGHTS), list(TASK_WEIGHTS.values()), k=config.shard_size)
    return [caption(sample_spec(rng, "train", task)) for task in tasks]


def chord_loss(student: Policy, pool: PathPool, step: int) -> tuple[Tensor, dict[str, float]]:
    """Squared error of the chords; the metrics hold it by window, from noise to data."""
    start, sigma, chord, given = pool.batch(step)
    with autocast(student.device, torch.bfloat16):
        velocity = student.predict(start, sigma, given, 1.0)
    error = (velocity - chord).square().flatten(1).mean(1)
    metrics = {"chord": error.mean().item()}
    for level in sigma.unique().flip(0).tolist():
        metrics[f"at {level:.2f}"] = error[sigma == level].mean().item()
    return error.mean(), metrics


def distill(config: DistillConfig) -> Path:
    """Distil (or resume); returns the folder of the EMA pipeline."""
    torch.manual_seed(config.seed)
    teacher = load_policy(config.teacher, device=config.device)
    student: Any = load_policy(config.student or config.teacher, device=config.device)
    teacher.denoiser.requires_grad_(False).eval()
    network = student.denoiser.train()
    pool = PathPool(config, teacher)
    optimizer = make_optimizer(network, _is_matrix, [], config)
    _fit(config, network, optimizer, pool, lambda step: chord_loss(student, pool, step))
    pipeline = student.pipeline
    # The stock grid ends at 1/1000, which would leave nothing to do for the last step; that of one
    # step is one step in any case.
    terminal = 1 / config.windows if config.windows > 1 else None
    pipeline.scheduler = type(pipeline.scheduler).from_config(
        pipeline.scheduler.config, shift_terminal=terminal
    )
    sampler = {**student.recommended, "steps": config.windows, "guidance_scale": 1.0}
    return export(pipeline, Path(config.out) / "pipeline", sampler)


def _fit(
    config: DistillConfig, network: Any, optimizer: Muon, pool: PathPool,
    loss_of: Callable[[int], tuple[Tensor, dict[str, float]]],
) -> None:  # fmt: skip
    ema = Ema(network, config.ema_decay)
    parts: dict[str, Stateful] = {"model": network, "optimizer": optimizer, "ema": ema}
    path = Path(config.out) / "state.pt"
    for step in resumable_steps(path, parts, config.steps, config.save_every):
        pool.grow_for(step)
        for group in optimizer.param_groups:
            group["scale"] = rate_at(step, config.steps, decay_share=config.decay_share)
        loss, metrics = loss_of(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        ema.update(network, step)
        if (step + 1) % 25 == 0:
            say(f"step {step + 1}/{config.steps} {checked(metrics, 'muon_lr or adam_lr')}")
    network.load_state_dict(ema.state_dict())


def _is_matrix(name: str, p: Tensor) -> bool:
    """Whether Muon takes the parameter, as in the teacher's training."""
    return name.startswith("transformer_blocks") and p.ndim == 2 and "norm" not in name
