"""Each part is put on a common scale by reference statistics, then they are added.

* calibrated: z-scores or quantiles of a reference distribution;
* log-sigmoid: Transforming and Combining Rewards (Wang et al., 2402.00742);
* sigmoid: Preference As Reward shaping (Fu et al., 2502.18770).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mmalign.registry import unknown
from mmalign.reward_info import Range
from vision_rewards.compositions.base import Combined, Components, Composition, Parts, sum_range
from vision_rewards.compositions.reference import CalibrationError, Reference

Given = str | Path | Reference | Mapping[str, Any]


class _Referenced(Composition):
    """Base: a reference distribution, or a fixed baseline, for each part."""

    def __init__(
        self,
        components: Components,
        reference: Given | None = None,
        baseline: float | Mapping[str, float] | None = None,
    ) -> None:
        if (reference is None) == (baseline is None):
            raise ValueError(f"{self.kind} needs either reference=FILE or baseline=NUMBER")
        self.references = _references(reference, components) if reference is not None else {}
        self.baselines = _baselines(baseline, components) if baseline is not None else {}
        super().__init__(components)

    def options(self) -> Mapping[str, Any]:
        """The reference statistics in use."""
        digests = [(n, r.digest) for n, r in sorted(self.references.items())]
        return {"reference": digests, "baseline": sorted(self.baselines.items())}

    def one(self, name: str, value: Tensor, parts: Parts) -> Tensor:
        """A part's value on the common scale, ``(B,)``."""
        raise NotImplementedError

    def combine(self, parts: Parts) -> Combined:
        """``sum_k w_k f_k(r_k)``; each transformed part is reported as ``name/scaled``."""
        total, extra = torch.zeros_like(parts.values[0]), {}
        for k, (name, weight) in enumerate(zip(parts.names, parts.weights, strict=True)):
            scaled = self.one(name, parts.values[k], parts)
            extra[f"{name}/scaled"] = torch.where(parts.valid[k], scaled.detach(), torch.nan)
            # Not through the transform where unscored: 0 is an arbitrary point of it.
            total = total + weight * torch.where(parts.valid[k], scaled, 0.0)
        return Combined(total, extra=extra)


def _references(given: Given, components: Components) -> dict[str, Reference]:
    if not isinstance(given, Mapping):
        if len(components) != 1:
            raise ValueError(f"give one reference for each part: {{{', '.join(components)}: FILE}}")
        given = {next(iter(components)): given}
    for name in given:
        if name not in components:
            raise unknown("part with a reference", name, components)
    found = {}
    for name, (reward, _) in components.items():
        if name not in given:
            raise ValueError(f"part {name!r} has no reference")
        source = given[name]
        found[name] = source if isinstance(source, Reference) else Reference.load(source)
        found[name].check(reward.identity)
    return found


def _baselines(given: float | Mapping[str, float], components: Components) -> dict[str, float]:
    if not isinstance(given, Mapping):
        return {name: float(given) for name in components}
    for name in [*given, *components]:
        if name not in components or name not in given:
            raise unknown("part with a baseline", name, set(components) & set(given))
    return {name: float(value) for name, value in given.items()}


class Calibrated(_Referenced):
    """``(r - mean) / std``, or the quantile, of the reference distribution, then the sum.

    Args:
        reference: a file of ``mmalign calibrate``, or ``{label: file}``.
        method: ``zscore``, or ``quantile``: the share of reference samples below, in [0, 1].
            Beyond the reference values a quantile is flat and gives no gradient.
    """

    kind = "calibrated"

    def __init__(
        self,
        components: Components,
        *,
        reference: Given,
        method: Literal["zscore", "quantile"] = "zscore",
    ) -> None:
        if method not in ("zscore", "quantile"):
            raise unknown("method of calibration", method, ("zscore", "quantile"))
        self.method = method
        super().__init__(components, reference)
        for name, known in self.references.items():
            if known.std == 0:
                raise CalibrationError(f"all reference values of {name!r} are equal: no scale")

    def options(self) -> Mapping[str, Any]:
        """Reference and method."""
        return {**super().options(), "method": self.method}

    def range(self) -> Range:
        """Sum of quantiles; z-scores are open."""
        if self.method == "zscore":
            return None, None
        return sum_range([((0.0, 1.0), w) for w in self.weights.values()])

    def one(self, name: str, value: Tensor, parts: Parts) -> Tensor:
        """z-score or quantile."""
        known = self.references[name]
        if self.method == "quantile":
            return known.cdf(value)
        return (value - known.mean) / known.std


class LogSigmoid(_Referenced):
    """``sum_k w_k log sigmoid(r_k - ref_k)``: gains saturate above the reference (2402.00742).

    The sum is the log-probability that the sample is good under every reward, were they
    independent. ``ref_k`` is a quantile of reference samples of the same prompt (of all samples,
    where the prompt has fewer than ``min_samples``), or a given baseline.

    Args:
        quantile: which; the paper's 0.85.
    """

    kind = "log_sigmoid"

    def __init__(
        self,
        components: Components,
        *,
        reference: Given | None = None,
        baseline: float | Mapping[str, float] | None = None,
        quantile: float = 0.85,
        min_samples: int = 4,
    ) -> None:
        if not 0 <= quantile <= 1:
            raise ValueError(f"quantile must lie in [0, 1], got {quantile}")
        self.quantile, self.min_samples = float(quantile), int(min_samples)
        super().__init__(components, reference, baseline)

    def options(self) -> Mapping[str, Any]:
        """Reference and quantile."""
        own = {"quantile": self.quantile, "min_samples": self.min_samples}
        return {**super().options(), **own}

    def range(self) -> Range:
        """At most 0 where no weight is negative."""
        return None, 0.0 if min(self.weights.values()) >= 0 else None

    def one(self, name: str, value: Tensor, parts: Parts) -> Tensor:
        """``log sigmoid`` of the margin above the prompt's reference."""
        if name in self.baselines:
            return F.logsigmoid(value - self.baselines[name])
        known = self.references[name]
        levels = {p: known.quantile(self.quantile, p, self.min_samples) for p in set(parts.prompts)}
        level = value.new_tensor([levels[p] for p in parts.prompts])
        return F.logsigmoid(value - level)


class Sigmoid(_Referenced):
    """``sum_k w_k mean_m sigmoid((r_k - ref_k,m) / temperature)`` (PAR, 2502.18770).

    Bounded, steepest at the reference, flat far above it, which is where rewards are hacked. The
    mean runs over (at most ``samples``) reference values of the prompt.
    """

    kind = "sigmoid"

    def __init__(
        self,
        components: Components,
        *,
        reference: Given | None = None,
        baseline: float | Mapping[str, float] | None = None,
        samples: int = 10,
        temperature: float = 1.0,
    ) -> None:
        if temperature <= 0 or samples < 1:
            raise ValueError(
                f"temperature must be above 0 and samples at least 1, got {temperature}, {samples}"
            )
        self.samples, self.temperature = int(samples), float(temperature)
        super().__init__(components, reference, baseline)

    def options(self) -> Mapping[str, Any]:
        """Reference, samples and temperature."""
        own = {"samples": self.samples, "temperature": self.temperature}
        return {**super().options(), **own}

    def range(self) -> Range:
        """A weighted sum of values in [0, 1]."""
        return sum_range([((0.0, 1.0), w) for w in self.weights.values()])

    def one(self, name: str, value: Tensor, parts: Parts) -> Tensor:
        """Mean probability of beating the prompt's reference samples."""
        if name in self.baselines:
            return torch.sigmoid((value - self.baselines[name]) / self.temperature)
        rows = []
        for prompt, single in zip(parts.prompts, value, strict=True):
            known = self._chosen(self.references[name].samples(prompt))
            rows.append(torch.sigmoid((single - value.new_tensor(known)) / self.temperature).mean())
        return torch.stack(rows) if rows else value

    def _chosen(self, values: tuple[float, ...]) -> tuple[float, ...]:
        """At most ``samples`` values, spread evenly over the sorted ones."""
        if len(values) <= self.samples:
            return values
        ordered, step = sorted(values), len(values) / self.samples
        return tuple(ordered[int((i + 0.5) * step)] for i in range(self.samples))
