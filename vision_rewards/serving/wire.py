"""What travels between a reward server and its clients. Nothing in it can execute code.

A call and its scores take one of two forms, told by the content type:

* ``application/x-safetensors``: the media as a tensor ``media``, prompts and context as JSON in the
  metadata. Lossless: pictures travel as float, or as bytes where those stand for the same floats.
* ``application/json``: pictures as base64 PNG (8 bits a channel), for callers without tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmalign.types import Media, Score
from vision_rewards.serving.pictures import as_json, from_json, pack, unpack
from vision_rewards.serving.safety import Budget, Limits, WireError, parse_json

TENSORS = "application/x-safetensors"
JSON = "application/json"
CONTENT_TYPES = (TENSORS, JSON)
VERSION = "1"
_DTYPES = ("U8", "F16", "BF16", "F32", "F64")


@dataclass(frozen=True)
class Call:
    """The arguments of :meth:`mmalign.protocols.RewardModel.score`."""

    media: Media
    prompts: tuple[str, ...]
    context: tuple[Mapping[str, Any], ...] | None = None

    def __len__(self) -> int:
        return len(self.media)

    def split(self, size: int) -> list[Call]:
        """Consecutive calls of at most ``size`` samples."""
        if len(self) <= size:
            return [self]  # as it is, without a copy of the pixels
        parts = [slice(at, at + size) for at in range(0, len(self), size)]
        context = self.context
        return [
            Call(self.media[p], self.prompts[p], None if context is None else context[p])
            for p in parts
        ]


def encode_call(call: Call, content_type: str = TENSORS) -> bytes:
    """The body of a request.

    Raises:
        TypeError: the context holds something that is neither JSON, tensor, media nor picture.
    """
    if content_type == JSON:
        body = {"images": as_json(call.media), "prompts": list(call.prompts)}
        if call.context is not None:
            body["context"] = [pack(row) for row in call.context]
        return json.dumps(body).encode()
    from safetensors.torch import save

    tensors = {"media": compact(call.media.data)}
    metadata = {"version": VERSION, "prompts": json.dumps(list(call.prompts))}
    if call.context is not None:
        metadata["context"] = json.dumps([pack(row, tensors) for row in call.context])
    return bytes(save(tensors, metadata))


def decode_call(body: bytes, content_type: str, limits: Limits) -> Call:
    """Read a request; sizes are checked before anything is decoded.

    Raises:
        WireError: a body that is not what its content type says, or breaks a limit.
    """
    call = (_call_of_json if content_type == JSON else _call_of_tensors)(body, Budget(limits))
    if len(call.prompts) != len(call):
        raise WireError(f"{len(call.prompts)} prompts for {len(call)} samples; give one each")
    if call.context is not None and len(call.context) != len(call):
        raise WireError(f"{len(call.context)} contexts for {len(call)} samples; give one each")
    return call


def encode_score(score: Score, content_type: str = TENSORS) -> bytes:
    """The body of an answer; parts keep their order."""
    if content_type == JSON:
        parts = {n: _nullable(p) for n, p in score.parts.items()}
        value = _nullable(torch.where(score.valid, score.value, torch.nan))
        body = {"identity": score.identity, "value": value, "valid": score.valid.tolist()}
        return json.dumps({**body, "parts": parts, "notes": list(score.notes)}).encode()
    from safetensors.torch import save

    tensors = {"value": _plain(score.value), "valid": _plain(score.valid)}
    tensors |= {f"part.{i}": _plain(p) for i, p in enumerate(score.parts.values())}
    metadata = {
        "version": VERSION,
        "identity": score.identity,
        "parts": json.dumps(list(score.parts)),
        "notes": json.dumps(list(score.notes)),
    }
    return bytes(save(tensors, metadata))


def decode_score(body: bytes, content_type: str) -> Score:
    """Undo :func:`encode_score`; from JSON, what was not scored is NaN.

    Raises:
        WireError: the body is not an encoded score.
    """
    try:
        return (_score_of_json if content_type == JSON else _score_of_tensors)(body)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WireError(f"the answer is not an encoded score: {error}") from error


def compact(pixels: Tensor) -> Tensor:
    """Contiguous on the CPU, as uint8 where every fp32 value is exactly a byte over 255."""
    pixels = pixels.detach().cpu().contiguous()
    # A few values first: most pictures of a generator are not 8-bit, and that shows at once.
    if pixels.dtype != torch.float32 or _bytes(pixels.view(-1)[:4096]) is None:
        return pixels
    rounded = _bytes(pixels)
    return pixels if rounded is None else rounded


def _bytes(pixels: Tensor) -> Tensor | None:
    rounded = pixels.nan_to_num(0.0).clamp(0, 1).mul(255).round().to(torch.uint8)
    return rounded if _wide(rounded).equal(pixels) else None


def _wide(pixels: Tensor) -> Tensor:
    """Floats of transmitted pixels; the same division that opening an 8-bit picture makes."""
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels


def read_header(body: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensor entries and metadata of a safetensors body, without touching its tensors.

    Raises:
        WireError: there is no readable header.
    """
    size = int.from_bytes(body[:8], "little")
    if len(body) < 8 or size > len(body) - 8:
        raise WireError("the body is not safetensors: its header is longer than the body")
    header = parse_json(body[8 : 8 + size], "the safetensors header")
    metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(v, dict) for v in header.values()):
        raise WireError("the body is not safetensors: its header is not a table of tensors")
    if metadata.get("version") != VERSION:
        said = metadata.get("version")
        raise WireError(f"metadata 'version' is {said!r}; this side speaks version {VERSION!r}")
    return header, metadata


def _check_media(entries: Mapping[str, Any], budget: Budget) -> None:
    media = entries.get("media")
    if media is None:
        raise WireError(f"there is no tensor 'media', only {', '.join(entries) or 'nothing'}")
    dtype, shape = media.get("dtype"), media.get("shape")
    if dtype not in _DTYPES:
        raise WireError(f"'media' has dtype {dtype}; allowed are {', '.join(_DTYPES)}")
    whole = isinstance(shape, list) and all(isinstance(n, int) and n >= 0 for n in shape)
    if not whole or len(shape) not in (4, 5):
        raise WireError(f"'media' has shape {shape}; it must be (B, C, H, W) or (B, T, C, H, W)")
    frames = shape[1] if len(shape) == 5 else 1
    budget.limits.check_images(shape[0])
    budget.spend(shape[0] * frames * shape[-1] * shape[-2])


def _tensors(body: bytes) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return dict(load(body))
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise WireError(f"the body is not safetensors: {error}") from error


def _call_of_tensors(body: bytes, budget: Budget) -> Call:
    entries, metadata = read_header(body)
    _check_media(entries, budget)
    tensors = _tensors(body)
    prompts = parse_json(metadata.get("prompts", "null"), "metadata 'prompts'")
    context = parse_json(metadata.get("context", "null"), "metadata 'context'")
    media = Media(_wide(tensors["media"]))
    return Call(media, _strings(prompts), _rows(context, budget, tensors))


def _call_of_json(body: bytes, budget: Budget) -> Call:
    given = parse_json(body, "the body")
    if not isinstance(given, dict):
        raise WireError(f"the body holds a {type(given).__name__}; give images, prompts, context")
    unknown = sorted(given.keys() - {"images", "prompts", "context"})
    if unknown:
        raise WireError(f"unknown key {unknown[0]!r}; allowed are images, prompts, context")
    media = from_json(given.get("images"), budget)
    return Call(media, _strings(given.get("prompts")), _rows(given.get("context"), budget))


def _strings(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise WireError("'prompts' must be a list of strings, one for each sample")
    return tuple(value)


def _rows(
    value: Any, budget: Budget, tensors: Mapping[str, Tensor] | None = None
) -> tuple[Mapping[str, Any], ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
        raise WireError("'context' must be a list of objects, one for each sample")
    try:
        return tuple(unpack(row, budget, tensors) for row in value)
    except RecursionError as error:
        raise WireError("'context' is nested too deeply") from error


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _nullable(values: Tensor) -> list[float | None]:
    return [v if v == v and abs(v) != float("inf") else None for v in values.tolist()]


def _filled(values: Sequence[float | None]) -> Tensor:
    return torch.tensor([torch.nan if v is None else v for v in values], dtype=torch.float32)


def _score_of_json(body: bytes) -> Score:
    given = parse_json(body, "the answer")
    return Score(
        _filled(given["value"]),
        torch.tensor(given["valid"], dtype=torch.bool),
        {name: _filled(part) for name, part in given["parts"].items()},
        tuple(given["notes"]),
        str(given["identity"]),
    )


def _score_of_tensors(body: bytes) -> Score:
    _, metadata = read_header(body)
    tensors = _tensors(body)
    names = parse_json(metadata["parts"], "metadata 'parts'")
    return Score(
        tensors["value"],
        tensors["valid"],
        {name: tensors[f"part.{i}"] for i, name in enumerate(names)},
        tuple(parse_json(metadata["notes"], "metadata 'notes'")),
        metadata["identity"],
    )
