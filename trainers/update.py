"""One optimiser update: replay recorded steps, accumulate the objective's gradient, step.

The gradient is that of the mean over the update's samples (over all processes) and recorded
steps, whatever the micro-batch and however samples are spread over processes.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmalign.protocols import Kernel, Policy
from mmalign.runtime.log import say
from mmalign.sampling.generate import evaluations
from mmalign.sampling.rollout import replay
from mmalign.types import Rollout, Step
from trainers.model import TrainableModel
from trainers.objective import StepBatch


class TrainingError(RuntimeError):
    """Training cannot go on; what was computed so far is in the last checkpoint."""


@dataclass
class Totals:
    """Sums of per-sample metrics, by name, and extremes of the ratio."""

    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    counts: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    ratio_deviation: float = 0.0

    def add(self, metrics: dict[str, Tensor], label: str) -> None:
        """Add per-sample values, in total and under ``label`` (the time step)."""
        for name, values in metrics.items():
            for key in (name, f"{name}/{label}"):
                self.sums[key] += float(values.sum())
                self.counts[key] += len(values)
        if "ratio" in metrics and len(metrics["ratio"]):
            deviation = float((metrics["ratio"] - 1).abs().max())
            self.ratio_deviation = max(self.ratio_deviation, deviation)


class Updater:
    """Owns the optimiser step; generic over the objective.

    Args:
        micro_batch: rows per forward pass; 0 starts with 64 and, on a GPU, halves it whenever
            memory runs out.
    """

    def __init__(
        self,
        policy: Policy,
        model: TrainableModel,
        objective: Any,
        kernel: Kernel,
        optimizer: torch.optim.Optimizer,
        accelerator: Any,
        *,
        micro_batch: int,
        grad_clip: float,
        dtype: torch.dtype | None,
    ) -> None:
        self.policy, self.model, self.objective, self.kernel = policy, model, objective, kernel
        self.optimizer, self.accelerator = optimizer, accelerator
        self.grad_clip, self.dtype = grad_clip, dtype
        self.automatic = micro_batch == 0
        self.micro_batch = micro_batch or 64
        self.nfe = 0

    def __call__(
        self, rollout: Rollout, advantages: Tensor, keep: Tensor, count: int
    ) -> tuple[Totals, float]:
        """One update on local rows.

        Args:
            rollout: this process's samples of the update.
            advantages: ``(b,)``; ``keep``: ``(b,)`` bool, the samples to train on.
            count: samples of the update over all processes, the mean's denominator.

        Returns:
            Metrics of the local samples and the gradient norm before clipping.

        Raises:
            TrainingError: the loss or the gradient is not finite; no weight was changed.
        """
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            try:
                totals = self._accumulate(rollout, advantages, keep, count)
                break
            except torch.OutOfMemoryError:
                if not self.automatic or self.micro_batch == 1:
                    raise
                self.micro_batch //= 2
                torch.cuda.empty_cache()
                say(f"out of GPU memory: micro-batch is now {self.micro_batch}")
        norm = self._step()
        return totals, norm

    def _accumulate(self, rollout: Rollout, advantages: Tensor, keep: Tensor, count: int) -> Totals:
        totals = Totals()
        # Without a KL a zero advantage has no gradient: such rows cost a pass and teach nothing.
        trained = keep if self.objective.needs else keep & (advantages != 0)
        rows = torch.nonzero(trained).flatten().cpu()
        denominator = count * len(rollout.steps)
        self.policy.denoiser.eval()  # dropout would break the ratio
        for index, k in enumerate(rollout.steps):
            for chunk in rows.split(self.micro_batch) if len(rows) else ():
                loss, metrics = self._loss(rollout[chunk], advantages[chunk], index)
                value = loss.sum() / denominator
                if not torch.isfinite(value):
                    raise TrainingError(
                        f"the loss is {value.item()} at denoising step {k}; no weight was changed. "
                        "Lower optim.lr, raise objective.kl_beta, or use model.precision fp32"
                    )
                value.backward()
                totals.add(metrics, str(k))
                passes = 2 if "reference" in self.objective.needs else 1
                self.nfe += passes * evaluations(len(chunk), rollout.guidance_scale)
        return totals

    def _loss(
        self, rollout: Rollout, advantages: Tensor, index: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        reference: Step | None = None
        reference_velocity: Tensor | None = None
        if "reference" in self.objective.needs:
            with torch.no_grad(), self.model.reference():
                reference, reference_velocity = replay(
                    self.policy, rollout, index, self.kernel, dtype=self.dtype
                )
        step, velocity = replay(self.policy, rollout, index, self.kernel, dtype=self.dtype)
        assert step.log_prob is not None
        k = rollout.steps[index]
        batch = StepBatch(
            log_prob=step.log_prob,
            old_log_prob=rollout.log_probs[:, index],
            advantage=advantages,
            step=step,
            velocity=velocity,
            reference=reference,
            reference_velocity=reference_velocity,
            h=rollout.sigmas[k] - rollout.sigmas[k + 1],
        )
        loss, metrics = self.objective.loss(batch)
        return loss, {**metrics, "loss": loss.detach()}

    def _step(self) -> float:
        parameters = self.model.parameters()
        # Without a gradient an optimiser skips a parameter, momentum and decay included. Zeros
        # make that the same on any number of processes, where somebody else may have had rows.
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if self.accelerator.num_processes > 1:
            self._sum_gradients(parameters)
        limit = self.grad_clip if self.grad_clip > 0 else float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
        if norm != norm or norm == float("inf"):
            raise TrainingError(
                f"the gradient norm is {norm}; no weight was changed. Lower optim.lr or use "
                "model.precision fp32"
            )
        self.optimizer.step()
        return norm

    def _sum_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Sum gradients over processes in one transfer."""
        grads = [p.grad.flatten() for p in parameters if p.grad is not None]
        flat = self.accelerator.reduce(torch.cat(grads), reduction="sum")
        at = 0
        for p in parameters:
            p.grad = flat[at : at + p.numel()].view_as(p).clone()
            at += p.numel()
