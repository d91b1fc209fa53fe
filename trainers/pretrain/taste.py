"""A taste that is written down: what the shapes world's synthetic preference rewards.

Three terms in [0, 1], equally weighted:

* **harmony**: mean over pairs of objects of ``|cos(hue difference)|``, 1 for equal and for
  complementary hues, 0 for hues a quarter of the circle apart; 0.5 for a single object;
* **balance**: ``exp(-(d / 0.12)^2)``, ``d`` the distance of the area-weighted centroid of all
  objects from the picture's centre, as a share of the side;
* **edges**: 1 for antialiased outlines, down to 0 for staircases or a blur of 1.4 pixels.

A judge prefers picture ``a`` to ``b`` with probability ``sigmoid((u_a - u_b) / TEMPERATURE)``
(Bradley-Terry), so labels are noisy as people's are.
"""

from __future__ import annotations

import colorsys
import math
import random
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from PIL import Image, ImageFilter

from mmalign.shapes import Scene, render
from mmalign.shapes.render import SUPERSAMPLE

TERMS = ("harmony", "balance", "edges")
BALANCE_RADIUS = 0.12  # of the side
BLUR = 1.4  # pixels at 64
TEMPERATURE = 0.15


@dataclass(frozen=True)
class Liked:
    """A picture and how much it pleases: the mean of its terms, and the terms."""

    picture: np.ndarray
    terms: tuple[float, float, float]

    @property
    def utility(self) -> float:
        """The mean of the three terms, in [0, 1]."""
        return sum(self.terms) / len(self.terms)


def harmony(scene: Scene) -> float:
    """Mean ``|cos(hue difference)|`` over pairs of objects; 0.5 for one object."""
    hues = [colorsys.rgb_to_hsv(*(c / 255 for c in o.rgb))[0] for o in scene.objects]
    pairs = [abs(math.cos(2 * math.pi * (a - b))) for a, b in combinations(hues, 2)]
    return sum(pairs) / len(pairs) if pairs else 0.5


def balance(scene: Scene) -> float:
    """How near the area-weighted centroid of the objects is to the centre."""
    weights = [o.radius**2 for o in scene.objects]
    x, y = (
        sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
        for values in ([o.x for o in scene.objects], [o.y for o in scene.objects])
    )
    return math.exp(-(((x - 0.5) ** 2 + (y - 0.5) ** 2) / BALANCE_RADIUS**2))


def draw(scene: Scene, rng: random.Random, size: int = 64) -> Liked:
    """Render ``scene`` with clean, jagged or blurred edges, as chance has it.

    A third of the pictures is clean; in the others a share, uniform in [0, 1], of the clean
    picture is replaced by a staircase rendering or by a blur.
    """
    clean = render(scene, size)
    share = max(0.0, rng.uniform(-0.5, 1.0))
    if rng.random() < 0.5:
        spoilt = render(scene, size * SUPERSAMPLE).resize((size, size), Image.Resampling.NEAREST)
    else:
        spoilt = clean.filter(ImageFilter.GaussianBlur(BLUR * size / 64))
    picture = np.asarray(Image.blend(clean, spoilt, share))
    return Liked(picture, (harmony(scene), balance(scene), 1.0 - share))


def prefers(first: float, second: float, rng: random.Random) -> bool:
    """Whether a noisy judge takes the picture of utility ``first`` over that of ``second``."""
    return rng.random() < 1 / (1 + math.exp((second - first) / TEMPERATURE))
