"""Best of N: sample N, keep the one the reward likes best.

The plainest way to spend computation at inference time, and the baseline every other method has
to beat at equal function evaluations (Ma et al., 2501.09732, call it random search over noises).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmalign.protocols import Policy, RewardModel, Steered
from mmalign.runtime.progress import track
from mmalign.steering.common import Sampling
from mmalign.steering.engine import Engine, Watch, scored
from mmalign.types import Media, Score


@dataclass(frozen=True, kw_only=True)
class BestOfN(Sampling):
    """Sample ``n`` candidates a prompt and keep the best scored one.

    Candidate ``i`` of a prompt has a noise seed made of ``seed``, the prompt and ``i`` alone.
    The candidates of a larger ``n`` therefore contain those of a smaller one, and two equal
    prompts in one list get equal pictures.

    Args:
        n: candidates a prompt; a budget may allow fewer.
        seed, batch_size, steps, guidance_scale, dtype: as in :class:`Sampling`.

    Raises:
        ValueError: ``n``, ``batch_size`` or ``steps`` below 1.
    """

    method: ClassVar[str] = "best_of_n"

    n: int = 8

    def __post_init__(self) -> None:
        self.check(n=1)

    @torch.no_grad()
    def run(
        self,
        policy: Policy,
        reward: RewardModel,
        prompts: Sequence[str],
        *,
        budget: Any = None,
        watch: Watch | None = None,
    ) -> Steered:
        """Steer one sample per prompt.

        Ties go to the earlier candidate. ``reward_calls`` counts scored pictures, so it does not
        depend on ``batch_size``. Candidates are kept on the CPU. A budget of seconds stops after
        the batch in which it ends, once every prompt has a candidate.

        Raises:
            ValueError: no prompts, a prompt the text encoder does not take, or a reward that
                cannot judge this policy's media (all before the denoiser is first called); or a
                prompt none of whose candidates could be scored. BudgetError: too small for one.
        """
        engine = self.engine(policy, reward, prompts, budget, watch)
        cost = {"nfe": engine.steps * engine.evaluations, "reward_calls": 1, "decodes": 1}
        n = engine.afford(self.n, "candidate", **cost)
        # Candidate by candidate over all prompts, so that a time limit leaves every prompt some.
        owners = torch.arange(len(prompts)).repeat(n)
        if "seconds" not in engine.meter.budget.limits():
            owners = engine.owners(n)
        seeds = engine.seeds(owners, seed=self.seed)
        media, scores = self._candidates(engine, owners, seeds)
        owners = owners[: len(media)]
        order = torch.argsort(owners, stable=True)
        lineage = [{"seed": seeds[i]} for i in order.tolist()]
        return engine.finish(media[order], scores[order], owners[order], lineage)

    def _candidates(
        self, engine: Engine, owners: Tensor, seeds: Sequence[int]
    ) -> tuple[Media, Score]:
        """The candidates that time allowed, with their scores, in the order of ``owners``."""
        media: list[Media] = []
        scores: list[Score] = []
        best = torch.full((len(engine.prompts),), -torch.inf)
        with track("candidates", len(seeds), enabled=engine.watch is None) as advance:
            for at in range(0, len(seeds), self.batch_size):
                if at >= len(engine.prompts) and not engine.meter.allows():
                    break
                rows = owners[at : at + self.batch_size]
                noise = engine.policy.init_noise(seeds[at : at + self.batch_size])
                made = engine.decode(engine.integrate(noise, rows))
                found = engine.score(made, rows)
                media.append(Media(made.data.float().cpu()))
                scores.append(found.to("cpu"))
                so_far = Score.cat(scores)
                self._check_finished(engine, so_far, owners, len(so_far))
                good = scored(scores[-1])
                best.scatter_reduce_(0, rows[good], scores[-1].value[good], "amax")
                shown = torch.where(torch.isfinite(best), best, torch.nan)
                engine.show(len(so_far), len(seeds), shown)
                advance(len(rows), f"best {float(shown.nanmean()):.3f}")
        return Media.cat(media), Score.cat(scores)

    def _check_finished(self, engine: Engine, so_far: Score, owners: Tensor, done: int) -> None:
        """Stop at the first prompt all of whose candidates are there and none is scored."""
        left = owners[done:].unique()
        finished = ~torch.isin(owners[:done], left)
        if finished.any():
            rows = torch.nonzero(finished).flatten()
            engine.check_scored(so_far[rows], owners[:done][finished])


__all__ = ["BestOfN"]
