"""Trains the artefact reward: a small convolutional classifier of clean and broken pictures.

After "Understanding Reward Hacking in Text-to-Image Reinforcement Learning" (2601.03468).  Broken
pictures are the small generator's own failures (too little training, too strong guidance, weights
off course) and synthetic ones (:mod:`trainers.pretrain.corruption`); clean ones are renders,
renders through the autoencoder, and the generator's good pictures.  Pictures of too few sampling
steps are never trained on: they measure whether the detector knows artefacts or only its list.
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
from mmalign.policies.load import load_policy
from mmalign.protocols import Policy
from mmalign.runtime.files import atomic_directory, atomic_path, atomic_write_json
from mmalign.runtime.log import say
from mmalign.shapes import render, sample_scene, sample_spec
from mmalign.shapes.splits import trainable_pair
from trainers.muon import Muon
from trainers.pretrain.corruption import CORRUPTIONS
from trainers.pretrain.failures import SETTINGS, Labelled, Setting, damaged, generated
from trainers.pretrain.generator import GeneratorConfig, train_generator
from trainers.pretrain.measures import Measured, auroc
from trainers.pretrain.scenes import reconstruct, to_pixels
from trainers.pretrain.steps import Stateful, checked, rate_at, resumable_steps
from vision_rewards.shapes_models import CONFIG, WEIGHTS, ArtifactNet

HELD_OUT = "few_steps"


@dataclass(frozen=True, kw_only=True)
class ArtifactConfig:
    """Dials of :func:`train_artifact`; the defaults made the shipped network."""

    data: str = "shapes-cache"
    out: str = "runs/shapes-artifact"
    early: str = ""  # a pipeline that stopped early; empty trains one for early_steps
    early_steps: int = 200
    damage: float = 0.4
    renders: int = 3000
    pictures: int = 3000
    held_out: int = 2400
    steps: int = 1500
    batch_size: int = 64
    width: int = 32
    lr: float = 2e-3
    seed: int = 0
    save_every: int = 100


def train_artifact(config: ArtifactConfig) -> Path:
    """Train (or resume) the artefact network; returns its folder."""
    torch.manual_seed(config.seed)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    drawn = rendered(config.renders, "train", config.seed)
    settings = [s for s in SETTINGS if s.kind != HELD_OUT]
    made = Labelled.cat([picture_set(config, s, "train", config.pictures) for s in settings])
    network = ArtifactNet(config.width)
    optimizer = Muon(network.parameters(), lr=config.lr, adam_lr=config.lr, weight_decay=0.01)
    parts: dict[str, Stateful] = {"network": network, "optimizer": optimizer}
    network.train()
    for step in resumable_steps(out / "state.pt", parts, config.steps, config.save_every):
        for group in optimizer.param_groups:
            group["scale"] = rate_at(step, config.steps, warmup=30)
        pixels, clean = batch_of(drawn, made, config.batch_size, config.seed, step)
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(pixels)
        loss = F.binary_cross_entropy_with_logits(logits.float(), clean)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            right = ((logits > 0) == (clean > 0.5)).float().mean().item()
            metrics = {"loss": loss.item(), "accuracy": right}
            say(f"artifact step {step + 1}/{config.steps} {checked(metrics, 'lr')}")
    folder = _export(network.eval(), config)
    sets = [picture_set(config, s, "test", config.held_out) for s in SETTINGS]
    for kind, value in evaluate_artifact(network, Labelled.cat(sets)).items():
        say(f"held-out {kind}: AUROC {value}")
    return folder


def rendered(count: int, split: str, seed: int) -> np.ndarray:
    """Clean pictures ``(count, 64, 64, 3)`` uint8: renders, half through the autoencoder."""
    rng = random.Random(f"clean {split} {seed}")
    allow = trainable_pair if split == "train" else None
    scenes = [sample_scene(sample_spec(rng, split), rng, allow) for _ in range(count)]
    images = np.stack([np.asarray(render(s)) for s in scenes])
    images[::2] = reconstruct(images[::2], noise=0.2, seed=seed)
    return images


def picture_set(config: ArtifactConfig, setting: Setting, split: str, count: int) -> Labelled:
    """Labelled pictures of one setting; ``setting.share`` of ``count``, kept in a file."""
    path = Path(config.out) / f"{setting.kind}-{split}.npz"
    if not path.exists():
        # Other seeds and, with the split, other prompts than those of training.
        seed = config.seed + (1 if split == "test" else 0)
        policy = _policy(config, setting.kind)
        found = generated(policy, setting, split, round(setting.share * count), seed)
        with atomic_path(path) as partial, partial.open("wb") as file:
            np.savez(file, images=found.images, clean=found.clean)
        say(f"{setting.kind} {split}: {len(found.clean)} labelled, {found.clean.mean():.0%} clean")
    stored = np.load(path)
    return Labelled(stored["images"], stored["clean"], (setting.kind,) * len(stored["clean"]))


def _policy(config: ArtifactConfig, kind: str) -> Policy:
    """The generator of a setting: the shipped one, an early one, or a damaged one."""
    if kind == "damaged":
        return damaged(load_policy("shapes-flow"), config.damage, config.seed)
    if kind != "early":
        return load_policy("shapes-flow")
    if config.early:
        return load_policy(config.early)
    early = GeneratorConfig(
        data=config.data,
        vae=str(asset("shapes-flow/vae")),
        out=str(Path(config.out) / "early"),
        shards=1,
        first_shards=1,
        steps=config.early_steps,
        save_every=50,
    )
    return load_policy(train_generator(early))


def batch_of(
    drawn: np.ndarray, made: Labelled, size: int, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """Pixels ``(B, 3, H, W)`` and labels ``(B,)``, 1 for clean; a function of the step alone.

    A half is clean, drawn and generated in equal parts; of the broken half, half are the
    generator's own failures and half are clean pictures with a synthetic artefact.
    """
    rng = np.random.default_rng((seed, step))
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    quarter = size // 4
    good, bad = np.flatnonzero(made.clean), np.flatnonzero(~made.clean)
    pick = lambda images, rows, n: to_pixels(images[rng.choice(rows, n)])  # noqa: E731
    everything = np.arange(len(drawn))
    clean = [pick(drawn, everything, quarter), pick(made.images, good, quarter)]
    half = quarter // 2
    spoil = torch.cat([pick(drawn, everything, half), pick(made.images, good, quarter - half)])
    names = list(CORRUPTIONS)
    kind = rng.permutation(quarter) % len(names)
    for k, name in enumerate(names):
        rows = torch.from_numpy(np.flatnonzero(kind == k))
        if len(rows):
            spoil[rows] = CORRUPTIONS[name](spoil[rows], generator)
    broken = [pick(made.images, bad, size - 3 * quarter), spoil]
    pixels = _turned(torch.cat([*clean, *broken]), rng)
    return pixels, torch.cat([torch.ones(2 * quarter), torch.zeros(size - 2 * quarter)])


def _turned(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Mirrored at random: an artefact is one from either side."""
    flips = [d for d in (2, 3) if rng.random() < 0.5]
    return pixels.flip(flips) if flips else pixels


@torch.no_grad()
def evaluate_artifact(network: ArtifactNet, held_out: Labelled) -> dict[str, Measured]:
    """AUROC over all held-out pictures, and of each kind's broken ones against all clean ones."""
    chunks = np.array_split(held_out.images, -(-len(held_out.images) // 128))
    scores = torch.cat([network(to_pixels(c)) for c in chunks]).numpy()
    kinds = np.asarray(held_out.kinds)
    found = {"all": auroc(scores, held_out.clean)}
    for kind in dict.fromkeys(held_out.kinds):
        rows = held_out.clean | (kinds == kind)
        if (~held_out.clean[rows]).any() and held_out.clean.any():
            found[kind] = auroc(scores[rows], held_out.clean[rows])
    return found


def _export(network: ArtifactNet, config: ArtifactConfig) -> Path:
    from safetensors.torch import save_file

    folder = Path(config.out) / "network"
    state = {
        k: (v.detach().half() if v.is_floating_point() else v).contiguous()
        for k, v in network.state_dict().items()
    }
    with atomic_directory(folder) as partial:
        save_file(state, partial / WEIGHTS)
        atomic_write_json(partial / CONFIG, {"width": config.width})
    say(f"artefact network written to {folder}")
    return folder
