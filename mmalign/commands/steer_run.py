"""A steering run over many prompts: in chunks, resumable, compared with the unsteered pictures."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.commands.common import CommandError

if TYPE_CHECKING:
    from mmalign.protocols import Snapshot, Steered
    from mmalign.steering.folder import SteeringFolder
    from mmalign.types import Media, Score

CHUNK = 8  # prompts steered at once


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to steer and how.

    Attributes:
        policy: name or path; ``lora`` is loaded into it.
        reward: that steers.
        held_out: rewards that only look at the results.
        benchmark: a benchmark object whose judge is one more of these, with its requests.
        chunk: prompts steered at once; changes no picture.
    """

    policy: str
    prompts: Sequence[str]
    reward: str
    method: str
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    budget: str | None = None
    held_out: Sequence[str] = ()
    benchmark: Any = None
    requests: Sequence[Any] = ()
    lora: str | None = None
    device: str = "auto"
    chunk: int = CHUNK


class Run:
    """One run of a plan into a folder.

    Raises:
        CommandError: a held-out reward that is the steering reward.
        SettingsMismatchError: the folder holds another run.
    """

    def __init__(self, plan: Plan, out: Path) -> None:
        from eval.provenance import denoiser_digest
        from mmalign.policies.load import policy_on
        from mmalign.steering import build_steerer
        from mmalign.steering.budget import Budget
        from mmalign.steering.folder import SteeringFolder

        if plan.chunk < 1:
            raise CommandError(f"--chunk must be 1 or more, got {plan.chunk}")
        self.plan = plan
        self.steerer = build_steerer(plan.method, plan.seed, made(plan.options))
        limits = Budget.of(plan.budget).limits()
        self.reward = _guarded(plan.reward)
        self.held_out = {name: _guarded(name) for name in plan.held_out}
        for name, judge in self.held_out.items():
            if judge.identity == self.reward.identity:
                raise CommandError(
                    f"--held-out {name} is the reward that steers, so it says nothing new; name "
                    "another"
                )
        self.policy = policy_on(plan.policy, plan.device, plan.lora)
        self.settings: dict[str, Any] = {
            "policy": plan.policy, "weights": denoiser_digest(self.policy),
            "method": plan.method, "options": _plain(plan.options), "seed": plan.seed,
            "budget": limits, "reward": self.reward.identity,
            "held_out": {name: judge.identity for name, judge in self._judges().items()},
        }  # fmt: skip
        self.store: SteeringFolder = SteeringFolder(out, self.settings, plan.prompts)

    def go(self) -> None:
        """Steer what is missing, chunk by chunk."""
        missing = self.store.missing
        done = len(self.plan.prompts) - len(missing)
        if done:
            _note(f"{done} of {len(self.plan.prompts)} prompts were finished before")
        if len(missing) > self.plan.chunk:
            self._check_prompts(missing)
        progress = _Progress(len(self.plan.prompts), done)
        for at in range(0, len(missing), self.plan.chunk):
            rows = missing[at : at + self.plan.chunk]
            progress.starts(len(rows))
            self._steer(rows, progress)
            progress.ends([r["score"] for r in self.store.finished()])

    def _check_prompts(self, missing: Sequence[int]) -> None:
        """Stop at a prompt that does not fit now, not after the hours before its turn."""
        import torch

        with torch.no_grad():
            for text in dict.fromkeys(self.plan.prompts[i] for i in missing):
                self.policy.encode([text])

    def _judges(self) -> dict[str, Any]:
        found: dict[str, Any] = dict(self.held_out)
        if self.plan.benchmark is not None:
            found[f"{self.plan.benchmark.name} benchmark"] = self.plan.benchmark
        return found

    def _steer(self, rows: Sequence[int], progress: _Progress) -> None:
        from mmalign import api

        texts = [self.plan.prompts[i] for i in rows]
        plan = self.plan
        result = api.steer(
            self.policy,
            texts,
            self.reward.reward,
            self.steerer,
            budget=plan.budget,
            watch=progress.watch,
        )
        plain, bare = self._unsteered(result)
        scores = self._scores(result, plain, rows)
        for place, index in enumerate(rows):
            record = {**record_of(result, place), "unsteered_nfe": bare}
            record |= {name: part[place] for name, part in scores.items()}
            own = [i for i, line in enumerate(result.lineage) if line["prompt"] == place]
            self.store.add(
                index, record, result.media[[place]], plain[[place]], result.candidates[own]
            )

    def _unsteered(self, result: Steered) -> tuple[Media, float]:
        """What the first noise of each prompt gives without steering, and what one costs."""
        from mmalign.runtime.device import pick_dtype
        from mmalign.sampling.generate import generate
        from mmalign.steering.engine import initial_seed
        from mmalign.types import Media

        options = {n: getattr(self.steerer, n, None) for n in ("steps", "guidance_scale")}
        dtype = getattr(self.steerer, "dtype", None)
        precision = None if dtype is None else pick_dtype(dtype, self.policy.device)
        seeds = [initial_seed(self.plan.seed, text) for text in result.prompts]
        size = getattr(self.steerer, "batch_size", CHUNK)
        made, calls = [], 0
        for at in range(0, len(seeds), size):
            rows = slice(at, at + size)
            media, nfe = generate(
                self.policy, result.prompts[rows], seeds[rows], dtype=precision, **options
            )
            made.append(Media(media.data.float().cpu()))
            calls += nfe
        return Media.cat(made), calls / len(seeds)

    def _scores(self, result: Steered, plain: Media, rows: Sequence[int]) -> dict[str, list[Any]]:
        """Of each prompt: the steering reward without steering, and what held-out rewards say."""
        import torch

        texts = list(result.prompts)
        with torch.no_grad():
            unsteered = values(self.reward.score(plain, texts))
            held: list[dict[str, dict[str, float | None]]] = [{} for _ in texts]
            for name, judge in self._judges().items():
                pairs = [self._judged(judge, media, texts, rows) for media in (result.media, plain)]
                for i, (steered, bare) in enumerate(zip(*pairs, strict=True)):
                    held[i][name] = {"steered": steered, "unsteered": bare}
        return {"unsteered_score": unsteered, "held_out": held}

    def _judged(
        self, judge: Any, media: Media, texts: list[str], rows: Sequence[int]
    ) -> list[float | None]:
        if judge is self.plan.benchmark:
            return values(judge.judge(media, [self.plan.requests[i] for i in rows]))
        return values(judge.score(media, texts))


def made(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a method, with the functions and judges that were given by name.

    ``expand=FILE.py:NAME`` is a function of the user's own, ``critic=NAME`` a judge, whose options
    are ``critic_options``.
    """
    from vision_rewards.factory import load_reward, user_object

    found = dict(options)
    if isinstance(found.get("expand"), str):
        found["expand"] = user_object(found["expand"], "expansion")
    if isinstance(found.get("critic"), str):
        given = found.pop("critic_options", {})
        found["critic"] = load_reward({"reward": found["critic"], **given})
    return found


def record_of(result: Steered, place: int) -> dict[str, Any]:
    """What a result says about its prompt number ``place``, as plain data."""
    own = [i for i, line in enumerate(result.lineage) if line["prompt"] == place]
    found = values(result.candidate_scores)
    share, spent = len(result.prompts), result.spent
    rest = ("prompt",)
    return {
        "score": values(result.scores)[place],
        "chosen": own.index(result.chosen[place]),
        "candidates": [
            {**{k: v for k, v in result.lineage[i].items() if k not in rest}, "score": found[i]}
            for i in own
        ],
        "trace": [
            {k: v for k, v in line.items() if k not in rest}
            for line in result.trace if line.get("prompt", place) == place
        ],
        "nfe": spent.nfe / share, "reward_calls": spent.reward_calls / share,
        "decodes": spent.decodes / share, "seconds": spent.seconds / share,
        "memory": spent.memory,
    }  # fmt: skip


def values(score: Score) -> list[float | None]:
    """Scores as numbers, ``None`` where unscored."""
    pairs = zip(score.value.tolist(), score.valid.tolist(), strict=True)
    return [value if valid else None for value, valid in pairs]


def _guarded(name: str) -> Any:
    """A reward that leaves pictures unscored where it fails."""
    from vision_rewards.factory import load_reward
    from vision_rewards.guard import GuardedReward

    return GuardedReward(load_reward(name), max_failed_share=1.0)


class _Progress:
    """One line on standard error: prompts done, how far this chunk is, the current best."""

    EVERY = 2.0  # seconds between two lines of a log file

    def __init__(self, total: int, done: int) -> None:
        self.total, self.done, self.now = total, done, 0
        self.live = sys.stderr.isatty()
        self._last = self._start = time.monotonic()
        self._began = done

    def starts(self, prompts: int) -> None:
        self.now = prompts

    def watch(self, snapshot: Snapshot) -> None:
        """Say how far the chunk is; NaN marks prompts without a score yet."""
        known = snapshot.best[snapshot.best.isfinite()]
        best = f"{float(known.mean()):.4g}" if len(known) else "none yet"
        share = snapshot.done / max(snapshot.total, 1)
        self._say(f"prompts {self.done + 1}-{self.done + self.now} of {self.total}: "
                  f"{share:.0%}, best {best}")  # fmt: skip

    def ends(self, scores: Sequence[float | None]) -> None:
        self.done += self.now
        good = [s for s in scores if s is not None]
        mean = sum(good) / len(good) if good else float("nan")
        rate = (time.monotonic() - self._start) / max(self.done - self._began, 1)
        left = f", {rate * (self.total - self.done):.0f} s left" if self.done < self.total else ""
        text = f"{self.done} of {self.total} prompts, mean best {mean:.4g}{left}"
        self._say(text, always=True)

    def _say(self, text: str, always: bool = False) -> None:
        now = time.monotonic()
        if self.live:
            print(f"\r\x1b[2K{text}", end="\n" if always else "", file=sys.stderr, flush=True)
        elif always or now - self._last >= self.EVERY:
            _note(text)
            self._last = now


def _note(text: str) -> None:
    from mmalign.runtime.log import say

    say(text)


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as JSON keeps them; a function by its name."""
    known = (str, int, float, bool, type(None), list, tuple, dict)
    return {
        name: value if isinstance(value, known) else getattr(value, "__qualname__", repr(value))
        for name, value in options.items()
    }
