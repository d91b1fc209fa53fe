"""Prompt embeddings, encoded once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from mmalign.protocols import Policy
from mmalign.types import Conditioning


class ConditioningCache:
    """Encodes each distinct prompt once and keeps it, least recently used first out.

    Valid while the text encoders are frozen, which every trainer here assumes.

    Args:
        policy: encodes what is missing, in one batch.
        max_bytes: memory the cached embeddings may take.
    """

    def __init__(self, policy: Policy, max_bytes: int = 2**31) -> None:
        self.policy = policy
        self.max_bytes = max_bytes
        self._rows: OrderedDict[str, Conditioning] = OrderedDict()

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning with one row per prompt, repeats included."""
        missing = [p for p in dict.fromkeys(prompts) if p not in self._rows]
        if missing:
            encoded = self.policy.encode(missing)
            for i, prompt in enumerate(missing):
                self._rows[prompt] = encoded[i : i + 1]
        for prompt in prompts:
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
