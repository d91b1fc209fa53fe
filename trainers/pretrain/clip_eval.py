"""What a text-image model of the shapes world is worth: near misses, and the verifier's verdict."""

from __future__ import annotations

import random

import numpy as np
import torch

from mmalign.protocols import Policy
from mmalign.sampling import generate
from mmalign.shapes import TASKS, caption, prompts, render, sample_scene, sample_spec
from trainers.pretrain.captions import near_misses, true_specs
from trainers.pretrain.measures import Measured, auroc, proportion, spearman
from trainers.pretrain.scenes import to_pixels
from vision_rewards.embedding import Embedder
from vision_rewards.shapes import verify


@torch.no_grad()
def near_miss_accuracy(
    embedder: Embedder, count: int, split: str = "test", seed: int = 0
) -> dict[str, Measured]:
    """Per kind of near miss, how often the true caption beats a wrong one of that kind.

    Args:
        count: fresh scenes of ``split``, spread over the task families; each meets one wrong
            caption of every kind its caption has.

    Returns:
        Kind to accuracy, and ``mean``, over all pairs together.
    """
    rng = random.Random(f"near misses {split} {seed}")
    pictures, rows, hits = [], [], {}
    for k in range(count):
        spec = sample_spec(rng, split, TASKS[k % len(TASKS)])
        scene = sample_scene(spec, rng)
        said = {s for part in true_specs(scene) for s in part}
        groups: dict[str, list[str]] = {}
        for kind, miss in near_misses(spec):
            if miss not in said:
                groups.setdefault(kind, []).append(caption(miss))
        pictures.append(np.asarray(render(scene)))
        rows += [(k, kind, caption(spec), rng.choice(found)) for kind, found in groups.items()]
    images = torch.cat([embedder.image(to_pixels(b)) for b in _blocks(np.stack(pictures))])
    at, kinds, right, wrong = zip(*rows, strict=True)
    margin = (images[list(at)] * (embedder.text(right) - embedder.text(wrong))).sum(1)
    won = (margin > 0).numpy()
    for kind in sorted(set(kinds)):
        hits[kind] = proportion(won[np.asarray(kinds) == kind])
    return {**hits, "mean": proportion(won)}


@torch.no_grad()
def agreement_with_verifier(
    embedder: Embedder, policy: Policy, count: int, seed: int = 0, steps: int | None = None
) -> dict[str, Measured]:
    """How the cosine orders a generator's pictures of test prompts, judged by the verifier.

    Returns:
        ``auroc``: of the strict verdict over all prompts together; ``auroc_within``: over pairs of
        pictures of one prompt; ``spearman``: with partial credit.
    """
    each = 8
    per_task = max(1, count // (len(TASKS) * each))
    texts = [p for t in TASKS for p in prompts("test", t, per_task, seed) for _ in range(each)]
    values, strict, partial = [], [], []
    for start in range(0, len(texts), 48):
        part = texts[start : start + 48]
        seeds = range(seed * 10**6 + start, seed * 10**6 + start + len(part))
        media, _ = generate(policy, part, seeds, steps=steps, dtype=torch.bfloat16)
        pixels = media.data.float()
        values.append((embedder.image(pixels) * embedder.text(part)).sum(1).numpy())
        verdicts = verify(pixels.permute(0, 2, 3, 1).numpy(), part)
        strict += [v.strict for v in verdicts]
        partial += [v.partial if v.valid else 0.0 for v in verdicts]
    scores, passed = np.concatenate(values), np.asarray(strict)
    return {
        "auroc": auroc(scores, passed),
        "auroc_within": _within(scores, passed, texts),
        "spearman": spearman(scores, np.asarray(partial)),
    }


def _within(scores: np.ndarray, passed: np.ndarray, texts: list[str]) -> Measured:
    """Share of (passing, failing) pairs of one prompt that are ordered rightly."""
    wins = []
    names = np.asarray(texts)
    for text in dict.fromkeys(texts):
        rows = names == text
        good, bad = scores[rows & passed], scores[rows & ~passed]
        wins += (good[:, None] > bad[None, :]).ravel().tolist()
    return proportion(np.asarray(wins))


def _blocks(images: np.ndarray, size: int = 128) -> list[np.ndarray]:
    return np.array_split(images, -(-len(images) // size))
