"""What a model was trained on, kept with it: hashes of prompts, and the rewards.

An evaluation reads this to say which of its prompts the model has seen and whether its judge was
the training's reward.  Prompts are kept as hashes, so that the record of a private prompt set can
be published with the weights.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmalign.runtime.files import atomic_write_json

FILE = "training.json"
_FORMAT = 1
_DIGITS = 16  # hexadecimal digits of a hash: chance agreement of a million prompts below 1e-7


@dataclass(frozen=True)
class TrainingRecord:
    """Prompts and rewards of a training.

    Attributes:
        prompts: hashes by :func:`prompt_hash`.
        rewards: names of the rewards that were optimised.
        identity: of the reward, with weights and versions.
    """

    prompts: frozenset[str]
    rewards: tuple[str, ...]
    identity: str = ""

    @staticmethod
    def of(prompts: Iterable[str], identity: str) -> TrainingRecord:
        """The record of a training on ``prompts`` with the reward of this identity."""
        hashes = frozenset(prompt_hash(p) for p in set(prompts))
        return TrainingRecord(hashes, reward_names(identity), identity)

    def write(self, folder: Path) -> None:
        """Write ``training.json`` into ``folder``, atomically."""
        values = {"format": _FORMAT, "rewards": list(self.rewards), "reward": self.identity}
        atomic_write_json(folder / FILE, {**values, "prompts": sorted(self.prompts)})

    @staticmethod
    def read(path: Path) -> TrainingRecord:
        """Inverse of :meth:`write`.

        Raises:
            ValueError: not such a file.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["format"] != _FORMAT:
                raise ValueError(f"format {data['format']}, known is {_FORMAT}")
            hashes, rewards = frozenset(map(str, data["prompts"])), tuple(map(str, data["rewards"]))
            return TrainingRecord(hashes, rewards, str(data["reward"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no record of a training ({error}); delete it") from error

    @staticmethod
    def near(*places: Any) -> TrainingRecord | None:
        """The record beside a model: in its folder or the one above it (a run's); or ``None``."""
        for place in places:
            if not isinstance(place, (str, Path)) or not Path(place).exists():
                continue
            path = Path(place).resolve()
            for folder in (path if path.is_dir() else path.parent, path.parent):
                if (folder / FILE).is_file():
                    return TrainingRecord.read(folder / FILE)
        return None


def prompt_hash(prompt: str) -> str:
    """The same for prompts that differ in case, spaces, width or quotes, or in a last full stop."""
    text = unicodedata.normalize("NFKC", prompt).casefold()
    text = text.translate({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"'})
    text = " ".join(text.split()).rstrip(" .!")
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def reward_names(identity: str) -> tuple[str, ...]:
    """Names of the rewards in an identity such as ``1*shapes_partial + 0.1*sharpness@0a1b``."""
    return tuple(dict.fromkeys(re.findall(r"[A-Za-z_]\w*", identity.partition("@")[0])))
