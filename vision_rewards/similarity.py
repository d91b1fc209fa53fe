"""Likeness to reference pictures: CLIP-I and DINO, as DreamBooth measures subject fidelity."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vision_rewards.base import Context, PixelReward, Reading
from vision_rewards.cards import info_of
from vision_rewards.embedding import load_embedder

PICTURES = (".jpg", ".jpeg", ".png", ".webp")  # files that a folder of references is searched for


class ReferenceSimilarity(PixelReward):
    """Mean cosine between a picture and its references, ``context["reference"]``.

    A reference is a path, a PIL image, a float tensor ``(3, H, W)`` or ``(N, 3, H, W)`` in [0, 1],
    or a list of these. A reference that cannot be read leaves its sample unscored, with a note.
    Equal references of a batch are read and embedded once.

    Args:
        checkpoint: what :func:`~vision_rewards.embedding.load_embedder` takes, image tower only.
        references: those of every sample without references of its own, in any form that
            :func:`reference_pictures` takes; no context is needed then.
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
        references: Any = None,
        dtype: str = "fp32",
        device: str | None = None,
    ) -> None:
        super().__init__(device)
        source = checkpoint or self.info.checkpoint
        self.embedder = load_embedder(source, dtype=dtype, vision_only=True)
        self.references = None if references is None else reference_pictures(references)
        if self.references is not None:
            self.info = replace(self.info, needs=())

    @property
    def identity(self) -> str:
        """Name, weights and preprocessing, and the references where they are its own."""
        fingerprint = self.embedder.preprocess.fingerprint
        own = "" if self.references is None else f"-{pictures_digest(self.references)}"
        return f"{self.info.name}@{self.embedder.image_digest}-{fingerprint}{own}"

    def networks(self) -> Sequence[nn.Module]:
        """The image tower."""
        return self.embedder.networks

    def read(self, pixels: Tensor, prompts: Sequence[str], context: Context) -> Reading:
        """Mean cosines ``(B,)``; the best reference's is the part ``best``.

        Raises:
            TypeError: a reference of a type that is not a picture.
        """
        gallery = _Gallery()
        rows = [gallery.rows(c.get("reference", self.references)) for c in context]
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


def reference_pictures(source: Any) -> list[Tensor]:
    """The pictures ``(3, H, W)`` of a subject.

    Args:
        source: ``shapes:NAME``, a subject of the shapes world, drawn here; a folder, whose
            pictures are taken in the order of their names; or a reference, or a list of them, as
            :class:`ReferenceSimilarity` takes it.

    Raises:
        FileNotFoundError: no picture there. UnknownNameError: no such subject of the shapes world.
        OSError, ValueError, TypeError: a reference that is no readable picture.
    """
    from mmalign.shapes.subject import SCHEME, subject_pictures

    if isinstance(source, str) and source.startswith(SCHEME):
        return _pictures_of(subject_pictures(source))
    if isinstance(source, (str, Path)) and Path(source).is_dir():
        files = sorted(p for p in Path(source).iterdir() if p.suffix.lower() in PICTURES)
        if not files:
            raise FileNotFoundError(
                f"{source} holds no picture of a subject; put {', '.join(PICTURES)} files there"
            )
        return _pictures_of(files)
    return _pictures_of(source if isinstance(source, (list, tuple)) else [source])


def pictures_digest(pictures: Sequence[Tensor]) -> str:
    """Names the content of some pictures."""
    found = hashlib.sha256()
    for picture in pictures:
        found.update(str(tuple(picture.shape)).encode() + picture.numpy().tobytes())
    return found.hexdigest()[:16]


def _pictures_of(references: Sequence[Any]) -> list[Tensor]:
    found = [p for one in references for p in _pictures(one)]
    if not found:
        raise ValueError("the list of references is empty; give one picture or more")
    return [p.contiguous().cpu() for p in found]


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
