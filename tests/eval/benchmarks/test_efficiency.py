"""What a generator costs, measured on the shipped flow model."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.benchmarks.efficiency import Efficiency
from eval.entry import evaluate
from eval.harness import SettingsMismatchError, run_benchmark
from eval.result import EvalResult
from eval.workers import Workers
from mmalign.cli import main
from mmalign.types import Media


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    """One measurement through the command."""
    out = tmp_path_factory.mktemp("efficiency") / "run"
    options = ["--steps", "2", "--batch-size", "3", "-o", "repeats=3", "--device", "cpu"]
    command = ["evaluate", "--policy", "shapes-flow", "--benchmark", "efficiency"]
    assert main([*command, *options, "--out", str(out)]) == 0
    return out


def test_rounds_are_counted_while_they_run(tmp_path: Path, capfd) -> None:
    command = ["evaluate", "--policy", "shapes-flow", "--benchmark", "efficiency", "--steps", "1",
               "--batch-size", "1", "-o", "repeats=2", "--no-report"]  # fmt: skip
    assert main([*command, "--out", str(tmp_path / "told")]) == 0
    assert "efficiency: 9/9" in capfd.readouterr().err
    assert main([*command, "--quiet", "--out", str(tmp_path / "quiet")]) == 0
    assert "efficiency: " not in capfd.readouterr().err


def test_numbers_of_a_generator(measured: Path) -> None:
    result = EvalResult.load(measured / "result.json")
    numbers = result.numbers
    assert numbers["network evaluations a picture"] == 4  # two steps, two branches of guidance
    # 4 rounds, each of 3 pictures end to end, 3 by the network alone, 1 for itself.
    assert result.nfe == 4 * 4 * (3 + 3 + 1)
    # Generous bounds: another process may disturb a round.
    assert 0 < numbers["images/s"] < 2 * numbers["images/s, network only"]
    assert numbers["images/s"] == pytest.approx(result.accuracy.mean)
    assert numbers["images/s, low"] <= numbers["images/s"] <= numbers["images/s, high"]
    assert numbers["seconds for one picture"] < 2 * 3 / numbers["images/s"] < 2 * result.seconds
    assert 0.05 < numbers["peak GB of the process"] < 64
    assert len({r.prompt for r in result.rows}) == 3 and result.unit == "score"
    assert result.images_per_second == numbers["images/s"]


def test_the_hardware_is_told_and_part_of_what_must_agree(measured: Path) -> None:
    result = EvalResult.load(measured / "result.json")
    hardware = result.provenance["hardware"]
    assert hardware["device"] in result.settings["scorer"] and hardware["threads"] == 1
    assert result.settings["options"]["batch_size"] == 3 and result.settings["steps"] == 2
    assert result.provenance["environment"]["cpu"] and (measured / "report.html").is_file()
    with pytest.raises(SettingsMismatchError, match="steps: 2 there, 1 now"):
        evaluate(
            "shapes-flow", Efficiency(repeats=3), steps=1, batch_size=3, out=measured, device="cpu"
        )


def test_what_belongs_to_pictures_is_refused(studio, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not pictures: images cannot"):
        evaluate(None, "efficiency", images=tmp_path)
    with pytest.raises(ValueError, match="not pictures: limit, pin cannot"):
        evaluate("shapes-flow", "efficiency", limit=4, pin=8)
    with pytest.raises(ValueError, match="2 repeats and 1 warm-up or more, got 1"):
        Efficiency(repeats=1)
    with pytest.raises(ValueError, match="must be a list of texts"):
        Efficiency(prompts="one")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="without a launcher"):
        run_benchmark(studio.Painter(), Efficiency(), workers=Workers(0, 2))
    with pytest.raises(ValueError, match="cannot judge pictures"):
        import torch

        Efficiency().judge(Media(torch.zeros(1, 3, 8, 8)), [])
