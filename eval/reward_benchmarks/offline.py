"""Every registered reward that runs from shipped files alone, and every mode of judging.

Left out are rewards whose published weights are not here (random weights would only be ranked by
luck), those that need a reference picture or text in quotes (``clip_i``, ``dino_i``, ``ocr``),
``edit_score``, which judges edits of a source picture, and ``region_judge``, whose form the small
model never learned (not one of its answers is readable).
"""

from __future__ import annotations

from typing import Any

from mmalign.assets import asset

WORLD = ("shapes_strict", "shapes_partial", "shapes_clip", "shapes_aesthetic", "shapes_artifact")
PROBES = (
    "sharpness", "contrast", "colorfulness", "saturation", "clipping", "grid_energy",
    "jpeg_compressibility", "jpeg_incompressibility",
)  # fmt: skip
# As short as the small model's answers are; it was trained on these questions.
JUDGES: dict[str, dict[str, Any]] = {
    "vqascore": {"reward": "vqascore"},
    "yes_no": {"reward": "yes_no_judge"},
    "yes_no after reasoning": {"reward": "yes_no_judge", "reasoning": True, "max_tokens": 48},
    "rubric shapes": {"reward": "rubric_judge", "rubric": "shapes", "max_tokens": 64},
    "rubric default": {"reward": "rubric_judge", "max_tokens": 96},
    "rubric alignment": {"reward": "rubric_judge", "rubric": "alignment", "max_tokens": 64},
    "critique": {"reward": "critique_judge", "max_tokens": 128},
    "auto rubric": {"reward": "auto_rubric", "max_tokens": 128},
    "unified overall": {"reward": "unified_reward", "max_tokens": 96},
    "unified axes": {"reward": "unified_reward", "mode": "axes", "max_tokens": 48},
    "pairwise": {"reward": "pairwise_judge", "max_tokens": 96},
    "pairwise one word": {"reward": "pairwise_judge", "soft": True},
    "unified pair rank": {"reward": "unified_reward_pair", "max_tokens": 16},
    "unified pair score": {"reward": "unified_reward_pair", "mode": "score", "max_tokens": 96},
    "unified pair think": {"reward": "unified_reward_pair", "mode": "think", "max_tokens": 96},
}


def quick_rewards() -> dict[str, Any]:
    """Rewards without a language model, by name: thousands of pictures a minute on a CPU."""
    return {name: name for name in (*WORLD, *PROBES)}


def judges() -> dict[str, Any]:
    """Every mode of judging on the shipped small model, ``judge: mode`` to its specification."""
    model = str(asset("shapes-vlm"))
    common = {"checkpoint": model, "batch_size": 16}
    return {f"judge: {mode}": {**common, **options} for mode, options in JUDGES.items()}


def offline_rewards() -> dict[str, Any]:
    """All of them."""
    return {**quick_rewards(), **judges()}
