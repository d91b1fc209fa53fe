"""The training loop, written once: rollout -> score -> advantage -> update -> log -> save."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.config import ConfigError
from mmalign.protocols import Policy, RewardModel
from mmalign.runtime.device import pick_dtype
from mmalign.runtime.log import JsonlLog
from mmalign.sampling import Plan, build_kernel, collect
from mmalign.sampling.conditioning import ConditioningCache
from mmalign.types import Rollout, Score
from trainers import checkpoint
from trainers.advantages import (
    PromptTracker,
    combined_advantage,
    group_advantage,
    keep_extremes,
)
from trainers.config import TrainConfig
from trainers.data import PromptSource, minibatches, recorded_steps, rows_of_step, share
from trainers.metrics import score_metrics, update_metrics
from trainers.model import TrainableModel
from trainers.objective import build_objective
from trainers.optim import build_optimizer, lr_scale
from trainers.update import TrainingError, Updater

Callback = Callable[["Trainer", int], None]


class Trainer:
    """One training run.

    Args:
        config: the whole run.
        policy: what is trained, already on its device.
        reward: a (composed, guarded) reward model.
        accelerator: an ``accelerate.Accelerator``; collective calls and trackers go through it.
        folder: where checkpoints and logs go; resumed from automatically.
    """

    def __init__(
        self,
        config: TrainConfig,
        policy: Policy,
        reward: RewardModel,
        accelerator: Any,
        folder: Path,
    ) -> None:
        self.config, self.policy, self.reward = config, policy, reward
        self.accelerator, self.folder = accelerator, folder
        if config.batch < accelerator.num_processes:
            raise ConfigError(
                f"{config.batch} images a step cannot be shared by {accelerator.num_processes} "
                "processes; raise prompts_per_step or images_per_prompt"
            )
        if (side := config.rollout.size) is not None:
            policy.sampler = replace(policy.sampler, height=side, width=side)
        objective = build_objective(config.algorithm, dict(config.objective))
        kernel = build_kernel(config.rollout.kernel, **dict(config.rollout.kernel_options))
        self.dtype = pick_dtype(config.model.precision, policy.device)
        self.model = TrainableModel(policy, config.model, "reference" in objective.needs)
        self.optimizer = build_optimizer(self.model, config.optim)
        self.prompts = PromptSource(config.prompts, config.seed)
        self.encode = ConditioningCache(policy)
        self.tracker = PromptTracker() if config.advantage.baseline == "tracker" else None
        self.kernel = kernel
        self.update = Updater(
            policy, self.model, objective, kernel, self.optimizer, accelerator,
            micro_batch=config.optim.micro_batch, grad_clip=config.optim.grad_clip,
            dtype=self.dtype,
        )  # fmt: skip
        self.last: dict[str, float] = {}
        self.step = 0
        self.updates = 0
        self.seconds = 0.0
        self.nfe = 0

    # -- state ---------------------------------------------------------------------------------

    def resume(self) -> bool:
        """Continue from the newest complete checkpoint, if there is one."""
        with self.accelerator.main_process_first():  # it may have to tidy up after a kill
            state = checkpoint.load_latest(self.folder / "checkpoints", self.policy.device)
        if state is None:
            return False
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.updates = int(state["step"]), int(state["updates"])
        self.seconds, self.nfe = float(state["seconds"]), int(state["nfe"])
        if self.tracker is not None:
            self.tracker.load_state_dict(state["tracker"])
        return True

    def save(self) -> None:
        """Write a checkpoint (main process only)."""
        if not self.accelerator.is_main_process:
            return
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "updates": self.updates,
            "seconds": self.seconds,
            "nfe": self.nfe,
            "tracker": self.tracker.state_dict() if self.tracker else {},
        }
        folder = self.folder / "checkpoints"
        checkpoint.save(folder, self.step, state, self.config.keep_checkpoints)

    # -- the loop ------------------------------------------------------------------------------

    def run(self, on_step: Callback | None = None) -> None:
        """Train up to ``config.steps``, logging every step to ``metrics.jsonl``.

        Raises:
            TrainingError: non-finite loss or gradient. RewardFailedError: too much unscored.
        """
        main = self.accelerator.is_main_process
        log = JsonlLog(self.folder / "metrics.jsonl", self.step) if main else None
        try:
            while self.step < self.config.steps:
                metrics = self.last = self.train_step()
                if log is not None:
                    log.write({"step": self.step, **metrics})
                self.accelerator.log(metrics, step=self.step)
                if self.step % self.config.save_every == 0 or self.step == self.config.steps:
                    self.save()
                if on_step is not None:
                    on_step(self, self.step)
        finally:
            if log is not None:
                log.close()

    def train_step(self) -> dict[str, float]:
        """One rollout and its updates; returns the metrics of the step."""
        start, spent = time.perf_counter(), self.update.nfe
        rollout, nfe = self.sample(self.step)
        _refuse_broken(rollout)
        sampled = time.perf_counter()
        score, _, groups = self.score(rollout)
        advantage = self.advantages(rollout, score, groups)
        keep = self._keep(advantage, groups)
        scored = time.perf_counter()
        results = self._updates(rollout, advantage, keep)
        self.step += 1
        end = time.perf_counter()
        self.seconds += end - start
        self.nfe += nfe + self._sum(self.update.nfe - spent)
        return {
            **score_metrics(score, groups, advantage),
            **update_metrics(results, self.accelerator),
            "lr": self.optimizer.param_groups[0]["lr"] * self._scale(),
            "seconds": self.seconds,
            "nfe": self.nfe,
            "time/rollout": sampled - start,
            "time/reward": scored - sampled,
            "time/update": end - scored,
            "images": self.config.batch * self.step,
        }

    def sample(self, step: int) -> tuple[Rollout, int]:
        """This process's share of the rollout of ``step``; evaluations over all processes."""
        rows = rows_of_step(self.config, self.prompts, step)
        rows = rows.part(self.accelerator.process_index, self.accelerator.num_processes)
        rollout = collect(
            self.policy, rows.prompts, rows.groups, rows.seeds, self.plan(step), self.encode,
            init_seeds=rows.init_seeds, batch_size=self.config.rollout.batch_size,
            dtype=self.dtype, version=self.updates,
        )  # fmt: skip
        return rollout, self._sum(rollout.nfe)

    def plan(self, step: int) -> Plan:
        """How the trajectories of ``step`` are sampled."""
        record, noisy = recorded_steps(self.config, step)
        scale = self.config.rollout.guidance_scale
        return Plan(
            kernel=self.kernel,
            steps=self.config.rollout.steps,
            guidance_scale=self.policy.sampler.guidance_scale if scale is None else scale,
            record=record,
            noisy=noisy,
        )

    @torch.no_grad()
    def score(self, rollout: Rollout) -> tuple[Score, Tensor, Tensor]:
        """Scores, validity and groups of all samples of the step, over all processes."""
        assert rollout.media is not None
        local = self.reward.score(rollout.media, rollout.prompts)
        gather = self._gather
        score = Score(
            gather(local.value),
            gather(local.valid),
            {k: gather(v) for k, v in local.parts.items()},
            (),
            local.identity,
        )
        return score, score.valid, gather(rollout.groups)

    def advantages(self, rollout: Rollout, score: Score, groups: Tensor) -> Tensor:
        """Advantages of all samples, ``(B,)``, clipped."""
        c = self.config.advantage
        weights = dict(self.config.reward) if not isinstance(self.config.reward, str) else {}
        if self.tracker is not None:
            rows = rows_of_step(self.config, self.prompts, self.step)
            advantage = self.tracker(score.value, score.valid, rows.prompts)
        elif c.combine == "advantages" and len(weights) > 1:
            advantage = combined_advantage(score.parts, weights, score.valid, groups, c.std, c.eps)
        else:
            advantage = group_advantage(score.value, score.valid, groups, c.std, c.eps)
        return advantage.clamp(-c.clip, c.clip)

    def _keep(self, advantage: Tensor, groups: Tensor) -> Tensor:
        if self.config.advantage.keep == 0:
            return torch.ones_like(advantage, dtype=torch.bool)
        return keep_extremes(advantage, groups, self.config.advantage.keep)

    def _updates(self, rollout: Rollout, advantage: Tensor, keep: Tensor) -> list[Any]:
        """All updates of one rollout; rows are numbered over all processes."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        low, high = share(self.config.batch, rank, world)
        results = []
        for rows in minibatches(self.config, self.step):
            local = rows[(rows >= low) & (rows < high)]
            count = int(keep[rows.to(keep.device)].sum())
            at = local.to(advantage.device)
            for group in self.optimizer.param_groups:
                group["scale"] = self._scale()
            results.append(self.update(rollout[local - low], advantage[at], keep[at], count))
            self.updates += 1
            self.model.update_ema(self.updates)
        return results

    def _scale(self) -> float:
        return lr_scale(self.config, self.step)

    def _gather(self, value: Tensor) -> Tensor:
        """Concatenate over processes, in row order; shares may differ in length by one."""
        if self.accelerator.num_processes == 1:
            return value
        from accelerate.utils import gather_object

        parts = gather_object([value.cpu()])
        return torch.cat(parts).to(value.device)

    def _sum(self, value: int) -> int:
        if self.accelerator.num_processes == 1:
            return value
        total = torch.tensor(float(value), device=self.accelerator.device, dtype=torch.float64)
        return int(self.accelerator.reduce(total, reduction="sum"))


def _refuse_broken(rollout: Rollout) -> None:
    """A reward may well score what NaN latents decode to; nothing later would notice."""
    if not (torch.isfinite(rollout.log_probs).all() and torch.isfinite(rollout.final).all()):
        raise TrainingError(
            "the rollout holds NaN or infinity: the weights are broken or the precision is too "
            "small. The last checkpoint is intact; lower optim.lr, or use model.precision fp32"
        )


__all__ = ["Trainer", "TrainingError"]
