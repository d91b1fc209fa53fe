"""Best of N: sample N, keep the one the reward likes best.

The plainest way to spend computation at inference time, and the baseline every other method has
to beat at equal function evaluations (Ma et al., 2501.09732, call it random search over noises).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mmalign.protocols import Policy, RewardModel, Steered
from mmalign.runtime.device import pick_dtype
from mmalign.runtime.progress import track
from mmalign.runtime.seeds import stable_seed
from mmalign.sampling.conditioning import ConditioningCache
from mmalign.sampling.generate import autocast, generate
from mmalign.types import Media, Score


@dataclass(frozen=True, kw_only=True)
class BestOfN:
    """Sample ``n`` candidates a prompt and keep the best scored one.

    Candidate ``i`` of a prompt has a noise seed made of ``seed``, the prompt and ``i`` alone.
    The candidates of a larger ``n`` therefore contain those of a smaller one, and two equal
    prompts in one list get equal pictures.

    Args:
        n: candidates a prompt.
        seed: another seed gives other candidates.
        batch_size: pictures generated and scored at once, across prompts; changes no candidate.
        steps, guidance_scale: ``None`` takes the policy's recommended sampler.
        dtype: autocast precision (``fp32``, ``bf16``, ``fp16``, ``auto``); ``None`` leaves the
            weights' own.

    Raises:
        ValueError: ``n``, ``batch_size`` or ``steps`` below 1.
    """

    n: int = 8
    seed: int = 0
    batch_size: int = 32
    steps: int | None = None
    guidance_scale: float | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        for name in ("n", "batch_size", "steps"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"best_of_n: {name} must be a whole number from 1, got {value!r}")

    def run(self, policy: Policy, reward: RewardModel, prompts: Sequence[str]) -> Steered:
        """Steer one sample per prompt.

        ``lineage`` gives each candidate its prompt (an index), seed and rank among the candidates
        of its prompt: 1 is the chosen one, ``None`` was not scored. Ties go to the earlier
        candidate. ``reward_calls`` counts scored pictures, so it does not depend on ``batch_size``.
        Candidates are kept on the CPU.

        Raises:
            ValueError: no prompts, a prompt the text encoder does not take, or a reward that
                cannot judge this policy's media (all before the denoiser is first called); or a
                prompt none of whose candidates could be scored.
        """
        check_steerable(policy, reward, prompts)
        seeds = [stable_seed("best_of_n", self.seed, p, i) for p in prompts for i in range(self.n)]
        media, scores, nfe = self._candidates(policy, reward, prompts, seeds)
        ranks = [r for rows in self._rows(len(prompts)) for r in _ranks(scores, rows)]
        chosen = tuple(i for i, rank in enumerate(ranks) if rank == 1)
        lineage = [
            {"prompt": i // self.n, "seed": seed, "rank": rank}
            for i, (seed, rank) in enumerate(zip(seeds, ranks, strict=True))
        ]
        return Steered(
            prompts=tuple(prompts),
            media=media[chosen],
            scores=scores[chosen],
            chosen=chosen,
            candidates=media,
            candidate_scores=scores,
            lineage=tuple(lineage),
            nfe=nfe,
            reward_calls=len(seeds),
        )

    def _rows(self, prompts: int) -> list[range]:
        """Which candidates belong to each prompt."""
        return [range(p * self.n, (p + 1) * self.n) for p in range(prompts)]

    @torch.no_grad()
    def _candidates(
        self, policy: Policy, reward: RewardModel, prompts: Sequence[str], seeds: Sequence[int]
    ) -> tuple[Media, Score, int]:
        """All candidates, prompt by prompt, their scores, and network evaluations spent."""
        dtype = None if self.dtype is None else pick_dtype(self.dtype, policy.device)
        encode = ConditioningCache(policy)
        with autocast(policy.device, dtype):  # a prompt that does not fit stops here
            for at in range(0, len(prompts), self.batch_size):
                encode(prompts[at : at + self.batch_size])
        media: list[Media] = []
        scores: list[Score] = []
        spent = done = 0
        with track("candidates", len(seeds)) as advance:
            for at in range(0, len(seeds), self.batch_size):
                rows = range(at, min(at + self.batch_size, len(seeds)))
                texts = [prompts[i // self.n] for i in rows]
                made, nfe = generate(
                    policy, texts, seeds[at : rows.stop], steps=self.steps,
                    guidance_scale=self.guidance_scale, dtype=dtype, encode=encode,
                )  # fmt: skip
                scores.append(_on_cpu(reward.score(made, texts)))
                media.append(Media(made.data.cpu()))
                spent += nfe
                done = self._check_scored(reward, prompts, scores, done)
                advance(len(rows))
        return Media.cat(media), Score.cat(scores), spent

    def _check_scored(
        self, reward: RewardModel, prompts: Sequence[str], scores: Sequence[Score], done: int
    ) -> int:
        """Stop at the first finished prompt without a single score; returns finished prompts."""
        finished = sum(map(len, scores)) // self.n
        if finished == done:
            return done
        so_far = Score.cat(scores)
        for prompt, rows in zip(prompts[done:finished], self._rows(finished)[done:], strict=True):
            if any(_scored(so_far, i) for i in rows):
                continue
            notes = [so_far.notes[i] for i in rows if so_far.notes and so_far.notes[i]]
            said = "; ".join(list(dict.fromkeys(notes))[:3]) or "it gave no reason"
            raise ValueError(
                f"prompt {prompt!r}: reward {reward.info.name!r} could score none of the {self.n} "
                f"candidates ({said}). Raise n, or use a reward that judges these pictures."
            )
        return finished


def check_steerable(policy: Policy, reward: RewardModel, prompts: Sequence[str]) -> None:
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
        raise ValueError(f"reward {info.name!r} judges a {info.scope}; best_of_n needs single ones")
    lacking = [need for need in info.needs if need != "prompt"]
    if lacking:
        raise ValueError(
            f"reward {info.name!r} needs {', '.join(lacking)}, which steering does not have; "
            "it has prompts only"
        )


def _scored(scores: Score, i: int) -> bool:
    return bool(scores.valid[i]) and math.isfinite(float(scores.value[i]))


def _ranks(scores: Score, rows: range) -> list[int | None]:
    """Rank of each of ``rows``, 1 for the highest score, ``None`` where there is none."""
    order = sorted((i for i in rows if _scored(scores, i)), key=lambda i: -float(scores.value[i]))
    return [order.index(i) + 1 if i in order else None for i in rows]


def _on_cpu(score: Score) -> Score:
    parts = {name: part.detach().cpu() for name, part in score.parts.items()}
    value, valid = score.value.detach().cpu(), score.valid.cpu()
    return Score(value, valid, parts, score.notes, score.identity)
