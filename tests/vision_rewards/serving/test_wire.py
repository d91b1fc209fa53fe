"""The format: what goes in comes out, to the bit; what is wrong is refused before it costs."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib

import pytest
import torch
from PIL import Image
from safetensors.torch import save

from mmalign.types import Media, Score
from vision_rewards.serving.safety import Limits, TooLargeError, WireError, authorised, is_loopback
from vision_rewards.serving.wire import (
    JSON,
    TENSORS,
    Call,
    compact,
    decode_call,
    decode_score,
    encode_call,
    encode_score,
)

LIMITS = Limits(max_images=8, max_pixels=10_000, max_bytes=1 << 20)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.equal(b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 4, 3, 5, 7), (0, 3, 5, 7), (2, 4, 1, 1)])
def test_floats_travel_unchanged(dtype, shape):
    media = Media((torch.rand(shape) * 1.5 - 0.2).to(dtype))
    call = Call(media, ("",) * shape[0])
    got = decode_call(encode_call(call), TENSORS, LIMITS)
    assert same_bits(got.media.data, media.data) and got.context is None


def test_not_a_number_travels_too():
    data = torch.rand(1, 3, 2, 2)
    data[0, 0, 0, 0], data[0, 1, 0, 0] = torch.nan, -torch.inf
    got = decode_call(encode_call(Call(Media(data), ("a",))), TENSORS, LIMITS)
    assert torch.equal(got.media.data.view(torch.int32), data.view(torch.int32))


def test_eight_bit_pictures_travel_as_bytes(kit):
    assert compact(kit.scenes.data).dtype == torch.uint8
    assert compact(torch.arange(256).view(1, 1, 16, 16) / 255).dtype == torch.uint8
    assert compact(kit.noise.data).dtype == torch.float32
    got = decode_call(encode_call(Call(kit.scenes, tuple(kit.captions))), TENSORS, Limits())
    assert same_bits(got.media.data, kit.scenes.data) and got.prompts == tuple(kit.captions)


def test_views_and_gradients_do_not_matter():
    data = torch.rand(4, 6, 6, 3, requires_grad=True).permute(0, 3, 1, 2)[1:3]
    got = decode_call(encode_call(Call(Media(data), ("a", "b"))), TENSORS, LIMITS)
    assert got.media.data.equal(data.detach()) and not got.media.data.requires_grad


def test_png_rounds_to_eight_bits(kit):
    call = Call(kit.noise, ("ä", "", "b", "日本", "c"))
    got = decode_call(encode_call(call, JSON), JSON, LIMITS)
    assert (got.media.data - kit.noise.data).abs().max() <= 0.5 / 255 + 1e-6
    assert got.prompts == call.prompts
    video = Media(kit.noise.data[:4].unflatten(0, (2, 2)))
    got = decode_call(encode_call(Call(video, ("a", "b")), JSON), JSON, LIMITS)
    assert got.media.kind == "video" and got.media.data.shape == video.data.shape
    assert (got.media.data - video.data).abs().max() <= 0.5 / 255 + 1e-6


def test_context_travels():
    row = {
        "plain": {"a": [1, 2.5, None, True, "x"]},
        "tensor": torch.arange(4.0),
        "picture": Image.new("RGB", (3, 2), (1, 2, 3)),
        "media": Media(torch.rand(1, 3, 4, 4)),
        "again": torch.zeros(2, dtype=torch.int64),
    }
    call = Call(Media(torch.rand(2, 3, 4, 4)), ("a", "b"), (row, {}))
    first, second = decode_call(encode_call(call), TENSORS, LIMITS).context
    assert second == {} and first["plain"] == row["plain"]
    assert same_bits(first["tensor"], row["tensor"]) and same_bits(first["again"], row["again"])
    assert same_bits(first["media"].data, row["media"].data)
    assert first["picture"].tobytes() == row["picture"].tobytes()


def test_context_that_cannot_travel_is_named():
    media = Media(torch.rand(1, 3, 4, 4))
    with pytest.raises(TypeError, match=r"context\.deep\.0 is a set"):
        encode_call(Call(media, ("a",), ({"deep": [{1}]},)))
    with pytest.raises(TypeError, match=r"context\.t is a Tensor"):
        encode_call(Call(media, ("a",), ({"t": torch.zeros(1)},)), JSON)


@pytest.mark.parametrize("kind", [TENSORS, JSON])
def test_scores_travel_unchanged(kind):
    value = torch.tensor([1 / 3, torch.nan, -1e-30, 1e30])
    valid = torch.tensor([True, False, True, True])
    parts = {"z": torch.rand(4), "a.b": torch.tensor([1.0, torch.nan, 0.0, 3.0])}
    score = Score(value, valid, parts, ("", "too dark \n 日本", "", ""), "judge@1")
    got = decode_score(encode_score(score, kind), kind)
    assert torch.equal(got.value.view(torch.int32), value.view(torch.int32))
    assert same_bits(got.valid, valid) and list(got.parts) == ["z", "a.b"]
    assert same_bits(got.parts["z"], parts["z"])
    assert torch.allclose(got.parts["a.b"], parts["a.b"], rtol=0, atol=0, equal_nan=True)
    assert got.notes == score.notes and got.identity == "judge@1"


@pytest.mark.parametrize("body", [b"", b"{}", b"\xff" * 40, b"\x02" + b"\0" * 7 + b"[]"])
@pytest.mark.parametrize("kind", [TENSORS, JSON])
def test_garbage_is_refused(body, kind):
    with pytest.raises(WireError):
        decode_call(body, kind, LIMITS)
    with pytest.raises(WireError):
        decode_score(body, kind)


def tensors(media: torch.Tensor, **metadata: str) -> bytes:
    return save({"media": media}, {"version": "1", "prompts": '["a"]', **metadata})


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (save({"media": torch.zeros(1, 3, 4, 4)}), "version"),
        (tensors(torch.zeros(1, 3, 4, 4), version="9"), "'9'; this side speaks"),
        (tensors(torch.zeros(1, 3, 4, 4, dtype=torch.int64)), "dtype I64; allowed are U8"),
        (tensors(torch.zeros(3, 4, 4)), r"shape \[3, 4, 4\]; it must be"),
        (tensors(torch.zeros(2, 3, 4, 4)), "1 prompts for 2 samples"),
        (tensors(torch.zeros(1, 3, 4, 4), prompts="[1]"), "list of strings"),
        (tensors(torch.zeros(1, 3, 4, 4), prompts="[" * 100_000), "not JSON"),
        (tensors(torch.zeros(1, 3, 4, 4), context="[1]"), "list of objects"),
        (tensors(torch.zeros(1, 3, 4, 4), context="[{}, {}]"), "2 contexts for 1"),
        (tensors(torch.zeros(1, 3, 4, 4), context='[{"a": {"$tensor": "no"}}]'), "'no', which is"),
        (tensors(torch.zeros(1, 3, 4, 4), context='[{"a": {"$media": []}}]'), "which is not"),
        (tensors(torch.zeros(9, 3, 4, 4)), "9 pictures in one request; at most 8"),
        (tensors(torch.zeros(1, 0, 200, 100)), "20000 pixels or more"),
        (tensors(torch.zeros(1, 3, 4, 4))[:-4], "not safetensors"),
        (save({"other": torch.zeros(1)}, {"version": "1"}), "no tensor 'media', only other"),
    ],
)
def test_wrong_tensors_are_refused(body, words):
    with pytest.raises(WireError, match=words):
        decode_call(body, TENSORS, LIMITS)


def png(image: Image.Image, kind: str = "PNG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return base64.b64encode(buffer.getvalue()).decode()


def bomb(side: int) -> str:
    """A well-formed PNG header of ``side`` x ``side`` pixels, with next to nothing behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 64))
    return base64.b64encode(data + chunk(b"IEND", b"")).decode()


SMALL = png(Image.new("RGB", (4, 4)))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"images": [SMALL]}, "'prompts' must be"),
        ({"images": [], "prompts": []}, "'images' must be a list"),
        ({"images": [SMALL, [SMALL]], "prompts": ["a", "b"]}, "alike"),
        ({"images": [3], "prompts": ["a"]}, "alike"),
        ({"images": ["!!"], "prompts": ["a"]}, "not a base64 PNG"),
        ({"images": [png(Image.new("RGB", (4, 4)), "JPEG")], "prompts": ["a"]}, "not a base64 PNG"),
        ({"images": [SMALL, png(Image.new("RGB", (5, 4)))], "prompts": ["a", "b"]}, "share a size"),
        ({"images": [[SMALL], [SMALL] * 2], "prompts": ["a", "b"]}, "its videos a length"),
        ({"images": [[]], "prompts": ["a"]}, "share a size"),
        ({"images": [png(Image.new("I;16", (4, 4)))], "prompts": ["a"]}, "more than 8 bits"),
        ({"images": [bomb(64)], "prompts": ["a"]}, "damaged"),
        ({"image": [SMALL], "prompts": ["a"]}, "unknown key 'image'"),
        ([1], "holds a list"),
    ],
)
def test_wrong_json_is_refused(content, words):
    with pytest.raises(WireError, match=words):
        decode_call(json.dumps(content).encode(), JSON, LIMITS)


def test_contexts_nested_beyond_reason_are_refused():
    """Deep enough for us, not deep enough for the JSON reader."""
    for depth in (600, 900, 970):
        context = "[" * depth + "]" * depth
        body = f'{{"images": ["{SMALL}"], "prompts": ["a"], "context": [{{"x": {context}}}]}}'
        try:
            decode_call(body.encode(), JSON, LIMITS)
        except WireError as error:
            assert "nested too deeply" in str(error) or "recursion" in str(error)
            break
    else:
        pytest.fail("a context of 970 lists in one another was read")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [101, 12_000, 50_000])
@pytest.mark.parametrize("place", ["images", "context"])
def test_bombs_are_refused_by_their_headers(side, place, monkeypatch):
    decoded = []
    convert = Image.Image.convert

    def spied(self, mode):
        decoded.append(self.size)
        return convert(self, mode)

    monkeypatch.setattr(Image.Image, "convert", spied)
    content = {"images": [SMALL], "prompts": ["a"], place: [bomb(side)]}
    if place == "context":
        content["context"] = [{"reference": {"$png": bomb(side)}}]
    with pytest.raises(TooLargeError):
        decode_call(json.dumps(content).encode(), JSON, LIMITS)
    assert (side, side) not in decoded


def test_many_small_bombs_are_one_large():
    reference = {"$png": png(Image.new("RGB", (90, 90)))}
    content = {"images": [SMALL], "prompts": ["a"], "context": [{"a": [reference, reference]}]}
    with pytest.raises(TooLargeError, match="at most 10000"):
        decode_call(json.dumps(content).encode(), JSON, LIMITS)


def test_token_and_address_checks():
    assert authorised(None, None) and authorised("Bearer s", "s")
    for header in (None, "", "s", "bearer s", "Bearer s2", "Bearer ", "Bearer \udcff"):
        assert not authorised(header, "s")
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.9.9.9", "::1", "[::1]")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "", "10.0.0.1", "localhost.evil.org")))
