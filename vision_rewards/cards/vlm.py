"""Networks that read picture and text together: ImageReward, HPSv3, VQAScore."""

from __future__ import annotations

from mmalign.reward_info import RewardInfo

CARDS: tuple[tuple[str, RewardInfo], ...] = ()
