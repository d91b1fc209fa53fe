"""GenEval's prompts read back: from "a photo of two clocks" to what has to be there.

The grammar of the benchmark's own generator (Ghosh et al., 2310.11513)::

    a photo of <thing>                        single object, colours ("a red apple")
    a photo of <number> <things>              counting
    a photo of <thing> and <thing>            two objects, colour attribution
    a photo of <thing> <relation> <thing>     position

Where a prompt holds more than the benchmark has ("two red apples"), the same rules apply.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache

from vision_rewards.geneval_rules import COLORS, RELATIONS, Clause, Requirement

NUMBERS = {
    word: k
    for k, word in enumerate("one two three four five six seven eight nine ten".split(), start=1)
}
# GenEval's names of COCO's 80 classes, in COCO's order.
CLASSES = tuple(
    name.strip()
    for name in """
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
    fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow,
    elephant, bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee,
    skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard,
    tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple,
    sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch,
    potted plant, bed, dining table, toilet, tv, laptop, computer mouse, tv remote,
    computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book,
    clock, vase, scissors, teddy bear, hair drier, toothbrush
    """.split(",")
)
# What detectors call the same things -> GenEval's name.
ALIASES: Mapping[str, str] = {
    "aeroplane": "airplane",
    "motorbike": "motorcycle",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "hair dryer": "hair drier",
}
IRREGULAR = {"person": "people", "knife": "knives", "computer mouse": "computer mice"}

_ARTICLE = re.compile(r"^(?:an?|the)\s+")
_RELATION = re.compile(rf"\s+(?:to the )?({'|'.join(RELATIONS)})\s+")
_PREFIX = "a photo of "


class GenEvalPromptError(ValueError):
    """A prompt outside GenEval's grammar."""


def canonical(name: str) -> str:
    """GenEval's name of a class that a detector may call otherwise."""
    plain = name.lower().replace("_", " ").strip()
    return ALIASES.get(plain, plain)


def parse_prompt(prompt: str, classes: Iterable[str] = CLASSES) -> Requirement:
    """What ``prompt`` asks for, as a requirement with its task's tag.

    Args:
        prompt: a sentence of the grammar; case, a final full stop and "to the" do not matter.
        classes: names of the things that may be asked for.

    Raises:
        GenEvalPromptError: outside the grammar, or a thing that is no class; says which part.
    """
    text = " ".join(prompt.lower().rstrip(" .").split())
    if not text.startswith(_PREFIX):
        raise GenEvalPromptError(f"prompt {prompt!r} does not start with {_PREFIX.strip()!r}")
    words = forms(tuple(classes))
    body = text.removeprefix(_PREFIX)
    relation = _RELATION.search(body)
    if relation:
        a, b = _thing(body[: relation.start()], words), _thing(body[relation.end() :], words)
        # The target comes first: a clause refers to an earlier one.
        placed = Clause(a.name, a.count, a.color, relation[1], 0)
        return Requirement((b, placed), _limits((b, a)), "position")
    include = tuple(_thing(part, words) for part in body.split(" and "))
    if len(include) > 2:
        raise GenEvalPromptError(f"prompt {prompt!r} names {len(include)} things; at most 2 work")
    return Requirement(include, _limits(include), _tag(include))


def _tag(include: tuple[Clause, ...]) -> str:
    colored = any(c.color for c in include)
    if len(include) == 2:
        return "color_attr" if colored else "two_object"
    if include[0].count > 1:
        return "counting"
    return "colors" if colored else "single_object"


def _limits(things: tuple[Clause, ...]) -> tuple[Clause, ...]:
    """ "Two" and more are exact: one more of the class is wrong. "A" and "one" allow more."""
    return tuple(Clause(c.name, c.count + 1) for c in things if c.count > 1)


def _thing(phrase: str, words: Mapping[str, str]) -> Clause:
    number, _, rest = phrase.partition(" ")
    count = NUMBERS.get(number, 0)
    noun = rest if count else _ARTICLE.sub("", phrase)
    # The whole noun first: "an orange" is a fruit, "an orange cup" a cup.
    if noun in words:
        return Clause(words[noun], count or 1)
    color, _, colored = noun.partition(" ")
    if color in COLORS and colored in words:
        return Clause(words[colored], count or 1, color)
    near = difflib.get_close_matches(noun, words, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise GenEvalPromptError(f"{phrase!r} names no class that can be looked for{hint}")


@lru_cache(maxsize=16)
def forms(classes: tuple[str, ...]) -> Mapping[str, str]:
    """Singular and plural forms to the class; singular forms win."""
    plural = {form: name for name in classes for form in _plurals(name)}
    return plural | {name: name for name in classes}


def _plurals(name: str) -> Iterable[str]:
    yield f"{name}s"
    yield f"{name}es"  # the benchmark writes "bus" -> "buses", and also "skis" -> "skises"
    if name.endswith("y"):
        yield f"{name[:-1]}ies"
    if name in IRREGULAR:
        yield IRREGULAR[name]
