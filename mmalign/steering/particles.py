r"""Populations of particles: log-weights, effective size, resampling, what moves with a particle.

Weights live in log space and nowhere else: with :math:`\log W_i` the weights are
:math:`w = \mathrm{softmax}(\log W)`, the effective sample size is :math:`1 / \sum_i w_i^2`, and a
dropped particle has :math:`\log W_i = -\infty`.  Rows are grouped by prompt, ``k`` each; prompts
never exchange particles, each resamples from a generator of its own.

All resampling schemes are unbiased: a particle has :math:`k w_i` offspring on average.  Systematic,
residual and SSP resampling (Gerber, Chopin and Whiteley, 1707.01845) give it at least
:math:`\lfloor k w_i \rfloor`; systematic and SSP at most one more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

from mmalign.registry import unknown
from mmalign.runtime.seeds import stable_seed

Scheme = Literal["systematic", "residual", "ssp", "multinomial"]
T = TypeVar("T")


def normalised(log_weights: Tensor) -> Tensor:
    """Weights of log-weights ``(..., k)``, summing to 1; all dropped gives all 0."""
    return torch.softmax(log_weights.double(), -1).nan_to_num(0.0)


def effective_size(log_weights: Tensor) -> Tensor:
    """``1 / sum w^2`` over the last dimension, from 1 to ``k``; 0 where all are dropped."""
    total = normalised(log_weights).square().sum(-1)
    return torch.where(total > 0, 1 / total, 0.0)


# -- resampling --------------------------------------------------------------------------------


def offspring(log_weights: Tensor, scheme: Scheme, generator: torch.Generator) -> Tensor:
    """How many copies each of ``k`` particles gets, ``(k,)`` int64, summing to ``k``.

    Particles are taken in order of weight, so that permuting them permutes the counts.

    Raises:
        UnknownNameError: unknown scheme. ValueError: every particle is dropped.
    """
    check_scheme(scheme)
    weights = normalised(log_weights)
    if not weights.any():
        raise ValueError("every particle of a prompt is dropped, so there is none to copy")
    order = torch.argsort(weights, descending=True, stable=True)
    counts = torch.empty(len(weights), dtype=torch.int64)
    counts[order] = _SCHEMES[scheme](weights[order] / weights.sum(), generator)
    return counts


def ancestors(log_weights: Tensor, scheme: Scheme, generator: torch.Generator) -> Tensor:
    """The particle that each of ``k`` places gets, ``(k,)`` int64.

    Survivors stay where they are; only what the others leave is filled, heaviest copies first.
    """
    counts = offspring(log_weights, scheme, generator)
    found = torch.arange(len(counts))
    heavy = torch.argsort(normalised(log_weights), descending=True, stable=True)
    copies = heavy.repeat_interleave((counts[heavy] - 1).clamp(min=0))
    found[heavy[counts[heavy] == 0]] = copies
    return found


def check_scheme(scheme: str) -> None:
    """Raises ``UnknownNameError`` for a resampling scheme that does not exist."""
    if scheme not in get_args(Scheme):
        raise unknown("resampling scheme", scheme, get_args(Scheme))


def _systematic(weights: Tensor, generator: torch.Generator) -> Tensor:
    """One uniform number for the whole comb of ``k`` teeth."""
    k = len(weights)
    start = torch.rand((), generator=generator, dtype=torch.float64)
    # Teeth below each cumulated weight; the last one is exact, or rounding would lose a tooth.
    below = torch.ceil(weights.cumsum(0) * k - start).clamp(0, k)
    below[-1] = k
    return torch.diff(below, prepend=below.new_zeros(1)).long()


def _multinomial(weights: Tensor, generator: torch.Generator, draws: int | None = None) -> Tensor:
    """Independent draws."""
    draws = len(weights) if draws is None else draws
    if draws == 0:
        return torch.zeros(len(weights), dtype=torch.int64)
    picked = torch.multinomial(weights, draws, replacement=True, generator=generator)
    return torch.bincount(picked, minlength=len(weights))


def _whole(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Whole and fractional part of ``k w``; what is whole up to rounding counts as whole."""
    expected = weights * len(weights)
    floor = torch.floor(expected + 1e-9)
    return floor.long(), (expected - floor).clamp(0, 1)


def _residual(weights: Tensor, generator: torch.Generator) -> Tensor:
    """The whole part for certain, the rest drawn by what is left."""
    counts, rest = _whole(weights)
    return counts + _multinomial(
        torch.where(rest.sum() > 0, rest, weights), generator, len(weights) - int(counts.sum())
    )


def _ssp(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Fractional parts are settled two by two, each pair keeping both expectations.

    With ``s = p + q``: below 1 one of the two takes all of ``s`` (the first with probability
    ``p / s``); else one becomes whole (the first with ``(1 - q) / (2 - s)``) and the other keeps
    ``s - 1``.
    """
    counts, parts = _whole(weights)
    chance = torch.rand(len(weights), generator=generator, dtype=torch.float64).tolist()
    rest, open_, p = parts.tolist(), 0, float(parts[0])
    for n in range(1, len(rest)):
        q = rest[n]
        s = p + q
        if s < 1:
            open_, p = (open_ if s == 0 or chance[n] < p / s else n), s
        else:
            whole, left = (open_, n) if s >= 2 or chance[n] < (1 - q) / (2 - s) else (n, open_)
            counts[whole] += 1
            open_, p = left, s - 1
    counts[open_] += len(weights) - int(counts.sum())  # what rounding left: 0 or 1
    return counts


_SCHEMES: Mapping[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "systematic": _systematic, "residual": _residual, "ssp": _ssp, "multinomial": _multinomial,
}  # fmt: skip


# -- what belongs to particles -----------------------------------------------------------------


def permute(value: T, rows: Tensor, batch: int | None = None) -> T:
    """``value`` with row ``rows[i]`` in place ``i``, wherever it holds a tensor with a row each.

    Looks into dictionaries, lists and tuples; everything else is returned as it is.

    Args:
        batch: how many rows there are now; by default as many as come out.
    """
    found: Any = value
    if isinstance(value, Tensor):
        if value.ndim and len(value) == (len(rows) if batch is None else batch):
            found = value[rows.to(value.device)]
    elif isinstance(value, Mapping):
        found = {key: permute(item, rows, batch) for key, item in value.items()}
    elif type(value) in (list, tuple):
        items = [permute(item, rows, batch) for item in value]  # type: ignore[attr-defined]
        found = items if type(value) is list else tuple(items)
    return found  # type: ignore[no-any-return]


class Noise:
    """Standard normal noise, a generator for each row: who shares the batch changes nothing.

    Generators belong to places, not to particles: two copies of one particle must part ways. They
    run on the CPU, so that every device gets the same noise.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(stable_seed("noise", s)) for s in seeds]

    def draw(self, like: Tensor, each: int | None = None) -> Tensor:
        """Noise shaped like ``like`` ``(B, ...)``; with ``each``, ``(B, each, ...)``. fp32."""
        shape = tuple(like.shape[1:]) if each is None else (each, *like.shape[1:])
        rows = [torch.randn(shape, generator=g) for g in self._generators]
        return torch.stack(rows).to(like.device)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        self._generators = [self._generators[i] for i in rows.tolist()]


class Population:
    """``k`` particles for each of ``P`` prompts, their log-weights and all that moves with them.

    Attributes:
        each: ``k``.
        log_weights: ``(P, k)`` fp64 on the CPU, since the last resampling.
        log_mean: ``(P,)`` fp64, log of the product of the mean weights that resampling forgot.
        resampled: ``(P,)`` bool, which prompts the last :meth:`resample` changed.
        state: every per-particle tensor ``(P * k, ...)`` by name; :meth:`permute` moves them all.

    Args:
        prompts: their texts.
        each: ``k``.
        key: parts of the resampling seed, beside each prompt's text.
    """

    def __init__(self, prompts: Sequence[str], each: int, *key: Any) -> None:
        self.each = each
        self.log_weights = torch.zeros(len(prompts), each, dtype=torch.float64)
        self.log_mean = torch.zeros(len(prompts), dtype=torch.float64)
        self.resampled = torch.zeros(len(prompts), dtype=torch.bool)
        seeds = [stable_seed("resample", *key, prompt) for prompt in prompts]
        self._generators = [torch.Generator().manual_seed(s) for s in seeds]
        self.state: dict[str, Any] = {}

    @property
    def weights(self) -> Tensor:
        """``(P, k)``, each row summing to 1."""
        return normalised(self.log_weights)

    @property
    def effective_size(self) -> Tensor:
        """``(P,)``."""
        return effective_size(self.log_weights)

    @property
    def log_normaliser(self) -> Tensor:
        """``(P,)``; its exponential is an unbiased estimate of ``E[product of potentials]``."""
        total = torch.logsumexp(self.log_weights, 1)
        return self.log_mean + total - math.log(self.each)

    def reweigh(self, gains: Tensor) -> None:
        """Add log-potentials ``(P * k,)``; not a number drops the particle.

        A prompt that would lose all its particles keeps the weights it had.
        """
        gains = gains.detach().double().cpu().view_as(self.log_weights)
        after = self.log_weights + gains.nan_to_num(nan=-torch.inf, neginf=-torch.inf)
        alive = torch.isfinite(after).any(1, keepdim=True)
        self.log_weights = torch.where(alive, after, self.log_weights)

    def resample(self, scheme: Scheme = "systematic", below: float | None = None) -> Tensor:
        """Resample, and permute everything; ``(P, k)`` ancestors as places 0 .. k - 1.

        Args:
            below: only prompts whose effective size has come down to this share of ``k``; the
                others keep particles and weights. ``None`` resamples them all.
        """
        wanted = torch.ones(len(self.log_weights), dtype=torch.bool)
        if below is not None:
            wanted = self.effective_size <= below * self.each
        self.log_mean = torch.where(wanted, self.log_normaliser, self.log_mean)
        places = torch.arange(self.each).repeat(len(wanted), 1)
        for prompt in torch.nonzero(wanted).flatten().tolist():
            places[prompt] = ancestors(self.log_weights[prompt], scheme, self._generators[prompt])
            self.log_weights[prompt] = 0.0
        self.permute(self.rows(places))
        self.resampled = wanted
        return places

    def rows(self, places: Tensor) -> Tensor:
        """Row numbers ``(P * k,)`` of places ``(P, k)`` within each prompt."""
        first = torch.arange(len(places)).unsqueeze(1) * self.each
        return (first + places).flatten()

    def permute(self, rows: Tensor) -> None:
        """Move every per-particle tensor of the state; weights are left alone."""
        if not rows.equal(torch.arange(len(rows))):
            self.state = permute(self.state, rows)

    def keep(self, places: Tensor) -> Tensor:
        """Go on with ``places`` ``(P, m)`` of each prompt; returns their row numbers."""
        rows = self.rows(places)
        self.state = permute(self.state, rows, self.log_weights.numel())
        self.log_weights = self.log_weights.gather(1, places)
        self.each = places.shape[1]
        return rows
