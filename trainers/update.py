"""One optimiser update: accumulate the objective's gradient, step.

An objective of the reverse process sees recorded steps, replayed; one of the forward process sees
clean latents, noised anew. The gradient is that of the mean over the update's samples (over all
processes) and over recorded steps or draws, whatever the micro-batch and however samples are
spread over processes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mmalign.protocols import Kernel, Policy
from mmalign.runtime.log import say
from mmalign.runtime.seeds import stable_seed
from mmalign.sampling.replay import evaluate, recorded
from mmalign.types import Rollout, Step
from trainers.companion import everywhere_sums, sum_gradients
from trainers.forward import Noising, group_means
from trainers.loss_scale import LossScale
from trainers.model import TrainableModel
from trainers.objective import NO_LOSS, ForwardBatch, StepBatch, gain_of
from trainers.pairing import Pairing
from trainers.pairs import Pairs
from trainers.skips import SkipRule, TrainingError


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
        micro_batch: pairs of a sample and a step (or draw) per forward pass; 0 starts with 64 and,
            on a GPU, halves it whenever memory runs out.
        skips: decides which updates are made.
        forward: how latents are noised, for an objective of the forward process.
        seed: of the run, for what is drawn in an update.
        sampled: rows of a forward pass of the rollouts, where log-probabilities are compared with
            theirs; 0 where not.
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
        skips: SkipRule,
        forward: Noising | None = None,
        seed: int = 0,
        sampled: int = 0,
    ) -> None:
        self.skips = skips
        self.policy, self.model, self.objective, self.kernel = policy, model, objective, kernel
        self.optimizer, self.accelerator = optimizer, accelerator
        self.grad_clip, self.dtype, self.forward = grad_clip, dtype, forward
        self.automatic = micro_batch == 0
        self.micro_batch, self.sampled = micro_batch or 64, sampled
        self.scale, self.seed = LossScale(dtype), seed
        self.seen = 1  # pairs that the latest update of this process learned from
        self.nfe = 0
        self.learned: dict[str, float] = {}  # what a companion said last
        self.paired: bool = getattr(objective, "paired", False)

    def __call__(
        self, rollout: Rollout, advantages: Tensor, keep: Tensor, count: float
    ) -> tuple[Totals, float]:
        """One update on local rows.

        Args:
            rollout: this process's samples of the update.
            advantages: ``(b,)``, or ``(b, S)`` with one for each recorded step or draw, or
                ``(b, S, K)`` where the objective makes ``K`` of them;
                ``keep``: ``(b,)`` bool, the samples to train on.
            count: the mean's denominator: :meth:`count` over all processes.

        Returns:
            Metrics of the local samples and the gradient norm before clipping.

        Raises:
            TrainingError: too many updates were skipped; see :mod:`trainers.skips`.
        """
        companion = None if self.forward is None else self.forward.companion
        while True:
            cause = ""
            self.optimizer.zero_grad(set_to_none=True)
            if companion is not None:
                companion.forget()
            try:
                totals = self._accumulate(rollout, advantages, keep, count)
            except TrainingError as error:
                totals, cause = Totals(), str(error)
            except torch.OutOfMemoryError:
                if not self.automatic or self.micro_batch == 1 or self._shared_statistic():
                    raise
                self.micro_batch //= 2
                torch.cuda.empty_cache()
                say(f"out of GPU memory: micro-batch is now {self.micro_batch}")
                continue
            norm = self._step(cause)
            if norm is not None:
                break
        if companion is not None and not self.skips.last:
            before = companion.nfe
            self.learned = companion.learn()
            self.nfe += companion.nfe - before
        return totals, norm

    @property
    def counted(self) -> dict[str, float]:
        """What became of the updates of the run, for its log."""
        found = {"updates/skipped": self.skips.skipped, "updates/empty": self.skips.empty}
        return found | ({"updates/loss_scale": self.scale.value} if self.scale.active else {})

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints."""
        return {
            "skips": self.skips.state_dict(), "loss_scale": self.scale.state_dict(),
            "micro_batch": self.micro_batch,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; what a checkpoint lacks starts afresh."""
        self.skips.load_state_dict(state.get("skips", {}))
        self.scale.load_state_dict(state.get("loss_scale", {}))
        if self.automatic:  # another size would round otherwise
            self.micro_batch = int(state.get("micro_batch", self.micro_batch))

    def count(self, rollout: Rollout, advantages: Tensor, keep: Tensor, groups: Tensor) -> float:
        """Losses of an update for each of its passes: its samples, or its pairs on average."""
        if not self.paired:
            return int(keep.sum())
        passes = self._passes(rollout)
        pairs = self._compared(rollout, advantages, keep, groups)
        return len(pairs.loss_passes) / passes

    def _compared(
        self, rollout: Rollout, advantages: Tensor, keep: Tensor, groups: Tensor
    ) -> Pairs:
        kind: Pairing = getattr(self.objective, "pairing", "extremes")
        ties = getattr(self.objective, "keep_ties", False)
        seed = stable_seed("pairing", self.seed, rollout.policy_version)
        passes = self._passes(rollout)
        return Pairs.compared(advantages, keep, groups, passes, kind, ties, seed)

    def prepare(
        self, advantages: Tensor, keep: Tensor, groups: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Advantages and kept samples as the objective wants them, of a whole rollout.

        An objective of the forward process may turn advantages into weights by a method
        ``weights(advantages, groups, valid)``. No objective trains on an unscored sample: as one
        of advantage 0 it would count in the mean over samples; nor does one with
        ``zero_is_unlabelled`` on what has no label. Only children are judged one by one
        at their own steps, of which the final picture of a row says nothing.
        """
        weights = getattr(self.objective, "weights", None)
        if self.forward is not None and weights is not None:
            advantages = weights(advantages, groups, valid)
        if "children" in self.objective.needs:
            return advantages, keep
        if getattr(self.objective, "zero_is_unlabelled", False):
            keep = keep & (advantages != 0)
        return advantages, keep & valid

    def _accumulate(
        self, rollout: Rollout, advantages: Tensor, keep: Tensor, count: float
    ) -> Totals:
        totals, rollout = Totals(), replace(rollout, media=None)
        if self.forward is not None:
            rollout = self.forward.conditioned(rollout, self.micro_batch)
        self.policy.denoiser.eval()  # dropout would break the ratio
        batches = self.batches(rollout, advantages, keep)
        self.seen = sum(map(len, batches))
        for pairs in batches:
            loss, metrics = self._loss(rollout, pairs)
            value = loss.sum() / (count * self._passes(rollout))
            if not torch.isfinite(value):
                broken = pairs.loss_passes[~torch.isfinite(loss.detach()).cpu()]
                where = self._place(rollout, broken if len(broken) else pairs.passes)
                raise TrainingError(f"the loss is {value.item()} at {where}")
            self.scale.scaled(value).backward()
            self._add(totals, metrics, rollout, pairs)
        if self.forward is not None:
            self.forward.numbers.forget()
        return totals

    def batches(self, rollout: Rollout, advantages: Tensor, keep: Tensor) -> list[Pairs]:
        """The micro-batches of an update; arguments as of the update itself.

        They are filled across steps, so that few samples fill a device too.
        """
        # Without a KL a zero advantage has no gradient: such pairs cost a pass and teach nothing.
        zeros = not getattr(
            self.objective, "zero_without_advantage", not self.objective.needs - NO_LOSS
        )
        passes = self._passes(rollout)
        if self.paired:
            pairs = self._compared(rollout, advantages, keep, rollout.groups)
        else:
            pairs = Pairs.of(advantages, keep, passes, zeros)
        return self._pooled(rollout, pairs).split(self.size(len(rollout)))

    def _passes(self, rollout: Rollout) -> int:
        return len(rollout.steps) if self.forward is None else self.forward.draws

    def size(self, samples: int) -> int:
        """Pairs of a micro-batch, for an update on so many samples of this process."""
        rounded = self.dtype not in (None, torch.float32)
        if self.automatic and rounded and self.forward is None:
            # In reduced precision results depend on the size of the batch: one that is larger than
            # the rollout's would give ratios that are not 1.
            return max(1, min(self.micro_batch, samples, self.sampled or samples))
        return self.micro_batch

    def _place(self, rollout: Rollout, passes: Tensor) -> str:
        at = passes.unique().tolist()
        kind = "draw" if self.forward is not None else "denoising step"
        return f"{kind} {', '.join(str(i if self.forward else rollout.steps[i]) for i in at)}"

    def _add(
        self, totals: Totals, metrics: dict[str, Tensor], rollout: Rollout, pairs: Pairs
    ) -> None:
        """Account under the denoising step, or under the quarter that the noise level lies in."""
        if self.forward is None:
            kinds, names = pairs.loss_passes, [str(k) for k in rollout.steps]
        else:
            kinds = (metrics.pop("sigma") * 4).long().clamp_max(3)
            names = [f"sigma_{quarter / 4:.2f}" for quarter in range(4)]
        for kind in kinds.unique().tolist():
            at = kinds == kind
            totals.add({n: v[at] for n, v in metrics.items()}, names[kind])

    # -- the reverse process -------------------------------------------------------------------

    def _loss(self, rollout: Rollout, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        if self.forward is not None:
            batch, spent = self._noised(rollout, pairs)
            self.nfe += spent
            loss, metrics = self.objective.loss(batch)
            self.nfe += batch.probing.nfe
            return loss, {**metrics, "loss": loss.detach(), "sigma": batch.sigma[:: pairs.unit]}
        loss, metrics = self.objective.loss(self.replayed(rollout, pairs))
        return loss, {**metrics, "loss": loss.detach()}

    def replayed(self, rollout: Rollout, pairs: Pairs) -> StepBatch:
        """Recorded steps as an objective of the reverse process sees them."""
        given = recorded(rollout, pairs.passes, pairs.rows)
        reference: Step | None = None
        reference_velocity: Tensor | None = None
        # An objective with a statistic has looked at the reference when that was taken.
        anchored = "reference" in self.objective.needs and pairs.pooled is None
        self.nfe += (1 + anchored) * given.nfe
        if anchored:
            with torch.no_grad(), self.model.reference():
                reference, reference_velocity = evaluate(
                    self.policy, given, self.kernel, dtype=self.dtype
                )
        step, velocity = evaluate(self.policy, given, self.kernel, dtype=self.dtype)
        assert step.log_prob is not None
        return StepBatch(
            log_prob=step.log_prob,
            old_log_prob=given.log_prob,
            advantage=pairs.advantage,
            step=step,
            velocity=velocity,
            reference=reference,
            reference_velocity=reference_velocity,
            h=(given.sigma - given.sigma_next).float().to(given.x.device),
            old_mean=given.mean,
            old_velocity=given.velocity,
            shift=given.shift,
            pooled=pairs.pooled,
            gain=gain_of(self.kernel, given) if "gain" in self.objective.needs else None,
            reduce=getattr(self.kernel, "log_prob_reduce", "mean"),
        )

    # -- the forward process -------------------------------------------------------------------

    def _shared_statistic(self) -> bool:
        """Whether processes wait for each other within an update, so that none may start over."""
        return hasattr(self.objective, "statistic") and self.accelerator.num_processes > 1

    def _noised(self, rollout: Rollout, pairs: Pairs) -> tuple[ForwardBatch, int]:
        assert self.forward is not None
        own = rollout[pairs.rows]
        return self.forward.batch(own, pairs.advantage, pairs.passes, pairs.pooled, pairs.others)

    @torch.no_grad()
    def _pooled(self, rollout: Rollout, pairs: Pairs) -> Pairs:
        """The pairs with group means of the objective's ``statistic``, from passes of their own."""
        if not hasattr(self.objective, "statistic"):
            return pairs
        if self.forward is None:
            return self._coupled(rollout, pairs)
        parts, known = [], defaultdict(list)
        for chunk in pairs.split(self.size(len(rollout))):
            batch, spent = self._noised(rollout, chunk)
            self.nfe += spent
            parts.append(self.objective.statistic(batch))
            for name, prediction in batch.others.items():  # the loss need not ask for them again
                known[name].append(prediction)
        others = {name: torch.cat(predictions) for name, predictions in known.items()}
        values = torch.cat(parts or [torch.zeros(0, 1, device=pairs.advantage.device)])
        # A group is compared within each of its draws.
        groups = rollout.groups.cpu()[pairs.rows] * self._passes(rollout) + pairs.passes
        if getattr(self.objective, "pool", "group") == "update":  # or everyone with everyone
            groups = torch.zeros_like(groups)
        pooled = group_means(values, groups, self.accelerator)
        return replace(pairs, pooled=pooled, others=others)

    @torch.no_grad()
    def _coupled(self, rollout: Rollout, pairs: Pairs) -> Pairs:
        """The same for recorded steps: ``couple`` sees all of them, of whole groups, at once."""
        parts = [
            self.objective.statistic(self.replayed(rollout, chunk))
            for chunk in pairs.split(self.size(len(rollout)))
        ]
        if not parts:
            return pairs
        device = pairs.advantage.device
        rows, groups = pairs.rows.to(device), rollout.groups.cpu()[pairs.rows].to(device)
        pooled = self.objective.couple(torch.cat(parts), pairs.advantage, rows, groups)
        return replace(pairs, pooled=pooled)

    # -- the step ------------------------------------------------------------------------------

    def _step(self, cause: str = "") -> float | None:
        """Make the update; its norm before clipping, or ``None`` where it has to be made again."""
        parameters = self.model.parameters()
        seen, broken = float(self.seen), float(bool(cause))
        if self.accelerator.num_processes > 1:
            seen, broken = everywhere_sums([seen, broken], self.accelerator).tolist()
        if not seen and not broken:
            # Nobody had anything to learn from, and momentum alone must not move weights.
            self.skips.nothing()
            return 0.0
        # Without a gradient an optimiser skips a parameter, momentum and decay included. Zeros
        # make that the same on any number of processes, where somebody else may have had rows.
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if cause and parameters[0].grad is not None:
            # What is wrong on one process must be seen on all: it makes their common norm NaN.
            parameters[0].grad.fill_(torch.nan)
        sum_gradients(parameters, self.accelerator)
        self.scale.undo(parameters)
        limit = self.grad_clip if self.grad_clip > 0 else float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
        if self.scale.overflowed(norm, bool(broken)):
            return None
        if self.skips(norm, cause):
            self.optimizer.step()
            self.model.moved()
        return norm
