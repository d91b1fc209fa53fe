r"""Generate, critique, refine: better wordings of the prompt (RationalRewards, 2604.11626).

A picture is made of the prompt :math:`c`; a critic scores it, says what is wrong and words the
prompt anew; a picture is made of the new wording, from the *same* noise, so that only the words
differ; and so on:

.. math:: x_t = G(z, c_t), \quad c_0 = c, \quad c_{t+1} = \mathrm{refined}(x_t, c), \qquad
   \hat x = \arg\max_t\, r(x_t, c)

Two things depart from the published loop, which keeps the last picture. Every picture is scored
against the **original** prompt, or drift of the wording would be rewarded; and the best picture so
far is kept, so the score never falls from round to round. As published, a picture all of whose
aspects reach the threshold is not refined, and an answer that cannot be read leaves the prompt as
it was, which with the same noise is the same picture: the prompt is then done.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch

from mmalign.protocols import Critic, Policy, Review, RewardModel, Steered
from mmalign.registry import REWARDS
from mmalign.runtime.progress import track
from mmalign.sampling.conditioning import ConditioningCache
from mmalign.steering.common import Pool, Sampling, values_of
from mmalign.steering.engine import Engine, Watch
from mmalign.steering.prompt_guidance import OriginalCentred, paired
from mmalign.types import Conditioning, Media, Score

Expand = Callable[[str], "str | Sequence[str]"]


@dataclass(frozen=True, kw_only=True)
class Refine(Sampling):
    """Refine prompts with a critic, or with a function of the user's own.

    Args:
        rounds: pictures after the first; the paper's is 1.
        critic: whoever reviews pictures, or a registered judge's name; ``None`` takes the reward
            itself where it can, and then one answer gives score and critique.
        critic_options: options of a critic given by name, as ``{"url": ...}``.
        threshold: a picture all of whose aspects the critic scores this high is not refined; 3 of
            4 is the paper's. ``None`` refines in every round.
        expand: a function that returns one wording of a prompt, or several. Without a critic its
            wordings are tried one a round; with one, where the critic's answer is of no use.
        keep: share of the guidance that stays with the original prompt, in [0, 1], the rest
            following the new wording (:mod:`mmalign.steering.prompt_guidance`; Parrot's is 0.5);
            ``None`` generates from the new wording alone.

    Raises:
        ValueError: an option out of range, or options of a critic that has no name.
    """

    method: ClassVar[str] = "refine"

    rounds: int = 1
    critic: Critic | str | None = None
    critic_options: Mapping[str, Any] = field(default_factory=dict)
    threshold: float | None = 3.0
    expand: Expand | None = None
    keep: float | None = None

    def __post_init__(self) -> None:
        self.check(rounds=0)
        if self.keep is not None and not 0 <= self.keep <= 1:
            raise ValueError(f"refine: keep must lie in [0, 1], got {self.keep}")
        if self.critic_options and not isinstance(self.critic, str):
            raise ValueError("refine: critic_options belong to a critic given by name")
        if self.expand is not None and not callable(self.expand):
            raise ValueError(f"refine: expand must be a function of a prompt, got {self.expand!r}")

    @torch.no_grad()
    def run(
        self, policy: Policy, reward: RewardModel, prompts: Sequence[str], *, budget: Any = None,
        watch: Watch | None = None,
    ) -> Steered:  # fmt: skip
        """Steer one sample per prompt.

        ``lineage`` and ``trace`` hold the wording of each round; reviews count as reward calls.

        Raises:
            ValueError: neither critic nor function, ``keep`` on a model without guidance, or as
                :class:`~mmalign.steering.engine.Engine` says. BudgetError: the budget does not
                allow one sample.
        """
        critic, own = self._critic(reward)
        engine = self.engine(policy, reward, prompts, budget, watch)
        reviewing = _Reviewing(reward, critic) if own and critic is not None else None
        engine.reward = reviewing or reward
        judged = 1 if reviewing or critic is None else 2
        cost = {"nfe": engine.steps * self._branches(engine), "decodes": 1, "reward_calls": judged}
        rounds = engine.afford(1 + self.rounds, "round", **cost)
        loop = _Loop(self, engine, rounds, critic, reviewing)
        with track("rounds", rounds, enabled=watch is None) as advance:
            for number in range(rounds):
                if not loop.live or (number and not engine.meter.allows()):
                    break
                loop.round(number)
                advance(1, f"best {float(loop.pool.best.mean()):.3f}")
        return loop.pool.finish(loop.trace)

    def _critic(self, reward: RewardModel) -> tuple[Critic | None, bool]:
        """Who reviews, and whether it is the reward itself."""
        if isinstance(self.critic, str):
            return cast("Critic", REWARDS.load(self.critic)(**self.critic_options)), False
        if self.critic is not None:
            return self.critic, False
        inner = getattr(reward, "reward", reward)  # inside a guard
        if isinstance(inner, Critic):
            return inner, True
        if self.expand is None:
            raise ValueError(
                f"refine needs somebody to word prompts anew, and reward {reward.info.name!r} only "
                "scores. Use a judge as reward or as critic (critique_judge, rubric_judge, ...; "
                "mmalign list rewards), or give a function: expand=..."
            )
        return None, False

    def _branches(self, engine: Engine) -> int:
        return engine.evaluations if self.keep is None else OriginalCentred.branches


class _Reviewing:
    """A reward that keeps the reviews of what it scores last."""

    def __init__(self, reward: RewardModel, critic: Critic) -> None:
        self.reward, self.critic, self.info = reward, critic, reward.info
        self.heard: list[Review | None] = []
        self.failure = ""

    @property
    def identity(self) -> str:
        return self.reward.identity

    def score(self, media: Media, prompts: Sequence[str], context: Any = None) -> Score:
        try:
            score, reviews = self.critic.review(media, prompts)
        except Exception as error:  # a guard around the reward leaves what failed unscored
            self.failure = f"the critic failed: {type(error).__name__}: {error}"
            score, reviews = self.reward.score(media, prompts), [None] * len(media)
        self.heard += reviews
        return score


class _Loop:
    """All prompts of a run, round by round."""

    def __init__(
        self, options: Refine, engine: Engine, rounds: int, critic: Critic | None,
        reviewing: _Reviewing | None,
    ) -> None:  # fmt: skip
        self.options, self.engine, self.rounds = options, engine, rounds
        self.critic, self.reviewing = critic, reviewing
        self.encode = ConditioningCache(engine.policy)
        self.pool = Pool(engine, rounds * len(engine.prompts))
        self.live = list(range(len(engine.prompts)))
        self.texts = list(engine.prompts)
        self.tried = [{prompt} for prompt in engine.prompts]
        self.spare = [self._expansions(prompt) for prompt in engine.prompts]
        self.trace: list[dict[str, Any]] = []
        every = torch.arange(len(engine.prompts))
        self.seeds = engine.seeds(every, seed=options.seed)
        if options.keep is not None:  # a model without guidance is refused before the first call
            paired(engine.conditioning(every), engine.conditioning(every), engine.policy.name)

    def round(self, number: int) -> None:
        """Make and review one picture of every prompt that is not done."""
        engine, live = self.engine, self.live
        view = self._view(number)
        size = engine.batch_size
        for at in range(0, len(live), size):
            if all(self.pool.counts) and not engine.meter.allows():
                live = live[:at]
                break
            owners = torch.tensor(live[at : at + size])
            seeds = [self.seeds[i] for i in owners.tolist()]
            latents = view.integrate(engine.policy.init_noise(seeds), owners)
            lines = [
                {"seed": self.seeds[i], "round": number, "text": self.texts[i]}
                for i in owners.tolist()
            ]
            last = number + 1 == self.rounds
            scores, reviews = self._judged(latents, owners, lines, last)
            self._note(number, owners, scores, reviews, last)
        self.live = [i for i in live if self.texts[i] not in self.tried[i]]
        for i in self.live:
            self.tried[i].add(self.texts[i])

    def _view(self, number: int) -> Engine:
        """The engine that generates from the texts of this round."""
        if number == 0:
            return self.engine
        given = self.encode(self.texts)
        keep, scale = self.options.keep, self.engine.guidance_scale
        if keep is None:
            return self.engine.using(given)
        policy = OriginalCentred(self.engine.policy, keep * scale, (1 - keep) * scale)
        both = paired(self.encode(self.engine.prompts), given, self.engine.policy.name)
        return self.engine.using(both, cast("Policy", policy))

    def _judged(
        self, latents: torch.Tensor, owners: torch.Tensor, lines: list[Any], last: bool
    ) -> tuple[Score, Sequence[Review | None]]:
        """Scores against the original prompts, and reviews where another round may follow."""
        if self.reviewing is not None:
            self.reviewing.heard = []
            scores, _ = self.pool.add(latents, owners, lines)
            return scores, self.reviewing.heard
        scores, _ = self.pool.add(latents, owners, lines)
        if self.critic is None or last:
            return scores, [None] * len(owners)
        self.engine.meter.reward_calls += len(owners)
        with self.engine.meter.work():
            reviews = self.critic.review(self.pool.latest, self.engine.texts(owners))[1]
        return scores, reviews

    def _note(
        self, number: int, owners: torch.Tensor, scores: Score,
        reviews: Sequence[Review | None], last: bool,
    ) -> None:  # fmt: skip
        """Choose the next wording of each prompt and record what happened."""
        for i, value, review in zip(owners.tolist(), values_of(scores), reviews, strict=True):
            made_of = self.texts[i]
            note = "" if last else self._next(i, review)
            self.trace.append(
                {
                    "event": "wording",
                    "prompt": i,
                    "round": number,
                    "text": made_of,
                    "value": value,
                    "best": _finite(self.pool.best[i]),
                    "scores": dict(review.scores) if review else {},
                    "critique": review.critique if review else "",
                    "refined": review.refined if review else "",
                    "note": note,
                }
            )

    def _next(self, i: int, review: Review | None) -> str:
        """Set the next wording of prompt ``i``; returns why it is what it is."""
        threshold = self.options.threshold
        given = [s for s in (review.scores.values() if review else ()) if s is not None]
        if given and threshold is not None and min(given) >= threshold:
            return "good enough"
        wanted = [*([review.refined] if review and review.refined else []), *self.spare[i]]
        for text in wanted:
            if text in self.spare[i]:
                self.spare[i].remove(text)
            short = fitting(self.encode, text)
            if short and short not in self.tried[i]:
                self.texts[i] = short
                return "" if short == text else "shortened to what the text encoder takes"
        if self.critic is None:
            return "no further wording"
        if review:
            return "worded as before"
        failed = "" if self.reviewing is None else self.reviewing.failure
        return failed or "the answer could not be read"

    def _expansions(self, prompt: str) -> list[str]:
        if self.options.expand is None:
            return []
        found = self.options.expand(prompt)
        return [found] if isinstance(found, str) else [str(text) for text in found]


def _finite(value: torch.Tensor) -> float | None:
    return float(value) if bool(torch.isfinite(value)) else None


def fitting(encode: Callable[[Sequence[str]], Conditioning], text: str) -> str:
    """As much of the beginning of ``text`` as the text encoder takes; empty where nothing fits.

    It ends with a sentence or clause where one ends in the second half of what fits.
    """
    words = text.split()
    if _fits(encode, " ".join(words)):
        return " ".join(words)
    low, high = 0, len(words) - 1  # words that fit, words that may
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _fits(encode, " ".join(words[:middle])) else (low, middle - 1)
    ends = [n for n in _clauses(words[:low]) if n >= low / 2]
    return re.sub(r"[,;:]$", "", " ".join(words[: ends[-1] if ends else low]))


def _clauses(words: Sequence[str]) -> Iterator[int]:
    return (n for n, word in enumerate(words, 1) if word[-1] in ".;,!?")


def _fits(encode: Callable[[Sequence[str]], Conditioning], text: str) -> bool:
    if not text:
        return False
    try:
        encode([text])
    except ValueError:  # what policies raise for a prompt that is too long
        return False
    return True


__all__ = ["Refine", "fitting"]
