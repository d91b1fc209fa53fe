"""Label files, splits without leakage, and the measures."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from vision_rewards.training import metrics
from vision_rewards.training.figure import reliability_svg
from vision_rewards.training.records import Dataset, RecordError, Sample, read_records
from vision_rewards.training.split import SplitError, groups_of, refuse_overlap, split


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(name.encode())
    return tmp_path


def read(folder: Path, *rows: dict[str, object]) -> Dataset:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return read_records(path)


PAIR = {"prompt": "p", "image_a": "a.png", "image_b": "b.png"}


def test_pairs(folder: Path) -> None:
    labels = ["a", "b", "tie", 0.7]
    data = read(folder, *({**PAIR, "label": label, "id": 3} for label in labels))
    assert data.kind == "pairs"
    assert [s.target for s in data.samples[:3]] == [(1, 0, 0), (0, 0, 1), (0, 1, 0)]
    assert data.samples[3].target == pytest.approx((0.7, 0, 0.3))
    assert data.samples[0].images == (folder / "a.png", folder / "b.png")


def test_other_kinds(folder: Path) -> None:
    ratings = read(folder, {"image": "a.png", "rating": 4, "user": "eve", "weight": 2})
    assert (ratings.kind, ratings.samples[0].target) == ("ratings", (4.0,))
    assert (ratings.samples[0].user, ratings.samples[0].weight) == ("eve", 2.0)
    labels = read(folder, {"image": "a.png", "prompt": "p", "label": 1})
    assert (labels.kind, labels.samples[0].target) == ("labels", (1.0,))
    images = {"prompt": "p", "images": ["a.png", "b.png", "c.png"]}
    rankings = read(folder, images, {**images, "ranking": [2, 1, None]})
    assert [s.target for s in rankings.samples] == [(1, 2, 3), (2, 1, 3)]


def test_counts_keep_whose_they_are_and_their_weight(folder: Path) -> None:
    rows = [
        {"prompt": "p", "image": image, "count": k, "views": 9, "user": user, "weight": w}
        for image, k, user, w in (
            ("a.png", 9, "ann", 2.0), ("b.png", 1, "ann", 3.0), ("c.png", 1, "bob", 1.0)
        )
    ]  # fmt: skip
    (pair,) = read(folder, *rows).samples
    assert (pair.user, pair.weight) == ("ann", 6.0) and pair.target[0] > 0.9


def test_counts_become_soft_pairs(folder: Path) -> None:
    def q(a: tuple[int, int], b: tuple[int, int]) -> float:
        rows = [
            {"prompt": "p", "image": name, "count": k, "views": n}
            for name, (k, n) in (("a.png", a), ("b.png", b))
        ]
        return read(folder, *rows).samples[0].target[0]

    assert q((3, 10), (1, 10)) + q((1, 10), (3, 10)) == pytest.approx(1.0)
    assert 0.5 < q((3, 10), (1, 10)) < q((30, 100), (10, 100)) < 1.0  # more evidence, more certain
    assert q((10, 10), (10, 100)) > 0.99  # rates, not counts
    rng = np.random.default_rng(0)
    draws = rng.gamma([3.5, 1.5], 1.0, (200_000, 2)) / [10, 8]
    assert q((3, 10), (1, 8)) == pytest.approx((draws[:, 0] > draws[:, 1]).mean(), abs=5e-3)
    with pytest.raises(RecordError, match="give no pair"):
        q((5, 10), (5, 10))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**PAIR, "label": "c"}, "line 2: label is 'c'; it must be a, b, tie or a number"),
        ({**PAIR, "label": 1.5}, "label is 1.5; it must be a number from 0 to 1"),
        ({**PAIR, "label": "a", "wieght": 2}, "unknown key 'wieght'; did you mean 'weight'"),
        ({"image": "a.png", "rating": 3}, "ratings in a file of pairs"),
        ({"prompt": "p", "image": "a.png"}, "are no judgement"),
        ({**PAIR, "image_b": "no.png", "label": "a"}, "1 of 3 pictures do not exist"),
        ({**PAIR, "image_b": 3, "label": "a"}, "image_b is 3"),
    ],
)
def test_bad_lines_are_named(folder: Path, row: dict[str, object], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        read(folder, {**PAIR, "label": "a"}, row)


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="does not exist"):
        read_records(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(RecordError, match="is empty"):
        read_records(tmp_path / "empty.jsonl")


def sample(prompt: str, *names: str) -> Sample:
    return Sample(tuple(Path(n) for n in names), prompt, (1.0, 0.0, 0.0))


def digests(*samples: Sample) -> dict[Path, str]:
    return {image: f"digest of {image}" for s in samples for image in s.images}


def test_samples_that_share_a_prompt_or_a_picture_stay_together() -> None:
    samples = (sample("p", "1", "2"), sample("p", "3", "4"), sample("q", "4", "5"), sample("", "6"))
    groups = groups_of(Dataset("pairs", samples), digests(*samples))
    assert groups[0] == groups[1] == groups[2] != groups[3]


def test_split_shares_nothing_and_ignores_the_order_of_the_file() -> None:
    samples = [sample(f"p{k // 3}", f"{k}a", f"{k}b") for k in range(300)]
    files = digests(*samples)
    parts = split(Dataset("pairs", tuple(samples)), files, validation=0.1, test=0.2, seed=1)
    sizes = [len(parts.train), len(parts.validation), len(parts.test)]
    assert sum(sizes) == 300 and sizes == pytest.approx([210, 30, 60], abs=5)
    prompts = [{s.prompt for s in p.samples} for p in (parts.train, parts.validation, parts.test)]
    assert not prompts[0] & prompts[1] and not prompts[0] & prompts[2]
    assert not prompts[1] & prompts[2]
    turned = split(Dataset("pairs", tuple(samples[::-1])), files, validation=0.1, test=0.2, seed=1)
    assert {s.prompt for s in turned.test.samples} == prompts[2]
    other = split(Dataset("pairs", tuple(samples)), files, validation=0.1, test=0.2, seed=2)
    assert {s.prompt for s in other.test.samples} != prompts[2]


def test_data_that_hang_together_cannot_be_split() -> None:
    samples = tuple(sample(f"p{k}", "common", f"{k}") for k in range(20))
    with pytest.raises(SplitError, match="1 groups"):
        split(Dataset("pairs", samples), digests(*samples), validation=0.1, test=0.0)


def test_overlapping_files_are_refused() -> None:
    one, two = sample("p", "1", "2"), sample("p", "3", "4")
    files = digests(one, two)
    with pytest.raises(SplitError, match="'prompt p'"):
        refuse_overlap(Dataset("pairs", (one,)), Dataset("pairs", (two,)), files)


def test_wilson_and_bootstrap() -> None:
    assert metrics.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert metrics.wilson(0, 20)[0] == 0.0 and metrics.wilson(20, 20)[1] == 1.0
    # Ten prompts of ten equal answers each: as many independent values as there are prompts.
    correct = np.repeat([1.0, 0.0], 50)
    groups = [str(k // 10) for k in range(100)]
    found = metrics.proportion(correct, groups)
    narrow = found["wilson"][1] - found["wilson"][0]
    wide = found["bootstrap"][1] - found["bootstrap"][0]
    assert found["value"] == 0.5 and wide > 2 * narrow


def test_auroc_and_pairs() -> None:
    score, positive = np.array([0.1, 0.4, 0.4, 0.9]), np.array([False, False, True, True])
    assert metrics.auroc(score, positive) == pytest.approx(3.5 / 4)
    assert math.isnan(metrics.auroc(score, np.ones(4, bool)))
    right = metrics.pair_correct(np.array([1.0, -1.0, 0.0]), np.array([1.0, 1.0, 1.0]))
    assert right.tolist() == [1.0, 0.0, 0.5]


def test_reliability() -> None:
    p = np.array([0.05, 0.05, 0.95, 0.95])
    found = metrics.reliability(p, np.array([0.0, 1.0, 1.0, 1.0]))
    assert found["ece"] == pytest.approx(0.5 * 0.45 + 0.5 * 0.05)
    assert found["brier"] == pytest.approx((0.0025 + 0.9025 + 0.0025 + 0.0025) / 4)
    assert [b["n"] for b in found["bins"]] == [2, *[0] * 8, 2]
    rng = np.random.default_rng(0)
    p = rng.random(20_000)
    assert metrics.reliability(p, (rng.random(20_000) < p).astype(float))["ece"] < 0.02
    import xml.etree.ElementTree as ET

    picture = ET.fromstring(reliability_svg(found, "a & b"))
    circles = [e for e in picture.iter() if e.tag.endswith("circle")]
    assert len(circles) == 2
