"""Reviews: scores, what is wrong, and how the prompt should be worded next time."""

from __future__ import annotations

import json
import re

import torch

from mmalign.protocols import Critic
from mmalign.types import Media
from vision_rewards.judge.critique import CritiqueJudge
from vision_rewards.judge.pointwise import RubricJudge

PROMPTS = ["a red sky", "a green sky"]
SERVER = {"backoff": 0.01, "retries": 0, "timeout": 5.0}
CRITIQUE = """# Detailed Judgement
1. Text Faithfulness
## Justification: too dark
## Score: 2
2. Physical and Visual Quality
## Justification: fine
## Score: 4
3. Text Rendering
## Justification: none asked for
## Score: N/A
# Summary:
A dark sky.
# Refined Request:
a bright
{colour} sky"""


def pictures():
    """A red and a green picture."""
    data = torch.full((2, 3, 16, 16), 0.1)
    data[0, 0] = data[1, 1] = 0.9
    return Media(data)


def made(kind, chat, **more):
    return kind(url=chat.url, model="tiny", server=SERVER, reasks=0, **more)


def rubric_or_wording(chat):
    if "Word the text anew" in chat.text:
        return f"Here it is: <prompt> a bright\n {chat.asked()} sky </prompt>"
    names = re.findall(r'^- "(\w+)"', chat.text, re.MULTILINE)
    return json.dumps({n: {"reason": "too dark", "score": 2} for n in names})


def test_a_critique_is_asked_for_once(chat):
    chat.respond = lambda c: CRITIQUE.format(colour=c.asked())
    judge = made(CritiqueJudge, chat)
    score, reviews = judge.review(pictures(), PROMPTS)
    assert isinstance(judge, Critic) and len(chat.seen) == 2
    assert score.value.equal(judge.score(pictures(), PROMPTS).value)
    assert [r.refined for r in reviews] == ["a bright red sky", "a bright green sky"]
    assert reviews[0].scores == {
        "text_faithfulness": 2.0, "physical_and_visual_quality": 4.0, "text_rendering": None,
    }  # fmt: skip
    assert reviews[0].critique == "A dark sky."


def test_what_cannot_be_read_has_no_review(chat):
    chat.respond = lambda c: "Lovely!" if c.asked() == "red" else CRITIQUE.format(colour="green")
    score, reviews = made(CritiqueJudge, chat).review(pictures(), PROMPTS)
    assert score.valid.tolist() == [False, True] and "Lovely!" in score.notes[0]
    assert reviews[0] is None and reviews[1].refined == "a bright green sky"


def test_every_other_judge_is_asked_for_a_wording(chat):
    chat.respond = rubric_or_wording
    score, reviews = made(RubricJudge, chat).review(pictures(), PROMPTS)
    assert score.valid.all() and len(chat.seen) == 4
    assert [r.refined for r in reviews] == ["a bright red sky", "a bright green sky"]
    assert reviews[0].scores["alignment"] == 2.0 and "too dark" in reviews[0].critique
    asked = [c for c in chat.seen if "Word the text anew" in c.text]
    assert all("alignment: too dark" in c.text and len(c.images) == 1 for c in asked)


def test_unscored_pictures_are_not_worded_anew(chat):
    chat.respond = rubric_or_wording
    data = pictures().data
    data[0, 0, 0, 0] = torch.nan
    score, reviews = made(RubricJudge, chat).review(Media(data), PROMPTS)
    assert score.valid.tolist() == [False, True]
    assert reviews[0] is None and reviews[1] is not None
    assert sum("Word the text anew" in c.text for c in chat.seen) == 1


def test_a_wording_without_its_tags_is_none(chat):
    def untagged(c):
        return "a bright sky" if "Word the text anew" in c.text else rubric_or_wording(c)

    chat.respond = untagged
    score, reviews = made(RubricJudge, chat).review(pictures(), PROMPTS)
    assert score.valid.all() and reviews == [None, None]
