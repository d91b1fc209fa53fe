"""HPSv3 at a size for tests: Qwen2-VL's classes under the names of the published file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from vision_rewards.hpsv3 import Hpsv3Network

SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
WORDS = "system user assistant rate this picture for a photo of red green star circle two".split()
TEMPLATE = "rate this picture for {text_prompt} <|Reward|> END"
SIDE = 56  # 4 x 4 patches, 2 x 2 tokens


def config() -> object:
    """Qwen2-VL's classes, tiny; one row of the vocabulary more than the tokenizer's own words."""
    from transformers import Qwen2VLConfig

    text = {
        "vocab_size": len(SPECIAL) + len(WORDS) + 1, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2}
    ids = {name: 1 + SPECIAL.index(token) for name, token in (
        ("vision_start_token_id", "<|vision_start|>"), ("vision_end_token_id", "<|vision_end|>"),
        ("image_token_id", "<|image_pad|>"), ("video_token_id", "<|video_pad|>"),
    )}  # fmt: skip
    return Qwen2VLConfig(text_config=text, vision_config=vision, **ids)


def write_body(folder: Path) -> Path:
    """Configuration and tokenizer of the tiny Qwen2-VL in ``folder``."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {w: k for k, w in enumerate(["<unk>", *SPECIAL, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<|endoftext|>"
    )
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    tokenizer.save_pretrained(folder)
    made = config()
    made.text_config.vocab_size = 3  # the checkpoint knows better: it was resized
    made.save_pretrained(folder)
    return folder


def published_state(layout: str = "old", seed: int = 0) -> dict[str, Tensor]:
    """Random weights under the names of the published file, of one of its two layouts."""
    made = config()
    made.text_config.vocab_size += 1  # the reward token
    torch.manual_seed(seed)
    network = Hpsv3Network(made)
    for name, weight in network.named_parameters():
        weight.data = torch.randn_like(weight) * 0.2 + float("norm" in name and "weight" in name)
    state = {n: t.detach().clone() for n, t in network.state_dict().items()}
    if layout == "old":
        state = {
            n.replace("model.visual.", "visual.").replace("model.language_model.", "model."): t
            for n, t in state.items()
        }
    words = "model.embed_tokens.weight" if layout == "old" else (
        "model.language_model.embed_tokens.weight"
    )  # fmt: skip
    return state | {"lm_head.weight": state[words].clone()}
