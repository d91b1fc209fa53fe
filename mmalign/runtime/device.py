"""Device, precision and attention back-end: by name, with an error that says what is missing."""

from __future__ import annotations

import copy
import functools
import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmalign.registry import unknown

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class BackendError(ValueError):
    """A device, precision or attention back-end that this machine or model cannot offer."""


def pick_device(name: str = "auto") -> torch.device:
    """``auto`` (cuda, else mps, else cpu), ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.

    Raises:
        BackendError: the device is not there.
        UnknownNameError: not a device name.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (index and not index.isdigit()):
        raise unknown("device", name, ("auto", "cpu", "cuda", "mps"))
    if kind == "cuda" and not cuda:
        why = "was built without CUDA" if torch.version.cuda is None else "sees no CUDA GPU"
        raise BackendError(f"device {name!r}: torch {torch.__version__} {why}; use 'auto' or 'cpu'")
    if kind == "cuda" and index and int(index) >= torch.cuda.device_count():
        raise BackendError(f"device {name!r}: this machine has {torch.cuda.device_count()} GPU(s)")
    if kind == "mps" and not mps:
        raise BackendError(f"device {name!r}: torch sees no Apple GPU; use 'auto' or 'cpu'")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` (bf16 where the GPU has it, else fp32), ``fp32``, ``bf16`` or ``fp16``.

    Raises:
        BackendError: fp16 on the CPU, where most kernels are missing or slow.
        UnknownNameError: not a precision name.
    """
    if name == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    if name not in DTYPES:
        raise unknown("precision", name, ("auto", *DTYPES))
    if name == "fp16" and device.type == "cpu":
        raise BackendError("precision 'fp16' needs a GPU; on the CPU use 'fp32' or 'bf16'")
    return DTYPES[name]


# --- attention --------------------------------------------------------------------------------


class _Route(TorchFunctionMode):
    """Sends ``scaled_dot_product_attention`` to one of diffusers' attention back-ends."""

    def __init__(self, backend: Any) -> None:
        super().__init__()
        self.backend = backend

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        if self.backend == "_native_math" and _plain(args, kwargs or {}):
            return _attention(*args)
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        # diffusers' dispatcher wants (batch, tokens, heads, channels).
        query, key, value, *rest = args
        heads_last = [t.transpose(1, 2) for t in (query, key, value)]
        out = dispatch_attention_fn(*heads_last, *rest, backend=self.backend, **(kwargs or {}))
        return out.transpose(1, 2)


def _plain(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call is in bf16 on the CPU and asks for nothing but softmax attention."""
    if len(args) != 3 or any(isinstance(v, Tensor) or v for v in kwargs.values()):
        return False
    rounded = {torch.bfloat16}
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16:
        rounded.add(torch.float32)  # autocast rounds what comes in
    return all(t.device.type == "cpu" and t.dtype in rounded for t in args)


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What torch's math back-end computes in bf16, with products in bf16 and the softmax in fp32.

    Torch's own multiplies in fp32, which takes twice the time on a CPU, and searches for rows that
    are masked altogether, of which a call without a mask has none. Output and gradients differ from
    exact ones by 0.4 %, torch's by 0.14 %, the rounding of bf16.
    """
    q, k, v = (t.bfloat16() for t in (query, key, value))
    with torch.autocast("cpu", enabled=False):
        scores = (q @ k.transpose(-2, -1)).float() * q.shape[-1] ** -0.5
        return scores.softmax(-1).bfloat16() @ v


def _routed(processor: Any) -> Any:
    """The same processor with an ``_attention_backend`` that it obeys.

    diffusers' ``set_attention_backend`` skips older processors (Stable Diffusion 1 to 3.5) without
    a word, because they call torch's attention directly. A subclass keeps their mathematics and
    changes only where that one call goes.
    """
    base = type(processor)

    @functools.wraps(base.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._attention_backend is None:
            return base.__call__(self, *args, **kwargs)
        with _Route(self._attention_backend):
            return base.__call__(self, *args, **kwargs)

    routed = copy.copy(processor)
    routed.__class__ = type(base.__name__, (base,), {"__call__": call})
    routed._attention_backend = None
    return routed


def set_attention_backend(module: nn.Module, name: str) -> int:
    """Choose how a diffusers model computes attention; returns how many layers follow.

    Args:
        module: a diffusers model (a peft-wrapped one too).
        name: a name diffusers knows: ``native`` (torch's own choice), ``_native_math``,
            ``xformers``, ``flash``, ``flex``, ``sage``, ... diffusers also makes it the default of
            models that chose none.

    Raises:
        UnknownNameError: no such back-end in the installed diffusers.
        BackendError: its package is missing (with what to install), or no layer can take it.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName

    known = sorted(b.value for b in AttentionBackendName)
    if name not in known:
        raise unknown("attention back-end", name, known)
    layers: list[Any] = [m for m in module.modules() if hasattr(m, "set_processor")]
    if name != "native":
        _check_usable(name)
        for layer in layers:
            if layer.processor is not None and not hasattr(layer.processor, "_attention_backend"):
                layer.set_processor(_routed(layer.processor))
    if not layers or not hasattr(module, "set_attention_backend"):
        raise BackendError(f"attention back-end {name!r}: {type(module).__name__} offers no choice")
    _quietly(module.set_attention_backend, name)
    return sum(hasattr(m.processor, "_attention_backend") for m in layers)


def _check_usable(name: str) -> None:
    from diffusers.models import attention_dispatch as dispatch

    portable = name == "flex" or name.startswith(("native", "_native"))
    gpu = "" if portable or torch.cuda.is_available() else "needs a CUDA GPU, which is not here"
    try:
        dispatch._check_attention_backend_requirements(dispatch.AttentionBackendName(name))
    except (RuntimeError, ImportError) as error:
        how = " (pip install 'mmalign[xformers]')" if name == "xformers" else ""
        also = f" It also {gpu}." if gpu else ""
        text = f"attention back-end {name!r} is not available: {error}{how}{also}"
        raise BackendError(text) from error
    if gpu:
        raise BackendError(f"attention back-end {name!r} {gpu}; use 'native'")


def _quietly(function: Any, *args: Any) -> None:
    """Call without diffusers' warning that its own interface is experimental."""
    logger = logging.getLogger("diffusers.models.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        function(*args)
    finally:
        logger.setLevel(level)


def compile_network(network: nn.Module, backend: str) -> None:
    """Let ``torch.compile`` run the network from its next call on; names of weights stay as is.

    Raises:
        UnknownNameError: not a back-end of ``torch.compile`` on this machine.
    """
    from torch._dynamo import list_backends  # seconds to import, and rarely wanted

    known = list_backends(exclude_tags=())
    if backend not in known:
        raise unknown("torch.compile back-end", backend, known)
    network.compile(backend=backend)
