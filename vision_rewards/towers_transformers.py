"""Towers of transformers models: CLIP, SigLIP, SigLIP 2, and image models such as DINO.

Only towers and projections are called, never ``get_image_features``, whose result changed its type
between versions 4 and 5 of the library.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vision_rewards.naflex import NaflexImage, load_naflex
from vision_rewards.preprocess import Preprocess
from vision_rewards.towers import (
    PixelTransform,
    TextTower,
    Towers,
    device_of,
    square_side,
    tensor_preprocess,
)
from vision_rewards.weights import check_keys

PAIRED = ("clip", "siglip", "siglip2")
RESAMPLING = {2: "bilinear", 3: "bicubic"}  # PIL's numbers, as configuration files store them
HARMLESS = ("position_ids", "pooler.dense.weight", "pooler.dense.bias")


class PooledImage(nn.Module):
    """CLIP's and SigLIP's image half: the pooled token, projected where there is a projection."""

    def __init__(self, vision_model: nn.Module, projection: nn.Module | None) -> None:
        super().__init__()
        self.vision_model, self.projection = vision_model, projection

    def forward(self, pixels: Tensor) -> Tensor:
        """Network input ``(B, 3, size, size)`` to features ``(B, dim)``."""
        pooled: Tensor = self.vision_model(pixel_values=pixels).pooler_output
        return pooled if self.projection is None else self.projection(pooled)


class ClassToken(nn.Module):
    """An image model read at its class token (DINO, DINOv2, any ViT)."""

    def __init__(self, vision_model: nn.Module) -> None:
        super().__init__()
        self.vision_model = vision_model

    def forward(self, pixels: Tensor) -> Tensor:
        """Network input ``(B, 3, size, size)`` to features ``(B, dim)``."""
        hidden: Tensor = self.vision_model(pixel_values=pixels).last_hidden_state
        return hidden[:, 0]


class PooledText(TextTower):
    """CLIP's and SigLIP's text half, with its tokenizer.

    Prompts are padded to the whole context. SigLIP was trained without a mask over the padding;
    CLIP attends causally, so that what follows the end cannot matter.
    """

    def __init__(
        self, text_model: nn.Module, projection: nn.Module | None, tokenizer: Any, context: int
    ) -> None:
        super().__init__()
        self.text_model, self.projection = text_model, projection
        self.tokenizer, self.context = tokenizer, context

    def forward(self, prompts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=self.context,
            return_tensors="pt",
        ).input_ids
        pooled: Tensor = self.text_model(input_ids=tokens.to(device_of(self))).pooler_output
        return pooled if self.projection is None else self.projection(pooled)

    def overflow(self, prompts: Sequence[str]) -> list[bool]:
        """Which prompts have more tokens than the context holds, start and end included."""
        rows = self.tokenizer(list(prompts), truncation=False, verbose=False).input_ids
        return [len(row) > self.context for row in rows]


def load(checkpoint: str, vision_only: bool = False, processor: str | Path | None = None) -> Towers:
    """Load a transformers model by hub name or folder.

    Raises:
        OSError: not there and cannot be fetched.
        ValueError: a kind of model without towers, missing keys, or an unusable preprocessing.
    """
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(checkpoint)
    source = str(checkpoint if processor is None else processor)
    if config.model_type not in PAIRED:
        return _image_model(checkpoint, config, source, vision_only)
    model = _model(checkpoint)
    image, preprocess = _image_half(model, config, source)
    text = None
    if not vision_only:
        context = config.text_config.max_position_embeddings
        tokenizer = AutoTokenizer.from_pretrained(source)
        projection = getattr(model, "text_projection", None)
        text = PooledText(model.text_model, projection, tokenizer, context)
    dim = getattr(config, "projection_dim", None) if config.model_type == "clip" else None
    return Towers(
        image, text, preprocess, dim or config.vision_config.hidden_size, model.logit_scale
    )


def _image_half(model: Any, config: Any, source: str) -> tuple[nn.Module, PixelTransform]:
    if config.model_type == "siglip2":  # the variant that keeps the aspect of a picture
        return NaflexImage(model.vision_model), load_naflex(source)
    image = PooledImage(model.vision_model, getattr(model, "visual_projection", None))
    return image, load_preprocess(source)


def _image_model(checkpoint: str, config: Any, source: str, vision_only: bool) -> Towers:
    if not vision_only:
        raise ValueError(
            f"{checkpoint!r} is a {config.model_type} without a text tower; load it with "
            f"vision_only=True, or give one of {', '.join(PAIRED)}"
        )
    # ViT's pooler is not part of DINO's weights: it would be drawn at random, and is not used.
    options = {"add_pooling_layer": False} if config.model_type in ("vit", "deit") else {}
    model = _model(checkpoint, **options)
    return Towers(ClassToken(model), None, load_preprocess(source), config.hidden_size)


def _model(checkpoint: str, **options: Any) -> Any:
    from transformers import AutoModel

    model, report = AutoModel.from_pretrained(
        checkpoint, dtype=torch.float32, output_loading_info=True, **options
    )
    check_loading(report, checkpoint)
    return model


def check_loading(report: Any, checkpoint: str) -> None:
    """Refuse what transformers loads with a warning: keys missing, unknown or of another shape.

    Raises:
        ValueError: names them.
    """
    named = {
        "missing": report["missing_keys"],
        "unknown": report["unexpected_keys"],
        "wrong shape": report.get("mismatched_keys", ()),
    }
    faults = {
        kind: sorted(str(k) for k in keys if not str(k).endswith(HARMLESS))
        for kind, keys in named.items()
    }
    check_keys(faults, checkpoint)


def load_preprocess(source: str) -> Preprocess:
    """The published preprocessing of a checkpoint as tensor operations.

    Raises:
        OSError: there is no preprocessor configuration.
        ValueError: a step that :class:`Preprocess` does not have.
    """
    from transformers import AutoImageProcessor

    values = AutoImageProcessor.from_pretrained(source).to_dict()
    size, crop = values.get("size") or {}, values.get("crop_size")
    mode = RESAMPLING.get(int(values.get("resample", 3)), str(values.get("resample")))
    shared = {"mean": values["image_mean"], "std": values["image_std"], "mode": mode}
    if size.get("shortest_edge") is None:
        return tensor_preprocess(size=square_side(size, "size"), fit="squash", **shared)
    if not values.get("do_center_crop"):
        raise ValueError(f"{source!r} resizes the shortest side without a crop: not a square")
    side = square_side(crop, "crop_size")
    return tensor_preprocess(size=side, fit="shortest", resize=size["shortest_edge"], **shared)
