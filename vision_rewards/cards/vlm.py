"""Networks that read picture and text together: ImageReward, HPSv3, VQAScore."""

from __future__ import annotations

from mmalign.reward_info import RewardInfo

CARDS: tuple[tuple[str, RewardInfo], ...] = (
    (
        "vision_rewards.image_reward:ImageReward",
        RewardInfo(
            name="image_reward",
            differentiable=True,
            typical=(-2.3, 2.0),
            summary="human preference for a picture and its prompt, standardised (BLIP, 35 words)",
            source="ImageReward, Xu et al. 2023, arXiv:2304.05977",
            licence="Apache-2.0",
            checkpoint="THUDM/ImageReward",
            parameters=446.2,
        ),
    ),
    (
        "vision_rewards.hpsv3:Hpsv3",
        RewardInfo(
            name="hpsv3",
            differentiable=True,
            typical=(-5.0, 15.0),
            summary="human preference with an uncertainty, from Qwen2-VL-7B; pass its template",
            source="HPSv3, Ma et al. 2025, arXiv:2508.03789",
            licence="MIT (code); weights on Qwen2-VL, Apache-2.0: see the hub card",
            checkpoint="MizzenAI/HPSv3",
            parameters=7748.6,
        ),
    ),
)
