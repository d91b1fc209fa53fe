"""The two networks behind GenEval: an object detector, and CLIP telling the colours of objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmalign.runtime.quiet import quiet
from mmalign.types import Media
from vision_rewards.embedding import load_embedder
from vision_rewards.geneval_prompts import canonical
from vision_rewards.geneval_rules import COLORS, Detection
from vision_rewards.weights import check_keys, digest

MASKED = ("mask2former", "maskformer")  # model types that give a mask for each object
GREY = 0x99 / 255  # painted around an object before its colour is told
COLOR_TEMPLATES = (
    "a photo of a {color} {name}",
    "a photo of a {color}-colored {name}",
    "a photo of a {color} object",
)

Found = Mapping[str, Sequence[Detection]]  # by class, most confident first


class Detector:
    """A transformers object detector or Mask2Former instance segmentation with its preprocessing.

    Args:
        checkpoint: hub name or folder with model and image processor.
        floor: detections of at most this confidence are dropped.
        batch_size: pictures of one forward pass.

    Raises:
        OSError: the checkpoint is not there and cannot be fetched.
        ValueError: it is no object detector, or lacks weights of one.
    """

    def __init__(self, checkpoint: str | Path, *, floor: float, batch_size: int = 8) -> None:
        from transformers import (
            AutoConfig,
            AutoImageProcessor,
            AutoModelForObjectDetection,
            AutoModelForUniversalSegmentation,
        )

        source = str(checkpoint)
        kind = AutoConfig.from_pretrained(source).model_type
        self.masked = kind in MASKED
        load = AutoModelForUniversalSegmentation if self.masked else AutoModelForObjectDetection
        with quiet():
            model, report = load.from_pretrained(
                source, dtype=torch.float32, output_loading_info=True
            )
        _check_parameters(model, report, source)
        self.model = model.eval().requires_grad_(False)
        self.processor = AutoImageProcessor.from_pretrained(source)
        self.names = {int(k): canonical(v) for k, v in self.model.config.id2label.items()}
        self.classes = tuple(sorted({n for n in self.names.values() if n != "n/a"}))
        self.floor, self.batch_size = floor, batch_size
        self.digest = digest(self.model)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> list[Found]:
        """Objects in each picture of ``(B, 3, H, W)``; boxes in pixels of the picture."""
        found: list[Found] = []
        for chunk in pixels.split(self.batch_size):
            inputs = self.processor(images=Media(chunk).to_pil(), return_tensors="pt")
            outputs = self.model(**inputs.to(pixels.device))
            size = (int(pixels.shape[-2]), int(pixels.shape[-1]))
            read = self._masks if self.masked else self._boxes
            found += [self._sorted(rows) for rows in read(outputs, size, len(chunk))]
        return found

    def _boxes(self, outputs: Any, size: tuple[int, int], count: int) -> list[list[Any]]:
        sizes = torch.tensor([size] * count)
        results = self.processor.post_process_object_detection(
            outputs, threshold=self.floor, target_sizes=sizes
        )
        return [
            [
                (label, Detection(tuple(box), score))
                for label, score, box in zip(
                    r["labels"].tolist(), r["scores"].tolist(), r["boxes"].tolist(), strict=True
                )
            ]
            for r in results
        ]

    def _masks(self, outputs: Any, size: tuple[int, int], count: int) -> list[list[Any]]:
        chances = outputs.class_queries_logits.softmax(-1)[..., :-1]
        return [
            instances(chances[k], outputs.masks_queries_logits[k], size, self.floor)
            for k in range(count)
        ]

    def _sorted(self, rows: Sequence[tuple[int, Detection]]) -> Found:
        found: dict[str, list[Detection]] = {}
        for label, one in sorted(rows, key=lambda r: -r[1].score):
            if one.score > self.floor:
                found.setdefault(self.names[label], []).append(one)
        return found


def _check_parameters(model: nn.Module, report: Mapping[str, Any], source: str) -> None:
    """Refuse a network of which transformers drew a part at random.

    Buffers may be missing (those of a training loss are), and what the network has no use for, an
    index table of older releases, is left alone.
    """
    own = dict(model.named_parameters())
    named = {
        "missing": sorted(k for k in report["missing_keys"] if k in own),
        "wrong shape": sorted(map(str, report.get("mismatched_keys", ()))),
    }
    check_keys(named, source)


def instances(
    chances: Tensor, masks: Tensor, size: tuple[int, int], floor: float
) -> list[tuple[int, Detection]]:
    """Mask2Former's queries as objects (Cheng et al., 2112.01527, appendix on inference).

    The ``Q`` likeliest (query, class) pairs are objects; their confidence is the probability of
    the class times the mean probability of the mask inside the mask.  Masks are enlarged to the
    picture before they are cut at one half, and boxes are their extents.

    Args:
        chances: class probabilities without "no object", ``(Q, C)``.
        masks: mask logits ``(Q, h, w)``.
        size: height and width of the picture.
        floor: objects of at most this confidence are left out.

    Returns:
        label and object, in no order.
    """
    top, index = chances.flatten().topk(len(chances))
    keep = top > floor  # the mask's factor is at most 1
    top, index = top[keep], index[keep]
    if not len(top):
        return []
    chosen = masks[index // chances.shape[1]].float()[None]
    logits = F.interpolate(chosen, size, mode="bilinear", align_corners=False)[0]
    inside = logits > 0
    area = inside.flatten(1).sum(1)
    sure = (logits.sigmoid() * inside).flatten(1).sum(1) / area.clamp(min=1)
    labels = (index % chances.shape[1]).tolist()
    return [
        (labels[k], Detection(_extent(inside[k]), float(top[k] * sure[k]), inside[k]))
        for k in range(len(labels))
        if area[k]
    ]


def _extent(mask: Tensor) -> tuple[float, float, float, float]:
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    corners = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    x0, y0, x1, y1 = (float(c) for c in corners)
    return x0, y0, x1, y1


class ColorClassifier:
    """Zero-shot CLIP over ten colours on a crop whose surroundings are painted grey.

    Args:
        checkpoint: see :func:`vision_rewards.embedding.load_embedder`.

    Raises:
        OSError: the checkpoint is not there and cannot be fetched.
    """

    def __init__(self, checkpoint: str | Path) -> None:
        self.embedder = load_embedder(checkpoint)
        self._classifiers: dict[str, Tensor] = {}

    @property
    def digest(self) -> str:
        """Names weights and preprocessing."""
        return f"{self.embedder.digest}-{self.embedder.preprocess.fingerprint}"

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """CLIP's towers."""
        return self.embedder.networks

    @torch.no_grad()
    def __call__(self, picture: Tensor, name: str, objects: Sequence[Detection]) -> list[str]:
        """The colour of each of ``objects``, all of class ``name``, in ``picture (3, H, W)``."""
        if not objects:
            return []
        crops = [self.embedder.preprocess(crop(picture, one)[None]) for one in objects]
        tower = self.embedder.image_tower
        dtype = next(tower.parameters()).dtype
        seen = F.normalize(tower(torch.cat(crops).to(dtype)).float(), dim=-1)
        best = (seen @ self._classifier(name).to(seen.device).T).argmax(1)
        return [COLORS[k] for k in best.tolist()]

    def _classifier(self, name: str) -> Tensor:
        """One direction for each colour, ``(10, dim)``: the mean over templates."""
        if name not in self._classifiers:
            texts = [t.format(color=c, name=name) for c in COLORS for t in COLOR_TEMPLATES]
            each = self.embedder.text(texts).reshape(len(COLORS), len(COLOR_TEMPLATES), -1)
            self._classifiers[name] = F.normalize(each.mean(1), dim=-1)
        return self._classifiers[name]


def crop(picture: Tensor, one: Detection) -> Tensor:
    """The object's box out of ``picture (3, H, W)``, grey outside its mask where it has one."""
    height, width = picture.shape[-2:]
    x0, y0, x1, y1 = (round(v) for v in one.box)
    x0, y0 = min(max(x0, 0), width - 1), min(max(y0, 0), height - 1)
    x1, y1 = min(max(x1, x0 + 1), width), min(max(y1, y0 + 1), height)
    if one.mask is not None:
        grey = torch.full_like(picture, GREY)
        picture = torch.where(one.mask.to(picture.device), picture, grey)
    return picture[:, y0:y1, x0:x1]
