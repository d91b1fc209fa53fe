"""Antialiased rendering of scenes with Pillow, and the dense layout labels that go with them."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from mmalign.shapes.grammar import COLORS, SHAPES
from mmalign.shapes.scene import Pattern, Placed, Scene

SUPERSAMPLE = 4
CIRCLE = 0.92  # of the radius: equal visual weight with the polygons
BAND = 0.36  # of the radius: width of a stripe; the shipped autoencoder blurs it


def render(scene: Scene, size: int = 64) -> Image.Image:
    """Render ``scene`` as an RGB image of ``size`` x ``size`` pixels.

    Drawn at four times the size and box-filtered, so outlines are antialiased.
    """
    if size < 8:
        raise ValueError(f"size {size} is too small to draw a scene; use 8 pixels or more")
    big = size * SUPERSAMPLE
    canvas = _gradient(scene, big)
    draw = ImageDraw.Draw(canvas)
    for placed in scene.objects:
        if placed.pattern is None:
            outline(draw, placed, big, placed.rgb)
        else:
            _textured(canvas, placed, placed.pattern)
    return canvas.reduce(SUPERSAMPLE)


def render_layout(scene: Scene, cells: int = 8, resolution: int = 64) -> np.ndarray:
    """Coverage of each grid cell by each shape and each colour.

    Returns:
        ``(cells, cells, len(SHAPES) + len(COLORS))`` uint8; 255 means the cell is fully covered.
    """
    index = Image.new("L", (resolution, resolution), 0)
    draw = ImageDraw.Draw(index)
    for i, placed in enumerate(scene.objects, 1):
        outline(draw, placed, resolution, i)
    labels = np.asarray(index)
    step = resolution // cells
    layout = np.zeros((cells, cells, len(SHAPES) + len(COLORS)), np.float32)
    for i, placed in enumerate(scene.objects, 1):
        cover = (labels == i).reshape(cells, step, cells, step).mean(axis=(1, 3))
        layout[..., SHAPES.index(placed.shape)] += cover
        layout[..., len(SHAPES) + list(COLORS).index(placed.color)] += cover
    return np.round(layout * 255).astype(np.uint8)


def outline(draw: ImageDraw.ImageDraw, placed: Placed, side: int, fill: object) -> None:
    """Draw one object's filled outline onto a canvas of ``side`` pixels."""
    x, y, r = placed.x * side, placed.y * side, placed.radius * side
    if placed.shape == "circle":
        r *= CIRCLE
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)  # type: ignore[arg-type]
        return
    points = [(x + r * px, y + r * py) for px, py in _turned(placed)]
    draw.polygon(points, fill=fill)  # type: ignore[arg-type]


def _textured(canvas: Image.Image, placed: Placed, pattern: Pattern) -> None:
    """Draw an object with its pattern, which moves, grows and turns with it."""
    side = canvas.width
    mask = Image.new("L", canvas.size, 0)
    outline(ImageDraw.Draw(mask), placed, side, 255)
    pixels = (np.arange(side) + 0.5) / side
    across = (pixels - placed.x)[None] / placed.radius
    down = (pixels - placed.y)[:, None] / placed.radius
    turn = math.radians(placed.rotation)
    u = math.cos(turn) * across + math.sin(turn) * down
    v = math.cos(turn) * down - math.sin(turn) * across
    cells = {
        "stripes": np.floor(u / BAND), "checks": np.floor(u / BAND) + np.floor(v / BAND),
        "rings": np.floor(np.hypot(u, v) / BAND), "halves": np.floor(u),
    }  # fmt: skip
    second = cells[pattern.kind] % 2 > 0
    two = (np.asarray(rgb, np.uint8) for rgb in (pattern.rgb, placed.rgb))
    colors = np.where(second[..., None], *two)
    canvas.paste(Image.fromarray(colors), mask=mask)


def bounds(placed: Placed) -> tuple[float, float, float, float]:
    """The tightest box around an object: left, top, right, bottom as shares of the side."""
    x, y, r = placed.x, placed.y, placed.radius
    if placed.shape == "circle":
        return x - r * CIRCLE, y - r * CIRCLE, x + r * CIRCLE, y + r * CIRCLE
    xs, ys = zip(*_turned(placed), strict=True)
    return x + r * min(xs), y + r * min(ys), x + r * max(xs), y + r * max(ys)


def _turned(placed: Placed) -> list[tuple[float, float]]:
    """Vertices of a polygon around its centre, in radii."""
    turn = math.radians(placed.rotation)
    cos, sin = math.cos(turn), math.sin(turn)
    return [(px * cos - py * sin, px * sin + py * cos) for px, py in unit_outline(placed.shape)]


@lru_cache
def unit_outline(shape: str) -> tuple[tuple[float, float], ...]:
    """Vertices of a shape inside the unit circle, y downwards."""
    if shape == "square":
        h = 0.78
        return ((-h, -h), (h, -h), (h, h), (-h, h))
    if shape == "triangle":
        return tuple(_polar(1.0, -90 + 120 * k) for k in range(3))
    if shape == "star":
        return tuple(_polar(1.0 if k % 2 == 0 else 0.42, -90 + 36 * k) for k in range(10))
    if shape == "cross":
        a, b = 0.95, 0.32
        return (
            (-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b),
            (b, a), (-b, a), (-b, b), (-a, b), (-a, -b), (-b, -b),
        )  # fmt: skip
    raise ValueError(f"shape {shape!r} has no polygon outline")


def _polar(radius: float, degrees: float) -> tuple[float, float]:
    return (radius * math.cos(math.radians(degrees)), radius * math.sin(math.radians(degrees)))


def _gradient(scene: Scene, side: int) -> Image.Image:
    first, second = scene.background
    if first == second:
        return Image.new("RGB", (side, side), first)
    # Two colours interpolated along the diagonal: a 2x2 image resized bilinearly would flatten at
    # its borders, so the ramp is computed.
    ramp = np.linspace(0.0, 1.0, side, dtype=np.float32)
    weight = (0.5 * (ramp[:, None] + ramp[None, :]))[..., None]
    start, end = np.asarray(first, np.float32), np.asarray(second, np.float32)
    return Image.fromarray(np.round(start + (end - start) * weight).astype(np.uint8))
