"""A video judged by a rubric: its frames, in order, are the pictures of one question."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mmalign.types import Media
from vision_rewards.base import Context, Reading
from vision_rewards.cards import info_of
from vision_rewards.compositions.frames import even_places
from vision_rewards.judge.backend import Query
from vision_rewards.judge.base import reading_of
from vision_rewards.judge.pointwise import RubricJudge
from vision_rewards.judge.rubric import Rubric
from vision_rewards.judge.templates import quoted


class VideoJudge(RubricJudge):
    """Weighted mean of a rubric's criteria, in [0, 1]; ``parts`` are the criteria's own scores.

    Unlike rewards of pictures that are averaged over frames (``{compose: frames, ...}``), the
    judge sees the frames together and can compare them. A picture is a video that stands still.

    Args:
        rubric: ``video`` (the dimensions of VideoScore2, and motion), ``videogen`` (VQ, MQ, TA of
            VideoAlign), a YAML file, or a :class:`~vision_rewards.judge.rubric.Rubric`.
        frames: at most so many, spread evenly; a video of fewer gives all it has.
        judge: see :class:`~vision_rewards.judge.base.JudgeReward`. The model has to take so many
            pictures in one question.

    Raises:
        ValueError: fewer than one frame.
    """

    info = info_of("video_judge")
    template_name = "rubric_video"

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        *,
        rubric: Rubric | str | Path = "video",
        frames: int = 8,
        **judge: Any,
    ) -> None:
        if frames < 1:
            raise ValueError(f"frames must be 1 or more, got {frames}")
        self.frames = frames
        super().__init__(checkpoint, rubric=rubric, **judge)

    def settings(self) -> dict[str, Any]:
        """Those of the rubric judge, and the frames."""
        return {**super().settings(), "frames": self.frames}

    def read(self, pixels: Tensor, prompts: Sequence[str], context: Context) -> Reading:
        """Judge videos ``(B, T, 3, H, W)``, or pictures ``(B, 3, H, W)``."""
        if pixels.ndim == 4:
            pixels = pixels[:, None].expand(-1, self.frames, -1, -1, -1)
        places = even_places(pixels.shape[1], self.frames)
        shown: list[Any] = [
            [self.fitted(frame) for frame in Media(video[places]).to_pil()] for video in pixels
        ]
        return reading_of(self.judge(shown, prompts, context))

    def _question(self, rubric: Rubric, prompt: str, picture: Any) -> Query:
        words = {
            "prompt": quoted(prompt),
            "rubric": rubric.text(),
            "form": rubric.form(),
            "frames": str(len(picture)),
        }
        return self.query(self.template.fill(**words), picture)
