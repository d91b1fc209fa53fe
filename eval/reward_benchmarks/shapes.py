"""The shapes-world reward benchmark: pairs whose truth is known, along one difference each.

Scenes of the test split are drawn anew from a seed; nothing but this code is shipped. Beside the
rendered pairs there are pictures of the shipped generator, four of a prompt, judged by the
verifier: a reward is asked which of them it would choose.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from typing import Any

from PIL import Image

from eval.benchmarks.shapes import request_seed
from eval.metrics.pairs import Mode
from eval.reward_benchmarks.base import DataError, RewardBenchmark
from eval.reward_benchmarks.items import Candidate, Item
from eval.reward_benchmarks.measures import (
    Measure,
    best,
    comparison_measures,
    half_credit,
    macro_of,
    mean_of,
    pair_measures,
)
from eval.reward_benchmarks.shapes_pairs import CHANGES, SPOILERS, TASKS_OF, scene_pair
from mmalign.shapes import TASKS, caption, parse, prompts, render, sample_scene, sample_spec

VERSION = "1"  # of everything below and of shapes_pairs; changes with any pixel or label
SIDE = 64
SAMPLES = 4  # pictures of the generator for each prompt
GENERATED = "generated"
CATEGORIES = (*CHANGES, *SPOILERS, GENERATED)


class ShapesRewards(RewardBenchmark):
    """Eleven controlled differences and the shipped generator's own mistakes.

    Args:
        pairs: of each controlled difference.
        generated: prompts whose four generated pictures are judged; 0 leaves them out, and with
            them the only network of this benchmark. Prompts of which all or none of the four are
            right say nothing and are left out.
        categories: only these.
        seed: of scenes and of which picture comes first.
        split: of the prompts.
        data, mode: ``data`` is refused, there is none; the mode changes nothing.

    Raises:
        DataError: ``data`` given, an unknown category, or a size below 1.
    """

    name = "shapes_rewards"
    version = VERSION

    def __init__(
        self,
        data: Any = None,
        mode: Mode = "compat",
        *,
        pairs: int = 40,
        generated: int = 60,
        categories: Sequence[str] | None = None,
        seed: int = 0,
        split: str = "test",
    ) -> None:
        if data is not None:
            raise DataError("shapes_rewards draws its own pictures; leave --data out")
        super().__init__(None, mode)
        if pairs < 1 or generated < 0:
            raise DataError(f"pairs must be 1 or more, generated 0 or more: {pairs}, {generated}")
        self.categories = tuple(categories or CATEGORIES)
        odd = [c for c in self.categories if c not in CATEGORIES]
        if odd:
            raise DataError(f"unknown category {odd[0]!r}; known: {', '.join(CATEGORIES)}")
        self.pairs, self.generated, self.seed, self.split = pairs, generated, seed, split

    @property
    def options(self) -> dict[str, Any]:
        """What changes items."""
        return {
            "pairs": self.pairs, "generated": self.generated, "seed": self.seed,
            "split": self.split, "categories": list(self.categories),
        }  # fmt: skip

    def rows(self) -> Iterable[tuple[str, Callable[[], Sequence[Item]]]]:
        """Categories in turn, so that a limit keeps them balanced; generated pictures last."""
        drawn = [c for c in self.categories if c != GENERATED]
        for number in range(self.pairs):
            for category in drawn:
                yield (
                    f"{category} {number}",
                    lambda c=category, n=number: [self.pair(c, n)],  # type: ignore[misc]
                )
        if GENERATED in self.categories and self.generated:
            for prompt in self._prompts():
                yield f"generated {prompt!r}", lambda p=prompt: self.choice(p)  # type: ignore[misc]

    def measures(self) -> Sequence[Measure]:
        """Mean over the controlled differences, ties one half; choices of generated pictures."""
        return [
            Measure("mean over differences",
                    "mean over the controlled differences of pair accuracy, a tie counts one half",
                    macro_of(_drawn_half), _drawn_half, 0.5),
            *pair_measures(),
            Measure("best of 4", "share of right pictures among those it would choose of four",
                    mean_of(_choice), _choice),
            *comparison_measures(),
        ]  # fmt: skip

    def pair(self, category: str, number: int) -> Item:
        """Pair ``number`` of a controlled difference; which picture comes first is drawn."""
        rng = random.Random(f"{VERSION} {self.split} {self.seed} {category} {number}")
        if category in SPOILERS:
            prompt, (right, wrong) = self._spoiled(category, rng)
        else:
            prompt, (right, wrong) = self._near_miss(category, rng, number)
        ways = len(CHANGES.get(category, "1"))
        key = (
            f"{category}-{number:03d}" if ways == 1 else f"{category}-{number % ways}-{number:03d}"
        )
        made = [Candidate(f"{VERSION}-{self.seed}-{self.split}-{key}-{n}", draw, maker=n)
                for n, draw in (("right", right), ("wrong", wrong))]  # fmt: skip
        truth = [1.0, 0.0]
        if rng.random() < 0.5:
            made, truth = made[::-1], truth[::-1]
        return Item(key=key, prompt=prompt, candidates=tuple(made), truth=tuple(truth),
                    category=category)  # fmt: skip

    def _near_miss(
        self, category: str, rng: random.Random, way: int
    ) -> tuple[str, tuple[Any, Any]]:
        tasks = TASKS_OF[category]
        while True:
            spec = sample_spec(rng, self.split, rng.choice(tasks))
            scenes = scene_pair(category, spec, rng, way)
            if scenes is not None:
                right, wrong = (partial(render, scene, SIDE) for scene in scenes)
                return caption(spec), (right, wrong)

    def _spoiled(self, category: str, rng: random.Random) -> tuple[str, tuple[Any, Any]]:
        spec = sample_spec(rng, self.split, rng.choice(TASKS))
        scene = sample_scene(spec, rng)
        drawn = rng.getrandbits(64)

        def spoiled() -> Image.Image:
            return SPOILERS[category](render(scene, SIDE), random.Random(drawn))

        return caption(spec), (partial(render, scene, SIDE), spoiled)

    def _prompts(self) -> list[str]:
        each = -(-self.generated // len(TASKS))
        by_task = [prompts(self.split, task, each, self.seed) for task in TASKS]
        turns = [own[k] for k in range(each) for own in by_task if k < len(own)]
        return turns[: self.generated]

    def choice(self, prompt: str) -> list[Item]:
        """The generator's four pictures of a prompt with the verifier's verdicts.

        None where all four are right, or none is, or one could not be judged.
        """
        pictures, verdicts = generated(tuple(self._prompts()))[prompt]
        if None in verdicts or len(set(verdicts)) < 2:
            return []
        made = tuple(
            Candidate(f"{VERSION}-{prompt}-{k}", lambda p=p: p, maker="shapes-flow")  # type: ignore[misc]
            for k, p in enumerate(pictures)
        )
        truth = tuple(float(v) for v in verdicts if v is not None)
        key = f"generated-{parse(prompt).task}-{prompt.replace(' ', '-')}"
        return [Item(key=key, prompt=prompt, candidates=made, truth=truth, form="best",
                     category=GENERATED)]  # fmt: skip


def _drawn_half(judged: Any) -> Sequence[float]:
    return half_credit(judged) if judged.item.form == "pair" else []


def _choice(judged: Any) -> Sequence[float]:
    return best(judged) if judged.item.form == "best" else []


Made = dict[str, tuple[tuple[Image.Image, ...], tuple[bool | None, ...]]]


@lru_cache(maxsize=1)
def generated(asked: tuple[str, ...]) -> Made:
    """Pictures of the shipped generator and what the strict verifier says of each."""
    import torch

    from mmalign.policies.load import policy_on
    from mmalign.sampling import generate
    from mmalign.types import Media
    from vision_rewards.shapes import ShapesStrict

    policy, verifier = policy_on("shapes-flow", "cpu", None), ShapesStrict()
    wanted = [(p, request_seed("shapes_rewards", VERSION, p, k)) for p in asked
              for k in range(SAMPLES)]  # fmt: skip
    images: list[Image.Image] = []
    with torch.no_grad():
        for at in range(0, len(wanted), 32):
            some = wanted[at : at + 32]
            media, _ = generate(policy, [p for p, _ in some], [s for _, s in some])
            images += media.to_pil()
    score = verifier.score(Media.from_pil(images), [p for p, _ in wanted])
    verdicts = [v > 0.5 if ok else None for v, ok in zip(score.value.tolist(), score.valid.tolist(),
                                                         strict=True)]  # fmt: skip
    return {
        p: (tuple(images[i : i + SAMPLES]), tuple(verdicts[i : i + SAMPLES]))
        for i, p in zip(range(0, len(wanted), SAMPLES), asked, strict=True)
    }
