"""The queue: one thread, merged calls, and one bad request that harms no other."""

from __future__ import annotations

import threading

import pytest
import torch

from mmalign.types import Media, Score
from vision_rewards.function import FunctionReward
from vision_rewards.serving.wire import Call
from vision_rewards.serving.worker import ServerClosedError, Worker


class Held:
    """A reward that notes its batches and waits until it may answer; white pictures fail."""

    def __init__(self, scope: str = "pointwise") -> None:
        self.sizes: list[int] = []
        self.threads: set[str] = set()
        self.graph: set[bool] = set()
        self.go, self.began = threading.Event(), threading.Event()
        inner = FunctionReward(lambda media, prompts: media.flatten(1).mean(1), takes="tensor")
        self.identity = "held"
        self.info = type(inner.info)(name="held", scope=scope)
        self.inner = inner

    def score(self, media, prompts, context=None) -> Score:
        self.sizes.append(len(media))
        self.threads.add(threading.current_thread().name)
        self.graph.add(torch.is_grad_enabled())
        self.began.set()
        assert self.go.wait(10)
        if media.data.min() >= 1:
            raise ArithmeticError("white")
        if media.data.max() >= 1:
            raise ArithmeticError("white inside")
        score = self.inner.score(media, prompts)
        return Score(score.value, score.valid, {}, tuple(prompts), "held")


def call(*levels: float, side: int = 4) -> Call:
    data = torch.stack([torch.full((3, side, side), level) for level in levels])
    return Call(Media(data), tuple(f"{level:g}" for level in levels))


@pytest.fixture
def make():
    made = []

    def build(**options) -> tuple[Held, Worker]:
        held = Held(options.pop("scope", "pointwise"))
        made.append((held, Worker(held, **options)))
        return made[-1]

    yield build
    for held, worker in made:
        held.go.set()
        worker.close()


def pile_up(held: Held, worker: Worker, *calls: Call) -> list:
    """Submit one call, and the others while the reward is busy with it."""
    futures = [worker.submit(call(0.5))]
    assert held.began.wait(10)
    futures += [worker.submit(c) for c in calls]
    assert worker.waiting == len(calls)
    held.go.set()
    return futures[1:]


def test_what_piled_up_is_scored_together(make):
    held, worker = make(batch=4)
    futures = pile_up(held, worker, call(0.1, 0.2), call(0.3), call(0.4, 0.5))
    scores = [f.result(10) for f in futures]
    assert held.sizes == [1, 3, 2]
    assert [s.notes for s in scores] == [("0.1", "0.2"), ("0.3",), ("0.4", "0.5")]
    assert torch.cat([s.value for s in scores]).tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert held.threads == {"reward"} and held.graph == {False}


def test_without_merging_requests_are_scored_as_they_came(make):
    held, worker = make(batch=2, merge=False)
    futures = pile_up(held, worker, call(0.1), call(0.2), call(0.3, 0.4, 0.5))
    assert [len(f.result(10)) for f in futures] == [1, 1, 3]
    assert held.sizes == [1, 1, 1, 2, 1]  # a large one is cut in any case


def test_other_shapes_are_not_merged(make):
    held, worker = make()
    for future in pile_up(held, worker, call(0.1), call(0.2, side=5), call(0.3)):
        future.result(10)
    assert held.sizes == [1, 1, 1, 1]


def test_group_rewards_see_requests_whole_and_alone(make):
    held, worker = make(batch=2, scope="group")
    for future in pile_up(held, worker, call(0.1, 0.2, 0.3), call(0.4)):
        future.result(10)
    assert held.sizes == [1, 3, 1]


def test_one_bad_request_fails_alone(make):
    held, worker = make()
    good, bad, fine = pile_up(held, worker, call(0.1), call(1.0), call(0.2))
    assert good.result(10).value.item() == pytest.approx(0.1)
    with pytest.raises(ArithmeticError, match=r"^white$"):
        bad.result(10)
    assert fine.result(10).value.item() == pytest.approx(0.2)
    assert worker.alive


def test_callers_that_left_are_skipped(make):
    held, worker = make(merge=False)
    futures = [worker.submit(call(0.5))]
    assert held.began.wait(10)
    futures += [worker.submit(call(0.1)), worker.submit(call(0.2))]
    assert futures[1].cancel()
    held.go.set()
    assert futures[2].result(10).notes == ("0.2",) and held.sizes == [1, 1]


def test_closing_finishes_the_queue_and_takes_no_more(make):
    held, worker = make(merge=False)
    futures = pile_up(held, worker, call(0.1), call(0.2))
    worker.close()
    assert all(f.done() for f in futures) and not worker.alive
    with pytest.raises(ServerClosedError):
        worker.submit(call(0.3))


def test_a_reward_that_returns_nonsense_is_an_error():
    reward = FunctionReward(lambda images, prompts: [1.0] * len(images))
    reward.score = lambda media, prompts, context=None: Score.of(torch.zeros(1))
    worker = Worker(reward)
    with pytest.raises(TypeError, match="did not return a Score of 2"):
        worker.submit(call(0.1, 0.2)).result(10)
    worker.close()
