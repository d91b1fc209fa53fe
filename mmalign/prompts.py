"""Reading prompt files: plain text, one prompt a line, or JSON lines with a ``prompt`` key."""

from __future__ import annotations

import json
from pathlib import Path


class PromptFileError(ValueError):
    """A prompt file that cannot be used; the message names the file, the place and the fix."""


def read_prompts(path: str | Path) -> list[str]:
    """Prompts of a ``.txt`` file (one a line, kept literally) or a ``.jsonl`` file.

    Empty lines are skipped; nothing else is: a line that begins with ``#`` is a prompt.

    Raises:
        PromptFileError: missing, a folder, not UTF-8, malformed, or without a single prompt.
    """
    path = Path(path)
    lines = read_text(path).split("\n")  # not splitlines: U+2028 may stand inside a prompt
    if path.suffix in (".jsonl", ".ndjson"):
        prompts = [_record(path, n, t) for n, t in enumerate(lines, 1) if t.strip()]
    else:
        prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise PromptFileError(f"prompt file {path} holds no prompt; write one a line")
    return prompts


def read_text(path: Path) -> str:
    """A file's UTF-8 text, a byte-order mark removed. Raises :class:`PromptFileError`."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise PromptFileError(f"prompt file {path} does not exist") from error
    except IsADirectoryError as error:
        raise PromptFileError(f"prompt file {path} is a folder") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise PromptFileError(
            f"prompt file {path} is not UTF-8: byte {error.start} (line {line}) is "
            f"0x{data[error.start]:02x}; save it as UTF-8"
        ) from error


def _record(path: Path, number: int, text: str) -> str:
    place = f"prompt file {path}, line {number}"
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise PromptFileError(f"{place}: not JSON ({error.msg})") from error
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise PromptFileError(f"{place}: expected an object with a non-empty text 'prompt'")
    return prompt
