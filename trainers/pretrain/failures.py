"""Clean and broken pictures of the small generator itself, sorted by what can be recognised.

A setting that breaks pictures does not break every one of them, and a good setting breaks some.
Labels therefore come from the picture: it is clean where every object in it is one of the world's
shapes in one of its colours with some room to spare, and broken where one is not.  Pictures in
between are left out.  What the prompt asked for plays no part.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch

from mmalign.protocols import Policy
from mmalign.sampling import generate
from mmalign.shapes import caption, sample_spec
from vision_rewards.shapes_vision import Detection, View, look

CLEAN_IOU, BROKEN_IOU = 0.80, 0.68  # the verifier's own threshold, 0.72, lies between


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How pictures are made.

    Attributes:
        kind: ``base``, ``early`` (too little training), ``damaged`` (weights off course),
            ``guidance`` (too strong) or ``few_steps`` (too coarse).
        steps, guidance: of the sampler; several values are used in turn.
        share: of the pictures of one set.
    """

    kind: str
    steps: tuple[int, ...]
    guidance: tuple[float, ...]
    share: float


SETTINGS = (
    Setting(kind="base", steps=(12,), guidance=(2.0,), share=0.36),
    Setting(kind="guidance", steps=(10,), guidance=(8.0, 12.0, 18.0), share=0.24),
    Setting(kind="early", steps=(8,), guidance=(1.5, 3.0), share=0.16),
    Setting(kind="damaged", steps=(8,), guidance=(2.0,), share=0.12),
    Setting(kind="few_steps", steps=(2, 3, 4), guidance=(2.0,), share=0.12),
)


@dataclass(frozen=True)
class Labelled:
    """Pictures ``(N, 64, 64, 3)`` uint8, whether each is clean ``(N,)``, and how it was made."""

    images: np.ndarray
    clean: np.ndarray
    kinds: tuple[str, ...]

    @staticmethod
    def cat(parts: list[Labelled]) -> Labelled:
        """Concatenate."""
        kinds = tuple(k for p in parts for k in p.kinds)
        images = np.concatenate([p.images for p in parts])
        return Labelled(images, np.concatenate([p.clean for p in parts]), kinds)

    def where(self, rows: np.ndarray) -> Labelled:
        """The rows of a mask."""
        kinds = tuple(k for k, keep in zip(self.kinds, rows, strict=True) if keep)
        return Labelled(self.images[rows], self.clean[rows], kinds)


def verdict_of(view: View) -> bool | None:
    """Clean, broken, or ``None`` where neither is beyond doubt."""
    if view.problem is not None or not view.detections:
        return False if view.problem else None
    if any(_unlike(d) for d in view.detections):
        return False
    known = all(d.shape and d.color for d in view.detections)
    return True if known and all(d.shape_iou.max() >= CLEAN_IOU for d in view.detections) else None


def _unlike(found: Detection) -> bool:
    return bool(found.shape_iou.max() < BROKEN_IOU or (found.color is None and found.area > 0.01))


def damaged(policy: Policy, strength: float, seed: int = 0) -> Policy:
    """Put noise of ``strength`` times its deviation on every matrix of the denoiser, in place.

    It stands for an over-optimised policy: the weights have left the region they were trained in.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.denoiser.parameters():
            if p.ndim == 2:
                p.add_(strength * p.std() * torch.randn(p.shape, generator=generator))
    return policy


@torch.no_grad()
def generated(
    policy: Policy, setting: Setting, split: str, count: int, seed: int, batch: int = 48
) -> Labelled:
    """About ``count`` labelled pictures of one setting, to prompts of ``split``."""
    parts = []
    batch = min(batch, count)
    for k in range(max(1, round(count / batch))):
        rng = random.Random(f"failures {split} {seed} {setting.kind} {k}")
        texts = [caption(sample_spec(rng, split)) for _ in range(batch)]
        seeds = [rng.randrange(2**31) for _ in texts]
        media, _ = generate(
            policy,
            texts,
            seeds,
            steps=setting.steps[k % len(setting.steps)],
            guidance_scale=setting.guidance[k % len(setting.guidance)],
            dtype=torch.bfloat16,
        )
        parts.append(labelled(media.data.permute(0, 2, 3, 1).numpy(), setting.kind))
    return Labelled.cat(parts)


def labelled(images: np.ndarray, kind: str) -> Labelled:
    """Pictures ``(N, H, W, 3)`` in [0, 1] with their labels; doubtful ones are dropped."""
    verdicts = [verdict_of(v) for v in look(images)]
    kept = np.asarray([v is not None for v in verdicts], bool)
    clean = np.asarray([bool(v) for v in verdicts], bool)[kept]
    pictures = np.round(images[kept] * 255).astype(np.uint8)
    return Labelled(pictures, clean, (kind,) * len(pictures))
