"""A subject and its surroundings, judged on rendered scenes of known truth."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from eval.benchmarks.shapes_subject import ShapesSubject
from eval.harness import run_benchmark
from mmalign.policies.load import load_policy
from mmalign.shapes import parse, render
from mmalign.shapes.grammar import COLORS
from mmalign.shapes.scene import Scene
from mmalign.shapes.subject import SUBJECTS, subject_of, subject_scene
from mmalign.types import Media


def asked(requests, subject) -> list[Scene]:
    """A scene for each request, with the subject in it."""
    specs = [(random.Random(r.seed), parse(r.prompt.replace(" v ", " "))) for r in requests]
    return [subject_scene(subject, *one) for one in specs]


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("side", [64, 128])
def test_the_subject_in_its_place_is_right_and_plain_objects_are_not(subject, side):
    benchmark = ShapesSubject(subject=subject, samples_per_prompt=1)
    requests = benchmark.requests()
    assert len(requests) > 20
    wanted = subject_of(subject)
    scenes = asked(requests, wanted)
    drawn = benchmark.judge(Media.from_pil([render(s, side) for s in scenes]), requests)
    assert drawn.valid.all() and drawn.value.mean() > 0.95
    assert drawn.parts["texture"].mean() > 0.95
    pattern = next(n for n, rgb in COLORS.items() if rgb == wanted.pattern.rgb)
    for color in (wanted.color, pattern):
        plain = [Scene(tuple(_plain(o, wanted, color) for o in s.objects), s.background)
                 for s in scenes]  # fmt: skip
        found = benchmark.judge(Media.from_pil([render(s, side) for s in plain]), requests)
        assert found.value[found.valid].max() == 0 and found.parts["texture"].mean() < 0.05


def test_the_shipped_autoencoder_can_show_the_default_subject():
    """What it cannot, no generator of its latents learns: of `striped_star` it keeps nothing."""
    policy = load_policy("shapes-flow")
    shown = {}
    for name in ("halved_triangle", "striped_star"):
        benchmark = ShapesSubject(subject=name, samples_per_prompt=1)
        requests = benchmark.requests()
        pictures = Media.from_pil([render(s) for s in asked(requests, subject_of(name))])
        kept = policy.decode(policy.encode_image(pictures))
        shown[name] = float(benchmark.judge(kept, requests).value.nanmean())
    assert shown["halved_triangle"] > 0.95 and shown["striped_star"] < 0.1


def _plain(placed, wanted, color):
    if placed.pattern is None:
        return placed
    return replace(placed, color=color, rgb=COLORS[color], pattern=None)


def test_the_texture_without_what_else_was_asked_for_is_not_enough():
    benchmark = ShapesSubject(samples_per_prompt=1)
    requests = benchmark.requests()
    alone = [subject_scene(subject_of("halved_triangle"), random.Random(r.seed)) for r in requests]
    found = benchmark.judge(Media.from_pil([render(s) for s in alone]), requests)
    assert found.value.max() == 0 and found.parts["composition"].max() == 0
    assert found.parts["texture"].min() == 1
    numbers = benchmark.numbers([])
    assert numbers == {"texture": None, "composition": None}


def test_a_picture_that_nobody_can_read_is_unscored():
    benchmark = ShapesSubject(prompts_per_task=1, samples_per_prompt=1)
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = benchmark.judge(Media(noise), benchmark.requests())
    assert not found.valid.any() and found.notes[0]


def test_requests_name_the_subject_by_its_token_on_the_same_noise():
    one, other = ShapesSubject(prompts_per_task=3), ShapesSubject(prompts_per_task=3, token="sks")
    assert [r.seed for r in one.requests()] == [r.seed for r in other.requests()]
    assert (
        " v triangle " in one.requests(1)[0].prompt
        and " sks triangle " in other.requests(1)[0].prompt
    )
    assert len({r.key for r in one.requests()}) == 12
    for words in (("blue",), ("yellow",)):
        assert not any(w in r.prompt.split() for r in ShapesSubject().requests() for w in words)
    with pytest.raises(ValueError, match="prompts_per_task is 0"):
        ShapesSubject(prompts_per_task=0)


def test_the_generator_as_it_is_does_not_know_it(tmp_path):
    policy = load_policy("shapes-flow")
    benchmark = ShapesSubject(prompts_per_task=4, samples_per_prompt=2)
    found = run_benchmark(policy, benchmark, tmp_path, steps=8, guidance_scale=1.0, progress=False)
    assert found.numbers["texture"] == 0
