"""What every benchmark over a set of prompts has: official files, requests, a reward, numbers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from eval.benchmarks.shapes import check_limit, request_seed
from eval.benchmarks.sources import SOURCES, cached
from eval.result import Row
from mmalign.protocols import Request, RewardModel
from mmalign.registry import unknown
from mmalign.types import Media, Score

Mode = Literal["compat", "fixed"]
MODES = ("compat", "fixed")
Numbers = dict[str, float | None]


class DataError(ValueError):
    """Official files that cannot be used; the message names the file, the place and the fix."""


class RowError(ValueError):
    """One row that cannot be used; the others are, and the row is named."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt: an id that can be (part of) a file name, its task, and what the files say.

    ``item`` is its name in the official files where that is not the id.
    """

    id: str
    text: str
    task: str
    item: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Loaded:
    """Prompts in the order of the official files, and the rows that could not be used."""

    prompts: tuple[Prompt, ...]
    problems: tuple[str, ...] = ()


Rows = Iterable[tuple[str, Callable[[], Prompt]]]


class PromptBenchmark:
    """Base of benchmarks over prompts: set the attributes, implement :meth:`rows`.

    Args:
        data: the official file or folder; ``None`` takes what ``mmalign data get`` has fetched.
        mode: ``compat`` computes what the authors' script computes, quirks included; ``fixed``
            what the definition says.
        samples_per_prompt: pictures of each prompt; ``None`` takes the official number.
        reward: judges in place of the default one: whatever
            :func:`vision_rewards.factory.load_reward` takes.
        device: where the reward works, ``auto`` is a GPU where there is one.

    Attributes:
        name, version: of the benchmark; the version changes with anything that changes a number.
        files: what ``data`` has to be, for messages.
        samples: the official number of pictures of a prompt.
        reward_spec: the reward that judges by default.
        keeps_parts: whether :meth:`numbers` needs the parts of the scores.
        layout: the official folder layout, a name of :data:`eval.layouts.LAYOUTS`.

    Raises:
        DataError: ``data`` is missing or not there. UnknownNameError: an unknown mode.
        ValueError: fewer than one sample of each prompt.
    """

    name = ""
    version = "1"
    files = ""
    samples = 1
    reward_spec: Any = None
    keeps_parts = False
    layout = "flat"

    def __init__(
        self,
        data: str | Path | None = None,
        *,
        mode: Mode = "compat",
        samples_per_prompt: int | None = None,
        reward: Any = None,
        device: str = "auto",
    ) -> None:
        if mode not in MODES:
            raise unknown(f"mode of {self.name}", mode, MODES)
        if samples_per_prompt is not None and samples_per_prompt < 1:
            raise ValueError(f"samples_per_prompt must be 1 or more, got {samples_per_prompt}")
        self.data, self.mode = self.find(data), mode
        self.samples_per_prompt = samples_per_prompt or self.samples
        self._spec = self.reward_spec if reward is None else reward
        self._device = device

    # --- to implement ---------------------------------------------------------------------------

    def rows(self) -> Rows:
        """Place and maker of the prompt of every row; a maker may raise :class:`RowError`."""
        raise NotImplementedError

    def context(self, prompt: Prompt) -> Mapping[str, Any]:
        """What the reward is told beside the prompt."""
        return {}

    def settings(self) -> dict[str, Any]:
        """Options of the benchmark's own that change numbers."""
        return {}

    def numbers(self, rows: Sequence[Row]) -> Numbers:
        """What the authors report; by default the mean over scored pictures and over tasks."""
        return plain_means(rows)

    # --- what follows ---------------------------------------------------------------------------

    def find(self, data: str | Path | None) -> Path:
        """The official files: ``data``, or what ``mmalign data get`` has fetched.

        Raises:
            DataError: there are none.
        """
        found = cached(self.name) if data is None else Path(data)
        if found is None or not found.exists():
            said = "no data was given" if found is None else f"{found} does not exist"
            fetch = f", or fetch it: mmalign data get {self.name}" if self.name in SOURCES else ""
            raise DataError(
                f"{self.name}: {said}; give {self.files} with --data (data=){fetch}. Official "
                "files are not part of this project"
            )
        return found

    def load(self) -> Loaded:
        """Prompts, and what is wrong with rows that are not among them.

        Raises:
            DataError: not one row can be used, or an id occurs twice.
        """
        prompts: list[Prompt] = []
        problems: list[str] = []
        for where, make in self.rows():
            try:
                prompts.append(make())
            except RowError as error:
                problems.append(f"{where}: {error}")
        if not prompts:
            said = "; ".join(problems[:3]) or "it holds no rows"
            raise DataError(f"{self.name}: no usable prompt in {self.data}: {said}")
        seen: set[str] = set()
        for prompt in prompts:
            if prompt.id in seen:
                raise DataError(f"{self.name}: the id {prompt.id!r} occurs twice in {self.data}")
            seen.add(prompt.id)
        return Loaded(tuple(prompts), (*problems, *twice_asked(prompts, self.data)))

    @cached_property
    def loaded(self) -> Loaded:
        """:meth:`load`, once."""
        return self.load()

    @property
    def problems(self) -> tuple[str, ...]:
        """Rows of the official files that could not be used."""
        return self.loaded.problems

    @cached_property
    def options(self) -> dict[str, Any]:
        """What changes requests or numbers besides name and version."""
        digest = hashlib.sha256()
        for prompt in self.loaded.prompts:
            digest.update(repr((prompt.id, prompt.text, prompt.task)).encode())
        return {"mode": self.mode, "samples_per_prompt": self.samples_per_prompt,
                "prompts": digest.hexdigest()[:16], **self.settings()}  # fmt: skip

    @property
    def identity(self) -> str:
        """What judges the pictures."""
        return self.reward.identity

    @cached_property
    def reward(self) -> RewardModel:
        """The reward that judges; a reward that raises leaves its pictures unscored."""
        from vision_rewards.factory import load_reward
        from vision_rewards.guard import GuardedReward

        return GuardedReward(load_reward(self._spec), max_failed_share=1.0)

    def requests(self, limit: int | None = None) -> list[Request]:
        """Every request in a fixed order that takes the tasks in turn, prompt by prompt.

        ``limit`` keeps the first ones; every request kept is the same as without a limit.

        Raises:
            ValueError: ``limit`` is below 1.
        """
        check_limit(limit)
        made = [
            Request(
                key=f"{prompt.id}-{sample}",
                prompt=prompt.text,
                task=prompt.task,
                sample=sample,
                item=prompt.item or prompt.id,
                metadata=prompt.facts if self.layout == "geneval" else {},
                seed=request_seed(self.name, self.version, f"{prompt.id}\n{prompt.text}", sample),
            )
            for prompt in in_turn(self.loaded.prompts)
            for sample in range(self.samples_per_prompt)
        ]
        return made[:limit]

    def judge(self, media: Media, requests: Sequence[Request]) -> Score:
        """Score pictures ``(B, 3, H, W)``, one for each of the ``B`` requests."""
        prompts = [self.prompt_of(r.key) for r in requests]
        texts = [p.text for p in prompts]
        return self.scored(self.reward, media, texts, [self.context(p) for p in prompts])

    def scored(
        self,
        reward: RewardModel,
        media: Media,
        texts: Sequence[str],
        context: Sequence[Mapping[str, Any]] | None = None,
    ) -> Score:
        """Scores of a reward on the device that was asked for, back on the CPU."""
        from mmalign.runtime.device import pick_device

        pixels = Media(media.data.to(pick_device(self._device)))
        return reward.score(pixels, texts, context).to("cpu")

    def prompt_of(self, key: str) -> Prompt:
        """The prompt of a request's key."""
        return self._by_id[key.rpartition("-")[0]]

    @cached_property
    def _by_id(self) -> dict[str, Prompt]:
        return {p.id: p for p in self.loaded.prompts}


def twice_asked(prompts: Sequence[Prompt], data: Path) -> list[str]:
    """One sentence about texts that occur more than once within a task; nothing without any."""
    first: dict[tuple[str, str], str] = {}
    again: dict[str, str] = {}
    for prompt in prompts:
        before = first.setdefault((prompt.task, " ".join(prompt.text.split())), prompt.id)
        if before != prompt.id:
            again.setdefault(prompt.text, f"{before} and {prompt.id}")
    if not again:
        return []
    text, where = next(iter(again.items()))
    return [f"{len(again)} prompts occur more than once in {data.name}, such as {text!r} ({where})"]


def in_turn(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The tasks taken in turn, each in its own order: a prefix is balanced over tasks."""
    tasks: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        tasks.setdefault(prompt.task, []).append(prompt)
    longest = max(len(group) for group in tasks.values())
    return [group[i] for i in range(longest) for group in tasks.values() if i < len(group)]


def scored_rows(rows: Iterable[Row]) -> list[tuple[Row, float]]:
    """Rows that were scored, with their values."""
    return [(r, r.value) for r in rows if r.valid and r.value is not None]


def mean(values: Iterable[float]) -> float | None:
    """The mean; ``None`` of nothing."""
    found = list(values)
    return sum(found) / len(found) if found else None


def part_mean(rows: Iterable[Row], name: str) -> float | None:
    """The mean of a part of the scores over the rows that have it."""
    return mean(value for r in rows if (value := r.parts.get(name)) is not None)


def grouped(rows: Sequence[Row], key: Callable[[Row], str]) -> dict[str, list[float]]:
    """Values of scored rows by a key, in order of appearance."""
    groups: dict[str, list[float]] = {}
    for row, value in scored_rows(rows):
        groups.setdefault(key(row), []).append(value)
    return groups


def plain_means(rows: Sequence[Row]) -> Numbers:
    """``overall``, the mean over scored pictures, and the mean of each task's."""
    tasks = {f"{task}": mean(values) for task, values in grouped(rows, lambda r: r.task).items()}
    return {"overall": mean(v for _, v in scored_rows(rows)), **tasks}


def with_value(score: Score, part: str) -> Score:
    """The score whose value is one of its parts.

    Raises:
        ValueError: the reward has no such part: it is no reward for this benchmark.
    """
    if part not in score.parts:
        if not score.parts and not bool(score.valid.any()):
            return score  # nothing was scored, which has no parts
        raise ValueError(f"the reward gives no part {part!r}: it cannot judge this benchmark")
    value = score.parts[part]
    return replace(score, value=value, valid=score.valid & value.isfinite())


def safe_id(text: str) -> str:
    """``text`` as a part of a file name.

    Raises:
        RowError: nothing of it is left.
    """
    found = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")
    if not found:
        raise RowError(f"{text!r} cannot be an id; use letters and digits")
    return found
