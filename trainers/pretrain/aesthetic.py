"""Trains the shapes world's aesthetic predictor: a small head on the frozen shapes CLIP.

As the published predictors are: frozen embedding, small head, preferences.  The preferences are
those of :mod:`trainers.pretrain.taste`, the loss is Bradley-Terry's.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmalign.assets import asset
from mmalign.runtime.files import atomic_directory, atomic_write_json
from mmalign.runtime.log import say
from mmalign.shapes import sample_scene, sample_spec
from mmalign.shapes.splits import trainable_pair
from trainers.pretrain.scenes import to_pixels
from trainers.pretrain.steps import Stateful, checked, rate_at, resumable_steps
from trainers.pretrain.taste import TERMS, Liked, draw, prefers
from vision_rewards.embedding import Embedder, load_embedder
from vision_rewards.shapes_models import CONFIG, WEIGHTS, AestheticHead, tower_features


@dataclass(frozen=True, kw_only=True)
class AestheticConfig:
    """Dials of :func:`train_aesthetic`; the defaults made the shipped head."""

    out: str = "runs/shapes-aesthetic"
    backbone: str = ""  # a folder; empty is the shipped CLIP
    pictures: int = 10_000
    blocks: tuple[int, ...] = (0, 2, 4)
    width: int = 64
    steps: int = 2500
    batch_size: int = 256
    lr: float = 1e-3
    weight_decay: float = 0.02
    held_out: int = 1500
    seed: int = 0
    save_every: int = 500


def liked_pictures(count: int, split: str, seed: int) -> list[Liked]:
    """Pictures of one split with their utilities; three quarters show more than one object."""
    rng = random.Random(f"taste {split} {seed}")
    allow = trainable_pair if split == "train" else None
    found: list[Liked] = []
    while len(found) < count:
        task = rng.choice(("colors", "counting", "two_object", "color_attr"))
        found.append(draw(sample_scene(sample_spec(rng, split, task), rng, allow), rng))
    return found


@torch.no_grad()
def features_of(pictures: list[Liked], embedder: Embedder, blocks: tuple[int, ...]) -> Tensor:
    """Frozen features ``(N, features)`` of pictures."""
    stacked = np.stack([p.picture for p in pictures])
    chunks = np.array_split(stacked, -(-len(stacked) // 128))
    return torch.cat([tower_features(embedder, to_pixels(c), blocks) for c in chunks])


def preference_loss(
    head: AestheticHead, features: Tensor, utilities: list[float], rng: random.Random, pairs: int
) -> Tensor:
    """``-log sigmoid(s_winner - s_loser)`` over random pairs judged with noise."""
    first, second = (torch.tensor(rng.choices(range(len(utilities)), k=pairs)) for _ in "ab")
    won = [
        prefers(utilities[a], utilities[b], rng)
        for a, b in zip(first.tolist(), second.tolist(), strict=True)
    ]
    sign = torch.tensor(won).float() * 2 - 1
    return F.softplus(-sign * (head(features[first]) - head(features[second]))).mean()


def train_aesthetic(config: AestheticConfig) -> Path:
    """Train (or resume) the head; returns its folder."""
    torch.manual_seed(config.seed)
    embedder = load_embedder(config.backbone or asset("shapes-clip"))
    pictures = liked_pictures(config.pictures, "train", config.seed)
    features = features_of(pictures, embedder, config.blocks)
    utilities = [p.utility for p in pictures]
    head = AestheticHead(features.shape[1], config.width)
    head.mean.copy_(features.mean(0))
    head.std.copy_(features.std(0).clamp_min(1e-4))
    optimizer = torch.optim.AdamW(head.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    parts: dict[str, Stateful] = {"head": head, "optimizer": optimizer}
    path = Path(config.out) / "state.pt"
    for step in resumable_steps(path, parts, config.steps, config.save_every):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * rate_at(step, config.steps)
        rng = random.Random(f"taste pairs {config.seed} {step}")
        loss = preference_loss(head, features, utilities, rng, config.batch_size)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if (step + 1) % 100 == 0:
            say(f"taste step {step + 1}/{config.steps} {checked({'loss': loss.item()}, 'lr')}")
    _standardise(head, features)
    folder = _export(head, embedder, config)
    judged = liked_pictures(config.held_out, "test", config.seed + 1)
    say(f"held-out pairs: {pair_accuracy(head, embedder, judged, config.blocks)}")
    return folder


@torch.no_grad()
def _standardise(head: AestheticHead, features: Tensor) -> None:
    """Rescale the last layer: mean 0 and deviation 1 over the training pictures."""
    scores = head(features)
    last = head.net[-1]
    last.bias.sub_(scores.mean()).div_(scores.std())  # type: ignore[union-attr,operator]
    last.weight.div_(scores.std())  # type: ignore[union-attr,operator]


def _export(head: AestheticHead, embedder: Embedder, config: AestheticConfig) -> Path:
    from safetensors.torch import save_file

    folder = Path(config.out) / "head"
    settings = {
        "backbone": embedder.image_digest,
        "blocks": list(config.blocks),
        "features": len(head.mean),
        "width": config.width,
    }
    with atomic_directory(folder) as partial:
        save_file({k: v.detach().contiguous() for k, v in head.state_dict().items()},
                  partial / WEIGHTS)  # fmt: skip
        atomic_write_json(partial / CONFIG, settings)
    say(f"aesthetic head written to {folder}")
    return folder


@torch.no_grad()
def pair_accuracy(
    head: AestheticHead, embedder: Embedder, pictures: list[Liked], blocks: tuple[int, ...],
    pairs: int = 4000, seed: int = 0,
) -> dict[str, float]:  # fmt: skip
    """How often the head agrees with the formula on random pairs of pictures.

    Returns:
        ``clean``: share of pairs ordered as the formula does; ``noisy``: as one noisy judge does;
        ``ceiling``: how often the formula itself agrees with that judge; and for each term the
        accuracy over pairs in which it alone decides (the other two differ by less than 0.15).
    """
    scores = head(features_of(pictures, embedder, blocks)).tolist()
    rng = random.Random(seed)
    hits: dict[str, list[bool]] = {k: [] for k in ("clean", "noisy", "ceiling", *TERMS)}
    for _ in range(pairs):
        i, j = rng.sample(range(len(pictures)), 2)
        ordered, truth = scores[i] > scores[j], pictures[i].utility > pictures[j].utility
        judged = prefers(pictures[i].utility, pictures[j].utility, rng)
        hits["clean"].append(ordered == truth)
        hits["noisy"].append(ordered == judged)
        hits["ceiling"].append(truth == judged)
        gaps = [abs(a - b) for a, b in zip(pictures[i].terms, pictures[j].terms, strict=True)]
        for k, term in enumerate(TERMS):
            if gaps[k] > 0.3 and all(g < 0.15 for m, g in enumerate(gaps) if m != k):
                hits[term].append(ordered == truth)
    return {k: sum(v) / len(v) for k, v in hits.items() if v}
