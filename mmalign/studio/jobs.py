"""Runs of the studio: one at a time, in a thread, told step by step to whoever watches."""

from __future__ import annotations

import base64
import io
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mmalign.config import apply_overrides
from mmalign.protocols import Snapshot, Steered
from mmalign.types import Media, Score

SHOWN = 24  # candidates sent to the page
KEPT = 32  # finished runs whose events are kept
Story = Callable[[Steered], str]


class StoppedError(Exception):
    """The person has seen enough."""


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What a person asks for.

    Attributes:
        held_out: a reward that only looks at the results; empty for none.
        options: of the method, as text: ``n=8``.
        budget: as :meth:`mmalign.steering.Budget.of` takes it; empty for none.

    Raises:
        ValueError: an empty prompt.
    """

    prompt: str
    policy: str = "shapes-flow"
    reward: str = "shapes_partial"
    method: str = "best_of_n"
    held_out: str = ""
    options: tuple[str, ...] = ()
    budget: str = ""
    seed: int = 0
    lora: str = ""

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError("the prompt is empty: say what the picture should show")


@dataclass
class Job:
    """One run and everything said about it so far."""

    number: int
    wish: Wish
    events: list[dict[str, Any]] = field(default_factory=list)
    over: bool = False
    stopped: threading.Event = field(default_factory=threading.Event)
    news: threading.Condition = field(default_factory=threading.Condition)

    def tell(self, event: str, **facts: Any) -> None:
        """Add an event; ``done``, ``stopped`` and ``failed`` are the last."""
        with self.news:
            self.events.append({"event": event, **facts})
            self.over = event in ("done", "stopped", "failed")
            self.news.notify_all()

    def listen(self, patience: float = 0.5) -> Iterator[dict[str, Any] | None]:
        """Every event from the first; ``None`` while there is nothing new."""
        at = 0
        while True:
            with self.news:
                if at >= len(self.events) and not self.over:
                    self.news.wait(patience)
                fresh, over = self.events[at:], self.over
            if fresh:
                yield from fresh
            else:
                yield None
            at += len(fresh)
            if over and at >= len(self.events):
                return


class Studio:
    """Generators, rewards and runs of one person on one machine.

    Args:
        load_reward: from what a person writes to a reward model.
        steer: :func:`mmalign.api.steer`.
        story: draws what happened in a run; ``None`` draws nothing.
        device: where generators live.
    """

    def __init__(
        self, load_reward: Callable[[str], Any], steer: Callable[..., Steered],
        story: Story | None = None, device: str = "auto",
    ) -> None:  # fmt: skip
        self._load_reward, self._steer, self._story = load_reward, steer, story
        self.device = device
        self.jobs: OrderedDict[int, Job] = OrderedDict()
        self._policies: OrderedDict[tuple[str, str], Any] = OrderedDict()
        self._rewards: OrderedDict[str, Any] = OrderedDict()
        self._turn, self._count = threading.Lock(), 0

    def start(self, wish: Wish) -> Job:
        """Begin a run, behind those that wait already."""
        self._count += 1
        job = self.jobs[self._count] = Job(self._count, wish)
        finished = [number for number, one in self.jobs.items() if one.over]
        for number in finished[: max(0, len(self.jobs) - KEPT)]:
            del self.jobs[number]
        threading.Thread(target=self._run, args=(job,), daemon=True).start()
        return job

    def close(self) -> None:
        """Stop whatever runs."""
        for job in self.jobs.values():
            job.stopped.set()

    def _run(self, job: Job) -> None:
        with self._turn:
            try:
                self._check(job)
                self._work(job)
            except StoppedError:
                job.tell("stopped")
            except Exception as error:
                job.tell("failed", message=str(error) or type(error).__name__)

    def _check(self, job: Job) -> None:
        if job.stopped.is_set():
            raise StoppedError

    def _work(self, job: Job) -> None:
        wish = job.wish
        from mmalign.steering import build_steerer
        from mmalign.steering.budget import Budget

        steerer = build_steerer(wish.method, wish.seed, apply_overrides({}, wish.options))
        Budget.of(wish.budget or None)
        job.tell("loading", what=f"{wish.policy}, {wish.reward}")
        reward, judge = self._reward(wish.reward), None
        if wish.held_out:
            judge = self._reward(wish.held_out)
            if judge.identity == reward.identity:
                raise ValueError(
                    f"{wish.held_out} is the reward that steers; judge results by another"
                )
        policy = self._policy(wish)
        self._check(job)
        plain = self._unsteered(job, policy, steerer, reward, judge)
        watch = _Watch(job)
        result = self._steer(
            policy, wish.prompt, reward, steerer, budget=wish.budget or None, watch=watch
        )
        story = "" if self._story is None else self._story(result)
        job.tell("done", **_told(result, judge, wish), story=story, unsteered=plain)

    def _unsteered(self, job: Job, policy: Any, steerer: Any, reward: Any, judge: Any) -> Any:
        """The plain picture of the first noise, told before steering begins."""
        from mmalign.runtime.device import pick_dtype
        from mmalign.sampling.generate import generate
        from mmalign.steering.engine import check_steerable, initial_seed

        wish = job.wish
        check_steerable(policy, reward, [wish.prompt], wish.method)
        dtype = getattr(steerer, "dtype", None)
        media, nfe = generate(
            policy, [wish.prompt], [initial_seed(wish.seed, wish.prompt)],
            steps=getattr(steerer, "steps", None),
            guidance_scale=getattr(steerer, "guidance_scale", None),
            dtype=None if dtype is None else pick_dtype(dtype, policy.device),
        )  # fmt: skip
        facts = {
            "picture": picture(media), "score": _score(reward, media, wish.prompt), "nfe": nfe,
            "held_out": None if judge is None else _score(judge, media, wish.prompt),
        }  # fmt: skip
        job.tell("unsteered", **facts)
        return facts

    def _policy(self, wish: Wish) -> Any:
        from mmalign.policies.load import policy_on

        def make() -> Any:
            self._policies.clear()  # the old one's memory, before the new one needs it
            return policy_on(wish.policy, self.device, wish.lora or None)

        return _cached(self._policies, (wish.policy, wish.lora), make, 1)

    def _reward(self, name: str) -> Any:
        return _cached(self._rewards, name, lambda: self._load_reward(name), 4)


class _Watch:
    """Turns snapshots into events, at most ten a second, and stops the run when asked to."""

    EVERY = 0.1

    def __init__(self, job: Job) -> None:
        self.job, self.start, self.last = job, time.monotonic(), 0.0
        self.best = -math.inf

    def __call__(self, snapshot: Snapshot) -> None:
        if self.job.stopped.is_set():
            raise StoppedError
        now = time.monotonic()
        best = float(snapshot.best[0])
        better = math.isfinite(best) and best > self.best
        if not better and now - self.last < self.EVERY:
            return
        self.last = now
        facts: dict[str, Any] = {}
        if better:
            self.best = best
            facts["picture"] = None if snapshot.media is None else picture(snapshot.media)
        self.job.tell(
            "progress", done=snapshot.done, total=snapshot.total, seconds=now - self.start,
            best=best if math.isfinite(best) else None, **facts,
        )  # fmt: skip


def picture(media: Media) -> str:
    """The first picture (or first frame) as a ``data:`` address."""
    buffer = io.BytesIO()
    media[[0]].to_pil()[0].save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _told(result: Steered, judge: Any, wish: Wish) -> dict[str, Any]:
    rows = range(min(len(result.candidates), SHOWN))
    spent = result.spent
    return {
        "picture": picture(result.media),
        "score": _values(result.scores)[0],
        "held_out": None if judge is None else _score(judge, result.media, wish.prompt),
        "chosen": result.chosen[0],
        "candidates": [
            {"picture": picture(result.candidates[[i]]), "score": value,
             **_words(result.lineage[i])}
            for i, value in zip(rows, _values(result.candidate_scores), strict=False)
        ],
        "left_out": len(result.candidates) - len(rows),
        "spent": {"nfe": spent.nfe, "reward_calls": spent.reward_calls,
                  "decodes": spent.decodes, "seconds": spent.seconds, "memory": spent.memory},
    }  # fmt: skip


def _words(line: Mapping[str, Any]) -> dict[str, Any]:
    return {k: line[k] for k in ("seed", "text", "weight") if k in line}


def _score(reward: Any, media: Media, prompt: str) -> float | None:
    import torch

    with torch.no_grad():
        return _values(reward.score(media, [prompt]))[0]


def _values(score: Score) -> list[float | None]:
    pairs = zip(score.value.tolist(), score.valid.tolist(), strict=True)
    return [value if valid and math.isfinite(value) else None for value, valid in pairs]


def _cached(kept: OrderedDict[Any, Any], key: Any, make: Callable[[], Any], most: int) -> Any:
    if key not in kept:
        kept[key] = make()
    kept.move_to_end(key)
    while len(kept) > most:
        kept.popitem(last=False)
    return kept[key]
