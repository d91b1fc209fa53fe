"""ImageReward at a size for tests, under the names of the published file."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from vision_rewards.blip import BlipSize

SMALL = {
    "image_size": 32, "patch_size": 8, "vision_width": 24, "vision_layers": 2, "vision_heads": 2,
    "text_width": 16, "text_layers": 2, "text_heads": 2, "text_mlp": 32, "vocabulary": 40,
    "positions": 48,
}  # fmt: skip
WORDS = "a photo of red green star circle on the left ##s picture".split()


def published_shapes(size: BlipSize) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published file, written down from the original code's modules."""
    v, t, m = size.vision_width, size.text_width, size.text_mlp
    tokens = (size.image_size // size.patch_size) ** 2 + 1
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, out: int, into: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, into), (out,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    eye = "blip.visual_encoder"
    shapes |= {f"{eye}.cls_token": (1, 1, v), f"{eye}.pos_embed": (1, tokens, v)}
    shapes[f"{eye}.patch_embed.proj.weight"] = (v, 3, size.patch_size, size.patch_size)
    shapes[f"{eye}.patch_embed.proj.bias"] = (v,)
    for k in range(size.vision_layers):
        block = f"{eye}.blocks.{k}"
        norm(f"{block}.norm1", v), norm(f"{block}.norm2", v)
        linear(f"{block}.attn.qkv", 3 * v, v), linear(f"{block}.attn.proj", v, v)
        linear(f"{block}.mlp.fc1", 4 * v, v), linear(f"{block}.mlp.fc2", v, 4 * v)
    norm(f"{eye}.norm", v)
    bert = "blip.text_encoder"
    shapes[f"{bert}.embeddings.position_ids"] = (1, size.positions)
    shapes[f"{bert}.embeddings.word_embeddings.weight"] = (size.vocabulary, t)
    shapes[f"{bert}.embeddings.position_embeddings.weight"] = (size.positions, t)
    norm(f"{bert}.embeddings.LayerNorm", t)
    for k in range(size.text_layers):
        layer = f"{bert}.encoder.layer.{k}"
        for attention, width in (("attention", t), ("crossattention", v)):
            linear(f"{layer}.{attention}.self.query", t, t)
            linear(f"{layer}.{attention}.self.key", t, width)
            linear(f"{layer}.{attention}.self.value", t, width)
            linear(f"{layer}.{attention}.output.dense", t, t)
            norm(f"{layer}.{attention}.output.LayerNorm", t)
        linear(f"{layer}.intermediate.dense", m, t)
        linear(f"{layer}.output.dense", t, m)
        norm(f"{layer}.output.LayerNorm", t)
    linear("blip.vision_proj", 256, v), linear("blip.text_proj", 256, t)
    widths = (t, 1024, 128, 64, 16, 1)
    for k, index in enumerate((0, 2, 4, 6, 7)):
        linear(f"mlp.layers.{index}", widths[k + 1], widths[k])
    return shapes


def published_state(size: BlipSize, seed: int = 0) -> dict[str, Tensor]:
    """A random checkpoint of that layout; norms near 1, as trained ones are."""
    generator = torch.Generator().manual_seed(seed)
    state = {
        n: torch.randn(s, generator=generator) * 0.1 for n, s in published_shapes(size).items()
    }
    for name in state:
        if re.search(r"norm\d?\.weight$", name, re.IGNORECASE):
            state[name] += 1
    ids = "blip.text_encoder.embeddings.position_ids"
    return state | {ids: torch.arange(size.positions)[None]}


def write_image_reward(folder: Path) -> Path:
    """Random weights and a tokenizer of a few words in ``folder``."""
    from transformers import BertTokenizer

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    BertTokenizer(vocab={w: k for k, w in enumerate([*special, *WORDS])}).save_pretrained(folder)
    torch.save(published_state(BlipSize(**SMALL)), folder / "ImageReward.pt")
    return folder
