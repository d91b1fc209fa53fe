"""Official folder layouts: what is written is where the authors look, and is read back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.layouts import LAYOUTS, LayoutError, layout_of
from mmalign.pictures import PictureError
from mmalign.protocols import Request
from mmalign.registry import UnknownNameError


def request(item: int, sample: int, task: str = "color", prompt: str = "") -> Request:
    """A request of prompt ``item``, with the record GenEval keeps."""
    text = prompt or f"a photo of thing {item}"
    record = {"tag": task, "include": [{"class": "thing", "count": 1}], "prompt": text}
    return Request(key=f"k{item}-{sample}", prompt=text, task=task, sample=sample, seed=0,
                   item=str(item), metadata=record)  # fmt: skip


@pytest.fixture
def pictures(tmp_path):
    """A picture of its own colour for each request."""

    def paint(requests):
        found = {}
        for n, r in enumerate(requests):
            path = tmp_path / "made" / f"{r.key}.png"
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (8, 6), (10 * n, 200, 255 - 10 * n)).save(path)
            found[r.key] = path
        return found

    return paint


EXPECTED = {
    "flat": ["k0-0.png", "k0-1.png", "k12-0.png", "k12-1.png"],
    "geneval": ["00000/samples/0000.png", "00000/samples/0001.png",
                "00012/samples/0000.png", "00012/samples/0001.png"],
    "unigenbench": ["0_0.png", "0_1.png", "12_0.png", "12_1.png"],
    "image_reward": ["0_0.png", "0_1.png", "12_0.png", "12_1.png"],
    "t2i_compbench": [f"color/samples/a photo of thing {p}_{n:06d}.png"
                      for p, n in ((0, 0), (0, 1), (12, 2), (12, 3))],
    "hpsv2": ["color/00000.jpg", "color/00012.jpg"],
    "wise": ["0.png", "12.png"],
    "reasonbench": ["color/0000.png", "color/0012.png"],
    "dpg": ["0.png", "12.png"],
}  # fmt: skip
SAMPLES = {"hpsv2": 1, "wise": 1, "reasonbench": 1, "dpg": 4}


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_written_as_the_authors_do_and_read_back(name, pictures, tmp_path):
    count = SAMPLES.get(name, 2)
    requests = [request(i, s) for i in (0, 12) for s in range(count)]
    made = pictures(requests)
    written = layout_of(name).write(tmp_path / "out", requests, made)
    names = sorted(p.relative_to(tmp_path / "out").as_posix() for p in written)
    assert names == sorted(EXPECTED[name])
    # In any order of requests, every one finds its own picture.
    found = layout_of(name).read(tmp_path / "out", requests[::-1])
    assert not found.problems and found.cells.keys() == made.keys()
    slack = 6 if name == "hpsv2" else 0  # JPEG
    for key, cell in found.cells.items():
        kept, original = (np.asarray(i, int) for i in (cell.open(), Image.open(made[key])))
        assert abs(kept - original).max() <= slack


def test_video_names(tmp_path):
    requests = [request(0, s, prompt="a cat, jumping") for s in range(3)]
    for s in range(3):
        path = tmp_path / "motion_smoothness" / f"a cat, jumping-{s}.mp4"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"video")
    found = layout_of("vbench").read(tmp_path, requests)
    assert [found.cells[r.key].path.name for r in requests] == [
        f"a cat, jumping-{s}.mp4" for s in range(3)
    ]
    assert not found.problems


def test_geneval_folders_of_other_writers(pictures, tmp_path):
    requests = [request(3, s) for s in range(2)]
    made = pictures(requests)
    folder = tmp_path / "theirs" / "0003" / "samples"
    folder.mkdir(parents=True)
    for n, path in zip((1, 2), made.values(), strict=True):  # counted from one, another padding
        (folder / f"{n:05d}.png").write_bytes(path.read_bytes())
    (folder.parent / "grid.png").write_bytes(path.read_bytes())  # theirs, and no sample
    (folder / "notes.png").write_bytes(path.read_bytes())
    found = layout_of("geneval").read(tmp_path / "theirs", requests)
    assert [found.cells[r.key].path.name for r in requests] == ["00001.png", "00002.png"]
    assert len(found.problems) == 1 and "notes.png" in found.problems[0]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"prompt": "a photo of a dog"}, "pictures of 'a photo of a dog', but item 3"),
        ({"prompt": "a photo of thing 3", "colour": "red"}, "unknown column 'colour'"),
    ],
)
def test_record_of_another_prompt_is_named_and_not_judged(record, said, pictures, tmp_path):
    requests = [request(3, 0), request(4, 0)]
    layout_of("geneval").write(tmp_path / "out", requests, pictures(requests))
    path = tmp_path / "out" / "00003" / "metadata.jsonl"
    assert json.loads(path.read_text())["tag"] == "color"
    path.write_text(json.dumps(record))
    found = layout_of("geneval").read(tmp_path / "out", requests)
    assert list(found.cells) == ["k4-0"] and said in found.problems[0]


def test_missing_and_strange_pictures(pictures, tmp_path):
    requests = [request(i, s) for i in range(2) for s in range(2)]
    layout = layout_of("unigenbench")
    layout.write(tmp_path / "out", requests, pictures(requests))
    (tmp_path / "out" / "1_0.png").rename(tmp_path / "out" / "7_0.png")
    found = layout.read(tmp_path / "out", requests)
    assert sorted(found.cells) == ["k0-0", "k0-1", "k1-1"]
    assert "1 pictures are of no request" in found.problems[0] and "7_0.png" in found.problems[0]


def test_grid_cells_are_row_by_row_and_must_divide(pictures, tmp_path):
    requests = [request(5, s) for s in range(4)]
    made = pictures(requests)
    (sheet,) = layout_of("dpg").write(tmp_path / "out", requests, made)
    with Image.open(sheet) as whole:
        assert whole.size == (16, 12) and whole.getpixel((8, 0)) == (10, 200, 245)
        assert whole.getpixel((0, 6)) == (20, 200, 235)
        whole.crop((0, 0, 15, 12)).save(sheet)
    cell = layout_of("dpg").read(tmp_path / "out", requests).cells["k5-0"]
    with pytest.raises(PictureError, match="15 x 12 pixels are no grid of 2 x 2"):
        cell.open()
    with pytest.raises(LayoutError, match="needs 4 pictures of each prompt"):
        layout_of("dpg").write(tmp_path / "other", requests[:3], made)


@pytest.mark.parametrize(
    ("name", "requests", "said"),
    [
        ("wise", [request(0, 0), request(0, 1)], "has 1 picture.s. of a prompt"),
        ("dpg", [request(0, 4)], "has 4 pictures of a prompt"),
        ("t2i_compbench", [request(0, 0, prompt="a and/or b")], "holds a '/'"),
        ("t2i_compbench", [request(0, 0, prompt="long " * 60)], "too long for a file name"),
        ("unigenbench", [request(0, 0), replace(request(0, 0), key="b")], "gives 'k0-0' and 'b'"),
        (
            "geneval",
            [Request(key="a", prompt="p", task="t", sample=0, seed=0)],
            "which 'a' has not",
        ),
        ("hpsv2", [replace(request(0, 0), item="x")], "but 'k0-0' is 'x'"),
    ],
)
def test_what_has_no_place_is_refused_before_writing(name, requests, said, pictures, tmp_path):
    with pytest.raises(LayoutError, match=said):
        layout_of(name).write(tmp_path / "out", requests, pictures(requests))
    assert not (tmp_path / "out").exists()


def test_folders_without_pictures(tmp_path):
    with pytest.raises(LayoutError, match="is not a folder"):
        layout_of("flat").read(tmp_path / "none", [request(0, 0)])
    with pytest.raises(LayoutError, match="holds no picture"):
        layout_of("flat").read(tmp_path, [request(0, 0)])
    with pytest.raises(UnknownNameError, match="geneval"):
        layout_of("genevals")
    assert set(EXPECTED) | {"vbench"} == set(LAYOUTS)


def test_docstring_names_every_layout():
    import eval.layouts

    text = Path(eval.layouts.__file__).read_text(encoding="utf-8").split('"""')[1]
    assert [n for n in LAYOUTS if f"``{n}``" not in text] == []
