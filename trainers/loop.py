"""The training loop, written once: rollout -> score -> advantage -> update -> log -> save."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.config import ConfigError
from mmalign.protocols import Policy, RewardModel
from mmalign.runtime.device import pick_dtype
from mmalign.runtime.log import JsonlLog, say
from mmalign.sampling import Plan, build_kernel, collect, fitted
from mmalign.sampling.conditioning import ConditioningCache
from mmalign.sampling.step_sde import StepSdeKernel
from mmalign.types import Rollout, Score
from trainers import calibration, checkpoint, credit
from trainers.advantages import (
    PromptTracker,
    combined_advantage,
    group_advantage,
    keep_extremes,
)
from trainers.config import TrainConfig
from trainers.credit import Credit, History, everywhere
from trainers.data import (
    PromptSource,
    Rows,
    check_overlap,
    minibatches,
    recorded_steps,
    rows_of_step,
    share,
)
from trainers.forward import build_noising, check_process
from trainers.metrics import score_metrics, update_metrics
from trainers.model import TrainableModel
from trainers.objective import build_objective
from trainers.optim import build_optimizer, lr_scale
from trainers.update import TrainingError, Updater
from vision_rewards.guard import RewardFailedError
from vision_rewards.prefetch import Prefetch

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
        if config.rollout.overlap:
            check_overlap(config, reward.info.scope, accelerator.num_processes)
        objective = build_objective(config.algorithm, dict(config.objective))
        kernel = build_kernel(config.rollout.kernel, **dict(config.rollout.kernel_options))
        kernel = fitted(kernel, policy)
        self.dtype = pick_dtype(config.model.precision, policy.device)
        check_process(config, objective, policy, kernel)
        self.model = TrainableModel(policy, config.model, "reference" in objective.needs)
        self.model.keep_copies(getattr(objective, "copies", {}))
        self.optimizer = build_optimizer(self.model, config.optim)
        # Refuse what cannot be combined so, before any work.
        credit.check(objective, config.advantage, reward.info, bool(self._weights()))
        calibration.check_kernel(kernel, config.rollout.calibration)
        self.prompts = PromptSource(config.prompts, config.seed)
        self.encode = ConditioningCache(policy)
        self.tracker = PromptTracker() if config.advantage.baseline == "tracker" else None
        self.history = History() if "history" in objective.needs else None
        self.kernel: Any = kernel
        self.calibrated = False
        self.update = Updater(
            policy, self.model, objective, kernel, self.optimizer, accelerator,
            micro_batch=config.optim.micro_batch, grad_clip=config.optim.grad_clip,
            dtype=self.dtype,
            forward=build_noising(config, policy, self.model, objective, self.dtype),
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
        if self.history is not None:
            self.history.load_state_dict(state["history"])
        if state.get("noise"):
            self._use_kernel(StepSdeKernel(**state["noise"]))
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
            "history": self.history.state_dict() if self.history else {},
            "noise": asdict(self.kernel) if self.calibrated else {},
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
        if self.config.rollout.calibration.rounds and not self.calibrated:
            self._use_kernel(calibration.calibrate(self))
        log = JsonlLog(self.folder / "metrics.jsonl", self.step) if main else None
        try:
            while self.step < self.config.steps:
                metrics = self.last = self._step_or_save()
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

    def _step_or_save(self) -> dict[str, float]:
        """One step; a reward that fails in it leaves a checkpoint of the last finished one."""
        before = checkpoint.rng_state()
        try:
            return self.train_step()
        except RewardFailedError:
            # Scoring comes before any update: only random states have moved on.
            checkpoint.restore_rng(before)
            self.save()
            say(f"the reward failed; the run is saved at step {self.step} and can be resumed")
            raise

    def train_step(self) -> dict[str, float]:
        """One rollout and its updates; returns the metrics of the step."""
        start, spent = time.perf_counter(), self.update.nfe
        with Prefetch(self.reward) if self.config.rollout.overlap else nullcontext() as scorer:
            rollout, nfe = self.sample(self.step, scorer)
            _refuse_broken(rollout)
            sampled = time.perf_counter()
            score, groups = self.score(rollout, scorer)
        evidence, completed = self.evidence(rollout, score, groups)
        advantage = self.advantages(evidence)
        keep = self._keep(advantage, groups)
        scored = time.perf_counter()
        targets, keep = self.update.prepare(advantage, keep, groups, score.valid)
        results = self._updates(rollout, targets, keep)
        self.step += 1
        end = time.perf_counter()
        self.seconds += end - start
        self.nfe += nfe + completed + self._sum(self.update.nfe - spent)
        return {
            **score_metrics(score, groups, advantage),
            **evidence.metrics(advantage),
            **update_metrics(results, self.accelerator),
            "lr": self.optimizer.param_groups[0]["lr"] * self._scale(),
            "seconds": self.seconds,
            "nfe": self.nfe,
            "time/rollout": sampled - start,
            "time/reward": scored - sampled,
            "time/update": end - scored,
            "images": self.config.batch * self.step,
        }

    def sample(
        self, step: int, scorer: Prefetch | None = None, plan: Plan | None = None
    ) -> tuple[Rollout, int]:
        """This process's share of the rollout of ``step``; evaluations over all processes.

        ``scorer`` gets each batch as soon as it is there, while the next is generated. ``plan``
        replaces that of the step.
        """
        plan = plan or self.plan(step)
        rows = rows_of_step(self.config, self.prompts, step)
        rows = rows.part(self.accelerator.process_index, self.accelerator.num_processes)
        size = len(rows) if scorer is None else self.config.rollout.batch_size
        parts = []
        for at in range(0, len(rows), size):
            parts.append(self._collect(rows[at : at + size], plan))
            if scorer is not None:
                _refuse_broken(parts[-1])
                assert parts[-1].media is not None
                scorer.submit(parts[-1].media, parts[-1].prompts)
        rollout = Rollout.cat(parts) if len(parts) > 1 else parts[0]
        return rollout, self._sum(rollout.nfe)

    def _collect(self, rows: Rows, plan: Plan) -> Rollout:
        with self.model.version(getattr(self.update.objective, "sampler", "current")):
            return collect(
                self.policy, rows.prompts, rows.groups, rows.seeds, plan, self.encode,
                init_seeds=rows.init_seeds, batch_size=self.config.rollout.batch_size,
                dtype=self.dtype, version=self.updates,
            )  # fmt: skip

    def plan(self, step: int) -> Plan:
        """How the trajectories of ``step`` are sampled."""
        record, noisy = recorded_steps(self.config, step)
        if self.update.forward is not None:  # only the clean latents are wanted, from any kernel
            record, noisy = (), noisy if self.kernel.stochastic else ()
        scale = self.config.rollout.guidance_scale
        return Plan(
            kernel=self.kernel,
            steps=self.config.rollout.steps,
            guidance_scale=self.policy.sampler.guidance_scale if scale is None else scale,
            record=record,
            noisy=noisy,
            keep_means="old_mean" in self.update.objective.needs,
        )

    @torch.no_grad()
    def score(self, rollout: Rollout, scorer: Prefetch | None = None) -> tuple[Score, Tensor]:
        """Scores and groups of all samples of the step, over all processes in row order.

        Raises:
            RewardFailedError: on all processes, where it was raised on one of them.
        """
        if self.accelerator.num_processes == 1:
            return self._local_score(rollout, scorer), rollout.groups
        shares = everywhere(
            self.accelerator,
            lambda: (self._local_score(rollout, scorer).to("cpu"), rollout.groups.cpu()),
        )
        score = Score.cat([s for s, _ in shares]).to(self.policy.device)
        return score, torch.cat([g for _, g in shares])

    def _local_score(self, rollout: Rollout, scorer: Prefetch | None) -> Score:
        assert rollout.media is not None
        if scorer is None:
            score = self.reward.score(rollout.media, rollout.prompts)
        else:
            score = scorer.results()
        return replace(score, notes=())

    def values(
        self, rollout: Rollout, score: Score, plan: Plan, steps: int
    ) -> tuple[Tensor, Tensor, int]:
        """Rewards of the completions, of ``steps`` each, of the states around recorded steps.

        Returns:
            Values and validity of all samples over all processes, ``(B, S + 1)``, and evaluations.
        """
        final = credit.ends_clean(plan, rollout)  # the last state leads to the picture itself
        shares = everywhere(
            self.accelerator,
            lambda: credit.score_states(
                self.policy, self.reward, rollout, range(len(rollout.steps) + (not final)),
                steps=steps, batch_size=self.config.rollout.batch_size, dtype=self.dtype,
            ),
        )  # fmt: skip
        device = score.value.device
        values = torch.cat([s[0] for s in shares]).to(device)
        valid = torch.cat([s[1] for s in shares]).to(device)
        if final:
            values = torch.cat([values, score.value[:, None]], 1)
            valid = torch.cat([valid, score.valid[:, None]], 1)
        return values, valid, sum(s[2] for s in shares)

    def evidence(self, rollout: Rollout, score: Score, groups: Tensor) -> tuple[Credit, int]:
        """What advantages are made from, and the network evaluations that it took."""
        objective, nfe = self.update.objective, 0
        values = valid = None
        if "values" in objective.needs:
            steps = objective.completion_steps
            values, valid, nfe = self.values(rollout, score, self.plan(self.step), steps)
        return Credit(
            score=score, groups=groups, outcome=self._outcome(score, groups), steps=rollout.steps,
            options=self.config.advantage, values=values, valid=valid,
            lowest=self.reward.info.range[0],
            history=None if self.history is None else self.history(score),
        ), nfe  # fmt: skip

    def advantages(self, evidence: Credit) -> Tensor:
        """Advantages of all samples, clipped: ``(B,)``, or ``(B, S)`` with one for each step."""
        own = getattr(self.update.objective, "advantage", None)
        advantage = evidence.outcome if own is None else own(evidence)
        limit = self.config.advantage.clip
        return advantage.clamp(-limit, limit)

    def _outcome(self, score: Score, groups: Tensor) -> Tensor:
        c = self.config.advantage
        weights = self._weights()
        if self.tracker is not None:
            rows = rows_of_step(self.config, self.prompts, self.step)
            return self.tracker(score.value, score.valid, rows.prompts)
        if weights:
            return combined_advantage(score.parts, weights, score.valid, groups, c.std, c.eps)
        return group_advantage(score.value, score.valid, groups, c.std, c.eps)

    def _weights(self) -> dict[str, float]:
        return credit.separate_weights(self.reward, self.config.advantage)

    def _keep(self, advantage: Tensor, groups: Tensor) -> Tensor:
        if self.config.advantage.keep == 0:
            return torch.ones(len(advantage), dtype=torch.bool, device=advantage.device)
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
        self.model.update_copies(self.updates)
        return results

    def _use_kernel(self, kernel: StepSdeKernel) -> None:
        self.kernel = self.update.kernel = kernel
        self.calibrated = True

    def _scale(self) -> float:
        return lr_scale(self.config, self.step)

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
