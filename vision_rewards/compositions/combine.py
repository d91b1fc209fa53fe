"""Sums, constraints, minima and ensembles: values of the parts of one sample become one value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from mmalign.registry import unknown
from mmalign.reward_info import Range
from vision_rewards.compositions.base import Combined, Components, Composition, Parts, sum_range


class WeightedSum(Composition):
    """``sum_k weight_k * reward_k``, unnormalised: weights carry the units of each reward.

    A negative weight penalises; a weight of 0 measures without steering. A sample is valid only
    where every component could judge it.
    """

    kind = "weighted_sum"
    linear = True

    def formula(self) -> str:
        """``w*name + w*name``."""
        return " + ".join(f"{w:g}*{n}" for n, w in self.weights.items())

    def range(self) -> Range:
        """The sum of the components' ranges."""
        return sum_range([(reward.info.range, w) for reward, w in self.components.values()])

    def combine(self, parts: Parts) -> Combined:
        """The sum."""
        return Combined(parts.weighted())


class Separate(WeightedSum):
    """A weighted sum that tells training to take advantages per reward, then to add them.

    The sum of advantages does not change when one reward is rescaled (MixGRPO, 2507.21802). The
    value itself is the plain weighted sum.
    """

    kind = "separate"
    per_reward_advantages = True

    def options(self) -> Mapping[str, Any]:
        """Marked apart from the plain sum."""
        return {"separate": True}


class Gate(Composition):
    """The weighted sum of the main parts, where the constraints hold.

    Args:
        constraints: ``{label: threshold}`` of parts that must reach a value; they take no part
            in the sum.
        mode: ``hard`` gives ``floor`` where a constraint fails; ``hinge`` subtracts ``penalty``
            times the missing amount, which keeps a gradient.
        floor: value of a failed sample under ``hard``; the lowest value of the main parts where
            that is known.
        penalty: slope of ``hinge``.

    Raises:
        ValueError: no constraint, only constraints, a threshold, floor or penalty that is no
            usable number, or a floor that is neither given nor known.
        UnknownNameError: a constraint on something that is no part.
    """

    kind = "gate"

    def __init__(
        self,
        components: Components,
        *,
        constraints: Mapping[str, float],
        mode: Literal["hard", "hinge"] = "hard",
        floor: float | None = None,
        penalty: float = 1.0,
    ) -> None:
        for name in constraints:
            if name not in components:
                raise unknown("part to constrain", name, components)
        if mode not in ("hard", "hinge"):
            raise unknown("mode of a gate", mode, ("hard", "hinge"))
        if not constraints or len(constraints) == len(components):
            raise ValueError("a gate needs at least one constraint and one part that is none")
        _check_numbers(constraints, floor, penalty)
        self.constraints, self.mode, self.penalty = dict(constraints), mode, float(penalty)
        main = [(r.info.range, w) for n, (r, w) in components.items() if n not in constraints]
        self._main = sum_range(main)
        known = self._main[0] if floor is None else float(floor)
        if known is None and mode == "hard":
            raise ValueError(
                "the main parts of this gate have no lowest value: say with floor=... what a "
                "sample is worth that fails a constraint, or use mode='hinge'"
            )
        self.floor = known
        super().__init__(components)

    def options(self) -> Mapping[str, Any]:
        """Constraints, mode, floor and penalty."""
        rows = sorted(self.constraints.items())
        return {
            "constraints": rows,
            "mode": self.mode,
            "floor": self.floor,
            "penalty": self.penalty,
        }

    def range(self) -> Range:
        """The main parts' and the floor; open below under ``hinge``."""
        if self.mode == "hinge":
            return None, self._main[1]
        low, high = self._main
        assert self.floor is not None
        return (
            None if low is None else min(low, self.floor),
            None if high is None else max(high, self.floor),
        )

    def combine(self, parts: Parts) -> Combined:
        """The gated sum; ``passed`` is 1 where every constraint holds."""
        main = parts.weighted(leave_out=list(self.constraints))
        missing = torch.stack([t - parts[n] for n, t in self.constraints.items()])
        passed = (missing <= 0).all(0)
        if self.mode == "hard":
            value = torch.where(passed, main, float(self.floor or 0.0))
        else:
            value = main - self.penalty * missing.clamp_min(0).sum(0)
        return Combined(value, extra={"passed": passed.float()})


def _check_numbers(constraints: Mapping[str, float], floor: float | None, penalty: float) -> None:
    """Refuse numbers of a gate that would turn it round, or fail every sample in silence."""
    if not (penalty >= 0 and math.isfinite(penalty)):
        raise ValueError(f"penalty must be 0 or more (a failed constraint costs), got {penalty}")
    for name, value in {"floor": floor, **constraints}.items():
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{name!r} of a gate must be a finite number, got {value}")


class Minimum(Composition):
    """The smallest of ``weight_k * reward_k``, or its smooth form; every part must be good.

    Args:
        temperature: 0 is the minimum; above it ``-t log mean_k exp(-x_k / t)``, which lies
            between minimum and mean and gives every part a gradient.
    """

    kind = "minimum"

    def __init__(self, components: Components, *, temperature: float = 0.0) -> None:
        if temperature < 0:
            raise ValueError(f"temperature must not be negative, got {temperature}")
        self.temperature = float(temperature)
        super().__init__(components)

    def options(self) -> Mapping[str, Any]:
        """The temperature."""
        return {"temperature": self.temperature}

    def range(self) -> Range:
        """Minima of the weighted parts' ends."""
        ends = [sum_range([(r.info.range, w)]) for r, w in self.components.values()]
        lows, highs = [e[0] for e in ends], [e[1] for e in ends]
        low = None if None in lows else min(v for v in lows if v is not None)
        known = [v for v in highs if v is not None]
        # The smooth form exceeds the minimum, but never the largest part.
        high = max(known) if self.temperature and None not in highs else min(known, default=None)
        return low, None if self.temperature and None in highs else high

    def combine(self, parts: Parts) -> Combined:
        """The (soft) minimum over parts."""
        weights = torch.tensor(parts.weights, device=parts.values.device)[:, None]
        scaled = weights * parts.values
        if self.temperature == 0:
            return Combined(scaled.amin(0))
        count = torch.log(torch.tensor(float(len(scaled))))
        soft = torch.logsumexp(-scaled / self.temperature, 0) - count
        return Combined(-self.temperature * soft)


class Ensemble(Composition):
    """``mean - k * std`` over members, or the worst: pessimism where the members disagree.

    Members must be on one scale (calibrate them first). ``disagreement`` is reported: its growth
    is an early sign of over-optimisation (Coste et al., 2310.02743).

    Args:
        k: weight of the population deviation over members.
        worst: take the smallest member instead.
        min_members: a sample is scored where at least so many members scored it; all by default.
    """

    kind = "ensemble"

    def __init__(
        self,
        components: Components,
        *,
        k: float = 1.0,
        worst: bool = False,
        min_members: int | None = None,
    ) -> None:
        count = len(components)
        if min_members is not None and not 1 <= min_members <= count:
            raise ValueError(f"min_members must lie in 1..{count}, got {min_members}")
        if k < 0:
            raise ValueError(f"k must not be negative (that would reward disagreement), got {k}")
        self.k, self.worst, self.min_members = float(k), bool(worst), min_members or count
        super().__init__(components)

    def options(self) -> Mapping[str, Any]:
        """Pessimism and the number of members needed."""
        return {"k": self.k, "worst": self.worst, "min_members": self.min_members}

    def range(self) -> Range:
        """Never above the members' highest value."""
        ends = [sum_range([(r.info.range, w)]) for r, w in self.components.values()]
        highs = [e[1] for e in ends]
        return None, None if None in highs else max(v for v in highs if v is not None)

    def combine(self, parts: Parts) -> Combined:
        """Mean less ``k`` deviations over the members that scored the sample, or their minimum."""
        weights = torch.tensor(parts.weights, device=parts.values.device)[:, None]
        scaled, valid = weights * parts.values, parts.valid
        count = valid.sum(0).clamp_min(1)
        mean = (scaled * valid).sum(0) / count
        spread = _std((scaled - mean) * valid, count)
        worst = torch.where(valid, scaled, torch.inf).amin(0)
        value = worst if self.worst else mean - self.k * spread
        enough = valid.sum(0) >= self.min_members
        return Combined(value, enough, {"disagreement": torch.where(enough, spread, torch.nan)})


def _std(deviations: Tensor, count: Tensor) -> Tensor:
    """Population deviation over the first dimension; its gradient is 0, not NaN, at 0."""
    variance = deviations.square().sum(0) / count
    positive = variance > 0
    return torch.where(positive, torch.where(positive, variance, 1.0).sqrt(), 0.0)
