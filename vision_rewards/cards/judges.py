"""Judges that answer in words: rubrics, comparisons, UnifiedReward, ...."""

from __future__ import annotations

from mmalign.reward_info import RewardInfo

CARDS: tuple[tuple[str, RewardInfo], ...] = ()
