"""Sees shapes-world pictures: segmentation, connected components, shape and colour of each object.

Backgrounds of the shapes world are unsaturated and objects are saturated, so chroma (max - min over
RGB) segments; each connected component is compared with rendered templates by intersection over
union, and its interior colour with the palette.  All pictures of a batch are processed together.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from mmalign.shapes.grammar import COLORS, SHAPES
from mmalign.shapes.render import outline
from mmalign.shapes.scene import Placed

CHROMA = 0.22  # between the background's (at most 0.07) and the palette's (at least 0.43)
MIN_AREA = 0.005  # of the picture; smaller components are specks, not objects
MIN_IOU = 0.72  # with the best template; below it a component is an object of no known shape
MAX_COLOR_DISTANCE = 0.30  # Euclidean in RGB; above it the colour is none of the palette's
MIN_UNIFORM = 0.75  # share of interior pixels nearest to the object's own colour
GRID = 24  # template resolution
MAX_SIDE = 96  # larger pictures are box-filtered down first: nothing here needs more pixels

_PALETTE = np.asarray(list(COLORS.values()), np.float32) / 255
_NAMES = tuple(COLORS)


@dataclass(frozen=True)
class Detection:
    """One connected component.

    ``shape`` / ``color`` are ``None`` where no template / palette entry is near enough.  ``x, y``
    are the centroid and ``area`` the area, as shares of the picture.  ``shape_iou`` holds the best
    template overlap per shape, ``color_distance`` the RGB distance per palette colour.  ``box`` is
    left, top, right, bottom, as shares of width and height.
    """

    shape: str | None
    color: str | None
    x: float
    y: float
    area: float
    shape_iou: np.ndarray
    color_distance: np.ndarray
    uniform: float
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class View:
    """What was seen in one picture; ``problem`` says why a picture cannot be judged, if so."""

    detections: tuple[Detection, ...]
    problem: str | None = None


def look(images: np.ndarray) -> list[View]:
    """Detect the objects of a batch of pictures.

    Args:
        images: ``(B, H, W, 3)`` float in [0, 1]; non-finite pictures are reported, not judged.
    """
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images must be (B, H, W, 3), got shape {images.shape}")
    if not len(images):
        return []
    height, width = images.shape[1:3]
    if min(height, width) < _factor(height, width):
        said = f"a picture of {width} x {height} pixels is too thin to show an object"
        return [View((), said)] * len(images)
    known = np.isfinite(images)
    finite = known.reshape(len(images), -1).all(axis=1)
    pixels = _shrink(np.clip(images if finite.all() else np.where(known, images, 0.0), 0.0, 1.0))
    mask = _chroma(pixels) > CHROMA
    labels, count = ndimage.label(mask, structure=_WITHIN_PICTURE)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    pixel_count = mask.shape[1] * mask.shape[2]
    large = np.flatnonzero(sizes >= MIN_AREA * pixel_count)
    large = large[large > 0]
    problems = _problems(mask, labels, sizes, finite)
    found: list[list[Detection]] = [[] for _ in images]
    if len(large):
        for picture, detection in _describe(pixels, labels, large, sizes):
            found[picture].append(detection)
    return [View(tuple(d), p) for d, p in zip(found, problems, strict=True)]


_WITHIN_PICTURE = np.zeros((3, 3, 3), bool)  # 4-connected in the plane, never across the batch
_WITHIN_PICTURE[1] = [[0, 1, 0], [1, 1, 1], [0, 1, 0]]


def _chroma(pixels: np.ndarray) -> np.ndarray:
    # Elementwise: a reduction over an axis of three is several times slower.
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    highest = np.maximum(np.maximum(red, green), blue)
    return np.asarray(highest - np.minimum(np.minimum(red, green), blue))


def _factor(height: int, width: int) -> int:
    """By how much a picture is shrunk before it is looked at."""
    return -(-max(height, width) // MAX_SIDE)


def _shrink(pixels: np.ndarray) -> np.ndarray:
    factor = _factor(*pixels.shape[1:3])
    if factor == 1:
        return pixels.astype(np.float32)
    h, w = (s // factor * factor for s in pixels.shape[1:3])
    blocks = pixels[:, :h, :w].reshape(len(pixels), h // factor, factor, w // factor, factor, 3)
    return np.asarray(blocks.mean(axis=(2, 4)), np.float32)


def _problems(
    mask: np.ndarray, labels: np.ndarray, sizes: np.ndarray, finite: np.ndarray
) -> list[str | None]:
    cover = mask.mean(axis=(1, 2))
    speck = (sizes < MIN_AREA * mask.shape[1] * mask.shape[2])[labels] & mask
    specks = speck.mean(axis=(1, 2))
    out: list[str | None] = []
    for ok, c, s in zip(finite, cover, specks, strict=True):
        if not ok:
            out.append("the picture holds NaN or infinite values")
        elif c > 0.85:
            out.append(f"no background: {c:.0%} of the picture is saturated")
        elif s > 0.03 and s > 0.35 * c:
            out.append(f"noise: {s / c:.0%} of the saturated pixels are specks")
        else:
            out.append(None)
    return out


def _describe(
    pixels: np.ndarray, labels: np.ndarray, ids: np.ndarray, sizes: np.ndarray
) -> list[tuple[int, Detection]]:
    slices = ndimage.find_objects(labels)
    boxes = [slices[i - 1] for i in ids]
    ious = _shape_ious(labels, ids, boxes)
    distances, uniform = _colors(pixels, labels, ids)
    centres = _centres(labels, ids)
    height, width = labels.shape[1:]
    out = []
    for k, i in enumerate(ids):
        best, near = int(ious[k].argmax()), int(distances[k].argmin())
        known = ious[k, best] >= MIN_IOU
        plain = distances[k, near] <= MAX_COLOR_DISTANCE and uniform[k] >= MIN_UNIFORM
        detection = Detection(
            shape=SHAPES[best] if known else None,
            color=_NAMES[near] if plain else None,
            x=float((centres[k, 1] + 0.5) / width),
            y=float((centres[k, 0] + 0.5) / height),
            area=float(sizes[i] / (height * width)),
            shape_iou=ious[k],
            color_distance=distances[k],
            uniform=float(uniform[k]),
            box=_box(boxes[k], height, width),
        )
        out.append((boxes[k][0].start, detection))
    return out


def _box(found: tuple[slice, ...], height: int, width: int) -> tuple[float, float, float, float]:
    _, rows, cols = found
    return cols.start / width, rows.start / height, cols.stop / width, rows.stop / height


def _centres(labels: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Centroid of each component as ``(row, column)``, in pixels."""
    picture, row, col = np.nonzero(labels)
    owner = labels[picture, row, col]
    sums = [np.bincount(owner, weights=v)[ids] for v in (row, col)]
    return np.stack(sums, axis=1) / np.bincount(owner)[ids, None]


def _shape_ious(labels: np.ndarray, ids: np.ndarray, boxes: list[tuple[slice, ...]]) -> np.ndarray:
    """Best template overlap per component and shape, ``(N, len(SHAPES))``."""
    crops = _normalised_crops(labels, ids, boxes).reshape(len(ids), -1)
    templates, owner = _templates()
    inter = crops @ templates.T
    union = (crops**2).sum(1)[:, None] + (templates**2).sum(1)[None] - inter
    iou = inter / union
    return np.stack([iou[:, owner == s].max(1) for s in range(len(SHAPES))], axis=1)


def _normalised_crops(
    labels: np.ndarray, ids: np.ndarray, boxes: list[tuple[slice, ...]]
) -> np.ndarray:
    """Each component's mask, centred in a square around its bounding box, on a common grid."""
    bounds = np.asarray(
        [(b[0].start, b[1].start, b[1].stop, b[2].start, b[2].stop) for b in boxes], np.float64
    )
    picture, top, bottom, left, right = bounds.T
    side = np.maximum(bottom - top, right - left)
    ticks = (np.arange(2 * GRID) + 0.5) / (2 * GRID) - 0.5
    rows = np.floor(((top + bottom) / 2)[:, None] + side[:, None] * ticks).astype(int)
    cols = np.floor(((left + right) / 2)[:, None] + side[:, None] * ticks).astype(int)
    height, width = labels.shape[1:]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((cols >= 0) & (cols < width))[:, None]
    rows, cols = rows.clip(0, height - 1), cols.clip(0, width - 1)
    sampled = labels[picture.astype(int)[:, None, None], rows[:, :, None], cols[:, None, :]]
    mask = ((sampled == ids[:, None, None]) & inside).astype(np.float32)
    return mask.reshape(len(ids), GRID, 2, GRID, 2).mean(axis=(2, 4))


def _colors(
    pixels: np.ndarray, labels: np.ndarray, ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """RGB distance of each component's interior to the palette, and how uniform the interior is."""
    inner = labels * ndimage.binary_erosion(labels > 0, structure=_WITHIN_PICTURE)
    thin = ~np.isin(ids, np.unique(inner))
    if thin.any():  # nothing is left of a very thin component: use all of it
        inner = np.where(np.isin(labels, ids[thin]), labels, inner)
    index = np.full(int(labels.max()) + 1, -1)
    index[ids] = np.arange(len(ids))
    picture, row, col = np.nonzero(inner)
    component = index[inner[picture, row, col]]
    keep = component >= 0
    component, colors = component[keep], pixels[picture, row, col][keep]
    total = np.bincount(component, minlength=len(ids))[:, None]
    sums = [np.bincount(component, colors[:, c], len(ids)) for c in range(3)]
    distance = np.linalg.norm((np.stack(sums, axis=1) / total)[:, None] - _PALETTE, axis=-1)
    # |p|^2 is common to all palette entries, so it does not matter for which is nearest.
    nearest = ((_PALETTE**2).sum(1) - 2 * colors @ _PALETTE.T).argmin(1)
    agree = nearest == distance.argmin(1)[component]
    return distance, np.bincount(component, agree, len(ids)) / total[:, 0]


@lru_cache
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """Templates ``(M, GRID * GRID)`` of every shape at several rotations, and the shape of each."""
    side = 64
    masks, owner = [], []
    for s, shape in enumerate(SHAPES):
        turns = (0,) if shape == "circle" else range(-16, 17, 4)
        for turn in turns:
            canvas = Image.new("L", (side, side), 0)
            placed = Placed(shape, "red", 0.5, 0.5, 0.4, turn, (0, 0, 0))
            outline(ImageDraw.Draw(canvas), placed, side, 1)
            labels = np.asarray(canvas, np.int64)[None]
            boxes = ndimage.find_objects(labels)
            masks.append(_normalised_crops(labels, np.asarray([1]), boxes).ravel())
            owner.append(s)
    return np.stack(masks), np.asarray(owner)
