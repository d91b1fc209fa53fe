"""Tests download nothing: a checkpoint that is not already here is a skip, not a wait."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_server import serving
from reward_builds import Subject, Workshop
from scripted_judge import answer
from tiny_vlm import write_vlm
from torch import Tensor

SIDE, PATCH, WIDTH = 32, 8, 32
TOWER = {
    "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
VISION = {**TOWER, "image_size": SIDE, "patch_size": PATCH}


def write_clip_tokenizer(folder: Path) -> None:
    """CLIP's own byte-pair vocabulary (open_clip ships it) as a transformers tokenizer."""
    from open_clip import SimpleTokenizer
    from transformers import CLIPTokenizer

    source = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(k, k): v for k, v in source.encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    merges = [" ".join(pair) for pair in sorted(source.bpe_ranks, key=source.bpe_ranks.get)]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    CLIPTokenizer.from_pretrained(str(folder)).save_pretrained(folder)


def write_word_tokenizer(folder: Path) -> None:
    """A tokenizer of single words, for models whose published vocabulary is not at hand."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", *"a red blue cat dog on the moon".split()]
    tokenizer = Tokenizer(WordLevel({w: k for k, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    fast.save_pretrained(folder)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random CLIP of transformers with the real vocabulary."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    text = {**TOWER, "bos_token_id": 49406, "eos_token_id": 49407}
    config = CLIPConfig(text_config=text, vision_config=VISION, projection_dim=24)
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE).save_pretrained(folder)
    write_clip_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def siglip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random SigLIP of transformers."""
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    folder = tmp_path_factory.mktemp("siglip")
    torch.manual_seed(1)
    text = {**TOWER, "vocab_size": 16, "max_position_embeddings": 12}
    SiglipModel(SiglipConfig(text_config=text, vision_config=VISION)).save_pretrained(folder)
    SiglipImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    write_word_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def open_clip_config() -> dict[str, Any]:
    """The architecture of a small CLIP as open_clip writes it."""
    vision = {
        "image_size": SIDE,
        "patch_size": PATCH,
        "width": WIDTH,
        "layers": 2,
        "head_width": 16,
    }
    text = {"context_length": 77, "vocab_size": 49408, "width": WIDTH, "heads": 2, "layers": 2}
    return {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}


@pytest.fixture(scope="session")
def open_clip_state(open_clip_config: dict[str, Any]) -> dict[str, Tensor]:
    """Random weights of that architecture."""
    import open_clip

    torch.manual_seed(2)
    return open_clip.CLIP(**open_clip_config).state_dict()


@pytest.fixture(scope="session")
def open_clip_folder(
    tmp_path_factory: pytest.TempPathFactory,
    open_clip_config: dict[str, Any],
    open_clip_state: dict[str, Tensor],
) -> Path:
    """That model in a folder, the way open_clip publishes models."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("open_clip")
    preprocess = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "resize_mode": "squash"}
    config = {"model_cfg": open_clip_config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(open_clip_state, folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="session")
def pictures() -> Callable[..., Tensor]:
    """``pictures(count, height, width)``: 8-bit pictures with smooth and sharp parts."""

    def make(count: int = 3, height: int = 40, width: int = 56) -> Tensor:
        generator = torch.Generator().manual_seed(count * 7919 + height * 31 + width)
        coarse = torch.rand((count, 3, 5, 7), generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
        blocks = torch.nn.functional.interpolate(coarse.flip(1), (height, width), mode="nearest")
        noise = torch.rand((count, 3, height, width), generator=generator)
        mixed = 0.5 * smooth + 0.3 * blocks + 0.2 * noise
        return (mixed * 255).round() / 255

    return make


# --- every registered reward, for the contract suite ---------------------------------------------


@pytest.fixture(scope="session")
def workshop(
    tmp_path_factory: pytest.TempPathFactory,
    clip_folder: Path,
    siglip_folder: Path,
    open_clip_folder: Path,
    open_clip_config: dict[str, Any],
) -> Iterator[Workshop]:
    """Builds registered rewards without the hub."""
    known = {"clip": clip_folder, "siglip": siglip_folder, "open_clip": open_clip_folder}
    known["vlm"] = write_vlm(tmp_path_factory.mktemp("vlm"))

    def folder(name: str) -> Path:
        return known.get(name) or tmp_path_factory.mktemp(name)

    with serving() as chat:
        chat.respond = answer
        yield Workshop(folder, chat.url, open_clip_config)


@pytest.fixture
def subject(
    request: pytest.FixtureRequest, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> Subject:
    """A registered reward with inputs; parametrised indirectly by its name."""
    # Recognition takes longer than all else: each picture is read once, for both text rewards.
    monkeypatch.setattr("vision_rewards.ocr.recognise", workshop.recognise)
    return workshop.subject(request.param)
