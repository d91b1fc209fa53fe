"""Embedding models and heads on them: CLIPScore, aesthetic predictors, PickScore, HPS, ...."""

from __future__ import annotations

from mmalign.reward_info import RewardInfo

_CLIP_L = "openai/clip-vit-large-patch14"
_LAION = "LAION aesthetic predictor, Schuhmann et al. 2022, LAION-5B, arXiv:2210.08402"
_HPS = "HPSv2, Wu et al. 2023, arXiv:2306.09341"
_DREAMBOOTH = "DreamBooth, Ruiz et al. 2022, arXiv:2208.12242"

CARDS: tuple[tuple[str, RewardInfo], ...] = (
    (
        "vision_rewards.clip_rewards:ClipScore",
        RewardInfo(
            name="clip_score",
            differentiable=True,
            range=(-1.0, 1.0),
            typical=(0.15, 0.35),
            summary="cosine between picture and prompt of any CLIP or SigLIP",
            source="CLIPScore, Hessel et al. 2021, arXiv:2104.08718",
            licence="MIT",
            checkpoint=_CLIP_L,
            parameters=427.6,
        ),
    ),
    (
        "vision_rewards.clip_rewards:PickScore",
        RewardInfo(
            name="pickscore",
            differentiable=True,
            typical=(17.0, 24.0),
            summary="CLIP-H tuned on half a million human choices; scaled cosine",
            source="Pick-a-Pic, Kirstain et al. 2023, arXiv:2305.01569",
            licence="MIT",
            checkpoint="yuvalkirstain/PickScore_v1",
            parameters=986.1,
        ),
    ),
    (
        "vision_rewards.clip_rewards:Hpsv2",
        RewardInfo(
            name="hpsv2",
            differentiable=True,
            range=(-1.0, 1.0),
            typical=(0.20, 0.30),
            summary="CLIP-H tuned on the Human Preference Dataset v2; cosine",
            source=_HPS,
            licence="Apache-2.0",
            checkpoint="xswu/HPSv2:HPS_v2_compressed.pt",
            parameters=986.1,
        ),
    ),
    (
        "vision_rewards.clip_rewards:Hpsv21",
        RewardInfo(
            name="hpsv2_1",
            differentiable=True,
            range=(-1.0, 1.0),
            typical=(0.20, 0.35),
            summary="HPSv2 retrained on cleaner data (v2.1); not on the scale of hpsv2",
            source=_HPS,
            licence="Apache-2.0",
            checkpoint="xswu/HPSv2:HPS_v2.1_compressed.pt",
            parameters=986.1,
        ),
    ),
    (
        "vision_rewards.aesthetic:AestheticV2",
        RewardInfo(
            name="aesthetic_v2",
            differentiable=True,
            needs=(),
            typical=(4.5, 6.5),
            summary="LAION aesthetic predictor v2 (SAC + Logos + AVA), about 1 to 10",
            source=_LAION,
            licence="Apache-2.0 (head), MIT (backbone)",
            checkpoint="sac+logos+ava1-l14-linearMSE.pth on " + _CLIP_L,
            parameters=304.9,
        ),
    ),
    (
        "vision_rewards.aesthetic:AestheticV2Ava",
        RewardInfo(
            name="aesthetic_v2_ava",
            differentiable=True,
            needs=(),
            typical=(4.5, 6.5),
            summary="LAION aesthetic predictor v2 (AVA + Logos), linear or ReLU head",
            source=_LAION,
            licence="Apache-2.0 (head), MIT (backbone)",
            checkpoint="ava+logos-l14-linearMSE.pth on " + _CLIP_L,
            parameters=304.9,
        ),
    ),
    (
        "vision_rewards.aesthetic:AestheticV1",
        RewardInfo(
            name="aesthetic_v1",
            differentiable=True,
            needs=(),
            typical=(4.5, 6.5),
            summary="LAION aesthetic predictor v1, one linear layer, about 1 to 10",
            source=_LAION,
            licence="MIT",
            checkpoint="sa_0_4_vit_l_14_linear.pth on " + _CLIP_L,
            parameters=304.0,
        ),
    ),
    (
        "vision_rewards.aesthetic:AestheticV25",
        RewardInfo(
            name="aesthetic_v2_5",
            differentiable=True,
            needs=(),
            typical=(3.0, 6.5),
            summary="aesthetic predictor v2.5 on SigLIP, about 1 to 10, 5.5 is very good",
            source="aesthetic-predictor-v2-5, discus0434 2024, on SigLIP, arXiv:2303.15343",
            licence="AGPL-3.0 (head), Apache-2.0 (backbone)",
            checkpoint="aesthetic_predictor_v2_5.pth on google/siglip-so400m-patch14-384",
            parameters=429.5,
        ),
    ),
    (
        "vision_rewards.similarity:ClipI",
        RewardInfo(
            name="clip_i",
            differentiable=True,
            needs=("reference",),
            range=(-1.0, 1.0),
            typical=(0.60, 0.90),
            summary="CLIP likeness to reference pictures (context['reference'])",
            source=_DREAMBOOTH,
            licence="MIT",
            checkpoint="openai/clip-vit-base-patch32",
            parameters=87.8,
        ),
    ),
    (
        "vision_rewards.similarity:DinoI",
        RewardInfo(
            name="dino_i",
            differentiable=True,
            needs=("reference",),
            range=(-1.0, 1.0),
            typical=(0.30, 0.80),
            summary="DINO likeness to reference pictures (context['reference'])",
            source=f"{_DREAMBOOTH}; DINO, Caron et al. 2021, arXiv:2104.14294",
            licence="Apache-2.0",
            checkpoint="facebook/dino-vits16",
            parameters=21.7,
        ),
    ),
    (
        "vision_rewards.subject:LambdaHarmonic",
        RewardInfo(
            name="lambda_harmonic",
            differentiable=True,
            needs=("prompt", "reference"),
            range=(0.0, 1.0),
            summary="harmonic mean of likeness to a subject and fidelity to the text (RPO)",
            source="RPO, Miao et al. 2024, arXiv:2407.12164",
            licence="those of its two parts, clip_i and clip_score by default",
        ),
    ),
    (
        "vision_rewards.safety:NsfwClassifier",
        RewardInfo(
            name="nsfw",
            differentiable=True,
            needs=(),
            range=(0.0, 1.0),
            summary="probability of being safe, from an image classifier of transformers",
            source="Falconsai/nsfw_image_detection, on ViT, arXiv:2010.11929",
            licence="Apache-2.0",
            checkpoint="Falconsai/nsfw_image_detection",
            parameters=85.8,
        ),
    ),
    (
        "vision_rewards.safety:NsfwClip",
        RewardInfo(
            name="nsfw_clip",
            differentiable=True,
            needs=(),
            range=(0.0, 1.0),
            summary="probability of being safe, LAION's detector on CLIP-L embeddings",
            source="CLIP-based-NSFW-Detector, LAION-5B, Schuhmann et al. 2022, arXiv:2210.08402",
            licence="MIT",
            checkpoint="clip_autokeras_binary_nsfw.pth on " + _CLIP_L,
            parameters=304.2,
        ),
    ),
    (
        "vision_rewards.safety:NsfwChecker",
        RewardInfo(
            name="nsfw_checker",
            differentiable=True,
            needs=(),
            range=(0.0, 1.0),
            summary="safety from the concept margins of Stable Diffusion's safety checker",
            source="Stable Diffusion safety checker, analysed by Rando et al. 2022, "
            "arXiv:2210.04610",
            licence="see the model card (Stable Diffusion's CreativeML OpenRAIL-M family)",
            checkpoint="CompVis/stable-diffusion-safety-checker",
            parameters=304.0,
        ),
    ),
)
