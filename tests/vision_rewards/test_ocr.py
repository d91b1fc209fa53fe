"""Text rewards: the rule on strings, and the recogniser on text drawn into pictures."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from mmalign.registry import UnknownNameError
from mmalign.runtime.extras import MissingExtraError
from mmalign.types import Media
from vision_rewards import ocr
from vision_rewards.factory import load_reward
from vision_rewards.ocr import OcrReward, edit_distance, quoted_text, text_reward


def drawn(*lines: str) -> Image.Image:
    """Black text on white, 40 pixels high."""
    image = Image.new("RGB", (240, 60 * len(lines) + 20), "white")
    for i, line in enumerate(lines):
        font = ImageFont.load_default(40)
        ImageDraw.Draw(image).text((12, 60 * i + 10), line, fill="black", font=font)
    return image


def media(*images: Image.Image) -> Media:
    return Media.from_pil(images)


# --- the rule -----------------------------------------------------------------------------------


def reference_distance(a: str, b: str) -> int:
    """Levenshtein's recursion, word for word."""

    @cache
    def d(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(d(i - 1, j) + 1, d(i, j - 1) + 1, d(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    return d(len(a), len(b))


def test_edit_distance() -> None:
    assert edit_distance("kitten", "sitting") == 3
    rng = np.random.default_rng(0)
    for _ in range(100):
        a, b = ("".join(rng.choice(list("abc"), rng.integers(0, 8))) for _ in range(2))
        assert edit_distance(a, b) == reference_distance(a, b) == edit_distance(b, a)


@pytest.mark.parametrize(
    ("read", "target", "substring", "strict"),
    [
        ("Hello World", "hello world", 1.0, 1.0),
        ("he llo", "Hel lo", 1.0, 1.0),
        ("say hello again", "hello", 1.0, 1 - 8 / 13),
        ("hallo", "hello", 0.8, 0.8),
        ("", "hello", 0.0, 0.0),
        ("xyz", "ab", 0.0, 0.0),
        ("something else entirely", "stop", 0.0, 1 - 19 / 21),
        ("stp", "stop", 0.75, 0.75),
    ],
)
def test_rule(read: str, target: str, substring: float, strict: float) -> None:
    assert text_reward(read, target) == pytest.approx(substring)
    assert text_reward(read, target, "strict") == pytest.approx(strict)


def test_an_empty_target_has_no_rule() -> None:
    with pytest.raises(ValueError, match="is empty"):
        text_reward("anything", "  ")


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('a sign "OPEN" and "SHUT"', "OPEN"),
        ("a sign “OPEN” and more", "OPEN"),
        ('a sign “OPEN” or "SHUT"', "OPEN"),
        ("ein Schild „OFFEN“", "OFFEN"),
        ("une pancarte «OUVERT»", "OUVERT"),
        ("招牌「开门」", "开门"),
        ('an empty ""', ""),
        ("it's a dog's life", None),
        ('only one " quote', None),
    ],
)
def test_the_first_quoted_span(prompt: str, text: str | None) -> None:
    assert quoted_text(prompt) == text


# --- pictures -----------------------------------------------------------------------------------


def test_text_in_pictures_is_read() -> None:
    score = OcrReward().score(
        media(drawn("OPEN 24"), drawn("STOP")), ['a shop with "Open 24"', "a sign that says “STEP”"]
    )
    assert score.value.tolist() == pytest.approx([1.0, 0.75])
    assert score.parts["exact"].tolist() == [1.0, 0.0]
    assert "read 'STOP'" in score.notes[1] and score.valid.all()


def test_strict_charges_for_other_text() -> None:
    picture, prompts = media(drawn("SALE", "TODAY")), ['a poster "SALE"']
    loose = load_reward("ocr").score(picture, prompts)
    strict = load_reward("ocr_strict").score(picture, prompts)
    assert loose.value.item() == 1.0 and loose.parts["exact"].item() == 0.0
    assert strict.value.item() == pytest.approx(1 - 5 / 9)
    assert "strict" in strict.identity and strict.identity != loose.identity


def test_what_there_is_no_text_for_is_unscored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ocr, "_engine", None)  # nothing is recognised for nothing
    pictures = media(drawn("A"), drawn("B"), drawn("C"))
    score = OcrReward().score(pictures, ["a dog", 'an empty "" pair', 'a blank " "'])
    assert not score.valid.any() and torch.isnan(score.value).all()
    assert "no text in quotes" in score.notes[0] and "empty text" in score.notes[1]


def test_context_and_fallback_name_the_text() -> None:
    pictures = media(drawn("STOP"), drawn("STOP"))
    reward = OcrReward(fallback="prompt")
    score = reward.score(pictures, ["stop", 'a sign "GO"'], [{}, {"text": "Stop"}])
    assert score.value.tolist() == [1.0, 1.0]
    assert reward.identity != OcrReward().identity


def test_of_a_video_the_frames_are_averaged() -> None:
    frames = media(drawn("STOP"), drawn("")).data
    score = OcrReward().score(Media(frames[None]), ['a sign "STOP"'])
    assert score.value.tolist() == [0.5] and score.parts["exact"].tolist() == [0.5]


def test_a_single_pixel_shows_no_text() -> None:
    score = OcrReward().score(Media(torch.rand(1, 3, 1, 1)), ['a sign "STOP"'])
    assert score.value.tolist() == [0.0]


@pytest.mark.parametrize("shape", [(400, 3, 3), (3, 400, 3)])
def test_strips_are_padded(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int]) -> None:
    seen: list[np.ndarray] = []

    def engine(threads: int) -> Callable[[np.ndarray], SimpleNamespace]:
        return lambda picture: seen.append(picture) or SimpleNamespace(txts=("a", "b"))

    monkeypatch.setattr(ocr, "_engine", engine)
    strip = np.zeros(shape, np.uint8)
    strip[..., 0] = 200  # red, which the engine expects last
    assert ocr.recognise(strip) == "a b"
    assert sorted(seen[0].shape[:2]) == [100, 400] and (seen[0] == [0, 0, 200]).all()


def test_a_failure_on_one_picture_spares_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    original = ocr.recognise

    def fails_on_black(picture: np.ndarray) -> str:
        if not picture.any():
            raise RuntimeError("no ink")
        return original(picture)

    monkeypatch.setattr(ocr, "recognise", fails_on_black)
    pictures = media(drawn("STOP"), Image.new("RGB", drawn("STOP").size))
    score = OcrReward().score(pictures, ['a sign "STOP"'] * 2)
    assert score.valid.tolist() == [True, False] and "RuntimeError: no ink" in score.notes[1]


def test_compositions_read_a_picture_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(ocr, "recognise", lambda picture: calls.append(1) or "STOP")
    both = load_reward("ocr + ocr_strict")
    assert both.score(media(drawn("STOP")), ['a "STOP"']).value.item() == 2.0
    assert len(calls) in (1, 2)
    from vision_rewards.sharing import shared_forward

    calls.clear()
    with shared_forward():
        assert both.score(media(drawn("STOP")), ['a "STOP"']).value.item() == 2.0
    assert len(calls) == 1


def test_bad_options_and_a_missing_package_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'strict'"):
        OcrReward(mode="stict")  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="unknown fallback"):
        OcrReward(fallback="zero")  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mmalign\[ocr\]'"):
        OcrReward()
