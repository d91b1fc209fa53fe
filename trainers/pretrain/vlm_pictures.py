"""Pictures to ask the small VLM about: rendered scenes and the shipped generator's own attempts.

What is true of a picture is read off it by the verifier's eyes (:func:`~vision_rewards.
shapes_vision.look`), the same for both, so that a generator's malformed star is a malformed star
and not the star that was asked for.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mmalign.runtime.files import atomic_path
from mmalign.runtime.log import say
from mmalign.shapes import (
    COLORS,
    RELATIONS,
    SHAPES,
    TASKS,
    CaptionError,
    ObjectSpec,
    PromptSpec,
    caption,
    parse,
    render,
    render_layout,
    sample_scene,
    sample_spec,
    split_of,
)
from mmalign.shapes.grammar import INVERSE, MAX_OBJECTS
from mmalign.shapes.splits import held_out_pair, trainable_pair
from vision_rewards.shapes_vision import Detection, View, look

HELD_OUT_COLORS = tuple(c for c in COLORS if any(held_out_pair((c, s)) for s in SHAPES))
CLEAR_OFFSET = 0.07  # of the side; nearer to level than this, "above" is a matter of taste


@dataclass(frozen=True)
class Picture:
    """One picture, what is seen in it, and the specification it was made for.

    ``pixels`` is ``(H, W, 3)`` uint8; ``layout`` the coverage map of a rendered scene
    (:func:`~mmalign.shapes.render_layout`), ``None`` for a generated one. The colours of a
    ``recoloured`` picture (:func:`recolour`) have no name.
    """

    pixels: np.ndarray
    view: View
    spec: PromptSpec
    layout: np.ndarray | None = None
    recoloured: bool = False

    @property
    def clear(self) -> bool:
        """Whether every object's shape and colour can be named."""
        seen = self.view.detections
        known = all(d.shape is not None and d.color is not None for d in seen)
        return self.view.problem is None and known and 0 < len(seen) <= MAX_OBJECTS


def render_pictures(
    specs: Sequence[PromptSpec], rng: random.Random, split: str = "train"
) -> list[Picture]:
    """A freshly drawn scene for each specification; held-out pairs stay out of ``train``."""
    allow = trainable_pair if split == "train" else None
    scenes = [sample_scene(s, rng, allow) for s in specs]
    pixels = np.stack([np.asarray(render(s)) for s in scenes])
    views = look(pixels.astype(np.float32) / 255)
    rows = zip(scenes, specs, pixels, views, strict=True)
    return [Picture(p, view, spec, render_layout(scene)) for scene, spec, p, view in rows]


def recolour(picture: Picture, rng: random.Random) -> Picture:
    """``picture`` with its channels mixed at random: shapes without the colours they came in.

    Some pairs of colour and shape are held out of training. A tower that sees shapes in their own
    colours only learns which shape a colour never has, and is wrong on exactly the held-out pairs
    (measured: 11 % of their patches right, 90 % of the others). So it learns the shapes of objects
    in the colours of held-out pairs from recoloured pictures, whose colours it is not told; there
    a held-out pair may come up, nameless.
    """
    mixed = picture.pixels.astype(np.float32) / 255 @ _mixture(rng).T
    stretched = (0.5 + (mixed - 0.5) * rng.uniform(1.0, 1.3)).clip(0, 1)
    pixels = (stretched * 255).round().astype(np.uint8)
    return replace(picture, pixels=pixels, recoloured=True)


def _mixture(rng: random.Random) -> np.ndarray:
    """A 3 x 3 matrix between two orders of the channels; its rows sum to 1."""
    share, eye = rng.random(), np.eye(3, dtype=np.float32)
    first, second = (eye[rng.sample(range(3), 3)] for _ in range(2))
    return np.asarray(share * first + (1 - share) * second)


def generate_pictures(
    path: Path, count: int, split: str = "train", seed: int = 0, batch_size: int = 50
) -> list[Picture]:
    """``count`` pictures of the shipped generator, kept in ``path``; its failures are the point.

    Steps and guidance vary from batch to batch, from hasty and unguided to the recommended.
    """
    if not path.exists():
        _generate(path, count, split, seed, batch_size)
    stored = np.load(path)
    pixels, prompts = stored["images"][:count], json.loads(str(stored["prompts"]))
    views = look(pixels.astype(np.float32) / 255)
    rows = zip(pixels, views, prompts, strict=False)
    return [Picture(p, v, parse(c)) for p, v, c in rows if not _holds_held_out(v, split)]


def _generate(path: Path, count: int, split: str, seed: int, batch_size: int) -> None:
    from mmalign.policies.load import load_policy
    from mmalign.sampling import generate

    policy = load_policy("shapes-flow")
    rng = random.Random(f"generated {split} {seed}")
    images: list[np.ndarray] = []
    prompts: list[str] = []
    while len(prompts) < count:
        specs = [sample_spec(rng, split, rng.choice(TASKS)) for _ in range(batch_size)]
        texts = [caption(s) for s in specs]
        seeds = [rng.randrange(2**31) for _ in specs]
        steps, scale = rng.choice((4, 6, 8, 12)), rng.choice((1.0, 1.5, 2.0, 3.0))
        media, _ = generate(policy, texts, seeds, steps=steps, guidance_scale=scale)
        pixels = (media.data.clamp(0, 1) * 255).round().byte()
        images.append(pixels.permute(0, 2, 3, 1).cpu().numpy())
        prompts += texts
        if len(images) % 10 == 0:
            say(f"{len(prompts)} of {count} pictures generated")
    with atomic_path(path) as partial, partial.open("wb") as file:
        np.savez(file, images=np.concatenate(images), prompts=json.dumps(prompts))


def _holds_held_out(view: View, split: str) -> bool:
    pairs = [(d.color or "", d.shape or "") for d in view.detections]
    return split == "train" and any(held_out_pair(p) for p in pairs)


# --- specifications -----------------------------------------------------------------------------


def askable(spec: PromptSpec, view: View, split: str) -> bool:
    """Whether a caption may be asked about: of the right split, and no near-tie of position."""
    if spec.task == "single_object":
        return True
    if (split_of(spec) == "train") != (split == "train"):
        return False
    return spec.relation is None or not _near_tie(spec, view.detections)


def _near_tie(spec: PromptSpec, seen: Sequence[Detection]) -> bool:
    if len(seen) != 2:
        return False
    a, b = seen
    offset = a.x - b.x if spec.relation in ("left", "right") else a.y - b.y
    return abs(offset) < CLEAR_OFFSET


def true_specs(seen: Sequence[Detection]) -> list[PromptSpec]:
    """Specifications that a picture with exactly these (named) objects satisfies."""
    if len({d.shape for d in seen}) == 1:
        shape, colors = str(seen[0].shape), {d.color for d in seen}
        named = [None, *(colors if len(colors) == 1 else ())]
        return [PromptSpec((ObjectSpec(shape, c, len(seen)),)) for c in named]
    if len(seen) != 2:
        return []
    a, b = (ObjectSpec(str(d.shape), d.color) for d in seen)
    bare_a, bare_b = ObjectSpec(a.shape), ObjectSpec(b.shape)
    pairs = [(a, b), (bare_a, b), (a, bare_b), (bare_a, bare_b)]
    specs = [PromptSpec(p) for p in [*pairs, *[p[::-1] for p in pairs]]]
    across = "left" if seen[0].x < seen[1].x else "right"
    down = "above" if seen[0].y < seen[1].y else "below"
    for first, second in ((a, b), (bare_a, bare_b)):
        for relation in (across, down):
            specs.append(PromptSpec((first, second), relation))
            specs.append(PromptSpec((second, first), INVERSE[relation]))
    return specs


def spoil(spec: PromptSpec, rng: random.Random) -> PromptSpec:
    """A near miss of ``spec``: one colour, shape, count or relation changed, or colours swapped."""
    while True:
        try:
            changed = rng.choice(_SPOILERS)(spec, rng)
        except CaptionError:  # a change the grammar cannot express, such as two equal shapes
            continue
        if changed is not None and changed != spec:
            return changed


def _other_color(spec: PromptSpec, rng: random.Random) -> PromptSpec | None:
    index = rng.randrange(len(spec.objects))
    target = spec.objects[index]
    if target.color is None:
        return None
    return _with(spec, index, replace(target, color=rng.choice(list(COLORS))))


def _other_shape(spec: PromptSpec, rng: random.Random) -> PromptSpec:
    index = rng.randrange(len(spec.objects))
    return _with(spec, index, replace(spec.objects[index], shape=rng.choice(SHAPES)))


def _other_count(spec: PromptSpec, rng: random.Random) -> PromptSpec | None:
    if len(spec.objects) == 2:
        return PromptSpec((rng.choice(spec.objects),))
    return _with(spec, 0, replace(spec.objects[0], count=rng.randint(1, MAX_OBJECTS)))


def _swapped(spec: PromptSpec, rng: random.Random) -> PromptSpec | None:
    if len(spec.objects) == 1:
        return None
    a, b = spec.objects
    if a.color != b.color:
        return PromptSpec((replace(a, color=b.color), replace(b, color=a.color)), spec.relation)
    return PromptSpec((b, a), spec.relation)


def _other_relation(spec: PromptSpec, rng: random.Random) -> PromptSpec | None:
    if spec.relation is None:
        return None
    opposite = rng.random() < 0.6
    relation = INVERSE[spec.relation] if opposite else rng.choice(RELATIONS)
    return PromptSpec(spec.objects, relation)


def _with(spec: PromptSpec, index: int, changed: ObjectSpec) -> PromptSpec:
    objects = [*spec.objects[:index], changed, *spec.objects[index + 1 :]]
    return PromptSpec(tuple(objects), spec.relation)


_SPOILERS = (_other_color, _other_shape, _other_count, _swapped, _other_relation, _other_relation)
