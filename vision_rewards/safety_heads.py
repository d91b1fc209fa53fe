"""What two published safety detectors put on a CLIP embedding, under their own key names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vision_rewards.embedding import DTYPES, Embedder, assemble, cached, checked_dtype, state_of
from vision_rewards.towers import Towers
from vision_rewards.towers_transformers import PooledImage, load_preprocess
from vision_rewards.weights import check_keys, load_exactly, read_weights

EPSILON = 1e-7  # Keras keeps the deviation of its normalisation layer above this
SPECIAL_CARE = 0.01  # by how much a special-care concept lowers the other thresholds
NESTED = re.compile(r"^(?:vision_model\.)+")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")


class NsfwHead(nn.Module):
    """Standardisation, linear layers with ReLU between them, the log-odds of a violation.

    Published as an AutoKeras model and converted to ``norm.mean``, ``norm.variance`` and
    ``linear_1`` to ``linear_4``, widths 768-64-512-256-1 (ViT-B/32: three layers).
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.dim = widths[0]
        self.norm = nn.Module()
        self.norm.register_buffer("mean", torch.zeros(self.dim))
        self.norm.register_buffer("variance", torch.ones(self.dim))
        for k in range(1, len(widths)):
            self.add_module(f"linear_{k}", nn.Linear(widths[k - 1], widths[k]))
        self.depth = len(widths) - 1

    def forward(self, embedding: Tensor) -> Tensor:
        """Unit embeddings ``(B, dim)`` to log-odds ``(B,)``."""
        mean, variance = (self.norm.get_buffer(n) for n in ("mean", "variance"))
        out = (embedding - mean) / variance.sqrt().clamp_min(EPSILON)
        for k in range(1, self.depth + 1):
            out = self.get_submodule(f"linear_{k}")(F.relu(out) if k > 1 else out)
        return out.squeeze(-1)


def read_nsfw_head(state: Mapping[str, Tensor], source: str | Path) -> NsfwHead:
    """The head a converted file holds.

    Raises:
        ValueError: keys that are missing, unknown or of another shape, naming them.
    """
    names = [f"linear_{k}.weight" for k in range(1, 9) if f"linear_{k}.weight" in state]
    missing = [n for n in ("norm.mean", "linear_1.weight", "linear_2.weight") if n not in state]
    check_keys({"missing": missing}, source)
    outs = [state[n].shape[0] for n in names]
    head = NsfwHead([state[names[0]].shape[-1], *outs[:-1], 1])
    load_exactly(head, {k: v.float() for k, v in state.items()}, source)
    return head.eval().requires_grad_(False)


class Concepts(nn.Module):
    """The concepts of Stable Diffusion's safety checker with their thresholds."""

    def __init__(self, dim: int, concepts: int = 17, special: int = 3) -> None:
        super().__init__()
        self.concept_embeds = nn.Parameter(torch.zeros(concepts, dim))
        self.special_care_embeds = nn.Parameter(torch.zeros(special, dim))
        self.concept_embeds_weights = nn.Parameter(torch.ones(concepts))
        self.special_care_embeds_weights = nn.Parameter(torch.ones(special))

    def forward(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Unit embeddings ``(B, dim)`` to largest margins ``(B,)`` and what is flagged ``(B,)``."""
        special = self._margins(embedding, self.special_care_embeds, "special_care_embeds_weights")
        margins = self._margins(embedding, self.concept_embeds, "concept_embeds_weights")
        care = (special.detach().round(decimals=3) > 0).any(1, keepdim=True)
        margins = margins + SPECIAL_CARE * care
        flagged = (margins.detach().round(decimals=3) > 0).any(1)
        return margins.amax(1), flagged

    def _margins(self, embedding: Tensor, concepts: Tensor, thresholds: str) -> Tensor:
        cosines = embedding @ F.normalize(concepts, dim=-1).T
        return cosines - self.get_parameter(thresholds)


def load_concepts(source: str, dtype: str = "fp32") -> tuple[Embedder, Concepts]:
    """The image tower and the concepts of a published safety checker.

    Raises:
        OSError: the checkpoint is not there.
        ValueError: keys that are missing, unknown or of another shape, naming them.
    """
    from transformers import CLIPConfig

    config = CLIPConfig.from_pretrained(source)
    state = _checker_state(source)
    held = set(Concepts(1).state_dict())
    concepts = Concepts(config.projection_dim)
    load_exactly(concepts, {k: v.float() for k, v in state.items() if k in held}, source)
    kind = DTYPES[checked_dtype(dtype)]
    tower = {k: v for k, v in state.items() if k not in held}
    key = ("safety checker", state_of(source), dtype)
    embedder = cached(key, lambda: assemble(_tower(config, tower, source), kind))
    return embedder, concepts.eval().requires_grad_(False)


def _tower(config: Any, state: Mapping[str, Tensor], source: str) -> Towers:
    """The CLIP image tower; how deep ``vision_model`` nests depends on who saved and who loads."""
    from transformers import CLIPVisionModel

    projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim, bias=False)
    image = PooledImage(CLIPVisionModel(config.vision_config), projection)
    own = {_flat(k): k for k in image.state_dict()}
    given = {_flat(k.replace("visual_projection.", "projection.")): v for k, v in state.items()}
    load_exactly(image, {own.get(k, k): v.float() for k, v in given.items()}, source)
    return Towers(image, None, load_preprocess(source), config.projection_dim)


def _flat(name: str) -> str:
    return NESTED.sub("vision_model.", name)


def _checker_state(source: str) -> dict[str, Tensor]:
    from transformers.utils import cached_file

    for name in WEIGHTS:
        file = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
        if file is not None:
            state = read_weights(file)
            return {k: v for k, v in state.items() if not k.endswith("position_ids")}
    raise FileNotFoundError(f"{source!r} holds neither {' nor '.join(WEIGHTS)}")
