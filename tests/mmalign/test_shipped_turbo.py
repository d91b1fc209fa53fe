"""The shipped few-step generator: four steps without guidance, as good as its teacher with."""

from __future__ import annotations

import numpy as np
import torch

from mmalign.assets import asset
from mmalign.policies.load import load_policy
from mmalign.sampling import generate
from mmalign.shapes import TASKS, prompts
from mmalign.steering.reno import Reno
from vision_rewards.factory import load_reward
from vision_rewards.shapes import verify


def test_it_is_small_and_carries_no_paths() -> None:
    files = [f for f in asset("shapes-turbo").rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 10e6
    texts = [f.read_text(encoding="utf-8") for f in files if f.suffix == ".json"]
    assert texts and not any("_name_or_path" in text for text in texts)


def test_four_steps_without_guidance_are_competent() -> None:
    policy = load_policy("shapes-turbo")
    assert (policy.sampler.steps, policy.sampler.guidance_scale) == (4, 1.0)
    torch.testing.assert_close(policy.sigmas(4), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))
    texts = [p for t in TASKS for p in (prompts("test", t, 10) * 10)[:10]]
    media, nfe = generate(policy, texts, range(len(texts)), dtype=torch.bfloat16)
    verdicts = verify(media.data.permute(0, 2, 3, 1).numpy(), texts)
    assert nfe == 4 * 60
    # 59 % was measured over 240 pictures; four standard errors of 60 pictures below.
    assert float(np.mean([v.strict for v in verdicts])) > 0.34


def test_reno_raises_its_reward() -> None:
    policy, clip = load_policy("shapes-turbo"), load_reward("shapes_clip")
    texts = [prompts("test", task, 1)[0] for task in TASKS]
    result = Reno(iterations=5).run(policy, clip, texts)
    start = [line["value"] for line in result.trace if line["iteration"] == 0]
    held = load_reward("shapes_partial").score(result.media, texts)
    print("shapes_clip", start, result.scores.value, "verifier of the best", held.value)
    assert float(result.scores.value.mean()) > sum(start) / len(texts) + 0.02
    assert result.nfe == len(texts) * 5 * 4
