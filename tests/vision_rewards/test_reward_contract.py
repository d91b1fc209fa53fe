"""What every registered reward promises, checked on all of them: declaration, scores, calls.

What it does with odd pictures and prompts is in ``test_reward_contract_inputs.py``, gradients are
in ``test_reward_contract_gradients.py``; ``reward_builds.py`` says how each is built without the
hub.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from reward_builds import BATCH, BUILDS, Subject, assert_well_formed, rewards_where, same

from mmalign.protocols import RewardModel
from mmalign.registry import REWARDS
from mmalign.reward_info import RewardInfo
from mmalign.types import Media, Score
from vision_rewards.sharing import shared_forward

every = pytest.mark.parametrize("subject", rewards_where(), indirect=True)


def those(holds: Any) -> pytest.MarkDecorator:
    """Parametrises ``subject`` over the rewards whose declaration passes."""
    return pytest.mark.parametrize("subject", rewards_where(holds), indirect=True)


def facts_needed(info: RewardInfo) -> set[str]:
    """Keys of the context."""
    return set(info.needs) - {"prompt"}


def test_every_registered_reward_is_covered() -> None:
    assert set(BUILDS) == {entry.name for entry in REWARDS} == set(rewards_where())


# --- declaration --------------------------------------------------------------------------------


@every
def test_info_is_filled(subject: Subject) -> None:
    info = subject.info
    assert isinstance(subject.reward, RewardModel)
    assert info.name in REWARDS
    assert info.summary and info.source and info.licence
    assert info.media and set(info.media) <= {"image", "video"}
    assert info.scope in ("pointwise", "pairwise", "group")
    assert (info.scope == "pairwise") == ("opponent" in info.needs)
    assert set(info.needs) <= {"prompt", "opponent", "reference", "source"}
    assert bool(info.checkpoint) == (info.parameters > 0)
    low, high = (-float("inf") if info.range[0] is None else info.range[0],
                 float("inf") if info.range[1] is None else info.range[1])  # fmt: skip
    assert low < high
    if info.typical is not None:
        assert low <= info.typical[0] < info.typical[1] <= high


@every
def test_identity_is_stable_and_survives_loading_again(subject: Subject) -> None:
    before = subject.reward.identity
    values = subject.values()
    again = replace(subject, reward=subject.make())
    assert before.startswith(subject.info.name)
    assert subject.reward.identity == again.reward.identity == before
    assert again.info == subject.info
    assert again.values().equal(values)


# --- scores -------------------------------------------------------------------------------------


@every
def test_scores_are_well_formed(subject: Subject) -> None:
    score = subject.score()
    assert_well_formed(score, subject)
    assert score.valid.all(), score.notes
    assert not score.value.requires_grad  # no weight asks for a gradient


@every
def test_scores_tell_pictures_apart(subject: Subject) -> None:
    assert subject.values().std() > 1e-4


@every
def test_scoring_leaves_no_trace(subject: Subject) -> None:
    """Equal inputs give equal scores; inputs and global random states stay what they were."""
    pictures = subject.pictures.clone()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    first, second = subject.values(), subject.values()
    assert first.equal(second)
    assert subject.pictures.equal(pictures)
    assert torch.get_rng_state().equal(states[0]) and random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])


@every
def test_scores_follow_the_order_of_the_batch(subject: Subject) -> None:
    straight, order = subject.score(), [2, 0, 3, 1]
    shuffled = subject.rows(order).score()
    assert same(shuffled.value, straight.value[order])
    assert shuffled.parts.keys() == straight.parts.keys()
    for name, part in straight.parts.items():
        assert same(shuffled.parts[name], part[order]), name


@those(lambda info: info.scope != "group")
def test_scores_do_not_depend_on_the_batch(subject: Subject) -> None:
    alone = Score.cat([subject.rows([k]).score() for k in range(BATCH)])
    together = subject.score()
    assert same(alone.value, together.value)
    for name, part in together.parts.items():
        assert same(alone.parts[name], part), name


@every
def test_autocast_changes_nothing(subject: Subject) -> None:
    """The precision of a training loop is not that of its reward."""
    with torch.autocast("cpu", torch.bfloat16):
        value = subject.values()
    assert value.dtype == torch.float32 and same(value, subject.values())


@every
def test_sharing_changes_nothing(subject: Subject) -> None:
    """Inside a composition forward passes are shared; pictures changed in place are not."""
    pictures = subject.pictures.clone()
    values, mirrored = subject.values(), subject.values(pictures.flip(0))
    with shared_forward():
        assert subject.values(pictures).equal(values)
        assert subject.values(pictures).equal(values)
        pictures.copy_(subject.pictures.flip(0))
        assert subject.values(pictures).equal(mirrored)


@those(lambda info: not info.differentiable)
def test_no_gradient_where_none_is_declared(subject: Subject) -> None:
    score = subject.score(subject.pictures.clone().requires_grad_())
    assert not score.value.requires_grad
    assert not any(p.requires_grad for p in score.parts.values())


# --- calls --------------------------------------------------------------------------------------


@every
def test_an_empty_batch_gives_an_empty_score(subject: Subject) -> None:
    none = subject.rows([])
    for context in (None, []):
        score = subject.reward.score(Media(none.pictures), [], context)
        assert_well_formed(score, none)


@every
def test_counts_have_to_agree(subject: Subject) -> None:
    media, context = Media(subject.pictures), subject.context
    for prompts in (subject.prompts[:-1], [*subject.prompts, "a"], []):
        with pytest.raises(ValueError, match=f"{len(prompts)} prompts for {BATCH}"):
            subject.reward.score(media, prompts, context)
    for wrong in ((context or [{}] * BATCH)[:-1], [*(context or [{}] * BATCH), {}]):
        with pytest.raises(ValueError, match=f"{len(wrong)} contexts for {BATCH}"):
            subject.reward.score(media, subject.prompts, wrong)


@those(facts_needed)
def test_declared_facts_are_needed_and_matter(subject: Subject) -> None:
    assert subject.context is not None
    for key in facts_needed(subject.info):
        less = [{k: v for k, v in facts.items() if k != key} for facts in subject.context]
        for context in (None, less, [*subject.context[:-1], less[-1]]):
            with pytest.raises(ValueError, match=repr(key)):
                subject.reward.score(Media(subject.pictures), subject.prompts, context)
        others = [{**facts, key: facts[key].flip(-2)} for facts in subject.context]
        moved = replace(subject, context=others).values()
        assert not same(moved, subject.values())


@those(lambda info: not facts_needed(info))
def test_nothing_but_the_declared_facts_is_needed(subject: Subject) -> None:
    media, values = Media(subject.pictures), subject.values()
    for context in (None, [{}] * BATCH, [{"unrelated": 3}] * BATCH):
        score = subject.reward.score(media, subject.prompts, context)
        assert score.valid.all() and same(score.value, values)


@those(lambda info: "prompt" not in info.needs)
def test_prompts_that_are_not_needed_do_not_matter(subject: Subject) -> None:
    values = subject.values()
    assert subject.values(prompts=[""] * BATCH).equal(values)
    assert subject.values(prompts=["a photo of two blue circles"] * BATCH).equal(values)


@those(lambda info: "prompt" in info.needs)
def test_prompts_that_are_needed_matter(subject: Subject) -> None:
    prompts = subject.prompts[1:] + subject.prompts[:1]
    assert not same(subject.values(prompts=prompts), subject.values())


@those(lambda info: "video" not in info.media)
def test_videos_are_refused_where_they_are_not_declared(subject: Subject) -> None:
    with pytest.raises(ValueError, match="video"):
        subject.score(subject.pictures[:, None].expand(-1, 2, -1, -1, -1))


@those(lambda info: "video" in info.media)
def test_a_still_video_is_worth_its_picture(subject: Subject) -> None:
    still = subject.score(subject.pictures[:, None].expand(-1, 2, -1, -1, -1))
    assert_well_formed(still, subject)
    assert same(still.value, subject.values())


@every
@pytest.mark.parametrize("channels", [2, 4])
def test_other_numbers_of_channels_are_refused(subject: Subject, channels: int) -> None:
    with pytest.raises(ValueError, match="channels"):
        subject.score(torch.rand(BATCH, channels, 16, 16))
