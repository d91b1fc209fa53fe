"""Features of pictures that sets are compared by: Inception's, or an embedding model's.

Published FID and KID are of the 2048 features of the Inception network of 2015 as torch-fidelity
runs it, resize of TensorFlow 1 included; published CMMD is of CLIP ViT-L/14 at 336 pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmalign.pictures import PictureError, batches
from mmalign.runtime.extras import optional
from mmalign.runtime.files import digest_of
from vision_rewards.weights import read_weights

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"  # published by torch-fidelity
PUBLISHED = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"  # its digest
WIDTH = 2048
Network = Callable[[Tensor], Tensor]  # pixels (B, 3, H, W) in [0, 1] to features (B, d)


class WeightsError(ValueError):
    """Weights that are missing or are not what they should be; says what to fetch and where to."""


class Inception:
    """The 2048 features of the Inception network that published FID and KID are of.

    Args:
        weights: the published file of torch-fidelity, or one with the same keys.
        device: where the network works.

    Raises:
        MissingExtraError: torch-fidelity is not installed.
        WeightsError: no such file, or other weights in it.
    """

    def __init__(self, weights: str | Path, device: torch.device | str = "cpu") -> None:
        optional("torch_fidelity", "metrics", "FID and KID")
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        path = Path(weights)
        if not path.is_file():
            raise WeightsError(f"no Inception weights {path}; {HOW_TO_GET}")
        try:
            read_weights(path)  # torch-fidelity would run whatever else is in the file
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat", [str(WIDTH)], feature_extractor_weights_path=str(path)
            )
        except (ValueError, RuntimeError) as error:  # the latter names keys that are missing
            said = " ".join(str(error).split())[:250]
            raise WeightsError(
                f"{path} holds no Inception weights of torch-fidelity ({said}); {HOW_TO_GET}"
            ) from error
        self.network = network.to(device)
        self.digest = digest_of(path)

    @property
    def published(self) -> bool:
        """Whether the file is the published one."""
        return self.digest == PUBLISHED

    @property
    def identity(self) -> str:
        """Names the weights."""
        return f"inception-{self.digest[:16]}"

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Features ``(B, 2048)`` of pixels ``(B, 3, H, W)``, as those of the 8-bit pictures."""
        bytes_ = pixels.mul(255).round().clamp(0, 255).to(torch.uint8)
        features: Tensor = self.network(bytes_)[0]
        return features


class Embedded:
    """Features of an embedding model, before they are normalised.

    Args:
        checkpoint: see :func:`vision_rewards.embedding.load_embedder`.
        device: where the network works.

    Raises:
        OSError: the checkpoint is not there and cannot be fetched.
    """

    def __init__(self, checkpoint: str | Path, device: torch.device | str = "cpu") -> None:
        from vision_rewards.embedding import load_embedder

        self.embedder = load_embedder(checkpoint, vision_only=True)
        self.embedder.to(device)

    @property
    def identity(self) -> str:
        """Names weights and preprocessing."""
        return f"{self.embedder.image_digest}-{self.embedder.preprocess.fingerprint}"

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Features ``(B, d)`` of pixels ``(B, 3, H, W)`` in [0, 1]."""
        return self.embedder.image_features(pixels)


HOW_TO_GET = (
    f"fetch {INCEPTION} with: mmalign data get inception, or give a copy of your own with "
    "-o weights=PATH. Without it: -o features=CHECKPOINT compares by an embedding model "
    "(numbers of their own), -o measures=[cmmd] does without FID and KID"
)


def features_of(
    pictures: Sequence[Path | Image.Image],
    networks: Sequence[Network],
    *,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
) -> tuple[list[int], list[np.ndarray], list[str]]:
    """Features of every picture that can be read, in the order of ``pictures``.

    Every file is decoded once for all ``networks``; files may differ in size.

    Returns:
        numbers of the ``N`` pictures that could be read, an array ``(N, d)`` for each network, and
        what is wrong with the others.
    """
    found: list[tuple[int, list[np.ndarray]]] = []
    problems = []
    for rows, batch in batches(list(pictures), batch_size):
        if isinstance(batch, PictureError):
            problems.append(str(batch))
            continue
        pixels = batch.data.to(device)
        told = [network(pixels).float().cpu().numpy() for network in networks]
        found += [(row, [t[k] for t in told]) for k, row in enumerate(rows)]
    found.sort(key=lambda one: one[0])
    columns = [np.stack([told[k] for _, told in found]) if found else np.zeros((0, 0))
               for k in range(len(networks))]  # fmt: skip
    return [row for row, _ in found], columns, problems
