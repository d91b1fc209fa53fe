"""What advantages are made from: final scores, and the values of the states on the way.

An objective that needs ``values`` gets the reward of the completion of every state around its
recorded steps; one that has a method ``advantage(credit)`` makes its own advantages from them.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from mmalign.config import ConfigError
from mmalign.protocols import Policy, RewardModel
from mmalign.reward_info import RewardInfo
from mmalign.sampling.completion import complete, labels_of
from mmalign.sampling.generate import autocast
from mmalign.sampling.rollout import Plan
from mmalign.sampling.sharing import shared
from mmalign.types import Rollout, Score
from trainers.advantages import keep_extremes, non_dominated
from trainers.config import AdvantageConfig

T = TypeVar("T")

STATES = frozenset({"values", "children"})  # needs that have states on the way scored


@dataclass(frozen=True)
class Credit:
    """The evidence of one training step, for all samples over all processes.

    Attributes:
        score: final scores.
        groups: ``(B,)``.
        outcome: ``(B,)`` advantages of the final scores, as the recipe's ``advantage`` says.
        steps: the ``S`` recorded grid steps.
        options: the recipe's ``advantage`` section.
        values: ``(B, S + 1)``; column ``j`` is the value of the state before recorded step ``j``,
            column ``S`` that of the state after the last. Filled where the objective needs
            ``values``, else ``None``. For one that needs ``children``: ``(B, S)``, the states that
            each recorded step led to.
        valid: which of them were scored, shaped like ``values``.
        lowest: lower end of the reward's range, ``None`` where it is open.
        history: mean and deviation of the rewards of the run so far, this step included; filled
            where the objective needs ``history``.
        shaped: ``(B,)`` normalised rewards, 0 where unscored; filled where there is a critic.
        expected: ``(B, S)`` what the critic expected of the states that the update sees.
    """

    score: Score
    groups: Tensor
    outcome: Tensor
    steps: tuple[int, ...]
    options: AdvantageConfig
    values: Tensor | None = None
    valid: Tensor | None = None
    lowest: float | None = None
    history: tuple[float, float] | None = None
    shaped: Tensor | None = None
    expected: Tensor | None = None

    def states(self) -> tuple[Tensor, Tensor]:
        """Values and which are valid; an error where nobody asked for them."""
        if self.values is None or self.valid is None:
            raise RuntimeError("no values were collected: the objective must need 'values'")
        return self.values, self.valid

    def gains(self) -> tuple[Tensor, Tensor]:
        """What each recorded step changed: ``(B, S)`` differences of values, and their validity.

        They telescope: their sum is the last value minus the first.
        """
        values, valid = self.states()
        both = valid[:, 1:] & valid[:, :-1]
        return torch.where(both, values[:, 1:] - values[:, :-1], 0.0), both

    def surprise(self) -> Tensor:
        """``(B, S)``: by what each sample's reward exceeds the critic's value of its states."""
        if self.shaped is None or self.expected is None:
            raise RuntimeError("there is no critic: the objective must have a 'critic'")
        return torch.where(self.score.valid[:, None], self.shaped[:, None] - self.expected, 0.0)

    def _critic_metrics(self) -> dict[str, float]:
        """Mean squared error of the critic on rewards new to it, and the share it explains."""
        if self.shaped is None or not bool(self.score.valid.any()):
            return {}
        error = self.surprise()[self.score.valid]
        spread = float(self.shaped[self.score.valid].var(unbiased=False))
        explained = 1 - float(error.var(0, unbiased=False).mean()) / spread if spread > 0 else 0.0
        return {"critic/error": float(error.square().mean()), "critic/explained": explained}

    def metrics(self, advantage: Tensor) -> dict[str, float]:
        """Per-step means of values, gains and sizes of advantages, where there are any."""
        found = self._critic_metrics()
        if advantage.ndim > 1 and self.steps and bool(self.score.valid.any()):
            scored = advantage[self.score.valid].abs()[..., None]
            sizes = scored.flatten(2).mean((0, 2)).tolist()
            found |= {f"by_step/advantage/{k}": a for k, a in zip(self.steps, sizes, strict=True)}
        if self.values is None or self.values.shape[1] == len(self.steps):  # of children
            return found
        gains, valid = self.gains()
        for j, k in enumerate(self.steps):
            own = gains[valid[:, j], j]
            if len(own):
                found[f"by_step/gain/{k}"] = float(own.mean())
                found[f"by_step/gain_positive/{k}"] = float((own > 0).float().mean())
        return found


@torch.no_grad()
def score_states(
    policy: Policy,
    reward: RewardModel,
    rollout: Rollout,
    positions: Sequence[int],
    *,
    steps: int,
    batch_size: int,
    dtype: torch.dtype | None,
    children: bool = False,
) -> tuple[Tensor, Tensor, int]:
    """Rewards of the completions of the states at ``positions``, as :func:`complete` takes them.

    All samples at one position are scored in one call, as the final pictures are: what compares
    the samples of a prompt compares those at the same step, and memory holds one set of pictures.
    Equal ones of a group are decoded once, and scored once by a pointwise reward.

    Returns:
        Values ``(B, M)`` and their validity, on the CPU, and the network evaluations spent.
    """
    if not len(positions):
        nothing = torch.zeros(len(rollout), 0)
        return nothing, nothing.bool(), 0
    ends, nfe = complete(
        policy, rollout, positions,
        steps=steps, children=children, batch_size=batch_size, dtype=dtype,
    )  # fmt: skip
    values, valid = [], []
    for column in ends.unbind(1):
        alike = shared(column, labels_of(rollout))
        with autocast(policy.device, dtype):
            parts = [policy.decode(chunk) for chunk in alike.pick(column).split(batch_size)]
        media = parts[0] if len(parts) == 1 else type(parts[0]).cat(parts)
        if reward.info.scope == "pointwise":
            one = reward.score(media, [rollout.prompts[i] for i in alike.first.tolist()])
            score = one[alike.place]
        else:
            facts = group_facts(reward, rollout.groups)
            score = reward.score(media[alike.place], rollout.prompts, facts)
        values.append(score.value)
        valid.append(score.valid)
    return torch.stack(values, 1).cpu(), torch.stack(valid, 1).cpu(), nfe


def group_facts(reward: RewardModel, groups: Tensor) -> list[dict[str, Any]] | None:
    """The context that tells a reward of groups who is compared with whom; ``None`` for others.

    Two groups of a step may show the same prompt.
    """
    if reward.info.scope != "group":
        return None
    return [{"group": group} for group in groups.tolist()]


def ends_clean(plan: Plan, rollout: Rollout) -> bool:
    """Whether no noise follows the last recorded step, whose end's value is the final score."""
    return max(plan.stochastic_steps) == rollout.steps[-1]


def everywhere(accelerator: Any, work: Callable[[], T]) -> list[T]:
    """The result of ``work`` on every process, in order; tensors in it should be on the CPU.

    Raises:
        Exception: on all processes, where it was raised on one of them.
    """
    if accelerator.num_processes == 1:
        return [work()]
    from accelerate.utils import gather_object

    local: T | Exception
    try:
        local = work()
    except Exception as error:
        local = _sendable(error)  # the others wait for this process's result: they must hear of it
    # In one transfer: where a reward failed on one process, its parts are missing there.
    found = gather_object([local])
    for result in found:
        if isinstance(result, Exception):
            raise result
    return list(found)


def _sendable(error: Exception) -> Exception:
    """The error, or one that says the same where it could not be read back elsewhere."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def separate_weights(reward: Any, options: AdvantageConfig) -> dict[str, float]:
    """Weights of the rewards whose advantages are taken one by one; empty for their sum's.

    Raises:
        ConfigError: the recipe wants them one by one, and the reward is no weighted sum.
    """
    composition = getattr(reward, "composition", None)
    wanted = options.combine == "advantages"
    if composition is None or not (wanted or composition.per_reward_advantages):
        return {}
    if not composition.linear:
        raise ConfigError(
            f"advantage.combine is 'advantages', which needs a weighted sum of rewards; "
            f"{composition.info.name} is a {composition.kind}. Use combine 'rewards'"
        )
    return dict(composition.weights)


def chosen(
    options: AdvantageConfig, advantage: Tensor, score: Score, groups: Tensor,
    weights: Mapping[str, float],
) -> Tensor:  # fmt: skip
    """Mask ``(B,)`` of the samples that are trained on; unscored ones are left out elsewhere."""
    if options.select == "pareto":
        return non_dominated(score.parts, weights, score.valid, groups)
    if options.keep:
        return keep_extremes(advantage, score.valid, groups, options.keep)
    return torch.ones(len(advantage), dtype=torch.bool, device=advantage.device)


class History:
    """Moving mean and deviation of all rewards of a run, as an absolute anchor (VGPO)."""

    def __init__(self, decay: float = 0.9) -> None:
        self.decay = decay
        self.mean: float | None = None
        self.square = 0.0

    def __call__(self, score: Score) -> tuple[float, float]:
        """Take in the scored samples of a step; mean and deviation afterwards."""
        values = score.value[score.valid].double()
        if len(values):
            mean, square = float(values.mean()), float(values.square().mean())
            keep = 0.0 if self.mean is None else self.decay
            self.mean = keep * (self.mean or 0.0) + (1 - keep) * mean
            self.square = keep * self.square + (1 - keep) * square
        mean = self.mean or 0.0
        return mean, max(self.square - mean**2, 0.0) ** 0.5

    def state_dict(self) -> dict[str, float | None]:
        """For checkpoints."""
        return {"mean": self.mean, "square": self.square}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.mean, self.square = state["mean"], float(state["square"])


def check(objective: Any, options: AdvantageConfig, info: RewardInfo, separate: bool) -> None:
    """Refuse settings that an objective with its own advantages would not look at.

    Raises:
        ConfigError: names the setting and what to do.
    """
    name = type(objective).__name__
    if options.select == "pareto" and not separate:
        raise ConfigError(
            "advantage.select is 'pareto', which compares samples reward by reward; use "
            "advantage.combine 'advantages' and a weighted_sum of two or more rewards"
        )
    if options.baseline == "tracker":
        _check_tracker(options, separate)
    if STATES & getattr(objective, "needs", frozenset()):
        if options.baseline == "tracker":
            raise ConfigError(
                f"advantage.baseline is 'tracker', but {name} compares values within a group; "
                "use baseline 'group'"
            )
        if separate:
            raise ConfigError(
                f"{name} takes the value of a state from the sum of the rewards, which cannot be "
                "kept separate; use advantage.combine 'rewards' and a weighted_sum"
            )
    if "children" in getattr(objective, "needs", ()):
        why = f"{name} chooses the best and the worst at every step by itself; remove it"
        _only_defaults(options, ("keep", "select", "std"), why)
    if getattr(objective, "critic", None) is not None:
        _check_critic(name, options, separate)
    own = getattr(objective, "check_reward", None)
    if own is not None:
        own(info)


def _check_tracker(options: AdvantageConfig, separate: bool) -> None:
    """Refuse what shapes advantages of a group: a tracker divides by its own deviations."""
    why = (
        "with baseline 'tracker' each prompt's latest rewards are what is divided by; remove it, "
        "or use baseline 'group'"
    )
    _only_defaults(options, ("std", "eps"), why)
    if separate:
        raise ConfigError(
            "advantage.baseline is 'tracker', which keeps one reward for each picture, but the "
            "advantages of several are wanted one by one; use baseline 'group', or "
            "advantage.combine 'rewards' and a weighted_sum"
        )


def _check_critic(name: str, options: AdvantageConfig, separate: bool) -> None:
    """Refuse what shapes advantages of a group: a critic's are measured against its values."""
    why = f"{name} with a critic measures rewards against its values; remove it, or the critic"
    _only_defaults(options, ("baseline", "std"), why)
    if separate:
        raise ConfigError(
            f"{name} with a critic takes one normalised reward, which cannot be kept separate; use "
            "advantage.combine 'rewards' and a weighted_sum"
        )


def check_labels(options: AdvantageConfig, algorithm: str) -> None:
    """Refuse what shapes advantages where labels are the advantages, as they are.

    Raises:
        ConfigError: names the setting and what to do.
    """
    why = (
        f"the advantages of algorithm {algorithm!r} are labels here, which nothing is made of; "
        "remove it"
    )
    _only_defaults(options, tuple(asdict(options)), why)


def _only_defaults(options: AdvantageConfig, keys: Sequence[str], why: str) -> None:
    for key in keys:
        value = getattr(options, key)
        if value != getattr(AdvantageConfig(), key):
            raise ConfigError(f"advantage.{key} is {value!r}, but {why}")
