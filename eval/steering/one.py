"""One run of the comparison: a method, a model and a seed, at each of its budgets.

``python -m eval.steering.one FOLDER`` does what ``FOLDER/spec.json`` says. The pictures of each
budget are one evaluation below ``eval/``; those that are finished are not made again.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image

from eval.benchmarks.shapes import ShapesBenchmark
from eval.provenance import denoiser_digest, provenance
from eval.result import EvalResult, Row, finite, summarise
from mmalign.config import from_dict
from mmalign.policies.load import policy_on
from mmalign.protocols import Policy, Request, RewardModel, Spent, Steered
from mmalign.runtime.files import atomic_directory, atomic_write_json
from mmalign.runtime.log import say
from mmalign.runtime.settings import SettingsMismatchError
from mmalign.sampling.generate import generate
from mmalign.steering import build_steerer
from mmalign.steering.engine import initial_seed
from mmalign.types import Media
from vision_rewards.factory import load_reward
from vision_rewards.guard import GuardedReward

FIRST_SEED = 1000  # no noise is one of those that defaults and examples were looked at with
ROUND = 20  # prompts steered at once; changes no picture
RECORD = "run.json"


@dataclass(frozen=True, kw_only=True)
class Point:
    """A budget of network evaluations, and the options that belong to it."""

    nfe: int
    options: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What a run does; two runs with equal specifications and weights give equal pictures."""

    policy: str
    lora: str | None
    steps: int
    guidance_scale: float
    method: str
    points: tuple[Point, ...]
    reward: str
    prompts_per_task: int
    seed: int


class One:
    """A run, with its model and its reward loaded."""

    def __init__(self, spec: Spec, folder: Path) -> None:
        self.spec, self.folder = spec, folder
        self.policy: Policy = policy_on(spec.policy, "auto", spec.lora)
        self.reward: RewardModel = GuardedReward(load_reward(spec.reward), max_failed_share=1.0)
        self.benchmark = ShapesBenchmark(
            prompts_per_task=spec.prompts_per_task, samples_per_prompt=1
        )
        self.requests = self.benchmark.requests()
        self.sampler = {"steps": spec.steps, "guidance_scale": spec.guidance_scale}
        self.identity = {
            "weights": denoiser_digest(self.policy), "reward": self.reward.identity,
            "scorer": self.benchmark.identity,
        }  # fmt: skip

    def go(self) -> None:
        """Make what is missing, then write ``run.json``."""
        points = []
        for point in (None, *self.spec.points):
            spot = spot_of(point)
            result = self._finished(spot) or self._make(spot, point)
            points.append({"spot": spot, **result.provenance["spent"]})
            nfe, seconds = points[-1]["nfe"], points[-1]["seconds"]
            say(f"{spot}: {nfe:.0f} evaluations and {seconds:.2f} s a prompt")
        atomic_write_json(self.folder / RECORD, {"finished": True, "points": points})

    def _finished(self, spot: str) -> EvalResult | None:
        file = self.folder / "eval" / spot / "result.json"
        if not file.is_file():
            return None
        held = EvalResult.load(file)
        if dict(held.settings) != self.identity:
            differ = [k for k, v in self.identity.items() if held.settings.get(k) != v]
            raise SettingsMismatchError(
                f"{file.parent} was made with other {', '.join(differ)}; remove {self.folder}"
            )
        return held

    def _make(self, spot: str, point: Point | None) -> EvalResult:
        images: dict[str, Image] = {}
        rows: list[Row] = []
        bills: list[Spent] = []
        for sample, group in _rounds(self.requests):
            seed = FIRST_SEED * (sample + 1) + self.spec.seed
            media, spent = self.pictures(group, seed, point)
            bills.append(spent)
            rows += self._judged(group, seed, media, images)
        order = {request.key: i for i, request in enumerate(self.requests)}
        return self._keep(spot, sorted(rows, key=lambda r: order[r.key]), images, bills)

    def pictures(
        self, group: Sequence[Request], seed: int, point: Point | None
    ) -> tuple[Media, Spent]:
        """The chosen pictures; without a budget those of the bare pipeline's first noises."""
        texts = [request.prompt for request in group]
        if point is None:
            start = time.perf_counter()
            seeds = [initial_seed(seed, text) for text in texts]
            media, nfe = generate(self.policy, texts, seeds, **self.sampler)  # type: ignore[arg-type]
            seconds = time.perf_counter() - start
            return media, Spent(nfe=nfe, decodes=len(texts), seconds=seconds, working=seconds)
        steerer = build_steerer(self.spec.method, seed, {**point.options, **self.sampler})
        found: Steered = steerer.run(
            self.policy, self.reward, texts, budget={"nfe": point.nfe}, watch=lambda _: None
        )
        return found.media, found.spent

    def _judged(
        self, group: Sequence[Request], seed: int, media: Media, images: dict[str, Image]
    ) -> list[Row]:
        """Verdicts on the 8-bit pictures, which are those that are kept."""
        made = media.to_pil()
        images |= {request.key: image for request, image in zip(group, made, strict=True)}
        score = self.benchmark.judge(Media.from_pil(made), group)
        partial, values, valid = score.parts["partial"], score.value, score.valid.tolist()
        return [
            Row(
                key=r.key, prompt=r.prompt, task=r.task, sample=r.sample,
                seed=initial_seed(seed, r.prompt), value=float(values[i]) if valid[i] else None,
                valid=valid[i], note=score.notes[i] if score.notes else "",
                partial=finite(float(partial[i])), image=f"images/{r.key}.png",
            )
            for i, r in enumerate(group)
        ]  # fmt: skip

    def _keep(
        self, spot: str, rows: list[Row], images: Mapping[str, Image], bills: Sequence[Spent]
    ) -> EvalResult:
        share = len(rows)
        units = ("nfe", "reward_calls", "decodes", "seconds", "working")
        spent = {unit: sum(getattr(b, unit) for b in bills) / share for unit in units}
        tasks, overall = summarise(rows)
        result = EvalResult(
            benchmark=self.benchmark.name, version=self.benchmark.version, label=spot,
            policy=self.policy.name, settings=self.identity, rows=tuple(rows), tasks=tasks,
            overall=overall, nfe=spent["nfe"] * share, seconds=spent["seconds"] * share,
            provenance={**provenance(self.policy, self.benchmark), "spent": spent},
        )  # fmt: skip
        target = self.folder / "eval" / spot
        with atomic_directory(target) as partial:
            (partial / "images").mkdir()
            for key, image in images.items():
                image.save(partial / "images" / f"{key}.png")
            result.save(partial / "result.json")
        return EvalResult.load(target / "result.json")


def spot_of(point: Point | None) -> str:
    """What the evaluation at a budget, or of the bare pipeline, is called."""
    return "bare" if point is None else f"nfe_{point.nfe:06d}"


def read_spec(folder: Path) -> Spec:
    """The specification in a run's folder."""
    return from_dict(Spec, json.loads((folder / "spec.json").read_text(encoding="utf-8")))


def write_spec(spec: Spec, folder: Path) -> None:
    """Keep a specification in a run's folder."""
    atomic_write_json(folder / "spec.json", asdict(spec))


def _rounds(requests: Sequence[Request]) -> list[tuple[int, list[Request]]]:
    """Requests to steer together: of one sample number, as equal prompts need other noises."""
    found = []
    for sample in sorted({request.sample for request in requests}):
        own = [request for request in requests if request.sample == sample]
        found += [(sample, own[at : at + ROUND]) for at in range(0, len(own), ROUND)]
    return found


def main() -> None:
    """Do what the specification in the folder on the command line says."""
    folder = Path(sys.argv[1])
    One(read_spec(folder), folder).go()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"mmalign: error: {error}") from error
