"""BLIP's image-grounded text encoder (Li et al., 2201.12086) out of stock transformers parts.

A vision transformer reads the picture; BERT with a cross-attention in every layer reads the prompt
and looks at the picture's tokens.  The published checkpoints name their weights after the original
code, so the vision tower goes through a table of names; the text tower has the same names in both.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor, nn

# Original name inside ``visual_encoder.`` -> name in transformers' BlipVisionModel.
_VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
}
_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_BLOCK_NAME = re.compile(r"^blocks\.(\d+)\.(.+)$")


@dataclass(frozen=True, kw_only=True)
class BlipSize:
    """The size of both towers; the defaults are BLIP with ViT-L and BERT-base.

    Attributes:
        image_size: side of the input picture, in pixels.
        patch_size: side of a patch, in pixels.
        vision_width, vision_layers, vision_heads: of the vision transformer (MLP: 4 x width).
        text_width, text_layers, text_heads, text_mlp: of BERT.
        vocabulary: word pieces; BERT's 30522 and BLIP's two own.
        positions: longest text the position table has room for.
    """

    image_size: int = 224
    patch_size: int = 16
    vision_width: int = 1024
    vision_layers: int = 24
    vision_heads: int = 16
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    text_mlp: int = 3072
    vocabulary: int = 30524
    positions: int = 512


class ImageTextEncoder(nn.Module):
    """Both towers; see the module."""

    def __init__(self, size: BlipSize) -> None:
        super().__init__()
        from transformers import BlipTextModel, BlipVisionModel

        self.size = size
        self.visual_encoder = BlipVisionModel(_vision_config(size))
        self.text_encoder = BlipTextModel(_text_config(size), add_pooling_layer=False)

    def picture(self, pixels: Tensor) -> Tensor:
        """Normalised pixels ``(B, 3, S, S)`` to picture tokens ``(B, patches + 1, width)``."""
        tokens: Tensor = self.visual_encoder(pixel_values=pixels).last_hidden_state
        return tokens

    def forward(self, picture: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """The first text token after cross-attention.

        Args:
            picture: tokens of :meth:`picture`, ``(B, N, width)``; every one is attended to.
            ids, mask: word pieces and their attention mask, ``(B, L)``.

        Returns:
            ``(B, text_width)``.
        """
        states: Tensor = self.text_encoder(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=picture
        ).last_hidden_state
        return states[:, 0]


def rename_vision(name: str) -> str | None:
    """A name of the original vision tower (without ``visual_encoder.``) in transformers' terms.

    ``None`` where the original has no such name.
    """
    stem, dot, leaf = name.rpartition(".")
    table, prefix = _VISION, ""
    block = _BLOCK_NAME.match(stem)
    if block:
        table, prefix, stem = _BLOCK, f"encoder.layers.{block[1]}.", block[2]
    if name in table:  # the two parameters that are no layer's
        return table[name]
    return f"{prefix}{table[stem]}{dot}{leaf}" if stem in table else None


def _vision_config(size: BlipSize) -> object:
    from transformers import BlipVisionConfig

    return BlipVisionConfig(
        hidden_size=size.vision_width,
        intermediate_size=4 * size.vision_width,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=size.vision_heads,
        image_size=size.image_size,
        patch_size=size.patch_size,
        layer_norm_eps=1e-6,  # of the original ViT; transformers' default is 1e-5
    )


def _text_config(size: BlipSize) -> object:
    from transformers import BlipTextConfig

    return BlipTextConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.text_width,
        encoder_hidden_size=size.vision_width,
        intermediate_size=size.text_mlp,
        num_hidden_layers=size.text_layers,
        num_attention_heads=size.text_heads,
        max_position_embeddings=size.positions,
        is_decoder=True,  # what makes transformers build the cross-attention; masks stay two-way
    )
