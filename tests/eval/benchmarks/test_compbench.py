"""T2I-CompBench's rules on hand-made boxes and probabilities, and its prompts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from eval.benchmarks.base import DataError
from eval.benchmarks.compbench import CATEGORIES, T2ICompBench
from eval.benchmarks.compbench_rules import (
    PhraseError,
    class_of,
    distinct,
    numeracy_request,
    numeracy_score,
    phrases_of,
    position,
    spatial_request,
    spatial_score,
    three_in_one,
)
from mmalign.types import Media
from vision_rewards.geneval_prompts import CLASSES
from vision_rewards.geneval_rules import Detection


def box(x: float, y: float, side: float = 100.0) -> tuple[float, float, float, float]:
    return (x - side / 2, y - side / 2, x + side / 2, y + side / 2)


@pytest.mark.parametrize(
    ("relation", "x", "y", "score"),
    [
        ("next to", 149, 400, 1.0),
        ("near", 300, 200, 0.5),  # 150 / 300
        ("on side of", -300, -450, 1 / 3),
        ("on the left of", 200, 50, 1.0),
        ("on the left of", -200, 50, 0.0),
        ("on the left of", 50, 200, 0.0),
        ("on the left of", 200, 200, 0.0),  # neither axis is the larger one
        ("on the right of", -200, 50, 1.0),
        ("on the top of", 20, 200, 1.0),
        ("on the top of", 20, -200, 0.0),
        ("on the bottom of", 20, -200, 1.0),
        # Side 100, moved by 50: IoU = 5000 / 15000, so that 0.1 / IoU = 0.3.
        ("on the left of", 50, 0, 0.3),
    ],
)
def test_positions(relation: str, x: float, y: float, score: float) -> None:
    assert position(relation, box(256, 256), box(256 + x, 256 + y)) == pytest.approx(score)


def test_spatial_score_as_published_and_fixed() -> None:
    a, b = Detection(box(100, 100), 0.8), Detection(box(400, 100), 0.6)
    assert spatial_score("on the left of", a, b) == pytest.approx(0.25 * 1.4 + 0.5)
    assert spatial_score("on the left of", a, b, compat=False) == 1.0
    # Wrong side: 0.35 is below one half and counts as nothing.
    assert spatial_score("on the right of", a, b) == 0.0
    # One object alone can never reach one half.
    assert spatial_score("near", a, None) == 0.0 and spatial_score("near", None, None) == 0.0
    low = Detection(box(100, 100), 0.3), Detection(box(400, 100), 0.3)
    # 300 apart along an axis only: near by the other one.
    assert spatial_score("near", *low) == pytest.approx(0.15 + 0.5)


def test_numeracy() -> None:
    cups = [Detection(box(100 * k, 50, 60), 0.9) for k in range(3)]
    found = {"cup": cups, "dog": [Detection(box(400, 400), 0.9)]}
    assert numeracy_score(found, [("cup", 3), ("dog", 1)]) == 1.0
    assert numeracy_score(found, [("cup", 2), ("dog", 1)]) == 0.75
    assert numeracy_score(found, [("cup", 2), ("cat", 1)]) == 0.25
    # A box inside another one is the same object.
    assert len(distinct([Detection(box(50, 50, 80), 0.9), Detection(box(50, 50, 40), 0.8)])) == 1
    assert len(distinct([Detection(box(50, 50, 80), 0.9), Detection(box(70, 50, 80), 0.8)])) == 2


def test_three_in_one() -> None:
    assert three_in_one("spatial", 0.2, 0.6, 0.9) == pytest.approx(0.4)
    assert three_in_one("action", 0.2, 0.6, 0.9) == pytest.approx(0.55)
    assert three_in_one("", 0.3, 0.6, 0.9) == pytest.approx(0.6)
    assert three_in_one("action", 0.2, math.nan, 0.8) == pytest.approx(0.5)
    assert math.isnan(three_in_one("spatial", 0.2, math.nan, 0.8))


def test_prompts_are_read() -> None:
    assert spatial_request("a girl on the top of a cat", CLASSES) == (
        "on the top of", "person", "cat")  # fmt: skip
    assert spatial_request("A small dog next to the wine glass.", CLASSES)[1:] == (
        "dog", "wine glass")  # fmt: skip
    assert numeracy_request("two boys", (*CLASSES, "boy"))[0][1] == 2
    assert numeracy_request("three books, one cup and four cakes", CLASSES) == [
        ("book", 3), ("cup", 1), ("cake", 4)]  # fmt: skip
    assert class_of("the ship", CLASSES) == "boat"
    for prompt in ("a giraffe next to a lamp", "a giraffe eats a pear"):
        with pytest.raises(PhraseError, match=r"lamp|none of the relations"):
            spatial_request(prompt, CLASSES)
    with pytest.raises(PhraseError, match="names no number"):
        numeracy_request("many books", CLASSES)


def test_phrases() -> None:
    assert phrases_of("a green bench and a blue bowl", "split") == ["a green bench", "a blue bowl"]
    assert phrases_of("a, b, and c.", "split") == ["a", "b", "c"]
    assert len(phrases_of(", ".join(f"thing {k}" for k in range(12)), "split")) == 8


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    said = {
        "color": "a red square and a blue circle", "non_spatial": "a star is resting",
        "complex": "The red star is near. More.", "complex_val_spatial": "the red star is near.",
    }  # fmt: skip
    for name, text in said.items():
        path = tmp_path / (f"{name}.txt" if "val" in name else f"{name}_val.txt")
        path.write_text(text + "\n")
    (tmp_path / "complex_val_action.txt").write_text("someone runs\n")
    return tmp_path


def yes(images, prompts):
    """Probability of yes by the words asked about."""
    return [{"a red square": 0.5, "a blue circle": 0.4}.get(p, 0.9) for p in prompts]


def test_categories_are_scored_by_their_own_rules(folder: Path, rows) -> None:
    benchmark = T2ICompBench(
        folder, categories=["color", "non_spatial"], reward=yes, clip=lambda i, p: [0.3] * len(i),
        phrases="split", samples_per_prompt=1, device="cpu",
    )  # fmt: skip
    score = benchmark.judge(Media(torch.rand(2, 3, 16, 16)), benchmark.requests())
    assert score.value.tolist() == pytest.approx([0.5 * 0.4, 0.3])
    found = benchmark.numbers(rows(benchmark, [0.2, 0.3]))
    assert found == {"color": 0.2, "non_spatial": 0.3}
    assert benchmark.requests()[0].item == "0" and benchmark.requests()[0].task == "color"


def test_kind_of_a_complex_prompt_is_looked_up_by_its_first_sentence(folder: Path) -> None:
    benchmark = T2ICompBench(folder, categories=["complex"], phrases="split")
    assert benchmark._kinds == {"the red star is near": "spatial", "someone runs": "action"}
    (folder / "complex_val_action.txt").unlink()
    with pytest.raises(DataError, match=r"needs complex_val_action\.txt"):
        _ = T2ICompBench(folder, categories=["complex"])._kinds


def test_missing_categories(folder: Path) -> None:
    assert {p.task for p in T2ICompBench(folder).load().prompts} == {
        "color", "non_spatial", "complex"}  # fmt: skip
    with pytest.raises(DataError, match=r"no shape_val\.txt"):
        T2ICompBench(folder, categories=["shape"]).load()


def test_official_files(official) -> None:
    benchmark = T2ICompBench(official("t2i_compbench"))
    loaded = benchmark.load()
    assert not loaded.problems
    assert {c: sum(p.task == c for p in loaded.prompts) for c in CATEGORIES} == dict.fromkeys(
        CATEGORIES, 300
    )
    relations = set()
    for prompt in loaded.prompts:
        if prompt.task == "spatial":
            words = prompt.text.replace(",", " ").split()
            relations.add(spatial_request(prompt.text, words)[0])
        if prompt.task == "color":
            assert phrases_of(prompt.text, "split")
    assert len(relations) == 7
