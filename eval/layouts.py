"""Official folder layouts: where a benchmark's authors look for pictures. Written and read.

Our own store names a file by its request's key.  A layout is for exchange: the authors' scripts
score our pictures, and ours score pictures that were made elsewhere.

| layout | picture ``sample`` of prompt ``item`` | note |
| --- | --- | --- |
| ``flat`` | ``KEY.png`` | our own names |
| ``geneval`` | ``00000/samples/0000.png`` | ``00000/metadata.jsonl`` is the prompt's record |
| ``hpsv2`` | ``STYLE/00000.jpg`` | one picture a prompt; the task is the style |
| ``dpg`` | ``ITEM.png`` | four pictures as a 2 x 2 grid, row by row |
| ``unigenbench``, ``image_reward`` | ``ITEM_0.png`` | |
| ``wise`` | ``ITEM.png`` | one picture a prompt |
| ``reasonbench`` | ``TASK/0001.png`` | one picture a prompt |
| ``t2i_compbench`` | ``TASK/samples/PROMPT_000000.png`` | a running number over the task |
| ``vbench`` | ``PROMPT-0.mp4`` | videos, possibly in folders of dimensions |
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from eval.layout_files import (
    Cell,
    Found,
    Layout,
    LayoutError,
    item_of,
    picture_bytes,
)
from mmalign.pictures import read_picture
from mmalign.protocols import Request
from mmalign.registry import unknown
from mmalign.runtime.files import atomic_write_bytes, atomic_write_text


@dataclass(frozen=True, kw_only=True)
class GridLayout(Layout):
    """All pictures of a prompt in one file, a square grid of ``side`` cells, row by row."""

    side: int = 2

    def check(self, requests: Sequence[Request]) -> None:
        """As in :class:`Layout`; cells of one prompt share a name on purpose."""
        cells = self.side**2
        for r in requests:
            if r.sample >= cells:
                raise LayoutError(
                    f"layout {self.name!r} has {cells} pictures of a prompt, but {r.key!r} is "
                    f"number {r.sample}; use --samples-per-prompt {cells}"
                )
            item_of(r, self.name)

    def write(
        self, folder: Path, requests: Sequence[Request], pictures: Mapping[str, Path]
    ) -> list[Path]:
        """One grid for each prompt of which every cell is there."""
        self.check(requests)
        groups: dict[str, dict[int, Path]] = {}
        for r in requests:
            if r.key in pictures:
                groups.setdefault(self.stem(r), {})[r.sample] = pictures[r.key]
        whole = {s: g for s, g in groups.items() if len(g) == self.side**2}
        if len(whole) < len(groups):
            lacking = next(s for s in groups if s not in whole)
            raise LayoutError(
                f"layout {self.name!r} needs {self.side**2} pictures of each prompt, {lacking!r} "
                f"has {len(groups[lacking])}"
            )
        written = []
        for stem, group in whole.items():
            written.append(folder / f"{stem}{self.suffix}")
            sheet = _sheet([read_picture(group[i]) for i in range(self.side**2)], self.side)
            atomic_write_bytes(written[-1], picture_bytes(sheet, self.suffix))
        return written

    def _match(
        self, folder: Path, there: Mapping[str, Path], requests: Sequence[Request]
    ) -> tuple[dict[str, Cell], list[str]]:
        cells, problems = super()._match(folder, there, requests)
        sample = {r.key: r.sample for r in requests}
        placed = {k: (*divmod(sample[k], self.side), self.side) for k in cells}
        return {k: Cell(c.path, placed[k]) for k, c in cells.items()}, problems


@dataclass(frozen=True, kw_only=True)
class GenEvalLayout(Layout):
    """GenEval's: a numbered folder for each prompt; any all-digit names are read."""

    beside: tuple[str, ...] = field(default=("grid.png",))

    def write(
        self, folder: Path, requests: Sequence[Request], pictures: Mapping[str, Path]
    ) -> list[Path]:
        """Pictures and, beside them, the record of each prompt."""
        written = super().write(folder, requests, pictures)
        for r in requests:
            if r.key in pictures and r.sample == 0:
                record = {**r.metadata, "prompt": r.prompt}
                name = folder / self.stem(r).split("/", 1)[0] / "metadata.jsonl"
                atomic_write_text(name, json.dumps(record, ensure_ascii=False))
        return written

    def _match(
        self, folder: Path, there: Mapping[str, Path], requests: Sequence[Request]
    ) -> tuple[dict[str, Cell], list[str]]:
        numbered: dict[int, dict[int, Path]] = {}
        for name, file in there.items():
            hit = re.fullmatch(r"(\d+)/samples/(\d+)\.\w+", name)
            if hit:
                numbered.setdefault(int(hit[1]), {})[int(hit[2])] = file
        wanted: dict[str, int] = {}
        for r in requests:
            wanted[r.item] = max(wanted.get(r.item, 0), r.sample + 1)
        cells: dict[str, Cell] = {}
        problems: dict[str, None] = {}
        for r in requests:
            found = numbered.get(int(item_of(r, self.name)), {})
            # Some writers count from 1, or on over all prompts: in a full folder order tells.
            if 0 not in found and len(found) >= wanted[r.item]:
                found = dict(enumerate(found[n] for n in sorted(found)))
            path = found.get(r.sample)
            if path is None:
                continue
            odd = _record_differs(path.parent.parent / "metadata.jsonl", r)
            if odd:
                problems[odd] = None
            else:
                cells[r.key] = Cell(path)
        return cells, list(problems)


@dataclass(frozen=True, kw_only=True)
class PromptLayout(Layout):
    """Files named by their prompt and a number: ``PROMPT_000012`` or ``PROMPT-0``.

    The number after the last ``mark`` orders the pictures of a prompt.

    Attributes:
        mark: between prompt and number.
        running: numbers run over all pictures of a task; otherwise they start anew for each prompt.
    """

    mark: str = "_"
    running: bool = False

    def _names(self, requests: Sequence[Request]) -> dict[str, str]:
        names, count = {}, dict[str, int]()
        for r in sorted(requests, key=lambda r: (r.task, _order(r.item), r.sample)):
            if "/" in r.prompt:
                raise LayoutError(
                    f"layout {self.name!r} names files by prompts, and that of {r.key!r} holds a "
                    f"'/': {r.prompt!r}; use another layout"
                )
            number = f"{count.get(r.task, 0):06d}" if self.running else str(r.sample)
            count[r.task] = count.get(r.task, 0) + 1
            names[r.key] = f"{self.stem(r)}{self.mark}{number}{self.suffix}"
        return {r.key: names[r.key] for r in requests}

    def _match(
        self, folder: Path, there: Mapping[str, Path], requests: Sequence[Request]
    ) -> tuple[dict[str, Cell], list[str]]:
        groups: dict[tuple[str, str], list[tuple[int, Path]]] = {}
        for name, path in there.items():
            place, _, last = name.rpartition("/")
            prompt, _, number = last.rsplit(".", 1)[0].rpartition(self.mark)
            if number.isdigit():
                groups.setdefault((place, prompt), []).append((int(number), path))
        cells = {}
        for r in requests:
            place = self.stem(r).rpartition("/")[0]
            inner = place.partition("/")[2]  # the folder of one task is also read by itself
            found = next((groups[k] for k in ((place, r.prompt), (inner, r.prompt)) if k in groups),
                         [p for k, g in groups.items() if k[1] == r.prompt for p in g])  # fmt: skip
            if r.sample < len(found):
                cells[r.key] = Cell(sorted(found)[r.sample][1])
        return cells, []


def layout_of(name: str) -> Layout:
    """A layout by name.

    Raises:
        UnknownNameError: with the nearest known names.
    """
    if name not in LAYOUTS:
        raise unknown("layout", name, LAYOUTS)
    return LAYOUTS[name]


def _number(request: Request, layout: str, digits: int) -> str:
    item = item_of(request, layout)
    if not item.isdigit():
        raise LayoutError(f"layout {layout!r} numbers prompts, but {request.key!r} is {item!r}")
    return f"{int(item):0{digits}d}"


def _order(item: str) -> tuple[int, str]:
    return (int(item), "") if item.isdigit() else (-1, item)


def _record_differs(path: Path, request: Request) -> str:
    """What a prompt's record beside its pictures says otherwise than the benchmark; or nothing."""
    if not path.is_file():
        return ""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return f"{path}: not JSON ({error})"
    if not isinstance(record, dict) or record.get("prompt") != request.prompt:
        said = record.get("prompt") if isinstance(record, dict) else record
        return f"{path}: pictures of {said!r}, but item {request.item} is {request.prompt!r}"
    strange = sorted(set(record) - set(request.metadata) - {"prompt"})
    return f"{path}: unknown column {strange[0]!r}" if strange and request.metadata else ""


def _sheet(images: Sequence[Image.Image], side: int) -> Image.Image:
    width, height = images[0].size
    if any(i.size != (width, height) for i in images):
        raise LayoutError(f"a grid needs pictures of one size, got {[i.size for i in images]}")
    sheet = Image.new("RGB", (side * width, side * height))
    for i, image in enumerate(images):
        sheet.paste(image, (i % side * width, i // side * height))
    return sheet


_ALL: tuple[Layout, ...] = (
    Layout(name="flat", stem=lambda r: r.key),
    GenEvalLayout(
        name="geneval", stem=lambda r: f"{_number(r, 'geneval', 5)}/samples/{r.sample:04d}"
    ),
    Layout(
        name="hpsv2",
        stem=lambda r: f"{r.task}/{_number(r, 'hpsv2', 5)}",
        suffix=".jpg",
        suffixes=(".jpg", ".jpeg", ".png", ".webp"),
        samples=1,
    ),
    GridLayout(name="dpg", stem=lambda r: item_of(r, "dpg")),
    Layout(name="unigenbench", stem=lambda r: f"{item_of(r, 'unigenbench')}_{r.sample}"),
    Layout(name="image_reward", stem=lambda r: f"{item_of(r, 'image_reward')}_{r.sample}"),
    Layout(name="wise", stem=lambda r: item_of(r, "wise"), samples=1),
    Layout(
        name="reasonbench", stem=lambda r: f"{r.task}/{_number(r, 'reasonbench', 4)}", samples=1
    ),
    PromptLayout(name="t2i_compbench", stem=lambda r: f"{r.task}/samples/{r.prompt}", running=True),
    PromptLayout(
        name="vbench",
        stem=lambda r: r.prompt,
        suffix=".mp4",
        suffixes=(".mp4", ".webm", ".gif", ".png"),
        mark="-",
    ),
)
LAYOUTS = {layout.name: layout for layout in _ALL}

__all__ = ["LAYOUTS", "Cell", "Found", "Layout", "LayoutError", "layout_of"]
