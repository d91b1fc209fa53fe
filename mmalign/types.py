"""The records every part of the suite exchanges: media, conditioning, steps, rollouts, scores.

Conventions: images are float in [0, 1] of shape ``(B, C, H, W)``, videos ``(B, T, C, H, W)``; time
runs from noise (sigma 1) to data (sigma 0); latents and log-probabilities are fp32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmalign.reward_info import MediaKind

if TYPE_CHECKING:
    from PIL.Image import Image


def _index(rows: slice | Sequence[int] | Tensor, length: int) -> Tensor:
    """Row numbers, ``(K,)`` int64 on the CPU, of a slice, numbers, or a mask ``(B,)`` bool."""
    if not isinstance(rows, slice):
        rows = torch.as_tensor(rows, dtype=None if len(rows) else torch.int64).cpu()
    return torch.arange(length)[rows]


def _cat(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """Joined, or ``None`` where any is."""
    given = [t for t in tensors if t is not None]
    return torch.cat(given) if len(given) == len(tensors) else None


def _nan(like: Tensor) -> Tensor:
    return torch.full_like(like, torch.nan)


@dataclass(frozen=True)
class Media:
    """A batch of images ``(B, C, H, W)`` or videos ``(B, T, C, H, W)``, float in [0, 1].

    Raises:
        ValueError: the tensor has neither four nor five dimensions, or is not floating point.
    """

    data: Tensor

    def __post_init__(self) -> None:
        if self.data.ndim not in (4, 5):
            shape = tuple(self.data.shape)
            raise ValueError(f"media must be (B, C, H, W) or (B, T, C, H, W), got {shape}")
        if not self.data.is_floating_point():
            raise ValueError(f"media must be float in [0, 1], got {self.data.dtype}")

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> Media:
        return Media(self.data[_index(rows, len(self))])

    @property
    def kind(self) -> MediaKind:
        """``image`` or ``video``."""
        return "image" if self.data.ndim == 4 else "video"

    @staticmethod
    def cat(parts: Sequence[Media]) -> Media:
        """Concatenate along the batch."""
        return Media(torch.cat([p.data for p in parts]))

    @staticmethod
    def from_pil(images: Sequence[Image]) -> Media:
        """Images of one common size, converted to RGB."""
        import numpy as np

        sizes = {i.size for i in images}
        if len(sizes) != 1:
            raise ValueError(f"images of one batch must share a size, got {sorted(sizes)}")
        arrays = [np.asarray(i.convert("RGB")) for i in images]
        return Media(torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255)

    def to_pil(self) -> list[Image]:
        """Images (a video gives its first frame), rounded to 8 bits."""
        from PIL import Image

        frames = self.data if self.data.ndim == 4 else self.data[:, 0]
        array = frames.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)
        return [Image.fromarray(a) for a in array.permute(0, 2, 3, 1).cpu().numpy()]


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts: named tensors whose first dimension is the batch.

    ``negative`` holds the tensors of the unconditional branch (same names), ``None`` where the
    policy has no classifier-free guidance.
    """

    positive: Mapping[str, Tensor]
    negative: Mapping[str, Tensor] | None = None

    def __len__(self) -> int:
        return len(next(iter(self.positive.values())))

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> Conditioning:
        index = _index(rows, len(self))
        negative = self.negative and {k: v[index] for k, v in self.negative.items()}
        return Conditioning({k: v[index] for k, v in self.positive.items()}, negative)

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Concatenate along the batch."""
        positive = {k: torch.cat([p.positive[k] for p in parts]) for k in parts[0].positive}
        if any(p.negative is None for p in parts):
            return Conditioning(positive)
        negatives = [p.negative or {} for p in parts]
        return Conditioning(positive, {k: torch.cat([n[k] for n in negatives]) for k in positive})


@dataclass(frozen=True)
class Step:
    """One transition of a sampler.

    ``x_next``, ``mean`` and ``x0`` (the clean estimate) have the shape of the latents; ``std`` is
    broadcastable to them; ``log_prob`` is ``(B,)``.  Deterministic kernels have no density:
    ``std`` is 0 and ``log_prob`` is ``None``, never 0.
    """

    x_next: Tensor
    mean: Tensor
    std: Tensor
    log_prob: Tensor | None
    x0: Tensor


@dataclass(frozen=True)
class Score:
    """What a reward model says about a batch. Higher is better, always.

    Attributes:
        value: ``(B,)`` fp32. Entries with ``valid == False`` carry no meaning.
        valid: ``(B,)`` bool; ``False`` means *unscored*, which is not zero.
        parts: named sub-scores, each ``(B,)``.
        notes: one explanation per sample, or empty.
        identity: which model, weights and settings produced the numbers.
    """

    value: Tensor
    valid: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    identity: str = ""

    def __post_init__(self) -> None:
        if self.value.ndim != 1 or self.valid.shape != self.value.shape:
            v, w = tuple(self.value.shape), tuple(self.valid.shape)
            raise ValueError(f"value and valid must both be (B,), got {v} and {w}")
        if self.notes and len(self.notes) != len(self.value):
            raise ValueError(f"{len(self.notes)} notes for {len(self.value)} samples")

    def __len__(self) -> int:
        return len(self.value)

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> Score:
        index = _index(rows, len(self))
        return replace(
            self,
            value=self.value[index],
            valid=self.valid[index],
            parts={k: v[index] for k, v in self.parts.items()},
            notes=tuple(self.notes[i] for i in index.tolist()) if self.notes else (),
        )

    def to(self, device: torch.device | str) -> Score:
        """The same score with its tensors on ``device``."""
        parts = {k: v.to(device) for k, v in self.parts.items()}
        return replace(self, value=self.value.to(device), valid=self.valid.to(device), parts=parts)

    @staticmethod
    def of(value: Tensor, identity: str = "", notes: Sequence[str] = ()) -> Score:
        """A score that is valid exactly where ``value`` is finite."""
        value = value.float()
        return Score(value, torch.isfinite(value), {}, tuple(notes), identity)

    @staticmethod
    def cat(scores: Sequence[Score]) -> Score:
        """Concatenate along the batch; parts must agree in name.

        A batch of which nothing was scored may lack parts: they are NaN there.
        """
        notes: tuple[str, ...] = ()
        if any(s.notes for s in scores):
            notes = sum((s.notes or ("",) * len(s) for s in scores), ())
        names = max((s.parts for s in scores), key=len).keys()
        if any(s.parts.keys() != names and (s.parts or s.valid.any()) for s in scores):
            raise ValueError("scores with different parts cannot be concatenated")
        return Score(
            torch.cat([s.value for s in scores]),
            torch.cat([s.valid for s in scores]),
            {k: torch.cat([s.parts.get(k, _nan(s.value)) for s in scores]) for k in names},
            notes,
            scores[0].identity,
        )


Box = tuple[float, float, float, float]  # left, top, right, bottom, as shares


@dataclass(frozen=True)
class Region:
    """One place of a picture.

    Attributes:
        box: left, top, right, bottom, as shares of width and height.
        score: from -1, wrong, to 1, right.
        note: what is there.

    Raises:
        ValueError: the box is empty or leaves the picture, or the score is out of range.
    """

    box: Box
    score: float
    note: str = ""

    def __post_init__(self) -> None:
        left, top, right, bottom = self.box
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise ValueError(
                f"a box is left < right and top < bottom within [0, 1], got {self.box}"
            )
        if not -1 <= self.score <= 1:
            raise ValueError(f"a region's score must lie in [-1, 1], got {self.score}")


@dataclass(frozen=True)
class Regions:
    """What a reward says about the places of ``B`` pictures, and about each as a whole.

    Attributes:
        boxes: the regions of each picture; possibly none.
        overall: ``(B,)`` scores of the whole pictures in [-1, 1].
        valid: ``(B,)`` bool; ``False`` means unscored, and neither boxes nor ``overall`` count.
        notes: one explanation a picture, or empty.
    """

    boxes: tuple[tuple[Region, ...], ...]
    overall: Tensor
    valid: Tensor
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        counts = len(self.boxes), len(self.overall), len(self.valid)
        if len(set(counts)) != 1:
            raise ValueError(f"{counts} boxes, overall scores and validities must be as many")
        out = self.valid & ~((self.overall >= -1) & (self.overall <= 1))
        if bool(out.any()):
            raise ValueError(
                f"overall scores must lie in [-1, 1], got {self.overall[out].tolist()}"
            )

    def __len__(self) -> int:
        return len(self.boxes)


@dataclass(frozen=True)
class Rollout:
    """A batch of finished trajectories that can be replayed without the sampler.

    Attributes:
        prompts: the prompt of each sample, ``B`` strings.
        groups: ``(B,)`` int64, equal for samples of one prompt group.
        seeds: noise seed of each sample, ``B`` ints.
        sigmas: ``(T + 1,)`` grid from 1 to 0.
        steps: indices into the grid of the recorded (trainable) steps, ascending, ``S`` of them.
        latents: ``(B, S, ...)`` fp32, the state each recorded step started from.
        next_latents: ``(B, S, ...)`` fp32, the state it led to.
        log_probs: ``(B, S)`` fp32 under the policy that sampled.
        final: ``(B, ...)`` fp32 clean latents.
        media: decoded pictures or videos, or ``None`` once dropped.
        conditioning: encoded prompts, one row per sample.
        guidance_scale: classifier-free guidance used by the sampling policy.
        policy_version: update count of the policy that sampled.
        nfe: network evaluations spent, counting both branches of guidance; a selection of rows
            carries 0, because evaluations belong to the batch that made them.
        means: ``(B, S, ...)`` fp32, the mean of each recorded transition under the policy that
            sampled; ``None`` unless they were asked for.
        velocities: ``(B, S, ...)`` fp32, its predictions there; likewise.
        shifts: ``(B, S, ...)`` fp32, what guidance added to each of these means; ``None`` where
            nothing guided.
        guided_density: whether ``log_probs`` are of the means with their shifts, or without.
        guide_pictures: pictures that guidance scored; counted like ``nfe``.
        maps: ``(B, 1, h, w)`` fp32 weight of each place of the clean latents, or what else an
            objective keeps of each place; ``None`` unless they were asked for.
    """

    prompts: tuple[str, ...]
    groups: Tensor
    seeds: tuple[int, ...]
    sigmas: Tensor
    steps: tuple[int, ...]
    latents: Tensor
    next_latents: Tensor
    log_probs: Tensor
    final: Tensor
    media: Media | None
    conditioning: Conditioning
    guidance_scale: float
    policy_version: int = 0
    nfe: int = 0
    means: Tensor | None = None
    velocities: Tensor | None = None
    shifts: Tensor | None = None
    guided_density: bool = False
    guide_pictures: int = 0
    maps: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> Rollout:
        index = _index(rows, len(self))
        given = self._optional().items()
        optional: dict[str, Any] = {n: v if v is None else v[index] for n, v in given}
        return replace(
            self,
            prompts=tuple(self.prompts[i] for i in index.tolist()),
            seeds=tuple(self.seeds[i] for i in index.tolist()),
            groups=self.groups[index],
            latents=self.latents[index],
            next_latents=self.next_latents[index],
            log_probs=self.log_probs[index],
            final=self.final[index],
            media=None if self.media is None else self.media[index],
            conditioning=self.conditioning[index],
            nfe=0,
            guide_pictures=0,
            **optional,
        )

    def _optional(self) -> dict[str, Any]:
        return {n: getattr(self, n) for n in ("means", "velocities", "shifts", "maps")}

    @staticmethod
    def cat(parts: Sequence[Rollout]) -> Rollout:
        """Concatenate rollouts made with the same grid and recorded steps."""
        first = parts[0]
        for p in parts:
            same = (p.steps, p.guidance_scale, p.policy_version) == (
                first.steps,
                first.guidance_scale,
                first.policy_version,
            )
            if not same or not p.sigmas.equal(first.sigmas):
                raise ValueError(
                    "rollouts with different grids, recorded steps, guidance or policy versions "
                    "cannot be joined"
                )
        media = [p.media for p in parts if p.media is not None]
        optional: dict[str, Any] = {
            n: _cat([p._optional()[n] for p in parts]) for n in first._optional()
        }
        return replace(
            first,
            prompts=sum((p.prompts for p in parts), ()),
            seeds=sum((p.seeds for p in parts), ()),
            groups=torch.cat([p.groups for p in parts]),
            latents=torch.cat([p.latents for p in parts]),
            next_latents=torch.cat([p.next_latents for p in parts]),
            log_probs=torch.cat([p.log_probs for p in parts]),
            final=torch.cat([p.final for p in parts]),
            media=Media.cat(media) if len(media) == len(parts) else None,
            conditioning=Conditioning.cat([p.conditioning for p in parts]),
            nfe=sum(p.nfe for p in parts),
            guide_pictures=sum(p.guide_pictures for p in parts),
            **optional,
        )
