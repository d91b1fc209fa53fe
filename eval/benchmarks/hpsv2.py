"""The HPSv2 benchmark (Wu et al. 2023, 2306.09341): four styles, one picture a prompt.

With ``s`` the score of a picture, as the authors' script prints them, times 100::

    style    mean of the means of consecutive chunks of 80 pictures, and their deviation
    average  mean of all s

The last chunk of a style may be shorter, which weighs its pictures more: a quirk for numbers of
prompts that 80 does not divide. ``fixed`` takes the mean of the style's pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eval.benchmarks.base import (
    DataError,
    Numbers,
    Prompt,
    PromptBenchmark,
    RowError,
    Rows,
    mean,
    scored_rows,
)
from eval.benchmarks.tables import json_of
from eval.result import Row

STYLES = ("anime", "concept-art", "paintings", "photo")
CHUNK = 80


class HPSv2Benchmark(PromptBenchmark):
    """800 prompts a style, one picture each; ``data`` is the folder of the four JSON files.

    Args:
        data, mode, samples_per_prompt, reward, device: see :class:`PromptBenchmark`; the default
            reward is HPSv2.1, ``hpsv2`` gives the numbers of the first version.
    """

    name = "hpsv2"
    version = "1"
    files = "a folder with " + ", ".join(f"{s}.json" for s in STYLES)
    reward_spec = "hpsv2_1"
    layout = "hpsv2"

    def rows(self) -> Rows:
        """One prompt for each entry of each style."""
        folder = self.data
        if (folder / "benchmark").is_dir():
            folder = folder / "benchmark"
        there = [folder / f"{s}.json" for s in STYLES if (folder / f"{s}.json").is_file()]
        if not there:
            raise DataError(f"{self.data} holds none of {', '.join(STYLES)} (.json)")
        for path in there:
            yield from _style(path)

    def numbers(self, rows: Sequence[Row]) -> Numbers:
        """The average, each style, and the deviation over its chunks; times 100."""
        styles: dict[str, list[tuple[int, float]]] = {}
        for row, value in scored_rows(rows):
            order = int(self.prompt_of(row.key).item)
            styles.setdefault(row.task, []).append((order, 100 * value))
        found: Numbers = {"average": mean(v for group in styles.values() for _, v in group)}
        for style, group in styles.items():
            values = [v for _, v in sorted(group)]
            chunks = [values[i : i + CHUNK] for i in range(0, len(values), CHUNK)]
            means = [sum(c) / len(c) for c in chunks]
            centre = sum(means) / len(means)
            found[style] = centre if self.mode == "compat" else mean(values)
            spread = sum((m - centre) ** 2 for m in means) / len(means)
            found[f"{style}, deviation of chunks"] = spread**0.5
        return found


def _style(path: Path) -> Rows:
    prompts = json_of(path)
    if not isinstance(prompts, list):
        raise DataError(f"{path} must hold a list of prompts")
    for k, text in enumerate(prompts):
        yield f"{path.name}, entry {k}", lambda k=k, text=text: _prompt(path.stem, k, text)  # type: ignore[misc]


def _prompt(style: str, index: int, text: object) -> Prompt:
    if not isinstance(text, str) or not text.strip():
        raise RowError(f"expected a prompt, got {text!r}")
    return Prompt(id=f"{style}-{index:05d}", item=str(index), text=text.strip(), task=style)
