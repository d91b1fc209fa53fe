"""Data that rows of a comparison train on: made once, by a command, before any run.

A command that was cut short is given again, and goes on where it stopped if it can; what is
finished is marked with the very command, so that runs of one folder share one set of data.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mmalign.config import ConfigError
from mmalign.runtime.files import atomic_write_json
from mmalign.runtime.log import say
from mmalign.runtime.workers import LOG, last_words, start_python

PREPARED = "prepared"  # folder of all such data below that of the comparison
MARK = "prepared.json"


def prepare(name: str, command: Sequence[str], out: Path, threads: int = 1) -> None:
    """Make ``name`` by a command of ``mmalign``, unless it is there.

    ``{out}`` in the command stands for the folder of all prepared data.

    Raises:
        ConfigError: the command failed, or the folder holds what another command made.
    """
    made = (out / PREPARED).as_posix()
    folder, command = Path(made) / name, [str(w).replace("{out}", made) for w in command]
    if _made(folder, command):
        return
    say(f"preparing {name}: mmalign {' '.join(command)} --out {folder}")
    process = start_python(["-m", "mmalign", *command, "--out", str(folder)], folder, threads)
    try:
        code = process.wait()
    finally:
        process.terminate()
    if code:
        raise ConfigError(f"{name} could not be made: {last_words(folder / LOG, code)}")
    atomic_write_json(folder / MARK, {"command": command})


def _made(folder: Path, command: list[str]) -> bool:
    if not (folder / MARK).is_file():
        return False
    held = json.loads((folder / MARK).read_text(encoding="utf-8"))["command"]
    if held != command:
        raise ConfigError(
            f"{folder} was made by 'mmalign {' '.join(held)}', but the table now says "
            f"'mmalign {' '.join(command)}'; choose another --out, or remove that folder"
        )
    return True
