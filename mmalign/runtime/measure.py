"""Clocks, memory and FLOP counters that the benchmark command measures with."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from mmalign.runtime.device import set_attention_backend

MATMUL_SIDE = {"cuda": 8192, "mps": 4096, "cpu": 2048}
PRODUCTS = 3  # matrix products a timing


class Memory:
    """Peak memory: of torch's allocator on CUDA, else of the process."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.kind = "cuda_allocated" if device.type == "cuda" else "process_resident"
        self.reset()

    def reset(self) -> None:
        """Begin a new peak, at what is held now; without effect where the system cannot."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        # Linux lets a process lower its own mark to the memory it holds.
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        """Bytes since the last reset; without CUDA or Linux since the process began."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def timed(
    run: Callable[[], Any], repeats: int, device: torch.device, warmup: int = 1,
    advance: Callable[[int], Any] = lambda count: None,
) -> list[float]:  # fmt: skip
    """Seconds of ``repeats`` calls, after ``warmup`` that do not count; ``advance(1)`` is called
    after each of them, off the clock."""
    for _ in range(warmup):
        run()
        advance(1)
    seconds = []
    for _ in range(repeats):
        _synchronise(device)
        start = time.perf_counter()
        run()
        _synchronise(device)
        seconds.append(time.perf_counter() - start)
        advance(1)
    return seconds


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def spread(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def matmul_ceiling(device: torch.device, dtype: torch.dtype, repeats: int = 3) -> dict[str, Any]:
    """The best rate of a large square matrix product: ``side``, ``dtype``, ``tflops``."""
    side = MATMUL_SIDE[device.type]
    a, b = torch.randn(2, side, side, device=device).to(dtype).unbind(0)

    def products() -> None:
        for _ in range(PRODUCTS):
            a @ b

    tflops = 2 * side**3 * PRODUCTS / min(timed(products, repeats, device)) / 1e12
    return {"side": side, "dtype": str(dtype).removeprefix("torch."), "tflops": tflops}


def count_flops(run: Callable[[], Any]) -> int:
    """Multiplications and additions of all matrix products and convolutions of one call."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # Fused attention is not counted on every device; written out, it is.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return int(counter.get_total_flops())


@contextmanager
def uncompiled(network: torch.nn.Module) -> Iterator[None]:
    """Within, a compiled network runs op by op, which is what :func:`count_flops` sees."""
    compiled = network._compiled_call_impl
    network._compiled_call_impl = None
    try:
        yield
    finally:
        network._compiled_call_impl = compiled


@contextmanager
def plain_attention(network: torch.nn.Module, backend: str) -> Iterator[None]:
    """Within, attention is torch's own, which :func:`count_flops` sees, instead of ``backend``."""
    if backend == "native":
        yield
        return
    set_attention_backend(network, "native")
    try:
        yield
    finally:
        set_attention_backend(network, backend)


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Within, torch uses ``count`` threads; ``None`` changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
