"""Region scores behind a guard, found wherever a reward holds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mmalign.protocols import RegionReward
from mmalign.types import Media, Regions, Score
from vision_rewards.guard import GuardedReward, RewardFailedError


def region_reward(reward: Any) -> Any:
    """The one part of ``reward`` (itself, behind a guard, in a composition) that scores regions.

    Raises:
        ValueError: none does, or several.
    """
    inner = reward.reward if isinstance(reward, GuardedReward) else reward
    parts = [part for part, _ in getattr(inner, "components", {}).values()] or [inner]
    able = [part for part in parts if isinstance(part, RegionReward)]
    if len(able) != 1:
        found = "several parts that score" if able else "no part that scores"
        raise ValueError(
            f"{inner.info.name} has {found} regions of a picture; name one that does, such as "
            "shapes_partial, shapes_strict or region_judge"
        )
    return able[0]


class GuardedRegions(GuardedReward):
    """A region reward whose failures leave pictures unscored, and end the run where too many do.

    The arguments are those of :class:`~vision_rewards.guard.GuardedReward`.
    """

    def regions(self, media: Media, prompts: Sequence[str]) -> Regions:
        """Regions of a batch; where the reward raises, every picture is unscored with the reason.

        Raises:
            ValueError: the reward does not take this kind of media, or the lengths differ.
            RewardFailedError: too many of the latest pictures are unscored.
        """
        self._check_call(media, prompts, None)
        try:
            found: Regions = self.reward.regions(media, prompts)  # type: ignore[attr-defined]
            if len(found) != len(media):
                raise ValueError(f"regions() judged {len(found)} of {len(media)} pictures")
        except RewardFailedError:  # of a guard further in: it asked for the run to stop
            raise
        except Exception as error:
            self.exceptions += 1
            found = _unscored(len(media), f"{type(error).__name__}: {error}")
        self._record(Score(found.overall, found.valid, {}, found.notes))
        return found


def _unscored(count: int, reason: str) -> Regions:
    nothing, missing = torch.zeros(count, dtype=torch.bool), torch.full((count,), torch.nan)
    return Regions(((),) * count, missing, nothing, (reason,) * count)
