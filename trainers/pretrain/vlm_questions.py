"""Questions about shapes-world pictures, with answers read off the verifier's detections.

Every kind is balanced by construction: half of the captions asked about are true where the
picture allows it, the other half are near misses (:func:`~trainers.pretrain.vlm_pictures.spoil`).
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mmalign.shapes import COLORS, SHAPES, ObjectSpec, PromptSpec, caption
from mmalign.shapes.grammar import PREFIX
from mmalign.shapes.splits import held_out_pair
from trainers.pretrain.vlm_pictures import (
    CLEAR_OFFSET,
    HELD_OUT_COLORS,
    Picture,
    askable,
    spoil,
    true_specs,
)
from vision_rewards.shapes import Verdict, judge

YES, NO = "Yes", "No"
FIRST, SECOND, TIE = "Image 1", "Image 2", "tie"
NO_FAULT = "all that was asked for is there"
# Points taken off a score of 5 for each fault that the verifier names, by the words it uses.
_FAULT_COST = (("missing", 1), ("found a", 2), ("", 1))
PLURAL = {s: "crosses" if s == "cross" else s + "s" for s in SHAPES}


@dataclass(frozen=True)
class Question:
    """What is asked, the one right answer, and which kind of question it is."""

    kind: str
    text: str
    answer: str


Asker = Callable[[Picture, random.Random, str], "Question | None"]


def ask(
    picture: Picture,
    rng: random.Random,
    split: str,
    kinds: Mapping[str, float],
    askers: Mapping[str, Asker] | None = None,
) -> Question:
    """One question of a kind drawn by weight, among those the picture can be asked."""
    while True:
        kind = rng.choices(list(kinds), list(kinds.values()))[0]
        question = (askers or ASKERS)[kind](picture, rng, split)
        if question is not None:
            return question


# --- captions -------------------------------------------------------------------------------


def pick_spec(picture: Picture, rng: random.Random, split: str) -> PromptSpec | None:
    """A caption for ``picture``, true of it half of the time; ``None`` where none is askable."""
    truths = true_specs(picture.view.detections) if picture.clear else []
    wanted, found = rng.random() < 0.5, None
    for _ in range(16):
        base = rng.choice(truths) if truths and rng.random() < 0.6 else picture.spec
        spec = base if wanted else spoil(base, rng)
        if askable(spec, picture.view, split):
            found = spec
            if verdict_on(picture, spec).strict == wanted:
                break
    return found


def verdict_on(picture: Picture, spec: PromptSpec) -> Verdict:
    """The verifier's verdict on whether ``picture`` shows ``spec``."""
    return judge(picture.view.detections, spec)


def points(verdict: Verdict) -> int:
    """1 to 5: five without a fault, less by what each named fault costs."""
    if not verdict.note:
        return 5
    return max(1, 5 - sum(_cost(fault) for fault in dict.fromkeys(verdict.note.split("; "))))


def _cost(fault: str) -> int:
    numbers = re.match(r"expected (\d+) objects?, found (\d+)", fault)
    if numbers:
        return abs(int(numbers[1]) - int(numbers[2]))
    if fault == "no objects found":
        return 4
    return next(cost for words, cost in _FAULT_COST if words in fault)


def reason(verdict: Verdict) -> str:
    """The verifier's complaints in words, each once."""
    return "; ".join(dict.fromkeys(verdict.note.split("; "))) if verdict.note else NO_FAULT


def _caption(spec: PromptSpec, rng: random.Random) -> str:
    text = caption(spec)
    return text if rng.random() < 0.8 else text[len(PREFIX) + 1 :]


def _about_caption(
    kind: str, templates: tuple[str, ...], answer: Callable[[Verdict], str]
) -> Asker:
    def asker(picture: Picture, rng: random.Random, split: str) -> Question | None:
        spec = pick_spec(picture, rng, split)
        if spec is None or picture.view.problem:
            return None
        text = rng.choice(templates).format(_caption(spec, rng))
        return Question(kind, text, answer(verdict_on(picture, spec)))

    return asker


_VERIFY = (
    'Does this figure show "{}"? Please answer yes or no.',
    'Does this figure show "{}"? Please answer yes or no.',
    "Does this picture show: {}? Answer yes or no.",
    'Does the image match the prompt "{}"? Answer yes or no.',
    "Prompt: {}\nDoes the image show exactly what the prompt asks for? Answer Yes or No.",
)
_SCORE = (
    'Score from 1 to 5 how well the image fits the prompt "{}". Answer with the score only.',
    "Prompt: {}\nScore (1-5):",
)
_CRITIQUE = (
    'How well does the image fit the prompt "{}"? Give a short reason, then a score from 1 to 5.',
    "Prompt: {}\nName what is wrong with the image, then give a score from 1 to 5.",
)


# --- objects --------------------------------------------------------------------------------


def _exists(picture: Picture, rng: random.Random, split: str) -> Question | None:
    if not picture.clear:
        return None
    seen = picture.view.detections
    shown = sorted({(str(d.color), str(d.shape)) for d in seen})
    here = rng.choice(shown)
    asked = here
    if rng.random() < 0.5:
        other = [(c, here[1]) for c in COLORS] + [(here[0], shape) for shape in SHAPES]
        crossed = [(a, b) for a, _ in shown for _, b in shown]
        asked = rng.choice([pair for pair in other + 4 * crossed if pair not in shown])
    if split == "train" and held_out_pair(asked):
        return None
    name = f"{'an' if asked[0] == 'orange' else 'a'} {asked[0]} {asked[1]}"
    text = rng.choice(("Is there {}?", "Is there {} in the picture? Answer yes or no."))
    return Question("exists", text.format(name), YES if asked in shown else NO)


def _count(picture: Picture, rng: random.Random, split: str) -> Question | None:
    if not picture.clear:
        return None
    seen = picture.view.detections
    draw = rng.random()
    if draw < 0.4:
        what, number = "objects", len(seen)
    elif draw < 0.8:
        shape = str(rng.choice(seen).shape) if rng.random() < 0.8 else rng.choice(SHAPES)
        what, number = PLURAL[shape], sum(d.shape == shape for d in seen)
    else:
        color = str(rng.choice(seen).color) if rng.random() < 0.8 else rng.choice(list(COLORS))
        what, number = f"{color} objects", sum(d.color == color for d in seen)
    text = rng.choice(("How many {} are there?", "How many {}? Answer with a number."))
    return Question("count", text.format(what), str(number))


def _color(picture: Picture, rng: random.Random, split: str) -> Question | None:
    seen = picture.view.detections
    names = [d.shape for d in seen]
    single = [d for d in seen if names.count(d.shape) == 1]
    if not picture.clear or not single:
        return None
    target = rng.choice(single)
    text = rng.choice(("What colour is the {}?", "What is the color of the {}?"))
    return Question("colour", text.format(target.shape), str(target.color))


def _shape(picture: Picture, rng: random.Random, split: str) -> Question | None:
    seen = picture.view.detections
    names = [d.color for d in seen]
    single = [d for d in seen if names.count(d.color) == 1]
    if split == "train":
        # Answers about colours of held-out pairs would teach which shape these never have.
        single = [d for d in single if d.color not in HELD_OUT_COLORS]
    if not picture.clear or not single:
        return None
    target = rng.choice(single)
    return Question("shape", f"What shape is the {target.color} object?", str(target.shape))


def _where(picture: Picture, rng: random.Random, split: str) -> Question | None:
    seen = list(picture.view.detections)
    if not picture.clear or len(seen) != 2 or seen[0].shape == seen[1].shape:
        return None
    a, b = rng.sample(seen, 2)
    across = rng.random() < 0.5
    offset = a.x - b.x if across else a.y - b.y
    if abs(offset) < CLEAR_OFFSET:
        return None
    words = ("left", "right") if across else ("above", "below")
    sides = "to the left or to the right of" if across else "above or below"
    text = f"Is the {a.shape} {sides} the {b.shape}?"
    return Question("where", text, words[offset > 0])


def _half(picture: Picture, rng: random.Random, split: str) -> Question | None:
    seen = picture.view.detections
    names = [d.shape for d in seen]
    across = rng.random() < 0.5
    far = [d for d in seen if abs((d.x if across else d.y) - 0.5) > CLEAR_OFFSET]
    single = [d for d in far if names.count(d.shape) == 1]
    if not picture.clear or not single:
        return None
    target = rng.choice(single)
    words = ("left", "right") if across else ("upper", "lower")
    text = f"Is the {target.shape} in the {words[0]} or in the {words[1]} half of the picture?"
    return Question("half", text, words[(target.x if across else target.y) > 0.5])


def _describe(picture: Picture, rng: random.Random, split: str) -> Question | None:
    if not picture.clear:
        return None
    text, axis = rng.choice(_DESCRIBE)
    seen = sorted(picture.view.detections, key=lambda d: d.x if axis == "x" else d.y)
    names = [f"{'an' if d.color == 'orange' else 'a'} {d.color} {d.shape}" for d in seen]
    return Question("describe", text, ", ".join(names))


_DESCRIBE = (
    ("Describe the picture.", "x"),
    ("List the objects from left to right.", "x"),
    ("List the objects from top to bottom.", "y"),
)


# --- statements that can be checked one by one ----------------------------------------------


def statements(spec: PromptSpec) -> list[str]:
    """What ``spec`` asks for, as statements that hold or do not, most basic first."""
    total = spec.total
    said = [f"There {'is' if total == 1 else 'are'} exactly {total} object{'s' * (total > 1)}."]
    for o in spec.objects:
        if o.count > 1:
            said.append(f"All objects are {PLURAL[o.shape]}.")
            said += [f"All objects are {o.color}."] if o.color else []
        else:
            said.append(f"There is a {o.shape}.")
            said += [f"The {o.shape} is {o.color}."] if o.color else []
    if spec.relation:
        a, b = (o.shape for o in spec.objects)
        where = {"left": "to the left of", "right": "to the right of"}
        said.append(f"The {a} is {where.get(spec.relation, spec.relation)} the {b}.")
    return said


def holds(picture: Picture, spec: PromptSpec) -> list[bool]:
    """Whether each of :func:`statements` holds of ``picture``."""
    seen = picture.view.detections
    out = [len(seen) == spec.total]
    for o in spec.objects:
        if o.count > 1:
            out.append(bool(seen) and all(d.shape == o.shape for d in seen))
            out += [bool(seen) and all(d.color == o.color for d in seen)] if o.color else []
        else:
            same = [d for d in seen if d.shape == o.shape]
            out.append(bool(same))
            out += [any(d.color == o.color for d in same)] if o.color else []
    if spec.relation:
        parts = judge(
            seen, PromptSpec(tuple(ObjectSpec(o.shape) for o in spec.objects), spec.relation)
        )
        out.append(parts.parts["relation"] == 1.0)
    return out


def _criterion(picture: Picture, rng: random.Random, split: str) -> Question | None:
    spec = pick_spec(picture, rng, split)
    if spec is None or picture.view.problem or not picture.view.detections:
        return None
    rows = list(zip(statements(spec), holds(picture, spec), strict=True))
    wanted = rng.random() < 0.5  # most statements about a near miss still hold
    said, true = rng.choice([r for r in rows if r[1] == wanted] or rows)
    text = rng.choice(
        (
            "Is this true of the image? {} Answer yes or no.",
            "Criterion: {}\nDoes the image meet the criterion? Answer yes or no.",
        )
    )
    return Question("criterion", text.format(said), YES if true else NO)


def _rubric(picture: Picture, rng: random.Random, split: str) -> Question:
    spec = picture.spec if rng.random() < 0.5 else spoil(picture.spec, rng)
    spec = spec if askable(spec, picture.view, split) else picture.spec
    lines = [f"{i}. {s}" for i, s in enumerate(statements(spec), 1)]
    text = f'List what has to be true of an image of "{caption(spec)}", one statement a line.'
    return Question("rubric", text, "\n".join(lines))


ASKERS: dict[str, Asker] = {
    "verify": _about_caption("verify", _VERIFY, lambda v: YES if v.strict else NO),
    "score": _about_caption("score", _SCORE, lambda v: str(points(v))),
    "critique": _about_caption(
        "critique", _CRITIQUE, lambda v: f"Reason: {reason(v)}. Score: {points(v)}"
    ),
    "exists": _exists,
    "count": _count,
    "colour": _color,
    "shape": _shape,
    "where": _where,
    "half": _half,
    "describe": _describe,
    "criterion": _criterion,
    "rubric": _rubric,
}
# Shares of the questions asked in training.
KINDS: dict[str, float] = {
    "verify": 4, "score": 1, "critique": 1.5, "exists": 1.5, "count": 1.5, "colour": 1.5,
    "shape": 1.5, "where": 4, "half": 3, "describe": 3, "criterion": 1.5, "rubric": 0.2,
}  # fmt: skip


# --- two pictures ---------------------------------------------------------------------------

_PAIR = (
    ('Which image fits the prompt "{}" better? Answer "Image 1", "Image 2" or "tie".', "{}"),
    ("Prompt: {}\nWhich image is better, Image 1, Image 2, or is it a tie?", "{}"),
    ('Which image shows "{}" better? Compare them.', "{} is better"),
)


def compare(
    first: Picture, second: Picture, spec: PromptSpec, rng: random.Random
) -> Question | None:
    """Which of two pictures fits ``spec`` better; a tie where both have the same faults."""
    if first.view.problem or second.view.problem:
        return None
    verdicts = [verdict_on(p, spec) for p in (first, second)]
    ahead = points(verdicts[0]) - points(verdicts[1])
    if not ahead and verdicts[0].strict != verdicts[1].strict:
        return None
    text, wording = rng.choice(_PAIR)
    winner = FIRST if ahead > 0 else SECOND
    answer = wording.format(winner)
    if not ahead:
        answer = "Both images are equally good" if "better" in wording else TIE
    return Question("pair", text.format(_caption(spec, rng)), answer)


def wordings() -> list[str]:
    """The fixed stretches of every question above, and of captions."""
    templates = (*_VERIFY, *_SCORE, *_CRITIQUE, *(question for question, _ in _PAIR))
    parts = [part.rstrip(" ") for t in templates for part in t.split("{}")]
    lines = [line for part in parts for line in part.splitlines(keepends=True)]
    return [*lines, PREFIX, f" {PREFIX}", f" {NO_FAULT}", NO_FAULT, "Reason:", " Score:"]
