"""The shapes benchmark: GenEval's six task families in the shapes world, judged exactly, offline.

Task split and rules follow GenEval (Ghosh et al., 2310.11513); prompts come from the held-out
splits of :mod:`mmalign.shapes.splits`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

from mmalign.protocols import Request
from mmalign.shapes import TASKS, prompts
from mmalign.types import Media, Score
from vision_rewards.shapes import ShapesPartial, ShapesStrict


def request_seed(benchmark: str, version: str, prompt: str, sample: int) -> int:
    """The noise seed of one picture: 63 bits of a SHA-256, the same on every machine.

    It depends on these four alone, so neither batch size, order nor limit changes a picture.
    """
    digest = hashlib.sha256("\n".join((benchmark, version, prompt, str(sample))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def check_limit(limit: int | None) -> None:
    """Refuse a limit that keeps no request. Raises :class:`ValueError`."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be 1 or more, got {limit}")


class ShapesBenchmark:
    """Six tasks with equally many pictures each.

    Args:
        split: ``train``, ``validation`` or ``test``.
        prompts_per_task: distinct prompts of each task.
        samples_per_prompt: pictures of each prompt.
        seed: which prompts are drawn; the noise of a (prompt, sample) does not depend on it.

    A task with fewer distinct prompts than asked (``single_object`` has 5; ``colors`` has 7 in the
    test split) gets more samples of each, so that every task has
    ``prompts_per_task * samples_per_prompt`` pictures.

    Raises:
        ValueError: a size below 1, or an unknown split.
    """

    name = "shapes"
    version = "1"

    def __init__(
        self,
        split: str = "test",
        prompts_per_task: int = 20,
        samples_per_prompt: int = 2,
        seed: int = 0,
    ) -> None:
        for dial, size in (
            ("prompts_per_task", prompts_per_task),
            ("samples_per_prompt", samples_per_prompt),
        ):
            if size < 1:
                raise ValueError(f"{dial} must be 1 or more, got {size}")
        self.options = {
            "split": split,
            "prompts_per_task": prompts_per_task,
            "samples_per_prompt": samples_per_prompt,
            "seed": seed,
        }
        self._per_task = prompts_per_task * samples_per_prompt
        self._prompts = {t: prompts(split, t, prompts_per_task, seed) for t in TASKS}

    @property
    def identity(self) -> str:
        """What judges the pictures: verifier, rule version, thresholds."""
        return f"{self._strict.identity}, {self._partial.identity}"

    def requests(self, limit: int | None = None) -> list[Request]:
        """Every request in a fixed order that takes the tasks in turn.

        ``limit`` keeps the first ones, so task sizes differ by at most one, and every request kept
        is the same as without a limit.

        Raises:
            ValueError: ``limit`` is below 1.
        """
        check_limit(limit)
        rows = [self._request(task, i) for i in range(self._per_task) for task in TASKS]
        return rows[:limit]

    def judge(self, media: Media, requests: Sequence[Request]) -> Score:
        """Strict verdicts, with the verifier's parts and ``partial`` credit beside them.

        Args:
            media: images ``(B, 3, H, W)``, one for each of the ``B`` requests.
        """
        asked = [r.prompt for r in requests]
        strict, partial = self._strict.score(media, asked), self._partial.score(media, asked)
        return replace(
            strict, parts={**strict.parts, "partial": partial.value}, identity=self.identity
        )

    def _request(self, task: str, index: int) -> Request:
        known = self._prompts[task]
        sample, which = divmod(index, len(known))
        prompt = known[which]
        seed = request_seed(self.name, self.version, prompt, sample)
        return Request(
            key=f"{task}-{which:03d}-{sample:02d}",
            prompt=prompt,
            task=task,
            sample=sample,
            seed=seed,
        )

    @cached_property
    def _strict(self) -> ShapesStrict:
        return ShapesStrict()

    @cached_property
    def _partial(self) -> ShapesPartial:
        return ShapesPartial()
