"""From pictures to rows: whatever can be judged is, by size; the rest says why not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from eval.clips import media_of
from eval.making import Made
from eval.result import Row, finite
from mmalign.protocols import Benchmark, Request
from mmalign.types import Score


def judge_batch(
    benchmark: Benchmark,
    batch: Sequence[Request],
    made: Sequence[Made],
    place: Callable[[str], str | None],
) -> list[Row]:
    """A row for each request. Pictures of one size are judged together.

    Args:
        place: where the picture of a key is kept, relative to the result's folder.
    """
    whole: dict[tuple[int, ...], list[int]] = {}
    rows: dict[int, Row] = {}
    for i, (request, one) in enumerate(zip(batch, made, strict=True)):
        if one.image is None or one.reason:
            rows[i] = unscored(request, one.reason, None if one.image is None else place)
        else:
            whole.setdefault(one.image.size, []).append(i)
    keep = bool(getattr(benchmark, "keeps_parts", False))
    for places in whole.values():
        asked = [batch[i] for i in places]
        images = [image for i in places if (image := made[i].image) is not None]
        score = benchmark.judge(media_of(images), asked)
        if len(score) != len(asked):
            raise ValueError(f"{benchmark.name} judged {len(score)} of {len(asked)} pictures")
        score = score.to("cpu")
        for k, i in enumerate(places):
            rows[i] = _row(batch[i], score, k, place(batch[i].key), keep)
    return [rows[i] for i in range(len(batch))]


def unscored(
    request: Request, reason: str, place: Callable[[str], str | None] | None = None
) -> Row:
    """The row of a picture that has no score."""
    return Row(
        key=request.key,
        prompt=request.prompt,
        task=request.task,
        sample=request.sample,
        seed=request.seed,
        value=None,
        valid=False,
        note=reason,
        image=None if place is None else place(request.key),
    )


def _row(request: Request, score: Score, index: int, image: str | None, keep_parts: bool) -> Row:
    valid = bool(score.valid[index])
    partial = score.parts.get("partial")
    return Row(
        key=request.key,
        prompt=request.prompt,
        task=request.task,
        sample=request.sample,
        seed=request.seed,
        value=float(score.value[index]) if valid else None,
        valid=valid,
        note=score.notes[index] if score.notes else "",
        partial=None if partial is None else finite(float(partial[index])),
        parts={n: finite(float(p[index])) for n, p in score.parts.items()} if keep_parts else {},
        image=image,
    )
