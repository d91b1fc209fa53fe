"""The shapes world's trained rewards: a small CLIP, an aesthetic head on it, an artefact detector.

They are what the large scorers are, at a size that runs anywhere: differentiable, imperfect, and
open to being gamed, beside a verifier that knows the truth.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmalign.assets import asset
from vision_rewards.base import Context, PixelReward, Reading
from vision_rewards.cards import info_of
from vision_rewards.clip_rewards import EmbeddingReward
from vision_rewards.embedding import Embedder, load_embedder
from vision_rewards.sharing import shared
from vision_rewards.weights import digest, load_exactly, read_weights

CONFIG, WEIGHTS = "config.json", "model.safetensors"


class ShapesClip(EmbeddingReward):
    """``scale * cos(picture, prompt)`` of the shapes world's CLIP.

    Args:
        checkpoint: a folder in open_clip's layout; ``None`` is the shipped model.
        scale: multiplies the cosine; 1 leaves it in [-1, 1].
        device: where the towers live; ``None`` follows the media.

    Raises:
        ValueError: ``scale`` is not positive.
    """

    info = info_of("shapes_clip")

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        *,
        scale: float = 1.0,
        device: str | None = None,
    ) -> None:
        if not scale > 0:
            raise ValueError(f"scale must be positive, got {scale}: higher scores are better")
        super().__init__(load_embedder(checkpoint or asset("shapes-clip")), device)
        self.scale = float(scale)
        if self.scale != 1:
            self.info = replace(self.info, range=(-self.scale, self.scale))

    @property
    def settings(self) -> str:
        """The scale, where it is not 1."""
        return "" if self.scale == 1.0 else f"-x{self.scale:g}"

    def read(self, pixels: Tensor, prompts: Sequence[str], context: Context) -> Reading:
        """Score each picture for its prompt."""
        value, notes = self.alignment(pixels, prompts)
        return Reading(self.scale * value, notes=notes)


# --- aesthetic head -----------------------------------------------------------------------------


class AestheticHead(nn.Module):
    """``Linear - GELU - Linear`` on standardised features ``(B, features)``: ``(B,)``.

    Features of a frozen network differ in scale by orders of magnitude; ``mean`` and ``std`` are
    measured once on training pictures and stored with the weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, features: int, width: int = 64) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))
        self.net = nn.Sequential(nn.Linear(features, width), nn.GELU(), nn.Linear(width, 1))

    def forward(self, features: Tensor) -> Tensor:
        value: Tensor = self.net((features - self.mean) / self.std)
        return value[:, 0]


def tower_features(embedder: Embedder, pixels: Tensor, blocks: Sequence[int]) -> Tensor:
    """What the head reads of pixels ``(B, 3, H, W)`` in [0, 1], fp32.

    The embedding, mean and deviation over the patches after each of ``blocks``, and
    :func:`edge_statistics`: ``(B, dim + 2 * len(blocks) * width + 6)``. The embedding alone was
    trained to forget what no caption mentions.
    """
    tower, prepare = embedder.image_tower, embedder.preprocess

    def compute() -> Tensor:
        inputs = prepare(pixels)
        out = tower.visual.forward_intermediates(  # type: ignore[operator,union-attr]
            inputs, indices=list(blocks), output_fmt="NLC"
        )
        tokens = [t.float() for t in out["image_intermediates"]]
        spread = [part for t in tokens for part in (t.mean(1), t.std(1))]
        embedding = F.normalize(out["image_features"].float(), dim=-1)
        return torch.cat([embedding, *spread, edge_statistics(inputs)], dim=1)

    return shared((tower, prepare.fingerprint, "patches", tuple(blocks)), pixels, compute)


def edge_statistics(inputs: Tensor) -> Tensor:
    """How hard the edges are, whatever their number and contrast: ``(B, 3, H, W)`` to ``(B, 6)``.

    At full and at half resolution: logarithms of the energy of second over first differences,
    along and across the diagonal, and of the fourth moment of first differences over the squared
    second. Staircases raise them, blur lowers them. Sub-pixel detail of this kind is what the
    tower's first layer drops.
    """
    found = []
    for x in (inputs, F.avg_pool2d(inputs, 2)):
        across, down = x.diff(dim=3)[:, :, 1:], x.diff(dim=2)[..., 1:]
        first = across.square() + down.square()
        energy = first.mean((1, 2, 3)) + 1e-6
        bend = x.diff(n=2, dim=3).square().mean((1, 2, 3)) + x.diff(n=2, dim=2).square().mean(
            (1, 2, 3)
        )
        corner = x.diff(dim=3).diff(dim=2).square().mean((1, 2, 3))
        peak = first.square().mean((1, 2, 3)) / energy
        found += [torch.log((v + 1e-6) / energy) for v in (bend, corner, peak)]
    return torch.stack(found, dim=1)


class ShapesAesthetic(PixelReward):
    """Taste in the shapes world: harmony of hues, balance, clean edges (see the pre-training).

    The score is standardised over renders of training scenes: 0 is ordinary, 1 one deviation
    better.

    Args:
        checkpoint: a folder with ``config.json`` and ``model.safetensors``; ``None`` is the
            shipped head.
        backbone: the CLIP it was trained on; ``None`` is the shipped one.
        device: where the networks live; ``None`` follows the media.

    Raises:
        FileNotFoundError: the folder holds no head.
        ValueError: the head was trained on other backbone weights, or does not fit its config.
    """

    info = info_of("shapes_aesthetic")

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        *,
        backbone: str | Path | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__(device)
        folder = Path(checkpoint or asset("shapes-aesthetic"))
        config, state = read_folder(folder)
        # Both towers, though only one is needed: then shapes_clip shares the object.
        self.embedder = load_embedder(backbone or asset("shapes-clip"))
        if config["backbone"] != self.embedder.image_digest:
            raise ValueError(
                f"the head in {str(folder)!r} was trained on backbone {config['backbone']}, "
                f"got {self.embedder.image_digest}; give its own CLIP as backbone="
            )
        self.blocks = tuple(config["blocks"])
        self.head = AestheticHead(config["features"], config["width"])
        load_exactly(self.head, state, folder)
        self.head.eval().requires_grad_(False)
        self._digest = digest(self.head)

    @property
    def identity(self) -> str:
        """Name and weights of head and backbone."""
        return f"{self.info.name}@{self._digest}-{self.embedder.image_digest}"

    def networks(self) -> Sequence[nn.Module]:
        """Image tower and head."""
        return self.embedder.image_tower, self.head

    def read(self, pixels: Tensor, prompts: Sequence[str], context: Context) -> Reading:
        """Score each picture; the prompt is not read."""
        return Reading(self.head(tower_features(self.embedder, pixels, self.blocks)))


# --- artefacts ----------------------------------------------------------------------------------


class ArtifactNet(nn.Module):
    """A convolutional network that looks for artefacts at full resolution.

    ``(B, 3, H, W)`` in [0, 1] to logits of cleanliness ``(B,)``. Every place votes; a soft
    maximum, ``log mean exp``, lets one broken corner outvote a clean rest.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        w = width
        self.body = nn.Sequential(
            *_unit(3, w // 2), *_unit(w // 2, w, stride=2), *_unit(w, w),
            *_unit(w, 2 * w, stride=2), *_unit(2 * w, 2 * w), *_unit(2 * w, 2 * w, dilation=2),
            *_unit(2 * w, 2 * w, dilation=2),
        )  # fmt: skip
        self.vote = nn.Conv2d(2 * w, 1, 1)
        self.sharpness = nn.Parameter(torch.tensor(0.0))

    def votes(self, pixels: Tensor) -> Tensor:
        """How broken each place looks, logits ``(B, H / 4, W / 4)``."""
        found: Tensor = self.vote(self.body(pixels * 2 - 1))
        return found[:, 0]

    def forward(self, pixels: Tensor) -> Tensor:
        votes = self.votes(pixels).flatten(1)
        beta = F.softplus(self.sharpness) + 0.5
        places = votes.new_tensor(votes.shape[1])
        return (places.log() - torch.logsumexp(beta * votes, 1)) / beta


def _unit(inside: int, outside: int, stride: int = 1, dilation: int = 1) -> list[nn.Module]:
    # Statistics are frozen after training, so a picture's score does not depend on its batch.
    convolution = nn.Conv2d(
        inside, outside, 3, stride=stride, padding=dilation, dilation=dilation, bias=False
    )
    return [convolution, nn.BatchNorm2d(outside), nn.SiLU()]


class ShapesArtifact(PixelReward):
    """``P(clean)``: how likely a picture is free of artefacts, whatever it shows.

    After "Understanding Reward Hacking in Text-to-Image Reinforcement Learning" (2601.03468): a
    small classifier of clean and broken pictures, of use alone, as a gate, or as a term beside any
    reward. It looks at full resolution, because resizing hides artefacts.

    Args:
        checkpoint: a folder with ``config.json`` and ``model.safetensors``; ``None`` is the
            shipped network.
        device: where the network lives; ``None`` follows the media.

    Raises:
        FileNotFoundError: the folder holds no network. ValueError: weights that do not fit.
    """

    info = info_of("shapes_artifact")

    def __init__(self, checkpoint: str | Path | None = None, *, device: str | None = None) -> None:
        super().__init__(device)
        folder = Path(checkpoint or asset("shapes-artifact"))
        config, state = read_folder(folder)
        self.network = ArtifactNet(config["width"])
        load_exactly(self.network, state, folder)
        self.network.eval().requires_grad_(False)
        self._digest = digest(self.network)

    @property
    def identity(self) -> str:
        """Name and weights."""
        return f"{self.info.name}@{self._digest}"

    def networks(self) -> Sequence[nn.Module]:
        """The network."""
        return (self.network,)

    def read(self, pixels: Tensor, prompts: Sequence[str], context: Context) -> Reading:
        """Judge each picture; the prompt is not read."""
        return Reading(torch.sigmoid(self.network(pixels)))


# --- files --------------------------------------------------------------------------------------


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and fp32 weights of a small network.

    Raises:
        FileNotFoundError: one of the two files is not there.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}; `mmalign pretrain` writes both")
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    state = read_weights(folder / WEIGHTS)
    return config, {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
