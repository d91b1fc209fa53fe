"""Does a picture show the map that it was made from? Conditional generation on the shapes world.

Every request has a map of its own: the segmentation of a scene that is rendered for its prompt, so
that no map was made by the generator that is measured. A picture's value is the share of the
objects' pixels that have their class in the picture too, as ControlNet++ (2404.07987) measures
segmentations by what a segmentation finds again.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eval.benchmarks.base import Numbers, part_mean
from eval.benchmarks.shapes import ShapesBenchmark
from eval.result import Row
from mmalign.protocols import Policy, Request
from mmalign.runtime.seeds import stable_seed
from mmalign.sampling import generate
from mmalign.shapes.grammar import parse
from mmalign.shapes.render import render
from mmalign.shapes.scene import sample_scene
from mmalign.shapes.segments import UNKNOWN, Segments
from mmalign.types import Conditioning, Media, Score


class ShapesControl(ShapesBenchmark):
    """The requests of :class:`~eval.benchmarks.shapes.ShapesBenchmark`, each with a map.

    Args:
        conditioned: whether the generator is given the map; without, it knows the prompt alone,
            which is what following the map has to be compared with.
        split, prompts_per_task, samples_per_prompt, seed: as there.
    """

    name = "shapes_control"
    version = "1"
    keeps_parts = True

    def __init__(
        self,
        split: str = "test",
        prompts_per_task: int = 20,
        samples_per_prompt: int = 2,
        seed: int = 0,
        conditioned: bool = True,
    ) -> None:
        super().__init__(split, prompts_per_task, samples_per_prompt, seed)
        self.options["conditioned"] = conditioned
        self._segments = Segments()

    @property
    def identity(self) -> str:
        """The segmentation, and the verifier that stands beside it."""
        return f"{self._segments.identity}, {super().identity}"

    def check_policy(self, policy: Policy) -> None:
        """Refuse a generator that cannot be given a map. Raises :class:`ValueError`."""
        if self.options["conditioned"] and not hasattr(policy, "controlled"):
            raise ValueError(
                f"policy {policy.name!r} follows no picture, which is what {self.name} asks for; "
                "use a folder of a StableDiffusion3ControlNetPipeline, as training with ctrl_u "
                "exports it, or -o conditioned=false"
            )

    def maps(self, prompts: Sequence[str], seeds: Sequence[int], side: int) -> Tensor:
        """The classes ``(B, side, side)`` that pictures should show; -1 where any will do."""
        scenes = [
            sample_scene(parse(p), random.Random(stable_seed("map", s)))
            for p, s in zip(prompts, seeds, strict=True)
        ]
        pictures = Media.from_pil([render(scene, side) for scene in scenes])
        return self._segments.labels(pictures.data)

    def generate(
        self, policy: Any, prompts: Sequence[str], seeds: Sequence[int], **options: Any
    ) -> tuple[Media, int]:
        """Pictures by the maps, as :func:`mmalign.sampling.generate` makes them."""

        def encode(texts: Sequence[str]) -> Conditioning:
            plain: Conditioning = policy.encode(texts)
            if not self.options["conditioned"]:
                return plain
            labels = self.maps(prompts, seeds, policy.sampler.height).to(policy.device)
            followed: Conditioning = policy.controlled(plain, Media(self._segments.paint(labels)))
            return followed

        return generate(policy, prompts, seeds, encode=encode, **options)

    def judge(self, media: Media, requests: Sequence[Request]) -> Score:
        """The share of the objects' pixels that are right, and as parts: of all (``everywhere``),
        and the verifier's strict verdict (``accuracy``) and ``partial`` credit of the prompt.

        What the verifier cannot read has no verdict, but its pixels are compared all the same.

        Raises:
            ValueError: pictures that are not square.
        """
        asked, seeds = [r.prompt for r in requests], [r.seed for r in requests]
        high, wide = media.data.shape[-2:]
        if high != wide:
            raise ValueError(f"maps of {self.name} are square, a picture is {wide} x {high}")
        labels = self.maps(asked, seeds, high).to(media.data.device)
        right = self._segments.logits(media.data).argmax(1) == labels
        read = super().judge(media, requests)
        parts = {
            "everywhere": _share(right, labels != UNKNOWN),
            "accuracy": torch.where(read.valid, read.value, torch.nan),
            "partial": torch.where(read.valid, read.parts["partial"], torch.nan),
        }
        value = _share(right, labels > 0)
        return Score(value, value.isfinite(), parts, read.notes, self.identity)

    def numbers(self, rows: Sequence[Row]) -> Numbers:
        """Means of the parts over the pictures that have them."""
        return {name: part_mean(rows, name) for name in ("everywhere", "accuracy")}


def _share(right: Tensor, of: Tensor) -> Tensor:
    return (right & of).flatten(1).sum(1).float() / of.flatten(1).sum(1)
