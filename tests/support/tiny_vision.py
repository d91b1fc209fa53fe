"""Small random vision models of transformers, saved as the published ones are."""

from __future__ import annotations

from pathlib import Path

import torch

SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
NAMES = {0: "person", 1: "mouse", 2: "dog", 3: "N/A"}


def write_dino(folder: Path) -> Path:
    """A small random ViT saved as DINO's is."""
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    torch.manual_seed(8)
    ViTModel(ViTConfig(**SMALL), add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def write_checker(folder: Path) -> Path:
    """A small random safety checker, under the key names of the published one."""
    from safetensors.torch import save_file
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPVisionModel

    torch.manual_seed(10)
    config = CLIPConfig(vision_config=SMALL, projection_dim=24)
    tower = CLIPVisionModel(config.vision_config).state_dict()
    state = {
        f"vision_model.vision_model.{k.removeprefix('vision_model.')}": v for k, v in tower.items()
    }
    state["vision_model.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    state["visual_projection.weight"] = torch.randn(24, 32)
    state["concept_embeds"], state["special_care_embeds"] = torch.randn(17, 24), torch.randn(3, 24)
    state["concept_embeds_weights"] = torch.full((17,), 0.2)
    state["special_care_embeds_weights"] = torch.full((3,), 0.2)
    save_file(state, folder / "model.safetensors")
    config.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return folder


def write_classifier(folder: Path) -> Path:
    """A small random image classifier with three labels."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(11)
    config = ViTConfig(**SMALL, id2label={0: "normal", 1: "NSFW", 2: "drawing"})
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def write_mask2former(folder: Path) -> Path:
    """A tiny untrained Mask2Former with its image processor."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
    from transformers.models.mask2former.image_processing_mask2former import (
        Mask2FormerImageProcessor,
    )

    torch.manual_seed(0)
    swin = SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=16, dim_feedforward=16, encoder_layers=1, decoder_layers=2,
        num_attention_heads=2, num_queries=12, id2label=NAMES,
    )  # fmt: skip
    model = Mask2FormerForUniversalSegmentation(config)
    # Confident classes and both signs in the masks, so that something is found.
    model.class_predictor.weight.data.normal_(0, 3)
    model.save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder
