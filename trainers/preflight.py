"""Preflight: one small rollout and one replay, and whether training could work at all.

Each check answers one way in which runs silently fail; the detail says what was seen and, where
it failed, what to do about it.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mmalign.sampling.replay import evaluate, recorded
from mmalign.types import Rollout, Score
from trainers.advantages import zero_spread_share
from trainers.config import TrainConfig
from trainers.gradient.update import GradientUpdater
from trainers.loop import Trainer
from trainers.pairs import Pairs
from trainers.skips import TrainingError


@dataclass(frozen=True)
class Check:
    """One check: its name, whether it passed, and what was seen."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Report:
    """All checks of a preflight."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(c.ok for c in self.checks)

    @property
    def failures(self) -> str:
        """The failed checks, one a line."""
        return "\n".join(f"{c.name}: {c.detail}" for c in self.checks if not c.ok)


class PreflightError(ValueError):
    """A recipe that would not train; the message lists the failed checks."""


def small(config: TrainConfig, prompts: int = 6, images: int = 4) -> TrainConfig:
    """The same recipe on a few samples."""
    return replace(
        config,
        prompts_per_step=min(prompts, config.prompts_per_step),
        images_per_prompt=min(images, config.images_per_prompt),
        optim=replace(config.optim, updates_per_rollout=1),
        advantage=replace(config.advantage, keep=0),
        rollout=replace(config.rollout, overlap=False),
    )


def preflight(trainer: Trainer, recipe: TrainConfig | None = None) -> Report:
    """Check a trainer built from a :func:`small` recipe. Its weights are left as they were.

    ``recipe`` is what it was made small from, whose batches the ratio is checked for; without, the
    trainer's own.
    """
    weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    try:
        if isinstance(trainer.update, GradientUpdater):
            return Report(tuple(_followed(trainer, trainer.update)))
        rollout, _ = trainer.rollouts.sample(0)
        score, groups = trainer.rollouts.score(rollout)
        rollout, score = trainer.rollouts.mapped(rollout, score)
        checks = [
            _finite(rollout),
            *([_ratio(trainer, rollout, recipe or trainer.config)] if rollout.steps else []),
            _scored(score),
            *_spread(score, groups),
            _gradient(trainer, rollout),
            _export(trainer),
            _memory(trainer),
        ]
    finally:
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                parameter.copy_(weights[name])
        trainer.optimizer.zero_grad(set_to_none=True)
    return Report(tuple(checks))


def _followed(trainer: Trainer, update: GradientUpdater) -> list[Check]:
    """The checks of an objective that follows the reward's gradient: one gradient, no step."""
    rollout, _ = trainer.rollouts.sample(0)
    gradient = _gradient(trainer, rollout)
    checks = [gradient, _export(trainer), _memory(trainer)]
    if update.score is None or update.groups is None:
        return checks  # the gradient has failed, and says why
    constant, _ = _spread(update.score, update.groups)
    return [_scored(update.score), constant, *checks]


def _finite(rollout: Rollout) -> Check:
    ok = bool(torch.isfinite(rollout.final).all() and torch.isfinite(rollout.log_probs).all())
    detail = f"{len(rollout)} samples, {rollout.nfe} network evaluations"
    if not ok:
        detail = "the rollout holds NaN or infinity; use model.precision fp32 or bf16, not fp16"
    return Check("rollout is finite", ok, detail)


def _ratio(trainer: Trainer, rollout: Rollout, recipe: TrainConfig) -> Check:
    """Replay as the update does, gradient and all, in micro-batches sized as in the recipe.

    Where those are not of the rollout's size, neither are these, in the same proportion.
    """
    update, sampled = trainer.update, min(recipe.rollout.batch_size, recipe.batch)
    updated = update.size(recipe.batch // recipe.optim.updates_per_rollout)
    size = min(updated, max(1, min(sampled, len(rollout)) * updated // sampled))
    ones = torch.ones(len(rollout), device=rollout.final.device)
    pairs = Pairs.of(ones, ones > 0, len(rollout.steps), zeros=True)
    deviations = []
    for chunk in pairs.split(size):
        given = recorded(rollout, chunk.passes, chunk.rows)
        step, _ = evaluate(trainer.policy, given, update.kernel, dtype=trainer.dtype)
        assert step.log_prob is not None
        deviations.append((step.log_prob.detach() - given.log_prob).abs().max())
    worst = float(torch.stack(deviations).max())  # NaN, where there is one, unlike Python's max
    clip = float(getattr(trainer.update.objective, "clip_range", 1e-4))
    full = trainer.dtype in (None, torch.float32)
    limit = 1e-6 if full else clip / 2
    detail = f"largest |log ratio| before any update {worst:.2e} (allowed {limit:.0e})"
    ok = worst <= limit
    if not ok:
        batches = f"optim.micro_batch {sampled} as in the rollout, " if updated != sampled else ""
        detail += (
            f"; rollout and replay disagree, so clipping would act on rounding. Use {batches}"
            "model.precision fp32, or a wider objective.clip_range"
        )
    return Check("replay ratio is 1", ok, detail)


def _scored(score: Score) -> Check:
    share = float(score.valid.float().mean())
    detail = f"{share:.0%} of {len(score)} samples were scored"
    if share == 0:
        detail += "; the reward judged nothing. Check that it knows these prompts and media"
    return Check("reward scores samples", share > 0, detail)


def _spread(score: Score, groups: Tensor) -> list[Check]:
    values = score.value[score.valid]
    std = float(values.std(unbiased=False)) if len(values) else 0.0
    constant = Check(
        "reward is not constant",
        std > 1e-6,
        f"standard deviation {std:.4g} over the batch"
        + ("" if std > 1e-6 else "; a constant reward teaches nothing, choose another"),
    )
    flat = zero_spread_share(score.value, score.valid, groups)
    spread = Check(
        "reward spreads within groups",
        flat < 1,
        f"{flat:.0%} of the prompt groups have no spread"
        + ("" if flat < 1 else "; raise images_per_prompt, add noise, or grade the reward"),
    )
    return [constant, spread]


def _gradient(trainer: Trainer, rollout: Rollout) -> Check:
    """A gradient reaches every trainable parameter, from made-up advantages of both signs."""
    advantage = torch.ones(len(rollout), device=rollout.final.device)
    advantage[1::2] = -1
    keep = torch.ones_like(advantage, dtype=torch.bool)
    trainer.optimizer.zero_grad(set_to_none=True)
    try:
        trainer.update._accumulate(rollout, advantage, keep, len(rollout))
    except TrainingError as error:
        return Check("gradient reaches every parameter", False, str(error))
    named = trainer.model.named_parameters()
    # The B factors of LoRA start at 0, which hides the gradient of the A factors at first.
    dead = [
        n
        for n, p in named
        if "lora_A" not in n and (p.grad is None or not bool(p.grad.abs().max() > 0))
    ]
    if getattr(trainer.policy, "zero_start", False) and len(dead) < len(named):
        dead = []  # layers of zeros hide the others until the first update
    detail = f"{len(named)} trainable tensors, {sum(p.numel() for _, p in named):,} values"
    if not named or dead:
        shown = ", ".join(dead[:4]) or "nothing is trainable"
        detail += f"; no gradient reaches {shown}. Restrict model.lora_targets to used layers"
    return Check("gradient reaches every parameter", bool(named) and not dead, detail)


def _export(trainer: Trainer) -> Check:
    with tempfile.TemporaryDirectory() as folder:
        target = trainer.model.export(Path(folder))
        size = sum(f.stat().st_size for f in target.rglob("*.safetensors"))
    detail = f"{size / 1e6:.2f} MB of weights would be saved"
    return Check("saved weights are not empty", size > 0, detail)


def _memory(trainer: Trainer) -> Check:
    device = trainer.policy.device
    if device.type != "cuda":
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        return Check("memory", True, f"peak resident memory so far {peak:.2f} GB")
    peak = torch.cuda.max_memory_allocated(device) / 1e9
    total = torch.cuda.get_device_properties(device).total_memory / 1e9
    ok = peak < 0.95 * total
    detail = f"peak {peak:.1f} of {total:.1f} GB at micro-batch {trainer.update.micro_batch}"
    if not ok:
        detail += "; lower optim.micro_batch or set model.gradient_checkpointing"
    return Check("memory", ok, detail)
