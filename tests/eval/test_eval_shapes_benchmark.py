"""The shapes benchmark: balanced requests, stable seeds, exact judging."""

import random
from collections import Counter

import pytest

from eval.benchmarks.shapes import ShapesBenchmark, request_seed
from mmalign.protocols import Benchmark
from mmalign.registry import BENCHMARKS
from mmalign.shapes import TASKS, parse, render, sample_scene, sample_spec
from mmalign.types import Media


@pytest.fixture(scope="module")
def benchmark() -> ShapesBenchmark:
    return ShapesBenchmark()


def _media(requests, spec_of):
    rngs = [random.Random(r.seed) for r in requests]
    pairs = zip(requests, rngs, strict=True)
    return Media.from_pil([render(sample_scene(spec_of(r, g), g)) for r, g in pairs])


def test_is_a_registered_benchmark(benchmark):
    assert isinstance(benchmark, Benchmark) and BENCHMARKS.load("shapes") is ShapesBenchmark
    assert (benchmark.name, benchmark.version) == ("shapes", "1")


def test_every_task_has_the_same_number_of_pictures(benchmark):
    requests = benchmark.requests()
    assert Counter(r.task for r in requests) == dict.fromkeys(TASKS, 40)
    assert len({r.key for r in requests}) == len({r.seed for r in requests}) == 240
    assert all(parse(r.prompt).task == r.task for r in requests)


def test_small_families_get_more_samples_of_each_prompt(benchmark):
    single = [r for r in benchmark.requests() if r.task == "single_object"]
    assert Counter(Counter(r.prompt for r in single).values()) == {8: 5}
    position = [r for r in benchmark.requests() if r.task == "position"]
    assert Counter(Counter(r.prompt for r in position).values()) == {2: 20}


@pytest.mark.parametrize("limit", [1, 6, 13, 100])
def test_limit_keeps_tasks_balanced_and_requests_unchanged(benchmark, limit):
    kept = benchmark.requests(limit)
    assert kept == benchmark.requests()[:limit]
    sizes = Counter(r.task for r in kept)
    assert max(sizes.values()) - min(sizes.get(t, 0) for t in TASKS) <= 1


def test_seeds_are_pinned(benchmark):
    """These numbers are part of version 1; changing them needs a new version."""
    assert request_seed("shapes", "1", "a photo of a star", 0) == 7803064550089143112
    for request in benchmark.requests(30):
        assert request.seed == request_seed("shapes", "1", request.prompt, request.sample)
        assert 0 <= request.seed < 2**63


def test_seed_of_a_prompt_does_not_depend_on_the_benchmark_size(benchmark):
    small = {(r.prompt, r.sample): r.seed for r in ShapesBenchmark(prompts_per_task=3).requests()}
    large = {(r.prompt, r.sample): r.seed for r in benchmark.requests()}
    shared = small.keys() & large.keys()
    assert len(shared) > 20 and all(small[k] == large[k] for k in shared)


def test_true_scenes_score_one(benchmark):
    requests = benchmark.requests()
    score = benchmark.judge(_media(requests, lambda r, g: parse(r.prompt)), requests)
    assert score.valid.all() and score.value.tolist() == [1.0] * len(requests)
    assert (score.parts["partial"] >= 0.9).all()
    assert score.identity == benchmark.identity and "shapes_strict" in score.identity


def test_wrong_scenes_score_nearly_zero(benchmark):
    requests = benchmark.requests()

    def other(request, rng):
        wanted = parse(request.prompt)
        while True:
            scene_of = sample_spec(rng, "train", request.task)
            if not sample_scene(scene_of, rng).satisfies(wanted) and scene_of != wanted:
                return scene_of

    score = benchmark.judge(_media(requests, other), requests)
    # A scene drawn for another prompt can satisfy this one by chance, rarely.
    assert score.value.mean() < 0.08
    assert score.parts["partial"].mean() < 0.75


def test_errors_name_the_dial():
    with pytest.raises(ValueError, match="samples_per_prompt must be 1 or more"):
        ShapesBenchmark(samples_per_prompt=0)
    with pytest.raises(ValueError, match="unknown split 'tset'"):
        ShapesBenchmark(split="tset")
    with pytest.raises(ValueError, match="limit"):
        ShapesBenchmark().requests(0)
