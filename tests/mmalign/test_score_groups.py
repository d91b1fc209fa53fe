"""Scoring rewards that compare pictures, folders inside folders, and where scoring happens."""

from __future__ import annotations

import json
import os

import pytest
import torch
from PIL import Image

import mmalign
from mmalign import api, scoring
from mmalign.captions import captions
from mmalign.cli import main
from mmalign.commands.common import CommandError, image_files, short_names
from mmalign.pictures import whole_groups
from mmalign.prompts import PromptFileError
from mmalign.reward_info import RewardInfo
from mmalign.runtime.device import BackendError
from mmalign.types import Media, Score
from vision_rewards.compose import build
from vision_rewards.function import FunctionReward

PROMPTS = ["a", "b", "c"] * 4  # groups of four that no run of files holds


def level(images, prompts):
    """Brightness of the first pixel."""
    return [i.getpixel((0, 0))[0] for i in images]


def other(images, prompts):
    """Something that orders the pictures otherwise."""
    return [(7 * i.getpixel((0, 0))[0]) % 11 for i in images]


def comparing(kind, **options):
    parts = {"level": (FunctionReward(level), 1.0)}
    if kind == "pareto":
        parts["other"] = (FunctionReward(other), 1.0)
    return build(kind, parts, options)


@pytest.fixture
def files(tmp_path):
    """Twelve pictures whose groups have one size each, two of them the same."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, prompt in enumerate(PROMPTS):
        Image.new("RGB", (5 if prompt == "c" else 4, 4), (i,) * 3).save(folder / f"{i}.png")
    return [folder / f"{i}.png" for i in range(len(PROMPTS))]


def whole(files, reward):
    """Each group scored by the reward itself."""
    value = torch.full((len(files),), torch.nan)
    for prompt in set(PROMPTS):
        rows = [i for i, p in enumerate(PROMPTS) if p == prompt]
        media = Media.from_pil([Image.open(files[i]) for i in rows])
        value[rows] = reward.score(media, [prompt] * len(rows)).value
    return value


KINDS = [("rank", {}), ("pareto", {"mode": "rank"}), ("win_rate", {})]
KINDS.append(("win_rate", {"pairing": "swiss"}))


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_the_batch_size_changes_no_comparison(files, kind, options):
    reward = comparing(kind, **options)
    expected = whole(files, reward)
    assert len(expected.unique()) > 1
    for batch_size in (4, 5, 8, 32):
        assert mmalign.score(files, PROMPTS, reward, batch_size=batch_size).value.equal(expected)
    tensors = torch.stack([torch.full((3, 4, 4), i / 255) for i in range(12)])
    assert mmalign.score(tensors, PROMPTS, reward, batch_size=4).value.equal(expected)


def test_groups_by_a_column_and_of_part_of_a_sum(files):
    reward = build("weighted_sum", {"r": (comparing("rank"), 1.0)}, {})
    context = [{"group": i // 2} for i in range(12)]
    assert mmalign.score(files[:2], "p", reward).value.tolist() == [0.25, 0.75]
    files = [f for f in files if PROMPTS[files.index(f)] != "c"]
    score = mmalign.score(files, "p", reward, context=context[:8], batch_size=2)
    assert score.value.tolist() == [0.25, 0.75] * 4


def test_a_group_larger_than_a_batch_is_refused(files):
    with pytest.raises(ValueError, match=r"compares the 4 pictures of prompt 'a' .*--batch-size 4"):
        mmalign.score(files, PROMPTS, comparing("rank"), batch_size=3)
    everybody = comparing("pareto", within="batch")
    assert everybody.whole_batch and not comparing("pareto").whole_batch
    nested = build("weighted_sum", {"p": (everybody, 1.0)}, {})
    with pytest.raises(ValueError, match=r"12 pictures of all prompts"):
        mmalign.score(files, PROMPTS, nested, batch_size=4)
    same_size = [f for i, f in enumerate(files) if PROMPTS[i] != "c"]
    prompts = [p for p in PROMPTS if p != "c"]
    all_at_once = mmalign.score(same_size, prompts, nested, batch_size=8)
    media = Media.from_pil([Image.open(f) for f in same_size])
    assert all_at_once.value.equal(everybody.score(media, prompts).value)


def test_unreadable_and_unequal_pictures_of_a_group(files):
    files[3].write_bytes(b"damaged")  # of "a"
    Image.new("RGB", (9, 9)).save(files[1])  # of "b"
    score = mmalign.score(files, PROMPTS, comparing("rank"), batch_size=4)
    assert [i for i, ok in enumerate(score.valid.tolist()) if not ok] == [1, 3, 4, 7, 10]
    assert "3.png: not a picture" in score.notes[3]
    assert all("different sizes (4 x 4, 9 x 9)" in score.notes[i] for i in (1, 4, 7, 10))
    assert score.value[[0, 6, 9]].tolist() == pytest.approx([1 / 6, 0.5, 5 / 6])


def test_a_journal_keeps_whole_groups(files, tmp_path):
    asked = []

    def told(images, prompts):
        asked.extend(i.getpixel((0, 0))[0] for i in images)
        return level(images, prompts)

    reward = build("rank", {"told": (FunctionReward(told), 1.0)}, {})

    def run(n=12):
        asked.clear()
        journal = tmp_path / "j"
        return mmalign.score(files[:n], PROMPTS[:n], reward, journal=journal, batch_size=4).value

    first = run()
    assert sorted(asked) == list(range(12))
    assert run().equal(first) and not asked
    os.utime(files[4], (1, 1))  # of "b"
    assert run().equal(first) and sorted(asked) == [1, 4, 7, 10]
    # Of ten pictures two have lost a neighbour: what was kept is of another group.
    assert run(10)[[1, 4, 7]].tolist() == pytest.approx([1 / 6, 0.5, 5 / 6])
    assert sorted(asked) == [1, 2, 4, 5, 7, 8]
    assert run().equal(first) and not asked


def test_small_groups_share_batches(files):
    groups = [[0, 3], [6], [1, 4, 7], [2], [5]]
    rows = [rows for rows, _ in whole_groups(files, groups, 4)]
    assert rows == [[0, 3, 6], [1, 4, 7], [2, 5]]
    with pytest.raises(ValueError, match="batch_size 0"):
        list(whole_groups(files, groups, 0))


# --- folders ------------------------------------------------------------------------------------


@pytest.fixture
def nested(tmp_path):
    """The layout of a benchmark: a folder for each prompt."""
    folder = tmp_path / "bench"
    for name in ("00000/samples/0.png", "00000/samples/10.png", "00000/samples/2.PNG", "z.png",
                 "00010/samples/0.png", "00002/samples/0.png", ".cache/0.png",
                 "00002/._0.png", "odd.png/0.jpg"):  # fmt: skip
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path, "PNG")
    (folder / "00010" / "back").symlink_to(folder, target_is_directory=True)
    return folder


NAMES = [
    "z.png", "00000/samples/0.png", "00000/samples/2.PNG", "00000/samples/10.png",
    "00002/samples/0.png", "00010/samples/0.png", "odd.png/0.jpg",
]  # fmt: skip


def test_folders_inside_folders_are_read_in_order(nested, tmp_path):
    files = image_files([str(nested)])
    assert files == [nested / name for name in NAMES]
    assert short_names(files, [str(nested)]) == NAMES
    assert short_names([nested / "z.png"], [str(nested / "z.png")]) == ["z.png"]
    (tmp_path / "none" / "inside").mkdir(parents=True)
    with pytest.raises(CommandError, match="holds no picture"):
        image_files([str(tmp_path / "none")])


def test_the_command_scores_a_nested_folder(nested, tmp_path, capsys):
    out = tmp_path / "s.jsonl"
    argv = ["score", str(nested), "--reward", "contrast", "--out", str(out), "--quiet"]
    assert main([*argv, "--device", "cpu"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["image"] for r in rows] == [str(nested / name) for name in NAMES]
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in NAMES)


def test_prompts_of_nested_pictures(nested, tmp_path):
    files = image_files([str(nested)])[:3]
    for file in files:
        file.with_suffix(".txt").write_text(f"beside {file.stem}")
    (nested / "0.txt").write_text("of another picture")
    assert [p for p, _ in captions(files, nested)] == ["beside z", "beside 0", "beside 2"]
    (nested / "00000/samples/0.txt").unlink()
    with pytest.raises(PromptFileError, match=r"samples/0\.png has no prompt: .*samples/0\.txt"):
        captions(files, nested)
    texts = tmp_path / "texts"
    (texts / "samples").mkdir(parents=True)
    for name, text in (("z", "flat z"), ("0", "flat 0"), ("samples/2", "nested 2"), ("2", "no")):
        (texts / f"{name}.txt").write_text(text)
    assert [p for p, _ in captions(files, texts)] == ["flat z", "flat 0", "nested 2"]


# --- where ----------------------------------------------------------------------------------------


class Elsewhere:
    """Takes note of where its pictures are."""

    info = RewardInfo(name="elsewhere", needs=())
    identity = "elsewhere@1"

    def __init__(self):
        self.devices = set()

    def score(self, media, prompts, context=None):
        self.devices.add(media.data.device.type)
        return Score.of(torch.ones(len(media)), self.identity)


def test_pictures_are_moved_to_the_device(files, monkeypatch):
    monkeypatch.setattr(scoring, "pick_device", torch.device)
    for given in (files, Media(torch.rand(2, 3, 4, 4))):
        reward = Elsewhere()
        score = mmalign.score(given, None, reward, device="meta")
        assert reward.devices == {"meta"} and score.value.device.type == "cpu" and score.valid.all()


def test_the_device_of_auto(files, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert scoring.scoring_device("auto", files) == torch.device("cuda")
    assert scoring.scoring_device("auto", Media(torch.rand(1, 3, 4, 4))) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert scoring.scoring_device("auto", files) == torch.device("cpu")
    with pytest.raises(BackendError, match="'cuda'"):
        mmalign.score(files, None, "contrast", device="cuda")


def test_calibration_passes_facts_on(files, tmp_path):
    rewards, source = tmp_path / "facts.py", tmp_path / "p.csv"
    rewards.write_text(
        "def f(images, prompts, context):\n    return [float(c['n']) for c in context]"
    )
    lines = [f"{f.name},p{i},{i}" for i, f in enumerate(files)]
    source.write_text("\n".join(["image,prompt,n", *lines]))
    out = tmp_path / "r.json"
    argv = ["calibrate", str(files[0].parent), "--reward", f"{rewards}:f", "--prompts", str(source)]
    assert main([*argv, "--out", str(out), "--device", "cpu"]) == 0
    assert json.loads(out.read_text())["mean"] == pytest.approx(5.5)
    assert api.calibrate(files, "p", "contrast", out, device="cpu").std == 0


def test_infinite_parts_are_written_as_missing(files, tmp_path):
    rewards, out = tmp_path / "inf.py", tmp_path / "s.jsonl"
    rewards.write_text(
        "import torch\n"
        "from mmalign.reward_info import RewardInfo\n"
        "from mmalign.types import Score\n"
        "class Inf:\n"
        "    info, identity = RewardInfo(name='inf', needs=()), 'inf@1'\n"
        "    def score(self, media, prompts, context=None):\n"
        "        one = torch.ones(len(media))\n"
        "        return Score(one, one > 0, {'sigma': one * torch.inf}, (), self.identity)\n"
    )
    argv = ["score", str(files[0]), "--reward", f"{rewards}:Inf", "--out", str(out)]
    assert main(argv) == 0
    assert json.loads(out.read_text())["parts"] == {"sigma": None}
