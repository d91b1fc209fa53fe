"""Rows of the small VLM's training: pictures with several questions each, packed into batches."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmalign.shapes import COLORS, SHAPES, PromptSpec, sample_spec
from trainers.pretrain.data import TASK_WEIGHTS
from trainers.pretrain.vlm_judge import (
    ALL_ASKERS,
    JUDGE_KINDS,
    PAIR_KINDS,
    compare_as_judge,
    written_rubric,
)
from trainers.pretrain.vlm_model import ASSISTANT, USER
from trainers.pretrain.vlm_pictures import (
    HELD_OUT_COLORS,
    Picture,
    askable,
    recolour,
    render_pictures,
    spoil,
)
from trainers.pretrain.vlm_questions import KINDS, Question, ask, compare

LABELS = 13  # of a layout map: five shapes, eight colours
KINDS_ASKED = {**KINDS, **JUDGE_KINDS}
QUESTIONS = 7  # drawn for each picture; those that no longer fit its row are left out
IMAGE_COST = 18  # tokens of a picture with its marks


@dataclass(frozen=True, kw_only=True)
class RowConfig:
    """What the rows of a step are made of; shares are of its rows."""

    rows: int = 32
    row_tokens: int = 150
    generated_share: float = 0.2
    pair_share: float = 0.3
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """One sequence of a batch: one or two pictures and the questions asked about them."""

    pictures: tuple[Picture, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Batch:
    """Rows as tensors: ``ids``, ``positions``, ``weights (B, L)``, ``mask (B, 1, L, L)``.

    ``pixels (P, 3, H, W)`` are in [-1, 1]; ``weights`` are of the token at that place as a target.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    weights: Tensor
    pixels: Tensor

    def to(self, device: str) -> Batch:
        """The batch on another device."""
        return Batch(**{k: v.to(device) for k, v in vars(self).items()})


class RowSource:
    """Draws the rows of a step, a function of the seed and the step alone."""

    def __init__(self, config: RowConfig, generated: Sequence[Picture]) -> None:
        self.config, self.generated = config, generated

    def rows(self, step: int, tokens: Callable[[Question], int]) -> list[Row]:
        """Rows of about ``row_tokens`` tokens; ``tokens`` measures a question with its answer."""
        config = self.config
        rng = random.Random(f"vlm rows {config.seed} {step}")
        pairs = round(config.rows * config.pair_share)
        own = round(config.rows * config.generated_share) if self.generated else 0
        rows = [self._pair(rng) for _ in range(pairs)]
        pictures = self.rendered(rng, config.rows - pairs - own)
        pictures += rng.choices(self.generated, k=own) if own else []
        rows += [self._single(p, rng) for p in pictures]
        # Rubrics are written without a picture.
        rows[0] = Row((), tuple(written_rubric(random_training_spec(rng)) for _ in range(3)))
        return [self._fitted(row, tokens) for row in rows]

    def rendered(self, rng: random.Random, count: int) -> list[Picture]:
        """Fresh pictures of training scenes."""
        return render_pictures([random_training_spec(rng) for _ in range(count)], rng)

    def vision(self, step: int, count: int) -> list[Picture]:
        """Pictures for the vision tower alone, every other one recoloured."""
        rng = random.Random(f"vlm vision {self.config.seed} {step}")
        pictures = self.rendered(rng, count)
        return [recolour(p, rng) if i % 2 else p for i, p in enumerate(pictures)]

    def _fitted(self, row: Row, tokens: Callable[[Question], int]) -> Row:
        """The row without the questions that no longer fit; the first always stays."""
        left = self.config.row_tokens - 1 - IMAGE_COST * len(row.pictures)
        kept: list[Question] = []
        for question in row.questions:
            cost = tokens(question)
            if cost <= left or not kept:
                kept.append(question)
                left -= cost
        return Row(row.pictures, tuple(kept))

    def _single(self, picture: Picture, rng: random.Random) -> Row:
        asked = [ask(picture, rng, "train", KINDS_ASKED, ALL_ASKERS) for _ in range(QUESTIONS)]
        return Row((picture,), tuple(asked))

    def _pair(self, rng: random.Random) -> Row:
        while True:
            first, second, spec = self._contest(rng)
            specs = [spec, *(spoil(spec, rng) for _ in range(4))]
            usable = [s for s in specs if all(askable(s, p.view, "train") for p in (first, second))]
            questions = [_compared(first, second, s, rng) for s in usable]
            # A caption that fits neither picture often ends in a tie; a few of those are enough.
            kept = [q for q in questions if q and (rng.random() < 0.5 or not _tied(q.answer))]
            if kept:
                return Row((first, second), tuple(kept))

    def _contest(self, rng: random.Random) -> tuple[Picture, Picture, PromptSpec]:
        """Two pictures for one caption: the generator's, or one or two near misses."""
        if self.generated and rng.random() < self.config.generated_share:
            first, second = rng.sample(self.generated, 2)
            return first, second, rng.choice((first, second)).spec
        spec = random_training_spec(rng)
        shown = [spec, spec if rng.random() < 0.15 else spoil(spec, rng)]
        if rng.random() < 0.2:
            shown[0] = spoil(spec, rng)
        rng.shuffle(shown)
        first, second = render_pictures(shown, rng)
        return first, second, spec


def _tied(answer: str) -> bool:
    return any(word in answer for word in ("tie", "equally", "Alignment:\nImage 1: 0.5"))


def _compared(
    first: Picture, second: Picture, spec: PromptSpec, rng: random.Random
) -> Question | None:
    if rng.random() < 0.25:
        return compare(first, second, spec, rng)
    return compare_as_judge(rng.choice(PAIR_KINDS), first, second, spec)


def random_training_spec(rng: random.Random) -> PromptSpec:
    """A specification of the training split, by the weights of the generator's data."""
    return sample_spec(
        rng, "train", rng.choices(list(TASK_WEIGHTS), list(TASK_WEIGHTS.values()))[0]
    )


def collate(rows: Sequence[Row], processor: Any) -> Batch:
    """Pack rows into one batch; every question sees its pictures and itself, nothing else."""
    packed = [_pack(row, processor) for row in rows]
    length = max(len(p[0]) for p in packed)
    ids, positions, segments, weights = (
        torch.from_numpy(np.stack([_padded(p[k], length, fill) for p in packed]))
        for k, fill in enumerate((0, 0, -1, 0.0))
    )
    same = segments[:, :, None] == segments[:, None, :]
    seen = torch.ones(length, length, dtype=torch.bool).tril() & (same | (segments == 0)[:, None])
    pictures = [picture for row in rows for picture in row.pictures]
    return Batch(
        ids.long(), positions.long(), seen[:, None], weights.float(),
        picture_pixels(pictures),
    )  # fmt: skip


def _padded(values: Sequence[float], length: int, fill: float) -> np.ndarray:
    return np.asarray([*values, *[fill] * (length - len(values))])


def _pack(row: Row, processor: Any) -> tuple[list[int], list[int], list[int], list[float]]:
    tokenizer = processor.tokenizer
    picture = [
        processor.start_image_token_id,
        *[processor.image_token_id] * processor.image_seq_length,
        processor.end_image_token_id,
    ]
    ids = [tokenizer.bos_token_id, *picture * len(row.pictures)]
    start = len(ids)
    positions, segments, weights = list(range(start)), [0] * start, [0.0] * start
    for k, question in enumerate(row.questions, 1):
        asked = _encode(tokenizer, f"{USER}{question.text}{ASSISTANT}")
        answer = [*_encode(tokenizer, question.answer), tokenizer.eos_token_id]
        ids += asked + answer
        positions += range(start, start + len(asked) + len(answer))
        segments += [k] * (len(asked) + len(answer))
        weights += [0.0] * len(asked) + [len(answer) ** -0.5] * len(answer)
    return ids, positions, segments, weights


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def picture_pixels(pictures: Sequence[Picture]) -> Tensor:
    """Network input ``(P, 3, H, W)`` in [-1, 1], as the processor makes it of 64-pixel pictures."""
    pixels = torch.from_numpy(np.stack([p.pixels for p in pictures]))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def picture_layouts(pictures: Sequence[Picture]) -> Tensor:
    """Coverage maps in [0, 1], ``(P, 8, 8, LABELS)``, NaN where there is none to be known."""
    return torch.from_numpy(np.stack([_layout(p) for p in pictures]))


def _layout(picture: Picture) -> np.ndarray:
    if picture.layout is None:
        return np.full((8, 8, LABELS), np.nan, np.float32)
    layout = picture.layout.astype(np.float32) / 255
    colors = layout[..., len(SHAPES) :]
    if picture.recoloured:
        colors[:] = np.nan
    else:
        hidden = colors[..., [list(COLORS).index(c) for c in HELD_OUT_COLORS]].sum(-1) > 0
        layout[hidden, : len(SHAPES)] = np.nan
    return layout
