"""The folder of one evaluation: pictures and scores, resumable picture by picture.

``settings.json`` says what the pictures were made with, ``images/<key>.png`` holds them, and
``samples.jsonl`` one line for each with its SHA-256 and score.  A line is written after its
picture, so a kill at any time loses at most the batch in flight.
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

from eval.result import Row
from mmalign.protocols import Request
from mmalign.runtime.files import atomic_write_bytes
from mmalign.runtime.settings import SettingsMismatchError, agree

_SAFE_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # a key becomes a file name


@dataclass(frozen=True)
class Sample:
    """A finished picture: its row, the digest of its file, and its share of the batch's cost."""

    row: Row
    sha256: str | None
    seconds: float
    nfe: float

    def line(self) -> str:
        """One line of ``samples.jsonl``."""
        cost = {"sha256": self.sha256, "seconds": self.seconds, "nfe": self.nfe}
        return json.dumps({**asdict(self.row), **cost}, ensure_ascii=False, allow_nan=False) + "\n"

    @staticmethod
    def parse(line: str) -> Sample | None:
        """Inverse of :meth:`line`; ``None`` for a line that a kill cut short."""
        try:
            data = json.loads(line)
            cost = {k: data.pop(k) for k in ("sha256", "seconds", "nfe")}
            return Sample(Row(**data), **cost)
        except (ValueError, TypeError, KeyError, AttributeError):
            return None


class Store:
    """Finished samples of one run, kept in ``folder`` (or in memory where it is ``None``).

    Args:
        folder: created if missing; an earlier run in it is continued.
        settings: what must agree for pictures to belong to one run.
        save_images: keep the pictures; without them a finished row is trusted as it stands.

    Raises:
        SettingsMismatchError: the folder holds another run; the message names what differs.
    """

    def __init__(
        self, folder: Path | None, settings: Mapping[str, Any], save_images: bool = True
    ) -> None:
        self.folder = folder
        self.save_images = save_images and folder is not None
        self._samples: dict[str, Sample] = {}
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        agree(folder, settings, "an evaluation")
        self._samples = {s.row.key: s for s in self._read() if self._verified(s)}
        self._rewrite()

    def finished(self, requests: Sequence[Request]) -> dict[str, Sample]:
        """Verified samples of ``requests`` by key.

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
        return found

    def add(
        self, rows: Sequence[Row], images: Sequence[Image], seconds: float, nfe: float
    ) -> list[Sample]:
        """Keep one finished batch: pictures first, then their lines."""
        shares = (seconds / len(rows), nfe / len(rows))
        made = [Sample(r, self._keep(r, i), *shares) for r, i in zip(rows, images, strict=True)]
        self._samples.update({s.row.key: s for s in made})
        if self.folder is not None:
            with (self.folder / "samples.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(s.line() for s in made)
                file.flush()
                os.fsync(file.fileno())
        return made

    def image_name(self, key: str) -> str | None:
        """Path of a picture relative to the folder; ``None`` where pictures are not kept."""
        return f"images/{key}.png" if self.save_images else None

    def _keep(self, row: Row, image: Image) -> str | None:
        if self.folder is None or row.image is None:
            return None
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        atomic_write_bytes(self.folder / row.image, buffer.getvalue())
        return hashlib.sha256(buffer.getvalue()).hexdigest()

    def _read(self) -> list[Sample]:
        assert self.folder is not None
        path = self.folder / "samples.jsonl"
        if not path.exists():
            return []
        # A picture file cut short by a kill is seen by its digest, a line by not parsing.
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        return [s for s in map(Sample.parse, lines) if s is not None]

    def _verified(self, sample: Sample) -> bool:
        row = sample.row
        if row.image != self.image_name(row.key):
            return row.image is not None and not self.save_images and self._intact(sample)
        return row.image is None or self._intact(sample)

    def _intact(self, sample: Sample) -> bool:
        assert self.folder is not None and sample.row.image is not None
        path = self.folder / sample.row.image
        return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sample.sha256

    def _rewrite(self) -> None:
        """Drop torn and unverified lines, so that appending starts on a clean line."""
        assert self.folder is not None
        text = "".join(s.line() for s in self._samples.values())
        atomic_write_bytes(self.folder / "samples.jsonl", text.encode())


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
