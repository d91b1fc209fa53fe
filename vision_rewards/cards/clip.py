"""Embedding models and heads on them: CLIPScore, aesthetic predictors, PickScore, HPS, ...."""

from __future__ import annotations

from mmalign.reward_info import RewardInfo

CARDS: tuple[tuple[str, RewardInfo], ...] = ()
