"""Lines of pixels: what resizing by the shorter side would make of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmalign.types import Media
from vision_rewards import preprocess
from vision_rewards.factory import load_reward
from vision_rewards.ocr import recognise
from vision_rewards.preprocess import Preprocess


def waves(height: int, width: int) -> Tensor:
    """A smooth picture, so that a shift of a pixel is a small change."""
    rows, columns = torch.linspace(0, 1, height)[:, None], torch.arange(width)[None] - width / 2
    phase = columns / (6 * height) + rows
    return torch.stack([(phase + k).sin() for k in range(3)])[None] * 0.5 + 0.5


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("height", "width"), [(40, 2001), (40, 2000), (7, 600), (1, 300), (301, 9000)]
)
def test_a_long_picture_keeps_its_centre(
    height: int, width: int, turned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = waves(height, width)
    picture = picture.mT if turned else picture
    prepare = Preprocess(size=32)
    short = prepare.square(picture)
    monkeypatch.setattr(preprocess, "MAX_ASPECT", 10**9)
    torch.testing.assert_close(short, prepare.square(picture), atol=0.02, rtol=0)
    assert short.std() > 0.05


@pytest.mark.parametrize("size", [(1, 16), (3, 48), (64, 1024), (500, 333), (1, 1)])
def test_pictures_up_to_the_bound_are_bit_identical(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = torch.rand(2, 3, *size)
    prepare = Preprocess(size=32, resize=40)
    before = prepare(picture)
    monkeypatch.setattr(preprocess, "MAX_ASPECT", 10**9)
    assert prepare(picture).equal(before)


def test_a_line_of_pixels_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    made, resize = [], F.interpolate

    def seen(pixels: Tensor, size: tuple[int, int], **more: object) -> Tensor:
        made.append(size[0] * size[1])
        return resize(pixels, size, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(F, "interpolate", seen)
    for shape in ((1, 20_000), (20_000, 1)):
        leaf = torch.rand(1, 3, *shape, requires_grad=True)
        out = Preprocess(size=224)(leaf)
        assert out.shape == (1, 3, 224, 224) and out.isfinite().all()
        (gradient,) = torch.autograd.grad(out.sum(), leaf)
        assert gradient.isfinite().all() and gradient.abs().sum() > 0
    assert max(made) <= preprocess.MAX_ASPECT * 224**2


def test_the_verifier_does_not_score_what_it_cannot_see() -> None:
    for size in ((1, 20_000), (20_000, 1)):
        score = load_reward("shapes_strict").score(
            Media(torch.full((2, 3, *size), 0.5)), ["a photo of a red star"] * 2
        )
        assert not score.valid.any() and score.value.isnan().all()
        assert "too thin" in score.notes[1] and f"{size[1]} x {size[0]}" in score.notes[0]
    assert load_reward("shapes_strict").score(
        Media(torch.full((1, 3, 2, 3), 0.5)), ["a photo of a red star"]
    ).value.tolist() == [0.0]  # small is not thin: there is no star in it


def test_text_of_a_line_is_refused_before_it_is_padded() -> None:
    line = torch.zeros(1, 60_000, 3, dtype=torch.uint8).numpy()
    with pytest.raises(ValueError, match=r"60000 x 1 pixels are too thin"):
        recognise(line)
    pytest.importorskip("rapidocr")
    score = load_reward("ocr").score(Media(torch.zeros(1, 3, 1, 60_000)), ['a sign "A"'])
    assert not score.valid.any() and "too thin" in score.notes[0]
