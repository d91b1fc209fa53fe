"""The GenEval path on the shapes world, offline: its detector, its CLIP, GenEval's own rules.

Prompts are those of the shapes benchmark whose colours GenEval knows (all but cyan). Beside
GenEval's numbers stand those of the exact verifier, and how often the two agree: what a detector
costs. They need not agree everywhere, because the rules differ: GenEval's ``official`` rules allow
objects that were not asked for, and a relation there takes half of the distance along its axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from eval.benchmarks.base import Numbers, grouped, mean, scored_rows
from eval.benchmarks.geneval import TASKS
from eval.benchmarks.shapes import ShapesBenchmark
from eval.result import Row
from mmalign.assets import asset
from mmalign.protocols import Request
from mmalign.shapes import prompts
from mmalign.types import Media, Score
from vision_rewards.geneval import GenEval


class ShapesGenEval(ShapesBenchmark):
    """GenEval's verdicts on held-out prompts of the shapes world.

    Args:
        detector: checkpoint of the detector; ``None`` takes the shipped one.
        mode: ``official`` or ``strict``, see :mod:`vision_rewards.geneval_rules`.
        split, prompts_per_task, samples_per_prompt, seed: see :class:`ShapesBenchmark`.
    """

    name = "shapes_geneval"
    version = "1"
    keeps_parts = True

    def __init__(
        self,
        split: str = "test",
        prompts_per_task: int = 20,
        samples_per_prompt: int = 2,
        seed: int = 0,
        *,
        mode: str = "strict",
        detector: str | Path | None = None,
    ) -> None:
        super().__init__(split, prompts_per_task, samples_per_prompt, seed)
        for task in self._prompts:  # more are drawn, since some ask for cyan
            drawn = prompts(split, task, 4 * prompts_per_task + 4, seed)
            self._prompts[task] = [p for p in drawn if "cyan" not in p][:prompts_per_task]
        self.options: dict[str, Any] = {**self.options, "mode": mode}
        self._mode, self._checkpoint = mode, detector

    @cached_property
    def geneval(self) -> GenEval:
        """The reward: the shipped detector and the shipped CLIP for colours."""
        return GenEval(
            self._checkpoint or asset("shapes-detector"),
            colors=asset("shapes-clip"),
            mode=self._mode,
        )

    @property
    def identity(self) -> str:
        """GenEval's networks and rules, and the verifier's version."""
        return f"{self.geneval.identity}, {super().identity}"

    def judge(self, media: Media, requests: Sequence[Request]) -> Score:
        """GenEval's verdicts; the verifier's is the part ``exact`` (NaN where it has none)."""
        found = self.geneval.score(media, [r.prompt for r in requests])
        truth = super().judge(media, requests)
        exact = torch.where(truth.valid, truth.value, torch.nan)
        return replace(found, parts={**found.parts, "exact": exact}, identity=self.identity)

    def numbers(self, rows: Sequence[Row]) -> Numbers:
        """GenEval's overall and tasks, the verifier's overall, and their agreement."""
        tasks = {t: mean(v) for t, v in grouped(rows, lambda r: r.task).items() if t in TASKS}
        both = [(r.task, value, r.parts.get("exact")) for r, value in scored_rows(rows)]
        known = [(task, value, exact) for task, value, exact in both if exact is not None]
        agree: dict[str, list[float]] = {}
        truth: dict[str, list[float]] = {}
        for task, value, exact in known:
            agree.setdefault(task, []).append(float(value == exact))
            truth.setdefault(task, []).append(exact)
        return {
            "overall": mean(v for v in tasks.values() if v is not None),
            **tasks,
            "overall by the verifier": mean(
                m for v in truth.values() if (m := mean(v)) is not None
            ),
            "agreement with the verifier": mean(v for vs in agree.values() for v in vs),
            **{f"agreement, {task}": mean(values) for task, values in agree.items()},
        }
