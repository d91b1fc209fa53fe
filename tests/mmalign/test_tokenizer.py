"""The shapes tokenizer: one token a word, the same ids everywhere."""

from __future__ import annotations

import hashlib
import json
import random

import pytest

from mmalign.policies.build import PROMPT_TOKENS, WORDS, build_tokenizer
from mmalign.shapes import COLORS, SHAPES, TASKS, ObjectSpec, PromptSpec, caption, sample_spec
from mmalign.shapes.grammar import MAX_OBJECTS
from mmalign.shapes.splits import SPLITS


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def captions() -> list[str]:
    rng = random.Random(0)
    colors = (None, *COLORS)
    single = [
        ObjectSpec(s, c, n) for s in SHAPES for c in colors for n in range(1, MAX_OBJECTS + 1)
    ]
    pairs = [sample_spec(rng, split, task) for task in TASKS for split in SPLITS for _ in range(40)]
    return [caption(spec) for spec in (*(PromptSpec((o,)) for o in single), *pairs)]


def test_every_word_of_a_caption_is_one_token(tokenizer):
    texts = captions()
    for text, ids in zip(texts, tokenizer(texts).input_ids, strict=True):
        assert len(ids) == len(text.split()) + 2, text
        assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
        assert len(ids) <= PROMPT_TOKENS
    words = {w for text in texts for w in text.split()}
    assert words <= set(WORDS) and len(set(WORDS)) == len(WORDS)


def test_different_words_have_different_tokens(tokenizer):
    ids = [tokenizer(word).input_ids[1:-1] for word in WORDS]
    assert all(len(i) == 1 for i in ids) and len({i[0] for i in ids}) == len(WORDS)


def test_ids_are_deterministic(tokenizer):
    again = build_tokenizer()
    assert again.get_vocab() == tokenizer.get_vocab()
    digest = hashlib.sha256(json.dumps(again.get_vocab(), sort_keys=True).encode()).hexdigest()
    assert digest[:12] == "acce266edbbb"  # ids are part of every trained model
    assert again(captions()[:50]).input_ids == tokenizer(captions()[:50]).input_ids


def test_file_round_trip(tokenizer, tmp_path):
    from transformers import CLIPTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    texts = captions()[::7]
    assert loaded(texts).input_ids == tokenizer(texts).input_ids
    assert loaded.model_max_length == PROMPT_TOKENS
    padded = [t(texts, padding="max_length").input_ids for t in (loaded, tokenizer)]
    assert padded[0] == padded[1] and {len(row) for row in padded[0]} == {PROMPT_TOKENS}


def test_other_text_falls_back_to_letters(tokenizer):
    ids = tokenizer("zebra").input_ids
    assert len(ids) > 3 and tokenizer.decode(ids, skip_special_tokens=True).strip() == "zebra"
