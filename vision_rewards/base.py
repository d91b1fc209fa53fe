"""What scorers that look at pixels share: checks of the call, odd pictures, devices, the record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.reward_info import RewardInfo
from mmalign.types import Media, Score
from vision_rewards.sharing import shared

Context = Sequence[Mapping[str, Any]]
NOT_FINITE = "the picture holds NaN or infinite values"


@dataclass(frozen=True)
class Reading:
    """What a scorer read off a batch: ``value (B,)`` (NaN where it could not), parts, notes."""

    value: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    notes: Sequence[str] = ()


def checked_call(info: RewardInfo, media: Media, prompts: Sequence[str], context: Any) -> None:
    """Refuse calls that could never work.

    Raises:
        ValueError: a kind of media the reward does not take, pictures without three (or one)
            colour channels, not one prompt or context for each sample, or a missing context key.
    """
    name = info.name
    if media.kind not in info.media:
        frames = "; score its frames: {compose: frames, parts: [...]}"
        hint = frames if media.kind == "video" else ""
        raise ValueError(f"{name} takes {', '.join(info.media)}, got a {media.kind}{hint}")
    channels = media.data.shape[-3]
    if channels not in (1, 3):
        raise ValueError(f"{name} needs 3 colour channels (or 1, grey), got {channels}")
    if len(prompts) != len(media):
        raise ValueError(f"{name}: {len(prompts)} prompts for {len(media)} samples; give one each")
    if context is not None and len(context) != len(media):
        raise ValueError(f"{name}: {len(context)} contexts for {len(media)} samples; give one each")
    for key in set(info.needs) - {"prompt"}:
        missing = [i for i in range(len(media)) if not context or key not in context[i]]
        if missing:
            raise ValueError(
                f"{name} needs context[{key!r}] for each sample; sample {missing[0]} has none"
            )


def clean_pixels(media: Media) -> tuple[Tensor, Tensor]:
    """Pixels with three channels, fp32, and which samples ``(B,)`` are finite everywhere.

    Grey pictures are repeated to three channels; pictures that are not finite are black, so that
    the rest of their batch can be scored.
    """
    data = media.data.float()
    if data.shape[-3] == 1:
        data = data.expand(*data.shape[:-3], 3, *data.shape[-2:])
    finite = torch.isfinite(data.detach()).flatten(1).all(1)
    if not bool(finite.all()):
        data = torch.where(finite.view(-1, *[1] * (data.ndim - 1)), data, 0.0)
    return data, finite


class PixelReward:
    """Base of scorers over pixels: implement :meth:`read` and set ``info`` and ``identity``.

    The base checks the call, keeps pictures that are not finite out of the way (unscored, with a
    note), returns an empty score for an empty batch, moves the networks to the pixels (or the
    pixels to the networks, where a device was asked for) and puts the scores on the device of the
    media.

    Args:
        device: where the networks live; ``None`` follows the media.
    """

    info: RewardInfo

    def __init__(self, device: str | torch.device | None = None) -> None:
        self._device = None if device is None else torch.device(device)

    @property
    def identity(self) -> str:
        """Name, weights and settings: equal identities give equal scores."""
        raise NotImplementedError

    def networks(self) -> Sequence[nn.Module]:
        """The networks that have to be on the device of the pixels."""
        return ()

    def read(self, pixels: Tensor, prompts: Sequence[str], context: Context) -> Reading:
        """Score finite pixels ``(B, 3, H, W)`` (or ``(B, T, 3, H, W)``), fp32, ``B >= 1``."""
        raise NotImplementedError

    def score(self, media: Media, prompts: Sequence[str], context: Context | None = None) -> Score:
        """Score a batch; gradients flow where ``info.differentiable`` says so.

        Raises:
            ValueError: a call that could never work (see :func:`checked_call`).
        """
        checked_call(self.info, media, prompts, context)
        device = media.data.device
        if not len(media):
            return Score.of(torch.zeros(0, device=device), self.identity)
        pixels, finite = shared("clean", media.data, lambda: clean_pixels(media))
        if not self.info.differentiable:
            pixels = pixels.detach()
        target = self.placed(device)
        pixels = shared(("pixels", target), pixels, lambda: pixels.to(target))
        # A training loop's autocast must not change scores.
        with torch.autocast(target.type, enabled=False):
            reading = self.read(pixels, prompts, context or [{}] * len(media))
        return self._record(reading, finite, device)

    def placed(self, device: torch.device) -> torch.device:
        """Where the networks are now: where they were asked to be, else on ``device``."""
        target = self._device or device
        for network in self.networks():
            if next(network.parameters()).device != target:
                network.to(target)
        return target

    def _record(self, reading: Reading, finite: Tensor, device: torch.device) -> Score:
        value = reading.value.float().to(device)
        scored = torch.isfinite(value.detach())
        said = list(reading.notes) or [""] * len(value)
        rows = zip(said, finite.tolist(), scored.tolist(), strict=True)
        parts = reading.parts.items()
        nothing = f"{self.info.name} gave no finite number"
        notes = [NOT_FINITE if not f else n or ("" if s else nothing) for n, f, s in rows]
        return Score(
            torch.where(finite, value, torch.nan),
            finite & scored,
            {n: torch.where(finite, p.float().to(device), torch.nan) for n, p in parts},
            tuple(notes) if any(notes) else (),
            self.identity,
        )
