"""Checkpoints: whole or absent, and enough to continue as if nothing had happened."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmalign.runtime.files import atomic_directory, recover_directory

FILE = "state.pt"


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write ``folder/step_<step>`` atomically and remove all but the newest ``keep``."""
    target = folder / f"step_{step:06d}"
    with atomic_directory(target) as partial:
        _write({**state, "step": step, "rng": rng_state()}, partial / FILE)
    for old in existing(folder)[:-keep]:
        shutil.rmtree(old)
    return target


class _Stream:
    """A file for ``torch.save``, which hides why a write failed; this remembers."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.flush = file.flush
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return int(self.file.write(data))
        except OSError as error:
            self.error = error
            raise


def _write(state: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        stream = _Stream(file)
        try:
            torch.save(state, stream)  # type: ignore[arg-type]
        except RuntimeError:
            if stream.error is not None:
                raise stream.error from None
            raise


def existing(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.glob("step_??????") if (p / FILE).is_file())


def load_latest(folder: Path, device: torch.device) -> dict[str, Any] | None:
    """The newest complete checkpoint's state, or ``None``; random states are restored."""
    if folder.is_dir():
        for name in {p.name.lstrip(".").split(".")[0] for p in folder.iterdir()}:
            if name.startswith("step_"):
                recover_directory(folder / name)
    found = existing(folder)
    if not found:
        return None
    state: dict[str, Any] = torch.load(found[-1] / FILE, map_location=device, weights_only=True)
    restore_rng(state.pop("rng"))
    return state


def rng_state() -> dict[str, Any]:
    """Global random states of Python, NumPy and torch, in types that load without pickle code."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    words = np.asarray(keys).astype(np.int64)
    version, internal, gauss = random.getstate()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [str(name), torch.from_numpy(words), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Undo :func:`rng_state`; CUDA states are restored where as many devices are present."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
