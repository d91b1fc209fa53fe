"""A small preference world: rendered scenes in warm or cool light, and tastes for it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mmalign.shapes import caption, render, sample_scene, sample_spec

SIDE = 32


@dataclass(frozen=True)
class Picture:
    """A rendered scene and its light: ``warmth`` and ``brightness`` in [-1, 1]."""

    path: Path
    prompt: str
    warmth: float
    brightness: float


def draw(folder: Path, count: int, seed: int = 0) -> list[Picture]:
    """``count`` pairs of pictures; both of a pair carry one prompt of their own."""
    rng = random.Random(seed)
    made = []
    for number in range(count):
        first = sample_spec(rng, "train")
        prompt = f"{caption(first)}, number {number}"
        for which in "ab":
            spec = first if which == "a" else sample_spec(rng, "train")
            warmth, brightness = rng.uniform(-1, 1), rng.uniform(-1, 1)
            light = [round(128 + 60 * brightness + 60 * warmth * k) for k in (1, 0, -1)]
            scene = render(sample_scene(spec, rng), SIDE)
            path = folder / f"{number}{which}.png"
            Image.blend(scene, Image.new("RGB", scene.size, tuple(light)), 0.5).save(path)
            made.append(Picture(path, prompt, warmth, brightness))
    return made


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> list[Picture]:
    """240 pairs; pictures 2k and 2k + 1 belong together."""
    return draw(tmp_path_factory.mktemp("world"), 240)


Writer = Callable[[Sequence[Mapping[str, Any]]], Path]


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    """Write rows as JSON lines; returns the file."""

    def written(rows: Sequence[Mapping[str, Any]], name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return written


def pair_rows(world: Sequence[Picture], taste: Callable[[Picture], float]) -> list[dict[str, Any]]:
    """A comparison of every pair of the world by one taste."""
    rows = []
    for a, b in zip(world[::2], world[1::2], strict=True):
        label = "a" if taste(a) > taste(b) else "b"
        files = {"image_a": str(a.path), "image_b": str(b.path)}
        rows.append({"prompt": a.prompt, **files, "label": label})
    return rows


@pytest.fixture
def pairs_file(world: list[Picture], write: Writer) -> Path:
    """Comparisons by someone who likes warm light."""
    return write(pair_rows(world, lambda p: p.warmth))


@pytest.fixture(scope="session")
def vlm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random LLaVA of transformers with a processor of whole words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    folder = tmp_path_factory.mktemp("vlm")
    words = ["<pad>", "<unk>", "<image>", "yes", "no", "a", "photo", "of", "red", "star", "?"]
    tokenizer = Tokenizer(WordLevel({w: k for k, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    vision = CLIPVisionConfig(**tower, num_attention_heads=2, image_size=SIDE, patch_size=16)
    text = LlamaConfig(
        **tower, num_attention_heads=2, num_key_value_heads=2, vocab_size=len(words),
        pad_token_id=0, max_position_embeddings=64,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=2, image_seq_length=4,
        vision_feature_layer=-1,
    )  # fmt: skip
    torch.manual_seed(3)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE)
    processor = LlavaProcessor(
        images, fast, patch_size=16, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip
    processor.save_pretrained(folder)
    return folder
