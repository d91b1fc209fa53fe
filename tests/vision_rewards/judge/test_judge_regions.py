"""The judge of regions: boxes as JSON, read strictly, through a real server."""

from __future__ import annotations

import json
import math

import pytest
import torch

from mmalign.protocols import RegionReward
from mmalign.types import Media
from vision_rewards.judge.regions import RegionJudge

SERVER = {"backoff": 0.01, "retries": 1, "timeout": 5.0}
BOX = [0.0, 0.25, 0.5, 1.0]


def answer(**changes) -> str:
    """A readable answer with one region, or with changes to the region or to the whole."""
    region = {"label": "sky", "box": BOX, "reason": "red", "score": -0.5}
    whole = {"reason": "well", "score": 0.25}
    for name, value in changes.items():
        (whole if name.startswith("whole_") else region)[name.removeprefix("whole_")] = value
    return json.dumps({"regions": [region], **whole})


def judge(chat, **options) -> RegionJudge:
    """A judge that asks the test's server."""
    return RegionJudge(url=chat.url, model="tiny", server=SERVER, **options)


def pictures(count: int = 1) -> Media:
    return Media(torch.rand(count, 3, 16, 16))


def test_regions_and_the_whole_are_read(chat):
    chat.respond = lambda c: answer()
    reward = judge(chat)
    found = reward.regions(pictures(2), ["a red sky", "a blue sky"])
    assert isinstance(reward, RegionReward) and len(chat.seen) == 2
    assert [r.box for r in found.boxes[0]] == [tuple(BOX)]
    assert found.boxes[1][0].score == -0.5 and found.boxes[1][0].note == "sky: red"
    assert found.overall.tolist() == [0.25, 0.25] and found.valid.all()
    assert any("<prompt>a red sky</prompt>" in c.text for c in chat.seen)
    score = reward.score(pictures(), ["a red sky"])
    assert score.value.item() == 0.25 and score.notes == ("well",)
    assert score.parts["regions"].item() == 1 and score.parts["lowest"].item() == -0.5


def test_no_regions_are_an_answer(chat):
    chat.respond = lambda c: json.dumps({"regions": [], "reason": "empty", "score": -1})
    found = judge(chat).regions(pictures(), ["a red sky"])
    assert found.boxes == ((),) and found.overall.item() == -1.0 and found.valid.all()
    assert math.isnan(judge(chat).score(pictures(), ["x"]).parts["lowest"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (answer(score=1.5), "score of region 1 must lie in [-1, 1]"),
        (answer(whole_score="0.5"), "score must be a number"),
        (answer(box=[0.5, 0.0, 0.5, 1.0]), "left < right"),
        (answer(box=[0, 0, 64, 64]), "must lie in [0, 1], got 64"),
        (answer(box=[0, 0, 1]), "must be four numbers"),
        (answer(extra=1), "was not asked for"),
        (json.dumps({"regions": {}, "reason": "x", "score": 0}), "must be a list"),
        (json.dumps({"regions": [], "score": 0}), "lacks reason"),
        ("Lovely!", "no JSON object"),
    ],
)
def test_unreadable_answers_leave_the_picture_unscored(chat, text, words):
    chat.respond = lambda c: text
    found = judge(chat, reasks=0).regions(pictures(), ["a red sky"])
    assert not found.valid.any() and found.boxes == ((),)
    assert words in found.notes[0], found.notes


def test_pictures_that_are_not_finite_are_unscored(chat):
    chat.respond = lambda c: answer()
    media = pictures(2)
    media.data[0, 0, 0, 0] = torch.nan
    found = judge(chat).regions(media, ["a red sky", "a blue sky"])
    assert found.valid.tolist() == [False, True] and "NaN" in found.notes[0]
    assert found.boxes[0] == () and len(found.boxes[1]) == 1
