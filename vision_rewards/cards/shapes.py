"""Rewards of the shapes world: the exact verifier and the shipped small models."""

from __future__ import annotations

from mmalign.reward_info import RewardInfo

CARDS: tuple[tuple[str, RewardInfo], ...] = (
    (
        "vision_rewards.shapes:ShapesStrict",
        RewardInfo(
            name="shapes_strict",
            range=(0.0, 1.0),
            summary="shapes-world verifier: GenEval's rules on an exact inventory, 0 or 1",
            source="rules of GenEval, Ghosh et al. 2023, arXiv:2310.11513",
            licence="Apache-2.0",
        ),
    ),
    (
        "vision_rewards.shapes:ShapesPartial",
        RewardInfo(
            name="shapes_partial",
            range=(0.0, 1.0),
            summary="shapes-world verifier with partial credit for shape, colour, count, position",
            source="rules of GenEval, Ghosh et al. 2023, arXiv:2310.11513, graded",
            licence="Apache-2.0",
        ),
    ),
)
