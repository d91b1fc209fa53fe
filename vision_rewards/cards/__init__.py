"""Every registered reward: where its class lives and what it declares. Nothing heavy is imported.

A class takes its ``info`` from here (:func:`info_of`), so that what ``mmalign list rewards`` says
without loading a model cannot differ from what the model says.
"""

from __future__ import annotations

from functools import cache

from mmalign.reward_info import RewardInfo
from vision_rewards.cards import clip, judges, rules, shapes, vlm

CARDS: tuple[tuple[str, RewardInfo], ...] = (
    *shapes.CARDS, *rules.CARDS, *clip.CARDS, *vlm.CARDS, *judges.CARDS,
)  # fmt: skip


@cache
def _by_name() -> dict[str, RewardInfo]:
    return {info.name: info for _, info in CARDS}


def info_of(name: str) -> RewardInfo:
    """The declaration of a registered reward."""
    return _by_name()[name]
