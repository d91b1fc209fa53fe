"""WISE (Niu et al. 2025, 2503.07265): does the picture show what the prompt takes for known?

The judge sees prompt and explanation. ``legacy``, with consistency ``c``, realism ``r`` and
aesthetics ``a`` in {0, 1, 2}::

    WiScore = (0.7 c + 0.2 r + 0.1 a) / 2
    overall = 0.4 culture + 0.167 time + 0.133 space + 0.1 biology + 0.1 physics + 0.1 chemistry

``verified`` (the revised prompts): one verdict in {0, 1}, and
``overall = 0.4 culture + 0.12 (time + space + biology + physics + chemistry)``. The two are
separate protocols; their numbers must never stand in one table. Both modes are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from eval.benchmarks.base import (
    DataError,
    Numbers,
    Prompt,
    PromptBenchmark,
    RowError,
    Rows,
    grouped,
    mean,
    with_value,
)
from eval.benchmarks.tables import json_of
from eval.result import Row
from mmalign.protocols import Request
from mmalign.registry import unknown
from mmalign.types import Media, Score
from vision_rewards.judge.rubric import Criterion, Rubric

Variant = Literal["legacy", "verified"]
FILES = ("cultural_common_sense", "spatio-temporal_reasoning", "natural_science")
WEIGHTS = {
    "legacy": {"culture": 0.4, "time": 0.167, "space": 0.133,
               "biology": 0.1, "physics": 0.1, "chemistry": 0.1},
    "verified": {"culture": 0.4, "time": 0.12, "space": 0.12,
                 "biology": 0.12, "physics": 0.12, "chemistry": 0.12},
}  # fmt: skip
_THREE = (0.0, 2.0)
RUBRICS = {
    "legacy": Rubric(name="wise", criteria=(
        Criterion(name="consistency", weight=0.7, scale=_THREE, description=(
            "Does it show what the text means, as the explanation says it? 0 misses it, 1 shows a "
            "part, 2 everything without any mistake")),
        Criterion(name="realism", weight=0.2, scale=_THREE, description=(
            "Is it physically plausible? 0 it is not, 1 has flaws, 2 could be a photograph")),
        Criterion(name="aesthetics", weight=0.1, scale=_THREE, description=(
            "Is it pleasing? 0 it is not, 1 is acceptable, 2 exceptional")),
    )),
    "verified": Rubric(name="wise_verified", criteria=(
        Criterion(name="correct", scale=(0.0, 1.0), description=(
            "Does it show what the text means, as the explanation says it? 1 yes, 0 no")),
    )),
}  # fmt: skip


class Wise(PromptBenchmark):
    """1,000 prompts, one picture each; ``data`` is the folder of the three JSON files.

    The published judge is GPT-4o-2024-05-13 (``legacy``) or Qwen3.5-35B-A3B (``verified``), asked
    in other words; numbers of another judge are not comparable with theirs.

    Args:
        variant: ``legacy`` or ``verified``.
        data, mode, samples_per_prompt, reward, device: see :class:`PromptBenchmark`.
    """

    name = "wise"
    version = "1"
    files = "a folder with " + ", ".join(f"{name}.json" for name in FILES)
    reward_spec = "rubric_judge"
    keeps_parts = True
    layout = "wise"

    def __init__(self, data: Any = None, *, variant: Variant = "legacy", **common: Any) -> None:
        if variant not in WEIGHTS:
            raise unknown("variant of wise", variant, WEIGHTS)
        self.variant = variant
        super().__init__(data, **common)

    def settings(self) -> dict[str, Any]:
        """The variant."""
        return {"variant": self.variant}

    def rows(self) -> Rows:
        """One prompt for each record; the domain follows from the official id."""
        files = [self.data] if self.data.is_file() else self._files()
        for path in files:
            records = json_of(path)
            if not isinstance(records, list):
                raise DataError(f"{path} must hold a list of prompts")
            for k, record in enumerate(records):
                yield f"{path.name}, entry {k}", lambda record=record: _prompt(record)  # type: ignore[misc]

    def _files(self) -> list[Path]:
        found = [self.data / f"{n}.json" for n in FILES if (self.data / f"{n}.json").is_file()]
        if not found:
            raise DataError(f"{self.data} holds none of {', '.join(FILES)} (.json)")
        return found

    def context(self, prompt: Prompt) -> Mapping[str, Any]:
        """The rubric of the variant."""
        return {"rubric": RUBRICS[self.variant]}

    def judge(self, media: Media, requests: Sequence[Request]) -> Score:
        """WiScore of each picture, or the verdict; the judge reads the explanation too.

        Raises:
            ValueError: the reward does not judge by the rubric it is given.
        """
        prompts = [self.prompt_of(r.key) for r in requests]
        texts = [f"{p.text}\nExplanation: {p.facts['explanation']}" for p in prompts]
        score = self.scored(self.reward, media, texts, [self.context(p) for p in prompts])
        with_value(score, RUBRICS[self.variant].criteria[0].name)  # or it did not read the rubric
        return score

    def numbers(self, rows: Sequence[Row]) -> Numbers:
        """The weighted overall score (``None`` while a domain is missing) and the domains."""
        found = {domain: mean(v) for domain, v in grouped(rows, lambda r: r.task).items()}
        weights = WEIGHTS[self.variant]
        known = {d: found[d] for d in weights if found.get(d) is not None}
        total = sum(weights[d] * (value or 0.0) for d, value in known.items())
        return {"overall": total if len(known) == len(weights) else None, **known}


def domain_of(number: int) -> str:
    """The domain of an official id, 1 to 1000.

    Raises:
        RowError: another number.
    """
    for last, domain in ((400, "culture"), (567, "time"), (700, "space"), (800, "biology"),
                         (900, "physics"), (1000, "chemistry")):  # fmt: skip
        if 1 <= number <= last:
            return domain
    raise RowError(f"prompt_id must lie in 1 to 1000, got {number}")


def _prompt(record: Any) -> Prompt:
    if not isinstance(record, Mapping):
        raise RowError(f"expected an object, got {type(record).__name__}")
    number, text = record.get("prompt_id"), record.get("Prompt")
    if not isinstance(number, int) or isinstance(number, bool):
        raise RowError(f"prompt_id must be a whole number, got {number!r}")
    if not isinstance(text, str) or not text.strip():
        raise RowError("no text 'Prompt'")
    facts = {"explanation": str(record.get("Explanation", ""))}
    domain = domain_of(number)
    return Prompt(id=f"{number:04d}", item=str(number), text=text.strip(), task=domain, facts=facts)
