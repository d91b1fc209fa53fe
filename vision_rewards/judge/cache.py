"""Answers kept on disk, so that the same question is paid for once."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from mmalign.runtime.files import atomic_write_json, make_directory
from vision_rewards.judge.backend import Backend, Query, Reply, digest

# Two threads that write the same entry would share the temporary file.
_WRITING = threading.Lock()


class CachedBackend:
    """A back-end whose answers are kept in a folder, one file each.

    The key is a digest of the back-end's identity and of everything in the query, pixels included.
    Files are written atomically, so several processes may share a folder. Failures and refusals
    are not kept. A damaged file counts as absent.

    Args:
        backend: who answers what is not in the folder.
        folder: created where it does not exist.

    Attributes:
        hits, misses: questions answered from the folder, and questions passed on.
    """

    def __init__(self, backend: Backend, folder: str | Path) -> None:
        self.backend = backend
        self.folder = make_directory(folder)
        self.hits = self.misses = 0

    @property
    def identity(self) -> str:
        """The back-end's: a cache changes no answer."""
        return self.backend.identity

    @property
    def deterministic(self) -> bool:
        """The back-end's: answers may have been forgotten."""
        return self.backend.deterministic

    def networks(self) -> Sequence[nn.Module]:
        """The back-end's."""
        return self.backend.networks()

    def ask(self, queries: Sequence[Query]) -> list[Reply]:
        """Answer from the folder where possible; equal questions are passed on once."""
        keys = [digest([self.identity, q.content()], 64) for q in queries]
        replies = {key: self._read(key) for key in set(keys)}
        open_keys = [k for k in dict.fromkeys(keys) if replies[k] is None]
        asked = self.backend.ask([queries[keys.index(k)] for k in open_keys])
        for key, reply in zip(open_keys, asked, strict=True):
            replies[key] = reply
            if not reply.error and not reply.refused:
                self._write(key, reply)
        self.hits += len(keys) - len(open_keys)
        self.misses += len(open_keys)
        found = [replies[k] for k in keys]
        return [r for r in found if r is not None]

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key[2:]}.json"

    def _read(self, key: str) -> Reply | None:
        try:
            record = json.loads(self._path(key).read_text(encoding="utf-8"))
            logs = record["choice_log_probs"]
            if logs is not None:
                record["choice_log_probs"] = {
                    c: -math.inf if v is None else float(v) for c, v in logs.items()
                }
            return Reply(**record, cached=True)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def _write(self, key: str, reply: Reply) -> None:
        record = dataclasses.asdict(reply)
        del record["cached"]
        record |= {"tokens_in": 0, "tokens_out": 0}  # reading it again costs nothing
        logs = reply.choice_log_probs
        if logs is not None:  # JSON has no infinity
            record["choice_log_probs"] = {
                c: v if math.isfinite(v) else None for c, v in logs.items()
            }
        with _WRITING:
            atomic_write_json(self._path(key), record, indent=None)
