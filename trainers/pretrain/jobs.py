"""The shipped small models and what makes each of them again."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from mmalign.config import apply_overrides, from_dict
from mmalign.registry import unknown

# name -> module of this package, its configuration, its function (configuration -> folder)
JOBS = {
    "shapes-vae": ("autoencoder", "AutoencoderConfig", "train_autoencoder"),
    "shapes-flow": ("generator", "GeneratorConfig", "train_generator"),
    "shapes-turbo": ("distill", "DistillConfig", "distill"),
    "shapes-sd": ("diffusion", "DiffusionConfig", "train_diffusion"),
    "shapes-clip": ("clip", "ClipConfig", "train_clip"),
    "shapes-aesthetic": ("aesthetic", "AestheticConfig", "train_aesthetic"),
    "shapes-artifact": ("artifact", "ArtifactConfig", "train_artifact"),
    "shapes-detector": ("detector", "DetectorConfig", "train_detector"),
    "shapes-vlm": ("vlm", "VLMConfig", "train_vlm"),
}


def pretrain(what: str, overrides: Sequence[str], output_dir: str | Path | None) -> Path:
    """Run one job; see :func:`mmalign.api.pretrain`."""
    if what not in JOBS:
        raise unknown("model to pre-train", what, JOBS)
    settings = apply_overrides({}, overrides)
    if output_dir is not None:
        settings["out"] = str(output_dir)
    module, config, job = JOBS[what]
    home = importlib.import_module(f"trainers.pretrain.{module}")
    folder: Path = getattr(home, job)(from_dict(getattr(home, config), settings))
    return folder
