"""One thread on the model: requests wait in a queue and are scored together where they can be."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from mmalign.protocols import RewardModel
from mmalign.types import Media, Score
from vision_rewards.serving.metrics import Metrics
from vision_rewards.serving.wire import Call


class ServerClosedError(RuntimeError):
    """The server is shutting down and takes no further work."""


@dataclass(eq=False)
class _Job:
    call: Call
    future: Future[Score] = field(default_factory=Future)


class Worker:
    """Scores calls in the order they came, on a thread of its own.

    A pointwise reward sees at most ``batch`` samples at once. While it is busy requests pile up;
    those at the head of the queue that agree in shape are then scored in one call. Nothing ever
    waits for company, so merging adds no latency. Other rewards see each request whole and alone.

    Args:
        reward: the reward model.
        batch: most samples of one call of a pointwise reward.
        merge: score requests together. Without it the composition of a batch, and so the last bit
            of a network's score, does not depend on who else is asking.
        device: where media are moved before scoring.
        metrics: counters to fill.

    Raises:
        ValueError: ``batch`` below 1.
    """

    def __init__(
        self,
        reward: RewardModel,
        *,
        batch: int = 64,
        merge: bool = True,
        device: torch.device | str = "cpu",
        metrics: Metrics | None = None,
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch is {batch}; it must be at least 1")
        self.reward, self.batch, self.device = reward, batch, torch.device(device)
        self.merge = merge and reward.info.scope == "pointwise"
        self.metrics = metrics or Metrics()
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="reward", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._jobs)

    @property
    def alive(self) -> bool:
        """Whether work is taken and done."""
        return self._thread.is_alive() and not self._closed

    def submit(self, call: Call) -> Future[Score]:
        """Queue a call; the future gets its score, or what the reward raised.

        Raises:
            ServerClosedError: after :meth:`close`.
        """
        job = _Job(call)
        with self._changed:
            if self._closed:
                raise ServerClosedError("the reward server is shutting down")
            self._jobs.append(job)
            self._changed.notify()
        return job.future

    def close(self) -> None:
        """Take no more work, finish what is queued, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            jobs = self._take()
            if jobs:
                with torch.no_grad():
                    self._answer(jobs)
            elif self._closed:
                return

    def _take(self) -> list[_Job]:
        """The next jobs to score together; none at the end, or where all of them were given up."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closed)
            jobs: list[_Job] = []
            while self._jobs and (not jobs or self._fits(jobs, self._jobs[0])):
                job = self._jobs.popleft()
                if job.future.set_running_or_notify_cancel():  # else its caller has gone
                    jobs.append(job)
        return jobs

    def _fits(self, jobs: Sequence[_Job], job: _Job) -> bool:
        if not self.merge:
            return False
        first, data = jobs[0].call, job.call.media.data
        same = first.media.data.shape[1:] == data.shape[1:] and first.media.data.dtype == data.dtype
        facts = (first.context is None) == (job.call.context is None)
        return same and facts and sum(len(j.call) for j in [*jobs, job]) <= self.batch

    def _answer(self, jobs: Sequence[_Job]) -> None:
        try:
            score = self._scored(_joined([job.call for job in jobs]))
        except Exception as error:
            self.metrics.failure()
            if len(jobs) == 1:
                jobs[0].future.set_exception(error)
                return
            for job in jobs:  # whose fault it was shows when each is scored alone
                self._answer([job])
            return
        at = 0
        for job in jobs:
            job.future.set_result(score[at : at + len(job.call)])
            at += len(job.call)

    def _scored(self, call: Call) -> Score:
        size = self.batch if self.reward.info.scope == "pointwise" else len(call)
        scores = [self._called(part) for part in call.split(size)]
        return Score.cat(scores) if len(scores) > 1 else scores[0]

    def _called(self, call: Call) -> Score:
        start = time.perf_counter()
        media = Media(call.media.data.to(self.device))
        score = self.reward.score(media, call.prompts, call.context)
        if not isinstance(score, Score) or len(score) != len(call):
            raise TypeError(f"the reward did not return a Score of {len(call)} samples")
        unscored = len(score) - int(score.valid.sum())
        self.metrics.call(len(score), unscored, time.perf_counter() - start)
        return score


def _joined(calls: Sequence[Call]) -> Call:
    if len(calls) == 1:
        return calls[0]
    contexts = [c.context for c in calls if c.context is not None]
    return Call(
        Media.cat([c.media for c in calls]),
        sum((c.prompts for c in calls), ()),
        sum(contexts, ()) if contexts else None,
    )
