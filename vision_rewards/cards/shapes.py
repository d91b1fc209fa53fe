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
    (
        "vision_rewards.shapes_models:ShapesClip",
        RewardInfo(
            name="shapes_clip",
            differentiable=True,
            range=(-1.0, 1.0),
            typical=(0.1, 0.6),
            summary="shapes-world CLIP trained with hard negatives: cosine of picture and prompt",
            source="CLIP, Radford et al. 2021, arXiv:2103.00020; near misses as in NegCLIP, "
            "Yuksekgonul et al. 2022, arXiv:2210.01936",
            licence="Apache-2.0",
            checkpoint="assets/shapes-clip",
            parameters=1.448,
        ),
    ),
    (
        "vision_rewards.shapes_models:ShapesAesthetic",
        RewardInfo(
            name="shapes_aesthetic",
            differentiable=True,
            needs=(),
            range=(None, None),
            typical=(-2.0, 2.0),
            summary="shapes-world taste: harmony of hues, balance, clean edges",
            source="head on CLIP after the LAION aesthetic predictor, Schuhmann et al. 2022, "
            "arXiv:2210.08402; preferences of trainers/pretrain/taste.py",
            licence="Apache-2.0",
            checkpoint="assets/shapes-aesthetic",
            parameters=0.0579,
        ),
    ),
    (
        "vision_rewards.shapes_models:ShapesArtifact",
        RewardInfo(
            name="shapes_artifact",
            differentiable=True,
            needs=(),
            range=(0.0, 1.0),
            typical=(0.1, 1.0),
            summary="shapes-world artefact detector: probability that a picture is clean",
            source="after Understanding Reward Hacking in T2I RL, 2026, arXiv:2601.03468",
            licence="Apache-2.0",
            checkpoint="assets/shapes-artifact",
            parameters=0.144,
        ),
    ),
)
