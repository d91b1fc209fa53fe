"""Several questions about each picture of a batch, put to one reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmalign.types import Media

if TYPE_CHECKING:
    from eval.benchmarks.base import PromptBenchmark

Answers = list[list[float]]


def ask_questions(
    benchmark: PromptBenchmark, media: Media, questions: Sequence[Sequence[str]]
) -> tuple[Answers, list[str]]:
    """The reward's value of every (picture, question): NaN where it could not say.

    Args:
        benchmark: whose reward is asked.
        media: ``B`` pictures.
        questions: those about each picture.

    Returns:
        values for each picture, and a note for each: the first reason why one is missing.
    """
    rows = [k for k, texts in enumerate(questions) for _ in texts]
    texts = [text for group in questions for text in group]
    if not texts:
        return [[] for _ in questions], [""] * len(questions)
    score = benchmark.scored(benchmark.reward, media[rows], texts)
    answers: Answers = [[] for _ in questions]
    notes = [""] * len(questions)
    said = score.notes or ("",) * len(score)
    for row, value, valid, note in zip(
        rows, score.value.tolist(), score.valid.tolist(), said, strict=True
    ):
        answers[row].append(value if valid else float("nan"))
        if not valid and not notes[row]:
            notes[row] = note or "a question could not be answered"
    return answers, notes
