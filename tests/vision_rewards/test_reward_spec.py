"""The text form of a reward, and rewards with options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmalign.registry import UnknownNameError
from vision_rewards.compose import WeightedSum
from vision_rewards.factory import load_reward
from vision_rewards.jpeg import JpegCompressibility
from vision_rewards.spec import RewardSpecError, parse_spec, split_checkpoint

MINE = """
from vision_rewards.jpeg import JpegCompressibility

class Mine(JpegCompressibility):
    def __init__(self, strength: float = 1.0) -> None:
        super().__init__()
        self.strength = strength

def plain(images, prompts):
    return [0.0] * len(images)
"""


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("a", {"a": 1.0}),
        ("a+b", {"a": 1.0, "b": 1.0}),
        ("0.5*a + b", {"a": 0.5, "b": 1.0}),
        ("a + -2*b", {"a": 1.0, "b": -2.0}),
        ("1e+3*a+1e-2*b", {"a": 1000.0, "b": 0.01}),
        ("a=2, b", {"a": 2.0, "b": 1.0}),
        ("2*a@org/name+b", {"a@org/name": 2.0, "b": 1.0}),
        ("a@org/name:x=1.pt", {"a@org/name:x=1.pt": 1.0}),
        ("remote:http://h:1,http://i:2", {"remote:http://h:1,http://i:2": 1.0}),
        ("remote:http://h:1/?x=2+a", {"remote:http://h:1/?x=2": 1.0, "a": 1.0}),
    ],
)
def test_text(text: str, weights: dict[str, float]) -> None:
    assert parse_spec(text) == weights


@pytest.mark.parametrize("text", ["", "a,a", "a+a", "a,,b", "a++b", "a=x", "x*a", "a+", "2*"])
def test_text_that_is_no_reward(text: str) -> None:
    with pytest.raises(RewardSpecError, match="reward"):
        parse_spec(text)


def test_a_path_is_taken_as_it_is(tmp_path: Path) -> None:
    odd = tmp_path / "1*a+b,c=2"
    odd.mkdir()
    assert parse_spec(str(odd)) == {str(odd): 1.0}


def test_checkpoints() -> None:
    assert split_checkpoint("a") == ("a", None)
    assert split_checkpoint("a@org/name") == ("a", "org/name")
    with pytest.raises(RewardSpecError, match="no checkpoint"):
        split_checkpoint("a@")


@pytest.fixture
def mine(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(MINE)
    return f"{tmp_path}/mine.py:"


def test_options_reach_the_constructor(mine: str) -> None:
    made: Any = load_reward({"reward": f"{mine}Mine", "strength": 3.0})
    assert made.strength == 3.0
    both = load_reward({"m": {"reward": f"{mine}Mine", "weight": 2.0}, "shapes_partial": 1.0})
    assert isinstance(both, WeightedSum)
    assert [w for _, w in both.components.values()] == [2.0, 1.0]
    assert isinstance(both.components["m"][0], JpegCompressibility)


def test_a_misspelt_option_gets_its_nearest_match(mine: str) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'strength'"):
        load_reward({"reward": f"{mine}Mine", "strenght": 3.0})
    with pytest.raises(ValueError, match="takes no options, got strength"):
        load_reward({"reward": f"{mine}plain", "strength": 3.0})
    with pytest.raises(UnknownNameError, match="checkpoint"):
        load_reward("shapes_strict@somewhere")


def test_text_and_mapping_make_the_same_sum() -> None:
    text = load_reward("0.5*shapes_strict + jpeg_compressibility")
    mapping = load_reward({"shapes_strict": 0.5, "jpeg_compressibility": 1.0})
    assert text.identity == mapping.identity
    assert load_reward("1*shapes_strict").info.name == "shapes_strict"


def test_names_longer_than_a_file_name() -> None:
    long = "x" * 300
    assert parse_spec(f"0.5*{long} + b") == {long: 0.5, "b": 1.0}
    with pytest.raises(UnknownNameError):
        load_reward(long)
    terms = [f"{k}*r{k}" for k in range(1, 99)]
    assert len(parse_spec("+".join(terms))) == 98
