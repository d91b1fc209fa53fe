"""Embedding models: loaders, preprocessing, sharing, precision."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmalign.types import Media
from vision_rewards.embedding import Embedder, load_embedder
from vision_rewards.naflex import load_naflex
from vision_rewards.preprocess import Preprocess
from vision_rewards.sharing import shared_forward
from vision_rewards.weights import digest, load_exactly, read_weights, weights_file

Pictures = Callable[..., Tensor]
PROMPTS = ["a red cat", "кошка 日本語 🐈", "word " * 200, "a red cat", ""]
SIZES = [(40, 56), (97, 33), (32, 32), (20, 20), (64, 100)]
# An 8-bit resize rounds after each of its two passes; ours does not round. In grey levels.
GREY_LEVELS = 1.6


def calls(module: torch.nn.Module) -> list[int]:
    """Batch sizes of every forward pass of ``module`` from now on."""
    seen: list[int] = []
    module.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    return seen


def unit(features: Any) -> Tensor:
    features = getattr(features, "pooler_output", features)
    return F.normalize(features.float(), dim=-1)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return torch.allclose(a, b, rtol=0, atol=tolerance)


def test_clip_of_transformers(clip_folder: Path, pictures: Pictures) -> None:
    from transformers import AutoTokenizer, CLIPModel

    embedder, model = load_embedder(clip_folder), CLIPModel.from_pretrained(clip_folder).eval()
    pixels = pictures()
    inputs = embedder.preprocess(pixels)
    assert embedder.dim == 24 and embedder.image(pixels).shape == (3, 24)
    assert close(embedder.image(pixels), unit(model.get_image_features(pixel_values=inputs)))
    tokens = AutoTokenizer.from_pretrained(clip_folder)(
        PROMPTS, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
    )
    assert close(embedder.text(PROMPTS), unit(model.get_text_features(**tokens)))
    assert embedder.overflow(PROMPTS) == [False, False, True, False, False]
    assert embedder.logit_scale is not None
    assert embedder.logit_scale.item() == pytest.approx(model.logit_scale.item())


def test_siglip_of_transformers(siglip_folder: Path, pictures: Pictures) -> None:
    from transformers import AutoTokenizer, SiglipModel

    embedder, model = load_embedder(siglip_folder), SiglipModel.from_pretrained(siglip_folder)
    pixels, prompts = pictures(), ["a red cat", "the moon", "on " * 20]
    inputs = embedder.preprocess(pixels)
    assert close(embedder.image(pixels), unit(model.eval().get_image_features(pixel_values=inputs)))
    ids = AutoTokenizer.from_pretrained(siglip_folder)(
        prompts, padding="max_length", truncation=True, max_length=12, return_tensors="pt"
    ).input_ids
    assert close(embedder.text(prompts), unit(model.get_text_features(input_ids=ids)))
    assert embedder.overflow(prompts) == [False, False, True]


@pytest.fixture(scope="module")
def naflex_folder(tmp_path_factory: pytest.TempPathFactory, siglip_folder: Path) -> Path:
    """A small random SigLIP 2 NaFlex."""
    from transformers import Siglip2Config, Siglip2ImageProcessor, Siglip2Model

    folder = tmp_path_factory.mktemp("siglip2")
    for file in siglip_folder.glob("tokenizer*"):
        shutil.copy(file, folder / file.name)
    torch.manual_seed(5)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    tower["num_attention_heads"] = 2
    vision = {**tower, "patch_size": 8, "num_patches": 16}
    text = {**tower, "vocab_size": 16, "max_position_embeddings": 12}
    Siglip2Model(Siglip2Config(text_config=text, vision_config=vision)).save_pretrained(folder)
    Siglip2ImageProcessor(patch_size=8, max_num_patches=16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("size", SIZES)
def test_siglip2_keeps_the_aspect(
    naflex_folder: Path, size: tuple[int, int], pictures: Pictures
) -> None:
    from transformers import Siglip2ImageProcessor, Siglip2Model

    pixels = pictures(2, *size)
    inputs = Siglip2ImageProcessor.from_pretrained(naflex_folder)(
        Media(pixels).to_pil(), return_tensors="pt"
    )
    target = load_naflex(str(naflex_folder)).target(*size)
    assert [side // 8 for side in target] == inputs.spatial_shapes[0].tolist()
    model = Siglip2Model.from_pretrained(naflex_folder).eval()
    expected = unit(model.get_image_features(**inputs))
    assert close(load_embedder(naflex_folder).image(pixels), expected, 0.01)


def test_open_clip_folder(
    open_clip_folder: Path, open_clip_config: dict[str, Any], open_clip_state: dict[str, Tensor],
    pictures: Pictures,
) -> None:  # fmt: skip
    import open_clip

    embedder = load_embedder(open_clip_folder)
    model = open_clip.CLIP(**open_clip_config).eval()
    model.load_state_dict(open_clip_state)
    pixels = pictures()
    assert embedder.preprocess == Preprocess(
        size=32, fit="squash", mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4)
    )
    assert close(embedder.image(pixels), unit(model.encode_image(embedder.preprocess(pixels))))
    assert close(embedder.text(PROMPTS), unit(model.encode_text(open_clip.tokenize(PROMPTS))))
    assert embedder.overflow(PROMPTS) == [False, False, True, False, False]


def test_open_clip_folder_with_its_own_tokenizer(
    open_clip_folder: Path, clip_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(open_clip_folder, tmp_path, dirs_exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(clip_folder / name, tmp_path / name)
    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = str(tmp_path)
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    own, plain = load_embedder(tmp_path), load_embedder(open_clip_folder)
    assert type(own.text_tower.tokenizer).__name__ == "HFTokenizer"  # type: ignore[union-attr]
    assert close(own.text(["a red cat"]), plain.text(["a red cat"]))
    assert own.overflow(["a cat", "cat " * 99]) == [False, True]


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_image_models_are_read_at_the_class_token(
    tmp_path: Path, kind: str, pictures: Pictures
) -> None:
    import transformers as t

    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32}
    if kind == "vit":  # as facebook/dino-vits16: without a pooler
        config = t.ViTConfig(**sizes, intermediate_size=64, patch_size=8)
        model = t.ViTModel(config, add_pooling_layer=False)
        t.ViTImageProcessor(size=32).save_pretrained(tmp_path)
    else:
        model = t.Dinov2Model(t.Dinov2Config(**sizes, patch_size=8))
        processor = t.BitImageProcessor(size={"shortest_edge": 40}, crop_size=32)
        processor.save_pretrained(tmp_path)
    model.eval().save_pretrained(tmp_path)
    embedder = load_embedder(tmp_path, vision_only=True)
    inputs = embedder.preprocess(pictures())
    expected = model(pixel_values=inputs).last_hidden_state[:, 0]
    assert close(embedder.image(pictures()), unit(expected))
    with pytest.raises(ValueError, match="image tower only"):
        embedder.text(["a"])
    with pytest.raises(ValueError, match=f"is a {kind} without a text tower"):
        load_embedder(tmp_path)


def grey_levels(preprocess: Preprocess, reference: Any, picture: Tensor) -> float:
    """Largest difference between our input and the published one, in 8-bit grey levels."""
    ours = preprocess(picture[None])[0]
    std = torch.tensor(preprocess.std).view(3, 1, 1)
    assert ours.shape == reference.shape
    return float(((ours - reference) * std).abs().max() * 255)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_preprocessing_agrees_with_open_clip(
    size: tuple[int, int], mode: str, pictures: Pictures
) -> None:
    from open_clip.transform import image_transform

    picture = pictures(1, *size)[0]
    pil = Media(picture[None]).to_pil()[0]
    published = image_transform(32, is_train=False, resize_mode=mode)(pil)
    ours = Preprocess(size=32, fit=mode)  # type: ignore[arg-type]
    assert grey_levels(ours, published, picture) < GREY_LEVELS


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["clip", "siglip", "vit", "dinov2"])
def test_preprocessing_agrees_with_transformers(
    size: tuple[int, int], kind: str, pictures: Pictures, tmp_path: Path
) -> None:
    import transformers as t

    from vision_rewards.towers_transformers import load_preprocess

    processor = {
        "clip": lambda: t.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32),
        "siglip": lambda: t.SiglipImageProcessorPil(size={"height": 32, "width": 32}),
        "vit": lambda: t.ViTImageProcessorPil(size={"height": 32, "width": 32}),
        "dinov2": lambda: t.BitImageProcessorPil(size={"shortest_edge": 40}, crop_size=32),
    }[kind]()
    processor.save_pretrained(tmp_path)
    picture = pictures(1, *size)[0]
    pil = Media(picture[None]).to_pil()[0]
    published = processor(pil, return_tensors="pt").pixel_values[0]
    assert grey_levels(load_preprocess(str(tmp_path)), published, picture) < GREY_LEVELS


def test_one_by_one_is_as_in_a_batch(clip_folder: Path, pictures: Pictures) -> None:
    embedder, pixels = load_embedder(clip_folder), pictures(4)
    alone = torch.cat([embedder.image(pixels[k : k + 1]) for k in range(4)])
    assert close(alone, embedder.image(pixels))
    assert close(torch.cat([embedder.text([p]) for p in PROMPTS]), embedder.text(PROMPTS))


def test_gradient_is_the_finite_difference(clip_folder: Path, pictures: Pictures) -> None:
    embedder = load_embedder(clip_folder)
    torch.manual_seed(4)
    pixels = 0.25 + 0.5 * pictures(1)
    direction, probe = torch.randn_like(pixels), torch.randn(24)
    pixels.requires_grad_()
    value = (embedder.image(pixels) @ probe).sum()
    (gradient,) = torch.autograd.grad(value, pixels)
    step = 2e-3
    with torch.no_grad():
        ends = [(embedder.image(pixels + s * direction) @ probe).sum() for s in (step, -step)]
    slope = (ends[0] - ends[1]) / (2 * step)
    assert slope.item() == pytest.approx((gradient * direction).sum().item(), rel=0.02)


def test_equal_checkpoints_give_the_same_towers(clip_folder: Path, tmp_path: Path) -> None:
    embedder = load_embedder(clip_folder)
    assert load_embedder(str(clip_folder)) is embedder
    image_only = load_embedder(clip_folder, vision_only=True)
    assert image_only.image_tower is embedder.image_tower and image_only.text_tower is None
    copy = shutil.copytree(clip_folder, tmp_path / "copy")
    assert load_embedder(copy).image_tower is embedder.image_tower
    assert load_embedder(copy).digest == embedder.digest
    assert load_embedder(clip_folder, dtype="bf16").digest != embedder.digest


def test_one_forward_for_all(clip_folder: Path, pictures: Pictures) -> None:
    embedder, image_only = load_embedder(clip_folder), load_embedder(clip_folder, vision_only=True)
    seen, read = calls(embedder.image_tower), calls(embedder.text_tower)  # type: ignore[arg-type]
    pixels = pictures()
    with shared_forward(), torch.no_grad():
        first, second = embedder.image(pixels), image_only.image(pixels)
        embedder.text(PROMPTS)
        embedder.text(PROMPTS)
        assert seen == [3] and read == [4]  # equal prompts are encoded once
        embedder.image(pixels.clone())
        assert seen == [3, 3]
    assert first.equal(second)
    embedder.image(pixels)
    assert seen == [3, 3, 3]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_keeps_unit_vectors(
    clip_folder: Path, open_clip_folder: Path, dtype: str, pictures: Pictures
) -> None:
    for folder in (clip_folder, open_clip_folder):
        half, full = load_embedder(folder, dtype=dtype), load_embedder(folder)
        for a, b in (
            (half.image(pictures()), full.image(pictures())),
            (half.text(PROMPTS), full.text(PROMPTS)),
        ):
            assert a.dtype == torch.float32
            assert close(a.norm(dim=-1), torch.ones(len(a)), 1e-6)
            assert 0 < (a - b).abs().max() < 0.05


def test_autocast_around_changes_nothing(clip_folder: Path, pictures: Pictures) -> None:
    embedder: Embedder = load_embedder(clip_folder)
    with torch.autocast("cpu", torch.bfloat16):
        inside = embedder.image(pictures()), embedder.text(PROMPTS)
    assert close(inside[0], embedder.image(pictures()), 1e-6)
    assert close(inside[1], embedder.text(PROMPTS), 1e-6)


def damage(folder: Path, target: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of the model in ``folder`` with other weights."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    file = next(target.glob("*.safetensors"))
    state = load_file(file)
    change(state)
    save_file(state, file, metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("visual_projection.weight"), "missing: visual_projection.weight"),
        (lambda s: s.update(extra=torch.zeros(1)), "unknown: extra"),
    ],
)
def test_weights_that_do_not_fit_a_clip(
    clip_folder: Path, tmp_path: Path, change: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_embedder(damage(clip_folder, tmp_path / "bad", change))


def test_weights_that_do_not_fit_an_open_clip(open_clip_folder: Path, tmp_path: Path) -> None:
    bad = damage(open_clip_folder, tmp_path / "bad", lambda s: s.pop("text_projection"))
    with pytest.raises(ValueError, match="text_projection"):
        load_embedder(bad)
    (bad / "open_clip_model.safetensors").unlink()
    with pytest.raises(OSError, match="could not be loaded"):
        load_embedder(bad)


def test_what_is_not_there_is_an_os_error() -> None:
    for name in ("openai/clip-vit-large-patch14", "hf-hub:laion/nothing", "ViT-B-32/openai"):
        with pytest.raises(OSError):
            load_embedder(name)
    with pytest.raises(ValueError, match="dtype='fp8' is unknown; use one of fp32, bf16, fp16"):
        load_embedder("x/y", dtype="fp8")


def test_files_of_weights(tmp_path: Path) -> None:
    layer = torch.nn.Linear(3, 2)
    torch.save({"state_dict": layer.state_dict(), "epoch": 3}, tmp_path / "a.pt")
    state = read_weights(weights_file(tmp_path / "a.pt"))
    assert digest(state) == digest(layer) != digest({k: v + 1 for k, v in state.items()})
    with pytest.raises(FileNotFoundError, match="no file of weights"):
        weights_file(tmp_path / "b.pt")
    torch.save({"weight": torch.ones(2, 3), "path": Path("x")}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="more than tensors"):
        read_weights(tmp_path / "c.pt")
    wrong = {"weight": torch.ones(3, 2), "other": torch.ones(1)}
    with pytest.raises(ValueError, match=r"missing: bias; unknown: other; wrong shape: weight"):
        load_exactly(layer, wrong, "a file")


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 cut off", b"hello", b"\x01" * 20])
def test_damaged_weights_name_their_file(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{name} (is no file of weights|holds more than)"):
        read_weights(tmp_path / name)


def test_equal_weights_under_another_activation_are_another_network(
    clip_folder: Path, tmp_path: Path, pictures: Pictures
) -> None:
    embedder, copy = load_embedder(clip_folder), shutil.copytree(clip_folder, tmp_path / "other")
    config = json.loads((copy / "config.json").read_text())
    config["vision_config"]["hidden_act"] = "relu"
    (copy / "config.json").write_text(json.dumps(config))
    other = load_embedder(copy)
    assert other.image_tower is not embedder.image_tower
    with torch.no_grad():
        assert not other.image(pictures()).allclose(embedder.image(pictures()), atol=1e-4)


def test_sharing_under_inference_mode(clip_folder: Path, pictures: Pictures) -> None:
    embedder = load_embedder(clip_folder)
    seen = calls(embedder.image_tower)
    with torch.inference_mode(), shared_forward():
        pixels = pictures().clone()
        assert pixels.is_inference()
        assert embedder.image(pixels).equal(embedder.image(pixels))
    assert seen == [3]
