"""Aesthetic predictors: published head files, folding, one forward with other rewards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_heads import head_state
from torch import Tensor, nn

from mmalign.types import Media
from vision_rewards.aesthetic import (
    Aesthetic,
    AestheticV1,
    AestheticV2,
    AestheticV2Ava,
    AestheticV25,
    read_head,
)
from vision_rewards.clip_rewards import ClipScore
from vision_rewards.sharing import shared_forward

Pictures = Callable[..., Tensor]
V2, V2_5 = (768, 1024, 128, 64, 16, 1), (1152, 1024, 128, 64, 16, 1)


def published(kind: str, state: dict[str, Tensor]) -> nn.Sequential:
    """The published stack, dropout and all, in evaluation mode."""
    tensors = list(state.values())
    linears = []
    for weight, bias in zip(tensors[::2], tensors[1::2], strict=True):
        linear = nn.Linear(weight.shape[1], weight.shape[0])
        linear.load_state_dict({"weight": weight, "bias": bias})
        linears.append(linear)
    if kind == "v1":
        return nn.Sequential(*linears)
    a, b, c, d, e = linears
    r = nn.ReLU if kind == "relu" else nn.Identity
    drop = nn.Dropout
    return nn.Sequential(a, r(), drop(0.2), b, r(), drop(0.2), c, r(), drop(0.1), d, r(), e).eval()


@pytest.mark.parametrize(
    ("kind", "widths"), [("linear", V2), ("relu", V2), ("v2_5", V2_5), ("v1", (768,))]
)
def test_published_heads(kind: str, widths: tuple[int, ...]) -> None:
    state = head_state(kind, widths)
    if kind in ("linear", "relu"):
        assert sum(t.numel() for t in state.values()) == 927_969
    head = read_head(state, "a file").eval()
    torch.manual_seed(7)
    embedding = nn.functional.normalize(torch.randn(32, widths[0]), dim=-1)
    expected = published(kind, state)(embedding)
    assert head.relu == (kind == "relu")
    assert torch.allclose(head(embedding), expected, atol=1e-5)
    if head.relu:
        assert not torch.allclose(published("linear", state)(embedding), expected, atol=1e-3)
        with pytest.raises(ValueError, match="not affine"):
            head.folded()
    else:
        assert torch.allclose(head.folded()(embedding), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layers.4.bias"), "missing: layer 4: bias"),
        (lambda s: s.update({"layers.0.gamma": torch.ones(1)}), "unknown: layers.0.gamma"),
        (lambda s: s.update({"layers.9.weight": s.pop("layers.7.weight")}), "missing: layer 7"),
        (lambda s: s.update({"layers.7.weight": torch.ones(2, 16)}), "do not lead to one number"),
        (lambda s: [s.pop(f"layers.7.{n}") for n in ("weight", "bias")], r"layers at \(0, 2, 4, 6"),
    ],
)
def test_heads_that_are_none(change: Any, message: str) -> None:
    state = head_state("linear", V2)
    change(state)
    with pytest.raises(ValueError, match=message):
        read_head(state, "a file")


@pytest.fixture(scope="module")
def head_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``head_file(kind, dim)``: a head for small embeddings, saved as published."""
    folder = tmp_path_factory.mktemp("heads")

    def make(kind: str, dim: int = 24) -> Path:
        state = head_state(kind, (dim, 20, 12, 8, 4, 1))
        half = {k: v.half() for k, v in state.items()} if kind == "v2_5" else state
        torch.save(half, folder / f"{kind}.pth")
        return folder / f"{kind}.pth"

    return make


@pytest.mark.parametrize(
    ("reward", "kind"),
    [(AestheticV2, "linear"), (AestheticV2Ava, "relu"), (AestheticV1, "v1")],
)
def test_scores(
    reward: type[Aesthetic], kind: str, head_file: Any, clip_folder: Path, pictures: Pictures
) -> None:
    scorer, pixels = reward(head_file(kind), backbone=clip_folder), pictures()
    embedding = scorer.embedder.image(pixels)
    expected = published(kind, head_state(kind, (24, 20, 12, 8, 4, 1)))(embedding).squeeze(-1)
    got = scorer.score(Media(pixels), [""] * 3)
    assert got.valid.all() and torch.allclose(got.value, expected, atol=1e-4)
    alone = [scorer.score(Media(pixels[k : k + 1]), [""]).value for k in range(3)]
    assert torch.allclose(torch.cat(alone), got.value, atol=1e-5)
    half = reward(head_file(kind), backbone=clip_folder, dtype="bf16")
    assert 0 < (half.score(Media(pixels), [""] * 3).value - got.value).abs().max() < 0.05
    assert half.identity != scorer.identity


def test_siglip_head_in_half_precision(
    head_file: Any, siglip_folder: Path, pictures: Pictures
) -> None:
    scorer = AestheticV25(head_file("v2_5", 32), backbone=siglip_folder)
    assert scorer.embedder.preprocess.fingerprint.startswith("32squash-bicubic")
    got = scorer.score(Media(pictures()), [""] * 3)
    assert got.valid.all() and got.value.dtype == torch.float32 and got.value.std() > 0


@pytest.mark.parametrize(("reward", "kind"), [(AestheticV1, "v1"), (AestheticV2, "linear")])
def test_gradient_is_the_finite_difference(
    reward: type[Aesthetic], kind: str, head_file: Any, clip_folder: Path, pictures: Pictures
) -> None:
    scorer = reward(head_file(kind), backbone=clip_folder)
    pixels = (0.25 + 0.5 * pictures(1)).requires_grad_()
    (gradient,) = torch.autograd.grad(scorer.score(Media(pixels), [""]).value.sum(), pixels)
    direction, step = gradient / gradient.norm(), 0.02
    with torch.no_grad():
        up, down = (scorer.score(Media(pixels + s * direction), [""]) for s in (step, -step))
    slope = (up.value - down.value).item() / (2 * step)
    assert slope == pytest.approx((gradient * direction).sum().item(), rel=0.02)


def test_one_vision_forward_with_clip_score(
    head_file: Any, clip_folder: Path, pictures: Pictures
) -> None:
    aesthetic = AestheticV2(head_file("linear"), backbone=clip_folder)
    first, clip = AestheticV1(head_file("v1"), backbone=clip_folder), ClipScore(clip_folder)
    seen: list[int] = []
    hook = clip.embedder.image_tower.register_forward_hook(lambda *_: seen.append(1))
    media, prompts = Media(pictures()), ["a cat"] * 3
    apart = [r.score(media, prompts).value for r in (aesthetic, first, clip)]
    assert len(seen) == 3
    with shared_forward():
        together = [r.score(media, prompts).value for r in (aesthetic, first, clip)]
    hook.remove()
    assert len(seen) == 4
    assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))


@pytest.mark.parametrize("reward", [AestheticV1, AestheticV2, AestheticV2Ava, AestheticV25])
def test_without_a_head_the_error_says_where_it_is(reward: type[Aesthetic]) -> None:
    with pytest.raises(FileNotFoundError) as error:
        reward()
    said = str(error.value)
    assert reward.FILE in said and "https://github.com/" in said and reward.info.name in said


def test_a_head_for_another_backbone(
    head_file: Any, siglip_folder: Path, clip_folder: Path
) -> None:
    with pytest.raises(ValueError, match="takes embeddings of 24 numbers, the backbone gives 32"):
        AestheticV2(head_file("linear"), backbone=siglip_folder)


def test_published_width_of_clip_l() -> None:
    """The head's input is the width of CLIP-L's projection, by the names the loader expects."""
    from transformers import CLIPConfig, CLIPModel

    vision = {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "patch_size": 14,
    }  # fmt: skip
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(vision_config=vision, projection_dim=768))
    state = model.state_dict()
    assert state["visual_projection.weight"].shape == (768, 1024)
    tower = sum(v.numel() for k, v in state.items() if k.startswith("visi") or "visual" in k)
    assert tower == pytest.approx(304.0e6, rel=1e-3)
