"""Vision-language backbones: last token, yes/no read-out, heads on them, LoRA."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmalign.config import ConfigError
from mmalign.types import Media
from vision_rewards.judge.backend import BackendError
from vision_rewards.training.backbones import VlmBackbone, last_token, load_backbone
from vision_rewards.training.config import (
    BackboneConfig,
    FitConfig,
    HeadConfig,
    LossConfig,
    RewardTrainConfig,
)
from vision_rewards.training.features import read_pictures
from vision_rewards.training.train import train_reward
from vision_rewards.training.trained import load_trained

TEMPLATE = "a photo of {prompt} ?"


def vlm(folder: Path, **changes: Any) -> BackboneConfig:
    return BackboneConfig(kind="vlm", checkpoint=str(folder), template=TEMPLATE, **changes)


def test_last_token_on_either_side_of_the_padding() -> None:
    hidden = torch.arange(12.0).view(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    assert last_token(hidden, mask).tolist() == [[2.0, 3.0], [10.0, 11.0]]
    with pytest.raises(ValueError, match="all padding"):
        last_token(hidden, torch.zeros(2, 3))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_as_one_by_one(vlm_folder: Path, world: Any, side: str) -> None:
    backbone = VlmBackbone(vlm(vlm_folder))
    backbone.processor.tokenizer.padding_side = side
    pictures = read_pictures([p.path for p in world[:3]])
    prompts = ["a red star", "red", "a photo of a star of a star"]
    with torch.no_grad():
        together = backbone.image(pictures, prompts)
        alone = [backbone.image([p], [t])[0] for p, t in zip(pictures, prompts, strict=True)]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[0], backbone.image(pictures[:1], ["star"])[0])


def test_the_read_out_is_the_log_odds_of_yes(vlm_folder: Path, world: Any) -> None:
    backbone = VlmBackbone(vlm(vlm_folder, readout="yes_no"))
    picture = read_pictures([world[0].path])
    with torch.no_grad():
        got = backbone.image(picture, ["red"])
        images = Media(picture[0][None]).to_pil()
        text = "<image>a photo of red ?"
        inputs = backbone.processor(images=images, text=[text], return_tensors="pt")
        logits = backbone.network(**inputs).logits[0, -1]
    yes, no = (backbone.processor.tokenizer.convert_tokens_to_ids(w) for w in ("yes", "no"))
    assert got.shape == (1, 1)
    assert float(got) == pytest.approx(float(logits[yes] - logits[no]), abs=1e-5)


def config(data: Path, backbone: BackboneConfig, **changes: Any) -> RewardTrainConfig:
    settings: dict[str, Any] = {
        "data": str(data), "backbone": backbone, "output_dir": str(data.parent / "reward"),
        "device": "cpu", "fit": FitConfig(epochs=30, lr=3e-3), "test": 0.2,
    }  # fmt: skip
    return RewardTrainConfig(**{**settings, **changes})


def test_two_layers_on_a_frozen_model(pairs_file: Path, vlm_folder: Path, world: Any) -> None:
    made = train_reward(config(pairs_file, vlm(vlm_folder)))
    report = json.loads((pairs_file.parent / "reward" / "report.json").read_text())
    assert report["head"]["kind"] == "mlp" and report["head"]["features"] == "image"
    assert report["measures"]["test"]["accuracy"]["wilson"][0] > 0.6
    loaded = load_trained(pairs_file.parent / "reward")
    assert loaded.info.needs == ("prompt",) and not loaded.info.differentiable
    media = Media(torch.stack(read_pictures([p.path for p in world[:3]])))
    prompts = [p.prompt for p in world[:3]]
    assert loaded.score(media, prompts).value.allclose(made.score(media, prompts).value)


def test_lora_and_read_out(world: Any, write: Any, vlm_folder: Path) -> None:
    rows = [
        {"prompt": "star", "image": str(p.path), "label": int(p.warmth > 0)} for p in world[:32]
    ]
    rows = [{**r, "prompt": f"star {k}"} for k, r in enumerate(rows)]
    data = write(rows)
    backbone = vlm(vlm_folder, readout="yes_no", lora_rank=2)
    fit = FitConfig(epochs=2, batch_size=8, backbone_lr=1e-2, patience=0)
    focal = LossConfig(name="focal")
    # Without validation the last weights are kept, better or not.
    made = train_reward(config(data, backbone, fit=fit, loss=focal, validation=0.0))
    loaded = load_trained(data.parent / "reward")
    media = Media(torch.stack(read_pictures([p.path for p in world[:3]])))
    got = loaded.score(media, ["star"] * 3)
    assert loaded.identity == made.identity
    torch.testing.assert_close(got.value, made.score(media, ["star"] * 3).value)
    plain = load_backbone(vlm(vlm_folder, readout="yes_no"))
    with torch.no_grad():
        before = plain.image(list(media.data), ["star"] * 3)
        after = loaded.backbone.image(list(media.data), ["star"] * 3)
    assert not torch.allclose(before, after)


def test_marks_of_the_model_in_a_prompt_are_text(vlm_folder: Path, world: Any) -> None:
    backbone = VlmBackbone(vlm(vlm_folder))
    pictures = read_pictures([world[0].path])
    with torch.no_grad():
        plain = backbone.image(pictures, ["red star"])
        marked = backbone.image(pictures, ["red <image> <pad> star"])
    torch.testing.assert_close(plain, marked)


def test_a_checkpoint_that_lacks_weights_is_refused(vlm_folder: Path, tmp_path: Path) -> None:
    """Weights that were not loaded would be random, and the features with them."""
    shutil.copytree(vlm_folder, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    weights = load_file(file)
    lost = next(name for name in weights if "layers.1.mlp.up_proj" in name)
    save_file({n: w for n, w in weights.items() if n != lost}, file, {"format": "pt"})
    with pytest.raises(BackendError, match="up_proj"):
        VlmBackbone(vlm(tmp_path / "m"))


def test_what_does_not_fit_is_refused(vlm_folder: Path, pairs_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora_targets.*match no linear layer"):
        load_backbone(vlm(vlm_folder, lora_rank=2, lora_targets=("nothing",)))
    with pytest.raises(ConfigError, match="'scale' goes with a yes_no read-out"):
        train_reward(
            config(pairs_file, vlm(vlm_folder, readout="yes_no"), head=HeadConfig(kind="mlp"))
        )
    with pytest.raises(ConfigError, match="needs text features"):
        train_reward(config(pairs_file, vlm(vlm_folder), head=HeadConfig(kind="cosine")))
