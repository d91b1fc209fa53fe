"""Muon: momentum orthogonalised by a Newton-Schulz iteration (Jordan et al., 2024).

``torch.optim.Muon`` takes matrices only; convolution kernels are most of an autoencoder, so this
one flattens them to ``(out, in * k * k)``.  Vectors and scalars fall back to Adam inside the same
optimiser, so one object holds the whole state to save.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class Muon(torch.optim.Optimizer):
    """Muon for tensors of two or more dimensions, Adam for the rest and for ``adam`` groups.

    Args:
        params: parameters or groups; a group with ``adam=True`` is updated by Adam throughout
            (embeddings, input and output layers).
        lr: learning rate of the orthogonalised updates, whose entries have RMS about
            ``0.2 * lr * sqrt(max(rows, cols))`` scaled to match Adam's (Moonlight, 2502.16982).
        adam_lr: learning rate of the Adam part.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-3,
        adam_lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "adam_lr": adam_lr,
            "momentum": momentum,
            "betas": betas,
            "weight_decay": weight_decay,
            "adam": False,
            "scale": 1.0,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update; ``group['scale']`` multiplies both learning rates (the schedule)."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                lr = group["lr"] if p.ndim >= 2 and not group["adam"] else group["adam_lr"]
                lr = lr * group["scale"]
                if group["weight_decay"] and p.ndim >= 2:
                    p.mul_(1 - lr * group["weight_decay"])
                if p.ndim >= 2 and not group["adam"]:
                    self._muon(p, group, lr)
                else:
                    self._adam(p, group, lr)
        return loss

    def _muon(self, p: torch.Tensor, group: dict[str, Any], lr: float) -> None:
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        buffer = state["momentum"].lerp_(p.grad, 1 - group["momentum"])  # type: ignore[arg-type]
        update = p.grad.lerp(buffer, group["momentum"])  # type: ignore[union-attr]
        matrix = orthogonalise(update.reshape(len(p), -1))
        rms = 0.2 * max(matrix.shape) ** 0.5
        p.add_(matrix.view_as(p).to(p.dtype), alpha=-lr * rms)

    def _adam(self, p: torch.Tensor, group: dict[str, Any], lr: float) -> None:
        state = self.state[p]
        if not state:
            state["step"] = 0
            state["first"], state["second"] = torch.zeros_like(p), torch.zeros_like(p)
        beta1, beta2 = group["betas"]
        state["step"] += 1
        state["first"].lerp_(p.grad, 1 - beta1)  # type: ignore[arg-type]
        state["second"].lerp_(p.grad.square(), 1 - beta2)  # type: ignore[union-attr]
        first = state["first"] / (1 - beta1 ** state["step"])
        second = state["second"] / (1 - beta2 ** state["step"])
        p.addcdiv_(first, second.sqrt().add_(1e-8), value=-lr)


def orthogonalise(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest semi-orthogonal matrix, approximately: singular values end in about [0.7, 1.2].

    The quintic coefficients are those of Jordan et al. (2024).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.to(torch.bfloat16 if matrix.is_cuda else torch.float32)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).to(matrix.dtype)
