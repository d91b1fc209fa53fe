"""Optimisers and the learning-rate schedule."""

from __future__ import annotations

from typing import Any

import torch

from trainers.config import OptimConfig, TrainConfig
from trainers.model import TrainableModel
from trainers.muon import Muon


class ScaledAdamW(torch.optim.AdamW):
    """AdamW whose groups carry a ``scale`` on the learning rate, like :class:`Muon`'s."""

    def step(self, closure: Any = None) -> Any:
        """One update at ``lr * scale``; the stored ``lr`` stays the recipe's."""
        rates = [g["lr"] for g in self.param_groups]
        for group in self.param_groups:
            group["lr"] = group["lr"] * group.get("scale", 1.0)
        try:
            return super().step(closure)
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate


def build_optimizer(
    model: TrainableModel, config: OptimConfig, extra_lr: float
) -> torch.optim.Optimizer:
    """AdamW, or Muon for the blocks' matrices with Adam for the rest.

    Parameters beside the network's (``model.extra``) get Adam at ``extra_lr``, without decay.
    """
    extra = list(model.extra.values())
    own = [(n, p) for n, p in model.named_parameters() if n not in model.extra]
    beside: list[dict[str, Any]] = []
    if extra:
        beside.append({"params": extra, "lr": extra_lr, "weight_decay": 0.0})
    if config.name == "adamw":
        return ScaledAdamW(
            [{**group, "scale": 1.0} for group in ({"params": [p for _, p in own]}, *beside)],
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
        )
    blocks: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for name, parameter in own:
        matrix = parameter.ndim == 2 and "blocks" in name and "norm" not in name
        (blocks if matrix else rest).append(parameter)
    groups: list[dict[str, Any]] = []
    if blocks:
        groups.append({"params": blocks, "weight_decay": config.weight_decay})
    if rest:
        groups.append({"params": rest, "adam": True})
    groups += [{**group, "adam": True, "adam_lr": group["lr"]} for group in beside]
    return Muon(groups, lr=config.lr, adam_lr=config.lr, betas=config.betas)


def lr_scale(config: TrainConfig, step: int) -> float:
    """Multiplier of the learning rate: linear warm-up, then constant or linear decay to 10 %."""
    scale = min(1.0, (step + 1) / config.optim.warmup) if config.optim.warmup else 1.0
    if config.optim.decay:
        scale *= 1.0 - 0.9 * step / config.steps
    return scale
