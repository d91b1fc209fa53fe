"""The folder of one evaluation: pictures and scores, resumable picture by picture.

``settings.json`` says what the pictures were made with, ``images/<key>.png`` holds them, and
``samples.jsonl`` one line for each with its SHA-256 and score.  A line is written after its
picture, so a kill at any time loses at most the batches in flight.  Several processes write a file
of lines each, ``samples-<rank>.jsonl``; the first joins them, at the end or after a kill.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image

from eval.clips import Clip
from eval.result import Row
from eval.workers import Workers
from mmalign.protocols import Request
from mmalign.runtime.files import atomic_write_bytes, digest_of
from mmalign.runtime.settings import SettingsMismatchError, agree

_SAFE_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # a key becomes a file name


@dataclass(frozen=True)
class Sample:
    """A finished picture: its row, the digest of its file, and its share of the batch's cost.

    One that is made and kept but not yet ``judged`` has an unscored row.
    """

    row: Row
    sha256: str | None
    seconds: float
    nfe: float
    judged: bool = True

    def line(self) -> str:
        """One line of ``samples.jsonl``."""
        cost = {"sha256": self.sha256, "seconds": self.seconds, "nfe": self.nfe}
        if not self.judged:
            cost["judged"] = False
        return json.dumps({**asdict(self.row), **cost}, ensure_ascii=False, allow_nan=False) + "\n"

    @staticmethod
    def parse(line: str) -> Sample | None:
        """Inverse of :meth:`line`; ``None`` for a line that a kill cut short."""
        try:
            data = json.loads(line)
            cost = {k: data.pop(k) for k in ("sha256", "seconds", "nfe")}
            judged = data.pop("judged", True)
            return Sample(Row(**data), **cost, judged=judged)
        except (ValueError, TypeError, KeyError, AttributeError):
            return None


class Store:
    """Finished samples of one run, kept in ``folder`` (or in memory where it is ``None``).

    Args:
        folder: created if missing; an earlier run in it is continued.
        settings: what must agree for pictures to belong to one run.
        save_images: keep the pictures; without them a finished row is trusted as it stands.
        files: pictures that are there already, by key: they are neither copied nor changed.
        workers: the processes that fill the folder together.

    Raises:
        SettingsMismatchError: the folder holds another run; the message names what differs.
    """

    def __init__(
        self,
        folder: Path | None,
        settings: Mapping[str, Any],
        save_images: bool = True,
        *,
        files: Mapping[str, Path] | None = None,
        workers: Workers | None = None,
    ) -> None:
        self.folder = folder
        self.save_images = save_images and folder is not None
        self.workers = workers or Workers()
        self._files = files or {}
        self._samples: dict[str, Sample] = {}
        if folder is None:
            return
        found: dict[str, Sample] | Exception = {}
        if self.workers.main:
            try:
                found = self._opened(folder, settings)
            except Exception as error:  # the others wait for an answer, whatever it is
                found = error
        found = self.workers.from_main(found)
        if isinstance(found, Exception):
            raise found
        self._samples = found

    def _opened(self, folder: Path, settings: Mapping[str, Any]) -> dict[str, Sample]:
        folder.mkdir(parents=True, exist_ok=True)
        agree(folder, settings, "an evaluation")
        self._samples = {s.row.key: s for s in self._read()}  # of one key the last line counts
        self._samples = {k: s for k, s in self._samples.items() if self._verified(s)}
        self._rewrite()
        return self._samples

    def finished(self, requests: Sequence[Request]) -> dict[str, Sample]:
        """Verified and judged samples of ``requests`` by key.

        Raises:
            SettingsMismatchError: a stored picture answers another prompt or seed than asked now.
        """
        found = {r.key: self._samples[r.key] for r in requests if r.key in self._samples}
        for request in requests:
            row = found[request.key].row if request.key in found else None
            if row is not None and (row.prompt, row.seed) != (request.prompt, request.seed):
                raise SettingsMismatchError(
                    f"{self.folder} holds {request.key!r} for prompt {row.prompt!r} with seed "
                    f"{row.seed}, but {request.prompt!r} with seed {request.seed} is asked for; "
                    "use another folder"
                )
        return {key: sample for key, sample in found.items() if sample.judged}

    def unjudged(self, requests: Sequence[Request]) -> dict[str, Sample]:
        """Verified samples of ``requests`` that were made and kept, but not judged yet."""
        found = {r.key: self._samples.get(r.key) for r in requests}
        return {k: s for k, s in found.items() if s is not None and not s.judged}

    def add(
        self,
        rows: Sequence[Row],
        images: Sequence[Image | Clip | None],
        seconds: float,
        nfe: float,
        judged: bool = True,
    ) -> list[Sample]:
        """Keep one finished batch: pictures first (``None``: nothing to write), then their lines.

        What an earlier call said of the same picture is replaced, its cost added.
        """
        made = []
        for row, image in zip(rows, images, strict=True):
            before = self._samples.get(row.key)
            spent = (before.seconds, before.nfe) if before and not before.judged else (0.0, 0.0)
            shares = (spent[0] + seconds / len(rows), spent[1] + nfe / len(rows))
            made.append(Sample(row, self._keep(row, image), *shares, judged))
        self._samples.update({s.row.key: s for s in made})
        if self.folder is not None:
            with self._lines.open("a", encoding="utf-8") as file:
                file.writelines(s.line() for s in made)
                file.flush()
                os.fsync(file.fileno())
        return made

    def join(self, samples: Sequence[Sample]) -> list[Sample]:
        """Everybody's ``samples``; the first process writes them into one file."""
        every = self.workers.gather(samples)
        self._samples.update({s.row.key: s for s in every})
        if self.folder is not None and self.workers.main and self.workers.count > 1:
            self._rewrite()
        return every

    def image_name(self, key: str) -> str | None:
        """Path of a picture relative to the folder; ``None`` where pictures are not kept."""
        if self.folder is not None and key in self._files:
            return os.path.relpath(self._files[key], self.folder)
        return f"images/{key}.png" if self.save_images else None

    @property
    def _lines(self) -> Path:
        assert self.folder is not None
        rank = f"-{self.workers.rank}" if self.workers.count > 1 else ""
        return self.folder / f"samples{rank}.jsonl"

    def _keep(self, row: Row, image: Image | Clip | None) -> str | None:
        if self.folder is None or row.image is None:
            return None
        path = self.folder / row.image
        if image is None or row.key in self._files:
            return _digest(path)
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        atomic_write_bytes(path, buffer.getvalue())
        return hashlib.sha256(buffer.getvalue()).hexdigest()

    def _read(self) -> list[Sample]:
        # A picture file cut short by a kill is seen by its digest, a line by not parsing.
        texts = (p.read_text(encoding="utf-8", errors="replace") for p in self._all_lines())
        lines = (line for text in texts for line in text.splitlines())
        return [s for s in map(Sample.parse, lines) if s is not None]

    def _all_lines(self) -> list[Path]:
        assert self.folder is not None
        joined = self.folder / "samples.jsonl"
        parts = sorted(self.folder.glob("samples-*.jsonl"))
        return [*([joined] if joined.exists() else []), *parts]

    def _verified(self, sample: Sample) -> bool:
        row = sample.row
        if row.image != self.image_name(row.key):
            return row.image is not None and not self.save_images and self._intact(sample)
        return row.image is None or self._intact(sample)

    def _intact(self, sample: Sample) -> bool:
        assert self.folder is not None and sample.row.image is not None
        digest = _digest(self.folder / sample.row.image)
        return digest is not None and digest == sample.sha256

    def _rewrite(self) -> None:
        """Drop torn and unverified lines, so that appending starts on a clean line."""
        assert self.folder is not None
        text = "".join(s.line() for s in self._samples.values())
        parts = self._all_lines()
        atomic_write_bytes(self.folder / "samples.jsonl", text.encode())
        for part in parts:  # only now: a kill in between leaves every line somewhere
            if part.name != "samples.jsonl":
                part.unlink(missing_ok=True)


def _digest(path: Path) -> str | None:
    """SHA-256 of a file; ``None`` where there is none."""
    return digest_of(path) if path.is_file() else None


def check_keys(requests: Sequence[Request]) -> None:
    """Keys must be distinct and usable as file names.

    Raises:
        ValueError: naming the key.
    """
    seen: set[str] = set()
    for request in requests:
        if request.key in seen:
            raise ValueError(f"request key {request.key!r} occurs twice; keys must be distinct")
        if not _SAFE_KEY.fullmatch(request.key):
            raise ValueError(
                f"request key {request.key!r} cannot be a file name; use letters, digits, '.', "
                "'_' and '-'"
            )
        seen.add(request.key)


__all__ = ["Sample", "SettingsMismatchError", "Store", "check_keys"]
