"""Aesthetic predictors: a head of a few linear layers on the normalised embedding of a picture.

The published heads (LAION v1 and v2, the SigLIP-based v2.5) are files of weights beside a well
known backbone. All but one have no activation between their layers, so that a head is one affine
map ``w . e + b``: one fixed direction of the embedding space, which is why these rewards are hacked
so easily.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vision_rewards.base import Context, PixelReward, Reading
from vision_rewards.cards import info_of
from vision_rewards.embedding import load_embedder
from vision_rewards.weights import check_keys, digest, read_weights, weights_file

# Positions of the linear layers in the published stacks; the gaps are dropout and ReLU.
AFFINE_V2, RELU_V2, AFFINE_V2_5 = (0, 2, 4, 6, 7), (0, 3, 6, 9, 11), (0, 2, 4, 6, 8)
LAYER = re.compile(r"(?:layers\.)?(?:scoring_head\.)?(?:(\d+)\.)?(weight|bias)")


class ScoreHead(nn.Module):
    """Linear layers down to one number, with or without ReLU between them.

    Dropout, which the published heads have between layers, does nothing when scoring.
    """

    def __init__(self, widths: Sequence[int], relu: bool) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.relu = relu

    def forward(self, embedding: Tensor) -> Tensor:
        """Embeddings ``(B, dim)`` to scores ``(B, 1)``."""
        for k, linear in enumerate(self.linears):
            embedding = linear(F.relu(embedding) if self.relu and k else embedding)
        return embedding

    def folded(self) -> nn.Linear:
        """The same function as one layer, composed in fp64.

        Raises:
            ValueError: there are activations between the layers.
        """
        if self.relu:
            raise ValueError("a head with ReLU is not affine and cannot be folded")
        state = {name: tensor.double() for name, tensor in self.state_dict().items()}
        weight, bias = state["linears.0.weight"], state["linears.0.bias"]
        for k in range(1, len(self.linears)):
            w, b = state[f"linears.{k}.weight"], state[f"linears.{k}.bias"]
            weight, bias = w @ weight, w @ bias + b
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight.float(), "bias": bias.float()})
        return layer


def read_head(state: Mapping[str, Tensor], source: str | Path) -> ScoreHead:
    """The head a published file holds; which one follows from its keys, never from its name.

    Raises:
        ValueError: keys that are unknown or missing, or shapes that do not chain, naming them.
    """
    layers: dict[int, dict[str, Tensor]] = {}
    unknown = []
    for name, tensor in state.items():
        match = LAYER.fullmatch(name)
        if match:
            layers.setdefault(int(match[1] or 0), {})[match[2]] = tensor.float()
        else:
            unknown.append(name)
    places = tuple(sorted(layers))
    missing = [f"layer {k}: {n}" for k in places for n in ("weight", "bias") if n not in layers[k]]
    check_keys({"unknown": sorted(unknown), "missing": missing}, source)
    if places not in ((0,), AFFINE_V2, RELU_V2, AFFINE_V2_5):
        raise ValueError(
            f"{str(source)!r} has linear layers at {places}; known heads have them at (0,), "
            f"{AFFINE_V2}, {RELU_V2} (with ReLU) and {AFFINE_V2_5}"
        )
    return _filled([layers[k] for k in places], places == RELU_V2, source)


def _filled(layers: Sequence[Mapping[str, Tensor]], relu: bool, source: str | Path) -> ScoreHead:
    shapes = [tuple(layer["weight"].shape) for layer in layers]
    chained = all(a[0] == b[1] for a, b in pairwise(shapes))
    biases = all(layer["bias"].shape == layer["weight"].shape[:1] for layer in layers)
    if not (chained and biases and shapes[-1][0] == 1):
        raise ValueError(f"{str(source)!r}: weights {shapes} do not lead to one number")
    head = ScoreHead([shapes[0][1], *(s[0] for s in shapes)], relu)
    state = {f"linears.{k}.{n}": t for k, layer in enumerate(layers) for n, t in layer.items()}
    head.load_state_dict(state)
    return head


class Aesthetic(PixelReward):
    """Base of the aesthetic predictors; prompts are ignored.

    Args:
        checkpoint: the file of the head, a path or ``org/repo:file`` of the hub. It is not
            fetched on its own: the published files lie outside the hub.
        backbone: the embedding model it was trained on.
        dtype: precision of the backbone; the head is fp32.
        device: where they live; ``None`` follows the media.

    Raises:
        FileNotFoundError: no head was given; the message says where it is published.
        OSError: the backbone is not there.
        ValueError: a file that is no known head, or one for embeddings of another width.
    """

    FILE, PUBLISHED, BACKBONE = "", "", "openai/clip-vit-large-patch14"

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        *,
        backbone: str | Path | None = None,
        dtype: str = "fp32",
        device: str | None = None,
    ) -> None:
        super().__init__(device)
        file = weights_file(checkpoint) if checkpoint else self._not_given()
        state = read_weights(file)
        self._digest = digest(state)
        head = read_head(state, file)
        self.embedder = load_embedder(backbone or self.BACKBONE, dtype=dtype, vision_only=True)
        needs = int(next(head.parameters()).shape[1])
        if needs != self.embedder.dim:
            raise ValueError(
                f"the head {str(file)!r} takes embeddings of {needs} numbers, the backbone gives "
                f"{self.embedder.dim}; {self.info.name} was trained on {self.BACKBONE}"
            )
        self.head = (head if head.relu else head.folded()).eval().requires_grad_(False)

    def _not_given(self) -> Path:
        raise FileNotFoundError(
            f"{self.info.name} needs the file of its head, {self.FILE}, published at "
            f"{self.PUBLISHED}. Download it and pass its path (or org/repo:file of the hub) as "
            f"{{'reward': '{self.info.name}', 'checkpoint': 'path/to/{self.FILE}'}}"
        )

    @property
    def identity(self) -> str:
        """Name, weights of head and backbone, preprocessing."""
        backbone = f"{self.embedder.image_digest}-{self.embedder.preprocess.fingerprint}"
        return f"{self.info.name}@{self._digest}-{backbone}"

    def networks(self) -> Sequence[nn.Module]:
        """The image tower and the head."""
        return (*self.embedder.networks, self.head)

    def read(self, pixels: Tensor, prompts: Sequence[str], context: Context) -> Reading:
        """The predicted ratings."""
        with torch.autocast(pixels.device.type, enabled=False):
            return Reading(self.head(self.embedder.image(pixels)).squeeze(-1))


class AestheticV2(Aesthetic):
    """LAION's improved aesthetic predictor, the head everybody reports (SAC + Logos + AVA)."""

    info = info_of("aesthetic_v2")
    FILE = "sac+logos+ava1-l14-linearMSE.pth"
    PUBLISHED = "https://github.com/christophschuhmann/improved-aesthetic-predictor"


class AestheticV2Ava(AestheticV2):
    """LAION's improved aesthetic predictor trained on AVA + Logos, linear or with ReLU."""

    info = info_of("aesthetic_v2_ava")
    FILE = "ava+logos-l14-linearMSE.pth"


class AestheticV1(Aesthetic):
    """LAION's first aesthetic predictor: one linear layer."""

    info = info_of("aesthetic_v1")
    FILE = "sa_0_4_vit_l_14_linear.pth"
    PUBLISHED = "https://github.com/LAION-AI/aesthetic-predictor"


class AestheticV25(Aesthetic):
    """The SigLIP-based aesthetic predictor v2.5; its weights are under the AGPL-3.0."""

    info = info_of("aesthetic_v2_5")
    FILE = "aesthetic_predictor_v2_5.pth"
    PUBLISHED = "https://github.com/discus0434/aesthetic-predictor-v2-5"
    BACKBONE = "google/siglip-so400m-patch14-384"
