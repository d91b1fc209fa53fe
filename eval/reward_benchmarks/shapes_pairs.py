"""Two scenes that differ in one thing: what the prompt asks for, and a near miss; or in quality.

Everything that is not the difference stays: background, places, sizes, turns and shades.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from PIL import Image, ImageFilter

from mmalign.shapes import COLORS, SHAPES, Placed, PromptSpec, Scene
from mmalign.shapes.scene import BORDER, GAP, sample_scene

PLACES = 300  # places tried for one more object before another scene is drawn
SCENES = 200  # scenes tried for one pair
Pair = tuple[Scene, Scene]  # the right one and the wrong one
Change = Callable[[Scene, PromptSpec, random.Random], Scene | None]


def scene_pair(category: str, spec: PromptSpec, rng: random.Random, way: int = 0) -> Pair | None:
    """A scene that satisfies ``spec`` and one that does not, for the sake of ``category`` only.

    Args:
        way: which of the category's ways to be wrong, in turn.

    ``None`` where the specification leaves no room for such a difference.
    """
    change = CHANGES[category][way % len(CHANGES[category])]
    for _ in range(SCENES):
        scene = sample_scene(spec, rng)
        wrong = change(scene, spec, rng)
        if wrong is not None and scene.satisfies(spec) and not wrong.satisfies(spec):
            return scene, wrong
    return None


# --- what the prompt asks for -----------------------------------------------------------------


def _fewer(scene: Scene, spec: PromptSpec, rng: random.Random) -> Scene | None:
    """One object of the counted kind less."""
    return _without(scene, rng)


def _more(scene: Scene, spec: PromptSpec, rng: random.Random) -> Scene | None:
    """One object of the counted kind more; a fifth would not fit."""
    if len(scene.objects) > 3:
        return None
    return _with(scene, scene.objects[0].shape, spec.objects[0].color, rng)


def _color(scene: Scene, spec: PromptSpec, rng: random.Random) -> Scene | None:
    """One object in a colour that was not asked for."""
    place = rng.randrange(len(scene.objects))
    asked = {o.color for o in spec.objects} | {o.color for o in scene.objects}
    return _changed(scene, place, color=rng.choice([c for c in COLORS if c not in asked]))


def _shape(scene: Scene, spec: PromptSpec, rng: random.Random) -> Scene | None:
    """One object of a shape that was not asked for."""
    place = rng.randrange(len(scene.objects))
    asked = {o.shape for o in spec.objects}
    return _changed(scene, place, shape=rng.choice([s for s in SHAPES if s not in asked]))


def _relation(scene: Scene, spec: PromptSpec, rng: random.Random) -> Scene | None:
    """The two objects change places."""
    a, b = scene.objects
    moved = (_at(a, b), _at(b, a))
    return replace(scene, objects=moved)


def _extra(scene: Scene, spec: PromptSpec, rng: random.Random) -> Scene | None:
    """One object that was not asked for."""
    asked = {o.shape for o in spec.objects}
    return _with(scene, rng.choice([s for s in SHAPES if s not in asked]), None, rng)


def _missing(scene: Scene, spec: PromptSpec, rng: random.Random) -> Scene | None:
    """One of two objects is not there."""
    return _without(scene, rng)


def _swapped(scene: Scene, spec: PromptSpec, rng: random.Random) -> Scene | None:
    """The two objects exchange their colours."""
    a, b = scene.objects
    if a.color == b.color:
        return None
    other = replace(a, color=b.color, rgb=b.rgb), replace(b, color=a.color, rgb=a.rgb)
    return replace(scene, objects=other)


CHANGES: dict[str, tuple[Change, ...]] = {
    "count": (_fewer, _more),  # as many of each: more objects are not what is wrong
    "color": (_color,),
    "shape": (_shape,),
    "relation": (_relation,),
    "extra": (_extra,),
    "missing": (_missing,),
    "swapped": (_swapped,),
}
TASKS_OF = {
    "count": ("counting",),
    "color": ("colors", "color_attr"),
    "shape": ("colors", "two_object"),
    "relation": ("position",),
    "extra": ("single_object", "two_object", "color_attr"),
    "missing": ("two_object", "color_attr"),
    "swapped": ("color_attr",),
}


def _without(scene: Scene, rng: random.Random) -> Scene | None:
    if len(scene.objects) < 2:
        return None
    left = list(scene.objects)
    left.pop(rng.randrange(len(left)))
    return replace(scene, objects=tuple(left))


def _with(scene: Scene, shape: str, color: str | None, rng: random.Random) -> Scene | None:
    """One more object of the smallest present size where there is room for it."""
    name = color or rng.choice([c for c in COLORS if c not in {o.color for o in scene.objects}])
    radius = min(0.15, min(o.radius for o in scene.objects))
    edge = radius + BORDER
    for _ in range(PLACES):
        x, y = rng.uniform(edge, 1 - edge), rng.uniform(edge, 1 - edge)
        if all(
            (x - o.x) ** 2 + (y - o.y) ** 2 >= (radius + o.radius + GAP) ** 2 for o in scene.objects
        ):
            new = Placed(shape, name, x, y, radius, rng.uniform(-14, 14), COLORS[name])
            return replace(scene, objects=(*scene.objects, new))
    return None


def _changed(scene: Scene, place: int, **changes: str) -> Scene:
    objects = list(scene.objects)
    new = replace(objects[place], **changes)  # type: ignore[arg-type]
    if "color" in changes:
        new = replace(new, rgb=COLORS[changes["color"]])
    objects[place] = new
    return replace(scene, objects=tuple(objects))


def _at(placed: Placed, where: Placed) -> Placed:
    """The object in the place of another; sizes go with places, so that nothing overlaps."""
    return replace(placed, x=where.x, y=where.y, radius=where.radius)


# --- quality ----------------------------------------------------------------------------------


def blur(image: Image.Image, rng: random.Random) -> Image.Image:
    """Gaussian blur of 2 to 4 % of the side."""
    radius = rng.uniform(0.02, 0.04) * image.width
    return image.filter(ImageFilter.GaussianBlur(radius))


def noise(image: Image.Image, rng: random.Random) -> Image.Image:
    """Independent Gaussian noise, a standard deviation of 12 to 25 grey levels."""
    drawn = np.random.default_rng(rng.getrandbits(32))
    added = drawn.normal(0, rng.uniform(12, 25), (image.height, image.width, 3))
    return _from(np.asarray(image, float) + added)


def grid(image: Image.Image, rng: random.Random) -> Image.Image:
    """A regular pattern of 2 to 4 pixels, as of a decoder's upsampling."""
    period = rng.choice((2, 4))
    y, x = np.mgrid[: image.height, : image.width]
    wave = ((x // (period // 2) + y // (period // 2)) % 2) * 2.0 - 1.0
    return _from(np.asarray(image, float) + rng.uniform(8, 18) * wave[..., None])


def smear(image: Image.Image, rng: random.Random) -> Image.Image:
    """Patches copied to a wrong place, as where a generator breaks down."""
    pixels = np.asarray(image).copy()
    side = image.width
    size = side // 5
    for _ in range(4):
        (x, y), (u, v) = ((rng.randrange(side - size), rng.randrange(side - size)) for _ in "ab")
        pixels[v : v + size, u : u + size] = np.asarray(image)[y : y + size, x : x + size]
    return Image.fromarray(pixels)


SPOILERS: dict[str, Callable[[Image.Image, random.Random], Image.Image]] = {
    "blur": blur,
    "noise": noise,
    "grid": grid,
    "artefact": smear,
}


def _from(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(pixels.clip(0, 255)).astype(np.uint8))
