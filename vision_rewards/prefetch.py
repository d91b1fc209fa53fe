"""Scoring beside other work: batches are handed over and collected later, in order."""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch

from mmalign.protocols import RewardModel
from mmalign.types import Media, Score

_Work = tuple["Future[Score]", Media, Sequence[str], "Sequence[Mapping[str, Any]] | None"]


class Prefetch:
    """Calls a reward on a thread of its own, one batch after the other, in the order they came.

    The reward sees the calls it would see without the thread, so scores are the same. No gradients
    are kept. What the reward raises, every later batch raises too, as it would end a plain loop.
    Use it as a context manager: leaving early (an exception) gives up what is queued.

    Args:
        reward: the reward model; nobody else may use it meanwhile.
        depth: batches that may wait; beyond it :meth:`submit` blocks, so that a slow reward holds
            the generator back instead of filling the memory.

    Raises:
        ValueError: ``depth`` below 1.
    """

    def __init__(self, reward: RewardModel, depth: int = 2) -> None:
        if depth < 1:
            raise ValueError(f"depth is {depth}; at least 1 batch must be able to wait")
        self.reward = reward
        self._queue: queue.Queue[_Work | None] = queue.Queue(depth)
        self._submitted: list[Future[Score]] = []
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def submit(
        self,
        media: Media,
        prompts: Sequence[str],
        context: Sequence[Mapping[str, Any]] | None = None,
    ) -> Future[Score]:
        """Queue a batch; the future gets its score, or what the reward raised.

        Raises:
            RuntimeError: after :meth:`close`.
        """
        if self._stop.is_set() or not self._thread.is_alive():
            raise RuntimeError("this prefetch is closed; make another one")
        future: Future[Score] = Future()
        self._submitted.append(future)
        self._queue.put((future, media, prompts, context))
        return future

    def results(self) -> Score:
        """Wait for the scores of everything submitted so far, in that order, as one.

        Raises:
            ValueError: nothing was submitted. What the reward raised passes through.
        """
        if not self._submitted:
            raise ValueError("nothing was submitted, so there are no scores to wait for")
        return Score.cat([future.result() for future in self._submitted])

    def close(self, finish: bool = True) -> None:
        """End the thread, after what is queued has been scored or, without ``finish``, at once.

        A batch that is being scored is always finished: its reward cannot be interrupted.
        """
        if not finish:
            self._stop.set()
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
        self._stop.set()

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(finish=kind is None)

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            future, media, prompts, context = work
            if self._stop.is_set():
                future.cancel()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                if self._error is not None:
                    raise self._error
                with torch.no_grad(), _on_device_of(media):
                    score = self.reward.score(media, prompts, context)
            except BaseException as error:  # whatever it is, it belongs to who asked
                self._error = error
                future.set_exception(error)
            else:
                future.set_result(score)


def _on_device_of(media: Media) -> AbstractContextManager[Any]:
    """A new thread starts on the first GPU, whichever one its parent chose."""
    device = media.data.device
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
