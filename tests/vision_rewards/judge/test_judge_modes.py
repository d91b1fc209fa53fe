"""Every mode of judging, against a real server whose answers depend on the pictures it is sent."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch

from mmalign.protocols import RewardModel
from mmalign.registry import REWARDS
from mmalign.types import Media
from vision_rewards.cards import judges
from vision_rewards.judge.auto_rubric import AutoRubric
from vision_rewards.judge.critique import CritiqueJudge
from vision_rewards.judge.edit_score import EditScore
from vision_rewards.judge.pairwise import PairwiseJudge
from vision_rewards.judge.pointwise import RubricJudge
from vision_rewards.judge.unified_reward import UnifiedReward, UnifiedRewardPair
from vision_rewards.judge.yes_no import VqaScore, YesNoJudge

PROMPTS = ["a red sky", "a green sky", "a blue sky"]
SERVER = {"backoff": 0.01, "retries": 1, "timeout": 5.0}


def solid(color, size=16, level=0.9):
    """A picture ``(3, size, size)`` of one colour."""
    picture = torch.full((3, size, size), 0.1)
    picture[("red", "green", "blue").index(color)] = level
    return picture


def media(*colors):
    """Pictures of these colours."""
    return Media(torch.stack([solid(c) for c in colors]))


def options(chat, **more):
    """How a judge reaches the test server."""
    return {"url": chat.url, "model": "tiny", "server": SERVER, **more}


def rubric_answer(chat, good=5, bad=1):
    score = good if chat.fits() else bad
    names = re.findall(r'^- "(\w+)"', chat.text, re.MULTILINE)
    return json.dumps({n: {"reason": f"{n} seen", "score": score} for n in names})


class TestEveryJudge:
    """What the class above them all promises."""

    @pytest.mark.parametrize("target", [t for t, _ in judges.CARDS], ids=lambda t: t.split(":")[1])
    def test_it_is_a_reward_with_a_card(self, chat, target):
        info = dict(judges.CARDS)[target]
        judge = REWARDS.load(info.name)(**options(chat))
        assert isinstance(judge, RewardModel) and judge.identity
        # A server promises nothing about equal answers; all else is as declared.
        assert judge.info.name == info.name and not judge.info.deterministic
        assert info.source and info.licence and info.checkpoint and info.parameters

    def test_unreadable_answers_are_asked_again_with_the_reason(self, chat):
        def second_time(c):
            return rubric_answer(c) if "could not be used" in c.text else '{"alignment": 11}'

        chat.respond = second_time
        score = RubricJudge(**options(chat)).score(media("red"), PROMPTS[:1])
        assert score.valid.all() and score.value.item() == 1.0
        assert len(chat.seen) == 2 and "lacks quality" in chat.seen[1].text

    def test_asking_again_is_bounded_and_the_raw_text_is_kept(self, chat):
        chat.respond = lambda c: "Lovely!" if c.asked() == "red" else rubric_answer(c)
        judge = RubricJudge(**options(chat, reasks=1))
        score = judge.score(media("red", "green"), PROMPTS[:2])
        assert score.valid.tolist() == [False, True] and math.isnan(score.value[0])
        assert "after 2 answers" in score.notes[0] and "Lovely!" in score.notes[0]
        assert len(chat.seen) == 3

    @pytest.mark.parametrize("kind", ["flag", "words", "failure"])
    def test_refusals_and_failures_are_unscored_not_zero(self, chat, kind):
        chat.respond = lambda _: {
            "flag": chat.said("no", finish_reason="content_filter"),
            "words": "I'm sorry, I can't help with that.",
            "failure": (500, "broken", {}),
        }[kind]
        score = RubricJudge(**options(chat)).score(media("red"), PROMPTS[:1])
        assert not score.valid.any() and math.isnan(score.value.item())
        assert ("did not answer" if kind == "failure" else "refused") in score.notes[0]
        assert len(chat.seen) == (2 if kind == "failure" else 1)  # the client's own retry

    def test_settings_are_part_of_the_identity(self, chat, tmp_path):
        (tmp_path / "mine.txt").write_text("{{prompt}} {{rubric}} {{form}}")
        variants = [
            {}, {"rubric": "text"}, {"temperature": 0.5}, {"max_tokens": 99}, {"size": 64},
            {"model": "other"}, {"template": tmp_path / "mine.txt"},
        ]  # fmt: skip
        names = [RubricJudge(**options(chat, **v)).identity for v in variants]
        assert len(set(names)) == len(names)
        assert RubricJudge(**options(chat, seed=4)).identity == names[0]  # nothing is drawn

    def test_a_cache_answers_the_second_time(self, chat, tmp_path):
        chat.respond = rubric_answer
        for _ in range(2):
            judge = RubricJudge(**options(chat, cache=tmp_path))
            assert judge.score(media("red", "blue"), PROMPTS[:2]).value.tolist() == [1.0, 0.0]
        assert len(chat.seen) == 2

    def test_odd_pictures(self, chat):
        chat.respond = rubric_answer
        judge = RubricJudge(**options(chat, size=24))
        data = media("red", "red").data
        data[1, 0, 0, 0] = torch.nan
        score = judge.score(Media(data), ["a red sky"] * 2)
        assert score.valid.tolist() == [True, False] and "NaN" in score.notes[1]
        assert {i.size for c in chat.seen for i in c.images} == {(24, 24)}
        assert len(judge.score(Media(data[:0]), [])) == 0

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"model": "x"}, "url"),
            ({"reasks": -1}, "reasks"),
            ({"url": "x", "model": "y"}, "http"),
        ],
    )
    def test_impossible_options(self, given, message):
        with pytest.raises(ValueError, match=message):
            RubricJudge(**given)


def test_rubric(chat):
    chat.respond = lambda c: rubric_answer(c, good=4, bad=2)
    score = RubricJudge(**options(chat)).score(media("red", "red", "blue"), PROMPTS)
    assert score.value.tolist() == pytest.approx([0.75, 0.25, 0.75])
    assert score.parts["alignment"].tolist() == [4.0, 2.0, 4.0]
    assert score.notes[0] == "alignment: alignment seen; quality: quality seen; " + (
        "composition: composition seen"
    )
    assert all("<prompt>a " in c.text for c in chat.seen)


class TestPairwise:
    """Comparisons, both orders."""

    def answer(self, chat):
        a, b = chat.fits(0), chat.fits(1)
        return json.dumps({"reason": "looked", "winner": "tie" if a == b else "A" if a else "B"})

    def test_verdicts(self, chat):
        chat.respond = self.answer
        context = [{"opponent": solid(c)} for c in ("blue", "green", "blue")]
        judge = PairwiseJudge(**options(chat))
        score = judge.score(media("red", "red", "blue"), PROMPTS, context)
        assert score.value.tolist() == [1.0, 0.0, 0.5]
        assert len(chat.seen) == 6 and "as A: looked; as B: looked" in score.notes[0]

    def test_a_judge_of_positions_says_tie(self, chat):
        chat.respond = lambda _: '{"reason": "first is best", "winner": "A"}'
        judge = PairwiseJudge(**options(chat))
        score = judge.score(media("red"), PROMPTS[:1], [{"opponent": solid("blue")}])
        assert score.value.item() == 0.5
        assert (score.parts["first"].item(), score.parts["second"].item()) == (1.0, 0.0)

    def test_half_a_comparison_is_none(self, chat):
        chat.respond = lambda c: self.answer(c) if c.fits(0) else "who knows"
        judge = PairwiseJudge(**options(chat, reasks=0))
        score = judge.score(media("red"), PROMPTS[:1], [{"opponent": solid("blue")}])
        assert not score.valid.any() and "candidate second" in score.notes[0]

    def test_probabilities(self, chat):
        def soft(c):
            p = 0.8 if c.fits(0) else 0.4
            top = {"A": math.log(p), "B": math.log(1 - p)}
            return chat.said("A", logprobs={"content": [chat.token("A", top)]})

        chat.respond = soft
        judge = PairwiseJudge(**options(chat, soft=True))
        score = judge.score(media("red"), PROMPTS[:1], [{"opponent": solid("blue")}])
        assert score.value.item() == pytest.approx((0.8 + 0.6) / 2)

    def test_an_opponent_is_needed_and_must_be_a_picture(self, chat):
        judge = PairwiseJudge(**options(chat))
        with pytest.raises(ValueError, match="opponent"):
            judge.score(media("red"), PROMPTS[:1])
        with pytest.raises(ValueError, match=r"context\['opponent'\] must be"):
            judge.score(media("red"), PROMPTS[:1], [{"opponent": 3}])


class TestYesNo:
    """Probabilities of yes."""

    def answer(self, chat, yes=0.6, no=0.2):
        if not chat.fits(0):
            yes, no = no, yes
        top = {"Yes": math.log(yes / 2), " yes": math.log(yes / 2), "No": math.log(no)}
        return top

    def test_share_and_mass(self, chat):
        chat.respond = lambda c: chat.said(
            "Yes", logprobs={"content": [chat.token("Yes", self.answer(c))]}
        )
        score = YesNoJudge(**options(chat)).score(media("red", "blue"), PROMPTS[:2])
        assert score.value.tolist() == pytest.approx([0.75, 0.25])
        assert score.parts["mass"].tolist() == pytest.approx([0.8, 0.8])
        vqa = VqaScore(**options(chat)).score(media("red", "blue"), PROMPTS[:2])
        assert vqa.value.tolist() == pytest.approx([0.6, 0.2])
        assert vqa.parts["ratio"].tolist() == pytest.approx([0.75, 0.25])
        assert chat.seen[-1].text in {
            f'Does this figure show "{p}"? Please answer yes or no.' for p in PROMPTS
        }

    def test_reasoning_and_reference(self, chat):
        def think(c):
            words = [chat.token(t) for t in ("yes", " I", " think", ".", " Answer", ":")]
            words.append(chat.token(" yes", self.answer(c)))
            return chat.said("yes I think. Answer: yes", logprobs={"content": words})

        chat.respond = think
        judge = YesNoJudge(**options(chat, reasoning=True, instructions="Mind the colour."))
        context = [{"reference": solid("blue")}, {}]
        score = judge.score(media("red", "green"), PROMPTS[:2], context)
        assert score.value.tolist() == pytest.approx([0.75, 0.75])
        assert len(chat.seen) == 3 and all("Mind the colour." in c.text for c in chat.seen)
        assert score.notes[0].startswith("yes I think")

    def test_neither_word_is_unscored(self, chat):
        chat.respond = lambda _: chat.said("Hm", logprobs={"content": [chat.token("Hm")]})
        score = YesNoJudge(**options(chat)).score(media("red"), PROMPTS[:1])
        assert not score.valid.any() and "neither yes nor no" in score.notes[0]


CRITIQUE = """# Detailed Judgement
1. Text Faithfulness
## Justification: looked
## Score: {0}
2. Image Faithfulness
## Justification: kept
## Score: 4
3. Physical and Visual Quality
## Justification: plausible
## Score: 3
# Summary: fine.
# Refined Request: {1}, sharper
"""


def test_critique(chat):
    chat.respond = lambda c: CRITIQUE.format(4 if c.fits(len(c.images) - 1) else 1, "a sky")
    judge = CritiqueJudge(**options(chat))
    score = judge.score(media("red", "red"), PROMPTS[:2])
    assert score.value.tolist() == pytest.approx([(3.5 - 1) / 3, (2 - 1) / 3])
    assert "Refined request: a sky, sharper" in score.notes[0]
    assert "image_faithfulness" not in score.parts
    # The same with a source: an edit, one aspect more, two pictures.
    context = [{"source": solid("blue")}, {}]
    edit, plain = judge.critiques(media("red", "red"), PROMPTS[:2], context)
    assert edit.value == pytest.approx((11 / 3 - 1) / 3) and len(edit.scores) == 4
    assert plain.refined_request == "a sky, sharper" and len(plain.scores) == 3
    assert sorted(len(c.images) for c in chat.seen) == [1, 1, 1, 2]


class TestAutoRubric:
    """Generated rubrics."""

    def answer(self, chat):
        if not chat.images:
            criteria = ["The sky fills it.", f"It is {chat.asked()}.", "the sky fills IT", "Sharp."]
            return json.dumps({"criteria": criteria})
        count = len(re.findall(r"^\d\. ", chat.text, re.MULTILINE))
        verdicts = [
            {"criterion": k, "reason": "seen", "met": k != 2 or chat.fits()}
            for k in range(1, count + 1)
        ]
        return json.dumps({"verdicts": verdicts})

    def test_written_once_for_each_prompt(self, chat, tmp_path):
        chat.respond = self.answer
        judge = AutoRubric(**options(chat, rubrics=tmp_path))
        prompts = ["a red sky", "a red sky", "a blue sky"]
        score = judge.score(media("red", "green", "blue"), prompts)
        assert score.value.tolist() == pytest.approx([1, 2 / 3, 1])
        assert score.parts["criteria"].tolist() == [3, 3, 3]  # the doubled one is gone
        assert "[ ] It is red. (seen)" in score.notes[1]
        assert sum(not c.images for c in chat.seen) == 2
        again = AutoRubric(**options(chat, rubrics=tmp_path))
        assert again.rubric("a red sky") == ("The sky fills it.", "It is red.", "Sharp.")
        assert sum(not c.images for c in chat.seen) == 2

    def test_comparison(self, chat):
        chat.respond = self.answer
        judge = AutoRubric(**options(chat, compare=True))
        context = [{"opponent": solid(c)} for c in ("blue", "green", "blue")]
        score = judge.score(media("red", "red", "blue"), PROMPTS, context)
        assert score.value.tolist() == [1.0, 0.0, 0.5] and judge.info.scope == "pairwise"

    def test_no_rubric_no_score(self, chat):
        chat.respond = lambda _: '{"criteria": ["Only one."]}'
        judge = AutoRubric(**options(chat, reasks=1))
        score = judge.score(media("red"), PROMPTS[:1])
        assert not score.valid.any() and "3 to 8 criteria" in score.notes[0]
        with pytest.raises(ValueError, match="no rubric for"):
            judge.rubric("a red sky")

    @pytest.mark.parametrize(
        "verdicts",
        [
            [{"criterion": k, "reason": "", "met": "yes"} for k in (1, 2, 3)],
            [{"criterion": k, "reason": "", "met": True} for k in (1, 2, 2)],
            [{"criterion": k, "reason": "", "met": True} for k in (1, 2)],
        ],
    )
    def test_verdicts_are_read_strictly(self, chat, verdicts):
        chat.respond = lambda c: json.dumps({"verdicts": verdicts}) if c.images else self.answer(c)
        score = AutoRubric(**options(chat, reasks=0)).score(media("red"), PROMPTS[:1])
        assert not score.valid.any()


class TestEditScore:
    """The self-ensemble."""

    def answer(self, chat):
        # Passes differ by their seed: success is 20 or 10, everything else is fixed.
        pair = [20 - 10 * (chat.body["seed"] % 2), 25] if len(chat.images) == 2 else [25, 16]
        return json.dumps({"reasoning": f"{len(chat.images)} seen", "score": pair})

    @pytest.mark.parametrize(
        ("reduction", "expected"),
        [
            ("average_last", (math.sqrt(8 * 6.4) + math.sqrt(4 * 6.4)) / 2),
            ("average_first", math.sqrt(6 * 6.4)),
        ],
    )
    def test_reductions(self, chat, reduction, expected):
        chat.respond = self.answer
        judge = EditScore(**options(chat, passes=4, reduction=reduction))
        score = judge.score(media("red"), ["make it red"], [{"source": solid("blue")}])
        assert score.value.item() == pytest.approx(expected)
        assert {k: v.item() for k, v in score.parts.items()} == pytest.approx(
            {"prompt_following": 6, "consistency": 6, "quality": 6.4, "passes": 4}
        )
        assert len(chat.seen) == 8 and {c.body["seed"] for c in chat.seen} == {0, 1, 2, 3}

    def test_passes_that_cannot_be_read_are_left_out(self, chat):
        chat.respond = lambda c: "?" if c.body["seed"] % 1000 == 1 else self.answer(c)
        judge = EditScore(**options(chat, passes=2, reasks=1))
        score = judge.score(media("red"), ["make it red"], [{"source": solid("blue")}])
        assert score.valid.all() and score.parts["passes"].item() == 1
        assert score.value.item() == pytest.approx(math.sqrt(8 * 6.4))
        chat.respond = lambda _: '{"reasoning": "", "score": [30, 1]}'
        score = judge.score(media("red"), ["make it red"], [{"source": solid("blue")}])
        assert not score.valid.any() and "[0, 25]" in score.notes[0]


class TestUnifiedReward:
    """The published forms, end to end."""

    def test_pointwise(self, chat):
        chat.respond = lambda c: f"sky: 1\nFinal Score: {4 if c.fits() else 1}"
        score = UnifiedReward(**options(chat)).score(media("red", "red"), PROMPTS[:2])
        assert score.value.tolist() == pytest.approx([0.8, 0.2])
        assert {i.size for c in chat.seen for i in c.images} == {(512, 512)}
        rows = "Alignment Score (1-5): 5\nCoherence Score (1-5): 4\nStyle Score (1-5): 3"
        chat.respond = lambda _: rows
        score = UnifiedReward(**options(chat, mode="axes")).score(media("red"), PROMPTS[:1])
        assert score.value.item() == pytest.approx(0.8) and score.parts["style"].item() == 3

    @pytest.mark.parametrize("mode", ["rank", "score", "think"])
    def test_pairs(self, chat, mode):
        def answer(c):
            best = 1 if c.fits(0) else 2
            if mode == "score":
                shares = (0.75, 0.25) if best == 1 else (0.25, 0.75)
                block = f"Image 1: {shares[0]}\nImage 2: {shares[1]}\n"
                return "".join(f"{axis}:\n{block}" for axis in ("Alignment", "Coherence", "Style"))
            verdict = f"Image {best} is better"
            if mode == "rank":
                return verdict
            return f"<think>Image 1 is better at first sight</think><answer>{verdict}</answer>"

        chat.respond = answer
        judge = UnifiedRewardPair(**options(chat, mode=mode))
        context = [{"opponent": solid("blue")}, {"opponent": solid("green")}]
        score = judge.score(media("red", "red"), PROMPTS[:2], context)
        expected = [0.75, 0.25] if mode == "score" else [1.0, 0.0]
        assert score.value.tolist() == pytest.approx(expected)

    def test_unknown_modes(self, chat):
        with pytest.raises(ValueError, match="overall"):
            UnifiedReward(**options(chat, mode="overal"))
        with pytest.raises(ValueError, match="rank"):
            UnifiedRewardPair(**options(chat, mode="ranks"))
