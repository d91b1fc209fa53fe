"""How well pictures show the map they were made from: the measure of conditional generation.

Maps are those of rendered scenes, so that none of them was made by the generator that is measured.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mmalign.runtime.seeds import stable_seed
from mmalign.sampling import generate
from mmalign.shapes.grammar import parse
from mmalign.shapes.render import render
from mmalign.shapes.scene import sample_scene
from mmalign.types import Media
from trainers.gradient.segments import UNKNOWN, Segments


@dataclass(frozen=True)
class Followed:
    """Shares of valid pixels that have the class asked for, one a prompt.

    Attributes:
        objects: of the pixels of objects, ``(B,)``.
        everywhere: of all, the background's too, ``(B,)``.
        media: the pictures.
    """

    objects: Tensor
    everywhere: Tensor
    media: Media


def maps_of(prompts: Sequence[str], side: int, seed: int = 0) -> Tensor:
    """Segmentations ``(B, H, W)`` of a scene for each prompt of the shapes world."""
    scenes = [
        sample_scene(parse(p), random.Random(stable_seed("map", seed, n, p)))
        for n, p in enumerate(prompts)
    ]
    return Segments().labels(Media.from_pil([render(s, side) for s in scenes]).data)


def follow_maps(
    policy: Any, prompts: Sequence[str], seeds: Sequence[int], *, conditioned: bool = True,
    maps: Tensor | None = None, **options: Any,
) -> Followed:  # fmt: skip
    """Generate a picture for each prompt by a map, and find the map again in it.

    Args:
        policy: one with a ControlNet.
        conditioned: whether the map is given; without, the generator knows the prompt alone.
        maps: ``(B, H, W)`` classes; by default :func:`maps_of` the prompts.
        options: of :func:`mmalign.sampling.generate`.

    Raises:
        CaptionError: no maps, and a prompt that the shapes world does not know.
    """
    segments = Segments()
    labels = maps_of(prompts, policy.sampler.height) if maps is None else maps
    labels = labels.to(policy.device)
    shown = Media(segments.paint(labels))

    def encode(texts: Sequence[str]) -> Any:
        plain = policy.encode(texts)
        return policy.controlled(plain, shown) if conditioned else plain

    media, _ = generate(policy, prompts, seeds, encode=encode, **options)
    right = segments.logits(media.data).argmax(1) == labels
    return Followed(_share(right, labels > 0), _share(right, labels != UNKNOWN), media)


def _share(right: Tensor, of: Tensor) -> Tensor:
    return (right & of).flatten(1).sum(1) / of.flatten(1).sum(1).clamp_min(1)
