"""Features of cells: computed once and kept on disk, or computed anew with gradients."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from mmalign.pictures import read_picture
from mmalign.runtime.files import atomic_path, digest_of
from mmalign.runtime.log import say
from mmalign.runtime.progress import track
from mmalign.types import Media
from vision_rewards.training.backbones import Backbone, device_of
from vision_rewards.training.heads import Features
from vision_rewards.training.records import Dataset
from vision_rewards.training.table import Cell

SHARD = 4096  # rows of one file of the cache
T = TypeVar("T")


class FeatureSource(Protocol):
    """Features of numbered cells."""

    def __call__(self, cells: Tensor) -> Features:
        """Features of cells ``(B,)``."""
        ...


# --- pictures ---------------------------------------------------------------------------------


def picture_digests(datasets: Iterable[Dataset]) -> dict[Path, str]:
    """SHA-256 of the content of every picture file."""
    samples = (s for dataset in datasets for s in dataset.samples)
    paths = list(dict.fromkeys(image for s in samples for image in s.images))

    with ThreadPoolExecutor(8) as pool:
        return dict(zip(paths, pool.map(digest_of, paths), strict=True))


# --- the cache --------------------------------------------------------------------------------


class FeatureCache:
    """Rows of features by key, in safetensors files that several trainings may share.

    A file is written whole or not at all and never changed, so a kill loses at most the rows
    since the last one. A file that was damaged later is named and removed: its rows are missing
    again, and are computed anew.

    Args:
        folder: one backbone's (its name should hold the digest of the weights).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._place: dict[str, tuple[Path, int]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                keys = _keys_in(path)
            except Exception as error:  # of safetensors, of JSON, or a missing entry
                say(f"{path} is damaged ({type(error).__name__}: {error}); it is made anew")
                path.unlink()
                continue
            self._place.update({key: (path, row) for row, key in enumerate(keys)})

    def __contains__(self, key: object) -> bool:
        return key in self._place

    def add(self, keys: Sequence[str], rows: Tensor) -> None:
        """Write ``rows (N, d)`` as one file."""
        from safetensors.torch import save_file

        name = hashlib.sha256("\n".join(keys).encode()).hexdigest()[:16]
        path = self.folder / f"{name}.safetensors"
        with atomic_path(path) as partial:
            save_file({"rows": rows.contiguous()}, partial, {"keys": json.dumps(list(keys))})
        self._place.update({key: (path, row) for row, key in enumerate(keys)})

    def get(self, keys: Sequence[str]) -> Tensor:
        """The rows ``(N, d)`` of ``keys``; each file is read once."""
        from safetensors.torch import load_file

        files = {path: load_file(path)["rows"] for path in {self._place[k][0] for k in keys}}
        return torch.stack([files[path][row] for path, row in map(self._place.__getitem__, keys)])

    def rows(self, keys: Sequence[str]) -> Tensor:
        """The same, reading these rows alone; for caches larger than memory."""
        from safetensors import safe_open

        places = [self._place[key] for key in keys]
        found: dict[tuple[Path, int], Tensor] = {}
        for path in dict.fromkeys(path for path, _ in places):
            with safe_open(path, framework="pt") as file:
                part = file.get_slice("rows")
                found |= {(p, r): part[r : r + 1] for p, r in places if p == path}
        return torch.cat([found[place] for place in places])


def _keys_in(path: Path) -> list[str]:
    """The keys of a file's rows."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        keys: list[str] = json.loads(file.metadata()["keys"])
        rows = file.get_slice("rows").get_shape()[0]
    if rows != len(keys):
        raise ValueError(f"{rows} rows for {len(keys)} keys")
    return keys


def _key(*parts: str) -> str:
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()


def fill(
    cache: FeatureCache,
    wanted: Mapping[str, T],
    compute: Callable[[list[T]], Tensor],
    batch_size: int,
    label: str,
    shard: int = SHARD,
) -> int:
    """Compute what is missing, in batches, with a progress bar; returns how many rows that were.

    ``shard`` rows make a file.
    """
    missing = [key for key in wanted if key not in cache]
    keys: list[str] = []
    rows: list[Tensor] = []
    with track(label, len(missing)) as advance:
        for at in range(0, len(missing), batch_size):
            batch = missing[at : at + batch_size]
            rows.append(compute([wanted[key] for key in batch]).float().cpu())
            keys += batch
            if len(keys) >= shard or at + len(batch) == len(missing):
                cache.add(keys, torch.cat(rows))
                keys, rows = [], []
            advance(len(batch))
    return len(missing)


class CachedFeatures:
    """Features of all cells in memory, from the cache on disk; for frozen backbones.

    Attributes:
        computed: rows that were not in the cache before.
    """

    def __init__(
        self,
        backbone: Backbone,
        cells: Sequence[Cell],
        digests: Mapping[Path, str],
        folder: Path,
        batch_size: int,
        text: bool,
    ) -> None:
        cache = FeatureCache(folder / _key(backbone.digest)[:16])

        def image_key(cell: Cell) -> str:
            return _key("image", digests[cell[0]], cell[1] if backbone.joint else "")

        def text_key(cell: Cell) -> str:
            return _key("text", cell[1])

        def embed(batch: list[Cell]) -> Tensor:
            pictures = read_pictures([path for path, _ in batch])
            return backbone.image(pictures, [prompt for _, prompt in batch])

        def embed_text(batch: list[Cell]) -> Tensor:
            return backbone.text([prompt for _, prompt in batch])

        images = {image_key(cell): cell for cell in cells}
        with torch.no_grad():
            self.computed = fill(cache, images, embed, batch_size, "pictures")
            if text:
                texts = {text_key(cell): cell for cell in cells}
                self.computed += fill(cache, texts, embed_text, batch_size, "prompts")
        device = device_of(backbone.network)
        self.image, self.image_row = _gathered(cache, [image_key(c) for c in cells], device)
        self.text: Tensor | None = None
        if text:
            self.text, self.text_row = _gathered(cache, [text_key(c) for c in cells], device)

    def __call__(self, cells: Tensor) -> Features:
        """Features of cells ``(B,)``."""
        image = self.image[self.image_row[cells]]
        return Features(image, None if self.text is None else self.text[self.text_row[cells]])


def _gathered(
    cache: FeatureCache, keys: Sequence[str], device: torch.device
) -> tuple[Tensor, Tensor]:
    """The distinct rows, and for each key which of them is its."""
    unique = list(dict.fromkeys(keys))
    number = {key: k for k, key in enumerate(unique)}
    place = torch.tensor([number[key] for key in keys], device=device)
    return cache.get(unique).to(device), place


def read_pictures(paths: Sequence[Path]) -> list[Tensor]:
    """Pictures ``(3, H, W)`` in [0, 1], each of its own size, decoded in a few threads.

    Raises:
        PictureError: a file that is not a picture; names it.
    """
    with ThreadPoolExecutor(4) as pool:
        images = list(pool.map(read_picture, paths))
    return [Media.from_pil([image]).data[0] for image in images]


class LiveFeatures:
    """Features computed at every call, with gradients; for backbones that are trained."""

    def __init__(self, backbone: Backbone, cells: Sequence[Cell], text: bool) -> None:
        self.backbone, self.cells, self.wants_text = backbone, cells, text

    def __call__(self, cells: Tensor) -> Features:
        """Features of cells ``(B,)``; equal cells and equal prompts are computed once."""
        unique, place = cells.unique(return_inverse=True)
        chosen = [self.cells[i] for i in unique.tolist()]
        prompts = [prompt for _, prompt in chosen]
        image = self.backbone.image(read_pictures([p for p, _ in chosen]), prompts)
        text = self.backbone.text(prompts)[place] if self.wants_text else None
        return Features(image[place], text)
