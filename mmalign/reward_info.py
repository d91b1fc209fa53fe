"""What a reward model declares about itself; free of heavy imports, so that listings are too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

MediaKind = Literal["image", "video"]
Scope = Literal["pointwise", "pairwise", "group"]
Range = tuple[float | None, float | None]
BYTES = {"fp32": 4, "bf16": 2}  # of one weight


@dataclass(frozen=True, kw_only=True)
class RewardInfo:
    """Capabilities and provenance of a reward model. Higher scores are better, always.

    Attributes:
        media: kinds of media it accepts.
        scope: ``pointwise`` scores depend on one sample; ``group`` scores depend on the samples
            of the same prompt in the batch; ``pairwise`` needs an opponent for each sample.
        differentiable: gradients flow from the score to the pixels.
        deterministic: equal inputs give equal scores.
        needs: ``prompt`` and keys of ``context`` it cannot do without.
        range: lowest and highest possible value, ``None`` for an open end.
        typical: the interval most scores fall into, where one is known.
        summary: one line.
        source: the paper or work it comes from.
        licence: of the weights, where there are any.
        checkpoint: the published weights that are loaded by default; empty where none are.
        parameters: number of weights of the default checkpoint, in millions; 0 where none.
    """

    name: str
    media: tuple[MediaKind, ...] = ("image",)
    scope: Scope = "pointwise"
    differentiable: bool = False
    deterministic: bool = True
    needs: tuple[str, ...] = ("prompt",)
    range: Range = (None, None)
    typical: tuple[float, float] | None = None
    summary: str = ""
    source: str = ""
    licence: str = ""
    checkpoint: str = ""
    parameters: float = 0.0

    @property
    def weight_bytes(self) -> dict[str, int]:
        """Memory of the default checkpoint's weights by precision; what a forward pass adds
        depends on the batch: ``mmalign bench --reward NAME`` measures it."""
        return {dtype: round(self.parameters * 1e6 * size) for dtype, size in BYTES.items()}


def groups_of(prompts: Sequence[str], context: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Rows that belong together: equal ``context["group"]`` where given, else equal prompts."""
    found: dict[Any, list[int]] = {}
    for row, (prompt, facts) in enumerate(zip(prompts, context, strict=True)):
        found.setdefault(facts.get("group", prompt), []).append(row)
    return list(found.values())
