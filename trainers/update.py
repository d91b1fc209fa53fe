"""One optimiser update: accumulate the objective's gradient, step.

An objective of the reverse process sees recorded steps, replayed; one of the forward process sees
clean latents, noised anew. The gradient is that of the mean over the update's samples (over all
processes) and over recorded steps or draws, whatever the micro-batch and however samples are
spread over processes.
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
from trainers.forward import Noising, group_means
from trainers.model import TrainableModel
from trainers.objective import NO_LOSS, StepBatch


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
        forward: how latents are noised, for an objective of the forward process.
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
        forward: Noising | None = None,
    ) -> None:
        self.policy, self.model, self.objective, self.kernel = policy, model, objective, kernel
        self.optimizer, self.accelerator = optimizer, accelerator
        self.grad_clip, self.dtype, self.forward = grad_clip, dtype, forward
        self.automatic = micro_batch == 0
        self.micro_batch = micro_batch or 64
        self.nfe = 0

    def __call__(
        self, rollout: Rollout, advantages: Tensor, keep: Tensor, count: int
    ) -> tuple[Totals, float]:
        """One update on local rows.

        Args:
            rollout: this process's samples of the update.
            advantages: ``(b,)``, or ``(b, S)`` with one for each recorded step or draw;
                ``keep``: ``(b,)`` bool, the samples to train on.
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
                if not self.automatic or self.micro_batch == 1 or self._shared_statistic():
                    raise
                self.micro_batch //= 2
                torch.cuda.empty_cache()
                say(f"out of GPU memory: micro-batch is now {self.micro_batch}")
        norm = self._step()
        return totals, norm

    def prepare(
        self, advantages: Tensor, keep: Tensor, groups: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Advantages and kept samples as the objective wants them, of a whole rollout.

        An objective of the forward process may turn advantages into weights by a method
        ``weights(advantages, groups, valid)``; it never trains on an unscored sample, whose
        advantage of 0 would not be nothing there.
        """
        if self.forward is None:
            return advantages, keep
        weights = getattr(self.objective, "weights", None)
        if weights is not None:
            advantages = weights(advantages, groups, valid)
        return advantages, keep & valid

    def _accumulate(self, rollout: Rollout, advantages: Tensor, keep: Tensor, count: int) -> Totals:
        totals = Totals()
        passes = len(rollout.steps) if self.forward is None else self.forward.draws
        self.policy.denoiser.eval()  # dropout would break the ratio
        for index in range(passes):
            advantage = advantages if advantages.ndim == 1 else advantages[:, index]
            rows = self._rows(advantage, keep)
            pooled = self._pooled(rollout, advantage, rows, index)
            for at, chunk in enumerate(rows.split(self.micro_batch) if len(rows) else ()):
                part = None if pooled is None else pooled.split(self.micro_batch)[at]
                loss, metrics = self._loss(rollout[chunk], advantage[chunk], index, part)
                value = loss.sum() / (count * passes)
                if not torch.isfinite(value):
                    raise TrainingError(
                        f"the loss is {value.item()} at {self._place(rollout, index)}; no weight "
                        "was changed. Lower optim.lr, raise objective.kl_beta, or use "
                        "model.precision fp32"
                    )
                value.backward()
                self._add(totals, metrics, rollout, index)
        return totals

    def _rows(self, advantage: Tensor, keep: Tensor) -> Tensor:
        # Without a KL a zero advantage has no gradient: such rows cost a pass and teach nothing.
        trained = keep if self.objective.needs - NO_LOSS else keep & (advantage != 0)
        return torch.nonzero(trained).flatten().cpu()

    def _place(self, rollout: Rollout, index: int) -> str:
        return f"denoising step {rollout.steps[index]}" if self.forward is None else f"draw {index}"

    def _add(
        self, totals: Totals, metrics: dict[str, Tensor], rollout: Rollout, index: int
    ) -> None:
        """Account under the denoising step, or under the quarter that the noise level lies in."""
        if self.forward is None:
            totals.add(metrics, str(rollout.steps[index]))
            return
        quarters = (metrics.pop("sigma") * 4).long().clamp_max(3)
        for quarter in quarters.unique().tolist():
            at = quarters == quarter
            totals.add({n: v[at] for n, v in metrics.items()}, f"sigma_{quarter / 4:.2f}")

    # -- the reverse process -------------------------------------------------------------------

    def _loss(
        self, rollout: Rollout, advantages: Tensor, index: int, pooled: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if self.forward is not None:
            batch, spent = self.forward.batch(rollout, advantages, index, pooled)
            self.nfe += spent
            loss, metrics = self.objective.loss(batch)
            return loss, {**metrics, "loss": loss.detach(), "sigma": batch.sigma}
        loss, metrics = self.objective.loss(self._replayed(rollout, advantages, index))
        passes = 2 if "reference" in self.objective.needs else 1
        self.nfe += passes * evaluations(len(rollout), rollout.guidance_scale, rollout.conditioning)
        return loss, {**metrics, "loss": loss.detach()}

    def _replayed(self, rollout: Rollout, advantages: Tensor, index: int) -> StepBatch:
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
        return StepBatch(
            log_prob=step.log_prob,
            old_log_prob=rollout.log_probs[:, index],
            advantage=advantages,
            step=step,
            velocity=velocity,
            reference=reference,
            reference_velocity=reference_velocity,
            h=rollout.sigmas[k] - rollout.sigmas[k + 1],
            old_mean=None if rollout.means is None else rollout.means[:, index],
        )

    # -- the forward process -------------------------------------------------------------------

    def _shared_statistic(self) -> bool:
        """Whether processes wait for each other within an update, so that none may start over."""
        return hasattr(self.objective, "statistic") and self.accelerator.num_processes > 1

    @torch.no_grad()
    def _pooled(
        self, rollout: Rollout, advantage: Tensor, rows: Tensor, index: int
    ) -> Tensor | None:
        """Group means of the objective's ``statistic`` for ``rows``, from a pass of its own."""
        if self.forward is None or not hasattr(self.objective, "statistic"):
            return None
        parts = [torch.zeros(0, 1, device=advantage.device)]
        for chunk in rows.split(self.micro_batch) if len(rows) else ():
            batch, spent = self.forward.batch(rollout[chunk], advantage[chunk], index)
            self.nfe += spent
            parts.append(self.objective.statistic(batch))
        values = torch.cat(parts[1:] or parts)
        return group_means(values, rollout.groups[rows], self.accelerator)

    # -- the step ------------------------------------------------------------------------------

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
        self.model.moved()
        return norm

    def _sum_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Sum gradients over processes in one transfer."""
        grads = [p.grad.flatten() for p in parameters if p.grad is not None]
        flat = self.accelerator.reduce(torch.cat(grads), reduction="sum")
        at = 0
        for p in parameters:
            p.grad = flat[at : at + p.numel()].view_as(p).clone()
            at += p.numel()
