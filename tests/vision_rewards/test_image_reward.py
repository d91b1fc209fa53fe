"""ImageReward: published names and shapes, the network against its parts, gradients, prompts."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_image_reward import SMALL, published_shapes, published_state, write_image_reward
from torch import Tensor

from mmalign.types import Media
from vision_rewards.blip import BlipSize, rename_vision
from vision_rewards.image_reward import (
    MEAN,
    STD,
    UNUSED,
    ImageReward,
    ImageRewardNetwork,
    rename,
)
from vision_rewards.sharing import shared_forward


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a small model and its tokenizer."""
    return write_image_reward(tmp_path_factory.mktemp("image-reward"))


@pytest.fixture(scope="module")
def reward(folder: Path) -> ImageReward:
    return ImageReward(folder, size=SMALL, tokenizer=folder)


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return torch.rand(3, 3, 40, 56, generator=torch.Generator().manual_seed(2))


PROMPTS = ["a photo of a red star", "circle", "the green circle on the left"]


def test_published_architecture_on_the_meta_device():
    """Every name and shape of the real file has its place, both ways, and nothing is left over."""
    with torch.device("meta"):
        network = ImageRewardNetwork(BlipSize())
    ours = {n: tuple(t.shape) for n, t in network.state_dict().items()}
    published = published_shapes(BlipSize())
    theirs = {rename(n): s for n, s in published.items() if not n.startswith(UNUSED)}
    assert theirs == ours
    count = sum(p.numel() for p in network.parameters())
    assert 440e6 < count < 455e6
    assert count / 1e6 == pytest.approx(ImageReward.info.parameters, abs=1)
    assert Counter(n.split(".")[1] for n in published)["visual_encoder"] == 4 + 24 * 12 + 2


def test_unknown_vision_names_stay_unknown():
    for name in ("blocks.0.norm3.weight", "head.weight", "blocks.x.norm1.weight", "fc_norm.bias"):
        assert rename_vision(name) is None
    assert rename_vision("blocks.11.attn.proj.bias") == (
        "encoder.layers.11.self_attn.projection.bias"
    )


def reference(state: dict[str, Tensor], pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The score from the file's tensors alone: ViT, BERT with cross-attention, head."""
    from torch.nn import functional as F

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name: str, x: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        heads = [x.unflatten(-1, (2, -1)).transpose(1, 2) for x in (q, k, v)]
        return F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2).flatten(2)

    eye = "blip.visual_encoder"
    proj = f"{eye}.patch_embed.proj"
    x = F.conv2d(pixels, state[f"{proj}.weight"], state[f"{proj}.bias"], stride=8)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([state[f"{eye}.cls_token"].expand(len(x), -1, -1), x], 1)
    x = x + state[f"{eye}.pos_embed"]
    for k in range(2):
        block = f"{eye}.blocks.{k}"
        q, key, v = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(f"{block}.attn.proj", attend(q, key, v))
        inner = F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6)))
        x = x + linear(f"{block}.mlp.fc2", inner)
    picture = norm(f"{eye}.norm", x, 1e-6)
    bert = "blip.text_encoder"
    words = state[f"{bert}.embeddings.word_embeddings.weight"][ids]
    places = state[f"{bert}.embeddings.position_embeddings.weight"][: ids.shape[1]]
    h = norm(f"{bert}.embeddings.LayerNorm", words + places, 1e-12)
    for k in range(2):
        layer = f"{bert}.encoder.layer.{k}"
        for kind, seen in (("attention", None), ("crossattention", picture)):
            a = f"{layer}.{kind}"
            source = h if seen is None else seen
            q, key, v = (
                linear(f"{a}.self.{n}", s)
                for n, s in (("query", h), ("key", source), ("value", source))
            )
            seen_words = mask.bool()[:, None, None] if seen is None else None
            out = linear(f"{a}.output.dense", attend(q, key, v, seen_words))
            h = norm(f"{a}.output.LayerNorm", out + h, 1e-12)
        inner = linear(f"{layer}.output.dense", F.gelu(linear(f"{layer}.intermediate.dense", h)))
        h = norm(f"{layer}.output.LayerNorm", inner + h, 1e-12)
    score = h[:, 0]
    for index in (0, 2, 4, 6, 7):
        score = linear(f"mlp.layers.{index}", score)
    return (score[:, 0] - MEAN) / STD


def test_scores_equal_the_network_written_out(reward: ImageReward, pictures: Tensor):
    state = published_state(BlipSize(**SMALL))
    words = reward.tokenizer(PROMPTS, padding="max_length", max_length=35, return_tensors="pt")
    pixels = reward.preprocess(pictures)
    expected = reference(state, pixels, words["input_ids"], words["attention_mask"])
    got = reward.score(Media(pictures), PROMPTS)
    assert got.value.std() > 1e-4  # the pictures and prompts make a difference
    torch.testing.assert_close(got.value, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.parts["raw"], expected * STD + MEAN, rtol=1e-4, atol=1e-5)


def test_every_input_matters(reward: ImageReward, pictures: Tensor):
    base = reward.score(Media(pictures), PROMPTS).value
    assert not torch.allclose(base, reward.score(Media(pictures), PROMPTS[::-1]).value)
    assert not torch.allclose(base, reward.score(Media(pictures.flip(0)), PROMPTS).value)


def test_preprocessing_agrees_with_the_published_one(reward: ImageReward):
    """Resize, crop and normalise of torchvision on 8-bit PIL images, to 1.5 grey levels; 0.6 on
    average at edges so hard that PIL clips between its two passes."""
    from torchvision import transforms

    pre = reward.preprocess
    stock = transforms.Compose([
        transforms.Resize(32, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(32),
        transforms.ToTensor(), transforms.Normalize(pre.mean, pre.std),
    ])  # fmt: skip
    rng = np.random.default_rng(0)
    for height, width in ((64, 64), (48, 90), (31, 20)):
        for low, high in ((64, 192), (0, 256)):
            coarse = rng.integers(low, high, (height // 4 + 1, width // 4 + 1, 3))
            fine = np.kron(coarse, np.ones((4, 4, 1)))[:height, :width]
            picture = Image.fromarray(fine.astype(np.uint8))
            ours = pre(Media.from_pil([picture]).data)[0]
            apart = (ours - stock(picture)).abs() * max(pre.std) * 255
            assert apart.mean() < 0.6 and (low == 0 or apart.max() < 1.5), (height, width)


def test_batch_equals_one_by_one(reward: ImageReward, pictures: Tensor):
    together = reward.score(Media(pictures), PROMPTS).value
    alone = [reward.score(Media(pictures[k : k + 1]), [PROMPTS[k]]).value for k in range(3)]
    torch.testing.assert_close(torch.cat(alone), together, rtol=1e-5, atol=1e-5)


def test_long_prompts_are_cut_with_a_note(reward: ImageReward, pictures: Tensor):
    long = "star " * 50
    got = reward.score(Media(pictures), ["star", long, "星 " * 3])
    assert got.notes == ("", "prompt cut at 35 of 52 word pieces", "")
    assert got.valid.all()
    cut = reward.score(Media(pictures), ["star", "star " * 33, "星 " * 3])
    assert cut.value.equal(got.value) and not cut.notes


def test_gradient_reaches_the_pixels(reward: ImageReward):
    picture = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(3)) * 0.8 + 0.1
    picture.requires_grad_()
    value = reward.score(Media(picture), PROMPTS[:1]).value.sum()
    (gradient,) = torch.autograd.grad(value, picture)
    direction = gradient / gradient.norm()
    step = 0.05
    with torch.no_grad():
        ends = [
            reward.score(Media(picture + s * step * direction), PROMPTS[:1]).value.item()
            for s in (1, -1)
        ]
    slope = (ends[0] - ends[1]) / (2 * step)
    assert slope == pytest.approx(float(gradient.norm()), rel=0.05)
    assert not any(p.requires_grad for p in reward.network.parameters())


def test_pictures_are_encoded_once_inside_shared_forward(reward: ImageReward, pictures: Tensor):
    calls = []
    tower = reward.network.blip.visual_encoder
    hook = tower.register_forward_hook(lambda *_: calls.append(1))
    try:
        with shared_forward():
            first = reward.score(Media(pictures), PROMPTS).value
            second = reward.score(Media(pictures), PROMPTS[::-1]).value
    finally:
        hook.remove()
    assert len(calls) == 1 and not first.equal(second)


def test_half_precision_stays_close(folder: Path, reward: ImageReward, pictures: Tensor):
    half = ImageReward(folder, size=SMALL, tokenizer=folder, dtype="bf16")
    assert half.identity != reward.identity
    assert next(half.network.mlp.parameters()).dtype == torch.float32
    exact = reward.score(Media(pictures), PROMPTS).value
    assert (half.score(Media(pictures), PROMPTS).value - exact).abs().max() < 0.05


def test_weights_that_do_not_fit_are_named(tmp_path: Path, folder: Path):
    good = published_state(BlipSize(**SMALL))
    faults = {
        "missing": ("mlp.layers.7.bias", None),
        "unknown": ("blip.visual_encoder.blocks.0.norm9.weight", torch.zeros(2)),
        "wrong shape": ("mlp.layers.0.weight", torch.zeros(2, 2)),
    }
    for kind, (name, tensor) in faults.items():
        state = {n: t for n, t in good.items() if n != name}
        if tensor is not None:
            state[name] = tensor
        torch.save(state, tmp_path / "bad.pt")
        with pytest.raises(ValueError, match=f"{kind}: .*{re.escape(name)}"):
            ImageReward(tmp_path / "bad.pt", size=SMALL, tokenizer=folder)
    with pytest.raises(ValueError, match="wrong shape"):  # another size than the file's
        ImageReward(folder, tokenizer=folder, size={**SMALL, "text_mlp": 48})


def test_missing_checkpoints_are_os_errors(tmp_path: Path, folder: Path):
    for checkpoint in (None, "THUDM/ImageReward", tmp_path, tmp_path / "none.pt"):
        with pytest.raises(OSError):
            ImageReward(checkpoint, size=SMALL, tokenizer=folder)


def test_identity_follows_the_weights(tmp_path: Path, folder: Path, reward: ImageReward):
    torch.save(published_state(BlipSize(**SMALL), seed=1), tmp_path / "other.pt")
    other = ImageReward(tmp_path / "other.pt", size=SMALL, tokenizer=folder)
    again = ImageReward(folder, size=SMALL, tokenizer=folder)
    assert other.identity != reward.identity == again.identity
