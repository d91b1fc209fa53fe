"""Following a map: by hand on rendered scenes, and through the harness with a real ControlNet."""

from __future__ import annotations

import random

import pytest
import torch

from eval.benchmarks.shapes_control import ShapesControl
from eval.harness import run_benchmark
from mmalign.policies.load import load_policy
from mmalign.runtime.seeds import stable_seed
from mmalign.shapes import parse, render, sample_scene
from mmalign.shapes.grammar import COLORS
from mmalign.shapes.segments import UNKNOWN
from mmalign.types import Media


@pytest.fixture(scope="module")
def benchmark() -> ShapesControl:
    return ShapesControl(prompts_per_task=2, samples_per_prompt=1)


def drawn(requests, seeds) -> Media:
    """The scenes that the maps of requests with such seeds are made of."""
    return Media.from_pil(
        [
            render(sample_scene(parse(r.prompt), random.Random(stable_seed("map", s))))
            for r, s in zip(requests, seeds, strict=True)
        ]
    )


def test_a_map_shows_the_objects_of_its_prompt(benchmark):
    names = list(COLORS)
    prompts = ["a photo of a red star", "a photo of two blue crosses"]
    maps = benchmark.maps(prompts, [1, 2], 32)
    shown = [set(m[m > 0].unique().tolist()) for m in maps]
    assert shown == [{1 + names.index("red")}, {1 + names.index("blue")}]
    assert maps.shape == (2, 32, 32) and maps[0, 0, 0] == 0


def test_the_scene_of_the_map_is_wholly_right_and_another_is_not(benchmark):
    requests = benchmark.requests()
    right = benchmark.judge(drawn(requests, [r.seed for r in requests]), requests)
    assert right.valid.all() and right.value.min() == 1 and right.parts["everywhere"].min() == 1
    assert right.parts["accuracy"].mean() > 0.9
    moved = benchmark.judge(drawn(requests, [r.seed + 1 for r in requests]), requests)
    # What the prompt asks for is there, only elsewhere: that is not what is measured here.
    assert moved.parts["accuracy"].mean() > 0.9 and moved.value.mean() < 0.6


def test_shares_are_those_of_pixels(benchmark):
    request = benchmark.requests(1)[0]
    media = drawn([request], [request.seed])
    labels = benchmark.maps([request.prompt], [request.seed], 64)
    half = media.data.clone()
    half[..., :32] = 0.5  # grey: background
    score = benchmark.judge(Media(half), [request])
    lost = (labels[..., :32] > 0).sum()
    assert score.value.item() == pytest.approx(1 - (lost / (labels > 0).sum()).item())
    wrong = lost / (labels != UNKNOWN).sum()
    assert score.parts["everywhere"].item() == pytest.approx(1 - wrong.item(), abs=1e-6)


def test_pictures_that_are_no_square_are_refused(benchmark):
    with pytest.raises(ValueError, match="square, a picture is 16 x 32"):
        benchmark.judge(Media(torch.rand(1, 3, 32, 16)), benchmark.requests(1))


def test_only_a_generator_that_can_be_given_a_map_is_measured(benchmark):
    plain = load_policy("tiny-sd3")
    with pytest.raises(ValueError, match=r"tiny-sd3.*-o conditioned=false"):
        run_benchmark(plain, benchmark, limit=2, steps=1, progress=False)
    free = ShapesControl(prompts_per_task=2, samples_per_prompt=1, conditioned=False)
    assert len(run_benchmark(plain, free, limit=2, steps=1, progress=False).rows) == 2


def test_the_map_reaches_the_controlnet(benchmark, tmp_path):
    policy = load_policy("tiny-sd3-control")
    free = ShapesControl(prompts_per_task=2, samples_per_prompt=1, conditioned=False)
    options = {"limit": 2, "steps": 2, "guidance_scale": 2.0, "progress": False}
    blind = run_benchmark(policy, free, tmp_path / "free", **options)
    fresh = run_benchmark(policy, benchmark, tmp_path / "fresh", **options)
    pixels = [[r.image_path(row).read_bytes() for row in r.rows] for r in (blind, fresh)]
    assert pixels[0] == pixels[1]  # its last layers are zero as yet
    with torch.no_grad():
        for layer in policy.pipeline.controlnet.controlnet_blocks:
            layer.weight.normal_()
    led = run_benchmark(policy, benchmark, tmp_path / "led", **options)
    assert all(
        led.image_path(a).read_bytes() != blind.image_path(b).read_bytes()
        for a, b in zip(led.rows, blind.rows, strict=True)
    )
    assert set(led.numbers) == {"everywhere", "accuracy"} and led.numbers["everywhere"] is not None
    assert blind.settings["options"]["conditioned"] is False
