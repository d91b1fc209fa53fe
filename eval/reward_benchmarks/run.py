"""Runs rewards through a benchmark and ranks them: resumable, unscored items counted, saved."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from eval.metrics.resampling import paired_permutation_test
from eval.provenance import device_name, versions
from eval.result import finite
from eval.reward_benchmarks.answers import AnswerJudge
from eval.reward_benchmarks.base import Loaded, RewardBenchmark
from eval.reward_benchmarks.items import Item, Judged
from eval.reward_benchmarks.measures import Measure
from eval.reward_benchmarks.result import RewardReport, RewardRow
from eval.reward_benchmarks.scoring import Settings, judge_items, unscored
from eval.reward_benchmarks.video import check_decoders
from mmalign.registry import REWARDS
from mmalign.reward_info import RewardInfo
from mmalign.runtime.files import atomic_write_bytes
from mmalign.runtime.log import say
from mmalign.scoring import Journal
from vision_rewards.factory import load_reward

DIGEST_BYTES = 2**30  # a larger file is recognised by its size
REASON = 300  # characters of a reason that the report keeps
FRAMES_HINT = "; ask about its frames: {compose: frames, parts: [NAME]}, or give video_judge"
REASONS = 5


class UnfitError(ValueError):
    """A reward that cannot judge what the benchmark holds; the message says why."""


def evaluate_rewards(
    benchmark: RewardBenchmark,
    rewards: Mapping[str, Any] | Sequence[Any],
    out: Path | str | None = None,
    *,
    limit: int | None = None,
    settings: Settings | None = None,
    overwrite: bool = False,
) -> RewardReport:
    """Ask every reward about every item and rank the rewards by the benchmark's first number.

    With ``out`` an interrupted run continues: finished answers are in ``journals/``. Written are
    ``result.json``, ``report.md``, ``report.html`` and the scores of each item in ``items/``.

    Args:
        benchmark: what to ask.
        rewards: label to whatever :func:`~vision_rewards.factory.load_reward` takes, or a list.
        limit: only the first rows of the benchmark.
        settings: see :class:`~eval.reward_benchmarks.scoring.Settings`.
        overwrite: discard journals that hold answers of another reward under the same label.

    Raises:
        UnfitError: a reward cannot judge this benchmark; before anything is asked where its
            declaration says so.
        DataError: unusable data.
        JournalError: a journal holds answers of another reward.
    """
    specs = _labelled(rewards)
    first = benchmark.load(1).items  # cheap, where all items may take long to make
    for label, spec in specs.items():
        info = declared(spec)
        if info is not None:
            _check(benchmark, label, info, first)
    check_decoders(first)
    loaded = benchmark.load(limit)
    settings = replace(settings or Settings(), video=benchmark.media == "video")
    folder = None if out is None else Path(out)
    runs = [
        _one(benchmark, label, spec, loaded, folder, settings, overwrite)
        for label, spec in specs.items()
    ]
    report = _report(benchmark, runs, loaded, limit, settings)
    if folder is not None:
        _write(report, folder)
        report = replace(report, folder=folder)
    return report


def declared(spec: Any) -> RewardInfo | None:
    """What a reward declares, where that is known without loading it."""
    if isinstance(spec, Mapping) and isinstance(spec.get("reward"), str):
        spec = spec["reward"]
    if isinstance(spec, str):
        name = spec.split("@", 1)[0].strip()
        return next((e.info for e in REWARDS if e.name == name), None)
    return getattr(spec, "info", None)


@dataclass(frozen=True)
class _Run:
    label: str
    identity: str
    judged: list[Judged]
    seconds: float


def _labelled(rewards: Mapping[str, Any] | Sequence[Any]) -> dict[str, Any]:
    if isinstance(rewards, Mapping):
        specs = dict(rewards)
    else:
        specs = {r if isinstance(r, str) else _name(r): r for r in rewards}
        if len(specs) != len(rewards):
            raise UnfitError("a reward is listed twice; give labels: {label: reward}")
    slugs = {_slug(label) for label in specs}
    if not specs or len(slugs) != len(specs):
        said = "no rewards were given" if not specs else "labels must differ in more than signs"
        raise UnfitError(f"{said}: {', '.join(map(repr, specs))}")
    return specs


def _name(spec: Any) -> str:
    if isinstance(spec, Mapping):
        return json.dumps(spec, sort_keys=True, default=str)
    info = getattr(spec, "info", None)
    return str(getattr(info, "name", None) or getattr(spec, "__name__", repr(spec)))


def _slug(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-")[:80]


def _check(benchmark: RewardBenchmark, label: str, info: RewardInfo, items: Sequence[Item]) -> None:
    """Refuse what could never work.

    Raises:
        UnfitError: names the reward, what it lacks and what it could be used for.
    """
    if benchmark.media == "text":
        return  # answers are compared by judges, which is checked when they are loaded
    if benchmark.media not in info.media:
        takes = ", ".join(info.media)
        raise UnfitError(
            f"{label}: takes {takes}, but {benchmark.name} holds {benchmark.media}s"
            + FRAMES_HINT * (benchmark.media == "video")
        )
    given = set(items[0].context) | {"prompt", "opponent"}
    lacking = [need for need in info.needs if need not in given]
    if lacking:
        has = ", ".join(sorted(given - {"opponent"}))
        raise UnfitError(
            f"{label}: needs context[{lacking[0]!r}], but the items of {benchmark.name} have {has}"
        )
    if info.scope != "pointwise" and any(item.form == "rating" for item in items):
        raise UnfitError(
            f"{label}: compares ({info.scope}), but {benchmark.name} asks for a rating of single "
            f"{benchmark.media}s; give a pointwise reward"
        )


def _one(
    benchmark: RewardBenchmark,
    label: str,
    spec: Any,
    loaded: Loaded,
    folder: Path | None,
    settings: Settings,
    overwrite: bool,
) -> _Run:
    """All answers of one reward; it is dropped afterwards, so that the next one fits."""
    model = load_reward(spec)
    _check(benchmark, label, model.info, loaded.items)
    asker: Any = model
    if benchmark.media == "text":
        asker = AnswerJudge(model, **benchmark.options)
    settings = replace(settings, progress=settings.progress and f"{benchmark.name} {label}")
    book = folder and folder / "journals" / f"{_slug(label)}.jsonl"
    start = time.monotonic()
    with nullcontext() if book is None else Journal(book, asker.identity, overwrite) as journal:
        if benchmark.media == "text":
            judged = asker.judge_items(loaded.items, settings, journal)
        else:
            judged = judge_items(model, loaded.items, settings, journal)
    seconds = time.monotonic() - start
    if folder is not None:
        _write_items(folder / "items" / f"{_slug(label)}.jsonl", judged)
    lost = sum(not j.scored for j in judged)
    if lost:
        say(f"{label}: {lost} of {len(judged)} items unscored; the report says why")
    return _Run(label, asker.identity, judged, seconds)


# --- the report -------------------------------------------------------------------------------


def _report(
    benchmark: RewardBenchmark,
    runs: Sequence[_Run],
    loaded: Loaded,
    limit: int | None,
    settings: Settings,
) -> RewardReport:
    measures = list(benchmark.measures())
    rows = [_row(run, measures) for run in runs]
    order = sorted(range(len(rows)), key=lambda i: _rank(rows[i]))
    ranked = [rows[i] for i in order]
    best = runs[order[0]]
    compared = [ranked[0]]
    for i in order[1:]:
        p, shared = compare(best.judged, runs[i].judged, measures[0])
        compared.append(replace(rows[i], p_value=p, shared=shared))
    return RewardReport(
        benchmark=benchmark.name,
        version=benchmark.version,
        mode=benchmark.mode,
        meanings={m.name: m.meaning for m in measures},
        chance={m.name: m.chance for m in measures},
        shares=tuple(m.name for m in measures if m.share),
        rows=tuple(compared),
        problems=loaded.problems,
        provenance=_provenance(benchmark, len(loaded.items), limit, settings),
    )


def _rank(row: RewardRow) -> tuple[bool, float]:
    mean = row.headline.mean
    return math.isnan(mean), -mean if math.isfinite(mean) else 0.0


def _row(run: _Run, measures: Sequence[Measure]) -> RewardRow:
    found = {m.name: m(run.judged) for m in measures}
    reasons = sorted(unscored(run.judged).items(), key=lambda r: -r[1])[:REASONS]
    return RewardRow(
        label=run.label,
        identity=run.identity,
        measures={n: v for n, v in found.items() if v.mean == v.mean or n == measures[0].name},
        categories=_parts(run.judged, measures[0], lambda item: item.category),
        dimensions=_parts(run.judged, replace(measures[0], of=""), lambda item: item.dimension),
        items=len(run.judged),
        unscored=sum(not j.scored for j in run.judged),
        reasons={r[:REASON]: n for r, n in reasons},
        seconds=round(run.seconds, 3),
    )


def _parts(judged: Sequence[Judged], measure: Measure, by: Any) -> dict[str, Any]:
    """The headline within each part; empty where there is only one."""
    names = list(dict.fromkeys(by(j.item) for j in judged))
    if len(names) < 2:
        return {}
    return {name: measure([j for j in judged if by(j.item) == name]) for name in names}


def compare(
    first: Sequence[Judged], second: Sequence[Judged], measure: Measure
) -> tuple[float | None, int]:
    """p-value of "equally good" on items that both scored, and how many points that were."""
    if measure.points is None:
        return None, 0
    mine: dict[str, Sequence[float]] = {j.item.key: measure.points(j) for j in measure.among(first)}
    a: list[float] = []
    b: list[float] = []
    units: list[str] = []
    for j in measure.among(second):
        one, two = mine.get(j.item.key, ()), measure.points(j)
        if len(one) == len(two):  # one of them may leave an item out
            a += one
            b += two
            units += [j.item.unit] * len(one)
    return (paired_permutation_test(a, b, units) if a else None), len(a)


def _provenance(
    benchmark: RewardBenchmark, items: int, limit: int | None, settings: Settings
) -> dict[str, Any]:
    device = settings.device or torch.device("cpu")
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "options": benchmark.options,
        "data": data_digest(benchmark.data),
        "items": items,
        "limit": limit,
        "frames": settings.frames if settings.video else None,
        "device": device_name(device),
        "platform": platform.platform(),
        "versions": versions(),
    }


def data_digest(path: Path | None) -> str | None:
    """Name and SHA-256 of the data file; of a folder the digest of its files' names and sizes."""
    if path is None:
        return None
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(f"{file.relative_to(path).as_posix()} {file.stat().st_size}\n".encode())
        return f"{path.name}/ {digest.hexdigest()[:32]}"
    if path.stat().st_size > DIGEST_BYTES:
        return f"{path.name} of {path.stat().st_size} bytes"
    with path.open("rb") as held:
        while block := held.read(2**20):
            digest.update(block)
    return f"{path.name} {digest.hexdigest()[:32]}"


def _write_items(path: Path, judged: Sequence[Judged]) -> None:
    lines = []
    for j in judged:
        record = {
            "key": j.item.key, "prompt": j.item.prompt, "category": j.item.category,
            "dimension": j.item.dimension, "form": j.item.form, "truth": j.item.truth,
            "makers": [c.maker for c in j.item.candidates],
            "scores": [finite(s) for s in j.scores], "orders": j.orders,
            "parts": {k: finite(v) for k, v in j.parts.items()}, "note": j.note,
        }  # fmt: skip
        lines.append(json.dumps(record, ensure_ascii=False, allow_nan=False))
    atomic_write_bytes(path, ("\n".join(lines) + "\n").encode())


def _write(report: RewardReport, folder: Path) -> None:
    from eval.reward_benchmarks.page import markdown, page_of

    report.save(folder / "result.json")
    atomic_write_bytes(folder / "report.md", markdown(report).encode())
    atomic_write_bytes(folder / "report.html", page_of(report).encode())
