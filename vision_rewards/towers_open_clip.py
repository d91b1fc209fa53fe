"""Towers of open_clip models: by hub name, by architecture and tag, or from a local folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vision_rewards.towers import (
    TextTower,
    Towers,
    device_of,
    square_side,
    tensor_preprocess,
)
from vision_rewards.weights import load_exactly

SCHEMES = ("hf-hub:", "local-dir:")
RANDOM = "random"  # the tag of random weights: ViT-H-14/random


class OpenClipImage(nn.Module):
    """The visual half of an open_clip model."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, pixels: Tensor) -> Tensor:
        """Network input ``(B, 3, size, size)`` to features ``(B, dim)``."""
        out = self.visual(pixels)
        return out[0] if isinstance(out, tuple) else out  # CoCa adds its tokens


class OpenClipText(TextTower):
    """The text half of an open_clip model, with its tokenizer."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.context = int(getattr(model, "context_length", tokenizer.context_length))

    def forward(self, prompts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(list(prompts), context_length=self.context)
        model: Any = self.model
        features: Tensor = model.encode_text(tokens.to(device_of(self)))
        return features

    def overflow(self, prompts: Sequence[str]) -> list[bool]:
        """Which prompts have more tokens than the context holds, start and end included."""
        return [self._length(p) > self.context for p in prompts]

    def _length(self, prompt: str) -> int:
        inner = getattr(self.tokenizer, "tokenizer", None)
        if inner is None:  # CLIP's byte-pair tokenizer adds a start and an end
            return len(self.tokenizer.encode(prompt)) + 2
        return len(inner(self.tokenizer.clean_fn(prompt)).input_ids)


def model_name(checkpoint: str | Path) -> str | None:
    """``checkpoint`` as open_clip names it, ``None`` where it is not an open_clip model."""
    text, folder = str(checkpoint), Path(checkpoint).expanduser()
    if text.startswith(SCHEMES):
        return text
    if folder.is_dir():
        own = (folder / "open_clip_config.json").is_file()
        return f"local-dir:{folder}" if own and not (folder / "config.json").is_file() else None
    architecture, _, tag = text.partition("/")
    if not tag or "/" in tag:
        return None
    from open_clip import list_models

    return text if architecture in list_models() else None


def load(name: str, vision_only: bool = False) -> Towers:
    """Load an open_clip model by :func:`model_name`; the tag ``random`` downloads nothing.

    Raises:
        OSError: the model is not there and cannot be fetched.
        ValueError: its weights do not fit its configuration.
    """
    import open_clip

    architecture, tag = name, None
    if not name.startswith(SCHEMES):
        architecture, _, tag = name.partition("/")
    # Weights trained with QuickGELU give wrong features under GELU; open_clip only warns.
    quick = bool(
        tag
        and tag != RANDOM
        and (open_clip.get_pretrained_cfg(architecture, tag) or {}).get("quick_gelu")
    )
    try:
        if tag == RANDOM:  # for measuring speed at published shapes
            model = open_clip.create_model(architecture)
        else:
            model = open_clip.create_model_from_pretrained(
                architecture, pretrained=tag, force_quick_gelu=quick, return_transform=False
            )
    except (RuntimeError, ValueError) as error:
        if "state_dict" in str(error) or "size mismatch" in str(error):
            raise ValueError(f"the weights of {name!r} do not fit its network. {error}") from error
        raise OSError(f"the open_clip model {name!r} could not be loaded: {error}") from error
    tokenizer = None if vision_only else open_clip.get_tokenizer(architecture)
    return split(model, tokenizer)


def build(
    architecture: str | Mapping[str, Any], state: Mapping[str, Tensor], source: str | Path
) -> Towers:
    """An open_clip CLIP with given weights.

    Args:
        architecture: a name that open_clip knows, or the configuration itself (``embed_dim``,
            ``vision_cfg``, ``text_cfg``).
        state: all its weights.
        source: what to call them in an error.

    Raises:
        ValueError: the weights do not fit, naming the keys.
    """
    import open_clip

    if isinstance(architecture, str):
        model = open_clip.create_model(architecture, pretrained=None)
        tokenizer = open_clip.get_tokenizer(architecture)
    else:
        model = open_clip.CLIP(**architecture)
        tokenizer = open_clip.SimpleTokenizer()
    load_exactly(model, state, source)
    return split(model, tokenizer)


def split(model: Any, tokenizer: Any | None) -> Towers:
    """Cut an open_clip model in two; without a tokenizer the text half is dropped."""
    config = getattr(model.visual, "preprocess_cfg", None) or {}
    preprocess = _preprocess(config, model.visual)
    image = OpenClipImage(model.visual)
    scale = model.logit_scale.detach().clone()
    del model.visual
    text = None if tokenizer is None else OpenClipText(model, tokenizer)
    dim = int(getattr(image.visual, "output_dim", 0)) or int(model.text_projection.shape[-1])
    return Towers(image, text, preprocess, dim, scale)


def _preprocess(config: Mapping[str, Any], visual: Any) -> Any:
    from vision_rewards.preprocess import CLIP_MEAN, CLIP_STD

    fit = config.get("resize_mode", "shortest")
    if fit == "longest" and config.get("fill_color", 0):
        raise ValueError(f"padding with {config['fill_color']} is not supported, only with black")
    return tensor_preprocess(
        size=square_side(config.get("size", visual.image_size), "the size of the network input"),
        fit=fit,
        mean=config.get("mean", CLIP_MEAN),
        std=config.get("std", CLIP_STD),
        mode=config.get("interpolation", "bicubic"),
    )
