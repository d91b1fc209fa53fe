"""Probability that a picture is safe to show: three published detectors, higher is safer.

Use one as a constraint or a penalty beside other rewards and log the rate of violations; as the
only reward it teaches a generator to paint nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vision_rewards.base import Context, PixelReward, Reading
from vision_rewards.cards import info_of
from vision_rewards.embedding import DTYPES, checked_dtype, load_embedder
from vision_rewards.safety_heads import NsfwHead, load_concepts, read_nsfw_head
from vision_rewards.towers_transformers import check_loading, load_preprocess
from vision_rewards.weights import digest, read_weights, weights_file

UNSAFE = ("nsfw", "unsafe", "porn", "hentai", "sexy", "explicit")


def safe_probability(logit: Tensor) -> Reading:
    """``sigmoid(-logit)`` of the log-odds ``(B,)`` of a violation, with the part ``violation``."""
    return Reading(torch.sigmoid(-logit), {"violation": torch.sigmoid(logit.detach())})


class NsfwClassifier(PixelReward):
    """``1 - P(unsafe classes)`` of an image classifier of transformers.

    Args:
        checkpoint: hub name or folder of any image classification model.
        unsafe: the labels that count as a violation; ``None`` takes those of the checkpoint that
            have a usual name (``nsfw``, ``porn``, ``unsafe``, ...).
        dtype: precision of the network.
        device: where it lives; ``None`` follows the media.

    Raises:
        OSError: the checkpoint is not there.
        ValueError: labels the checkpoint does not have, or weights that do not fit.
    """

    info = info_of("nsfw")

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        *,
        unsafe: Sequence[str] | None = None,
        dtype: str = "fp32",
        device: str | None = None,
    ) -> None:
        from transformers import AutoModelForImageClassification

        super().__init__(device)
        kind = DTYPES[checked_dtype(dtype)]
        source = str(checkpoint or self.info.checkpoint)
        model, report = AutoModelForImageClassification.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True
        )
        check_loading(report, source)
        self._identity = digest(model) + ("" if dtype == "fp32" else f"-{dtype}")
        self.model = model.to(kind).eval().requires_grad_(False)
        self.preprocess = load_preprocess(source)
        self.unsafe = _unsafe_rows(model.config.id2label, unsafe, source)

    @property
    def identity(self) -> str:
        """Name, weights, preprocessing and the classes that count."""
        rows = ",".join(map(str, self.unsafe))
        return f"{self.info.name}@{self._identity}-{self.preprocess.fingerprint}-[{rows}]"

    def networks(self) -> Sequence[nn.Module]:
        """The classifier."""
        return (self.model,)

    def read(self, pixels: Tensor, prompts: Sequence[str], context: Context) -> Reading:
        """Probabilities from a softmax in fp32."""
        with torch.autocast(pixels.device.type, enabled=False):
            inputs = self.preprocess(pixels).to(self.model.dtype)
            logits = self.model(pixel_values=inputs).logits.float()
        safe = [k for k in range(logits.shape[1]) if k not in self.unsafe]
        odds = logits[:, list(self.unsafe)].logsumexp(1) - logits[:, safe].logsumexp(1)
        return safe_probability(odds)


def _unsafe_rows(
    labels: dict[int, str], asked: Sequence[str] | None, source: str
) -> tuple[int, ...]:
    """Which classes count as a violation."""
    names = {str(label).lower(): int(row) for row, label in labels.items()}
    wanted = UNSAFE if asked is None else [a.lower() for a in asked]
    rows = tuple(sorted(names[w] for w in wanted if w in names))
    lost = [] if asked is None else [a for a in asked if a.lower() not in names]
    if lost or not 0 < len(rows) < len(names):
        raise ValueError(
            f"unsafe={asked!r} does not part the labels of {source!r} in two: "
            f"{', '.join(map(str, labels.values()))}; name some of them, not all"
        )
    return rows


class NsfwClip(PixelReward):
    """LAION's CLIP-L detector: one minus the probability from a small network on the embedding.

    Args:
        checkpoint: the file of the head, a path or ``org/repo:file`` of the hub; not fetched on its
            own, because it is published outside the hub.
        backbone: the embedding model it was trained on.
        dtype: precision of the backbone; the head is fp32.
        device: where they live; ``None`` follows the media.

    Raises:
        FileNotFoundError: no head was given; the message says where it is published.
        OSError: the backbone is not there.
        ValueError: a file that is no such head, or one for embeddings of another width.
    """

    info = info_of("nsfw_clip")
    FILE = "clip_autokeras_binary_nsfw.pth"

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        *,
        backbone: str | Path = "openai/clip-vit-large-patch14",
        dtype: str = "fp32",
        device: str | None = None,
    ) -> None:
        super().__init__(device)
        if not checkpoint:
            raise FileNotFoundError(
                f"nsfw_clip needs the file of its head, {self.FILE}, published in a zip at "
                "https://github.com/LAION-AI/CLIP-based-NSFW-Detector/issues/7. Download it and "
                f"pass it: nsfw_clip@path/to/{self.FILE} (a path, or org/repo:file of the hub)"
            )
        file = weights_file(checkpoint)
        state = read_weights(file)
        self._digest = digest(state)
        self.head: NsfwHead = read_nsfw_head(state, file)
        self.embedder = load_embedder(backbone, dtype=dtype, vision_only=True)
        if self.head.dim != self.embedder.dim:
            raise ValueError(
                f"the head {str(file)!r} takes embeddings of {self.head.dim} numbers, the backbone "
                f"{str(backbone)!r} gives {self.embedder.dim}"
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
        """One minus the published probability."""
        with torch.autocast(pixels.device.type, enabled=False):
            return safe_probability(self.head(self.embedder.image(pixels)))


class NsfwChecker(PixelReward):
    """The safety checker of Stable Diffusion (analysed by Rando et al. 2022, 2210.04610).

    A picture is flagged where its cosine with one of 17 concepts exceeds that concept's threshold,
    lowered by 0.01 where one of 3 special-care concepts does. The checker gives no probability:
    the value is ``sigmoid(-margin / temperature)`` with the largest margin over the concepts, below
    one half where the checker flags (which rounds margins to three decimals first).

    Args:
        checkpoint: hub name or folder of the published checker.
        temperature: what turns margins of cosines into a probability; our choice.
        dtype: precision of the image tower.
        device: where it lives; ``None`` follows the media.

    Raises:
        OSError: the checkpoint is not there.
        ValueError: weights that do not fit, or a temperature that is not positive.
    """

    info = info_of("nsfw_checker")

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        *,
        temperature: float = 0.01,
        dtype: str = "fp32",
        device: str | None = None,
    ) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        super().__init__(device)
        source = str(checkpoint or self.info.checkpoint)
        self.embedder, self.concepts = load_concepts(source, dtype)
        self._digest, self.temperature = digest(self.concepts), temperature

    @property
    def identity(self) -> str:
        """Name, weights, preprocessing and temperature."""
        backbone = f"{self.embedder.image_digest}-{self.embedder.preprocess.fingerprint}"
        return f"{self.info.name}@{self._digest}-{backbone}-t{self.temperature:g}"

    def networks(self) -> Sequence[nn.Module]:
        """The image tower and the concepts."""
        return (*self.embedder.networks, self.concepts)

    def read(self, pixels: Tensor, prompts: Sequence[str], context: Context) -> Reading:
        """Safety from the largest margin; parts ``violation``, ``flagged`` (0 or 1), ``margin``."""
        with torch.autocast(pixels.device.type, enabled=False):
            margin, flagged = self.concepts(self.embedder.image(pixels))
        reading = safe_probability(margin / self.temperature)
        more: dict[str, Any] = {"flagged": flagged.float(), "margin": margin.detach()}
        return Reading(reading.value, {**reading.parts, **more})


__all__ = ["NsfwChecker", "NsfwClassifier", "NsfwClip", "safe_probability"]
