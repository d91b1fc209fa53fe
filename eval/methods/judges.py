"""Further judges of the pictures that evaluations kept; scores are kept beside the pictures."""

from __future__ import annotations

import json
import math
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image

from eval.result import EvalResult, Row
from mmalign.runtime.files import atomic_write_json
from mmalign.types import Media
from vision_rewards.factory import load_reward

FILE = "judges.json"
BATCH = 96


def measured(result: EvalResult, measure: str) -> np.ndarray:
    """A measure of every row of an evaluation, ``(K,)``, in the order of its rows.

    ``accuracy`` (strict verdict) and ``partial`` (partial credit) count what could not be scored
    as 0; any other name is a registered reward, NaN where it gave no score.

    Raises:
        UnknownNameError: no such reward. FileNotFoundError: the pictures were not kept.
    """
    if measure == "accuracy":
        return np.array([_or_zero(r.value if r.valid else None) for r in result.rows])
    if measure == "partial":
        return np.array([_or_zero(r.partial if r.valid else None) for r in result.rows])
    return _judged(result, measure)


def _judged(result: EvalResult, name: str) -> np.ndarray:
    judge = _judge(name)
    kept = _kept(result)
    own = kept.get(name, {})
    values = own.get("values", {}) if own.get("identity") == judge.identity else {}
    todo = [r for r in result.rows if r.key not in values]
    for start in range(0, len(todo), BATCH):
        batch = todo[start : start + BATCH]
        with torch.no_grad():
            score = judge.score(_media(result, batch), [r.prompt for r in batch])
        for row, value, valid in zip(batch, score.value.tolist(), score.valid.tolist(),
                                     strict=True):  # fmt: skip
            values[row.key] = value if valid else None
    if todo and result.folder is not None:
        kept[name] = {"identity": judge.identity, "values": values}
        atomic_write_json(result.folder / FILE, kept)
    found = [values[r.key] for r in result.rows]
    return np.array([math.nan if v is None else v for v in found], float)


def _media(result: EvalResult, rows: list[Row]) -> Media:
    images = []
    for row in rows:
        path = result.image_path(row)
        if path is None:
            raise FileNotFoundError(f"{result.folder} kept no picture of {row.key!r} to judge")
        with Image.open(path) as image:
            images.append(image.convert("RGB"))
    return Media.from_pil(images)


def _kept(result: EvalResult) -> dict[str, Any]:
    if result.folder is None or not (result.folder / FILE).is_file():
        return {}
    return dict(json.loads((result.folder / FILE).read_text(encoding="utf-8")))


@cache
def _judge(name: str) -> Any:
    return load_reward(name)


def _or_zero(value: float | None) -> float:
    return 0.0 if value is None else value
