"""Embedding models behind one interface: open_clip, transformers CLIP / SigLIP, DINO.

Scorers that name the same checkpoint get the same towers, so that one forward pass serves all of
them (see :mod:`vision_rewards.sharing`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vision_rewards.sharing import shared
from vision_rewards.towers import PixelTransform, TextTower, Towers, device_of, load_towers
from vision_rewards.weights import digest

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Embedder(nn.Module):
    """An image tower and, unless vision only, the text tower that shares its space.

    The towers are frozen, in evaluation mode and shared with every other scorer of the same
    checkpoint: train a ``copy.deepcopy``, never the object itself.

    Attributes:
        image_tower: network input ``(B, 3, size, size)`` to features ``(B, dim)``.
        text_tower: prompts to features ``(B, dim)``, or ``None``.
        preprocess: pixels to network input, from the checkpoint's own configuration.
        dim: width of the embedding.
        image_digest: names the weights of the image tower and their precision.
        digest: names the weights of all towers and their precision.
        logit_scale: the checkpoint's own scale (a logarithm, fp32 scalar), where it has one.
    """

    logit_scale: Tensor | None

    def __init__(
        self,
        image_tower: nn.Module,
        text_tower: TextTower | None,
        preprocess: PixelTransform,
        *,
        dim: int,
        logit_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.image_tower, self.text_tower = image_tower, text_tower
        self.preprocess, self.dim = preprocess, dim
        scale = None if logit_scale is None else logit_scale.detach().float().reshape(())
        self.register_buffer("logit_scale", scale)
        self.image_digest = _tower_digest(image_tower)
        self.digest = self.image_digest
        if text_tower is not None:
            self.digest += "-" + _tower_digest(text_tower)

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """The towers one by one, for :meth:`PixelReward.networks`: each may be shared."""
        return tuple(t for t in (self.image_tower, self.text_tower) if t is not None)

    def image(self, pixels: Tensor) -> Tensor:
        """Embed pixels ``(B, 3, H, W)`` in [0, 1]: ``(B, dim)`` fp32 of length 1."""
        return F.normalize(self.image_features(pixels), dim=-1)

    def image_features(self, pixels: Tensor) -> Tensor:
        """As :meth:`image`, before normalisation; one forward pass inside ``shared_forward``."""
        dtype = _dtype(self.image_tower)
        key = (self.image_tower, self.preprocess.fingerprint)
        return shared(key, pixels, lambda: self._forward(pixels, dtype))

    def _forward(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        # A training loop's autocast must not change scores.
        with torch.autocast(pixels.device.type, enabled=False):
            features: Tensor = self.image_tower(self.preprocess(pixels).to(dtype))
        return features.float()

    def text(self, prompts: Sequence[str]) -> Tensor:
        """Embed prompts: ``(B, dim)`` fp32 of length 1; equal prompts are encoded once.

        Raises:
            ValueError: the checkpoint has no text tower, or was loaded without it.
        """
        tower = self._text_tower()
        unique = list(dict.fromkeys(prompts))
        key = (tower, tuple(unique), torch.is_grad_enabled())
        encoded = shared(key, None, lambda: F.normalize(_encoded(tower, unique), dim=-1))
        row = {prompt: k for k, prompt in enumerate(unique)}
        return encoded[[row[p] for p in prompts]]

    def overflow(self, prompts: Sequence[str]) -> list[bool]:
        """Which prompts are longer than the context of the text tower and lose their end."""
        return self._text_tower().overflow(prompts)

    def _text_tower(self) -> TextTower:
        if self.text_tower is None:
            raise ValueError("this embedder has an image tower only; load one with a text tower")
        return self.text_tower


def load_embedder(
    checkpoint: str | Path,
    *,
    dtype: str = "fp32",
    vision_only: bool = False,
    processor: str | Path | None = None,
) -> Embedder:
    """The embedder of ``checkpoint``; towers already in memory are used again.

    Args:
        checkpoint: one of

            * ``"hf-hub:org/name"`` or a folder with ``open_clip_config.json``: an open_clip model;
            * ``"ViT-L-14/openai"``: an open_clip architecture and the tag of its weights;
            * ``"org/name"`` or a folder with ``config.json``: a CLIP, SigLIP or SigLIP 2 of
              transformers, or an image model such as DINO (class token), with ``vision_only``.
        dtype: precision of the towers, ``fp32``, ``bf16`` or ``fp16``; embeddings are normalised
            in fp32 whatever it is.
        vision_only: do not keep a text tower.
        processor: where tokenizer and preprocessing come from, if not from ``checkpoint``.

    Raises:
        OSError: the checkpoint is not there and cannot be fetched.
        ValueError: an unknown dtype or kind of model, or weights that do not fit the architecture.
    """
    kind = DTYPES[checked_dtype(dtype)]
    source = checkpoint if processor is None else processor
    key = (state_of(checkpoint), dtype, vision_only, state_of(source))
    return cached(key, lambda: assemble(load_towers(checkpoint, vision_only, processor), kind))


def checked_dtype(dtype: str) -> str:
    """``dtype``, if it is the name of a precision.

    Raises:
        ValueError: it is not.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown; use one of {', '.join(DTYPES)}")
    return dtype


_EMBEDDERS: WeakValueDictionary[Any, Embedder] = WeakValueDictionary()
_LOCK = threading.Lock()


def cached(key: Any, make: Callable[[], Embedder]) -> Embedder:
    """The embedder made before under ``key``, as long as a scorer keeps it alive."""
    with _LOCK:
        embedder = _EMBEDDERS.get(key)
        if embedder is None:
            embedder = _EMBEDDERS[key] = _joined(make())
        return embedder


def assemble(towers: Towers, dtype: torch.dtype = torch.float32) -> Embedder:
    """Frozen towers in ``dtype`` as an embedder."""
    for tower in filter(None, (towers.image, towers.text)):
        tower.to(dtype).eval().requires_grad_(False)
    return Embedder(
        towers.image,
        towers.text,
        towers.preprocess,
        dim=towers.dim,
        logit_scale=towers.logit_scale,
    )


def _joined(new: Embedder) -> Embedder:
    """Replace the image tower by an equal one already in memory: one network, one forward.

    Equal weights are not enough: activations are no weights, and are told by the description.
    """
    for old in _EMBEDDERS.values():
        same = old.image_digest == new.image_digest
        if same and repr(old.image_tower) == repr(new.image_tower):
            new.image_tower = old.image_tower
            break
    return new


def _encoded(tower: TextTower, prompts: Sequence[str]) -> Tensor:
    with torch.autocast(device_of(tower).type, enabled=False):
        features: Tensor = tower(prompts)
    return features.float()


def _tower_digest(tower: nn.Module) -> str:
    short = {v: k for k, v in DTYPES.items()}[_dtype(tower)]
    return digest(tower) + ("" if short == "fp32" else f"-{short}")


def _dtype(tower: nn.Module) -> torch.dtype:
    return next(p.dtype for p in tower.parameters() if p.is_floating_point())


def state_of(checkpoint: str | Path) -> tuple[str, int]:
    """A local checkpoint by its path and latest change, a published one by its name."""
    path = Path(checkpoint).expanduser()
    if not path.exists():
        return str(checkpoint), 0
    files = [path, *path.iterdir()] if path.is_dir() else [path]
    return str(path.resolve()), max(f.stat().st_mtime_ns for f in files)
