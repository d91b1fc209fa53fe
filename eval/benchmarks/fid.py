"""Distance to a set of reference pictures: FID, KID, CMMD (formulas: eval.metrics.distribution).

The generator draws the captions of the reference, one picture each. FID (Heusel et al. 2017,
1706.08500) and KID (1801.01401) are of Inception's features through torch-fidelity, CMMD
(2401.09603) of CLIP's. The value of a picture is minus its share of the CMMD, so that values are
higher where the reference is near, their mean is minus the CMMD, and its interval is the CMMD's to
first order; there is no interval for FID, whose bias is larger than its spread.

``compat`` takes KID over 100 random subsets of 1000, as published; ``fixed`` over all pairs, which
has the same expectation and no draw in it. FID and CMMD are the same in both.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch

from eval.benchmarks.base import DataError, Numbers, Prompt, PromptBenchmark, RowError, Rows
from eval.benchmarks.sources import cached
from eval.benchmarks.tables import json_lines, json_of, one_file, parsed
from eval.layouts import Cell
from eval.metrics.distribution import (
    clip_mmd_shares,
    frechet_distance,
    kernel_distance,
    polynomial,
    squared_mmd,
)
from eval.metrics.features import (
    HOW_TO_GET,
    INCEPTION,
    Embedded,
    Inception,
    WeightsError,
    features_of,
)
from eval.result import Row
from eval.sets import SetMeasure, openable, pending
from mmalign.protocols import Request
from mmalign.registry import unknown
from mmalign.runtime.device import pick_device
from mmalign.runtime.files import atomic_write_bytes
from mmalign.types import Media, Score

MEASURES = ("fid", "kid", "cmmd")
CLIP = "openai/clip-vit-large-patch14-336"
CAPTIONS = ("metadata.jsonl", "captions.json")
# Numbers of the pictures that could be read, features by network, what is wrong with the others.
Features = tuple[list[int], dict[str, np.ndarray], list[str]]


class FidBenchmark(PromptBenchmark):
    """One picture of each caption of a reference set, compared with the set.

    ``data`` is the folder of the reference: pictures with ``metadata.jsonl`` (lines of
    ``{"file_name": ..., "text": ...}``) or with ``captions.json``, COCO's file of captions, of
    which the first one of each picture is drawn.

    Args:
        measures: which of ``fid``, ``kid``, ``cmmd``; the values of pictures are of CMMD always.
        features: what FID and KID are of: ``inception``, or the checkpoint of an embedding model
            (numbers of their own, not comparable with published ones).
        clip: embedding model of CMMD.
        weights: Inception's weights; ``None`` takes what ``mmalign data get inception`` fetched, or
            torch-fidelity by itself.
        keep: a folder in which the reference's features are kept for other runs; ``None`` computes
            them anew.
        data, mode, samples_per_prompt, device: see :class:`PromptBenchmark`.

    Raises:
        WeightsError: Inception's weights are asked for and not there.
        UnknownNameError: an unknown measure.
    """

    name = "fid"
    version = "1"
    files = "the folder of reference pictures with metadata.jsonl or captions.json"
    unit = "score"

    def __init__(
        self,
        data: str | Path | None = None,
        *,
        measures: Sequence[str] | None = None,
        features: str | Path = "inception",
        clip: str | Path = CLIP,
        weights: str | Path | None = None,
        keep: str | Path | None = None,
        **common: Any,
    ) -> None:
        self.measures = tuple(MEASURES if measures is None else measures)
        for one in self.measures:
            if one not in MEASURES:
                raise unknown("measure of fid", one, MEASURES)
        if common.get("reward") is not None:
            raise ValueError("fid judges by features, not by a reward: use -o features=, -o clip=")
        super().__init__(data, **common)
        if not self.data.is_dir():
            raise DataError(f"fid: {self.data} is no folder; give {self.files} with --data")
        self._where = pick_device(self._device)
        self._clip, self._features = str(clip), str(features)
        self._weights = None if weights is None else Path(weights)
        self._keep = None if keep is None else Path(keep)
        _ = self.networks  # what is missing is said before anything is generated

    def settings(self) -> dict[str, Any]:
        """Measures, and the pictures they are taken against."""
        digest = hashlib.sha256()
        for path in self.references:
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        return {"measures": list(self.measures), "references": digest.hexdigest()[:16]}

    # --- the reference --------------------------------------------------------------------------

    def rows(self) -> Rows:
        """One prompt for each captioned picture."""
        for index, (where, file, text) in enumerate(self._captioned()):
            yield where, lambda k=index, f=file, t=text: self._prompt(k, f, t)  # type: ignore[misc]

    def _captioned(self) -> Iterator[tuple[str, Any, Any]]:
        """Place, file and caption, as they are told."""
        path = one_file(self.data, *CAPTIONS)
        if path.suffix == ".jsonl":
            for where, line in json_lines(path):
                try:
                    record = parsed(line)
                except RowError as error:
                    yield where, error, None
                    continue
                yield where, record.get("file_name"), record.get("text")
        else:
            yield from _coco(path)

    def _prompt(self, index: int, file: Any, text: Any) -> Prompt:
        if isinstance(file, RowError):
            raise file
        if not isinstance(text, str) or not text.strip():
            raise RowError("no text 'text' (a caption)")
        if not isinstance(file, str) or not (self.data / file).is_file():
            raise RowError(f"there is no picture {file!r} in {self.data}")
        return Prompt(id=f"{index:06d}", text=text.strip(), task="all", facts={"file": file})

    @property
    def references(self) -> list[Path]:
        """The reference's pictures."""
        return [self.data / p.facts["file"] for p in self.loaded.prompts]

    # --- networks -------------------------------------------------------------------------------

    @cached_property
    def networks(self) -> dict[str, Any]:
        """What features are of: ``clip``, and ``features`` where FID or KID are asked for."""
        found: dict[str, Any] = {}
        if {"fid", "kid"} & set(self.measures) and self._features != self._clip:
            inception = self._features == "inception"  # first: a missing file is seen at once
            found["features"] = (
                Inception(self._found_weights(), self._where)
                if inception
                else Embedded(self._features, self._where)
            )
        found["clip"] = Embedded(self._clip, self._where)
        if {"fid", "kid"} & set(self.measures):
            found.setdefault("features", found["clip"])
        return found

    def _found_weights(self) -> Path:
        if self._weights is not None:
            return self._weights
        folder = cached("inception")
        places = [] if folder is None else [folder / INCEPTION]
        places.append(Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION)
        found = next((p for p in places if p.is_file()), None)
        if found is None:
            raise WeightsError(f"FID and KID need Inception's weights; {HOW_TO_GET}")
        return found

    @property
    def identity(self) -> str:
        """The networks."""
        return ", ".join(f"{name} {one.identity}" for name, one in self.networks.items())

    # --- numbers --------------------------------------------------------------------------------

    def judge(self, media: Media, requests: Sequence[Request]) -> Score:
        """Nothing yet: pictures are measured as a set."""
        return pending(len(requests), self.identity)

    def numbers(self, rows: Sequence[Row]) -> Numbers:
        """None before the set is measured."""
        return {}

    def measure_set(self, rows: Sequence[Row], cells: Mapping[str, Cell]) -> SetMeasure:
        """Distances of the pictures to the reference, and each picture's share of the CMMD."""
        numbers, pictures, problems = openable([cells[r.key] for r in rows])
        read, made, lost = self._features_of(pictures)
        _, reference, broken = self._reference
        problems += [*lost, *(f"reference: {p}" for p in broken)]
        count, against = len(made["clip"]), len(reference["clip"])
        if min(count, against) < 2:
            said = f"{count} pictures and {against} references are too few to compare"
            return SetMeasure({}, {}, (*problems, said))
        told: Numbers = {}
        if "fid" in self.measures:
            told["FID"] = frechet_distance(made["features"], reference["features"])
        if "kid" in self.measures:
            told |= self._kid(made["features"], reference["features"])
        shares = clip_mmd_shares(made["clip"], reference["clip"])
        told["CMMD"] = float(shares.mean())
        told |= {"pictures": float(count), "references": float(against)}
        values = {rows[numbers[k]].key: -float(v) for k, v in zip(read, shares, strict=True)}
        return SetMeasure(values, told, (*problems, *self._cautions(made, reference)))

    def _kid(self, a: np.ndarray, b: np.ndarray) -> Numbers:
        if self.mode == "fixed":
            exact = squared_mmd(a.astype(np.float64), b.astype(np.float64), polynomial)
            return {"KID": exact}
        mean, deviation = kernel_distance(a, b)
        return {"KID": mean, "KID, deviation of subsets": deviation}

    def _features_of(self, pictures: Any) -> Features:
        networks = dict(self.networks)
        read, found, problems = features_of(pictures, list(networks.values()), device=self._where)
        return read, dict(zip(networks, found, strict=True)), problems

    @cached_property
    def _reference(self) -> Features:
        if self._keep is None:
            return self._features_of(self.references)
        said = [self.identity]
        for path in self.references:
            stat = path.stat()
            said.append(f"{path.absolute()} {stat.st_size} {stat.st_mtime_ns}")
        name = hashlib.sha256("\n".join(said).encode()).hexdigest()[:32]
        file = self._keep / f"{name}.npz"
        if not file.is_file():
            _write(file, self._features_of(self.references))
        return _read(file)

    def _cautions(
        self, made: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]
    ) -> list[str]:
        """What keeps these numbers from standing beside published ones."""
        said = []
        network = self.networks.get("features")
        if isinstance(network, Inception) and not network.published:
            said.append(
                f"the Inception weights ({network.digest[:16]}) are not the published {INCEPTION}: "
                "FID and KID compare these sets with each other only"
            )
        if "features" in made:
            width = made["features"].shape[1]
            fewest = min(len(made["features"]), len(reference["features"]))
            if "fid" in self.measures and fewest <= width:
                said.append(
                    f"FID of {fewest} pictures in {width} dimensions is biased upwards: compare "
                    "equal numbers of pictures only"
                )
        return said


def _coco(path: Path) -> Iterator[tuple[str, Any, Any]]:
    """Place, file and first caption of each picture of COCO's ``captions_*.json``."""
    told = json_of(path)
    lists = [told.get(k) if isinstance(told, Mapping) else None for k in ("images", "annotations")]
    if not all(isinstance(found, list) for found in lists):
        raise DataError(f"{path} is no file of COCO's captions: it has no images and annotations")
    images, annotations = lists
    captions: dict[Any, Any] = {}
    for one in annotations or ():
        captions.setdefault(one.get("image_id"), one.get("caption"))
    for one in images or ():
        where = f"{path.name}, image {one.get('id')}"
        yield where, one.get("file_name"), captions.get(one.get("id"))


def _write(file: Path, features: Features) -> None:
    read, found, problems = features
    buffer = io.BytesIO()
    told: dict[str, Any] = {f"of {name}": values for name, values in found.items()}
    np.savez(buffer, read=np.asarray(read, np.int64), problems=np.asarray(problems, str), **told)
    atomic_write_bytes(file, buffer.getvalue())


def _read(file: Path) -> Features:
    try:
        with np.load(file, allow_pickle=False) as told:
            names = [n.removeprefix("of ") for n in told.files if n.startswith("of ")]
            found = {name: told[f"of {name}"] for name in names}
            return told["read"].tolist(), found, told["problems"].tolist()
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise DataError(f"{file} holds no features ({error}): delete it") from error
