"""Train / validation / test splits of the shapes world's compositions.

Three levels keep the test honest:

* some **colour-shape pairs** never appear in any training picture or caption;
* some **relations** (shape, relation, shape) never appear in any training caption;
* every other composition falls into one split by a hash of its canonical form.

A bare shape (``a photo of a star``) is an atom of the vocabulary, not a composition: the five
single-object prompts are common to all splits and differ by seed only.
"""

from __future__ import annotations

import hashlib
import random

from mmalign.shapes.grammar import COLORS, SHAPES, TASKS, PromptSpec, caption
from mmalign.shapes.scene import canonical, random_spec

SPLITS = ("train", "validation", "test")
VERSION = "1"  # part of every hash: a changed split is a changed version


def held_out_pair(pair: tuple[str, str]) -> bool:
    """Whether a ``(color, shape)`` pair is kept out of everything that is trained on."""
    return pair in _HELD_OUT_PAIRS


def held_out_relation(spec: PromptSpec) -> bool:
    """Whether the (shape, relation, shape) triple of ``spec`` is kept out of training captions."""
    if spec.relation is None:
        return False
    c = canonical(spec)
    return _bucket(f"relation {c.objects[0].shape} {c.relation} {c.objects[1].shape}") < 0.12


def split_of(spec: PromptSpec) -> str:
    """The split a specification belongs to: ``train``, ``validation`` or ``test``.

    ``single_object`` prompts are shared by all splits and reported as ``train``.
    """
    if spec.task == "single_object":
        return "train"
    if held_out_relation(spec):
        return "test"
    if any(o.color and held_out_pair((o.color, o.shape)) for o in spec.objects):
        return "test"
    u = _bucket("composition " + caption(canonical(spec)))
    return "test" if u < 0.15 else "validation" if u < 0.25 else "train"


def sample_spec(rng: random.Random, split: str = "train", task: str | None = None) -> PromptSpec:
    """Draw a specification from one split; the task family is uniform unless given.

    Raises:
        ValueError: unknown split or task.
    """
    _check_split(split)
    chosen = task or rng.choice(TASKS)
    while True:
        spec = random_spec(chosen, rng)
        if chosen == "single_object" or split_of(spec) == split:
            return spec


def prompts(split: str, task: str, count: int, seed: int = 0) -> list[str]:
    """``count`` distinct prompts of one split and task, the same on every machine.

    A family with fewer distinct prompts than ``count`` returns all it has.
    """
    _check_split(split)
    rng = random.Random(f"{VERSION} {split} {task} {seed}")
    found: dict[str, None] = {}
    for _ in range(200 * max(count, 1)):
        if len(found) >= count:
            break
        found.setdefault(caption(sample_spec(rng, split, task)))
    return list(found)


def trainable_pair(pair: tuple[str, str]) -> bool:
    """The filter for :func:`~mmalign.shapes.scene.sample_scene` when drawing training pictures."""
    return not held_out_pair(pair)


def _bucket(key: str) -> float:
    digest = hashlib.sha256(f"{VERSION} {key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _choose_held_out_pairs(count: int) -> frozenset[tuple[str, str]]:
    """The ``count`` pairs with the smallest hash, at most two per shape and one per colour."""
    chosen: list[tuple[str, str]] = []
    ordered = sorted(((c, s) for s in SHAPES for c in COLORS), key=lambda p: _bucket(f"pair {p}"))
    for color, shape in ordered:
        if len(chosen) == count:
            break
        if any(color == c for c, _ in chosen) or sum(shape == s for _, s in chosen) >= 2:
            continue
        chosen.append((color, shape))
    return frozenset(chosen)


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known splits: {', '.join(SPLITS)}")


_HELD_OUT_PAIRS = _choose_held_out_pairs(5)
