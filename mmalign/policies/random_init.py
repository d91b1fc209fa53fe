"""Published architectures with random weights, for measuring speed and memory.

Nothing is downloaded: the sizes are those of the published configuration, the weights are drawn on
the spot, and the text encoders (the largest part of some pipelines) are replaced by random
embeddings of the right shape. Pictures made this way mean nothing; their cost is the real one.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mmalign.policies.architectures import ARCHITECTURES, Architecture
from mmalign.policies.base import PipelinePolicy
from mmalign.protocols import Policy
from mmalign.registry import POLICIES, unknown
from mmalign.runtime.seeds import stable_seed
from mmalign.types import Conditioning

PREFIX = "random:"


class RandomText(PipelinePolicy):
    """Mixed into a family: a prompt's embedding is noise seeded by it, no text encoder is needed.

    Attributes:
        texts: shapes of one prompt's tensors.
        guided: whether there is an unconditional branch.
    """

    texts: Mapping[str, Sequence[int]]
    guided: bool

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Random embeddings, a function of the prompt's text alone; any length of prompt fits."""
        empty = self._embed([""] * len(prompts)) if self.guided else None
        return Conditioning(self._embed(prompts), empty)

    def _embed(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        rows = {p: torch.Generator().manual_seed(stable_seed("embedding", p)) for p in prompts}
        drawn = {
            p: {k: torch.randn(tuple(s), generator=g) for k, s in self.texts.items()}
            for p, g in rows.items()
        }
        where: dict[str, Any] = {"device": self.device, "dtype": self.denoiser.dtype}
        return {k: torch.stack([drawn[p][k] for p in prompts]).to(**where) for k in self.texts}


def is_random(name: object) -> bool:
    """Whether ``name`` asks for an architecture with random weights (``random:...``)."""
    return isinstance(name, str) and name.startswith(PREFIX)


def load_random(
    name: str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Policy:
    """Build ``random:<architecture>`` on ``device`` in ``dtype``; no copy passes through the CPU.

    Raises:
        UnknownNameError: no such architecture; names the nearest.
    """
    found = ARCHITECTURES.get(name.removeprefix(PREFIX))
    if found is None:
        raise unknown("random architecture", name, [PREFIX + n for n in ARCHITECTURES])
    where = torch.device(device)
    with _drawn_on(where, dtype, seed):
        pipeline = build_random(found)
    pipeline.to(where, dtype)  # buffers that are made in fp32 whatever the default
    family = POLICIES.load(found.family)
    texts = {"texts": found.texts, "guided": found.guided}
    policy = type(f"Random{family.__name__}", (RandomText, family), texts)
    return policy(pipeline, name=name)  # type: ignore[no-any-return]


def build_random(found: Architecture) -> Any:
    """The stock pipeline of an architecture, without text encoders, on torch's default device."""
    import diffusers

    network, scheduler, pipeline = (
        getattr(diffusers, n) for n in (found.network_class, found.scheduler_class, found.pipeline)
    )
    blocks = len(found.vae["block_out_channels"])
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        **found.vae,
    )
    asked = inspect.signature(pipeline.__init__).parameters
    absent = [n for n in asked if n.startswith(_ABSENT)]
    return pipeline(
        **{found.component: network(**found.network).eval()},
        vae=vae.eval(),
        scheduler=scheduler(**found.scheduler),
        **dict.fromkeys(absent),
        **({"requires_safety_checker": False} if "requires_safety_checker" in asked else {}),
    )


_ABSENT = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor")


@contextmanager
def _drawn_on(device: torch.device, dtype: torch.dtype, seed: int) -> Iterator[None]:
    """New modules are made on ``device`` in ``dtype`` from ``seed``; global state is restored."""
    before = torch.get_default_dtype()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            with device:
                yield
        finally:
            torch.set_default_dtype(before)
