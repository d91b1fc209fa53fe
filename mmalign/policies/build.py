"""Builds small stock ``StableDiffusion3Pipeline`` objects: the shapes generator and test models.

Everything is a stock diffusers / transformers class; only the sizes are ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from mmalign.shapes.grammar import COLORS, SHAPES

# Every word of the grammar, and nothing else, becomes one token; other text falls back to letters.
WORDS = (
    "a an photo of and to the left right above below two three four".split()
    + list(COLORS)
    + list(SHAPES)
    + ["crosses" if s == "cross" else s + "s" for s in SHAPES]
)
WORD_END = "</w>"  # how CLIP's byte-pair encoding marks a word's last piece
PROMPT_TOKENS = 16  # the longest caption of the grammar has 13 words, plus start and end


@dataclass(frozen=True, kw_only=True)
class SD3Size:
    """Sizes of a small SD3-class model."""

    width: int = 128
    layers: int = 6
    head_dim: int = 32
    text_width: int = 64
    text_layers: int = 3
    latent_size: int = 16
    latent_channels: int = 4
    patch: int = 2
    shift: float = 1.0
    shift_terminal: float | None = None


def build_tokenizer() -> Any:
    """A ``CLIPTokenizer`` whose words are the shapes grammar's; deterministic.

    Build it once and save it: the ids are part of a trained model.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    alphabet = sorted(ByteLevel.alphabet())
    characters = alphabet + [c + WORD_END for c in alphabet]
    merges = _merges(WORDS, alphabet)
    tokens = dict.fromkeys(characters + [a + b for a, b in merges])
    vocab = {token: i for i, token in enumerate((*tokens, "<|startoftext|>", "<|endoftext|>"))}
    return CLIPTokenizer(
        vocab=vocab, merges=merges, model_max_length=PROMPT_TOKENS, pad_token="<|endoftext|>"
    )


def _merges(words: Sequence[str], alphabet: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that make every word one token: most frequent first, ties by age.

    The ``tokenizers`` trainer breaks ties differently from run to run, which would give a resumed
    training other ids than the ones its embeddings were trained with.
    """
    ends = Counter(w[-1] + WORD_END for w in words)
    age = {c: i for i, c in enumerate([*alphabet, *sorted(ends, key=lambda e: (-ends[e], e))])}
    pieces = [[*w[:-1], w[-1] + WORD_END] for w in words]
    merges: list[tuple[str, str]] = []
    while counts := Counter(pair for piece in pieces for pair in pairwise(piece)):
        best = min(counts, key=lambda p: (-counts[p], age[p[0]], age[p[1]]))
        merges.append(best)
        age.setdefault("".join(best), len(age))
        pieces = [_merged(piece, best) for piece in pieces]
    return merges


def _merged(piece: Sequence[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for part in piece:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return out


def build_text_encoder(size: SD3Size, tokenizer: Any) -> Any:
    """A small random ``CLIPTextModelWithProjection``."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.text_width,
        intermediate_size=4 * size.text_width,
        projection_dim=size.text_width,
        num_hidden_layers=size.text_layers,
        num_attention_heads=max(1, size.text_width // 32),
        max_position_embeddings=PROMPT_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_act="gelu",
    )
    return CLIPTextModelWithProjection(config)


def build_transformer(size: SD3Size) -> Any:
    """A small random ``SD3Transformer2DModel`` with zero-initialised modulation and output."""
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=size.latent_size,
        patch_size=size.patch,
        in_channels=size.latent_channels,
        out_channels=size.latent_channels,
        num_layers=size.layers,
        attention_head_dim=size.head_dim,
        num_attention_heads=size.width // size.head_dim,
        joint_attention_dim=2 * size.text_width,
        caption_projection_dim=size.width,
        pooled_projection_dim=2 * size.text_width,
        pos_embed_max_size=size.latent_size // size.patch,
        qk_norm="rms_norm",
    )
    zero = [model.proj_out, model.norm_out.linear]
    for block in model.transformer_blocks:
        zero += [block.norm1.linear, block.norm1_context.linear]
    for layer in zero:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return model


def build_pipeline(size: SD3Size, vae: Any, seed: int = 0) -> Any:
    """Assemble a random stock ``StableDiffusion3Pipeline`` (no T5) around ``vae``."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer()
        return StableDiffusion3Pipeline(
            transformer=build_transformer(size),
            scheduler=FlowMatchEulerDiscreteScheduler(
                shift=size.shift, shift_terminal=size.shift_terminal
            ),
            vae=vae,
            text_encoder=build_text_encoder(size, tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=build_text_encoder(size, tokenizer),
            tokenizer_2=tokenizer,
            text_encoder_3=None,
            tokenizer_3=None,
        )


def tiny_pipeline(seed: int = 0, randomise: bool = True) -> Any:
    """A random SD3 pipeline of a few thousand parameters for tests: 32-pixel pictures.

    ``randomise`` also fills the zero-initialised layers, so that outputs depend on every input.
    """
    from diffusers import AutoencoderTiny

    size = SD3Size(width=32, layers=2, head_dim=16, text_width=32, text_layers=2, latent_size=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            num_encoder_blocks=(0, 1, 1),
            num_decoder_blocks=(1, 1, 0),
            latent_channels=size.latent_channels,
        )
        pipeline = build_pipeline(size, vae, seed)
        if randomise:
            for parameter in pipeline.transformer.parameters():
                if not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.05)
    return pipeline
