"""Videos judged by their frames: one after the other, and together."""

from __future__ import annotations

import json

import pytest
import torch

from mmalign.reward_info import RewardInfo
from mmalign.types import Media, Score
from vision_rewards.compositions.frames import Frames, even_places
from vision_rewards.factory import load_reward
from vision_rewards.judge.video import VideoJudge


class Level:
    """Brightness of pictures, minus the opponent's where there is one; black is unscored."""

    def __init__(self, scope: str = "pointwise") -> None:
        self.info = RewardInfo(name="level", needs=(), scope=scope, range=(0.0, 1.0))

    identity = "level@1"

    def score(self, media: Media, prompts, context=None) -> Score:
        assert media.kind == "image" and len(prompts) == len(media)
        value = media.data.flatten(1).mean(1)
        other = [float(c["opponent"].mean()) for c in context] if context else [0.0] * len(value)
        value = value - torch.tensor(other)
        notes = tuple(f"{p} {v:.1f}" for p, v in zip(prompts, value.tolist(), strict=True))
        return Score(value, value != 0, {"twice": 2 * value}, notes, self.identity)


def videos(*levels: list[float]) -> Media:
    return Media(torch.tensor(levels)[:, :, None, None, None].expand(-1, -1, 3, 4, 4))


def test_mean_worst_and_parts_over_frames():
    media = videos([0.2, 0.4, 0.9], [0.3, 0.3, 0.3])
    score = Frames({"level": (Level(), 2.0)}).score(media, ["a", "b"])
    assert score.value.tolist() == pytest.approx([1.0, 0.6]) and score.valid.all()
    assert score.parts["level"].tolist() == pytest.approx([0.5, 0.3])
    assert score.parts["twice"].tolist() == pytest.approx([1.0, 0.6])
    assert score.notes[1] == "level: b 0.3"  # said of three frames, once
    worst = Frames({"level": (Level(), 1.0)}, reduce="min").score(media, ["a", "b"])
    assert worst.value.tolist() == pytest.approx([0.2, 0.3])
    assert worst.identity != Frames({"level": (Level(), 1.0)}).identity


def test_frames_are_spread_and_a_picture_is_a_picture():
    assert even_places(11, 3) == [0, 5, 10] and even_places(3, 8) == [0, 1, 2]
    assert even_places(5, 1) == [0]
    reward = Frames({"level": (Level(), 1.0)}, frames=2)
    assert reward.score(videos([0.2, 0.9, 0.4]), ["a"]).value.tolist() == pytest.approx([0.3])
    assert reward.score(Media(torch.full((1, 3, 4, 4), 0.5)), ["a"]).value.tolist() == [0.5]


def test_a_frame_that_cannot_be_scored_leaves_the_video_unscored():
    score = Frames({"level": (Level(), 1.0)}).score(videos([0.2, 0.0], [0.2, 0.4]), ["a", "b"])
    assert score.valid.tolist() == [False, True]
    assert "frame 1: a 0.0" in score.notes[0]


def test_an_opponent_is_met_frame_by_frame():
    opponent = videos([0.1, 0.7]).data[0]  # the last of two meets the last of three
    score = Frames({"level": (Level("pairwise"), 1.0)}).score(
        videos([0.2, 0.4, 0.9]), ["a"], [{"opponent": opponent}]
    )
    assert score.value.tolist() == pytest.approx([(0.1 + 0.3 + 0.2) / 3])


def test_gradients_reach_every_frame():
    pixels = torch.rand(1, 3, 3, 64, 64, requires_grad=True)
    reward = load_reward({"compose": "frames", "parts": ["sharpness"]})
    reward.score(Media(pixels), ["a"]).value.sum().backward()
    assert (pixels.grad.abs().amax((0, 2, 3, 4)) > 0).all()


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match=r"'rank.*put frames inside it"):
        load_reward({"compose": "frames", "parts": [{"compose": "rank", "parts": ["sharpness"]}]})
    with pytest.raises(ValueError, match="frames must be 1 or more, got 0"):
        load_reward({"compose": "frames", "parts": ["sharpness"], "frames": 0})
    with pytest.raises(ValueError, match=r"reduction over frames 'max'.*mean, min"):
        load_reward({"compose": "frames", "parts": ["sharpness"], "reduce": "max"})
    with pytest.raises(ValueError, match=r"got a video; score its frames: \{compose: frames"):
        load_reward("shapes_clip").score(videos([0.1, 0.2]), ["a"])


def test_the_video_judge_sees_all_frames_at_once(chat):
    def answer(c):
        levels = [i.convert("RGB").getpixel((0, 0))[0] for i in c.images]
        moves = len(set(levels)) > 1
        scores = {"VQ": 8, "MQ": 9 if moves else 1, "TA": 5}
        return json.dumps({n: {"reason": f"{levels}", "score": s} for n, s in scores.items()})

    chat.respond = answer
    judge = VideoJudge(url=chat.url, server={"retries": 0}, rubric="videogen", frames=3)
    score = judge.score(videos([0, 0.2, 0.4, 0.6, 0.8], [0.4] * 5), ["a", "b"])
    assert score.parts["MQ"].tolist() == [9, 1] and score.parts["VQ"].tolist() == [8, 8]
    assert score.value.tolist() == pytest.approx([22 / 30, 14 / 30])
    assert "[0, 102, 204]" in score.notes[0]
    assert all("You see 3 of its frames" in c.text for c in chat.seen)
    with pytest.raises(ValueError, match="frames must be 1 or more, got 0"):
        VideoJudge(url=chat.url, frames=0)
