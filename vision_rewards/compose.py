"""Rewards made of rewards: a composition is itself a reward model."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from mmalign.protocols import RewardInfo, RewardModel
from mmalign.types import Media, MediaKind, Score

Range = tuple[float | None, float | None]
Scope = Literal["pointwise", "pairwise", "group"]


class WeightedSum:
    """``sum_k weight_k * reward_k``, unnormalised: weights carry the units of each reward.

    ``parts`` holds each component's raw value under its name.  A sample is valid only where every
    component could judge it.

    Args:
        components: ``{name: (reward, weight)}``. A negative weight penalises; a weight of 0
            measures without steering.

    Raises:
        ValueError: no components, a weight that is not finite, only zero weights, no kind of
            media that all components accept, or pairwise rewards mixed with others.
    """

    def __init__(self, components: Mapping[str, tuple[RewardModel, float]]) -> None:
        self.components = {n: (reward, float(w)) for n, (reward, w) in components.items()}
        _check_weights({n: w for n, (_, w) in self.components.items()})
        infos = {n: reward.info for n, (reward, _) in self.components.items()}
        name = " + ".join(f"{w:g}*{n}" for n, (_, w) in self.components.items())
        self.info = RewardInfo(
            name=name,
            media=_common_media(infos),
            scope=_common_scope(infos),
            differentiable=all(i.differentiable for i in infos.values()),
            deterministic=all(i.deterministic for i in infos.values()),
            needs=tuple(dict.fromkeys(n for i in infos.values() for n in i.needs)),
            range=_sum_range([(reward.info.range, w) for reward, w in self.components.values()]),
            summary=f"weighted sum: {name}",
            source="; ".join(dict.fromkeys(i.source for i in infos.values() if i.source)),
            licence="; ".join(dict.fromkeys(i.licence for i in infos.values() if i.licence)),
        )

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each component, for advantages that are taken per reward."""
        return {name: weight for name, (_, weight) in self.components.items()}

    @property
    def identity(self) -> str:
        """A digest of every component's identity and weight, after the readable formula."""
        rows = [(n, r.identity, w) for n, (r, w) in sorted(self.components.items())]
        return f"{self.info.name}@{hashlib.sha256(repr(rows).encode()).hexdigest()[:10]}"

    def score(
        self,
        media: Media,
        prompts: Sequence[str],
        context: Sequence[Mapping[str, Any]] | None = None,
    ) -> Score:
        """Score a batch with every component; gradients flow where a component keeps them.

        Raises:
            ValueError: a component returned another number of scores than there are samples.
        """
        device = media.data.device
        total = torch.zeros(len(media), device=device)
        valid = torch.ones(len(media), dtype=torch.bool, device=device)
        parts, notes = {}, [""] * len(media)
        for name, (reward, weight) in self.components.items():
            score = reward.score(media, prompts, context)
            if len(score) != len(media):
                raise ValueError(f"{name!r} returned {len(score)} scores for {len(media)} samples")
            value, ok = score.value.float().to(device), score.valid.to(device)
            # Unscored entries may hold NaN, which would also poison the gradient of 0 * NaN.
            total = total + weight * torch.where(ok, value, 0.0)
            valid = valid & ok
            parts[name] = value.detach()
            notes = [_joined(a, name, b) for a, b in zip(notes, _notes(score), strict=True)]
        value = torch.where(valid, total, torch.nan)
        return Score(value, valid, parts, tuple(notes) if any(notes) else (), self.identity)


def _notes(score: Score) -> tuple[str, ...]:
    return score.notes or ("",) * len(score)


def _joined(said: str, name: str, note: str) -> str:
    return "; ".join(part for part in (said, note and f"{name}: {note}") if part)


def _check_weights(weights: Mapping[str, float]) -> None:
    if not weights:
        raise ValueError("a weighted sum needs at least one component, got none")
    for name, weight in weights.items():
        if not math.isfinite(weight):
            raise ValueError(f"the weight of {name!r} is {weight}; it must be a finite number")
    if not any(weights.values()):
        raise ValueError(f"every weight is 0 ({', '.join(weights)}); at least one must not be")


def _common_media(infos: Mapping[str, RewardInfo]) -> tuple[MediaKind, ...]:
    kinds: tuple[MediaKind, ...] = ("image", "video")
    common = tuple(k for k in kinds if all(k in i.media for i in infos.values()))
    if not common:
        said = ", ".join(f"{n} takes {' and '.join(i.media)}" for n, i in infos.items())
        raise ValueError(f"no kind of media suits every component: {said}")
    return common


def _common_scope(infos: Mapping[str, RewardInfo]) -> Scope:
    scopes = {i.scope for i in infos.values()}
    if len(scopes) == 1:
        return scopes.pop()
    if "pairwise" in scopes:
        said = ", ".join(f"{n} is {i.scope}" for n, i in infos.items())
        raise ValueError(f"pairwise rewards cannot be added to others: {said}")
    return "group"  # a pointwise reward can be computed within a group, not the reverse


def _sum_range(terms: Sequence[tuple[Range, float]]) -> Range:
    low: float | None = 0.0
    high: float | None = 0.0
    for (a, b), weight in terms:
        if weight == 0:
            continue
        ends = (a, b) if weight > 0 else (b, a)
        low = None if low is None or ends[0] is None else low + weight * ends[0]
        high = None if high is None or ends[1] is None else high + weight * ends[1]
    return low, high
