"""Judges that answer in words: rubrics, comparisons, UnifiedReward, ...."""

from __future__ import annotations

from mmalign.reward_info import RewardInfo

_QWEN = "Qwen/Qwen2.5-VL-7B-Instruct"
_QWEN_LICENCE = "Apache-2.0 (weights of Qwen2.5-VL-7B)"
_UNIFIED = "UnifiedReward, Wang et al. 2025, arXiv:2503.05236"
_UNIFIED_LICENCE = "MIT (repository); terms of the base model apply to the weights"

CARDS: tuple[tuple[str, RewardInfo], ...] = (
    (
        "vision_rewards.judge.pointwise:RubricJudge",
        RewardInfo(
            name="rubric_judge",
            range=(0.0, 1.0),
            summary="a vision-language model scores the criteria of a rubric, with reasons",
            source="after VIEScore, Ku et al. 2023, arXiv:2312.14867; rubrics: assets/rubrics",
            licence=_QWEN_LICENCE,
            checkpoint=_QWEN,
            parameters=8292.0,
        ),
    ),
    (
        "vision_rewards.judge.regions:RegionJudge",
        RewardInfo(
            name="region_judge",
            range=(-1.0, 1.0),
            summary="a vision-language model scores the picture, and places in it by boxes",
            source="after SRUM, Jin et al. 2025, arXiv:2510.12784",
            licence=_QWEN_LICENCE,
            checkpoint=_QWEN,
            parameters=8292.0,
        ),
    ),
    (
        "vision_rewards.judge.pairwise:PairwiseJudge",
        RewardInfo(
            name="pairwise_judge",
            scope="pairwise",
            needs=("prompt", "opponent"),
            range=(0.0, 1.0),
            summary="which of two pictures fits better, asked in both orders",
            source="after LLM-as-a-Judge, Zheng et al. 2023, arXiv:2306.05685",
            licence=_QWEN_LICENCE,
            checkpoint=_QWEN,
            parameters=8292.0,
        ),
    ),
    (
        "vision_rewards.judge.yes_no:YesNoJudge",
        RewardInfo(
            name="yes_no_judge",
            range=(0.0, 1.0),
            summary="probability of yes, optionally against a reference picture (RewardDance)",
            source="after RewardDance, Wu et al. 2025, arXiv:2509.08826 (its weights: unpublished)",
            licence=_QWEN_LICENCE,
            checkpoint=_QWEN,
            parameters=8292.0,
        ),
    ),
    (
        "vision_rewards.judge.yes_no:VqaScore",
        RewardInfo(
            name="vqascore",
            range=(0.0, 1.0),
            summary='probability of yes to "Does this figure show ...?" by any such model',
            source="VQAScore, Lin et al. 2024, arXiv:2404.01291 (there with CLIP-FlanT5)",
            licence=_QWEN_LICENCE,
            checkpoint=_QWEN,
            parameters=8292.0,
        ),
    ),
    (
        "vision_rewards.judge.critique:CritiqueJudge",
        RewardInfo(
            name="critique_judge",
            range=(0.0, 1.0),
            summary="critique first, then scores of aspects and a refined request",
            source="RationalRewards, Wang et al. 2026, arXiv:2604.11626",
            licence="see the model's page (backbone Qwen3-VL-8B: Apache-2.0)",
            checkpoint="TIGER-Lab/RationalRewards-8B-T2I",
            parameters=8767.0,
        ),
    ),
    (
        "vision_rewards.judge.auto_rubric:AutoRubric",
        RewardInfo(
            name="auto_rubric",
            range=(0.0, 1.0),
            summary="the judge writes criteria for each prompt, then decides each of them",
            source="after Auto-Rubric as Reward, Tian et al. 2026, arXiv:2605.08354",
            licence=_QWEN_LICENCE,
            checkpoint=_QWEN,
            parameters=8292.0,
        ),
    ),
    (
        "vision_rewards.judge.checklist:ChecklistJudge",
        RewardInfo(
            name="checklist_judge",
            range=(0.0, 1.0),
            summary="share of given test points that are met, as UniGenBench's judges answer",
            source="UniGenBench, Wang et al. 2025, arXiv:2510.18701",
            licence="see the model's page (base model: Qwen licence)",
            checkpoint="CodeGoat24/UniGenBench-EvalModel-qwen-72b-v1",
            parameters=73410.0,
        ),
    ),
    (
        "vision_rewards.judge.video:VideoJudge",
        RewardInfo(
            name="video_judge",
            media=("image", "video"),
            range=(0.0, 1.0),
            summary="a vision-language model scores the criteria of a rubric on frames of a video",
            source="after VideoScore2, He et al. 2025, arXiv:2509.22799; rubrics: assets/rubrics",
            licence=_QWEN_LICENCE,
            checkpoint=_QWEN,
            parameters=8292.0,
        ),
    ),
    (
        "vision_rewards.judge.edit_score:EditScore",
        RewardInfo(
            name="edit_score",
            needs=("prompt", "source"),
            range=(0.0, 10.0),
            summary="success and quality of an edit, averaged over samples",
            source="EditScore, Luo et al. 2025, arXiv:2509.23909",
            licence="Apache-2.0 (repository); terms of the base model apply to the weights",
            checkpoint="EditScore/EditScore-Qwen3-VL-4B-Instruct",
            parameters=4438.0,
        ),
    ),
    (
        "vision_rewards.judge.unified_reward:UnifiedReward",
        RewardInfo(
            name="unified_reward",
            range=(0.2, 1.0),
            summary="UnifiedReward's score of 1 to 5, divided by 5",
            source=_UNIFIED,
            licence=_UNIFIED_LICENCE,
            checkpoint="CodeGoat24/UnifiedReward-2.0-qwen-7b",
            parameters=8292.0,
        ),
    ),
    (
        "vision_rewards.judge.unified_reward:UnifiedRewardPair",
        RewardInfo(
            name="unified_reward_pair",
            scope="pairwise",
            needs=("prompt", "opponent"),
            range=(0.0, 1.0),
            summary="UnifiedReward's verdict on two pictures, asked in both orders",
            source=_UNIFIED,
            licence=_UNIFIED_LICENCE,
            checkpoint="CodeGoat24/UnifiedReward-2.0-qwen-7b",
            parameters=8292.0,
        ),
    ),
)
