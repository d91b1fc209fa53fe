"""The training loop, written once: rollout -> score -> advantage -> update -> log -> save."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from mmalign.protocols import Policy, RewardModel
from mmalign.runtime.device import pick_dtype
from mmalign.runtime.log import JsonlLog, say
from mmalign.runtime.training_record import TrainingRecord
from mmalign.sampling import build_kernel, fitted
from mmalign.sampling.step_sde import StepSdeKernel
from mmalign.types import Rollout, Score
from trainers import calibration, checkpoint, credit
from trainers.advantages import PromptTracker, combined_advantage, group_advantage
from trainers.companion import Setting, build_companion
from trainers.config import TrainConfig
from trainers.credit import Credit, History
from trainers.critic import build_critic
from trainers.data import check_overlap, minibatches, rows_of_step, share
from trainers.forward import build_noising, check_process
from trainers.gradient.start import check_gradient
from trainers.gradient.step import follow
from trainers.gradient.update import GradientUpdater, build_updater
from trainers.halting import Halting
from trainers.metrics import Work, score_metrics, update_metrics
from trainers.model import TrainableModel, prepare_sampler
from trainers.noise import learnable, parameters_of
from trainers.objective import build_objective, keeps_reference
from trainers.optim import build_optimizer, lr_scale
from trainers.pairing import check_groups, unit_of
from trainers.panel import Panel
from trainers.preferences.source import build_rollouts, check_pair_recipe
from trainers.rollouts import everywhere_sum, refuse_broken
from trainers.skips import TrainingError
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
        objective = build_objective(config.algorithm, dict(config.objective))
        check_groups(config, objective, accelerator.num_processes)
        prepare_sampler(policy, config.rollout)
        if config.rollout.overlap:
            check_overlap(config, reward.info.scope, accelerator.num_processes)
        kernel = build_kernel(config.rollout.kernel, **dict(config.rollout.kernel_options))
        kernel = learnable(fitted(kernel, policy), objective, policy, config)
        self.dtype = pick_dtype(config.model.precision, policy.device)
        check_process(config, objective, policy, kernel)
        check_pair_recipe(config, objective)
        check_gradient(config, objective, policy, reward)
        spared = config.pairs is not None and config.pairs.spares_reference
        self.model = TrainableModel(
            policy, config.model, keeps_reference(objective) and not spared, parameters_of(kernel)
        )
        self.model.keep_copies(getattr(objective, "copies", {}))
        if hasattr(objective, "student"):
            self.model.recommend(objective.student(config))
        extra_lr = getattr(objective, "noise_lr", config.optim.lr)
        self.optimizer = build_optimizer(self.model, config.optim, extra_lr)
        # Refuse what cannot be combined so, before any work.
        credit.check(objective, config.advantage, reward.info, bool(self._weights()))
        calibration.check_kernel(kernel, config.rollout.calibration)
        self.tracker = PromptTracker() if config.advantage.baseline == "tracker" else None
        self.history = History() if "history" in objective.needs else None
        self.rollouts = build_rollouts(
            config, policy, reward, accelerator, self.model, objective, kernel, self.dtype
        )
        self.calibrated = False
        self.update = build_updater(
            config, reward, objective, policy, self.model, kernel, self.optimizer, accelerator,
            dtype=self.dtype,
            forward=build_noising(config, policy, self.model, objective, self.dtype),
        )  # fmt: skip
        self.panel = None if config.panel is None else Panel(config, self.rollouts, folder)
        self.stopped = ""  # why a rule of the panel or of the objective ended the run
        self.halting = Halting(objective)
        self.critic = build_critic(objective, config, policy, accelerator, self.update.forward)
        setting = Setting(config, policy, self.model, reward, accelerator, self.dtype)
        self.companion = build_companion(objective, setting)
        if self.update.forward is not None:
            self.update.forward.companion = self.companion
            self.update.forward.bank = self.rollouts.bank
        self.last: dict[str, float] = {}
        self.step = 0
        self.updates = 0
        self.seconds = 0.0
        self.nfe = 0
        self.step_nfe = 0

    # -- state ---------------------------------------------------------------------------------

    def resume(self) -> bool:
        """Continue from the newest complete checkpoint, if there is one."""
        with self.accelerator.main_process_first():  # it may have to tidy up after a kill
            state = checkpoint.load_latest(self.folder / "checkpoints", self.policy.device)
        if state is None:
            return False
        self.rollouts.load_state_dict(state.get("rollouts", {}))
        self._on_main(Panel.prepared)  # what is loaded next is not the model before training
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.updates = int(state["step"]), int(state["updates"])
        self.rollouts.version = self.updates
        self.seconds, self.nfe = float(state["seconds"]), int(state["nfe"])
        self.step_nfe = int(state.get("step_nfe", 0))
        if self.tracker is not None:
            self.tracker.load_state_dict(state["tracker"])
        if self.history is not None:
            self.history.load_state_dict(state["history"])
        if self.critic is not None:
            self.critic.load_state_dict(state["critic"])
        if self.companion is not None:
            self.companion.load_state_dict(state["companion"])
        if state.get("noise"):
            self._use_kernel(StepSdeKernel(**state["noise"]))
        self.update.load_state_dict(state)
        self.rollouts.load_guards(state.get("guards", []))
        self.halting.load_state_dict(state.get("halted", ""))
        if self.panel is not None:
            self.panel.best.load_state_dict(state.get("best", {}))
        self.stopped = self._on_main(lambda panel: panel.restart(self.step)) or self.halting.reason
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
            "step_nfe": self.step_nfe,
            "tracker": self.tracker.state_dict() if self.tracker else {},
            "history": self.history.state_dict() if self.history else {},
            **self.update.state_dict(),
            "guards": self.rollouts.guards_state(),
            "critic": self.critic.state_dict() if self.critic else {},
            "companion": self.companion.state_dict() if self.companion else {},
            "noise": asdict(self.rollouts.kernel) if self.calibrated else {},
            "halted": self.halting.state_dict(),
            "rollouts": self.rollouts.state_dict(),
            "best": self.panel.best.state_dict() if self.panel else {},
        }
        folder = self.folder / "checkpoints"
        checkpoint.save(folder, self.step, state, self.config.keep_checkpoints)

    def record(self) -> TrainingRecord:
        """What the model has been trained on so far."""
        return TrainingRecord.of(self.rollouts.seen(self.step), self.rollouts.judged_by)

    # -- the loop ------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether the steps are made, or another one would end further from ``max_nfe``."""
        bound = self.config.max_nfe
        spent = bound > 0 and self.nfe + self.step_nfe / 2 > bound
        return bool(self.stopped) or self.step >= self.config.steps or spent

    @property
    def evaluation_due(self) -> bool:
        """Whether the last step is one to evaluate after, on the way."""
        every, every_nfe = self.config.evaluation.every, self.config.evaluation.every_nfe
        if self.finished or not self.step:
            return False
        crossed = every_nfe and self.nfe // every_nfe > (self.nfe - self.step_nfe) // every_nfe
        return bool((every and self.step % every == 0) or crossed)

    def run(self, on_step: Callback | None = None) -> None:
        """Train until :attr:`finished`, logging every step to ``metrics.jsonl``.

        Raises:
            TrainingError: non-finite loss or gradient. RewardFailedError: too much unscored.
        """
        main = self.accelerator.is_main_process
        if self.config.rollout.calibration.rounds and not self.calibrated:
            self._use_kernel(calibration.calibrate(self))
        log = JsonlLog(self.folder / "metrics.jsonl", self.step) if main else None
        self._look()
        try:
            while not self.finished:
                metrics = self.last = self._step_or_save()
                if log is not None:
                    log.write({"step": self.step, **metrics})
                self.accelerator.log(metrics, step=self.step)
                if self.step % self.config.save_every == 0 or self.finished:
                    self.save()
                self._look()
                if on_step is not None:
                    on_step(self, self.step)
        finally:
            if log is not None:
                log.close()

    def _look(self) -> None:
        """A look of the panel where one is due; a rule to stop at ends the run, which is saved."""
        if self.panel is None or not self.panel.wanted(self.step, self.finished):
            return
        try:
            reason = self._on_main(lambda panel: panel.look(self.step))
        except RewardFailedError:
            self.save()
            say(f"the reward failed in a look; the run is saved at step {self.step}")
            raise
        if reason and not self.stopped:
            self.stopped = reason
            say(f"stopping: {reason}")
            self.save()

    def _on_main(self, work: Callable[[Panel], str]) -> str:
        """What the panel answers on the main process, on all of them; its failure too."""
        if self.panel is None:
            return ""
        panel = self.panel

        def answer() -> str:
            return work(panel) if self.accelerator.is_main_process else ""

        return credit.everywhere(self.accelerator, answer)[0]

    def _step_or_save(self) -> dict[str, float]:
        """One step; a reward that fails in it leaves a checkpoint of the last finished one."""
        before, counted = checkpoint.rng_state(), self.rollouts.guards_state()
        try:
            return self.train_step()
        except RewardFailedError:
            # Scoring comes before any update: only random states and counts have moved on.
            checkpoint.restore_rng(before)
            self.rollouts.load_guards(counted)
            self.save()
            say(f"the reward failed; the run is saved at step {self.step} and can be resumed")
            raise

    def train_step(self) -> dict[str, float]:
        """One rollout and its updates; returns the metrics of the step."""
        start, spent = time.perf_counter(), self.update.nfe
        if isinstance(self.update, GradientUpdater):
            work = follow(self.rollouts, self.update, self._updates, self.step)
        else:
            work = self._work()
        if work.results:  # not before: held-out pairs are measured against what the step was
            self.model.update_copies(self.updates)
        self.step += 1
        self.seconds += work.end - start
        spent = everywhere_sum(self.accelerator, self.update.nfe - spent)
        self.step_nfe = work.nfe + spent
        self.nfe += self.step_nfe
        updated = update_metrics(work.results, self.accelerator)
        self.stopped = self.halting(updated, self.step) or self.stopped
        return {
            **work.metrics,
            **updated,
            **self.update.learned,
            **self.update.counted,
            "lr": self.optimizer.param_groups[0]["lr"] * self._scale(),
            "seconds": self.seconds,
            "nfe": self.nfe,
            "time/rollout": work.sampled - start,
            "time/reward": work.scored - work.sampled,
            "time/update": work.end - work.scored,
            "images": self.config.batch * self.step,
        }

    def _work(self) -> Work:
        """Rollout, scores, advantages and updates of a step."""
        with Prefetch(self.reward) if self.config.rollout.overlap else nullcontext() as scorer:
            rollout, nfe = self.rollouts.sample(self.step, scorer)
            credit.everywhere(self.accelerator, lambda: refuse_broken(rollout))
            sampled = time.perf_counter()
            score, groups = self.rollouts.score(rollout, scorer)
        rollout, score = self.rollouts.mapped(rollout, score)
        evidence, completed = self.evidence(rollout, score, groups)
        advantage = self.advantages(evidence)
        keep = credit.chosen(self.config.advantage, advantage, score, groups, self._weights())
        scored = time.perf_counter()
        targets, keep = self.update.prepare(advantage, keep, groups, score.valid)
        results = self._updates(rollout, targets, keep, groups)
        end = time.perf_counter()
        metrics = {
            **({} if self.rollouts.labelled else score_metrics(score, groups, advantage)),
            **evidence.metrics(advantage),
            **self.rollouts.metrics(rollout),
        }
        return Work(results, metrics, nfe + completed, sampled, scored, end)

    def evidence(self, rollout: Rollout, score: Score, groups: Tensor) -> tuple[Credit, int]:
        """What advantages are made from, and the network evaluations that it took."""
        objective, nfe = self.update.objective, 0
        values = valid = None
        if credit.STATES & objective.needs:
            steps = objective.completion_steps
            values, valid, nfe = self.rollouts.values(
                rollout, score, self.rollouts.plan(self.step), steps
            )
        shaped, expected = (None, None) if self.critic is None else self.critic(rollout, score)
        return Credit(
            score=score, groups=groups, outcome=self._outcome(score, groups), steps=rollout.steps,
            options=self.config.advantage, values=values, valid=valid,
            lowest=self.reward.info.range[0],
            history=None if self.history is None else self.history(score),
            shaped=shaped, expected=expected,
        ), nfe  # fmt: skip

    def advantages(self, evidence: Credit) -> Tensor:
        """Advantages of all samples, clipped: ``(B,)``, or ``(B, S)`` with one for each step."""
        own = getattr(self.update.objective, "advantage", None)
        advantage = evidence.outcome if own is None else own(evidence)
        limit = self.config.advantage.clip
        # Labels are probabilities in disguise: a bound would make others of them.
        return advantage if self.rollouts.labelled else advantage.clamp(-limit, limit)

    def _outcome(self, score: Score, groups: Tensor) -> Tensor:
        if self.rollouts.labelled:
            return score.value
        c = self.config.advantage
        weights = self._weights()
        if self.tracker is not None:
            rows = rows_of_step(self.config, self.rollouts.prompts, self.step)
            return self.tracker(score.value, score.valid, rows.prompts)
        if weights:
            return combined_advantage(score.parts, weights, score.valid, groups, c.std, c.eps)
        return group_advantage(score.value, score.valid, groups, c.std, c.eps)

    def _weights(self) -> dict[str, float]:
        return credit.separate_weights(self.reward, self.config.advantage)

    def _updates(
        self, rollout: Rollout, advantage: Tensor, keep: Tensor, groups: Tensor
    ) -> list[Any]:
        """All updates of one rollout; rows are numbered over all processes."""
        if self.step < getattr(self.update.objective, "warmup", 0):
            return []  # only the critic learns so far
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        unit = unit_of(self.update.objective, self.config)
        low, high = share(self.config.batch, rank, world, self.rollouts.unit)
        results = []
        passes = getattr(self.update.objective, "passes", 1)
        for rows in minibatches(self.config, self.step, unit, passes):
            local, every = rows[(rows >= low) & (rows < high)], rows.to(keep.device)
            own_groups = groups[rows.to(groups.device)]
            count = self.update.count(rollout, advantage[every], keep[every], own_groups)
            at = local.to(advantage.device)
            for group in self.optimizer.param_groups:
                group["scale"] = self._scale()
            results.append(self.update(rollout[local - low], advantage[at], keep[at], count))
            self.updates += 1
            if not self.update.skips.last:
                self.model.update_ema(self.updates)
        self.rollouts.version = self.updates
        return results

    def _use_kernel(self, kernel: StepSdeKernel) -> None:
        self.rollouts.kernel = self.update.kernel = kernel
        self.calibrated = True

    def _scale(self) -> float:
        return lr_scale(self.config, self.step)


__all__ = ["Trainer", "TrainingError"]
