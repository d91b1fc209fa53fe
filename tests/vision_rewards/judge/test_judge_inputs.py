"""What judges are shown and must not misread: edits, odd files, videos, thoughts cut off."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image

from mmalign.types import Media
from vision_rewards.cards import judges
from vision_rewards.factory import load_reward
from vision_rewards.judge.pairwise import PairwiseJudge
from vision_rewards.judge.unified_reward import UnifiedReward, UnifiedRewardPair
from vision_rewards.judge.yes_no import YesNoJudge

SERVER = {"backoff": 0.01, "retries": 0, "timeout": 5.0}


def plain(level, size=16):
    """A grey picture ``(3, size, size)``."""
    return torch.full((3, size, size), level)


def options(chat, **more):
    """How a judge reaches the test server."""
    return {"url": chat.url, "model": "tiny", "server": SERVER, **more}


def brightness(image):
    return image.convert("RGB").getpixel((0, 0))[0]


class TestUnifiedEdit:
    """Edits of a source picture, which comes first in every question."""

    def test_two_axes(self, chat):
        chat.respond = lambda c: (
            "Instruction Following Score (1-5): 5\nQuality Score (1-5): "
            f"{2 if brightness(c.images[0]) < brightness(c.images[1]) else 4}"
        )
        judge = UnifiedReward(**options(chat, mode="edit", size=16))
        context = [{"source": plain(0.1)}, {"source": plain(0.9)}]
        media = Media(torch.stack([plain(0.5), plain(0.5)]))
        score = judge.score(media, ["make it grey"] * 2, context)
        assert score.value.tolist() == pytest.approx([0.7, 0.9])
        assert score.parts["instruction_following"].tolist() == [5, 5]
        assert score.parts["quality"].tolist() == [2, 4]
        assert all("<prompt>make it grey</prompt>" in c.text for c in chat.seen)
        with pytest.raises(ValueError, match=r"context\['source'\]"):
            judge.score(media, ["make it grey"] * 2)

    @pytest.mark.parametrize("mode", ["edit_rank", "edit_score"])
    def test_pairs_in_both_orders(self, chat, mode):
        def nearer(c):
            source, *two = map(brightness, c.images)
            first = abs(two[0] - source) <= abs(two[1] - source)
            if mode == "edit_rank":
                return f"Image {1 if first else 2} is better"
            share = 0.75 if first else 0.25
            block = f"Image 1: {share}\nImage 2: {1 - share}\n"
            return f"Instruction Following:\n{block}Quality:\n{block}"

        chat.respond = nearer
        judge = UnifiedRewardPair(**options(chat, mode=mode, size=16))
        facts = [
            {"source": plain(0.1), "opponent": plain(0.9)},
            {"source": plain(0.9), "opponent": plain(0.7)},
        ]
        media = Media(torch.stack([plain(0.2), plain(0.2)]))
        score = judge.score(media, ["keep it"] * 2, facts)
        expected = [1.0, 0.0] if mode == "edit_rank" else [0.75, 0.25]
        assert score.value.tolist() == pytest.approx(expected)
        assert [len(c.images) for c in chat.seen] == [3] * 4
        assert UnifiedRewardPair(**options(chat)).info.needs == ("prompt", "opponent")

    def test_half_an_answer_is_unscored(self, chat):
        chat.respond = lambda _: "Instruction Following Score (1-5): 5"
        judge = UnifiedReward(**options(chat, mode="edit", reasks=0))
        score = judge.score(Media(plain(0.5)[None]), ["x"], [{"source": plain(0.1)}])
        assert not score.valid.any() and "quality" in score.notes[0]


@pytest.mark.parametrize(
    "name", [info.name for _, info in judges.CARDS if "video" not in info.media]
)
def test_videos_are_refused_before_anything_is_asked(chat, name):
    judge = load_reward({"reward": name, **options(chat)})
    facts = dict.fromkeys(("opponent", "source", "reference"), plain(0.5))
    with pytest.raises(ValueError, match=f"{name} takes image, got a video; score its frames"):
        judge.score(Media(torch.rand(1, 2, 3, 16, 16)), ["x"], [facts])
    assert not chat.seen


def test_files_of_opponents_are_read_as_pictures_are_everywhere(chat, tmp_path):
    """16 bits scaled, transparency over white; a plain conversion gives white, and black."""
    chat.respond = lambda _: '{"reason": "", "winner": "tie"}'
    grey, clear = tmp_path / "grey.png", tmp_path / "clear.png"
    Image.new("I;16", (16, 16), 16448).save(grey)
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(clear)
    media = Media(torch.stack([plain(0.5)] * 3))
    context = [{"opponent": o} for o in (grey, str(clear), Image.open(clear))]
    PairwiseJudge(**options(chat)).score(media, ["x"] * 3, context)
    shown = {brightness(i) for c in chat.seen for i in c.images}
    assert shown == {128, 64, 255}


@pytest.mark.parametrize(
    "said", ["I must check the answer: is it", "Answer: maybe", "no verdict", "Answer:"]
)
def test_thoughts_without_a_verdict_are_unscored(chat, said):
    """Probabilities of yes and no in the middle of thoughts mean nothing."""
    words = [chat.token(w) for w in said.split(" ")]
    likely = {"yes": math.log(0.01), "no": math.log(0.03)}
    words = [{**w, "top_logprobs": chat.token("x", likely)["top_logprobs"]} for w in words]
    chat.respond = lambda _: chat.said(said, logprobs={"content": words})
    judge = YesNoJudge(**options(chat, reasoning=True, reasks=0))
    score = judge.score(Media(plain(0.5)[None]), ["x"])
    assert not score.valid.any() and "does not end with" in score.notes[0]
