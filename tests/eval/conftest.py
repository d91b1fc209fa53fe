"""A policy without weights whose sampler draws scenes, and a comparison with known numbers."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from eval.result import EvalResult, Row, summarise
from mmalign.protocols import Sampler
from mmalign.shapes import parse, render, sample_scene, sample_spec
from mmalign.types import Media


class Painter:
    """Stands in for a policy; only what the harness reads."""

    name, family, parameterisation, media = "painter", "sd3", "flow", "image"
    sampler = Sampler(steps=10, guidance_scale=3.0, height=64, width=64)
    device = torch.device("cpu")

    def __init__(self, weight: float = 1.0) -> None:
        self.denoiser = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(self.denoiser.weight, weight)
        torch.nn.init.constant_(self.denoiser.bias, 0.0)


@dataclass
class Sketch:
    """Draws what the prompt asks for with probability ``skill``, decided by the seed alone.

    ``noisy`` is the share of pictures that are noise, which no judge can score.  Every prompt
    asked for is kept in ``asked``.
    """

    skill: float = 1.0
    noisy: float = 0.0
    asked: list[tuple[str, int]] = field(default_factory=list)

    def __call__(
        self,
        policy: object,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> tuple[Media, int]:
        """Media of ``B`` scenes; ``steps`` network evaluations a picture."""
        pairs = [*zip(prompts, seeds, strict=True)]
        self.asked += pairs
        return Media(torch.stack([self._draw(p, s) for p, s in pairs])), (steps or 0) * len(pairs)

    def _draw(self, prompt: str, seed: int) -> torch.Tensor:
        rng = random.Random(seed)
        luck, noise = rng.random(), rng.random()
        if noise < self.noisy:
            return torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(seed))
        spec = parse(prompt)
        scene = sample_scene(spec, rng)
        while luck >= self.skill and scene.satisfies(spec):
            scene = sample_scene(sample_spec(rng, "train", spec.task), rng)
        return Media.from_pil([render(scene)]).data[0]


@pytest.fixture(scope="session")
def studio() -> SimpleNamespace:
    """The classes above, for test modules that cannot import a conftest."""
    return SimpleNamespace(Painter=Painter, Sketch=Sketch)


# --- a comparison with known numbers

PROMPTS, BUDGET = 24, 900
# Accuracy of each method at 0, 300, 600 and 900 evaluations.
CURVES = {
    "base": (0.3, 0.3, 0.3, 0.3),
    "early": (0.3, 0.8, 0.8, 0.8),
    "late": (0.3, 0.3, 0.4, 0.8),
}


def result(folder: Path, share: float, rng: np.random.Generator, proxy: float) -> None:
    """An evaluation of two tasks in which ``share`` of the pictures is right, up to chance."""
    rows = []
    for k in range(PROMPTS):
        task = "colors" if k < PROMPTS // 2 else "counting"
        picture = folder / "images" / f"p{k}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((32, 32, 3), 8 * k, np.uint8)).save(picture)
        right = float(k % 12 < round(12 * share) + rng.integers(-1, 2))
        rows.append(
            Row(
                key=f"p{k}",
                prompt=f"a photo of {k}",
                task=task,
                sample=0,
                seed=k,
                value=right,
                valid=True,
                partial=proxy,
                image=f"images/p{k}.png",
            )
        )
    by_task, overall = summarise(rows)
    EvalResult(
        benchmark="shapes",
        version="1",
        label=folder.name,
        policy="p",
        settings={},
        rows=tuple(rows),
        tasks=by_task,
        overall=overall,
    ).save(folder / "result.json")


def run(folder: Path, curve: tuple[float, ...], seed: int) -> None:
    """A finished run of nine steps of 100 evaluations and 2 seconds each."""
    for point, share in enumerate(curve):
        spot = {0: "before", 3: "after"}.get(point, f"step_{3 * point:06d}")
        # The base is the same for all, so it is evaluated with the same noise.
        rng = np.random.default_rng(seed * 100 + point if point else 0)
        result(folder / "eval" / spot, share, rng, proxy=0.5 + 0.1 * point)
    log = [{"step": s, "nfe": 100 * s, "seconds": 2.0 * s} for s in range(1, 10)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in log))
    ended = {"steps": 9, "nfe": 900, "seconds": 18.0, "finished": True}
    (folder / "run.json").write_text(json.dumps(ended))


CLAIMS = [
    {"says": "late beats doing nothing", "better": "late", "than": "base"},
    {"says": "doing nothing beats late", "better": "base", "than": "late"},
    {"says": "early ends above late", "better": "early", "than": "late"},
    {"says": "early needs fewer", "better": "early", "than": "late", "at": "curve"},
    {"says": "about nobody", "better": "early", "than": "gone"},
]


@pytest.fixture(scope="session")
def claims() -> list[dict[str, str]]:
    """Of the comparison with known numbers."""
    return CLAIMS


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three methods of three seeds, and a run that failed."""
    out = tmp_path_factory.mktemp("comparison")
    runs = []
    for name, curve in CURVES.items():
        for seed in (0, 1, 2):
            run(out / name / f"seed_{seed}", curve, seed + 10 * len(runs))
            runs.append(
                {
                    "method": name,
                    "seed": seed,
                    "folder": f"{name}/seed_{seed}",
                    "state": "finished",
                    "error": "",
                }
            )
    runs.append(
        {
            "method": "gone",
            "seed": 0,
            "folder": "gone/seed_0",
            "state": "failed",
            "error": "no <such> policy",
        }
    )
    rows = {
        n: {
            "title": n.title(),
            "proxies": ["partial"],
            "control": n == "base",
            "claim": f"what {n} says",
            "paper": "0000.00000",
        }
        for n in (*CURVES, "gone")
    }
    table = {
        "nfe": BUDGET,
        "points": 3,
        "seeds": [0, 1, 2],
        "reference": "base",
        "threads": 1,
        "methods": rows,
        "claims": CLAIMS,
        "runs": runs,
    }
    (out / "comparison.json").write_text(json.dumps(table))
    return out
