"""Rewards by rule: file size, statistics of the pixels, text recognition, object detection."""

from __future__ import annotations

from mmalign.reward_info import MediaKind, RewardInfo

_DDPO = "DDPO, Black et al. 2023, arXiv:2305.13301"
_FLOW_GRPO = "Flow-GRPO, Liu et al. 2025, arXiv:2505.05470"
_PP_OCR = "PP-OCR small, inside the rapidocr wheel"
_BOTH: tuple[MediaKind, ...] = ("image", "video")

CARDS: tuple[tuple[str, RewardInfo], ...] = (
    (
        "vision_rewards.jpeg:JpegCompressibility",
        RewardInfo(
            name="jpeg_compressibility",
            needs=(),
            range=(None, 0.0),
            summary="minus the size as a JPEG in kilobytes: plain pictures win",
            source=_DDPO,
            licence="Apache-2.0",
        ),
    ),
    (
        "vision_rewards.jpeg:JpegIncompressibility",
        RewardInfo(
            name="jpeg_incompressibility",
            needs=(),
            range=(0.0, None),
            summary="size as a JPEG in kilobytes: detailed pictures win",
            source=_DDPO,
            licence="Apache-2.0",
        ),
    ),
    (
        "vision_rewards.ocr:OcrReward",
        RewardInfo(
            name="ocr",
            media=_BOTH,
            range=(0.0, 1.0),
            summary="share of the prompt's quoted text that can be read in the picture",
            source=_FLOW_GRPO,
            licence="Apache-2.0",
            checkpoint=_PP_OCR,
            parameters=7.8,
        ),
    ),
    (
        "vision_rewards.ocr:StrictOcrReward",
        RewardInfo(
            name="ocr_strict",
            media=_BOTH,
            range=(0.0, 1.0),
            summary="the same, and text that was not asked for costs",
            source=f"{_FLOW_GRPO}, with the edit distance relative to the longer text",
            licence="Apache-2.0",
            checkpoint=_PP_OCR,
            parameters=7.8,
        ),
    ),
    (
        "vision_rewards.pixel_statistics:Sharpness",
        RewardInfo(
            name="sharpness",
            media=_BOTH,
            differentiable=True,
            needs=(),
            range=(0.0, None),
            summary="variance of the Laplacian of brightness: blur is low, noise is high",
            source="Pech-Pacheco et al. 2000, doi:10.1109/ICPR.2000.903548",
            licence="Apache-2.0",
        ),
    ),
    (
        "vision_rewards.pixel_statistics:Saturation",
        RewardInfo(
            name="saturation",
            media=_BOTH,
            differentiable=True,
            needs=(),
            range=(0.0, 1.0),
            summary="mean saturation of HSV: burnt colours are near 1",
            source="Smith 1978, doi:10.1145/965139.807361",
            licence="Apache-2.0",
        ),
    ),
    (
        "vision_rewards.pixel_statistics:Colorfulness",
        RewardInfo(
            name="colorfulness",
            media=_BOTH,
            differentiable=True,
            needs=(),
            range=(0.0, None),
            typical=(15.0, 82.0),
            summary="colourfulness M3 of Hasler and Suesstrunk",
            source="Hasler and Suesstrunk 2003, doi:10.1117/12.477378",
            licence="Apache-2.0",
        ),
    ),
    (
        "vision_rewards.pixel_statistics:Contrast",
        RewardInfo(
            name="contrast",
            media=_BOTH,
            differentiable=True,
            needs=(),
            range=(0.0, 0.5),
            summary="root-mean-square contrast: standard deviation of brightness",
            source="Peli 1990, doi:10.1364/JOSAA.7.002032",
            licence="Apache-2.0",
        ),
    ),
    (
        "vision_rewards.pixel_statistics:GridEnergy",
        RewardInfo(
            name="grid_energy",
            media=_BOTH,
            differentiable=True,
            needs=(),
            range=(-1.0, 0.0),
            summary="minus the share of high-frequency energy on a grid of 8 pixels",
            source="after Odena et al. 2016, doi:10.23915/distill.00003, and Durall et al. 2020, "
            "arXiv:2003.01826",
            licence="Apache-2.0",
        ),
    ),
    (
        "vision_rewards.pixel_statistics:Clipping",
        RewardInfo(
            name="clipping",
            media=_BOTH,
            needs=(),
            range=(-1.0, 0.0),
            summary="minus the share of pure black and pure white pixels",
            source="after Poynton 2012, Digital Video and HD, ISBN 978-0-12-391926-7",
            licence="Apache-2.0",
        ),
    ),
    (
        "vision_rewards.geneval:GenEval",
        RewardInfo(
            name="geneval",
            range=(0.0, 1.0),
            summary="does the picture show the objects, counts, colours and positions asked for",
            source="GenEval, Ghosh et al. 2023, arXiv:2310.11513",
            licence="MIT (Mask2Former, CLIP)",
            checkpoint="facebook/mask2former-swin-small-coco-instance",
            parameters=496.0,
        ),
    ),
)
