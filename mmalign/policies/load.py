"""From a name, a folder or a pipeline object to a policy."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from mmalign.assets import asset
from mmalign.protocols import Policy
from mmalign.registry import POLICIES, unknown
from mmalign.runtime.device import pick_device
from mmalign.runtime.quiet import quiet

# Random pipelines of a few thousand parameters, built on the spot for tests.
TINY = {
    "tiny-sd": "mmalign.policies.tiny:tiny_sd",
    "tiny-sdxl": "mmalign.policies.tiny:tiny_sdxl",
    "tiny-sd3": "mmalign.policies.build:tiny_pipeline",
    "tiny-flux": "mmalign.policies.tiny:tiny_flux",
    "tiny-wan": "mmalign.policies.tiny:tiny_wan",
    "tiny-sd3-control": "mmalign.policies.control:tiny_control",
}
# What is put together on the spot.
BUILT = {**TINY, "shapes-control": "mmalign.policies.control:shapes_control"}
# Shipped with the package: short name -> folder under assets/.
SHIPPED = {
    "shapes-flow": "shapes-flow",
    "shapes-turbo": "shapes-turbo",
    "shapes-instant": "shapes-instant",
    "shapes-sd": "shapes-sd",
    **dict.fromkeys(BUILT, ""),
}
_FAMILIES = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "StableDiffusion3ControlNetPipeline": "sd3_control",
    "FluxPipeline": "flux",
    "WanPipeline": "wan",
}
_DIFFUSION = ("sd", "sdxl")  # published with a faster sampler than DDIM, which has no density


def load_policy(
    source: Any,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    lora: str | Path | None = None,
) -> Policy:
    """Make a policy.

    Args:
        source: a diffusers pipeline object, a folder written by ``save_pretrained``, the name of
            a shipped model (``shapes-flow``, ``shapes-sd``, and of few steps ``shapes-turbo``
            and ``shapes-instant``), or a hub repository name. A policy is returned as it is.
        device, dtype: where and in what precision the weights are held. ``None`` leaves a
            pipeline object as it is (it may mix precisions, or be offloaded) and loads a name in
            fp32 on the CPU.
        lora: a LoRA file or folder to load through diffusers.

    Raises:
        UnknownNameError: the name is neither shipped, nor a folder, nor a repository name.
        ValueError: the pipeline's class belongs to no known family.
    """
    if isinstance(source, Policy):
        return source
    name = ""
    if isinstance(source, (str, os.PathLike)):
        name, device, dtype = str(source), device or "cpu", dtype or torch.float32
        source = load_pipeline(name, dtype)
        video = _FAMILIES.get(type(source).__name__) == "wan"  # its convolutions have a time too
        if getattr(source, "vae", None) is not None and not video:
            # Convolutions run channels-last: the shipped decoder is 1.9 times as fast on a CPU.
            source.vae.to(memory_format=torch.channels_last)
    family = _FAMILIES.get(type(source).__name__)
    if family is None:
        known = ", ".join(sorted(_FAMILIES))
        raise ValueError(f"no policy family for {type(source).__name__}; supported: {known}")
    if name and family in _DIFFUSION:
        from mmalign.policies.diffusion import use_ddim

        use_ddim(source)
    if name and family == "wan":
        from mmalign.policies.wan import use_euler

        use_euler(source)
    if lora is not None:
        source.load_lora_weights(str(lora))
    wanted = [option for option in (device, dtype) if option is not None]
    if wanted:
        with quiet():
            source.to(*wanted)
    policy = POLICIES.load(family)(source, name=name)
    if lora is not None:
        policy.use(Path(lora))
    return policy  # type: ignore[no-any-return]


def policy_on(source: Any, device: str = "auto", lora: str | Path | None = None) -> Policy:
    """:func:`load_policy` on a device by name; under ``auto`` objects stay where they are.

    Raises:
        ValueError: a policy object that is elsewhere, or that ``lora`` should still be loaded
            into.
    """
    named = isinstance(source, (str, os.PathLike))
    where = pick_device(device) if named or device != "auto" else None
    if isinstance(source, Policy):
        if lora is not None:
            raise ValueError(f"load the LoRA {lora} into the pipeline before making a policy of it")
        if where is not None and where.type != source.device.type:
            raise ValueError(f"{source.name} is on {source.device}, not on {where}: move it first")
    return load_policy(source, device=where, lora=lora)


def load_pipeline(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Load a stock pipeline by shipped name, folder or hub name."""
    if name in BUILT:
        module, attribute = BUILT[name].split(":")
        return getattr(importlib.import_module(module), attribute)()
    folder = Path(asset(SHIPPED[name]) if name in SHIPPED else name)
    if folder.is_dir():
        return _from_folder(folder, dtype)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise unknown("policy", name, SHIPPED)
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(name, torch_dtype=dtype)


def _from_folder(folder: Path, dtype: torch.dtype) -> Any:
    from diffusers import DiffusionPipeline

    index = folder / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(
            f"{folder} holds no model_index.json; expected a pipeline written by save_pretrained()"
        )
    # Stock loading demands components that were absent on saving unless told they still are.
    entries = json.loads(index.read_text(encoding="utf-8"))
    absent = {k: None for k, v in entries.items() if isinstance(v, list) and v[0] is None}
    with quiet():
        return DiffusionPipeline.from_pretrained(
            str(folder), torch_dtype=dtype, local_files_only=True, **absent
        )
