"""The folder of one steering run: pictures and records, resumable prompt by prompt.

``settings.json`` says what the run was made with, ``0000.png`` is the picture chosen for the first
prompt, ``unsteered/0000.png`` what its first noise gives without steering, and ``prompts.jsonl``
holds one record for each finished prompt, with the SHA-256 of both files.  A record is written
after its pictures, so a kill loses at most the prompts in flight.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmalign.runtime.files import atomic_path, atomic_write_bytes, digest_of, make_directory
from mmalign.runtime.log import JsonlLog, read_jsonl
from mmalign.runtime.settings import SettingsMismatchError, agree
from mmalign.types import Media

RECORDS = "prompts.jsonl"
SHOWN = 16  # candidates of a prompt whose pictures are kept beside its record
FRAME_MS = 125  # of the moving pictures


class SteeringFolder:
    """Finished prompts of one run.

    Args:
        folder: created if missing; an earlier run in it is continued.
        settings: what must agree for prompts to belong to one run; plain data.
        prompts: all prompts of the run. The list may grow from one run to the next.

    Raises:
        SettingsMismatchError: the folder holds another run; says what differs.
    """

    def __init__(
        self, folder: str | Path, settings: Mapping[str, Any], prompts: Sequence[str]
    ) -> None:
        self.folder, self.prompts = make_directory(folder), tuple(prompts)
        agree(self.folder, settings, "a steering run")
        self.records: dict[int, dict[str, Any]] = {}
        for record in read_jsonl(self.folder / RECORDS):
            self._check_prompt(record)
            if self._intact(record):
                self.records[record["index"]] = record
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in self.records.values())
        atomic_write_bytes(self.folder / RECORDS, text.encode())  # without what is torn or damaged

    @property
    def missing(self) -> list[int]:
        """Numbers of the prompts that are still to be steered."""
        return [i for i in range(len(self.prompts)) if i not in self.records]

    def finished(self) -> list[dict[str, Any]]:
        """Records in the order of the prompts."""
        return [self.records[i] for i in range(len(self.prompts)) if i in self.records]

    def add(
        self, index: int, record: Mapping[str, Any], steered: Media, unsteered: Media,
        candidates: Media,
    ) -> None:  # fmt: skip
        """Keep one finished prompt: its pictures first, then its record.

        Args:
            steered, unsteered: one picture each.
            candidates: all finished samples of the prompt; the first :data:`SHOWN` are kept.
        """
        files = {
            "file": self._keep(f"{index:04d}.png", steered),
            "unsteered_file": self._keep(f"unsteered/{index:04d}.png", unsteered),
        }
        shown = [
            self._keep(f"candidates/{index:04d}-{i:02d}.png", candidates[[i]])[0]
            for i in range(min(len(candidates), SHOWN))
        ]
        line = {
            "index": index, "prompt": self.prompts[index],
            **{name: path for name, (path, _) in files.items()},
            **{name.replace("file", "sha256"): digest for name, (_, digest) in files.items()},
            "shown": shown, **record,
        }  # fmt: skip
        with JsonlLog(self.folder / RECORDS) as log:
            log.write(line)
        self.records[index] = json.loads(json.dumps(line))

    def _keep(self, name: str, media: Media) -> tuple[str, str]:
        """Write one picture (of a video its first frame, and a GIF); its name and digest."""
        buffer = io.BytesIO()
        media.to_pil()[0].save(buffer, format="PNG")
        atomic_write_bytes(self.folder / name, buffer.getvalue())
        if media.kind == "video":
            first, *rest = Media(media.data[0]).to_pil()  # frames are a batch of images
            with atomic_path((self.folder / name).with_suffix(".gif")) as partial:
                first.save(
                    partial, format="GIF", save_all=True, append_images=rest, duration=FRAME_MS,
                    loop=0,
                )  # fmt: skip
        return name, hashlib.sha256(buffer.getvalue()).hexdigest()

    def _check_prompt(self, record: Mapping[str, Any]) -> None:
        index = record["index"]
        wanted = self.prompts[index] if index < len(self.prompts) else None
        if wanted is not None and record["prompt"] != wanted:
            raise SettingsMismatchError(
                f"{self.folder} holds prompt {index} as {record['prompt']!r}, but {wanted!r} is "
                "asked for now; use another folder"
            )

    def _intact(self, record: Mapping[str, Any]) -> bool:
        pairs = (("file", "sha256"), ("unsteered_file", "unsteered_sha256"))
        return all(
            (self.folder / record[name]).is_file()
            and digest_of(self.folder / record[name]) == record[digest]
            for name, digest in pairs
        )


__all__ = ["RECORDS", "SHOWN", "SettingsMismatchError", "SteeringFolder"]
