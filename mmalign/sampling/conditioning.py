"""Prompt embeddings, encoded once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from mmalign.protocols import Policy
from mmalign.types import Conditioning


class ConditioningCache:
    """Encodes each distinct prompt once and keeps it, least recently used first out.

    Valid while the text encoders are frozen, which every trainer here assumes.  Each prompt is
    encoded by itself: in a batch its embedding would depend, in the last bits, on the prompts
    that happened to be missing with it, and a resumed run misses others than one never stopped.

    Args:
        policy: encodes what is missing.
        max_bytes: memory the cached embeddings may take.
    """

    def __init__(self, policy: Policy, max_bytes: int = 2**31) -> None:
        self.policy = policy
        self.max_bytes = max_bytes
        self._rows: OrderedDict[str, Conditioning] = OrderedDict()

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning with one row per prompt, repeats included."""
        for prompt in prompts:
            if prompt not in self._rows:
                self._rows[prompt] = self.policy.encode([prompt])
            self._rows.move_to_end(prompt)
        result = Conditioning.cat([self._rows[p] for p in prompts])
        self._trim()
        return result

    def _trim(self) -> None:
        if not self._rows:
            return
        row = next(iter(self._rows.values()))
        tensors = [*row.positive.values(), *(row.negative or {}).values()]
        size = sum(t.numel() * t.element_size() for t in tensors)
        while len(self._rows) > 1 and size * len(self._rows) > self.max_bytes:
            self._rows.popitem(last=False)
