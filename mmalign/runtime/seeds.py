"""Seeds that do not depend on process, platform or the order of calls."""

from __future__ import annotations

import hashlib
import random
from typing import Any


def stable_seed(*parts: Any) -> int:
    """A 63-bit seed from texts and numbers (SHA-256 of their ``repr``), equal on every machine.

    Use it wherever a sample needs its own noise: ``stable_seed("eval", prompt, sample)``. A numpy
    or torch scalar counts as the Python number it holds.

    Raises:
        TypeError: a part is neither text nor a number, so its ``repr`` may change between runs.
    """
    plain = [part.item() if hasattr(part, "item") else part for part in parts]
    for part in plain:
        if not isinstance(part, (str, int, float)):
            raise TypeError(f"a seed is made of texts and numbers, got {type(part).__name__}")
    text = "\x1f".join(map(repr, plain))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def seed_all(seed: int) -> None:
    """Seed Python, numpy and torch (every device) from one number."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(stable_seed("numpy", seed) % 2**32)
    torch.manual_seed(seed)
