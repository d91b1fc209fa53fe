"""How well the small VLM answers: per kind of question, on scenes and captions it never saw."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmalign.shapes import PromptSpec, sample_spec
from trainers.pretrain.measures import Measured, proportion
from trainers.pretrain.vlm_judge import ALL_ASKERS, PAIR_KINDS, compare_as_judge
from trainers.pretrain.vlm_pictures import Picture, askable, render_pictures, spoil
from trainers.pretrain.vlm_questions import FIRST, SECOND, Question, compare

# What decides in a longer answer: scores, verdicts, the winner; reasons may be worded otherwise.
_DECISION = re.compile(
    r'(?:[Ss]core(?: \(1-5\))?"?:|"winner":|"met":|Answer:|<answer>|Image [12]:(?= \d)|\): ?(?=\d))'
    r'\s*"?([\w./]+(?: [\w./]+)*)'
)
_SWAPPED = {FIRST: SECOND, SECOND: FIRST}


Asked = tuple[tuple[Picture, ...], Question]


@torch.no_grad()
def answers(model: Any, processor: Any, asked: Sequence[Asked], batch_size: int = 64) -> list[str]:
    """Greedy answers of the model, in the order of ``asked``; similar ones share a batch."""
    order = sorted(range(len(asked)), key=lambda i: (len(asked[i][0]), asked[i][1].kind))
    said = [""] * len(asked)
    batches: list[list[int]] = []
    for i in order:
        pictures = len(asked[i][0])
        full = not batches or len(batches[-1]) == batch_size
        if full or len(asked[batches[-1][0]][0]) != pictures:
            batches.append([])
        batches[-1].append(i)
    for rows in batches:
        for i, text in zip(
            rows, _answered(model, processor, [asked[i] for i in rows]), strict=True
        ):
            said[i] = text
    return said


def _answered(model: Any, processor: Any, asked: Sequence[Asked]) -> list[str]:
    texts = [_chat(processor, len(pictures), q.text) for pictures, q in asked]
    images = [Image.fromarray(p.pixels) for pictures, _ in asked for p in pictures]
    inputs = processor(images=images or None, text=texts, padding=True, return_tensors="pt")
    longest = max(len(processor.tokenizer(q.answer).input_ids) for _, q in asked)
    output = model.generate(**inputs.to(model.device), max_new_tokens=longest + 8, do_sample=False)
    made = output[:, inputs["input_ids"].shape[1] :]
    return [t.strip() for t in processor.batch_decode(made, skip_special_tokens=True)]


def _chat(processor: Any, pictures: int, text: str) -> str:
    content = [{"type": "image"}] * pictures + [{"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    return str(processor.apply_chat_template(messages, add_generation_prompt=True))


def decision(answer: str) -> tuple[str, ...]:
    """What an answer comes down to: its scores and verdicts, or all of a short one."""
    return tuple(_DECISION.findall(answer)) or (answer,)


def accuracy(model: Any, processor: Any, asked: Sequence[Asked]) -> dict[str, Measured]:
    """Share of right decisions for each kind of question."""
    right: dict[str, list[bool]] = defaultdict(list)
    for (_, question), said in zip(asked, answers(model, processor, asked), strict=True):
        right[question.kind].append(decision(said) == decision(question.answer))
    return {kind: proportion(np.asarray(row)) for kind, row in sorted(right.items())}


# --- what is asked --------------------------------------------------------------------------


def held_out(
    pictures: Sequence[Picture], kinds: Sequence[str], count: int, seed: int = 0
) -> list[Asked]:
    """``count`` questions of each kind about ``pictures``, with captions of the test split."""
    rng = random.Random(f"held out {seed}")
    asked: list[Asked] = []
    for kind in kinds:
        found = 0
        for _ in range(50 * count):
            picture = rng.choice(pictures)
            question = ALL_ASKERS[kind](picture, rng, "test")
            if question is not None and found < count:
                asked.append(((picture,), question))
                found += 1
    return asked


def test_pictures(count: int, seed: int = 0) -> list[Picture]:
    """Scenes of test captions, held-out pairs of colour and shape among them."""
    rng = random.Random(f"test pictures {seed}")
    return render_pictures([sample_spec(rng, "test") for _ in range(count)], rng, "test")


def contests(count: int, seed: int = 0) -> list[tuple[Picture, Picture, PromptSpec]]:
    """Pairs of test scenes of which exactly one fits its caption."""
    rng = random.Random(f"contests {seed}")
    found: list[tuple[Picture, Picture, PromptSpec]] = []
    while len(found) < count:
        spec = sample_spec(rng, "test")
        good, bad = render_pictures([spec, spoil(spec, rng)], rng, "test")
        if askable(spec, bad.view, "test"):
            question = compare(good, bad, spec, rng)
            if question is not None and decision(question.answer)[0].startswith(FIRST):
                found.append((good, bad, spec))
    return found


def position_bias(
    model: Any, processor: Any, pairs: Sequence[tuple[Picture, Picture, PromptSpec]]
) -> dict[str, Measured]:
    """Both orders of each pair: accuracy, contradictions, and how often the first one wins."""
    kind = "judge_rank"
    asked: list[Asked] = []
    for good, bad, spec in pairs:
        for shown in ((good, bad), (bad, good)):
            question = compare_as_judge(kind, *shown, spec)
            assert question is not None
            asked.append((shown, question))
    said = [text[: len(FIRST)] for text in answers(model, processor, asked)]
    ahead, behind = said[::2], said[1::2]
    right = [*(a == FIRST for a in ahead), *(b == SECOND for b in behind)]
    crossed = [_SWAPPED.get(a, a) != b for a, b in zip(ahead, behind, strict=True)]
    firsts = [s == FIRST for s in said if s in _SWAPPED]
    rows = {"right": right, "contradicts itself": crossed, "first wins": firsts}
    return {name: proportion(np.asarray(row)) for name, row in rows.items()}


def pair_questions(
    pairs: Sequence[tuple[Picture, Picture, PromptSpec]], kinds: Sequence[str] = PAIR_KINDS
) -> list[Asked]:
    """Every kind of comparison of every pair, the better picture first or second in turn."""
    asked: list[Asked] = []
    for i, (good, bad, spec) in enumerate(pairs):
        shown = (good, bad) if i % 2 else (bad, good)
        for kind in kinds:
            question = compare_as_judge(kind, *shown, spec)
            if question is not None:
                asked.append((shown, question))
    return asked
