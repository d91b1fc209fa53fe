"""Names, files, functions and mixtures become reward models; typos become near matches."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mmalign.registry import REWARDS, UnknownNameError
from mmalign.types import Media
from vision_rewards.compose import WeightedSum
from vision_rewards.factory import list_rewards, load_reward
from vision_rewards.function import FunctionReward
from vision_rewards.shapes import ShapesPartial, ShapesStrict

MINE = """
from vision_rewards.jpeg import JpegCompressibility

def short(images, prompts):
    "Short prompts win."
    return [-len(p) for p in prompts]

class Mine(JpegCompressibility):
    pass

class Unrelated:
    pass

ready = JpegCompressibility()
number = 3
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


def constant(images: Any, prompts: list[str]) -> list[float]:
    return [0.5] * len(prompts)


def test_names_objects_and_functions() -> None:
    assert isinstance(load_reward("shapes_strict"), ShapesStrict)
    ready = ShapesPartial()
    assert load_reward(ready) is ready
    assert isinstance(load_reward(ShapesPartial), ShapesPartial)
    assert load_reward(constant).info.name == "constant"


def test_mixtures() -> None:
    named = load_reward({"shapes_strict": 1, "jpeg_compressibility": 0.1})
    assert isinstance(named, WeightedSum)
    assert named.info.name == "1*shapes_strict + 0.1*jpeg_compressibility"
    labelled = load_reward({"mine": (constant, 2.0), "s": ("shapes_partial", 1)})
    assert labelled.score(Media(torch.zeros(1, 3, 32, 32)), ["a photo of a star"]).value == 1.0
    assert load_reward(["shapes_strict", constant]).info.name == "1*shapes_strict + 1*constant"
    assert isinstance(load_reward(["shapes_strict"]), ShapesStrict)


def test_the_users_own_file(mine: Path) -> None:
    short = load_reward(f"{mine}:short")
    assert isinstance(short, FunctionReward) and short.info.summary == "Short prompts win."
    assert short.score(Media(torch.zeros(1, 3, 8, 8)), ["four"]).value.item() == -4.0
    assert load_reward(f"{mine}:Mine").info.name == "jpeg_compressibility"
    assert load_reward(f"{mine}:ready").info.name == "jpeg_compressibility"
    assert isinstance(load_reward("vision_rewards.shapes:ShapesStrict"), ShapesStrict)


def test_a_typo_gets_its_nearest_match(mine: Path) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'shapes_strict'"):
        load_reward("shape_strict")
    with pytest.raises(UnknownNameError, match="Did you mean 'short'"):
        load_reward(f"{mine}:shrot")
    with pytest.raises(UnknownNameError, match="shapes_partial"):
        load_reward({"shapes_partail": 1.0})


@pytest.mark.parametrize(
    ("spec", "error", "says"),
    [
        (3, TypeError, "cannot make a reward of 3"),
        (None, TypeError, "cannot make a reward of None"),
        ({}, ValueError, "at least one component"),
        ([], ValueError, "at least one component"),
        ({"shapes_strict": "1"}, ValueError, "must be a number, got '1'"),
        ({"shapes_strict": True}, ValueError, "must be a number, got True"),
        (["shapes_strict", "shapes_strict"], ValueError, "more than once"),
        ("missing.py:fn", FileNotFoundError, "missing.py"),
    ],
)
def test_what_is_refused(spec: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        load_reward(spec)


def test_what_a_file_holds_must_be_a_reward(mine: Path) -> None:
    for name in ("number", "Unrelated"):
        with pytest.raises(TypeError, match=name):
            load_reward(f"{mine}:{name}")


def test_listing_imports_nothing_heavy() -> None:
    code = (
        "import sys; from vision_rewards.factory import list_rewards; "
        "assert list_rewards(); print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True
    )
    assert done.stdout.split() == ["False", "False"]
    assert [e.name for e in list_rewards()] == [e.name for e in REWARDS]


def test_a_file_may_use_dataclasses_and_fail(tmp_path: Path) -> None:
    code = (
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class Settings:\n"
        "    level: float = {level}\n"
        "def score(images, prompts):\n"
        "    return [Settings().level] * len(images)\n"
    )
    for level in (0.25, 0.5):  # two files of one name
        path = tmp_path / str(level) / "mine.py"
        path.parent.mkdir()
        path.write_text(code.format(level=level))
        reward = load_reward(f"{path}:score")
        assert reward.score(Media(torch.rand(1, 3, 4, 4)), ["p"]).value.item() == level
    path.write_text("raise RuntimeError('half way')")
    known = set(sys.modules)
    with pytest.raises(RuntimeError, match="half way"):
        load_reward(f"{tmp_path / '0.5' / 'mine.py'}:score")
    assert set(sys.modules) == known


def test_modules_that_are_not_there() -> None:
    for name in ("no_such_module:fn", "no_such_module.inner:fn", "vision_rewards.nothing:fn"):
        with pytest.raises(FileNotFoundError, match=r"there is no module .*; give 'path/to/file"):
            load_reward(name)


def test_a_module_that_misses_something_says_so_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needy_reward.py").write_text("import no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        load_reward("needy_reward:fn")
