r"""The forward process: clean latents of a rollout, noised anew for each update.

:math:`x_\sigma = (1 - \sigma) x_0 + \sigma \epsilon` for flow models; for the others see
:mod:`mmalign.sampling.process`. Level and noise of a draw are a function of the sample's seed and
the number of the draw alone, so neither micro-batch, nor the number of processes, nor an
interruption changes them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from mmalign.config import ConfigError
from mmalign.protocols import Kernel, Policy
from mmalign.runtime.seeds import stable_seed
from mmalign.sampling import process
from mmalign.sampling.generate import autocast, evaluations
from mmalign.types import Conditioning, Rollout
from trainers.companion import Companion
from trainers.config import ForwardConfig, RolloutConfig, TrainConfig
from trainers.draws import Draws
from trainers.model import TrainableModel
from trainers.objective import ForwardBatch, process_of
from trainers.pairing import whole_groups
from trainers.preferences.bank import Bank
from trainers.probe import Probe

# Settings of the rollout that choose recorded steps, of which a forward objective has none.
STEP_SETTINGS = ("train", "fraction", "window", "calibration")


def check_process(config: TrainConfig, objective: Any, policy: Policy, kernel: Kernel) -> None:
    """Refuse settings that would mean nothing for the objective's process.

    Raises:
        ConfigError: names the setting, its value and what to do.
    """
    name = f"algorithm {config.algorithm!r}"
    _check_precision(config, objective, name)
    if hasattr(objective, "check_recipe"):
        objective.check_recipe(config)
    if hasattr(objective, "check_policy"):
        objective.check_policy(policy)
    if process_of(objective) == "gradient":
        return  # see trainers.gradient.start
    if config.rollout.steps < 2:
        raise ConfigError(
            f"rollout.steps is {config.rollout.steps}, but the rollouts of {name} need at least 2; "
            "one step is for generators that are made for it, trained by a reward's gradient (r0)"
        )
    if process_of(objective) == "reverse":
        for key, value in changed(config.forward, ForwardConfig()):
            raise ConfigError(
                f"forward.{key} is {value!r}, but {name} trains on recorded steps and noises "
                "nothing; remove the section forward"
            )
        if not kernel.stochastic:
            raise ConfigError(
                f"rollout.kernel is {config.rollout.kernel!r}, whose steps have no density, but "
                f"those that {name} trains on need a stochastic kernel: flow_sde, dance_sde or cps "
                "for flow models, ddim with eta above 0 for diffusion models"
            )
        return
    for key, value in changed(config.rollout, RolloutConfig()):
        if key.startswith(STEP_SETTINGS):
            raise ConfigError(
                f"rollout.{key} is {value!r}, but {name} records no steps; remove it (the levels "
                "trained on are chosen by the section forward)"
            )
    _check_unguided(config, objective, policy, name)
    if known_levels(policy) is not None and config.forward.shift != 1.0:
        raise ConfigError(
            f"forward.shift is {config.forward.shift}, but {policy.name} knows only the levels of "
            "its own training times, which a shift would miss; remove it"
        )
    if config.rollout.shared_noise and not kernel.stochastic:
        raise ConfigError(
            f"rollout.shared_noise with the deterministic kernel {config.rollout.kernel!r} makes "
            "all images of a prompt the same; remove it, or use a stochastic kernel"
        )
    if hasattr(objective, "statistic"):
        _check_groups(config, objective, name)


def _check_precision(config: TrainConfig, objective: Any, name: str) -> None:
    """Refuse fp16 where gradients are taken without :class:`~trainers.loss_scale.LossScale`."""
    unscaled = process_of(objective) == "gradient" or hasattr(objective, "companion")
    if unscaled and config.model.precision == "fp16":
        raise ConfigError(
            f"model.precision is 'fp16', whose range loses the small gradients of {name}: only the "
            "loss of one network can be scaled against that; use bf16 or fp32"
        )


def _check_unguided(config: TrainConfig, objective: Any, policy: Policy, name: str) -> None:
    """Refuse to train a guided prediction where the objective asks the network without guidance."""
    if not getattr(objective, "unguided", False):
        return
    own, scale = config.forward.guidance_scale, config.rollout.guidance_scale
    if scale is None:
        scale = 1.0 if config.pairs is not None else policy.sampler.guidance_scale
    trained = scale if own is None else own
    if trained > 1 and policy.encode([""]).negative is not None:
        raise ConfigError(
            f"the prediction that is trained has guidance {trained:g}, but {name} asks the network "
            "without guidance too, which would be another function; set forward.guidance_scale: 1.0"
        )


def bare_scale(scale: float, conditioning: Conditioning) -> float:
    """The scale of a prediction without guidance, where trained ones have ``scale``.

    1, except for networks without an unconditional branch: to them the scale is a number they are
    told, and with another one they are another network.
    """
    return scale if conditioning.negative is None else 1.0


def _check_groups(config: TrainConfig, objective: Any, name: str) -> None:
    """Refuse what tears groups apart, or what unbalances advantages that must sum to 0."""
    if config.optim.updates_per_rollout > 1 and not whole_groups(objective):
        raise ConfigError(
            f"optim.updates_per_rollout is {config.optim.updates_per_rollout}, but {name} compares "
            "all samples of a rollout, which several updates would tear apart; set it to 1"
        )
    if not getattr(objective, "group_draws", False):
        return
    for part, value in (("keep", config.advantage.keep), ("select", config.advantage.select)):
        if value not in (0, "all"):
            raise ConfigError(
                f"advantage.{part} is {value}, but {name} needs advantages that sum to 0 in each "
                "group, which those of a part of it do not; remove it"
            )
    if config.advantage.baseline != "group":
        raise ConfigError(
            f"advantage.baseline is {config.advantage.baseline!r}, but {name} needs advantages "
            "that sum to 0 in each group; use baseline: group"
        )


def changed(section: Any, default: Any) -> list[tuple[str, Any]]:
    """Fields of a section of the recipe that are not as by default, with their values."""
    values = ((f.name, getattr(section, f.name)) for f in fields(section))
    return [(key, value) for key, value in values if value != getattr(default, key)]


def known_levels(policy: Policy) -> Tensor | None:
    """Noise levels of the times that the policy's network was trained on, ascending fp64 ``(T,)``.

    ``None`` where it takes any level, as flow models do.
    """
    levels = getattr(policy, "levels", None)
    return None if levels is None else levels.cpu()


class Noising:
    """Draws levels and noise, and predicts under every version of the weights that is needed."""

    def __init__(
        self, config: ForwardConfig, policy: Policy, model: TrainableModel, objective: Any,
        steps: int, seed: int, dtype: torch.dtype | None, word: str = "forward",
    ) -> None:  # fmt: skip
        self.config, self.policy, self.model, self.objective = config, policy, model, objective
        self.steps, self.seed, self.dtype = steps, seed, dtype
        self.draws, self.word = config.draws, word  # of another word, all draws are others
        # Twice: for what the objective takes of all of them, and for its loss.
        self.numbers = Draws(keep=hasattr(objective, "statistic"))
        self.companion: Companion | None = None
        self.bank: Bank | None = None  # of fixed draws, with errors that are known already
        known = known_levels(policy)
        if config.times == "grid":
            known = policy.sigmas(steps)[:-1].cpu()  # the last is where the picture is, not a time
        self.grid = None if known is None else self._within(known)
        self.listed = config.times == "grid" or (
            self.grid is not None and config.times == "uniform"
        )

    def _within(self, known: Tensor) -> Tensor:
        low, high = self.config.levels
        levels = known[(known > 0) & (known >= low) & (known <= high)]
        if not len(levels):
            shown = ", ".join(f"{s:.3f}" for s in known[:: max(1, len(known) // 20)].tolist())
            raise ConfigError(
                f"forward.levels {self.config.levels} holds no level of the grid {shown}; widen it"
            )
        return levels

    def level(self, quantile: Tensor) -> Tensor:
        """Noise levels at quantiles in [0, 1) of the configured distribution, shaped like them.

        A network that knows only some levels gets each of them alike where times are ``uniform``,
        and the one nearest to what was drawn otherwise.
        """
        if self.grid is None:
            return self._anywhere(quantile)
        if self.listed:
            return self.grid[(quantile * len(self.grid)).long().clamp_max(len(self.grid) - 1)]
        return self.grid[(self._anywhere(quantile).unsqueeze(-1) - self.grid).abs().argmin(-1)]

    def _anywhere(self, quantile: Tensor) -> Tensor:
        c, (low, high) = self.config, self.config.levels
        if c.times == "logit_normal":
            # The normal distribution cut to the bounds: its quantiles between theirs.
            below, above = (
                _normal_cdf((_logit(s) - c.logit_mean) / c.logit_std) for s in (low, high)
            )
            inner = (below + (above - below) * quantile).clamp(1e-6, 1 - 1e-6)
            level = torch.sigmoid(c.logit_mean + c.logit_std * torch.special.ndtri(inner))
        else:
            level = low + (high - low) * quantile
        return c.shift * level / (1 + (c.shift - 1) * level)

    def draw(self, rollout: Rollout, index: int | Tensor) -> tuple[Tensor, Tensor]:
        """Levels ``(b,)`` and noise ``(b, ...)`` of draw ``index``, on the latents' device.

        ``index`` is one number for all samples, or ``(b,)``, one for each.

        The draws of one sample share out the quantiles of the level between them: draw ``k`` of
        ``n`` lies in ``[k / n, (k + 1) / n)``, so each sample sees all of the schedule.
        """
        shape = rollout.final.shape[1:]
        index, of = torch.as_tensor(index).cpu().expand(len(rollout)), self.draws
        if self.bank is None:
            seeds = self._seeds(rollout, index)
        else:
            index, of = self.bank.numbers(rollout, index), self.bank.count
            seeds = self.bank.seeds(rollout, index)
        within, noise = self.numbers(seeds, shape)
        sigma = self.level((index + within) / of)
        # What is left of the picture at high noise is the small difference of two numbers near 1.
        sigma = sigma.float() if self.policy.parameterisation == "flow" else sigma.double()
        return sigma.to(rollout.final.device), noise.to(rollout.final.device)

    def _seeds(self, rollout: Rollout, index: Tensor) -> list[int]:
        """One seed per sample; one per group where the objective compares within groups."""
        draws = index.tolist()
        if not getattr(self.objective, "group_draws", False):
            return [stable_seed(self.word, s, k) for s, k in zip(rollout.seeds, draws, strict=True)]
        fixed = (self.word, self.seed, rollout.policy_version)
        groups = rollout.groups.tolist()
        return [stable_seed(*fixed, int(g), k) for g, k in zip(groups, draws, strict=True)]

    def batch(
        self,
        rollout: Rollout,
        advantage: Tensor,
        index: int | Tensor,
        pooled: Tensor | None = None,
        known: Mapping[str, Tensor] | None = None,
    ) -> tuple[ForwardBatch, int]:
        """Draw ``index`` of some samples as the objective sees it, and the evaluations it cost.

        ``known`` holds predictions of this very draw under other versions of the weights.
        """
        sigma, noise = self.draw(rollout, index)
        kind, inverting = self.policy.parameterisation, 0
        if hasattr(self.objective, "implied"):
            noise, inverting = self.objective.implied(
                self.policy, rollout, sigma, self.steps, self.dtype, self.scale(rollout)
            )
        noised = process.noised(kind, rollout.final, noise, sigma)
        others, passes, errors = dict(known or {}), 1, self.known_errors(rollout, index)
        needed = self.objective.needs - errors.keys()
        # Before the pass with gradient, so that no graph sees the weights exchanged.
        for name in sorted(needed):
            if name not in others and not self.model.is_current(name):
                with torch.no_grad(), self.model.version(name):
                    others[name] = self.predict(rollout, noised, sigma)
                passes += 1
        velocity = self.predict(rollout, noised, sigma)
        for name in needed - others.keys():
            others[name] = velocity.detach()
        batch = ForwardBatch(
            rollout.final, noise, sigma, noised, velocity, advantage, others, pooled, kind,
            rollout.maps, self._probe(rollout, index), errors,
        )  # fmt: skip
        scale = self.scale(rollout)
        spent = passes * evaluations(len(rollout), scale, rollout.conditioning)
        return batch, spent + inverting

    def conditioned(self, rollout: Rollout, size: int) -> Rollout:
        """The rollout with what an objective conditions its pictures on, made ``size`` at a time.

        Once for all draws of a picture.
        """
        if not hasattr(self.objective, "conditioned") or not len(rollout):
            return rollout
        starts = range(0, len(rollout), size)
        return Rollout.cat(
            [self.objective.conditioned(self.policy, rollout[a : a + size]) for a in starts]
        )

    def known_errors(self, rollout: Rollout, index: int | Tensor) -> dict[str, Tensor]:
        """Errors ``(b,)`` of versions of the weights that need no pass, on draw ``index``."""
        if self.bank is None:
            return {}
        return {"reference": self.bank.errors(rollout, torch.as_tensor(index).expand(len(rollout)))}

    def _probe(self, rollout: Rollout, index: int | Tensor) -> Probe:
        def keys() -> list[int]:  # most objectives never ask
            return self._seeds(rollout, torch.as_tensor(index).cpu().expand(len(rollout)))

        return Probe(
            self.policy, self.model, rollout.prompts, rollout.conditioning, keys,
            self.dtype, self.companion, version=rollout.policy_version,
            bare=bare_scale(self.scale(rollout), rollout.conditioning),
        )  # fmt: skip

    def scale(self, rollout: Rollout) -> float:
        """Guidance of trained predictions."""
        own = self.config.guidance_scale
        return rollout.guidance_scale if own is None else own

    def predict(self, rollout: Rollout, noised: Tensor, sigma: Tensor) -> Tensor:
        """The prediction of the weights as they are, with the guidance of trained ones."""
        with autocast(self.policy.device, self.dtype):
            return self.policy.predict(noised, sigma, rollout.conditioning, self.scale(rollout))


def build_noising(
    config: TrainConfig, policy: Policy, model: TrainableModel, objective: Any,
    dtype: torch.dtype | None,
) -> Noising | None:  # fmt: skip
    """The recipe's :class:`Noising`, or ``None`` for an objective of another process."""
    if process_of(objective) != "forward":
        return None
    steps, seed = config.rollout.steps, config.seed
    return Noising(config.forward, policy, model, objective, steps, seed, dtype)


def _logit(level: float) -> float:
    return math.log(level / (1 - level)) if 0 < level < 1 else math.copysign(math.inf, level - 0.5)


def _normal_cdf(value: float) -> float:
    return 0.5 * (1 + math.erf(value / math.sqrt(2)))


def group_means(values: Tensor, groups: Tensor, accelerator: Any) -> Tensor:
    """Mean of ``values`` ``(b, K)`` over each row's group, on all processes; ``(b, K)`` fp64."""
    own = groups.cpu()
    shares = [(values.double().cpu(), own)]
    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        shares = gather_object(shares)
    if not len(values):  # nothing of this process's own, but the others waited for it
        return values.double()
    rows = torch.cat([v for v, _ in shares if len(v)])
    every, index = torch.unique(torch.cat([g for _, g in shares]), return_inverse=True)
    sums = torch.zeros(len(every), rows.shape[1], dtype=torch.float64).index_add(0, index, rows)
    means = sums / torch.bincount(index, minlength=len(every)).unsqueeze(1)
    return means[torch.searchsorted(every, own)].to(values.device)
