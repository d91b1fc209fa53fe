"""What every steering method is written on: a policy and a reward, batched, counted and checked.

Rows of a method are particles, candidates or noises; ``owners`` says which prompt each belongs to.
All calls are split into network batches of ``batch_size`` rows, whatever the prompts: the size
changes no result beyond rounding. Gradients follow the caller's grad mode.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from mmalign.protocols import Policy, RewardModel, Snapshot, Steered
from mmalign.runtime.device import pick_dtype
from mmalign.runtime.log import say
from mmalign.runtime.seeds import stable_seed
from mmalign.sampling.conditioning import ConditioningCache
from mmalign.sampling.fit import deterministic
from mmalign.sampling.generate import autocast, evaluations
from mmalign.sampling.process import split
from mmalign.steering.budget import Budget, BudgetError, Meter
from mmalign.types import Conditioning, Media, Score

T = TypeVar("T")
Watch = Callable[[Snapshot], None]


class Engine:
    """A policy, a reward and prompts, as a steering method sees them.

    Args:
        method: its registered name, for errors and seeds.
        budget: limits for each prompt.
        watch: called with every :class:`~mmalign.protocols.Snapshot` the method gives.
        steps, guidance_scale: ``None`` takes the policy's recommended sampler.
        dtype: autocast precision (``fp32``, ``bf16``, ``fp16``, ``auto``); ``None`` leaves the
            weights' own.
        batch_size: rows per network call, decode and reward call.
        gradient: the method differentiates the reward.

    Raises:
        ValueError: no prompts, a prompt the text encoder does not take, or a reward that cannot
            judge this policy's media one at a time or has no gradient where one is needed. All
            before the denoiser is first called.
    """

    def __init__(
        self,
        policy: Policy,
        reward: RewardModel,
        prompts: Sequence[str],
        *,
        method: str,
        budget: Budget | Mapping[str, Any] | str | None = None,
        watch: Watch | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        dtype: str | None = None,
        batch_size: int = 32,
        gradient: bool = False,
    ) -> None:
        check_steerable(policy, reward, prompts, method, gradient)
        self.policy, self.reward, self.prompts = policy, reward, tuple(prompts)
        self.method, self.watch, self.batch_size = method, watch, batch_size
        self.steps = steps or policy.sampler.steps
        scale = policy.sampler.guidance_scale if guidance_scale is None else guidance_scale
        self.guidance_scale = scale
        self.dtype = None if dtype is None else pick_dtype(dtype, policy.device)
        policy.denoiser.eval()
        encode = ConditioningCache(policy)
        with torch.no_grad(), autocast(policy.device, self.dtype):
            self._conditioning = encode(self.prompts)  # a prompt that does not fit stops here
        self.meter = Meter(Budget.of(budget), len(self.prompts), policy.device)
        self._best = _Best(len(self.prompts))

    def using(self, conditioning: Conditioning, policy: Policy | None = None) -> Engine:
        """This engine, on the same bill, with other conditioning of its prompts (one row each).

        Pictures are still scored against the prompts themselves. ``policy`` is another view of
        the same network, such as one with a guidance of its own.
        """
        other = copy.copy(self)
        other._conditioning = conditioning
        other.policy = policy or self.policy
        return other

    # -- rows ----------------------------------------------------------------------------------

    def owners(self, each: int) -> Tensor:
        """Prompt numbers of ``each`` rows a prompt: ``0 0 .. 1 1 ..``, int64."""
        return torch.arange(len(self.prompts)).repeat_interleave(each)

    def texts(self, owners: Tensor) -> list[str]:
        """The prompt of every row."""
        return [self.prompts[i] for i in owners.tolist()]

    def conditioning(self, owners: Tensor) -> Conditioning:
        """Encoded prompts of rows."""
        return self._conditioning[owners]

    def seeds(self, owners: Tensor, *key: Any, seed: int = 0, first: int = 0) -> list[int]:
        """A seed for each row, of ``seed``, its prompt and its number in the prompt.

        Rows of a larger count therefore contain those of a smaller one, and a prompt's seeds do
        not depend on the other prompts. Without ``key`` they are the initial noises, candidate by
        candidate the same ones for every method, so that methods are compared on equal noise;
        ``key`` names draws of the method's own.

        Args:
            first: number of each prompt's first row, where it has had others before.
        """
        counts: dict[int, int] = {}
        own = (self.method, *key) if key else ()
        found = []
        for owner in owners.tolist():
            number = counts[owner] = counts.get(owner, first - 1) + 1
            found.append(initial_seed(seed, self.prompts[owner], number, *own))
        return found

    @property
    def evaluations(self) -> int:
        """Network evaluations of one row's prediction: 2 with guidance.

        A policy with a guidance of its own says in ``branches`` how many it takes.
        """
        own: int | None = getattr(self.policy, "branches", None)
        return own or evaluations(1, self.guidance_scale, self._conditioning)

    def afford(self, wanted: int, what: str, **cost: int) -> int:
        """``wanted`` units of ``cost`` a prompt, or as many as the budget allows.

        Raises:
            BudgetError: not even one.
        """
        most = self.meter.most(**cost)
        if most < 1:
            need = ", ".join(f"{n}={c}" for n, c in cost.items() if c)
            limits = ", ".join(f"{n}={v:g}" for n, v in self.meter.budget.limits().items())
            raise BudgetError(
                f"{self.method}: the budget ({limits} for each prompt) does not allow one {what}, "
                f"which takes {need}; raise it, or lower steps or guidance"
            )
        return wanted if math.isinf(most) else min(wanted, int(most))

    # -- what costs ----------------------------------------------------------------------------

    def in_batches(self, rows: int, call: Callable[[slice], T]) -> list[T]:
        """``call`` for consecutive slices of at most ``batch_size`` rows.

        Where a GPU runs out of memory the batch is halved for good and the slice tried again.
        """
        found: list[T] = []
        at = 0
        while at < rows:
            part = slice(at, min(at + self.batch_size, rows))
            try:
                with self.meter.work():
                    found.append(call(part))
            except torch.OutOfMemoryError:
                if part.stop - at == 1:
                    raise
                self.batch_size = (part.stop - at) // 2
                torch.cuda.empty_cache()
                say(f"out of GPU memory: going on with batches of {self.batch_size}")
                continue
            at = part.stop
        return found

    def predict(self, x: Tensor, sigma: Tensor, owners: Tensor) -> Tensor:
        """Guided network output for rows ``x`` at ``sigma`` (scalar or ``(B,)``), fp32."""
        self.meter.nfe += len(x) * self.evaluations

        def call(rows: slice) -> Tensor:
            level = sigma[rows] if sigma.ndim else sigma
            given = self.conditioning(owners[rows])
            return self.policy.predict(x[rows], level, given, self.guidance_scale)

        with autocast(self.policy.device, self.dtype):
            return torch.cat(self.in_batches(len(x), call))

    def estimate(self, x: Tensor, sigma: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
        """Clean latents and noise that a prediction stands for."""
        return split(self.policy.parameterisation, x, sigma, prediction)

    def decode(self, latents: Tensor) -> Media:
        """Latents to media, in chunks."""
        self.meter.decodes += len(latents)
        with autocast(self.policy.device, self.dtype):
            parts = self.in_batches(len(latents), lambda rows: self.policy.decode(latents[rows]))
        return Media.cat(parts) if len(parts) > 1 else parts[0]

    def score(self, media: Media, owners: Tensor) -> Score:
        """Scores of rows against their own prompts; unscored ones are ``valid=False``."""
        self.meter.reward_calls += len(media)
        texts = self.texts(owners)
        parts = self.in_batches(
            len(media), lambda rows: self.reward.score(media[rows], texts[rows])
        )
        found = Score.cat(parts) if len(parts) > 1 else parts[0]
        if self.watch is not None:
            self._best.see(media, found, owners)
        return found

    def judge(
        self,
        latents: Tensor,
        owners: Tensor,
        decoder: Callable[[Tensor], Media] | None = None,
    ) -> tuple[Media, Score]:
        """Decode and score, chunk by chunk; pictures come back on the CPU, in fp32.

        ``decoder`` is used in place of the policy's.
        """
        media, scores = [], []
        for rows in torch.arange(len(latents)).split(self.batch_size):
            if decoder is None:
                made = self.decode(latents[rows])
            else:
                self.meter.decodes += len(rows)
                made = decoder(latents[rows])
            scores.append(self.score(made, owners[rows]))
            media.append(Media(made.data.detach().float().cpu()))
        return Media.cat(media), Score.cat(scores)

    def integrate(self, x: Tensor, owners: Tensor, sigmas: Tensor | None = None) -> Tensor:
        """Deterministic steps along ``sigmas`` (the sampler's own grid by default)."""
        sigmas = self.sigmas() if sigmas is None else sigmas
        kernel = deterministic(self.policy.parameterisation)
        for k in range(len(sigmas) - 1):
            prediction = self.predict(x, sigmas[k], owners)
            x = kernel.step(x, sigmas[k], sigmas[k + 1], prediction).x_next
        return x

    def sigmas(self) -> Tensor:
        """Noise levels of the sampler, ``(steps + 1,)``."""
        return self.policy.sigmas(self.steps)

    # -- what comes out ------------------------------------------------------------------------

    def show(self, done: int, total: int, best: Tensor, media: Media | None = None) -> None:
        """Tell whoever watches; without ``media``, with the best pictures scored so far."""
        if self.watch is not None:
            shown = self._best.media() if media is None else media
            self.watch(Snapshot(done, total, best.detach().cpu().clone(), shown))

    def finish(
        self,
        candidates: Media,
        scores: Score,
        owners: Tensor,
        lineage: Sequence[Mapping[str, Any]],
        trace: Sequence[Mapping[str, Any]] = (),
        order: Tensor | None = None,
    ) -> Steered:
        """The best candidate of each prompt, and everything else, on the CPU.

        Args:
            lineage: what is known of each candidate; prompt and rank are added.
            order: ``(B,)``, what ranks candidates where it is not their score; unscored ones are
                never chosen.

        Raises:
            ValueError: no candidate of a prompt could be scored; quotes the reasons.
        """
        self.meter.release()
        scores = on_cpu(scores)
        self.check_scored(scores, owners)
        keys = scores.value if order is None else order.detach().float().cpu()
        ranks: list[int | None] = [None] * len(owners)
        for prompt in range(len(self.prompts)):
            rows = torch.nonzero((owners == prompt) & scored(scores)).flatten().tolist()
            for rank, row in enumerate(sorted(rows, key=lambda i: -float(keys[i])), 1):
                ranks[row] = rank
        chosen = {int(owners[i]): i for i, rank in enumerate(ranks) if rank == 1}
        picked = tuple(chosen[p] for p in range(len(self.prompts)))
        media = Media(candidates.data.detach().float().cpu())
        records = [
            {"prompt": int(owners[i]), **dict(line), "rank": ranks[i]}
            for i, line in enumerate(lineage)
        ]
        return Steered(
            self.prompts, media[picked], scores[picked], picked, media, scores,
            tuple(records), self.meter.spent(), tuple(trace),
        )  # fmt: skip

    def check_scored(self, scores: Score, owners: Tensor) -> None:
        """Stop at a prompt that has candidates, none of which could be scored.

        Raises:
            ValueError: names the prompt and the reward's reasons.
        """
        good = scored(scores)
        for prompt in owners.unique().tolist():
            rows = torch.nonzero(owners == prompt).flatten().tolist()
            if any(bool(good[i]) for i in rows):
                continue
            notes = [scores.notes[i] for i in rows if scores.notes and scores.notes[i]]
            said = "; ".join(list(dict.fromkeys(notes))[:3]) or "it gave no reason"
            raise ValueError(
                f"prompt {self.prompts[prompt]!r}: reward {self.reward.info.name!r} could score "
                f"none of the {len(rows)} candidates ({said}). Raise n, or use a reward that "
                "judges these pictures."
            )


class _Best:
    """The best scored picture of each prompt so far, kept on the CPU for whoever watches."""

    def __init__(self, prompts: int) -> None:
        self._values = torch.full((prompts,), -torch.inf)
        self._pictures: dict[int, Tensor] = {}

    def see(self, media: Media, scores: Score, owners: Tensor) -> None:
        values, good = scores.value.detach().cpu(), scored(scores).cpu()
        for row, prompt in enumerate(owners.tolist()):
            if good[row] and values[row] > self._values[prompt]:
                self._values[prompt] = values[row]
                self._pictures[prompt] = media.data[row].detach().float().cpu()

    def media(self) -> Media | None:
        if len(self._pictures) < len(self._values):
            return None
        return Media(torch.stack([self._pictures[i] for i in range(len(self._values))]))


def initial_seed(seed: int, prompt: str, number: int = 0, *key: Any) -> int:
    """The seed of the initial noise of candidate ``number`` of a prompt, whatever the method.

    The plain sampler makes of the first one the picture to compare steered ones with. ``key`` is
    for draws that are no candidate's initial noise.
    """
    return stable_seed("steering", seed, prompt, *key, number)


def scored(scores: Score) -> Tensor:
    """Which rows have a finite score, ``(B,)`` bool."""
    return scores.valid & torch.isfinite(scores.value)


def check_steerable(
    policy: Policy, reward: RewardModel, prompts: Sequence[str], method: str, gradient: bool = False
) -> None:
    """Whether ``reward`` can judge what ``policy`` makes for ``prompts``, one picture at a time.

    Raises:
        ValueError: it cannot; says why.
    """
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"steering needs a non-empty list of prompts, got {prompts!r}")
    info = reward.info
    if policy.media not in info.media:
        takes = ", ".join(info.media)
        raise ValueError(f"reward {info.name!r} judges {takes}; {policy.name} makes {policy.media}")
    if info.scope != "pointwise":
        raise ValueError(f"reward {info.name!r} judges a {info.scope}; {method} needs single ones")
    lacking = [need for need in info.needs if need != "prompt"]
    if lacking:
        raise ValueError(
            f"reward {info.name!r} needs {', '.join(lacking)}, which steering does not have; "
            "it has prompts only"
        )
    if gradient and not info.differentiable:
        raise ValueError(
            f"{method} follows the gradient of the reward, and {info.name!r} has none. Use a "
            "differentiable one (mmalign list rewards says which are), or a method that only looks "
            "at scores: best_of_n, fk, zero_order"
        )


def on_cpu(score: Score) -> Score:
    """The same score without its graph, on the CPU."""
    parts = {name: part.detach().cpu() for name, part in score.parts.items()}
    value, valid = score.value.detach().cpu(), score.valid.cpu()
    return Score(value, valid, parts, score.notes, score.identity)
