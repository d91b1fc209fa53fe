"""Pictures inside reports: embedded as data, framed by verdict, side by side for the same seeds."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Sequence
from functools import cached_property
from itertools import combinations

import numpy as np
from PIL import Image

from eval.html import Markup, el
from eval.result import EvalResult, Row

EMBED_SIDE = 256  # larger pictures are scaled down for the page; the folder keeps the originals
PIXELATED_SIDE = 128  # smaller ones are shown pixel by pixel
DIVERSITY_SIDE = 32


class Pairs:
    """Rows of two evaluations of the same requests, joined by key.

    Raises:
        ValueError: the evaluations differ in benchmark or share no request with equal seeds.
    """

    def __init__(self, before: EvalResult, after: EvalResult) -> None:
        for name in ("benchmark", "version"):
            one, two = getattr(before, name), getattr(after, name)
            if one != two:
                raise ValueError(f"before and after differ in {name}: {one!r} and {two!r}")
        self.before, self.after = before, after
        later = {(r.key, r.prompt, r.seed): r for r in after.rows}
        shared = [(r, later.get((r.key, r.prompt, r.seed))) for r in before.rows]
        self.rows = [(a, b) for a, b in shared if b is not None]
        if not self.rows:
            raise ValueError("before and after share no request with the same prompt and seed")

    @property
    def unmatched(self) -> int:
        """Requests that only one of the two evaluations has."""
        return len(self.before.rows) + len(self.after.rows) - 2 * len(self.rows)

    @cached_property
    def tasks(self) -> list[str]:
        """Tasks in the benchmark's order."""
        return list(dict.fromkeys(a.task for a, _ in self.rows))

    @cached_property
    def fixed(self) -> list[tuple[Row, Row]]:
        """Not right before (wrong, or beyond judging), right after."""
        return [(a, b) for a, b in self.rows if not _right(a) and _right(b)]

    @cached_property
    def broken(self) -> list[tuple[Row, Row]]:
        """Right before, no longer right after (wrong, or beyond judging)."""
        return [(a, b) for a, b in self.rows if _right(a) and not _right(b)]

    def sample(self, task: str, count: int, seed: int = 0) -> list[tuple[Row, Row]]:
        """``count`` pairs of ``task`` drawn without looking at their scores."""
        return fair_sample([p for p in self.rows if p[0].task == task], count, f"{seed} {task}")


def fair_sample(rows: Sequence, count: int, seed: object = 0) -> list:
    """``count`` rows by a fixed random draw, in their original order."""
    chosen = random.Random(f"report {seed}").sample(range(len(rows)), min(count, len(rows)))
    return [rows[i] for i in sorted(chosen)]


def pair_card(pairs: Pairs, before: Row, after: Row, note: bool = False) -> Markup:
    """Before and after of one request, prompt below."""
    said = after.note or before.note if note else ""
    return el(
        "figure",
        el("div", picture(pairs.before, before, "before"),
           picture(pairs.after, after, "after"), class_="pair"),
        el("figcaption", before.prompt, el("span", said) if said else None),
        class_="shot",
    )  # fmt: skip


def card(result: EvalResult, row: Row) -> Markup:
    """One picture with its prompt and what the judge said."""
    said = row.note or ("" if row.partial is None else f"partial credit {row.partial:.2f}")
    caption = el("figcaption", row.prompt, el("span", said) if said else None)
    return el("figure", picture(result, row, result.label), caption, class_="shot")


def grid(cards: Sequence[Markup], single: bool = False) -> Markup:
    """Cards in as many columns as fit."""
    return el("div", *cards, class_="grid single" if single else "grid")


def prompt_diversity(result: EvalResult) -> float | None:
    """Mean distance between pictures of one prompt, in [0, 1]; ``None`` without such pictures.

    Root-mean-square difference over a 32 x 32 version of each pair, averaged over pairs, then
    prompts.  It falls when a generator collapses to one picture for each prompt.
    """
    groups: dict[str, list[np.ndarray]] = {}
    for row in result.rows:
        path = result.image_path(row)
        if path is not None and (pixels := _pixels(path)) is not None:
            groups.setdefault(row.prompt, []).append(pixels)
    means = [
        np.mean([np.sqrt(((a - b) ** 2).mean()) for a, b in combinations(g, 2)])
        for g in groups.values()
        if len(g) > 1
    ]
    return float(np.mean(means)) if means else None


def verdict_of(row: Row) -> tuple[str, str, str]:
    """CSS class, sign and word for a row's verdict."""
    if not row.valid:
        return "na", "?", "not scored"
    return ("ok", "✓", "correct") if _right(row) else ("no", "✕", "wrong")


def data_uri(data: bytes) -> tuple[str, bool]:
    """An image file as a ``data:`` address, and whether to show it pixel by pixel."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        side = max(image.size)
        if side > EMBED_SIDE:
            image.thumbnail((EMBED_SIDE, EMBED_SIDE), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, format="PNG", optimize=True)
            data = buffer.getvalue()
    return "data:image/png;base64," + base64.b64encode(data).decode(), side <= PIXELATED_SIDE


def picture(result: EvalResult, row: Row, role: str) -> Markup:
    """The picture of a row alone, framed by its verdict."""
    tone, sign, word = verdict_of(row)
    said = ", ".join(s for s in (role, word, row.note) if s)
    return el("div", _image(result, row, said), el("b", sign, aria_hidden="true"),
              class_=f"pic {tone}", title=said)  # fmt: skip


def _image(result: EvalResult, row: Row, role: str) -> Markup:
    path = result.image_path(row)
    if path is None:
        return el("div", "not kept", class_="missing")
    try:
        address, pixelated = data_uri(path.read_bytes())
    except (OSError, ValueError):
        return el("div", "unreadable", class_="missing")
    look = None if pixelated else "large"
    return el("img", src=address, alt=f"{row.prompt} ({role})", class_=look)


def _pixels(path: object) -> np.ndarray | None:
    try:
        with Image.open(str(path)) as image:
            small = image.convert("RGB").resize((DIVERSITY_SIDE,) * 2, Image.Resampling.BOX)
    except (OSError, ValueError):
        return None
    return np.asarray(small, np.float32) / 255


def _right(row: Row) -> bool:
    return row.valid and row.value is not None and row.value >= 0.5
