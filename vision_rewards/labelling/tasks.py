"""What is to be compared: pairs from a file, or made of several pictures of one prompt."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mmalign.runtime.log import read_jsonl
from vision_rewards.labelling.decisions import pair_key
from vision_rewards.labelling.order import draw

# Columns of a labels file that say how a decision came about, not what is compared.
_OWN = ("prompt", "image_a", "image_b", "user", "seconds", "time", "decision", "round", "shown")


class TaskError(ValueError):
    """Tasks that cannot be shown; the message names the file, the place and the fix."""


@dataclass(frozen=True)
class Pair:
    """Two pictures of a prompt; paths as the labels name them, from the folder of their file.

    ``given`` is what else the task said: it is kept with the decision and shown to nobody.
    """

    prompt: str
    image_a: str
    image_b: str
    given: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        """What names the pair, whichever picture is a."""
        return pair_key(self.prompt, self.image_a, self.image_b)

    def files(self, root: Path) -> tuple[Path, Path]:
        """The files of a and b; ``root`` is the folder of the labels, links resolved."""
        a, b = (Path(os.path.normpath(root / name)) for name in (self.image_a, self.image_b))
        return a, b


@dataclass(frozen=True)
class Sample:
    """One picture of a prompt, to be paired with others of it."""

    prompt: str
    image: Path


def read_tasks(
    path: Path, root: Path, *, image_root: Path | None = None, every: bool = False, seed: int = 0
) -> list[Pair]:
    """The pairs of a JSONL file, each once.

    Lines are pairs (``prompt``, ``image_a``, ``image_b``; a label they may hold is shown to
    nobody), or single pictures (``prompt``, ``image``), as evaluation and scoring write them,
    which :func:`pairs_of_samples` pairs.

    Args:
        root: folder of the labels to be written.
        image_root: where the paths of ``path`` start; its own folder unless given.
        every, seed: see :func:`pairs_of_samples`.

    Raises:
        TaskError: no such file, none in it, or a line that is neither.
        LogError: a line is not JSON.
    """
    if not path.is_file():
        raise TaskError(f"there are no tasks at {path}: it is neither a .jsonl file nor a folder")
    rows = list(enumerate(read_jsonl(path), 1))
    if not rows:
        raise TaskError(f"{path} is empty; write one pair a line: prompt, image_a, image_b")
    base = path.parent if image_root is None else image_root
    if any("image_a" in row or "image_b" in row for _, row in rows):
        unique: dict[str, Pair] = {}
        for n, row in rows:
            pair = _pair(row, base, root, f"{path}, line {n}")
            unique.setdefault(pair.key, pair)
        return list(unique.values())
    samples = [_sample(row, base, f"{path}, line {n}") for n, row in rows]
    return pairs_of_samples(samples, root, every=every, seed=seed)


def pairs_of_samples(
    samples: Sequence[Sample], root: Path, *, every: bool = False, seed: int = 0
) -> list[Pair]:
    """Pairs of the pictures that share a prompt.

    ``k`` pictures of a prompt, in an order drawn by ``seed``, are compared each with the next and
    the last with the first: ``k`` pairs (one for two pictures), every picture in two of them, and
    all connected, so that one scale fits them. ``every`` takes all ``k (k - 1) / 2``.

    Raises:
        TaskError: no prompt has two pictures.
    """
    groups: dict[str, list[Path]] = {}
    for sample in samples:
        groups.setdefault(sample.prompt, []).append(sample.image)
    pairs = []
    for prompt, images in groups.items():
        names = sorted(dict.fromkeys(name_of(i, root) for i in images))
        names.sort(key=lambda name: draw(seed, prompt, name))
        pairs += [Pair(prompt, names[i], names[j]) for i, j in _places(len(names), every)]
    if not pairs:
        raise TaskError(
            f"none of {len(groups)} prompts has two pictures to compare; generate several a prompt "
            "(samples_per_prompt, --samples-per-prompt), or write pairs into a .jsonl file"
        )
    return pairs


def _places(count: int, every: bool) -> Iterator[tuple[int, int]]:
    if every:
        yield from ((i, j) for i in range(count) for j in range(i + 1, count))
    else:
        yield from ((i, i + 1) for i in range(count - 1))
        if count > 2:
            yield count - 1, 0


def name_of(image: Path, root: Path) -> str:
    """``image`` as labels in ``root`` name it: relative, so that a folder may move as a whole."""
    try:
        # ".." leads elsewhere behind a link to a folder, so links are resolved before.
        return Path(os.path.relpath(image.parent.resolve() / image.name, root.resolve())).as_posix()
    except ValueError:  # another drive
        return image.absolute().as_posix()


def _text(row: Mapping[str, Any], key: str, place: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        allowed = "text" if key == "prompt" else "the path of a picture"
        raise TaskError(f"{place}: {key} is {value!r}; it must be {allowed}")
    return value


def _pair(row: Mapping[str, Any], base: Path, root: Path, place: str) -> Pair:
    prompt = _text(row, "prompt", place)
    a, b = (name_of(base / _text(row, key, place), root) for key in ("image_a", "image_b"))
    if a == b:
        raise TaskError(f"{place}: image_a and image_b are one file, {a}; there is no choice")
    return Pair(prompt, a, b, {k: v for k, v in row.items() if k not in _OWN})


def _sample(row: Mapping[str, Any], base: Path, place: str) -> Sample:
    image = base / _text(row, "image", place)
    # Scoring writes paths as they were typed, from the folder it was run in.
    if not image.exists() and Path(row["image"]).exists():
        image = Path(row["image"])
    return Sample(_text(row, "prompt", place), image)
