"""What methods that only look at scores share: their options, and a pool of finished candidates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmalign.protocols import Policy, RewardModel, Steered
from mmalign.steering.engine import Engine, Watch, scored
from mmalign.types import Media, Score


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Options that every method of sampling and choosing has.

    Args:
        seed: another seed gives other candidates.
        batch_size: pictures generated and scored at once, across prompts; changes no candidate.
        steps, guidance_scale: ``None`` takes the policy's recommended sampler.
        dtype: autocast precision (``fp32``, ``bf16``, ``fp16``, ``auto``); ``None`` leaves the
            weights' own.
    """

    method: ClassVar[str]

    seed: int = 0
    batch_size: int = 32
    steps: int | None = None
    guidance_scale: float | None = None
    dtype: str | None = None

    def check(self, **least: int) -> None:
        """Whole numbers among the options, each with the least it may be.

        Raises:
            ValueError: names the option.
        """
        for name, low in {"batch_size": 1, "steps": 1, **least}.items():
            value = getattr(self, name)
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int) or value < low
            ):
                raise ValueError(
                    f"{self.method}: {name} must be a whole number from {low}, got {value!r}"
                )

    def engine(
        self, policy: Policy, reward: RewardModel, prompts: Sequence[str], budget: Any,
        watch: Watch | None, gradient: bool = False,
    ) -> Engine:  # fmt: skip
        """The engine these options ask for; refuses what cannot work before any network call."""
        return Engine(
            policy, reward, prompts, method=self.method, budget=budget, watch=watch,
            steps=self.steps, guidance_scale=self.guidance_scale, dtype=self.dtype,
            batch_size=self.batch_size, gradient=gradient,
        )  # fmt: skip


class Pool:
    """Finished candidates of a run, in the order they were made, and the best of each prompt.

    Args:
        planned: candidates there will be, for the progress display.
    """

    def __init__(self, engine: Engine, planned: int) -> None:
        self.engine, self.planned = engine, planned
        prompts = len(engine.prompts)
        self.best = torch.full((prompts,), -torch.inf)
        self.counts = [0] * prompts
        self._media: list[Media] = []
        self._scores: list[Score] = []
        self._owners: list[Tensor] = []
        self._lineage: list[Mapping[str, Any]] = []

    def __len__(self) -> int:
        return len(self._lineage)

    @property
    def latest(self) -> Media:
        """The pictures added last."""
        return self._media[-1]

    def sample(
        self, noise: Tensor, owners: Tensor, lineage: Sequence[Mapping[str, Any]]
    ) -> tuple[Score, list[int]]:
        """Denoise, decode and score noises, as far as time allows.

        Every prompt gets its first candidate whatever the time.

        Returns:
            Scores of those that were finished, and their numbers among those of their prompt.
        """
        found: list[Score] = []
        numbers: list[int] = []
        size = self.engine.batch_size
        for at in range(0, len(noise), size):
            if all(self.counts) and not self.engine.meter.allows():
                break
            rows = slice(at, at + size)
            latents = self.engine.integrate(noise[rows], owners[rows])
            scores, some = self.add(latents, owners[rows], lineage[rows])
            found.append(scores)
            numbers += some
        return (Score.cat(found) if found else Score.of(torch.zeros(0))), numbers

    def add(
        self, latents: Tensor, owners: Tensor, lineage: Sequence[Mapping[str, Any]]
    ) -> tuple[Score, list[int]]:
        """Decode and score clean latents and keep them; returns as :meth:`sample` does."""
        made, scores = self.engine.judge(latents, owners)
        scores = scores.to("cpu")
        self._media.append(made)
        self._scores.append(scores)
        self._owners.append(owners)
        self._lineage += lineage
        numbers = []
        for owner in owners.tolist():
            numbers.append(self.counts[owner])
            self.counts[owner] += 1
        good = scored(scores)
        self.best.scatter_reduce_(0, owners[good], scores.value[good].detach(), "amax")
        self.show()
        return scores, numbers

    def show(self, done: int | None = None) -> None:
        """Tell whoever watches how far it is."""
        shown = torch.where(torch.isfinite(self.best), self.best, torch.nan)
        self.engine.show(len(self) if done is None else done, self.planned, shown)

    def finish(self, trace: Sequence[Mapping[str, Any]] = ()) -> Steered:
        """The result: candidates prompt by prompt, each prompt's in the order they were made."""
        owners = torch.cat(self._owners)
        order = torch.argsort(owners, stable=True)
        lineage = [self._lineage[i] for i in order.tolist()]
        media, scores = Media.cat(self._media)[order], Score.cat(self._scores)[order]
        return self.engine.finish(media, scores, owners[order], lineage, trace)


def values_of(scores: Score) -> list[float | None]:
    """Scores as plain numbers, ``None`` where there is none; for traces."""
    pairs = zip(scores.value.tolist(), scored(scores).tolist(), strict=True)
    return [value if good else None for value, good in pairs]


__all__ = ["Pool", "Sampling", "values_of"]
