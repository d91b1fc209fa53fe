"""Small helpers shared by the pre-training jobs: progress lines and atomic state files."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch


def say(message: str) -> None:
    """One time-stamped progress line on standard error."""
    print(f"[{time.strftime('%H:%M:%S')}] {message}", file=sys.stderr, flush=True)


def atomic_save(state: Any, path: Path) -> None:
    """``torch.save`` that a kill can never leave half-written."""
    partial = path.with_suffix(".tmp")
    torch.save(state, partial)
    os.replace(partial, path)
