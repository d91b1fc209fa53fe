"""The benchmark of reward gradients: what is measured over the steps with a gradient."""

from __future__ import annotations

import json

import pytest

from mmalign import cli
from mmalign.commands.bench_gradient import counts, summary
from mmalign.commands.common import CommandError
from mmalign.config import ConfigError
from trainers.bench_gradient import bench_gradient_steps

DIALS = {
    "device": "cpu", "dtype": "fp32", "batch_size": 2, "images": 2, "steps": 3, "repeats": 1,
    "guidance_scale": 1.0,
}  # fmt: skip


def test_rows_hold_times_evaluations_and_memory(tmp_path):
    out = tmp_path / "deep" / "gradients.json"
    result = bench_gradient_steps(
        "tiny-sd3", [1, 3], memories=("store", "checkpoint"), out=out, **DIALS
    )
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    found = {(r["memory"], r["last"]): r for r in result["rows"]}
    # 2 images of 3 steps, and those with a gradient again where they are not kept.
    assert {key: row["evaluations"] for key, row in found.items()} == {
        ("store", 1): 6, ("store", 3): 6, ("checkpoint", 1): 8, ("checkpoint", 3): 12,
    }  # fmt: skip
    for row in found.values():
        assert row["images_per_second"]["median"] == pytest.approx(2 / row["seconds"]["median"])
        assert row["peak_bytes"] > 1e8
    lines = summary(result).splitlines()
    assert "tiny-sd3 on cpu" in lines[0] and "shapes_clip" in lines[0]
    assert [line.split()[:2] for line in lines[2:]] == [
        ["store", "1"], ["store", "3"], ["checkpoint", "1"], ["checkpoint", "3"],
    ]  # fmt: skip


def test_wrong_counts_and_rewards_are_refused():
    with pytest.raises(ConfigError, match=r"4 steps with a gradient do not fit 3 .* in 1\.\.3"):
        bench_gradient_steps("tiny-sd3", [1, 4], **DIALS)
    with pytest.raises(ConfigError, match="'shapes_strict' has none"):
        bench_gradient_steps("tiny-sd3", [1], reward="shapes_strict", **DIALS)
    assert counts("1, 2,8") == [1, 2, 8]
    with pytest.raises(CommandError, match="'x' is no whole number"):
        counts("1,x")
    assert cli.main(["bench", "--gradient-steps", "1"]) == 2
    wrong = ["--gradient-steps", "1", "--kl-beta", "1"]
    assert cli.main(["bench", "--policy", "tiny-sd3", *wrong]) == 2
