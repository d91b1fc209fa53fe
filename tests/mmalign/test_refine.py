"""Refining prompts: what is generated from which wording, what is kept, what stops it."""

from __future__ import annotations

import math
import re

import pytest
import torch
from chat_server import serving

import mmalign
from mmalign.assets import asset
from mmalign.policies.load import load_policy
from mmalign.protocols import Critic, Policy, Review
from mmalign.registry import STEERERS
from mmalign.sampling import generate
from mmalign.sampling.conditioning import ConditioningCache
from mmalign.steering import BudgetError
from mmalign.steering.prompt_guidance import OriginalCentred, paired
from mmalign.steering.refine import Refine, fitting
from mmalign.types import Score
from vision_rewards.function import FunctionReward
from vision_rewards.guard import GuardedReward
from vision_rewards.judge.critique import CritiqueJudge
from vision_rewards.judge.local import LocalBackend
from vision_rewards.judge.pointwise import RubricJudge

PROMPTS = ["a photo of a red star", "a photo of two circles"]
BETTER = "a photo of a blue cross"
FAST = {"steps": 2, "guidance_scale": 1.0}


def red(images, prompts):
    return images[:, 0].mean((1, 2))


@pytest.fixture
def reward():
    return FunctionReward(red, takes="tensor")


@pytest.fixture(scope="module")
def chat():
    with serving() as server:
        yield server


class Scripted:
    """A critic whose wordings are written down; it has no say in the score."""

    def __init__(self, *wordings, scores=None):
        self.wordings, self.scores, self.asked = list(wordings), scores or {"text": 1.0}, []

    def review(self, media, prompts):
        self.asked += prompts
        said = self.wordings.pop(0) if self.wordings else ""
        reviews = [None if said is None else Review(self.scores, "wrong", said)] * len(media)
        return Score.of(torch.zeros(len(media))), reviews


def critique(score, refined="the same"):
    titles = ("Text Faithfulness", "Physical and Visual Quality")
    body = "\n".join(
        f"{n}. {t}\n## Justification: seen\n## Score: {score}" for n, t in enumerate(titles, 1)
    )
    return f"# Detailed Judgement\n{body}\n# Summary:\nmeh\n# Refined Request:\n{refined}"


def judge(chat, kind=CritiqueJudge, **more):
    server = {"backoff": 0.01, "retries": 0, "timeout": 5.0}
    return kind(url=chat.url, model="tiny", server=server, reasks=0, **more)


def asked_for(chat):
    return [re.search(r"<prompt>(.*?)</prompt>", c.text)[1] for c in chat.seen]


class TestTheLoop:
    def test_only_the_words_change(self, tiny_policy, reward):
        critic = Scripted(BETTER)
        result = Refine(critic=critic, **FAST).run(tiny_policy, reward, PROMPTS[:1])
        first, second = result.lineage
        assert (first["text"], second["text"]) == (PROMPTS[0], BETTER)
        assert first["seed"] == second["seed"]
        plain, _ = generate(tiny_policy, [PROMPTS[0], BETTER], [first["seed"]] * 2, **FAST)
        torch.testing.assert_close(result.candidates.data, plain.data, rtol=1e-4, atol=1e-5)
        assert critic.asked == PROMPTS[:1]  # the last picture is not reviewed
        assert result.nfe == 4 and result.reward_calls == 3 and result.spent.decodes == 2

    def test_everything_is_judged_by_the_original_prompt(self, tiny_policy):
        seen = []

        def scorer(images, prompts):
            seen.extend(prompts)
            return [0.0] * len(images)

        critic = Scripted(BETTER, "a photo of three stars")
        Refine(critic=critic, rounds=2, **FAST).run(
            tiny_policy, FunctionReward(scorer), PROMPTS[:1]
        )
        assert seen == PROMPTS[:1] * 3 and critic.asked == PROMPTS[:1] * 2

    def test_the_best_is_kept(self, tiny_policy, reward):
        words = [BETTER, "a photo of three stars", "a photo of a cross"]
        result = Refine(critic=Scripted(*words), rounds=3, **FAST).run(
            tiny_policy, reward, PROMPTS[:1]
        )
        values = result.candidate_scores.value
        assert len(values) == 4 and float(result.scores.value) == float(values.max())
        best = [t["best"] for t in result.trace]
        assert best == [float(values[: i + 1].max()) for i in range(4)]

    def test_batches_and_other_prompts_change_nothing(self, tiny_policy, reward):
        def expand(prompt):
            return f"{prompt} and a cross"

        options = {"expand": expand, **FAST}
        whole = Refine(**options).run(tiny_policy, reward, PROMPTS)
        small = Refine(batch_size=1, **options).run(tiny_policy, reward, PROMPTS)
        alone = Refine(**options).run(tiny_policy, reward, PROMPTS[1:])
        assert whole.lineage == small.lineage and whole.chosen == small.chosen
        torch.testing.assert_close(whole.scores.value[1:], alone.scores.value, rtol=1e-4, atol=1e-6)

    def test_words_said_before_end_it(self, tiny_policy, reward):
        critic = Scripted(BETTER, BETTER, BETTER)
        result = Refine(critic=critic, rounds=5, **FAST).run(tiny_policy, reward, PROMPTS[:1])
        assert len(result.candidates) == 2 and result.trace[1]["note"] == "worded as before"

    @pytest.mark.parametrize("said", [None, ""])
    def test_an_answer_of_no_use_keeps_the_prompt(self, tiny_policy, reward, said):
        result = Refine(critic=Scripted(said), rounds=3, **FAST).run(
            tiny_policy, reward, PROMPTS[:1]
        )
        assert [line["text"] for line in result.lineage] == PROMPTS[:1]
        spare = Refine(critic=Scripted(said), expand=lambda p: BETTER, **FAST).run(
            tiny_policy, reward, PROMPTS[:1]
        )
        assert [line["text"] for line in spare.lineage] == [PROMPTS[0], BETTER]

    def test_good_enough_is_not_refined(self, tiny_policy, reward):
        scores = {"text": 3.0, "quality": 3.5, "rendering": None}
        for threshold, pictures in ((3.0, 1), (3.2, 2), (None, 2)):
            critic = Scripted(BETTER, scores=scores)
            result = Refine(critic=critic, threshold=threshold, **FAST).run(
                tiny_policy, reward, PROMPTS[:1]
            )
            assert len(result.candidates) == pictures, threshold

    def test_long_wordings_are_cut_where_a_clause_ends(self, tiny_policy, reward):
        encode = ConditioningCache(tiny_policy)
        long = "a red star, a blue circle, " + "a green square and " * 8 + "a cross"
        short = fitting(encode, long)
        assert short == "a red star, a blue circle" and encode([short])
        assert fitting(encode, "star " * 40).split() == ["star"] * 14
        critic = Scripted(long)
        result = Refine(critic=critic, **FAST).run(tiny_policy, reward, PROMPTS[:1])
        assert result.lineage[1]["text"] == short
        assert "shortened" in result.trace[0]["note"]

    def test_unscored_pictures_are_not_chosen(self, tiny_policy):
        calls = []

        def late(images, prompts):
            calls.append(1)
            return [math.nan if len(calls) == 1 else 1.0 for _ in images]

        result = Refine(critic=Scripted(BETTER), **FAST).run(
            tiny_policy, FunctionReward(late), PROMPTS[:1]
        )
        assert result.chosen == (1,) and result.trace[0]["value"] is None

    def test_budgets(self, tiny_policy, reward):
        method = Refine(expand=lambda p: [BETTER, "a cross", "a star"], rounds=3, **FAST)
        result = method.run(tiny_policy, reward, PROMPTS, budget="nfe=5")
        assert len(result.candidates) == 4 and result.nfe == 8
        hurried = method.run(tiny_policy, reward, PROMPTS, budget={"seconds": 1e-6})
        assert len(hurried.candidates) == 2
        with pytest.raises(BudgetError, match="refine"):
            method.run(tiny_policy, reward, PROMPTS, budget="nfe=1")

    def test_what_cannot_work_is_explained(self, tiny_policy, reward, monkeypatch):
        monkeypatch.setattr(tiny_policy, "predict", pytest.fail)
        with pytest.raises(ValueError, match="only scores"):
            Refine().run(tiny_policy, reward, PROMPTS)
        for options, said in (
            ({"rounds": -1}, "rounds"),
            ({"keep": 1.5}, "keep must lie"),
            ({"critic_options": {"url": "x"}}, "by name"),
            ({"expand": "shout"}, "function of a prompt"),
        ):
            with pytest.raises(ValueError, match=said):
                Refine(**options)
        flux = load_policy("tiny-flux")
        with pytest.raises(ValueError, match="unconditional branch"):
            Refine(keep=0.5, expand=lambda p: BETTER).run(flux, reward, PROMPTS[:1])


class TestJudges:
    def test_full_marks_regenerate_nothing(self, chat, tiny_policy):
        chat.respond, chat.seen = lambda c: critique(4.0, BETTER), []
        reward = GuardedReward(judge(chat), max_failed_share=1.0)
        result = Refine(rounds=2, **FAST).run(tiny_policy, reward, PROMPTS)
        assert len(result.candidates) == 2 and result.scores.value.tolist() == [1.0, 1.0]
        assert len(chat.seen) == 2 == result.reward_calls  # one answer for score and critique

    def test_a_worse_picture_is_not_kept(self, chat, tiny_policy):
        chat.respond = lambda c: critique(1.0 if len(chat.seen) > 1 else 2.5, BETTER)
        chat.seen = []
        result = Refine(**FAST).run(tiny_policy, judge(chat), PROMPTS[:1])
        assert [line["text"] for line in result.lineage] == [PROMPTS[0], BETTER]
        assert result.chosen == (0,) and asked_for(chat) == PROMPTS[:1] * 2
        assert result.trace[0]["refined"] == BETTER and result.trace[0]["critique"] == "meh"

    def test_what_cannot_be_read_keeps_the_prompt(self, chat, tiny_policy, reward):
        chat.respond, chat.seen = lambda c: "Lovely picture!", []
        result = Refine(critic=judge(chat), rounds=2, **FAST).run(tiny_policy, reward, PROMPTS[:1])
        assert len(result.candidates) == 1
        assert result.trace[0]["note"] == "the answer could not be read"

    def test_any_judge_words_prompts_anew(self, chat, tiny_policy):
        def respond(c):
            if "Word the text anew" in c.text:
                assert "alignment: too dark" in c.text
                return f"<think>hm</think><prompt>{BETTER}</prompt>"
            names = re.findall(r'^- "(\w+)"', c.text, re.MULTILINE)
            said = ", ".join(f'"{n}": {{"reason": "too dark", "score": 2}}' for n in names)
            return f"{{{said}}}"

        chat.respond, chat.seen = respond, []
        rubric = judge(chat, RubricJudge)
        assert isinstance(rubric, Critic)
        result = Refine(**FAST).run(tiny_policy, rubric, PROMPTS[:1])
        assert [line["text"] for line in result.lineage] == [PROMPTS[0], BETTER]
        assert result.trace[0]["scores"]["alignment"] == 2.0

    def test_a_critic_by_name(self, chat, tiny_policy, reward):
        chat.respond, chat.seen = lambda c: critique(2.0, BETTER), []
        options = {"url": chat.url, "model": "tiny"}
        result = Refine(critic="critique_judge", critic_options=options, **FAST).run(
            tiny_policy, reward, PROMPTS[:1]
        )
        assert len(result.candidates) == 2 and result.reward_calls == 3

    def test_a_server_that_fails_leaves_pictures_unscored(self, chat, tiny_policy):
        chat.respond = lambda c: (500, "broken", {})
        reward = GuardedReward(judge(chat), max_failed_share=1.0)
        with pytest.raises(ValueError, match="could score none"):
            Refine(**FAST).run(tiny_policy, reward, PROMPTS[:1])

    def test_a_critic_that_fails_says_so(self, chat, tiny_policy):
        """A reward that can score and not review: its pictures count, its prompt stays."""

        class Speechless(FunctionReward):
            def review(self, media, prompts):
                raise RuntimeError("no words today")

        result = Refine(rounds=2, **FAST).run(
            tiny_policy, Speechless(red, takes="tensor"), PROMPTS[:1]
        )
        assert len(result.candidates) == 1 and result.scores.valid.all()
        assert "RuntimeError: no words today" in result.trace[0]["note"]

    def test_a_small_model_that_sees(self):
        """The shipped generator under the shipped vision-language model, end to end."""
        backend = LocalBackend(asset("shapes-vlm"), batch_size=4)
        policy, reward = load_policy("shapes-flow"), CritiqueJudge(backend=backend, max_tokens=128)
        prompts = ["a photo of two green stars", "a photo of a red square above a blue circle"]
        result = Refine(threshold=None, rounds=2, steps=6, expand=lambda p: f"{p}").run(
            policy, reward, prompts
        )
        assert result.scores.valid.all()
        for prompt in (0, 1):
            rounds = [t for t in result.trace if t["prompt"] == prompt]
            assert rounds[-1]["best"] == max(t["value"] for t in rounds)
            assert rounds[0]["critique"] and rounds[0]["scores"]["text_faithfulness"]
        print([(t["value"], t["text"], t["refined"], t["note"]) for t in result.trace])


class TestOriginalCentredGuidance:
    X = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))

    def both(self, policy, refined=(BETTER, "a photo of a cross")):
        x = torch.randn((2, *policy.latent_shape), generator=torch.Generator().manual_seed(0))
        own, new = policy.encode(PROMPTS), policy.encode(list(refined))
        return x, own, new

    @pytest.mark.parametrize("name", ["tiny-sd", "tiny-sd3", "tiny-sdxl"])
    @pytest.mark.parametrize("sigma", [torch.tensor(0.5), torch.tensor([0.7, 0.4])])
    def test_it_reduces_to_plain_guidance(self, name, sigma):
        policy = load_policy(name)
        x, own, new = self.both(policy)
        with torch.no_grad():
            only = OriginalCentred(policy, 3.0, 0.0).predict(x, sigma, paired(own, new))
            same = OriginalCentred(policy, 1.5, 2.5).predict(x, sigma, paired(own, own))
            plain = [policy.predict(x, sigma, own, w) for w in (3.0, 4.0)]
            three = OriginalCentred(policy, 2.0, 1.0).predict(x, sigma, paired(own, new))
            by_hand = policy.predict(x, sigma, own, 2.0) + policy.predict(x, sigma, new, 1.0)
            null = 2 * policy.predict(x, sigma, own, 1.0) - policy.predict(x, sigma, own, 2.0)
        torch.testing.assert_close(only, plain[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(same, plain[1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(three, by_hand - null, rtol=1e-3, atol=1e-4)

    def test_as_a_policy_of_its_own(self, tiny_policy):
        policy = OriginalCentred(tiny_policy, 2.0, 2.0, expand=lambda p: f"{p} and a cross")
        media, _ = generate(policy, PROMPTS, [1, 2], steps=2)
        long = [f"{p} and a cross" for p in PROMPTS]
        given = paired(tiny_policy.encode(PROMPTS), tiny_policy.encode(long))
        x = tiny_policy.init_noise([1, 2])
        assert set(given.positive) == {"embeds", "pooled", "original.embeds", "original.pooled"}
        assert policy.predict(x, torch.tensor(1.0), given).shape == x.shape
        assert media.data.shape == (2, 3, 32, 32) and policy.name == "tiny"
        # Later versions of Python look for the members of a contract on the class only.
        members = [*Policy.__annotations__, *(n for n in vars(Policy) if not n.startswith("_"))]
        assert [m for m in members if not hasattr(OriginalCentred, m)] == []
        result = mmalign.steer(policy, PROMPTS[:1], "contrast", n=2, steps=2)
        assert result.nfe == 2 * 2 * 3

    def test_refining_keeps_a_share_of_the_original(self, tiny_policy, reward):
        options = {"expand": lambda p: BETTER, "steps": 2, "guidance_scale": 4.0}
        alone, half, all_of_it = (
            Refine(keep=keep, **options).run(tiny_policy, reward, PROMPTS[:1])
            for keep in (None, 0.5, 1.0)
        )
        assert alone.nfe == 8 and half.nfe == 4 + 6
        first, last = all_of_it.candidates.data
        torch.testing.assert_close(first, last, rtol=1e-4, atol=1e-5)
        apart = [float((r.candidates.data[1] - first).abs().max()) for r in (half, alone)]
        assert 1e-4 < apart[0] < apart[1]


def test_it_is_registered():
    assert STEERERS.load("refine") is Refine
