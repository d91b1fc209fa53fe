"""Likeness to reference pictures: CLIP-I and DINO, as DreamBooth measures subject fidelity."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vision_rewards.base import Context, PixelReward, Reading
from vision_rewards.cards import info_of
from vision_rewards.embedding import load_embedder


class ReferenceSimilarity(PixelReward):
    """Mean cosine between a picture and its references, ``context["reference"]``.

    A reference is a path, a PIL image, a float tensor ``(3, H, W)`` or ``(N, 3, H, W)`` in [0, 1],
    or a list of these. A reference that cannot be read leaves its sample unscored, with a note.
    Equal references of a batch are read and embedded once.

    Args:
        checkpoint: what :func:`~vision_rewards.embedding.load_embedder` takes, image tower only.
        dtype: precision of the tower.
        device: where it lives; ``None`` follows the media.

    Raises:
        OSError: the checkpoint is not there.
        ValueError: its weights do not fit.
    """

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        *,
        dtype: str = "fp32",
        device: str | None = None,
    ) -> None:
        super().__init__(device)
        source = checkpoint or self.info.checkpoint
        self.embedder = load_embedder(source, dtype=dtype, vision_only=True)

    @property
    def identity(self) -> str:
        """Name, weights and preprocessing."""
        fingerprint = self.embedder.preprocess.fingerprint
        return f"{self.info.name}@{self.embedder.image_digest}-{fingerprint}"

    def networks(self) -> Sequence[nn.Module]:
        """The image tower."""
        return self.embedder.networks

    def read(self, pixels: Tensor, prompts: Sequence[str], context: Context) -> Reading:
        """Mean cosines ``(B,)``; the best reference's is the part ``best``.

        Raises:
            TypeError: a reference of a type that is not a picture.
        """
        gallery = _Gallery()
        rows = [gallery.rows(c["reference"]) for c in context]
        embedded = self._embed(gallery.pictures, pixels.device)
        found = self.embedder.image(pixels)
        values, best, notes = [], [], []
        for one, (row, note) in zip(found, rows, strict=True):
            cosines = (embedded[row] @ one).clamp(-1, 1) if row else one.new_full((1,), torch.nan)
            values.append(cosines.mean())
            best.append(cosines.max().detach())
            notes.append(note)
        return Reading(torch.stack(values), {"best": torch.stack(best)}, notes)

    @torch.no_grad()
    def _embed(self, pictures: Sequence[Tensor], device: torch.device) -> Tensor:
        """Embeddings ``(N, dim)`` of pictures ``(3, H, W)``, one pass for each size."""
        sizes: dict[torch.Size, list[int]] = defaultdict(list)
        for k, picture in enumerate(pictures):
            sizes[picture.shape].append(k)
        out = torch.zeros(len(pictures), self.embedder.dim, device=device)
        for rows in sizes.values():
            batch = torch.stack([pictures[k].to(device) for k in rows])
            out[rows] = self.embedder.image(batch)
        return out


class _Gallery:
    """The pictures of all references of a batch, each held once."""

    def __init__(self) -> None:
        self.pictures: list[Tensor] = []
        self._known: dict[Any, tuple[list[int], str]] = {}

    def rows(self, reference: Any) -> tuple[list[int], str]:
        """Where the pictures of ``reference`` are, or no rows and the reason."""
        many = isinstance(reference, (list, tuple))
        found: list[int] = []
        for one in reference if many else [reference]:
            rows, note = self._one(one)
            if note:
                return [], note
            found += rows
        return found, "" if found else "the list of references is empty"

    def _one(self, reference: Any) -> tuple[list[int], str]:
        key = str(reference) if isinstance(reference, (str, Path)) else id(reference)
        if key not in self._known:
            try:
                pictures = _pictures(reference)
            except (OSError, ValueError) as error:
                self._known[key] = [], f"the reference could not be read: {error}"
            else:
                first = len(self.pictures)
                self.pictures += pictures
                self._known[key] = list(range(first, len(self.pictures))), ""
        return self._known[key]


def _pictures(reference: Any) -> list[Tensor]:
    """Pictures ``(3, H, W)`` of one reference."""
    from PIL import Image

    from mmalign.pictures import read_picture, to_rgb
    from mmalign.types import Media

    # As the pictures that are scored are read: upright, transparent pixels over white.
    if isinstance(reference, (str, Path)):
        return list(Media.from_pil([read_picture(reference)]).data)
    if isinstance(reference, Image.Image):
        return list(Media.from_pil([to_rgb(reference)]).data)
    if not isinstance(reference, Tensor):
        raise TypeError(
            f"a reference must be a path, a PIL image or a tensor, got {type(reference).__name__}"
        )
    batch = reference.detach().float().reshape(-1, *reference.shape[-3:])
    if batch.shape[1:2] != (3,) or not reference.is_floating_point():
        raise ValueError(
            "a tensor must be float (3, H, W) or (N, 3, H, W) in [0, 1], "
            f"got {reference.dtype} {tuple(reference.shape)}"
        )
    if not torch.isfinite(batch).all():
        raise ValueError("it holds NaN or infinite values")
    return list(batch)


class ClipI(ReferenceSimilarity):
    """CLIP-I: likeness in CLIP's image space (DreamBooth, 2208.12242; ViT-B/32)."""

    info = info_of("clip_i")


class DinoI(ReferenceSimilarity):
    """DINO: likeness of class tokens (DreamBooth, 2208.12242; DINO ViT-S/16).

    DINO was not trained to ignore differences between subjects of one class, and is therefore the
    sharper measure of the two.
    """

    info = info_of("dino_i")
