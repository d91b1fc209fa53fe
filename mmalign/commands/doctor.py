"""``mmalign doctor``: what this machine can run, and the command that adds what is missing."""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import mmalign
from mmalign.assets import assets_root, shipped_recipes

# The extras of pyproject.toml and the distributions each of them installs.
EXTRAS: dict[str, tuple[str, ...]] = {
    "dev": (
        "pytest",
        "pytest-xdist",
        "ruff",
        "mypy",
        "types-PyYAML",
        "tensorboard",
        "hatchling",
        "fastapi",
        "uvicorn",
        "httpx",
        "rapidocr",
        "onnxruntime",
        "pyarrow",
        "torch-fidelity",
    ),
    "xformers": ("xformers",),
    "server": ("fastapi", "uvicorn"),
    "studio": ("fastapi", "uvicorn"),
    "trackers": ("tensorboard", "wandb", "trackio"),
    "ocr": ("rapidocr", "onnxruntime"),
    "parquet": ("pyarrow",),
    "video": ("av",),
    "compbench": ("spacy",),
    "metrics": ("torch-fidelity",),
}
Status = Literal["ok", "missing", "note", "BROKEN"]


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``BROKEN`` stops the suite from working; ``missing`` does not."""

    section: str
    name: str
    status: Status
    detail: str


def run(args: Namespace) -> int:
    """Print the findings; 1 when the core is broken."""
    findings = list(examine(forward=not args.no_forward))
    if args.json:
        print(json.dumps([asdict(f) for f in findings], indent=2))
    else:
        section = ""
        for finding in findings:
            if finding.section != section:
                section = finding.section
                print(f"\n{section}" if finding is not findings[0] else section)
            print(f"  {finding.status:8s}{finding.name:18s}{finding.detail}")
    return 1 if any(f.status == "BROKEN" for f in findings) else 0


def examine(forward: bool = True) -> Iterator[Finding]:
    """Every finding, cheap ones first."""
    yield from _python()
    yield from _packages()
    yield from _extras()
    yield from _machine()
    yield from _assets()
    if forward:
        yield _forward()


def _python() -> Iterator[Finding]:
    text = sys.version.split()[0]
    fine = sys.version_info >= (3, 10)
    yield Finding("core", "python", "ok" if fine else "BROKEN", text if fine else f"{text} < 3.10")
    yield Finding("core", "mmalign", "ok", mmalign.__version__)


def _packages() -> Iterator[Finding]:
    from mmalign.runtime.versions import CORE_PACKAGES, package_version

    for name in CORE_PACKAGES:
        version = package_version(name)
        if version is None:
            yield Finding("core", name, "BROKEN", f"not installed: pip install {name}")
        else:
            yield Finding("core", name, "ok", version)


def _extras() -> Iterator[Finding]:
    from mmalign.runtime.versions import package_version

    for extra, names in EXTRAS.items():
        versions = {n: package_version(n) for n in names}
        absent = [n for n, v in versions.items() if v is None]
        if absent:
            text = f"needs {', '.join(absent)}: pip install 'mmalign[{extra}]'"
            yield Finding("extras", extra, "missing", text)
        else:
            yield Finding("extras", extra, "ok", ", ".join(f"{n} {v}" for n, v in versions.items()))


def _machine() -> Iterator[Finding]:
    from mmalign.runtime.files import free_bytes
    from mmalign.runtime.versions import available_cores, cpu_model

    yield Finding("machine", "cpu", "ok", f"{cpu_model()}, {available_cores()} cores usable")
    yield Finding("machine", "memory", "ok", _memory())
    free = free_bytes(Path.cwd()) / 1e9
    yield Finding("machine", "disk", "ok" if free > 2 else "note", f"{free:.1f} GB free here")
    yield _accelerator()


def _memory() -> str:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return "unknown on this platform"
    return f"{total / 1e9:.1f} GB, {free / 1e9:.1f} GB free"


def _accelerator() -> Finding:
    try:
        import torch
    except Exception as error:  # a broken torch can raise anything at import
        return Finding("machine", "accelerator", "BROKEN", f"torch does not import: {error}")
    threads = f"torch threads: {torch.get_num_threads()}"
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        bf16 = "with" if torch.cuda.is_bf16_supported(including_emulation=False) else "without"
        text = f"{torch.cuda.device_count()} x {gpu.name}, {gpu.total_memory / 1e9:.0f} GB"
        return Finding("machine", "accelerator", "ok", f"{text}, {bf16} bf16; {threads}")
    if torch.backends.mps.is_available():
        return Finding("machine", "accelerator", "ok", f"Apple GPU (mps); {threads}")
    text = f"none, everything runs on the CPU; {threads}"
    return Finding("machine", "accelerator", "note", text)


def _assets() -> Iterator[Finding]:
    root = assets_root()
    if not root.is_dir():
        yield Finding("assets", "folder", "BROKEN", f"{root} is missing: install the package again")
        return
    for entry in sorted(root.iterdir()):
        if entry.name.startswith(("_", ".")):
            continue
        files = [p for p in entry.rglob("*") if p.is_file()] if entry.is_dir() else [entry]
        size = sum(p.stat().st_size for p in files) / 1e6
        yield Finding("assets", entry.name, "ok", f"{size:.2f} MB in {len(files)} file(s)")
    recipes = ", ".join(shipped_recipes())
    status: Status = "ok" if recipes else "BROKEN"
    yield Finding("assets", "recipes", status, recipes or "none found: install the package again")


def _forward() -> Finding:
    """One pass through a tiny Stable Diffusion 3 denoiser on the best device."""
    try:
        return Finding("run", "forward pass", "ok", _tiny_forward())
    except Exception as error:  # whatever breaks here would break training as well
        return Finding("run", "forward pass", "BROKEN", f"{type(error).__name__}: {error}")


def _tiny_forward() -> str:
    import torch
    from diffusers import SD3Transformer2DModel

    from mmalign.runtime.device import pick_device

    device = pick_device("auto")
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=1,
        attention_head_dim=8, num_attention_heads=2, caption_projection_dim=16,
        joint_attention_dim=16, pooled_projection_dim=16, pos_embed_max_size=8,
    ).to(device)  # fmt: skip
    latents = torch.zeros(1, 4, 8, 8, device=device)
    words, pooled = torch.zeros(1, 3, 16, device=device), torch.zeros(1, 16, device=device)
    with torch.no_grad():
        out = model(latents, words, pooled, torch.tensor([500.0], device=device)).sample
    if not torch.isfinite(out).all():
        raise RuntimeError("the output is not finite")
    return f"a tiny denoiser ran on {device}"
