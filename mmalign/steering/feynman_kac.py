r"""The Feynman-Kac particle filter: potentials, weights carried from visit to visit, a record.

After some steps of the sampler each particle is *visited*: a reward :math:`\rho` is estimated for
it and its log-weight grows by a log-potential :math:`g` (Singhal et al., 2501.06848).  With the
strength :math:`\lambda_s` of visit :math:`s` and a memory :math:`m` that travels with the particle:

===============  ===============================  ===========================================
potential        memory                           log-potential
===============  ===============================  ===========================================
``difference``   :math:`m' = \lambda_s \rho`      :math:`g = \lambda_s \rho - m`, :math:`m_0 = 0`
``max``          :math:`m' = \max(m, \rho)`       :math:`g = \lambda_s m'`
``sum``          :math:`m' = m + \rho`            :math:`g = \lambda_s m'`
``immediate``    none                             :math:`g = \lambda_s \rho`
===============  ===============================  ===========================================

The last visit scores the finished sample itself, and its log-potential is whatever makes the sum
along every lineage :math:`\lambda r(x_0)`.  The weighted particles therefore approximate
:math:`p(x_0)\, e^{\lambda r(x_0)}` for every potential, however wrong the estimates on the way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mmalign.registry import unknown
from mmalign.runtime.seeds import stable_seed
from mmalign.steering.engine import scored
from mmalign.steering.particles import Population, Scheme, check_scheme
from mmalign.types import Score

Potential = Literal["difference", "max", "sum", "immediate"]
Choose = Literal["reward", "weight", "draw"]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How weights are made and when particles are resampled.

    Attributes:
        potential: see the module.
        strength: lambda; what one unit of reward is worth.
        tempering: how the strength grows towards the last visit. ``None``: it does not;
            ``"linear"`` in the steps done; a number ``gamma``: ``min((1 + gamma)^steps - 1, 1)``.
        scheme: how ancestors are drawn.
        threshold: resample only where the effective size has fallen to this share of the
            particles; ``None`` resamples at every visit. Weights are carried meanwhile.

    Raises:
        ValueError: a value out of range; says what is allowed.
    """

    potential: Potential = "difference"
    strength: float = 10.0
    tempering: float | str | None = None
    scheme: Scheme = "systematic"
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.potential not in get_args(Potential):
            raise unknown("potential", self.potential, get_args(Potential))
        check_scheme(self.scheme)
        if not (math.isfinite(self.strength) and self.strength >= 0):
            raise ValueError(
                f"strength must be a number from 0, got {self.strength}; to steer away from what "
                "a reward likes, give the reward a negative weight"
            )
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise ValueError(
                f"threshold must lie in (0, 1], or be None to resample always, got {self.threshold}"
            )
        growth = self.tempering
        if not (growth in (None, "linear") or (isinstance(growth, (int, float)) and growth > 0)):
            raise ValueError(
                f"tempering must be None, 'linear' or a rate above 0, got {self.tempering!r}"
            )

    def strength_at(self, step: int, steps: int) -> float:
        """``lambda`` after ``step`` of ``steps`` steps; in full at the end."""
        share = 1.0
        if self.tempering == "linear":
            share = step / steps
        elif isinstance(self.tempering, (int, float)) and step < steps:
            # Capped before the power overflows.
            share = min(math.expm1(min(step * math.log1p(self.tempering), 1.0)), 1.0)
        return self.strength * share

    def gain(self, memory: Tensor, values: Tensor, strength: float) -> tuple[Tensor, Tensor]:
        """Log-potentials and memories of a visit on the way."""
        if self.potential == "difference":
            return strength * values - memory, strength * values
        if self.potential == "immediate":
            return strength * values, memory
        together = torch.maximum if self.potential == "max" else torch.add
        memory = together(memory, values)
        return strength * memory, memory

    @property
    def start(self) -> float:
        """The memory particles begin with."""
        return -math.inf if self.potential == "max" else 0.0


def visited(
    steps: int, start: int | float, stop: int | float, every: int | float
) -> tuple[int, ...]:
    """The numbers of finished steps after which particles are visited, within 1 .. steps - 1.

    Whole numbers count steps; floats are shares of them, rounded to the nearest step.

    Raises:
        ValueError: a share above 1, a negative number, or no distance between visits.
    """
    for name, value in (("start", start), ("stop", stop), ("every", every)):
        if value < 0 or (isinstance(value, float) and not value <= 1):
            raise ValueError(
                f"{name} must be a number of steps from 0 or a share in [0.0, 1.0], got {value!r}"
            )
    if every == 0:
        raise ValueError("every must be above 0: at least one step, or a share of them")
    first, last, gap = (v * steps if isinstance(v, float) else v for v in (start, stop, every))
    count = math.floor((last - first) / gap + 1e-6) + 1
    found = {math.floor(first + i * gap + 0.5) for i in range(max(count, 0))}
    return tuple(sorted(n for n in found if 0 < n < steps))


class Filter:
    """Weights, memories and family tree of a population, and the record of its visits.

    Args:
        prompts: their texts; each has ``each`` particles.
        key: parts of the resampling seed.
    """

    def __init__(
        self, prompts: Sequence[str], each: int, rule: Rule, key: Sequence[Any] = ()
    ) -> None:
        self.rule, self.prompts, self.key = rule, tuple(prompts), tuple(key)
        self.population = Population(prompts, each, *key)
        rows = len(prompts) * each
        self.population.state = {
            "memory": torch.full((rows,), rule.start, dtype=torch.float64),
            "value": torch.full((rows,), -math.inf, dtype=torch.float64),
            "log_potential": torch.zeros(rows, dtype=torch.float64),
            "history": torch.zeros(rows, 0, dtype=torch.int64),
            "root": torch.arange(each).repeat(len(prompts)),
        }
        self.trace: list[dict[str, Any]] = []

    @property
    def state(self) -> dict[str, Any]:
        """Everything that moves with the particles; add tensors ``(P * k, ...)`` to it."""
        return self.population.state

    def visit(self, scores: Score, step: int, steps: int, sigma: float | None = None) -> Tensor:
        """Weigh the particles by scores ``(P * k,)`` after ``step`` steps, and resample.

        A particle that is not scored is dropped; where a prompt has no score at all, nothing
        happens to it.

        Returns:
            The row each row's particle came from; the state has been permuted already.
        """
        values, good, lost = self._values(scores)
        strength = self.rule.strength_at(step, steps)
        gain, memory = self.rule.gain(self.state["memory"], values, strength)
        for name, seen in (("memory", memory), ("value", values)):
            self.state[name] = torch.where(good, seen, self.state[name])
        self._weigh(gain, good, lost)
        record = self._record(scores, step, steps, strength)
        places = self.population.resample(self.rule.scheme, self.rule.threshold)
        self.state["history"] = torch.cat([self.state["history"], places.view(-1, 1)], 1)
        extra = {} if sigma is None else {"sigma": sigma}
        for prompt, line in enumerate(record):
            line |= {**extra, "resampled": bool(self.population.resampled[prompt])}
            line["ancestors"] = places[prompt].tolist()
        self.trace += record
        return self.population.rows(places)

    def last(self, scores: Score, steps: int) -> None:
        """Weigh the finished samples exactly; they are not resampled."""
        values, good, lost = self._values(scores)
        done = "memory" if self.rule.potential == "difference" else "log_potential"
        self._weigh(self.rule.strength * values - self.state[done], good, lost)
        self.trace += self._record(scores, steps, steps, self.rule.strength)

    def _values(self, scores: Score) -> tuple[Tensor, Tensor, Tensor]:
        """Values, which count, and which prompts' rows have none that does; ``(P * k,)`` each."""
        good = scored(scores).cpu()
        lost = ~good.view(-1, self.population.each).any(1, keepdim=True)
        values = torch.where(good, scores.value.detach().cpu().double(), 0.0)
        return values, good, lost.expand(-1, self.population.each).flatten()

    def _weigh(self, gain: Tensor, good: Tensor, lost: Tensor) -> None:
        gain = torch.where(good, gain, torch.where(lost, 0.0, -torch.inf))
        self.state["log_potential"] = self.state["log_potential"] + gain
        self.population.reweigh(gain)

    def _record(
        self, scores: Score, step: int, steps: int, strength: float
    ) -> list[dict[str, Any]]:
        k, notes = self.population.each, scores.notes
        values = _numbers(torch.where(scored(scores), scores.value, torch.nan).view(-1, k))
        weights = _numbers(self.population.log_weights)
        sizes = self.population.effective_size.tolist()
        records: list[dict[str, Any]] = [
            {
                "event": "last" if step == steps else "visit", "prompt": p, "step": step,
                "steps": steps, "strength": strength, "values": values[p],
                "log_weights": weights[p], "effective_size": sizes[p],
            }
            for p in range(len(self.prompts))
        ]  # fmt: skip
        for p, record in enumerate(records):
            dropped = [i for i in range(k) if values[p][i] is None]
            if dropped:
                said = [notes[p * k + i] for i in dropped if notes and notes[p * k + i]]
                record |= {"dropped": dropped, "notes": list(dict.fromkeys(said))}
        return records

    def hurry(self, step: int, steps: int) -> Tensor:
        """Go on with one particle of each prompt; returns its row.

        The heaviest; of equally heavy ones, which resampling makes, the one last valued most.
        """
        weights = self.population.log_weights
        heavy = weights == weights.amax(1, keepdim=True)
        values = self.state["value"].view_as(weights)
        places = torch.where(heavy, values, -math.inf).argmax(1, keepdim=True)
        # Where no particle was valued yet, all of these are equal and the first heavy one goes on.
        unvalued = ~torch.isfinite(values).any(1, keepdim=True)
        places = torch.where(unvalued, heavy.int().argmax(1, keepdim=True), places)
        for prompt, place in enumerate(places.flatten().tolist()):
            self.trace.append(
                {"event": "hurry", "prompt": prompt, "step": step, "steps": steps, "kept": place}
            )
        return self.population.keep(places)

    def lineage(self, seeds: Sequence[int]) -> list[Mapping[str, Any]]:
        """What is known of each particle: weight, and the place its ancestor had at each visit.

        Args:
            seeds: of all the rows that began; ``seed`` is that of the initial noise it stems from.
        """
        each, began = self.population.each, len(seeds) // len(self.prompts)
        weights = self.population.weights.flatten().tolist()
        logs = _numbers(self.population.log_weights.view(1, -1))[0]
        roots, paths = self.state["root"].tolist(), self.state["history"].tolist()
        return [
            {
                "seed": seeds[row // each * began + roots[row]], "root": roots[row],
                "weight": weights[row], "log_weight": logs[row], "ancestors": paths[row],
            }
            for row in range(len(roots))
        ]  # fmt: skip

    def order(self, choose: Choose, scores: Score) -> Tensor:
        """What ranks the finished particles ``(P * k,)``: reward, weight, or a draw by weight."""
        if choose == "reward":
            return scores.value
        keys = self.population.log_weights
        if choose == "draw":
            seeds = [stable_seed("choose", *self.key, prompt) for prompt in self.prompts]
            drawn = [
                torch.rand(keys.shape[1], generator=torch.Generator().manual_seed(s)) for s in seeds
            ]
            # The largest of log-weights plus Gumbel noise is a draw by weight.
            keys = keys - (-torch.stack(drawn).double().clamp(min=1e-12).log()).log()
        return keys.flatten()


def check_choose(choose: str) -> None:
    """Raises ``UnknownNameError`` for a way of choosing that does not exist."""
    if choose not in get_args(Choose):
        raise unknown("way to choose", choose, get_args(Choose))


def _numbers(rows: Tensor) -> list[list[float | None]]:
    """Rows as numbers ready for JSON; ``None`` where there is none."""
    return [[v if math.isfinite(v) else None for v in row] for row in rows.tolist()]
