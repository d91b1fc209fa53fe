"""ImageReward (Xu et al., 2304.05977): how well people would like a picture for its prompt.

BLIP reads picture and prompt together; an affine head of five layers turns the first token into a
number, which is standardised with the mean and deviation of the published checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmalign.registry import unknown
from mmalign.runtime.device import DTYPES
from vision_rewards.base import Context, PixelReward, Reading
from vision_rewards.blip import BlipSize, ImageTextEncoder, rename_vision
from vision_rewards.cards import info_of
from vision_rewards.preprocess import Preprocess
from vision_rewards.published import fill, find_weights, rename_weights, text_digest
from vision_rewards.sharing import shared
from vision_rewards.weights import digest, read_weights

HUB, FILE = "THUDM/ImageReward", "ImageReward.pt"
TOKENIZER = "google-bert/bert-base-uncased"
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw head, from the published code
WORD_PIECES = 35  # longer prompts are cut, start and end tokens included
HEAD_WIDTHS = (1024, 128, 64, 16, 1)
# In the file, and no part of the score: BLIP's contrastive projections and a constant buffer.
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")


class Head(nn.Module):
    """Five linear layers without activations; dropout after the first three in training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = (width, *HEAD_WIDTHS)
        layers: list[nn.Module] = []
        for k, dropout in enumerate((0.2, 0.2, 0.1, None, None)):
            layers.append(nn.Linear(widths[k], widths[k + 1]))
            if dropout is not None:
                layers.append(nn.Dropout(dropout))
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """Features ``(B, width)`` to raw scores ``(B,)``."""
        score: Tensor = self.layers(features)
        return score.squeeze(-1)


class ImageRewardNetwork(nn.Module):
    """Encoder and head, before standardisation."""

    def __init__(self, size: BlipSize) -> None:
        super().__init__()
        self.blip = ImageTextEncoder(size)
        self.mlp = Head(size.text_width)


def rename(name: str) -> str | None:
    """A published name of a weight in terms of :class:`ImageRewardNetwork`."""
    tower = "blip.visual_encoder."
    if not name.startswith(tower):
        return name
    ours = rename_vision(name.removeprefix(tower))
    return None if ours is None else tower + ours


class ImageReward(PixelReward):
    """Standardised preference score; differentiable through the picture.

    Prompts of more than 35 word pieces lose their end, as in the published code; they are scored
    with a note.

    Args:
        checkpoint: hub name, file or folder; ``None`` is the published one.
        size: fields of :class:`BlipSize` that differ from the published architecture.
        tokenizer: a BERT tokenizer, by hub name or folder.
        device: see :class:`PixelReward`.
        dtype: precision of the encoder, ``fp32``, ``bf16`` or ``fp16``; the head stays in fp32.

    Raises:
        OSError: weights or tokenizer are not there and cannot be fetched.
        ValueError: the weights do not fit, naming the keys.
    """

    info = info_of("image_reward")

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        *,
        size: Mapping[str, Any] | None = None,
        tokenizer: str | Path = TOKENIZER,
        device: str | None = None,
        dtype: str = "fp32",
    ) -> None:
        super().__init__(device)
        from transformers import AutoTokenizer

        if dtype not in DTYPES:
            raise unknown("precision", dtype, DTYPES)
        architecture = BlipSize(**(size or {}))
        path = find_weights(checkpoint, HUB, FILE)
        self.tokenizer = AutoTokenizer.from_pretrained(str(tokenizer))
        state = read_weights(path)
        self.network = _network(architecture, state, str(path)).eval().requires_grad_(False)
        self.network.blip.to(DTYPES[dtype])
        self.preprocess = Preprocess(size=architecture.image_size)
        words = text_digest(repr(sorted(self.tokenizer.get_vocab().items())))
        settings = f"{self.preprocess.fingerprint}-{words}-{WORD_PIECES}-{dtype}"
        self._identity = f"{self.info.name}@{digest(state)}-{settings}"

    @property
    def identity(self) -> str:
        """Name, digest of the weights, preprocessing, vocabulary and precision."""
        return self._identity

    def networks(self) -> Sequence[nn.Module]:
        """Encoder and head."""
        return (self.network,)

    def read(self, pixels: Tensor, prompts: Sequence[str], context: Context) -> Reading:
        """Score pixels ``(B, 3, H, W)``; raw head output in ``parts["raw"]``."""
        words, notes = self._words(prompts)
        ids, mask = (words[name].to(pixels.device) for name in ("input_ids", "attention_mask"))
        features = self.network.blip(self._picture(pixels), ids, mask)
        raw = self.network.mlp(features.float())
        return Reading((raw - MEAN) / STD, {"raw": raw}, notes)

    def _picture(self, pixels: Tensor) -> Tensor:
        encoder = self.network.blip
        dtype = next(encoder.parameters()).dtype
        return shared(
            (encoder, self.preprocess.fingerprint),
            pixels,
            lambda: encoder.picture(self.preprocess(pixels).to(dtype)),
        )

    def _words(self, prompts: Sequence[str]) -> tuple[Mapping[str, Tensor], list[str]]:
        """Word pieces of the prompts, and a note for each one that was cut."""
        whole = self.tokenizer(list(prompts), verbose=False)["input_ids"]
        notes = [
            f"prompt cut at {WORD_PIECES} of {len(ids)} word pieces"
            if len(ids) > WORD_PIECES
            else ""
            for ids in whole
        ]
        words = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=WORD_PIECES,
            return_tensors="pt",
        )
        return words, notes


def _network(size: BlipSize, state: Mapping[str, Tensor], source: str) -> ImageRewardNetwork:
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        network = ImageRewardNetwork(size)
    floats = {n: t.float() for n, t in rename_weights(state, rename, UNUSED).items()}
    fill(network, floats, source)
    return network
