"""Trains the shapes world's object detector, a stock ``YolosForObjectDetection`` (2106.00666).

Each of 25 detection tokens says a class (or none) and a box.  Which token answers for which object
is first fixed, by the cell of a 5 x 5 grid that holds its centre (no two objects of a scene share
one), and later the cheapest matching, as for every DETR (Carion et al., 2005.12872):

    cost = -p(class) + 5 |box - box'|_1 - 2 GIoU(box, box')
    loss = CE(class, none weighing ``none_weight``) + 5 |box - box'|_1 + 2 (1 - GIoU)

From the start with the matching alone, a small model takes most of its time to find any order
among its tokens; with the grid alone, two tokens share an object between two cells.  A layout head
on the patch tokens is trained along and thrown away, as for the other models of this world.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmalign.runtime.files import atomic_directory
from mmalign.runtime.log import say
from mmalign.shapes import SHAPES
from trainers.muon import Muon
from trainers.pretrain.detection import (
    Boxes,
    boxes_of,
    detection_accuracy,
    generalised_iou,
    grid_tokens,
)
from trainers.pretrain.scenes import Pool, load_pool
from trainers.pretrain.steps import Stateful, checked, rate_at, resumable_steps

GRID = 5
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "intermediate_size": 384,
}
BOX_WEIGHT, IOU_WEIGHT = 5.0, 2.0  # DETR's


@dataclass(frozen=True, kw_only=True)
class DetectorConfig:
    """Dials of :func:`train_detector`; the defaults made the shipped weights."""

    data: str = "shapes-cache"
    out: str = "runs/shapes-detector"
    shards: int = 3
    unnamed: int = 4_000
    decoded_share: float = 0.4
    steps: int = 6_000
    batch_size: int = 64
    grid_share: float = 0.4  # of the steps, with tokens tied to the grid
    none_weight: float = 0.3
    layout_weight: float = 0.5
    muon_lr: float = 2e-3
    adam_lr: float = 1e-3
    decay_share: float = 0.6
    held_out: int = 600  # test scenes to report on at the end; 0 reports nothing
    seed: int = 0
    save_every: int = 100


def build_detector(seed: int = 0, **sizes: Any) -> Any:
    """A random detector of the shipped sizes; ``sizes`` changes entries of its config."""
    from transformers import YolosConfig, YolosForObjectDetection

    config = YolosConfig(
        image_size=[64, 64],
        patch_size=8,
        num_detection_tokens=GRID**2,
        use_mid_position_embeddings=False,
        id2label=dict(enumerate(SHAPES)),
        label2id={name: k for k, name in enumerate(SHAPES)},
        **{**SIZES, **sizes},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return YolosForObjectDetection(config)


def layout_head(model: Any, labels: int = 13) -> nn.Module:
    """Which shape and colour covers each patch; thrown away after training."""
    width = model.config.hidden_size
    return nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, labels))


@torch.no_grad()
def matched_tokens(logits: Tensor, boxes: Tensor, truth: Boxes) -> Tensor:
    """The cheapest token of each object, ``(B, K)``; -1 where there is no object.

    Args:
        logits: of the classes and of none, ``(B, Q, C + 1)``.
        boxes: centre and size, ``(B, Q, 4)``.
        truth: ``K`` places for objects.
    """
    chance = logits.softmax(-1)
    labels = truth.labels.clamp(min=0)[:, None].expand(-1, logits.shape[1], -1)
    cost = -chance.gather(2, labels)
    there, wanted = boxes[:, :, None], truth.boxes[:, None]
    cost = cost + BOX_WEIGHT * (there - wanted).abs().sum(-1)
    cost = cost - IOU_WEIGHT * generalised_iou(there, wanted)
    table = cost.cpu().numpy()
    tokens = torch.full(truth.labels.shape, -1)
    for row, count in enumerate((truth.labels >= 0).sum(1).tolist()):
        where, which = linear_sum_assignment(table[row, :, :count])
        tokens[row, which] = torch.from_numpy(where)
    return tokens


def detector_loss(
    logits: Tensor, boxes: Tensor, truth: Boxes, tokens: Tensor, none_weight: float
) -> tuple[Tensor, dict[str, float]]:
    """The loss of this module's head for given ``tokens (B, K)``, and its parts."""
    none = logits.shape[-1] - 1
    rows, places = (tokens >= 0).nonzero(as_tuple=True)
    chosen = tokens[rows, places]
    target = torch.full(logits.shape[:2], none)
    target[rows, chosen] = truth.labels[rows, places]
    weight = torch.ones(none + 1)
    weight[none] = none_weight
    kind = F.cross_entropy(logits.transpose(1, 2), target, weight)
    found, wanted = boxes[rows, chosen], truth.boxes[rows, places]
    count = max(len(rows), 1)
    distance = (found - wanted).abs().sum() / count
    apart = (1 - generalised_iou(found, wanted)).sum() / count
    right = (logits.argmax(-1) == target).all(1).float().mean()
    parts = {"class": kind, "box": distance, "iou": apart, "all_right": right}
    loss = kind + BOX_WEIGHT * distance + IOU_WEIGHT * apart
    return loss, {name: value.item() for name, value in parts.items()}


def train_detector(config: DetectorConfig, **sizes: Any) -> Path:
    """Train (or resume) the detector; returns the folder of the finished one."""
    torch.manual_seed(config.seed)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    model = build_detector(config.seed, **sizes)
    head = layout_head(model)
    optimizer = _optimizer(model, head, config)
    pool = load_pool(
        Path(config.data), config.shards, config.unnamed, config.decoded_share, out / "decoded.npz"
    )
    truth = boxes_of(pool.scenes)
    parts: dict[str, Stateful] = {"model": model, "head": head, "optimizer": optimizer}
    model.train()
    for step in resumable_steps(out / "state.pt", parts, config.steps, config.save_every):
        for group in optimizer.param_groups:
            group["scale"] = rate_at(step, config.steps, decay_share=config.decay_share)
        loss, metrics = _step_loss(model, head, pool, truth, config, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([*model.parameters(), *head.parameters()], 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            said = checked(metrics, "muon_lr or adam_lr")
            say(f"detector step {step + 1}/{config.steps} {said}")
    folder = export(model.eval(), out / "detector")
    if config.held_out:
        say(f"held-out scenes: {detection_accuracy(folder, config.held_out)}")
    return folder


def _step_loss(
    model: Any, head: nn.Module, pool: Pool, truth: Boxes, config: DetectorConfig, step: int
) -> tuple[Tensor, dict[str, float]]:
    """Loss of one batch, a function of the step alone."""
    rng = np.random.default_rng((config.seed, step))
    rows = rng.integers(len(pool.images), size=config.batch_size)
    wanted = truth[torch.from_numpy(rows)]
    # The CPU's fused attention is slow to differentiate at so few tokens.
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        output = model(pixel_values=pool.pixels(rows) * 2 - 1)
        patches = head(output.last_hidden_state[:, 1 : 1 + 64])
    logits, boxes = output.logits.float(), output.pred_boxes.float()
    tied = step < config.grid_share * config.steps
    tokens = grid_tokens(wanted, GRID) if tied else matched_tokens(logits, boxes, wanted)
    loss, metrics = detector_loss(logits, boxes, wanted, tokens, config.none_weight)
    cover = torch.tensor(pool.layouts[rows]).float().div(255).flatten(1, 2)
    layout = F.binary_cross_entropy_with_logits(patches.float(), cover)
    return loss + config.layout_weight * layout, {**metrics, "layout": layout.item()}


def _optimizer(model: Any, head: nn.Module, config: DetectorConfig) -> Muon:
    """Muon for the matrices of the transformer, Adam for everything else."""
    blocks = [p for n, p in model.named_parameters() if "encoder.layer" in n and p.ndim == 2]
    chosen = {id(p) for p in blocks}
    rest = [p for p in (*model.parameters(), *head.parameters()) if id(p) not in chosen]
    groups: list[dict[str, Any]] = [
        {"params": blocks, "weight_decay": 0.01},
        {"params": rest, "adam": True},
    ]
    return Muon(groups, lr=config.muon_lr, adam_lr=config.adam_lr)


def export(model: Any, folder: Path) -> Path:
    """Write model (half precision) and image processor as transformers reads them."""
    from transformers import YolosImageProcessor

    state = {k: v.detach().half().contiguous() for k, v in model.state_dict().items()}
    processor = YolosImageProcessor(
        size={"height": 64, "width": 64},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        do_pad=False,
    )
    with atomic_directory(folder) as partial:
        model.save_pretrained(partial, state_dict=state)
        processor.save_pretrained(partial)
    say(f"detector written to {folder}")
    return folder
