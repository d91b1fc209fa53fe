"""Builds the shapes world's VLM: a stock ``InternVLForConditionalGeneration``, small, random.

InternVL's pixel shuffle hands the decoder a quarter of the vision tower's tokens: 64 patches of a
64-pixel picture become 16 tokens, so that questions, not pictures, are what a training step costs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmalign.runtime.files import atomic_write_json

SPECIAL = (
    "<pad>", "<s>", "</s>", "<unk>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>",
    "<|system|>", "<|user|>", "<|assistant|>",
)  # fmt: skip
IMAGE_TOKEN = "<IMG_CONTEXT>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
# All pictures come first, whatever the order of a message's parts, then the texts: what the model
# saw in training. Every assistant turn ends with </s>.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for m in messages if m.content is not string %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<IMG_CONTEXT>{% endif %}"
    "{% endfor %}{% endfor %}"
    "{% for m in messages %}"
    "{{ '<|' + m.role + '|>' }}"
    "{% if m.content is string %}{{ m.content | trim }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text | trim }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class VLMSize:
    """Sizes of a small InternVL-class model."""

    image_size: int = 64
    patch: int = 8
    vision_width: int = 128
    vision_layers: int = 4
    vision_ffn: int = 384
    width: int = 160
    layers: int = 5
    ffn: int = 448
    head_dim: int = 32

    @property
    def image_tokens(self) -> int:
        """Tokens that one picture takes in the decoder."""
        return (self.image_size // self.patch // 2) ** 2


def build_tokenizer(texts: Iterable[str], phrases: Iterable[str] = ()) -> Any:
    """A tokenizer in which every word of ``texts`` is one token; other text falls back to bytes.

    Each of ``phrases`` is one token as well: a judge's instructions are the same every time, and a
    small model should not spend its minutes on reading them word by word.

    Words are kept as byte-level pieces with their leading space, so decoding gives back the very
    text, quotes and braces of JSON included. Build it once and save it: ids belong to a model.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = {"".join(w for w, _ in whole.pre_tokenize_str(p)): None for p in phrases}
    for text in texts:
        words.update(dict.fromkeys(w for w, _ in pieces.pre_tokenize_str(text)))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    rest = sorted(w for w in words if len(w) > 1)
    # The best segmentation is the one with the fewest pieces, single bytes a little dearer.
    vocab = (
        [(s, 0.0) for s in SPECIAL] + [(a, -12.0) for a in alphabet] + [(w, -10.0) for w in rest]
    )
    core = Tokenizer(models.Unigram(vocab, unk_id=SPECIAL.index("<unk>"), byte_fallback=False))
    core.pre_tokenizer = whole
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>", additional_special_tokens=list(SPECIAL[4:]), padding_side="left",
        model_max_length=2048, clean_up_tokenization_spaces=False,
        extra_special_tokens={
            "start_image_token": "<img>", "end_image_token": "</img>",
            "context_image_token": IMAGE_TOKEN, "video_token": "<video>",
        },
    )  # fmt: skip
    return tokenizer


def build_processor(tokenizer: Any, size: VLMSize) -> Any:
    """The stock processor: squash to the square, centre at 0, one tile however large a picture."""
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    side = {"height": size.image_size, "width": size.image_size}
    norm = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(
            size=side, crop_to_patches=False, min_patches=1, max_patches=1, **norm
        ),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=side, **norm),
        image_seq_length=size.image_tokens,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(size: VLMSize, tokenizer: Any, seed: int = 0) -> Any:
    """A random ``InternVLForConditionalGeneration`` with a Qwen3 decoder."""
    from transformers import (
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLVisionConfig,
        Qwen3Config,
    )

    vision = InternVLVisionConfig(
        image_size=size.image_size, patch_size=size.patch, hidden_size=size.vision_width,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=size.vision_width // size.head_dim,
        intermediate_size=size.vision_ffn, attention_bias=True, layer_scale_init_value=1.0,
    )  # fmt: skip
    heads = size.width // size.head_dim
    text = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=size.width, intermediate_size=size.ffn,
        num_hidden_layers=size.layers, num_attention_heads=heads, num_key_value_heads=heads,
        head_dim=size.head_dim, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    config = InternVLConfig(
        vision_config=vision, text_config=text, image_seq_length=size.image_tokens,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return InternVLForConditionalGeneration(config)


def export(model: Any, processor: Any, folder: Path) -> Path:
    """Write the finished model as it is shipped: fp16 on disk, fp32 when loaded."""
    model.generation_config.update(
        do_sample=False, eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
    )  # fmt: skip
    model.to(dtype=torch.float16).save_pretrained(folder)
    processor.save_pretrained(folder)
    path = folder / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    for part in (settings, settings["text_config"], settings["vision_config"]):
        # Half precision is for the size of the files; a CPU is slow and coarse at it.
        part["dtype"] = "float32"
        part.pop("_name_or_path", None)
    atomic_write_json(path, settings)
    return folder
