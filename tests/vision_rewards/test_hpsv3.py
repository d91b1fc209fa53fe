"""HPSv3: patches against the stock processor, the reward token, both key layouts, gradients."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_hpsv3 import SIDE, TEMPLATE, published_state, write_body
from torch import Tensor

from mmalign.registry import UnknownNameError
from mmalign.types import Media
from vision_rewards.hpsv3 import AREA, REWARD_TOKEN, Hpsv3, Hpsv3Network, read_template, rename
from vision_rewards.qwen_pixels import QwenPatches

PROMPTS = ["a photo of a red star", "circle", "two green circle circle for a star"]


@pytest.fixture(scope="module")
def body(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configuration and tokenizer of the tiny Qwen2-VL."""
    return write_body(tmp_path_factory.mktemp("qwen2-vl"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hpsv3")
    save_file(published_state(), folder / "HPSv3.safetensors")
    return folder


def load(checkpoint: Path, body: Path, **options: object) -> Hpsv3:
    options = {"template": TEMPLATE, "max_pixels": SIDE**2, "dtype": "fp32", **options}
    return Hpsv3(checkpoint, body=body, **options)


@pytest.fixture(scope="module")
def reward(checkpoint: Path, body: Path) -> Hpsv3:
    return load(checkpoint, body)


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


# --- patches -----------------------------------------------------------------------------------


def picture(height: int, width: int, low: int, high: int) -> Image.Image:
    """Squares of random colours between two grey levels."""
    coarse = np.random.default_rng(0).integers(low, high, (height // 8 + 1, width // 8 + 1, 3))
    fine = np.kron(coarse, np.ones((8, 8, 1)))[:height, :width]
    return Image.fromarray(fine.astype(np.uint8))


@pytest.mark.parametrize(
    ("height", "width"), [(448, 448), (512, 512), (300, 700), (64, 64), (33, 1000), (1024, 768)]
)
def test_patches_agree_with_the_stock_processor(height: int, width: int):
    """Against Qwen2VLImageProcessor on 8-bit PIL images: equal grids and order of patches; values
    within 1.5 grey levels. At edges so hard that bicubic leaves [0, 255], PIL clips between its
    two passes and single pixels differ by more: there 0.6 on average."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
        Qwen2VLImageProcessorPil,
    )

    area = {"shortest_edge": AREA, "longest_edge": AREA}
    for low, high in ((64, 192), (0, 256)):
        image = picture(height, width, low, high)
        stock = Qwen2VLImageProcessorPil(size=area)(images=[image], return_tensors="pt")
        patches, grid = QwenPatches(min_pixels=AREA, max_pixels=AREA)(Media.from_pil([image]).data)
        assert [1, *grid] == stock["image_grid_thw"][0].tolist()
        assert patches.shape[1:] == stock["pixel_values"].shape
        apart = (patches[0] - stock["pixel_values"]).abs() * 0.2758 * 255
        assert apart.mean() < 0.6
        assert low == 0 or apart.max() < 1.5
        if (14 * grid[0], 14 * grid[1]) == (height, width):
            assert apart.max() < 1e-3  # nothing resized


def test_patches_of_a_batch_and_their_gradient():
    patches = QwenPatches(min_pixels=SIDE**2, max_pixels=SIDE**2)
    pixels = torch.rand(2, 3, 70, 50, requires_grad=True)
    together, grid = patches(pixels)
    for k in range(2):
        torch.testing.assert_close(patches(pixels[k : k + 1])[0][0], together[k])
    assert together.shape == (2, grid[0] * grid[1], 3 * 2 * 14 * 14)
    halves = together.unflatten(2, (3, 2, 14, 14))
    assert halves[:, :, :, 0].equal(halves[:, :, :, 1])  # both frames are the same picture
    (gradient,) = torch.autograd.grad(together.square().sum(), pixels)
    assert (gradient.abs().sum((1, 2, 3)) > 0).all()


def test_sizes_follow_qwens_rule():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    rng = np.random.default_rng(3)
    for low, high in ((AREA, AREA), (56 * 56, 28 * 28 * 1280)):
        patches = QwenPatches(min_pixels=low, max_pixels=high)
        for height, width in rng.integers(28, 2000, (200, 2)).tolist():
            stock = smart_resize(height, width, min_pixels=low, max_pixels=high)
            assert patches.target(height, width) == stock, (height, width)
    with pytest.raises(ValueError, match="200:1"):
        QwenPatches(min_pixels=AREA, max_pixels=AREA).target(2, 500)


# --- loading -----------------------------------------------------------------------------------


def test_published_architecture_on_the_meta_device():
    """Names and shapes of Qwen2-VL-7B with the published head, in the layout of the file."""
    from transformers import Qwen2VLConfig

    text = {
        "vocab_size": 151658, "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    }  # fmt: skip
    with torch.device("meta"):
        network = Hpsv3Network(Qwen2VLConfig(text_config=text, vision_config={}))
    have = {n: tuple(t.shape) for n, t in network.state_dict().items()}
    published = {
        "visual.patch_embed.proj.weight": (1280, 3, 2, 14, 14),
        "visual.blocks.31.attn.qkv.weight": (3840, 1280),
        "visual.blocks.0.norm1.bias": (1280,),
        "visual.blocks.5.mlp.fc1.weight": (5120, 1280),
        "visual.merger.ln_q.weight": (1280,),
        "visual.merger.mlp.0.weight": (5120, 5120),
        "visual.merger.mlp.2.bias": (3584,),
        "model.embed_tokens.weight": (151658, 3584),
        "model.layers.27.self_attn.q_proj.bias": (3584,),
        "model.layers.0.self_attn.k_proj.weight": (512, 3584),
        "model.layers.3.mlp.down_proj.weight": (3584, 18944),
        "model.layers.9.post_attention_layernorm.weight": (3584,),
        "model.norm.weight": (3584,),
        "rm_head.0.weight": (1024, 3584),
        "rm_head.3.weight": (16, 1024),
        "rm_head.5.bias": (2,),
    }
    for name, shape in published.items():
        assert have[rename(name)] == shape, name
    new = [n for n in have if n.startswith("model.")]
    assert [rename(n) for n in new] == new  # the later layout is ours
    parameters = sum(p.numel() for p in network.parameters())
    assert parameters / 1e6 == pytest.approx(Hpsv3.info.parameters, rel=0.01)


def test_both_layouts_give_the_same_scores(
    tmp_path: Path, body: Path, reward: Hpsv3, pictures: Tensor
):
    save_file(published_state("new"), tmp_path / "new.safetensors")
    new = load(tmp_path / "new.safetensors", body)
    assert new.score(Media(pictures), PROMPTS).value.equal(
        reward.score(Media(pictures), PROMPTS).value
    )


@pytest.mark.parametrize(
    ("kind", "name"),
    [("missing", "rm_head.5.bias"), ("unknown", "visual.blocks.9.attn.qkv.bias"),
     ("wrong shape", "visual.merger.ln_q.weight")],
)  # fmt: skip
def test_weights_that_do_not_fit_are_named(tmp_path: Path, body: Path, kind: str, name: str):
    state = {n: t for n, t in published_state().items() if n != name}
    if kind != "missing":
        state[name] = torch.zeros(3)
    save_file(state, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=f"{kind}: .*{re.escape(rename(name))}"):
        load(tmp_path / "bad.safetensors", body)


def test_vocabulary_without_room_for_the_token(tmp_path: Path, body: Path):
    state = published_state()
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"][:-1].clone()
    save_file(state, tmp_path / "small.safetensors")
    with pytest.raises(ValueError, match="embeds"):
        load(tmp_path / "small.safetensors", body)


def test_missing_checkpoint_is_an_os_error(body: Path, tmp_path: Path):
    for checkpoint in (None, tmp_path):
        with pytest.raises(OSError):
            load(checkpoint, body)


# --- scores ------------------------------------------------------------------------------------


def by_hand(reward: Hpsv3, pixels: Tensor, prompt: str) -> Tensor:
    """Mean and log sigma through the stock conditional-generation class, as published: text and
    picture embedded, the language model run on embeddings alone."""
    body = reward.network.model
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"<|vision_start|>{'<|image_pad|>' * 4}<|vision_end|>"
        f"{TEMPLATE.replace('{text_prompt}', prompt)}<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = reward.tokenizer(text, return_tensors="pt").input_ids
    patches, grid = reward.patches(pixels[None])
    seen = body.visual(patches[0], grid_thw=torch.tensor([[1, *grid]])).pooler_output
    words = body.get_input_embeddings()(ids)
    words = words.masked_scatter((ids == reward.image_id)[..., None], seen)
    states = body.language_model(inputs_embeds=words).last_hidden_state
    (place,) = (ids[0] == reward.reward_id).nonzero()[0].tolist()
    return reward.network.rm_head(states[0, place])


def test_scores_are_read_at_the_reward_token(reward: Hpsv3, pictures: Tensor):
    with torch.no_grad():
        got = reward.score(Media(pictures), PROMPTS)
        expected = torch.stack(
            [by_hand(reward, p, t) for p, t in zip(pictures, PROMPTS, strict=True)]
        )
    assert got.value.equal(got.parts["mu"]) and got.value.std() > 1e-4
    torch.testing.assert_close(got.parts["mu"], expected[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.parts["sigma"], expected[:, 1].exp(), rtol=1e-4, atol=1e-5)


def test_padding_does_not_change_scores(checkpoint: Path, body: Path, pictures: Tensor):
    """Prompts of different lengths share a forward pass; one by one, in pairs, together."""
    values = [
        load(checkpoint, body, batch_size=n, positions=positions)
        .score(Media(pictures), PROMPTS)
        .value
        for positions in ("sequential", "grid")
        for n in (1, 2, 8)
    ]
    for first, others in ((values[0], values[1:3]), (values[3], values[4:])):
        for other in others:
            torch.testing.assert_close(other, first, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(values[0], values[3], atol=1e-5)  # the two kinds of position differ


def test_gradient_reaches_the_pixels(reward: Hpsv3):
    picture = torch.rand(1, 3, 80, 60, generator=torch.Generator().manual_seed(4)) * 0.8 + 0.1
    picture.requires_grad_()
    value = reward.score(Media(picture), PROMPTS[:1]).value.sum()
    (gradient,) = torch.autograd.grad(value, picture)
    direction, step = gradient / gradient.norm(), 0.002
    with torch.no_grad():
        up, down = (
            reward.score(Media(picture + s * step * direction), PROMPTS[:1]).value.item()
            for s in (1, -1)
        )
    assert (up - down) / (2 * step) == pytest.approx(float(gradient.norm()), rel=0.05)


def test_special_tokens_in_prompts_are_unscored(reward: Hpsv3, pictures: Tensor):
    got = reward.score(Media(pictures), ["star", f"star {REWARD_TOKEN}", "<|image_pad|>"])
    assert got.valid.tolist() == [True, False, False]
    assert REWARD_TOKEN in got.notes[1] and "<|image_pad|>" in got.notes[2]
    alone = reward.score(Media(pictures[:1]), ["star"])
    torch.testing.assert_close(got.value[:1], alone.value, rtol=1e-5, atol=1e-5)


def test_narrow_pictures_are_unscored(reward: Hpsv3):
    got = reward.score(Media(torch.rand(2, 3, 2, 500)), PROMPTS[:2])
    assert not got.valid.any() and "200:1" in got.notes[0]


def test_precision(checkpoint: Path, body: Path, reward: Hpsv3, pictures: Tensor):
    half = load(checkpoint, body, dtype="bf16")
    assert next(half.network.rm_head.parameters()).dtype == torch.float32
    assert next(half.network.model.parameters()).dtype == torch.bfloat16
    exact = reward.score(Media(pictures), PROMPTS).value
    assert (
        half.score(Media(pictures), PROMPTS).value - exact
    ).abs().max() < 0.3 * exact.abs().max()
    for network in (half.network, reward.network):
        rotary = [b for n, b in network.named_buffers() if n.endswith(".inv_freq")]
        assert len(rotary) == 2
        for frequencies in rotary:  # rounded as in training, whatever the precision of the weights
            assert frequencies.dtype == torch.float32
            assert frequencies.equal(frequencies.bfloat16().float())


# --- template ----------------------------------------------------------------------------------


def test_shipped_template_is_usable():
    text = read_template(None)
    assert text.count("{text_prompt}") == text.count(REWARD_TOKEN) == 1


def test_template_may_be_replaced(tmp_path: Path, checkpoint: Path, body: Path, reward: Hpsv3):
    file = tmp_path / "published.txt"
    file.write_text("a picture {text_prompt} {braces} <|Reward|>", encoding="utf-8")
    other = load(checkpoint, body, template=file)
    assert other.identity != reward.identity
    assert load(checkpoint, body).identity == reward.identity
    media = Media(torch.rand(1, 3, SIDE, SIDE))
    assert not other.score(media, ["star"]).value.equal(reward.score(media, ["star"]).value)


def test_unusable_templates_say_why(tmp_path: Path):
    with pytest.raises(ValueError, match=r"<\|Reward\|> 0 times"):
        read_template("for {text_prompt}")
    with pytest.raises(ValueError, match=r"<\|Reward\|> 2 times"):
        read_template("{text_prompt} <|Reward|> <|Reward|>")
    (tmp_path / "t.txt").write_text("no field <|Reward|>")
    with pytest.raises(ValueError, match=r"\{text_prompt\} 0 times"):
        read_template(tmp_path / "t.txt")
    with pytest.raises(FileNotFoundError):
        read_template(tmp_path / "absent.txt")


def test_unknown_options(checkpoint: Path, body: Path):
    with pytest.raises(UnknownNameError, match="sequential"):
        load(checkpoint, body, positions="sequencial")
    with pytest.raises(UnknownNameError, match="bf16"):
        load(checkpoint, body, dtype="bf61")
