"""Reading pictures: every mode as RGB, damaged files as errors that name them, batches by size."""

from __future__ import annotations

import io
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign import pictures as reading
from mmalign.pictures import PictureError, batches, open_pictures, read_picture, to_rgb
from mmalign.types import Media

RED, WHITE = (255, 0, 0), (255, 255, 255)


def corner(image: Image.Image) -> tuple[int, ...]:
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


def saved(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


# --- modes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "RGB"])
def test_opaque_modes_keep_their_colour(mode):
    source = Image.new("RGB", (3, 2), WHITE if mode in ("1", "L") else RED)
    seen = corner(to_rgb(source.convert(mode)))
    assert np.allclose(seen, source.getpixel((0, 0)), atol=2)


def test_transparency_is_laid_over_white(tmp_path):
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    half = Image.new("RGBA", (2, 2), (0, 0, 0, 128))
    assert corner(to_rgb(clear)) == WHITE and corner(clear.convert("RGB")) == RED
    assert corner(to_rgb(half)) == (127, 127, 127)
    assert corner(to_rgb(Image.new("LA", (2, 2), (0, 0)))) == WHITE
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([255, 0, 0])
    assert corner(read_picture(saved(palette, tmp_path / "p.png", transparency=0))) == WHITE
    assert corner(read_picture(saved(palette, tmp_path / "q.png"))) == RED


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    deep = Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16))
    path = saved(deep, tmp_path / "deep.png")
    seen = read_picture(path)
    assert [seen.getpixel((x, 0)) for x in range(3)] == [(0,) * 3, (100,) * 3, (255,) * 3]
    wide = Image.fromarray(np.array([[0, 65535]], dtype=np.int32))
    assert to_rgb(wide).getpixel((1, 0)) == WHITE


def test_float_pixels_need_a_known_white(tmp_path):
    assert corner(to_rgb(Image.fromarray(np.full((1, 1), 0.2, np.float32)))) == (51, 51, 51)
    for value in (2.0, -0.5, np.nan):
        path = saved(Image.fromarray(np.full((1, 1), value, np.float32)), tmp_path / "f.tiff")
        with pytest.raises(PictureError, match=r"f\.tiff.*white level is unknown"):
            read_picture(path)
    with pytest.raises(PictureError, match="white level is unknown"):
        to_rgb(Image.fromarray(np.array([[70000]], dtype=np.int32)))


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (4, 2), "white")
    image.putpixel((0, 0), RED)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: a quarter turn clockwise makes it upright
    upright = read_picture(saved(image, tmp_path / "turned.png", exif=exif))
    assert upright.size == (2, 4) and upright.getpixel((1, 0)) == RED
    damaged = saved(image, tmp_path / "bad.png", exif=b"Exif\0\0not a tag")
    assert read_picture(damaged).size == (4, 2)


def test_of_an_animation_the_first_frame_is_read(tmp_path):
    first, second = Image.new("RGB", (4, 4), RED), Image.new("RGB", (4, 4), WHITE)
    path = saved(first, tmp_path / "a.gif", save_all=True, append_images=[second])
    assert corner(read_picture(path)) == RED


# --- damage -------------------------------------------------------------------------------------


def noise(size: tuple[int, int] = (40, 30), seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_a_truncated_file_is_an_error_that_names_it(tmp_path, form):
    buffer = io.BytesIO()
    noise().save(buffer, format=form)
    path = tmp_path / f"half.{form.lower()}"
    path.write_bytes(buffer.getvalue()[: buffer.tell() // 2])
    with pytest.raises(PictureError, match=rf"half\.{form.lower()}: "):
        read_picture(path)


def test_damaged_bytes_never_raise_anything_else(tmp_path):
    buffer = io.BytesIO()
    noise().save(buffer, format="PNG")
    rng, failed = np.random.default_rng(1), 0
    for trial in range(60):
        data = bytearray(buffer.getvalue())
        for place in rng.integers(0, len(data), 1 + trial % 20):
            data[place] = rng.integers(0, 256)
        path = tmp_path / "damaged.png"
        path.write_bytes(data)
        try:
            assert read_picture(path).mode == "RGB"
        except PictureError as error:
            failed += 1
            assert "damaged.png" in str(error)
    assert failed > 20


def test_what_is_no_picture_is_an_error_that_names_it(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").touch()
    for name in ("text.png", "empty.png"):
        with pytest.raises(PictureError, match=rf"{name}: not a picture"):
            read_picture(tmp_path / name)
    with pytest.raises(PictureError, match=r"gone\.png: FileNotFoundError"):
        read_picture(tmp_path / "gone.png")


def test_a_decompression_bomb_is_not_decoded(tmp_path, monkeypatch):
    path = saved(Image.new("1", (2000, 1000)), tmp_path / "big.png")
    with pytest.raises(PictureError, match=r"2,000,000 pixels, at most 1,000,000.*max_pixels"):
        read_picture(path, max_pixels=1_000_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500_000)  # Pillow refuses to open it
    with pytest.raises(PictureError, match=r"big\.png: .*decompression bomb.*raise max_pixels"):
        read_picture(path)
    ((rows, found),) = batches([path], 4, max_pixels=3_000_000)
    assert isinstance(found, Media) and rows == [0]
    assert Image.MAX_IMAGE_PIXELS == 500_000


# --- batches ------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Ten files in two sizes; the fourth is damaged."""
    for i in range(10):
        saved(noise((8, 8) if i % 3 else (5, 1), seed=i), tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes(b"\x89PNG")
    return tmp_path


@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
def test_batches_hold_every_picture_once_by_size(folder, batch_size):
    files = open_pictures(folder)
    seen: dict[int, torch.Tensor] = {}
    for rows, found in batches(files, batch_size):
        if isinstance(found, PictureError):
            assert rows == [3] and "3.png" in str(found)
            continue
        assert len(rows) == len(found) <= batch_size
        seen |= dict(zip(rows, found.data, strict=True))
    assert sorted(seen) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    for row, pixels in seen.items():
        expected = np.asarray(Image.open(files[row]), dtype=np.float32) / 255
        assert np.allclose(pixels.permute(1, 2, 0).numpy(), expected, atol=1e-6)


def test_pictures_of_rare_sizes_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(reading, "HELD_BATCHES", 2)
    images = [noise((4 + i, 4)) for i in range(30)]
    order = [rows for rows, _ in batches(images, 3)]
    assert sorted(row for rows in order for row in rows) == list(range(30))
    assert all(len(rows) == 1 for rows in order)
    asked: list[int] = []

    def counted():
        for i, image in enumerate(images):
            asked.append(i)
            yield image

    stream = batches(counted(), 3)
    next(stream)  # the first leaves when six are held, not when all thirty have been read
    assert len(asked) <= 6 + 3 + 1
    stream.close()


def test_files_are_read_ahead_once_and_in_other_threads(folder, monkeypatch):
    calls: list[tuple[str, str]] = []
    original = reading.read_picture

    def recorded(path, max_pixels):
        calls.append((Path(path).name, threading.current_thread().name))
        return original(path, max_pixels)

    monkeypatch.setattr(reading, "read_picture", recorded)
    files = [f for f in open_pictures(folder) if f.name != "3.png"]
    stream = batches(files, 2)
    next(stream)
    deadline = time.monotonic() + 5
    while len(calls) < 4 and time.monotonic() < deadline:  # nobody asks for more meanwhile
        time.sleep(0.005)
    assert 4 <= len(calls) <= 6
    list(stream)
    assert sorted(name for name, _ in calls) == [f.name for f in files]
    assert all(thread.startswith("decode") for _, thread in calls)


def test_an_abandoned_stream_stops_its_threads(folder):
    stream = batches(open_pictures(folder), 1)
    next(stream)
    stream.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("decode")]


def test_images_in_memory_may_repeat_and_fail(tmp_path):
    good, bad = noise((2, 2)), Image.fromarray(np.full((2, 2), 9.0, np.float32))
    found = {rows[0]: item for rows, item in batches([good, bad, good], 1)}
    assert isinstance(found[1], PictureError) and "mode F" in str(found[1])
    assert found[0].data.equal(found[2].data)


def test_bad_dials_are_explained():
    for options in ({"batch_size": 0}, {"batch_size": 1, "max_pixels": 0}):
        with pytest.raises(ValueError, match="must be 1 or more"):
            list(batches([noise()], **options))
