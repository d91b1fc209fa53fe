"""T2I-CompBench++'s relations in depth (3d_spatial): rules, and the network that sees depth.

With boxes ``A`` and ``B`` of the two objects and their mean nearness ``n`` (a depth map scaled to
[0, 1] over the picture, 1 the nearest)::

    in front of          p = min(1, IoU / 0.5) where n_A > n_B, else 0
    behind, hidden by    p = min(1, IoU / 0.5) where n_A < n_B, else 0

so that boxes have to overlap: one thing hides a part of the other. ``fixed`` takes ``p`` of the
most confident box of each object (of two objects of one class the two most confident). ``compat``
is the published script: with confidences ``c``, and no cut at one half as in 2-D::

    s = (c_A + c_B) / 4 + p / 2;  with one object c / 4

and its quirks: the map is read with x and y exchanged; an IoU of exactly one half gives 0; boxes
are looked through by falling confidence until both objects were met, and of an object met several
times until then the last box counts; two objects of one class are one box, so that ``p`` is 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from eval.benchmarks.compbench_rules import PhraseError, class_of, overlap
from mmalign.registry import unknown
from mmalign.types import Media
from vision_rewards.geneval_rules import Detection
from vision_rewards.weights import check_keys, digest

FRONT, BACK = "in front of", ("behind", "hidden by")
IOU = 0.5
PUBLISHED = "Intel/dpt-hybrid-midas"
Nearer = Literal["large", "small"]
NEARER: Mapping[str, Nearer] = {  # model types: what a near place has
    "dpt": "large", "depth_anything": "large", "prompt_depth_anything": "large",
    "zoedepth": "small", "glpn": "small", "depth_pro": "small",
}  # fmt: skip
UNUSED = "fusion_stage.layers.0.residual_layer1."  # nothing is there to be added in the first layer
Found = Mapping[str, Sequence[Detection]]
Pair = tuple[Detection | None, Detection | None]


def depth_request(prompt: str, classes: Sequence[str]) -> tuple[str, str, str]:
    """Relation and the classes of the two objects of a prompt.

    Raises:
        PhraseError: no known relation, or a thing that the detector does not know.
    """
    text = prompt.lower().rstrip(" .")
    for relation in (FRONT, *BACK):
        first, found, second = text.partition(f" {relation} ")
        if found:
            return relation, class_of(first, classes), class_of(second, classes)
    raise PhraseError(f"{prompt!r} holds none of the relations {', '.join((FRONT, *BACK))}")


def depth_score(
    relation: str, found: Found, names: tuple[str, str], near: Tensor, compat: bool = True
) -> float:
    """Score of a picture in [0, 1].

    Args:
        relation: as :func:`depth_request` gives it.
        found: objects by class, most confident first; boxes in pixels of the picture.
        names: classes of the two objects.
        near: nearness ``(H, W)`` of every pixel, in [0, 1].
        compat: as the published script computes it, see above.
    """
    a, b = _met(found, names) if compat else _surest(found, names)
    placed = 0.0
    if a is not None and b is not None:
        gap = _nearness(near, a, compat) - _nearness(near, b, compat)
        placed = _in_depth(relation, gap, overlap(a.box, b.box), compat)
    if not compat:
        return placed
    return sum(one.score for one in (a, b) if one is not None) / 4 + placed / 2


def _in_depth(relation: str, gap: float, shared: float, compat: bool) -> float:
    """``gap`` is how much nearer the first object is; NaN, of an empty box, is no relation."""
    if not (gap > 0 if relation == FRONT else gap < 0):
        return 0.0
    if compat and shared == IOU:
        return 0.0
    return min(1.0, shared / IOU)


def _nearness(near: Tensor, one: Detection, compat: bool) -> float:
    """Mean nearness in a box; ``compat`` takes x for rows, as the script does."""
    x0, y0, x1, y1 = (max(0, int(v)) for v in one.box)
    inside = near[x0:x1, y0:y1] if compat else near[y0:y1, x0:x1]
    return float(inside.mean())


def _surest(found: Found, names: tuple[str, str]) -> Pair:
    """The most confident box of each object; of one class twice, two boxes."""
    first, second = (list(found.get(name, ())) for name in names)
    if names[0] == names[1]:
        second = second[1:]
    return next(iter(first), None), next(iter(second), None)


def _met(found: Found, names: tuple[str, str]) -> Pair:
    """The last box of each object met before both were; of a lone one the first."""
    every = [(name, one) for name in dict.fromkeys(names) for one in found.get(name, ())]
    met: dict[str, Detection] = {}
    for name, one in sorted(every, key=lambda pair: -pair[1].score):
        met[name] = one
        if all(n in met for n in names):
            return met[names[0]], met[names[1]]
    first, second = (next(iter(found.get(name, ())), None) for name in names)
    return first, second


class DepthEstimator:
    """A depth estimation model of transformers with its preprocessing.

    Args:
        checkpoint: hub name or folder with model and image processor. The published one is MiDaS'
            DPT-Hybrid; the script shows it pictures of 480 x 480, here its own processor decides.
        nearer: whether near places have ``large`` values (disparity, as MiDaS gives) or ``small``
            ones (distance); ``None`` goes by the kind of model.
        batch_size: pictures of one forward pass.

    Raises:
        OSError: the checkpoint is not there and cannot be fetched.
        ValueError: it lacks weights, or nobody said what its values mean.
    """

    def __init__(
        self, checkpoint: str | Path, *, nearer: Nearer | None = None, batch_size: int = 8
    ) -> None:
        from transformers import AutoImageProcessor, AutoModelForDepthEstimation

        source = str(checkpoint)
        model, report = AutoModelForDepthEstimation.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True
        )
        own = dict(model.named_parameters())
        lacking = sorted(k for k in report["missing_keys"] if k in own and UNUSED not in k)
        check_keys({"missing": lacking}, source)
        with torch.no_grad():  # published files lack them; drawn at random they would name others
            for name in own:
                if UNUSED in name:
                    own[name].zero_()
        self.model = model.eval().requires_grad_(False)
        self.processor = AutoImageProcessor.from_pretrained(source)
        self.nearer = _meaning(self.model.config, source) if nearer is None else nearer
        self.batch_size, self.digest = batch_size, f"{digest(self.model)}-{self.nearer}"

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Nearness ``(B, H, W)`` in [0, 1] of pictures ``(B, 3, H, W)``; of a flat one 0."""
        found = []
        for chunk in pixels.split(self.batch_size):
            inputs = self.processor(images=Media(chunk).to_pil(), return_tensors="pt")
            found.append(self.model(**inputs.to(pixels.device)).predicted_depth.float())
        return nearness(torch.cat(found), (pixels.shape[-2], pixels.shape[-1]), self.nearer)


def nearness(depth: Tensor, size: tuple[int, int], nearer: Nearer = "large") -> Tensor:
    """Maps ``(B, h, w)`` scaled to [0, 1] each, 1 the nearest, and enlarged to ``size``."""
    low, high = depth.amin((1, 2), keepdim=True), depth.amax((1, 2), keepdim=True)
    scaled = (depth - low) / (high - low).clamp(min=1e-12)
    if nearer == "small":
        scaled = torch.where(high > low, 1 - scaled, scaled)
    return F.interpolate(scaled[:, None], size, mode="bilinear", align_corners=True)[:, 0]


def _meaning(config: Any, source: str) -> Nearer:
    kind = config.model_type
    if getattr(config, "depth_estimation_type", "relative") == "metric":
        return "small"
    if kind not in NEARER:
        raise ValueError(
            f"nobody said what the values of {source!r} (a {kind}) mean: give -o "
            "depth_nearer=large where near places have large values, or small"
        )
    return NEARER[kind]


def checked_nearer(nearer: str | None) -> Nearer | None:
    """``nearer``, if it is one.

    Raises:
        UnknownNameError: it is not.
    """
    if nearer is None or nearer == "large" or nearer == "small":
        return nearer  # type: ignore[return-value]
    raise unknown("depth_nearer of t2i_compbench", nearer, ("large", "small"))
