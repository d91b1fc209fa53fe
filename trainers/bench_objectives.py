"""What each objective costs on one policy: rollout, credit, update, evaluations and memory.

The stages are those of a training step through the real loop, as in :mod:`trainers.bench`, with the
objective's own defaults. ``credit`` is everything between the rollout and the update: the reward,
and where an objective asks for them completions of states, a critic, or scores of regions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.config import from_dict
from mmalign.registry import OBJECTIVES, unknown
from mmalign.runtime.files import atomic_write_json, make_directory
from mmalign.runtime.log import say
from mmalign.runtime.measure import cpu_threads
from mmalign.runtime.versions import environment
from mmalign.types import Rollout
from trainers.bench import Bench, BenchConfig
from trainers.objective import process_of

# What some objectives cannot do without, or would not train without in the first step.
_SETTINGS: dict[str, dict[str, Any]] = {
    "reinflow": {"kernel": "learned"},
    "euphonium": {"objective": {"process_reward": "contrast"}},
    "ac_flow": {"objective": {"warmup": 0}},
    "srum": {"objective": {"region_reward": "shapes_partial"}},
    "dpok": {"objective": {"critic": {}}},
}


def bench_objectives(
    policy: str, objectives: Sequence[str] = (), *, out: str | Path | None = None, **options: Any
) -> dict[str, Any]:
    """Measure objectives on a policy; returns plain data that is also written to ``out``.

    Args:
        policy: as in :func:`trainers.bench.bench`.
        objectives: registered names; all of them by default.
        options: fields of :class:`~trainers.bench.BenchConfig`. ``kl_beta`` is left to the
            objectives' defaults.

    Returns:
        ``policy``, ``settings``, ``environment`` and a row for each of ``objectives``: its stages
        ``rollout``, ``credit`` and ``update``, ``evaluations`` of each, ``seconds`` of a step,
        ``images_per_second`` and ``peak_bytes``; or ``refused``, why it does not fit the policy.

    Raises:
        UnknownNameError: not an objective. ConfigError: unknown option or impossible value.
    """
    config = from_dict(BenchConfig, options)
    known = [entry.name for entry in OBJECTIVES]
    for name in objectives:
        if name not in known:
            raise unknown("objective", name, known)
    if out is not None:
        make_directory(Path(out).resolve().parent)
    with cpu_threads(config.threads):
        measured = [_measured(policy, config, name) for name in objectives or known]
    settings: dict[str, Any] = next((m["settings"] for m in measured if "settings" in m), {})
    rows = [{n: v for n, v in m.items() if n != "settings"} for m in measured]
    result = {
        "policy": policy, "settings": settings, "objectives": rows, "environment": environment(),
    }  # fmt: skip
    if out is not None:
        atomic_write_json(Path(out), result)
    return result


def _measured(policy: str, config: BenchConfig, name: str) -> dict[str, Any]:
    process = process_of(OBJECTIVES.load(name))
    if process == "gradient":
        return {"objective": name, "refused": "it samples in its update; see --gradient-steps"}
    forward = process == "forward"
    usual = {"objective": {}, "kernel": "ode"} if forward else {"objective": {}}
    try:
        bench = Bench(policy, config, name, usual | _SETTINGS.get(name, {}))
    except ValueError as error:  # what every part says of settings that do not go together
        say(f"bench {policy}: {name} does not fit: {error}")
        return {"objective": name, "refused": str(error)}
    return {"objective": name, **_ObjectiveBench(bench).run()}


class _ObjectiveBench:
    """The stages of one objective's training step."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.trainer = bench, bench.trainer
        self.spent = 0  # evaluations of the latest update; the first is spared some

    def run(self) -> dict[str, Any]:
        """All stages, one after the other."""
        bench, trainer = self.bench, self.trainer
        bench.memory.reset()
        rollout, sampled = trainer.rollouts.sample(0)
        images = len(rollout)
        stages = {
            "rollout": self._stage("rollout", lambda: trainer.rollouts.sample(0), images),
            "credit": self._stage("credit", lambda: self._credit(rollout), images),
        }
        mapped, shape, completed = self._credit(rollout)
        stages["update"] = self._stage("update", lambda: self._update(mapped, shape), images)
        seconds = sum(stage["seconds"]["median"] for stage in stages.values())
        return {
            "stages": stages,
            "evaluations": {"rollout": sampled, "credit": completed, "update": self.spent},
            "seconds": seconds,
            "images_per_second": images / seconds,
            "peak_bytes": bench.memory.peak(),
            "settings": bench.settings_used(),
        }

    def _stage(self, name: str, run: Any, images: int) -> dict[str, Any]:
        return self.bench.stage(f"{self.bench.algorithm} {name}", run, images=images)

    def _credit(self, rollout: Rollout) -> tuple[Rollout, torch.Size, int]:
        """The scored rollout, the shape of its advantages, and the evaluations they took."""
        trainer = self.trainer
        score, groups = trainer.rollouts.score(rollout)
        rollout, score = trainer.rollouts.mapped(rollout, score)
        evidence, completed = trainer.evidence(rollout, score, groups)
        return rollout, trainer.advantages(evidence).shape, completed

    def _update(self, rollout: Rollout, shape: torch.Size) -> None:
        """One update on made-up advantages; real ones may all be 0 on pictures of noise."""
        trainer = self.trainer
        made_up = _alternating(len(rollout)).to(rollout.final.device)
        advantage = made_up.reshape(-1, *([1] * (len(shape) - 1))).expand(shape)
        every = torch.ones(len(rollout), dtype=torch.bool, device=advantage.device)
        targets, keep = trainer.update.prepare(advantage, every, rollout.groups, every)
        before = trainer.update.nfe
        trainer.update(rollout, targets, keep, len(rollout))
        self.spent = trainer.update.nfe - before
        trainer.updates += 1
        trainer.model.update_copies(trainer.updates)


def _alternating(count: int) -> Tensor:
    """``(count,)``: both signs in turn, no two alike, so that a group has one best sample."""
    size = 1 + torch.arange(count) / count
    return torch.where(torch.arange(count) % 2 == 0, size, -size)
