"""Where numbers come from: library versions, device, precision, weights, scorer."""

from __future__ import annotations

import hashlib
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mmalign.protocols import Benchmark, Policy

LIBRARIES = ("mmalign", "torch", "diffusers", "transformers", "numpy", "pillow")
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that can change a number."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "source checkout" if name == "mmalign" else "not installed"
    return found


def device_name(device: torch.device) -> str:
    """Marketing name of the device, such as ``NVIDIA H200``."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpu_name() if device.type == "cpu" else device.type


def weights_dtype(policy: Policy) -> str:
    """Precision of the denoiser's first parameter."""
    for parameter in policy.denoiser.parameters():
        return str(parameter.dtype).removeprefix("torch.")
    return "no parameters"


def denoiser_digest(policy: Policy) -> str:
    """Digest of the denoiser's weights as they stand now, after any training or merging.

    Each parameter's bits are summed as integers, which is exact in any order, so the digest is the
    same on every device and costs one pass over the weights.
    """
    digest = hashlib.sha256()
    for name, parameter in policy.denoiser.named_parameters():
        flat = parameter.detach().reshape(-1)
        total = int(flat.view(_INTEGERS[flat.element_size()]).sum(dtype=torch.int64))
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {total}\n".encode())
    return digest.hexdigest()[:16]


def provenance(policy: Policy, benchmark: Benchmark) -> dict[str, Any]:
    """What a report needs so that its numbers can be cited and repeated."""
    return {
        **judging(benchmark),
        "policy": policy.name,
        "family": policy.family,
        "weights": getattr(policy, "identity", None),
        "scheduler": scheduler(policy),
        "device": device_name(policy.device),
        "dtype": weights_dtype(policy),
    }


def judging(benchmark: Benchmark) -> dict[str, Any]:
    """The part of :func:`provenance` that holds for pictures of unknown origin too."""
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "scorer": getattr(benchmark, "identity", None),
        "platform": platform.platform(),
        "versions": versions(),
    }


def scheduler(policy: Policy) -> dict[str, Any] | None:
    """Class and settings of the pipeline's scheduler; ``None`` where there is none."""
    own = getattr(getattr(policy, "pipeline", None), "scheduler", None)
    if own is None:
        return None
    settings = {k: v for k, v in sorted(own.config.items()) if not k.startswith("_")}
    plain = {
        k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in settings.items()
    }
    return {"class": type(own).__name__, **{k: v for k, v in plain.items() if v != "None"}}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
