"""Scores beside other work are the scores of a plain loop, in its order, with its errors."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from mmalign.types import Media, Score
from vision_rewards.factory import load_reward
from vision_rewards.function import FunctionReward
from vision_rewards.prefetch import Prefetch


def test_scores_are_those_of_a_plain_loop(kit):
    reward = load_reward("shapes_partial")
    batches = [(kit.scenes[[i, 4 - i]], [kit.captions[i], kit.captions[0]]) for i in range(5)]
    plain = Score.cat([reward.score(*batch) for batch in batches])
    with Prefetch(reward) as scorer:
        futures = [scorer.submit(*batch) for batch in batches]
        scores = scorer.results()
    assert all(f.done() for f in futures) and scores.identity == plain.identity
    assert scores.value.equal(plain.value) and scores.valid.equal(plain.valid)
    assert all(scores.parts[n].equal(p) for n, p in plain.parts.items())


def test_the_caller_goes_on_meanwhile():
    go, seen = threading.Event(), []

    def slow(media, prompts):
        assert go.wait(10)
        seen.append((prompts[0], torch.is_grad_enabled(), threading.current_thread().name))
        return media.flatten(1).mean(1)

    batch = Media(torch.rand(1, 3, 4, 4, requires_grad=True))
    with Prefetch(FunctionReward(slow, takes="tensor"), depth=3) as scorer:
        for name in "abc":
            scorer.submit(batch, [name])
        assert seen == []  # all three were handed over before one was scored
        go.set()
        assert len(scorer.results()) == 3
    assert seen == [(name, False, "prefetch") for name in "abc"]


def test_a_slow_reward_holds_the_caller_back():
    go, handed = threading.Event(), []
    reward = FunctionReward(lambda images, prompts: [float(go.wait(10))] * len(images))
    batch = Media(torch.rand(1, 3, 4, 4))
    with Prefetch(reward, depth=1) as scorer:

        def hand_over() -> None:
            for k in range(4):
                scorer.submit(batch, [""])
                handed.append(k)

        thread = threading.Thread(target=hand_over)
        thread.start()
        time.sleep(0.2)
        assert len(handed) <= 2  # one being scored, one waiting
        go.set()
        thread.join(10)
        assert handed == [0, 1, 2, 3] and scorer.results().value.sum() == 4


def test_an_error_reaches_the_caller_and_ends_it():
    calls = []

    def failing(images, prompts):
        calls.append(prompts[0])
        if prompts[0] == "b":
            raise ArithmeticError("no")
        return [0.0]

    batch = Media(torch.rand(1, 3, 4, 4))
    with Prefetch(FunctionReward(failing), depth=4) as scorer:
        futures = [scorer.submit(batch, [name]) for name in "abcd"]
        assert futures[0].result(10).value.item() == 0
        for future in futures[1:]:
            with pytest.raises(ArithmeticError, match="no"):
                future.result(10)
        with pytest.raises(ArithmeticError):
            scorer.results()
    assert calls == ["a", "b"]


def test_leaving_early_gives_up_what_waits():
    go, calls = threading.Event(), []

    def slow(images, prompts):
        calls.append(prompts[0])
        assert go.wait(10)
        return [0.0]

    batch = Media(torch.rand(1, 3, 4, 4))
    scorer = Prefetch(FunctionReward(slow), depth=4)
    with pytest.raises(KeyError), scorer:
        futures = [scorer.submit(batch, [name]) for name in "abc"]
        threading.Timer(0.1, go.set).start()
        raise KeyError
    assert calls in ([], ["a"]) and futures[2].cancelled()
    with pytest.raises(RuntimeError, match="closed"):
        scorer.submit(batch, [""])


def test_bad_arguments():
    reward = FunctionReward(lambda images, prompts: [0.0] * len(images))
    with pytest.raises(ValueError, match="depth is 0"):
        Prefetch(reward, depth=0)
    with Prefetch(reward) as scorer, pytest.raises(ValueError, match="nothing was submitted"):
        scorer.results()
