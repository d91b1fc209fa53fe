"""Measures of agreement against published and hand-made values."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mmalign.cli import main
from vision_rewards.labelling.agreement import agreement, alpha, coincidences, kappa

# Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), example C / D: four observers,
# twelve units, five categories, missing values. He gives alpha 0.743 (nominal), 0.815 (ordinal).
OBSERVERS = (
    "1 2 3 3 2 1 4 1 2 . . .",
    "1 2 3 3 2 2 4 1 2 5 . 3",
    ". 3 3 3 2 3 4 2 2 5 1 .",
    "1 2 3 3 2 4 4 1 2 5 1 .",
)


def test_alpha_of_the_textbook():
    columns = zip(*(line.split() for line in OBSERVERS), strict=True)
    units = [[int(v) - 1 for v in column if v != "."] for column in columns]
    found = coincidences(units, 5)
    assert found[-1].sum() == 0 and found.sum() == 40  # one judgement alone says nothing
    assert alpha(found.sum(0), ordinal=False) == pytest.approx(0.743, abs=5e-4)
    assert alpha(found.sum(0), ordinal=True) == pytest.approx(0.815, abs=5e-4)


def test_alpha_by_hand():
    # Two observers, four pairs: aa, bb, ab, tt. o_aa = o_bb = o_tt = 2, o_ab = o_ba = 1;
    # n_a = n_b = 3, n_t = 2, n = 8. Nominal: 1 - 7 * 2 / (64 - 9 - 9 - 4) = 1 - 14 / 42.
    found = coincidences([[0, 0], [2, 2], [0, 2], [1, 1]], 3).sum(0)
    assert alpha(found, ordinal=False) == pytest.approx(1 - 14 / 42)
    # Ordinal distances: a-t (3/2 + 2/2)^2 = 6.25 = t-b, a-b (3/2 + 2 + 3/2)^2 = 25.
    expected = 2 * (3 * 2 * 6.25 + 2 * 3 * 6.25 + 3 * 3 * 25)
    assert alpha(found) == pytest.approx(1 - 7 * 2 * 25 / expected)
    near = coincidences([[0, 0], [2, 2], [0, 1], [2, 1]], 3).sum(0)
    far = coincidences([[0, 0], [2, 2], [0, 2], [1, 1]], 3).sum(0)
    assert alpha(near) > alpha(far)  # a tie lies between
    assert math.isnan(alpha(coincidences([[0, 0], [0, 0]], 3).sum(0)))
    assert alpha(coincidences([[0, 0], [2, 2]], 3).sum(0)) == 1.0


def test_kappa_by_hand():
    # One of four is a against b: 1/4. Margins: a 1/2, b 1/2 and a 1/4, b 3/4.
    assert kappa([0, 0, 2, 2], [0, 2, 2, 2]) == pytest.approx(1 - 0.25 / (0.5 * 0.75 + 0.5 * 0.25))
    # A tie costs half: 1/8, against 1/2 (1/2 1/4 + 1/2 1/2 ...) of the margins.
    expected = 0.5 * (0.5 * 0.25 + 0.5 * 0.25) + 0.5 * 0.5 + 0.5 * 0.25
    assert kappa([0, 0, 2, 2], [0, 1, 2, 2]) == pytest.approx(1 - 0.125 / expected)
    rng = np.random.default_rng(0)
    assert abs(kappa(*rng.integers(0, 3, (2, 20_000)).tolist())) < 0.03
    assert math.isnan(kappa([1, 1], [1, 1]))


def row(pair: int, user: str, label: str, **more: object) -> dict[str, object]:
    base = {"prompt": f"p{pair}", "image_a": f"{pair}a", "image_b": f"{pair}b", "label": label}
    round_ = more.get("round", 0)
    return {**base, "user": user, "decision": f"{pair}-{round_}-{user}", "shown": "ab", **more}


ROWS = [
    row(0, "ann", "a", seconds=1.0), row(0, "bob", "a"),
    row(1, "ann", "b", seconds=3.0), row(1, "bob", "tie"),
    row(2, "ann", "b"), row(2, "ann", "undo"), row(2, "ann", "a", seconds=8.0),
    row(2, "bob", "b", image_a="2b", image_b="2a"),  # the sides are named the other way: it is a
    row(3, "ann", "skip", seconds=99.0), row(3, "bob", "b"),
    row(0, "ann", "a", round=1), row(1, "ann", "a", round=1, shown="ba"),
]  # fmt: skip


def test_the_report():
    found = agreement(ROWS)
    assert (found["lines"], found["judgements"], found["pairs"]) == (12, 9, 4)
    assert found["between"]["pairs"] == 3  # the skipped one is not shared, repeats are not others
    assert found["between"]["raw"]["value"] == pytest.approx(2 / 3)
    assert found["between"]["without_ties"] == 1.0
    low, high = found["between"]["alpha_ordinal"]["interval"]
    assert low <= found["between"]["alpha_ordinal"]["value"] <= high
    (two,) = found["two"]
    assert two["users"] == ["ann", "bob"] and (two["raw"]["n"]) == 3
    assert two["kappa"] == pytest.approx(kappa([0, 2, 0], [0, 1, 0]))
    ann, bob = found["annotators"]
    assert (ann["judgements"], ann["skips"], ann["undone"], ann["seconds"]) == (5, 1, 1, 3.0)
    assert (ann["self"]["n"], ann["self"]["value"]) == (2, 0.5)
    assert (ann["left"]["n"], ann["left"]["value"]) == (5, 3 / 5)
    assert bob["ties"]["value"] == 0.25 and bob["self"]["value"] is None
    assert bob["seconds"] is None


def test_a_leaning_hand_shows():
    rows = [row(i, "ann", "a" if i % 2 else "b", shown="ab" if i % 2 else "ba") for i in range(40)]
    (ann,) = agreement(rows)["annotators"]
    assert ann["left"]["value"] == 1.0 and ann["left"]["interval"][0] > 0.9
    assert agreement(rows)["between"] == {"pairs": 0}


def test_the_summary_on_the_command_line(tmp_path, capsys):
    import json

    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    assert main(["label", "--summary", str(path)]) == 0
    text = capsys.readouterr().out
    assert "9 judgements of 4 pairs by 2 annotators" in text and "ann and bob" in text
    assert "Krippendorff's alpha, ordinal" in text
    assert main(["label", "--summary", str(tmp_path / "none.jsonl")]) == 2
    path.write_text('{"image": "a.png", "rating": 3}\n')
    main(["label", "--summary", str(path)])
    assert "0 judgements" in capsys.readouterr().out
