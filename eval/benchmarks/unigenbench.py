"""UniGenBench (Wang et al. 2025, 2510.18701): a judge checks one to ten points of each picture.

With an answer in {0, 1} to each of the test points of a picture, over all pictures::

    dimension         share of points of that name that are met
    primary dimension the same over all points whose name is equal before the first "-"
    micro             share of all points that are met
    macro             mean of the primary dimensions

The published script prints the dimensions only; ``micro`` and ``macro`` are named here so that
they are not taken for each other. Pictures whose answer cannot be read are left out, as there, and
counted as unscored. Both modes are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eval.benchmarks.base import Numbers, Prompt, PromptBenchmark, RowError, Rows, mean, safe_id
from eval.benchmarks.tables import cell, one_file, parsed, table_rows
from eval.result import Row
from vision_rewards.judge.rubric import Criterion, Rubric


class UniGenBench(PromptBenchmark):
    """600 prompts, four pictures each; ``data`` is ``test_prompts_en.csv``.

    The reward is a rubric judge; each test point is a criterion of 0 or 1, in the words of the
    benchmark's descriptions. The published judges (Gemini 2.5 Pro, or the authors' Qwen models)
    are asked in other words, and numbers of another judge are not comparable with theirs.

    Args:
        data, mode, samples_per_prompt, reward, device: see :class:`PromptBenchmark`.
    """

    name = "unigenbench"
    version = "1"
    files = "test_prompts_en.csv"
    samples = 4
    reward_spec = "rubric_judge"
    keeps_parts = True
    layout = "unigenbench"

    def rows(self) -> Rows:
        """One prompt for each row."""
        path = one_file(self.data, self.files, f"data/{self.files}")
        for where, row in table_rows(path, ("index", "prompt_en", "sub_dims_en")):
            yield where, lambda row=row: _prompt(row)  # type: ignore[misc]

    def context(self, prompt: Prompt) -> Mapping[str, Any]:
        """The test points as a rubric."""
        points = prompt.facts["points"]
        criteria = tuple(
            Criterion(name=f"point_{k}", scale=(0.0, 1.0), description=f"{name}: {text}")
            for k, (name, text) in enumerate(points)
        )
        return {"rubric": Rubric(name="unigenbench", criteria=criteria)}

    def numbers(self, rows: Sequence[Row]) -> Numbers:
        """Micro and macro means, primary dimensions, dimensions."""
        fine: dict[str, list[float]] = {}
        for row in rows:
            points = self.prompt_of(row.key).facts["points"] if row.valid else ()
            for k, (name, _) in enumerate(points):
                met = row.parts.get(f"point_{k}")
                fine.setdefault(name, []).append(float(met == 1))
        broad: dict[str, list[float]] = {}
        for name, met_ones in fine.items():
            broad.setdefault(name.split("-", 1)[0].strip(), []).extend(met_ones)
        primary = {name: mean(values) for name, values in broad.items()}
        return {
            "micro": mean(v for values in fine.values() for v in values),
            "macro": mean(v for v in primary.values() if v is not None),
            **primary,
            **{f"point: {name}": mean(values) for name, values in sorted(fine.items())},
        }


def _prompt(row: dict[str, str]) -> Prompt:
    index, text = cell(row, "index"), cell(row, "prompt_en")
    record = parsed(cell(row, "sub_dims_en"))
    names, said = record.get("Testpoints"), record.get("Testpoint Description")
    if not isinstance(names, list) or not isinstance(said, list) or not names:
        raise RowError("sub_dims_en has no lists 'Testpoints' and 'Testpoint Description'")
    if len(names) != len(said):
        raise RowError(f"{len(names)} test points, {len(said)} descriptions")
    points = [(str(n), str(t)) for n, t in zip(names, said, strict=True)]
    task = str(record.get("Primary Categories") or "all")
    return Prompt(id=safe_id(index), item=index, text=text, task=task, facts={"points": points})
