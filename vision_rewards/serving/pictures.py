"""Pictures and context as JSON: base64 PNG, read only after its size is known."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmalign.types import Media
from vision_rewards.serving.safety import Budget, TooLargeError, WireError

if TYPE_CHECKING:
    from PIL.Image import Image

_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")


def as_json(media: Media) -> list[Any]:
    """Each picture as base64 PNG, each video as the list of its frames; rounded to 8 bits."""
    if media.kind == "image":
        return [_base64_png(image) for image in media.to_pil()]
    return [[_base64_png(f) for f in Media(video).to_pil()] for video in media.data]


def from_json(given: Any, budget: Budget) -> Media:
    """Undo :func:`as_json`. Samples must agree in size (and videos in length).

    Raises:
        WireError: not a list of base64 PNGs (or of lists of them), or beyond the limits.
    """
    if not isinstance(given, list) or not given:
        raise WireError("'images' must be a list of base64 PNGs, or of lists of them (videos)")
    kinds = {type(item) for item in given}
    if kinds not in ({str}, {list}):
        raise WireError("'images' must be strings (pictures) or lists of strings (videos) alike")
    budget.limits.check_images(len(given))
    videos = kinds == {list}
    # Opening reads headers only: all sizes are known and paid for before anything is decompressed.
    samples = [[_opened(t, budget) for t in (s if videos else [s])] for s in given]
    sizes = {(len(s), *i.size) for s in samples for i in s}
    if len(sizes) != 1 or not all(samples):
        raise WireError("the pictures of a request must share a size, and its videos a length")
    flat = Media.from_pil([_decoded(image) for sample in samples for image in sample])
    return Media(flat.data.unflatten(0, (len(samples), -1))) if videos else flat


def pack(value: Any, tensors: dict[str, Tensor] | None = None, where: str = "context") -> Any:
    """``value`` as JSON; tensors and media are added to ``tensors`` and named.

    Raises:
        TypeError: neither plain data nor tensor, media or picture (tensors only where there is a
            place for them).
    """
    from PIL.Image import Image

    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(k): pack(v, tensors, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [pack(v, tensors, f"{where}.{i}") for i, v in enumerate(value)]
    if isinstance(value, Image):
        return {"$png": _base64_png(value)}
    if tensors is not None and isinstance(value, (Tensor, Media)):
        name = f"context.{len(tensors)}"
        data = value.data if isinstance(value, Media) else value
        tensors[name] = data.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"$media" if isinstance(value, Media) else "$tensor": name}
    raise TypeError(f"{where} is a {type(value).__name__}, which cannot be sent to a reward server")


def unpack(value: Any, budget: Budget, tensors: Mapping[str, Tensor] | None = None) -> Any:
    """Undo :func:`pack`.

    Raises:
        WireError: a picture that is none or is too large, or a name without its tensor.
    """
    if isinstance(value, list):
        return [unpack(v, budget, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value)) if len(value) == 1 else ""
    if tag == "$png":
        return _decoded(_opened(value[tag], budget))
    if tag in ("$tensor", "$media"):
        if not isinstance(value[tag], str) or value[tag] not in (tensors or {}):
            raise WireError(f"'context' names the tensor {value[tag]!r}, which is not there")
        found = (tensors or {})[value[tag]]
        return found if tag == "$tensor" else _media(found)
    return {k: unpack(v, budget, tensors) for k, v in value.items()}


def _media(tensor: Tensor) -> Media:
    try:
        return Media(tensor)
    except ValueError as error:
        raise WireError(f"'context': {error}") from error


def _base64_png(image: Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _opened(text: Any, budget: Budget) -> Image:
    """A PNG of which only the header has been read, and whose pixels the budget covers."""
    from PIL import Image

    try:
        data = base64.b64decode(text, validate=True)
        # No other format: every decoder that can be reached is one more to be attacked.
        image = Image.open(io.BytesIO(data), formats=("PNG",))
    except Image.DecompressionBombError as error:
        raise TooLargeError(f"a picture is refused: {error}") from error
    except (binascii.Error, TypeError, ValueError, OSError) as error:
        raise WireError(f"a picture is not a base64 PNG: {error}") from error
    if image.mode not in _MODES:
        raise WireError(
            f"a PNG of mode {image.mode} has more than 8 bits a channel; send safetensors instead"
        )
    budget.spend(image.width * image.height)
    return image


def _decoded(image: Image) -> Image:
    try:
        return image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:  # Pillow's for torn and damaged chunks
        raise WireError(f"a PNG is damaged: {error}") from error
