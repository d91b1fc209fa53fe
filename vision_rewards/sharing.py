"""One forward pass for scorers that share a backbone.

Inside :func:`shared_forward` a result is computed once for each (network, preprocessing, pixels)
and handed to everyone who asks for it again.  Compositions open it around their parts; nothing is
kept after the outermost block ends.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_Store = dict[Hashable, tuple[Any, Any]]
_STORE: ContextVar[_Store | None] = ContextVar("shared_forward", default=None)


@contextmanager
def shared_forward() -> Iterator[None]:
    """Share results among the scorers called inside; nested blocks join the outermost."""
    if _STORE.get() is not None:
        yield
        return
    token = _STORE.set({})
    try:
        yield
    finally:
        _STORE.reset(token)


def shared(key: Hashable, source: Tensor | None, compute: Callable[[], T]) -> T:
    """``compute()``, or its earlier result for the same ``key`` and the same ``source`` tensor.

    ``source`` is compared by its memory and version, so a view of the same pixels shares, while a
    tensor changed in place is not taken for what it was; results with and without gradients are
    kept apart. Outside :func:`shared_forward` this is a plain call.
    """
    store = _STORE.get()
    if store is None:
        return compute()
    full = (key, None if source is None else _memory(source))
    if full not in store:
        store[full] = (source, compute())  # holding the source keeps its memory from being reused
    return store[full][1]  # type: ignore[no-any-return]


def _memory(t: Tensor) -> Hashable:
    graph = torch.is_grad_enabled() and t.requires_grad
    version = None if t.is_inference() else t._version  # inference tensors count no versions
    return t.data_ptr(), tuple(t.shape), t.stride(), t.dtype, t.device, version, graph
