"""Answers that the authors' scripts of UniGenBench have written: read instead of asked for.

Their results file is a CSV with ``index``, ``testpoint`` (a list), ``output`` (the judge's whole
answer) and ``img_path`` (``.../12_3.png`` is picture 3 of prompt 12), one row for each picture.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from eval.benchmarks.base import DataError
from eval.benchmarks.tables import table_rows
from mmalign.protocols import Request
from mmalign.runtime.files import digest_of
from mmalign.types import Score
from vision_rewards.judge.backend import Reply
from vision_rewards.judge.checklist import read_verdicts
from vision_rewards.judge.parsing import UnreadableError

COLUMNS = ("index", "testpoint", "output", "img_path")
_NAME = re.compile(r"(\d+)_(\d+)\.\w+$")


@dataclass(frozen=True)
class Answers:
    """Answers by (prompt, picture), with the test points they were asked about."""

    identity: str
    said: dict[tuple[str, int], tuple[list[str], str]]

    def score(self, requests: Sequence[Request], points: Sequence[Sequence[str]]) -> Score:
        """The verdicts on every request; without a readable answer it is unscored.

        Raises:
            DataError: an answer is about other test points than the benchmark's.
        """
        rows, notes = [], []
        for request, names in zip(requests, points, strict=True):
            met, note = self._verdicts(request, list(names))
            rows.append(met)
            notes.append(note)
        value = torch.tensor([sum(r) / len(r) if r else math.nan for r in rows])
        parts = {
            f"point_{k}": torch.tensor([float(r[k]) if k < len(r) else math.nan for r in rows])
            for k in range(max(map(len, rows), default=0))
        }
        told = tuple(notes) if any(notes) else ()
        return Score(value, value.isfinite(), parts, told, self.identity)

    def _verdicts(self, request: Request, names: list[str]) -> tuple[list[int], str]:
        found = self.said.get((request.item, request.sample))
        if found is None:
            return [], f"no answer about picture {request.sample} of prompt {request.item}"
        asked, output = found
        if asked != names:
            raise DataError(
                f"the answer about picture {request.sample} of prompt {request.item} is about "
                f"{asked}, the benchmark's test points are {names}: it belongs to another file "
                "of prompts; give that with --data"
            )
        try:
            return read_verdicts(Reply(text=output), len(names))[0], ""
        except UnreadableError as error:
            return [], f"unreadable: {error}"


def read_answers(path: Path) -> Answers:
    """A results file of the authors' scripts.

    Raises:
        DataError: it is not there, lacks a column, or a row names no picture or holds no list of
            test points, or a picture occurs twice.
    """
    if not path.is_file():
        raise DataError(f"answers {path} is no file; give the CSV that the authors' script wrote")
    said: dict[tuple[str, int], tuple[list[str], str]] = {}
    for where, row in table_rows(path, COLUMNS):
        named = _NAME.search(row["img_path"] or "")
        points = _names(row["testpoint"] or "")
        if named is None or points is None:
            column, wanted = ("img_path", "INDEX_SAMPLE.png") if named is None else (
                "testpoint", "a list of names")  # fmt: skip
            raise DataError(f"{path}, {where}: {column} is {row[column]!r}, expected {wanted}")
        key = named[1], int(named[2])
        if key in said:
            raise DataError(f"{path}, {where}: picture {named[0]} has two answers; keep one")
        said[key] = points, row["output"] or ""
    return Answers(f"answers@{digest_of(path)[:12]}", said)


def _names(text: str) -> list[str] | None:
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None
    return [str(n) for n in found] if isinstance(found, list) else None
