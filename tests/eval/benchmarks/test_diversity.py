"""Diversity within prompts, of a painter who draws and of one who copies himself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from eval.benchmarks.base import DataError
from eval.benchmarks.diversity import Diversity
from eval.entry import evaluate
from eval.harness import run_benchmark
from eval.metrics.distribution import prompt_diversity, vendi_score
from eval.metrics.features import Embedded
from mmalign.assets import asset
from mmalign.pictures import read_picture
from mmalign.shapes import TASKS, parse
from mmalign.types import Media


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a photo of a red star\n\na photo of two circles\n")
    return path


def of(path: Path | None, **options) -> Diversity:
    options = {"samples_per_prompt": 4, "device": "cpu", **options}
    return Diversity(path, embedder=asset("shapes-clip"), **options)


def test_values_are_distances_within_a_prompt(studio, prompts: Path, tmp_path: Path) -> None:
    result = run_benchmark(
        studio.Painter(), of(prompts), tmp_path / "run", progress=False, generate=studio.Sketch()
    )
    pictures = [read_picture(result.image_path(r)) for r in result.rows]
    features = Embedded(asset("shapes-clip"))(Media.from_pil(pictures).data).numpy()
    texts = [r.prompt for r in result.rows]
    wanted = prompt_diversity(features, texts)
    assert result.numbers["mean pairwise distance"] == pytest.approx(wanted, rel=1e-4)
    assert result.accuracy.mean == pytest.approx(wanted, rel=1e-4) and result.unit == "score"
    own = [vendi_score(features[[t == text for t in texts]]) for text in dict.fromkeys(texts)]
    assert result.numbers["Vendi score of a prompt"] == pytest.approx(np.mean(own), rel=1e-4)
    assert result.numbers["Vendi score of all pictures"] > np.mean(own)


def test_a_painter_who_copies_himself_has_none(studio, prompts: Path, tmp_path: Path) -> None:
    sketch = studio.Sketch()

    def copies(policy, texts, seeds, **options):
        return sketch(policy, texts, [0] * len(seeds), **options)

    result = run_benchmark(
        studio.Painter(), of(prompts), tmp_path / "run", progress=False, generate=copies
    )
    assert result.accuracy.mean == pytest.approx(0, abs=1e-5)
    assert result.numbers["Vendi score of a prompt"] == pytest.approx(1, abs=1e-3)


def test_prompts_of_the_shapes_world_are_the_default() -> None:
    benchmark = of(None)
    texts = [p.text for p in benchmark.loaded.prompts]
    assert len(texts) == 5 * len(TASKS) and len(benchmark.requests()) == 4 * len(texts)
    assert {parse(text).task for text in texts[: len(TASKS)]} == set(TASKS)  # in turn


def test_what_cannot_be_compared_is_refused(prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be 2 or more, got 1"):
        of(prompts, samples_per_prompt=1)
    with pytest.raises(ValueError, match="not reward"):
        of(prompts, reward="shapes_clip")
    with pytest.raises(DataError, match=r"gone\.txt does not exist"):
        of(tmp_path / "gone.txt")
    with pytest.raises(DataError, match="is no file"):
        of(tmp_path)
    with pytest.raises(ValueError, match="give out"):
        evaluate("shapes-flow", of(prompts))
