"""The words judges are asked with: shipped text files that a user can replace by their own.

A template is text with ``{{name}}`` where a value goes. Values are put in once and never read
again as a template, so a prompt that holds braces stays what it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mmalign.assets import asset
from mmalign.registry import unknown
from vision_rewards.judge.backend import digest

_PLACE = re.compile(r"\{\{(\w+)\}\}")
_FENCE = re.compile(r"<(\s*/?\s*prompt\s*)>", re.IGNORECASE)


@dataclass(frozen=True)
class Template:
    """A text with places to fill."""

    text: str

    @property
    def fingerprint(self) -> str:
        """A digest of the text."""
        return digest(self.text)

    def fill(self, **values: str) -> str:
        """The text with every place filled.

        Raises:
            UnknownNameError: the template has a place for which there is no value.
        """
        for name in _PLACE.findall(self.text):
            if name not in values:
                raise unknown("place in a judge's template", name, values)
        return _PLACE.sub(lambda match: values[match[1]], self.text)


def load_template(name: str | Path) -> Template:
    """The shipped template ``name``, or the one in a text file.

    Raises:
        AssetError: neither a file nor shipped.
    """
    path = Path(name)
    if path.suffix != ".txt" or not path.is_file():
        path = asset(f"judge/{name}.txt")
    return Template(path.read_text(encoding="utf-8").strip())


def quoted(prompt: str) -> str:
    """A prompt between ``<prompt>`` tags, with such tags of its own made harmless."""
    harmless = _FENCE.sub(r"[\1]", prompt)
    return f"<prompt>{harmless}</prompt>"
