"""Particle methods on the shipped generator: what they gain, and what a held-out judge says."""

from __future__ import annotations

import pytest
from hard_prompts import HARD

from mmalign.policies.load import load_policy
from mmalign.steering.fk import Fk
from mmalign.steering.svdd import Svdd
from vision_rewards.factory import load_reward

SAMPLER = {"steps": 8, "guidance_scale": 2.0, "seed": 0}


@pytest.fixture(scope="module")
def parts():
    return load_policy("shapes-flow"), load_reward("shapes_clip"), load_reward("shapes_partial")


def held_out(judge, result) -> float:
    texts = [HARD[line["prompt"]] for line in result.lineage]
    return float(judge.score(result.candidates, texts).value.mean())


def test_fk_gains_on_its_reward_at_the_same_evaluations(parts):
    policy, reward, judge = parts
    plain = Fk(k=4, strength=0.0, **SAMPLER).run(policy, reward, HARD)
    steered = Fk(k=4, strength=50.0, **SAMPLER).run(policy, reward, HARD)
    before, after = (float(r.candidate_scores.value.mean()) for r in (plain, steered))
    print(f"reward of all particles {before:.3f} -> {after:.3f}; held-out verifier "
          f"{held_out(judge, plain):.3f} -> {held_out(judge, steered):.3f}")  # fmt: skip
    assert steered.nfe == plain.nfe and after > before + 0.03


def test_svdd_gains_on_its_reward(parts):
    policy, reward, judge = parts
    plain = Svdd(children=1, **SAMPLER).run(policy, reward, HARD)
    steered = Svdd(children=4, start=0.25, **SAMPLER).run(policy, reward, HARD)
    before, after = (float(r.scores.value.mean()) for r in (plain, steered))
    print(f"reward {before:.3f} -> {after:.3f}; held-out verifier "
          f"{held_out(judge, plain):.3f} -> {held_out(judge, steered):.3f}")  # fmt: skip
    assert after > before + 0.03
