"""GenEval (Ghosh et al. 2023, 2310.11513): six tasks, judged by an object detector and CLIP.

Official numbers, over ``N`` pictures with a verdict ``c`` in {0, 1}::

    task      mean of c over the pictures of a task
    overall   mean of the six tasks, each weighing the same
    images    mean of c over all pictures
    prompts   share of prompts with c = 1 for any picture

``fixed`` takes the strict verdicts: exactly the asked number of objects, every one of them
judged; ``compat`` the published rules (at least the asked number, and the exclude clause).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eval.benchmarks.base import (
    Numbers,
    Prompt,
    PromptBenchmark,
    RowError,
    Rows,
    grouped,
    mean,
    scored_rows,
    with_value,
)
from eval.benchmarks.tables import json_lines, one_file, parsed
from eval.result import Row
from mmalign.protocols import Request
from mmalign.types import Media, Score
from vision_rewards.geneval_rules import Requirement

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


class GenEvalBenchmark(PromptBenchmark):
    """553 prompts, four pictures each; ``data`` is ``evaluation_metadata.jsonl``.

    The reward has to give the parts ``official`` and ``strict``; the default one is
    :class:`vision_rewards.geneval.GenEval` with its published networks.

    Args:
        data, mode, samples_per_prompt, reward, device: see :class:`PromptBenchmark`.
    """

    name = "geneval"
    version = "1"
    files = "evaluation_metadata.jsonl"
    samples = 4
    reward_spec = "geneval"
    layout = "geneval"

    def rows(self) -> Rows:
        """One prompt for each line."""
        path = one_file(self.data, self.files, f"prompts/{self.files}")
        for index, (where, text) in enumerate(json_lines(path)):
            yield where, lambda index=index, text=text: self._prompt(index, text)  # type: ignore[misc]

    def _prompt(self, index: int, text: str) -> Prompt:
        facts = parsed(text)
        tag, prompt = facts.get("tag"), facts.get("prompt")
        if tag not in TASKS:
            raise RowError(f"tag {tag!r} is none of {', '.join(TASKS)}")
        if not isinstance(prompt, str) or not prompt.strip():
            raise RowError("no text 'prompt'")
        try:
            Requirement.of(facts)
        except (ValueError, TypeError, AttributeError) as error:
            raise RowError(str(error)) from error
        return Prompt(id=f"{index:05d}", text=prompt, task=tag, facts=facts)

    def context(self, prompt: Prompt) -> Mapping[str, Any]:
        """The line of the metadata."""
        return {"geneval": prompt.facts}

    def judge(self, media: Media, requests: Sequence[Request]) -> Score:
        """Verdicts 0 or 1 of the mode."""
        part = "official" if self.mode == "compat" else "strict"
        return with_value(super().judge(media, requests), part)

    def numbers(self, rows: Sequence[Row]) -> Numbers:
        """Overall, the tasks, and the shares of correct images and prompts."""
        found = grouped(rows, lambda r: r.task)
        tasks = {task: mean(found[task]) for task in TASKS if task in found}
        prompts = grouped(rows, lambda r: self.prompt_of(r.key).id)
        return {
            "overall": mean(v for v in tasks.values() if v is not None),
            **tasks,
            "correct images": mean(v for _, v in scored_rows(rows)),
            "correct prompts": mean(float(max(values)) for values in prompts.values()),
        }
