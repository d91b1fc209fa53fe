"""Videos by their frames: rewards and judges of pictures, asked about each frame.

For a video of frames ``f_1 ... f_T`` and a reward ``r`` of pictures::

    mean    (1 / T) sum_t r(f_t, prompt)
    min     min_t r(f_t, prompt)

No frame is compared with another one, so motion is not judged: a still picture is as good.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from mmalign.registry import unknown
from mmalign.reward_info import Range, Scope
from mmalign.types import Media, Score
from vision_rewards.compositions.base import Combined, Components, Composition, Parts, sum_range

REDUCTIONS = ("mean", "min")


class Frames(Composition):
    """The weighted sum of rewards of pictures, each reduced over the frames of a video.

    Pictures are scored as they are. A video is unscored where one of its frames is. Of a single
    part its own parts are kept, reduced in the same way. An ``opponent`` in the context is a video
    as well: frames meet at the same share of the way.

    Args:
        reduce: ``mean`` or ``min`` over the frames.
        frames: at most so many, spread evenly, first and last included; ``None`` takes all.

    Raises:
        ValueError: fewer than one frame, or a part that compares the samples of a group.
    """

    kind = "frames"

    def __init__(
        self,
        components: Components,
        *,
        reduce: Literal["mean", "min"] = "mean",
        frames: int | None = None,
    ) -> None:
        if reduce not in REDUCTIONS:
            raise unknown("reduction over frames", reduce, REDUCTIONS)
        if frames is not None and frames < 1:
            raise ValueError(f"frames must be 1 or more, got {frames}")
        self.reduce, self.frames = reduce, frames
        super().__init__(components)
        self.info = replace(self.info, media=("image", "video"))

    def options(self) -> Mapping[str, Any]:
        """The reduction and the number of frames."""
        return {"reduce": self.reduce, "frames": self.frames}

    def scope(self, scopes: Mapping[str, Scope]) -> Scope:
        """That of the parts; samples of a group would be mixed up with frames."""
        for name, scope in scopes.items():
            if scope == "group":
                raise ValueError(
                    f"frames: {name!r} compares the samples of a prompt, which frames would be "
                    "taken for; put frames inside it: {compose: ..., parts: [{compose: frames}]}"
                )
        return super().scope(scopes)

    def range(self) -> Range:
        """The sum of the components' ranges."""
        return sum_range([(reward.info.range, w) for reward, w in self.components.values()])

    def combine(self, parts: Parts) -> Combined:
        """The weighted sum."""
        return Combined(parts.weighted())

    def score_part(self, name: str, media: Media, prompts: Sequence[str], context: Any) -> Score:
        """A component's scores, of videos reduced over their frames."""
        if media.kind == "image":
            return super().score_part(name, media, prompts, context)
        places = even_places(media.data.shape[1], self.frames)
        frames = Media(media.data[:, places].flatten(0, 1))
        asked = [prompt for prompt in prompts for _ in places]
        shares = [k / max(1, len(places) - 1) for k in range(len(places))]
        facts = context and [_at(row, share) for row in context for share in shares]
        score = super().score_part(name, frames, asked, facts)
        return self._reduced(score, len(places))

    def _reduced(self, score: Score, each: int) -> Score:
        notes = score.notes or ("",) * len(score)
        whole = score.valid.view(-1, each)
        told = [notes[a : a + each] for a in range(0, len(notes), each)]
        rows = [list(zip(n, ok, strict=True)) for n, ok in zip(told, whole.tolist(), strict=True)]
        return Score(
            self._over(score.value, each),
            whole.all(1),
            {n: self._over(p, each) for n, p in score.parts.items()},
            tuple(_note(row) for row in rows),
            score.identity,
        )

    def _over(self, values: Tensor, each: int) -> Tensor:
        rows = values.view(-1, each)
        return rows.mean(1) if self.reduce == "mean" else rows.amin(1)

    def _record(self, scores: Mapping[str, Score], combined: Combined, valid: Tensor) -> Score:
        record = super()._record(scores, combined, valid)
        if len(scores) > 1:  # names of several could collide
            return record
        (only,) = scores.values()
        own = {n: p.detach().float().to(valid.device) for n, p in only.parts.items()}
        return replace(record, parts={**own, **record.parts})


def even_places(count: int, most: int | None) -> list[int]:
    """At most ``most`` of ``count`` places, spread evenly, first and last included.

    Raises:
        ValueError: there is none.
    """
    if count < 1:
        raise ValueError("the video holds no frame")
    if most is None or most >= count:
        return list(range(count))
    return torch.linspace(0, count - 1, most).round().int().tolist()  # type: ignore[no-any-return]


def _at(facts: Mapping[str, Any], share: float) -> Mapping[str, Any]:
    """The facts of one frame: of an opponent in frames ``(T, 3, H, W)`` the one at that share."""
    other = facts.get("opponent")
    if not isinstance(other, Tensor) or other.ndim != 4:
        return facts
    return {**facts, "opponent": other[round(share * (len(other) - 1))]}


def _note(frames: Sequence[tuple[str, bool]]) -> str:
    """Why a video is unscored, else what was said of its frames, each thing once."""
    lost = [f"frame {k}: {note}" for k, (note, ok) in enumerate(frames) if not ok]
    return lost[0] if lost else "; ".join(dict.fromkeys(note for note, _ in frames if note))
