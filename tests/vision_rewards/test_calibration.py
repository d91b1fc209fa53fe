"""Reference statistics put a reward on a scale, and only the reward they were made with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmalign import api
from mmalign.types import Score
from vision_rewards.compose import CalibrationError, Reference, build
from vision_rewards.factory import load_reward

VALUES = (0.0, 1.0, 1.0, 2.0, 6.0)


def test_statistics() -> None:
    known = Reference("r", VALUES)
    tensor = torch.tensor(VALUES, dtype=torch.float64)
    assert known.mean == pytest.approx(float(tensor.mean()))
    assert known.std == pytest.approx(float(tensor.std(unbiased=False)))
    assert known.quantile(0.85) == pytest.approx(float(tensor.quantile(0.85)))


def test_cdf_is_monotone_and_hits_the_ranks() -> None:
    known = Reference("r", VALUES)
    # Middle ranks are 0, 1.5 (two equal values), 3 and 4 of 0..4.
    grid = torch.tensor([-5.0, 0.0, 1.0, 2.0, 6.0, 99.0])
    expected = torch.tensor([0.0, 0.0, 1.5 / 4, 3 / 4, 1.0, 1.0])
    torch.testing.assert_close(known.cdf(grid), expected)
    assert known.cdf(torch.tensor([4.0])).item() == pytest.approx(0.875)
    many = known.cdf(torch.linspace(-1, 7, 200))
    assert (many.diff() >= 0).all()


def test_quantiles_of_the_reference_itself_are_uniform() -> None:
    values = torch.randn(500, generator=torch.Generator().manual_seed(0))
    share = Reference("r", tuple(values.tolist())).cdf(values)
    assert share.mean().item() == pytest.approx(0.5, abs=1e-3)
    assert share.sort().values.sub(torch.linspace(0, 1, 500)).abs().max() < 1e-3


def test_unscored_samples_are_left_out() -> None:
    score = Score.of(torch.tensor([1.0, torch.nan, 3.0]), "id")
    known = Reference.of(score, ["p", "p", "q"])
    assert known.values == (1.0, 3.0) and known.prompts == {"p": (1.0,), "q": (3.0,)}
    with pytest.raises(CalibrationError, match="at least 2"):
        Reference.of(score[[0]], ["p"])


def test_round_trip_and_unusable_files(tmp_path: Path) -> None:
    known = Reference.of(Score.of(torch.tensor([1.0, 2.0, 4.0]), "id"), ["p", "q", "p"])
    known.save(tmp_path / "r.json")
    assert Reference.load(tmp_path / "r.json") == known
    assert Reference.load(tmp_path / "r.json").digest == known.digest
    (tmp_path / "bad.json").write_text('{"format": 1, "values": []}')
    (tmp_path / "none.json").write_text("[]")
    for name in ("bad", "none"):
        with pytest.raises(CalibrationError, match="mmalign calibrate"):
            Reference.load(tmp_path / f"{name}.json")
    with pytest.raises(FileNotFoundError):
        Reference.load(tmp_path / "missing.json")


def test_the_command_makes_what_the_composition_reads(tmp_path: Path, cli) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(6):
        noise = torch.randint(0, 8 * (i + 1), (16, 16, 3), dtype=torch.uint8).numpy()
        Image.fromarray(noise).save(folder / f"{i}.png")
    out = tmp_path / "ref.json"
    done = cli(
        "calibrate", str(folder), "--reward", "jpeg_incompressibility", "--prompt", "x",
        "--out", str(out),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "6 of 6 pictures scored" in done.stdout
    data = json.loads(out.read_text())
    assert data["count"] == 6 and data["reward"] == load_reward("jpeg_incompressibility").identity

    spec = {"compose": "calibrated", "parts": ["jpeg_incompressibility"], "reference": str(out)}
    scaled = api.score(folder, None, spec)
    assert scaled.value.mean().item() == pytest.approx(0.0, abs=1e-4)
    assert scaled.value.std(unbiased=False).item() == pytest.approx(1.0, abs=1e-4)
    with pytest.raises(CalibrationError, match="not by 'shapes_strict"):
        build("calibrated", {"s": (load_reward("shapes_strict"), 1.0)}, {"reference": str(out)})
