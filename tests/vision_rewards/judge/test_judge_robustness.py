"""The robustness suite tells sound judges from gullible, biased and fickle ones."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch

from mmalign.cli import main
from mmalign.types import Media
from vision_rewards.function import FunctionReward
from vision_rewards.judge.attacks import TEXT_ATTACKS, blank, labelled
from vision_rewards.judge.pairwise import PairwiseJudge
from vision_rewards.judge.pointwise import RubricJudge
from vision_rewards.judge.robustness import check_judge
from vision_rewards.judge.statistics import mean, share

COLORS = ("red", "green", "blue")
PROMPTS = [f"a {c} sky" for c in COLORS]


def pictures():
    """One picture of each colour, ``(3, 3, 16, 16)``."""
    data = torch.full((3, 3, 16, 16), 0.1)
    for i in range(3):
        data[i, i] = 0.9
    return data


def options(chat):
    return {"url": chat.url, "model": "tiny", "server": {"backoff": 0.01, "concurrency": 16}}


def graded(chat, good):
    names = re.findall(r'^- "(\w+)"', chat.text, re.MULTILINE)
    score = 5 if good else 1
    return json.dumps({n: {"reason": "", "score": score} for n in names})


@pytest.fixture
def sound(chat):
    """A server that looks at the picture only."""
    chat.respond = lambda c: graded(c, c.fits())
    return chat


def test_intervals():
    # Wilson for 8 of 10 (Agresti and Coull 1998 use the same form) and t for a small sample.
    got = share([True] * 8 + [False] * 2)
    assert (got.value, got.low, got.high) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    assert share([True] * 5).high == 1.0 and share([True] * 5).low < 0.6
    got = mean([1.0, 2.0, 3.0])
    assert (got.value, got.low, got.high) == pytest.approx((2.0, 2 - 2.4841, 2 + 2.4841), abs=1e-3)
    assert math.isnan(mean([]).value) and math.isnan(mean([1.0]).low)


def test_a_sound_judge(sound):
    report = check_judge(RubricJudge(**options(sound)), Media(pictures()), PROMPTS, repeats=2)
    assert report["discrimination"].estimate.value == 1.0
    for name in TEXT_ATTACKS:
        assert report[f"{name}.rise"].estimate.value == 0.0, name
        assert report[f"{name}.fooled"].estimate.value == 0.0, name
    assert report["reask_agreement"].estimate.value == 1.0
    assert not any(c.unscored for c in report.checks)
    assert report.usage["requests"] == len(sound.seen) > 30


def test_a_gullible_judge_is_caught(chat):
    chat.respond = lambda c: graded(c, c.fits() or "masterpiece" in c.text)
    report = check_judge(RubricJudge(**options(chat)), Media(pictures()), PROMPTS, repeats=2)
    assert report["flattery.rise"].estimate.value == 1.0
    assert report["flattery.fooled"].estimate.value == 1.0
    assert report["injection.rise"].estimate.value == 0.0


def test_a_fickle_judge_is_caught(chat):
    def fickle(c):
        good = c.fits() if c.body["temperature"] == 0 else c.body["seed"] % 2
        return graded(c, good)

    chat.respond = fickle
    report = check_judge(RubricJudge(**options(chat)), Media(pictures()), PROMPTS, repeats=2)
    assert report["reask_agreement"].estimate.value == 0.0
    assert report["reask_deviation"].estimate.value == pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize("biased", [False, True])
def test_position_bias(chat, biased):
    def answer(c):
        winner = "A" if biased or c.fits(0) else "B" if c.fits(1) else "tie"
        return json.dumps({"reason": "", "winner": winner})

    chat.respond = answer
    report = check_judge(PairwiseJudge(**options(chat)), Media(pictures()), PROMPTS, repeats=2)
    assert report["position_bias"].estimate.value == (0.5 if biased else 0.0)
    assert report["order_consistency"].estimate.value == (0.0 if biased else 1.0)
    assert report["discrimination"].estimate.value == (0.0 if biased else 1.0)


def test_unscored_answers_are_counted_apart(chat):
    chat.respond = lambda c: "?" if "Solution:" in c.text else graded(c, c.fits())
    judge = RubricJudge(**options(chat), reasks=0)
    report = check_judge(judge, Media(pictures()), PROMPTS, repeats=2)
    check = report["master_key_solution.rise"]
    assert check.unscored == 3 and check.estimate.n == 0
    assert report.record()["checks"][0]["name"] == "discrimination"
    json.dumps(report.record(), allow_nan=False)


def test_any_reward_can_be_checked():
    def redness(images, prompts):
        return [i.getpixel((8, 12))[0] / 255 for i in images]

    report = check_judge(FunctionReward(redness), Media(pictures()), PROMPTS, repeats=2)
    assert report["discrimination"].estimate.value == pytest.approx(1 / 3)
    assert report["blank_picture.rise"].estimate.n == 3


def test_unsuitable_input(sound):
    judge = RubricJudge(**options(sound))
    with pytest.raises(ValueError, match="two different prompts"):
        check_judge(judge, Media(pictures()), ["a red sky"] * 3)
    with pytest.raises(ValueError, match="repeats"):
        check_judge(judge, Media(pictures()), PROMPTS, repeats=1)


def test_picture_attacks():
    assert blank(pictures()).unique().tolist() == [0.5]
    written = labelled(pictures())
    assert written.shape == pictures().shape
    assert not torch.equal(written[..., :6, :], pictures()[..., :6, :])
    assert torch.allclose(written[..., 8:, :], pictures()[..., 8:, :], atol=1 / 255)


def test_command(sound, tmp_path, capsys):
    for image, color in zip(Media(pictures()).to_pil(), COLORS, strict=True):
        image.save(tmp_path / f"{COLORS.index(color)}.png")
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    out = tmp_path / "out" / "report.json"
    words = f"judge-check --judge rubric_judge -o url={sound.url} -o model=tiny --repeats 2".split()
    words += ["--images", *sorted(map(str, tmp_path.glob("*.png")))]
    code = main([*words, "--prompts", str(tmp_path / "p.txt"), "--out", str(out)])
    assert code == 0 and "flattery.fooled" in capsys.readouterr().out
    record = json.loads(out.read_text())
    assert record["judge"].startswith("rubric_judge@tiny@") and record["pictures"] == 3
    assert "| discrimination | 1.000 |" in out.with_suffix(".md").read_text()
