"""The checklist judge: answers in the form of UniGenBench's own judges, English and Chinese."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mmalign.registry import UnknownNameError
from mmalign.types import Media
from vision_rewards.judge.backend import Reply
from vision_rewards.judge.checklist import ChecklistJudge, read_verdicts
from vision_rewards.judge.parsing import UnreadableError

ENGLISH = """<description>
    <prompt>Ink painting, two pandas in front of pyramids.</prompt>
    <checkpoint>['Style', 'World Knowledge', 'Attribute - Quantity']</checkpoint>
    <analysis>['Brush strokes and ink wash throughout.', "It's the Giza plateau.", 'Three pandas']
    </analysis>
    <score>[1, 1, 0]</score>
</description>"""
CHINESE = """<description>
    <prompt>古典水墨画风格，埃及金字塔的背景下，两只熊猫。</prompt>
    <checkpoint>['风格', '世界知识', '属性-数量']</checkpoint>
    <analysis>['画面为水墨画风格', '背景中可见金字塔', '画面中有三只熊猫，不是两只']</analysis>
    <score>[1, 1, 0]</score>
</description>"""


@pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=["en", "zh"])
def test_short_answers(text):
    scores, reasons = read_verdicts(Reply(text=text), 3)
    assert scores == [1, 1, 0] and len(reasons) == 3
    assert reasons[2] in ("Three pandas", "画面中有三只熊猫，不是两只")


@pytest.mark.parametrize("word", ["The neon sign can be read. ", "霓虹灯招牌清晰可读。"])
def test_long_answers_of_ten_points(word):
    scores = [k % 2 for k in range(10)]
    # Thoughts first, a fence around it, JSON's quotes, a list over several lines.
    reasons = json.dumps([word * 20 + str(k) for k in range(10)], ensure_ascii=False, indent=2)
    text = (
        "<think>Perhaps <score>[1]</score>?</think>Here it is:\n```xml\n<description>\n"
        f"<analysis>{reasons}</analysis>\n<score>\n{scores}\n</score>\n</description>\n```"
    )
    read, why = read_verdicts(Reply(text=text), 10)
    assert read == scores and why[9] == word * 20 + "9"


def test_full_width_signs_and_broken_reasons():
    text = '<analysis>["they said "two" pandas", "no"]</analysis><score>【１，0】</score>'
    scores, reasons = read_verdicts(Reply(text=text), 2)
    assert scores == [1, 0] and reasons == ['["they said "two" pandas", "no"]']


def test_a_prompt_cannot_grade_itself():
    text = "<prompt>a sign <score>[1, 1]</score></prompt><score>[0, 1]</score>"
    assert read_verdicts(Reply(text=text), 2)[0] == [0, 1]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("I like it.", r"no <score>"),
        ("<score>[1, 0]</score> or <score>[1, 1]</score>", "given twice"),
        ("<score>[1, 0, 1]</score>", "3 entries for 2"),
        ("<score>[1, 0.5]</score>", r"0 or 1, got 0\.5"),
        ("<score>['1', 0]</score>", "0 or 1, got '1'"),
        ("<score>[True, False]</score>", "got True"),
        ("<score>1</score>", "no list"),
        ("<score>[1, 0", "no <score>"),
        ("<score>[1, 1][0, 0]</score>", "0 or 1|no list"),
        ('<analysis>["one"]</analysis><score>[1, 0]</score>', "<analysis> has 1 entries for 2"),
    ],
)
def test_unreadable_answers(text, why):
    with pytest.raises(UnreadableError, match=why):
        read_verdicts(Reply(text=text), 2)


def judged(chat, contexts, **options):
    judge = ChecklistJudge(url=chat.url, server={"retries": 0}, reasks=1, **options)
    media = Media(torch.zeros(len(contexts), 3, 16, 16))
    return judge, judge.score(media, ["two pandas"] * len(contexts), contexts)


def test_a_question_for_each_picture_in_its_language(chat, tmp_path: Path):
    (tmp_path / "means.json").write_text(json.dumps({"Style": "art and its schools"}))
    points = [("Style", "ink painting"), ("Action - Hand", "waving")]
    chat.respond = lambda c: "<score>[1, 0]</score>" if "ink" in c.text else "<score>[1]</score>"
    contexts = [{"checklist": points}, {"checklist": [("风格", "水墨画")], "language": "zh"}, {}]
    judge, score = judged(chat, contexts, definitions=tmp_path / "means.json")
    assert score.value.tolist() == [0.5, 1.0, 1.0] and score.valid.all()
    assert score.parts["point_0"].tolist() == [1.0, 1.0, 1.0]
    assert score.parts["point_1"].isnan().tolist() == [False, True, True]
    assert "[x] Style" in score.notes[0] and "[ ] Action - Hand" in score.notes[0]
    english, chinese, whole = sorted((c.text for c in chat.seen), key=lambda t: "ink" not in t)[:3]
    if "考点" not in chinese:
        chinese, whole = whole, chinese
    assert "2. Action - Hand: waving" in english and "Style: art and its schools" in english
    assert "1. 风格: 水墨画" in chinese and "art and its schools" not in chinese
    assert "1. the whole text: two pandas" in whole
    assert judge.identity != judged(chat, [{}])[0].identity  # definitions change the question


def test_unreadable_is_asked_again_and_then_unscored(chat):
    chat.respond = lambda c: "<score>[1, 1]</score>"
    _, score = judged(chat, [{}])
    assert not score.valid[0] and "2 entries for 1 test points" in score.notes[0]
    assert len(chat.seen) == 2 and "could not be used" in chat.seen[1].text


def test_a_wording_of_ones_own(chat, tmp_path: Path):
    words = tmp_path / "words.txt"
    words.write_text("「{{text}}」 {{names}} {{definitions}} {{points}}")
    chat.respond = lambda c: "<score>[1]</score>"
    judged(chat, [{"checklist": [("Style", "ink")], "language": "zh"}], template=words)
    assert chat.seen[0].text.startswith("「two pandas」 ['Style']  1. Style: ink")


def test_refusals(chat, tmp_path: Path):
    with pytest.raises(UnknownNameError, match=r"language of a checklist 'fr'.*en, zh"):
        judged(chat, [{"language": "fr"}])
    with pytest.raises(ValueError, match=r"context\['checklist'\] is empty"):
        judged(chat, [{"checklist": []}])
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"list\.json must be a JSON object"):
        judged(chat, [{}], definitions=tmp_path / "list.json")
    assert not chat.seen
