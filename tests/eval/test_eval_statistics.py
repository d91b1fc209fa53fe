"""Bootstrap intervals: closed forms, coverage, and the cases that must not look certain."""

import math

import numpy as np
import pytest

from eval.statistics import (
    Interval,
    bootstrap_mean,
    bootstrap_task_mean,
    fewest_changes,
    paired_difference,
)


def test_width_agrees_with_the_normal_interval_of_independent_samples():
    x = np.random.default_rng(0).normal(5.0, 2.0, 400)
    found = bootstrap_mean(x, samples=8000)
    half = 1.96 * x.std(ddof=1) / math.sqrt(len(x))
    assert found.mean == pytest.approx(x.mean())
    assert found.low == pytest.approx(x.mean() - half, abs=0.06 * half)
    assert found.high == pytest.approx(x.mean() + half, abs=0.06 * half)
    assert (found.n, found.clusters, found.unit) == (400, 400, "sample")


def test_two_values_give_the_rao_wu_variance():
    """With n - 1 = 1 draw a replicate is either value: variance d^2 / 4 = s^2 / n, unbiased."""
    found = bootstrap_mean([0.2, 0.6])
    assert (found.mean, found.low, found.high) == pytest.approx((0.4, 0.2, 0.6))


def test_copies_of_a_prompt_add_no_information():
    prompts = np.repeat(np.arange(50), 8)
    one = np.random.default_rng(1).random(50)
    alone, copied = bootstrap_mean(one, np.arange(50)), bootstrap_mean(one[prompts], prompts)
    assert copied.unit == "prompt" and copied.clusters == 50
    assert copied.high - copied.low == pytest.approx(alone.high - alone.low, rel=0.05)
    naive = bootstrap_mean(one[prompts])
    assert naive.high - naive.low < 0.5 * (copied.high - copied.low)


def test_coverage_of_clustered_data_is_near_nominal():
    rng = np.random.default_rng(2)
    hits, trials = 0, 300
    for t in range(trials):
        rate = rng.beta(2, 2, 25)  # each prompt has its own difficulty
        x = (rng.random((25, 4)) < rate[:, None]).astype(float).ravel()
        found = bootstrap_mean(x, np.repeat(np.arange(25), 4), samples=400, seed=t)
        hits += found.low <= 0.5 <= found.high
    assert 0.90 <= hits / trials <= 0.99


def test_few_prompts_resample_samples_instead_of_collapsing():
    x = [0.0, 1.0] * 20
    found = bootstrap_mean(x, ["the only prompt"] * 40)
    assert (found.unit, found.clusters) == ("sample", 1)
    assert found.high - found.low > 0.2
    ten = bootstrap_mean(x, [f"prompt {i % 10}" for i in range(40)])
    assert ten.unit == "prompt"


def test_all_right_and_all_wrong_are_not_certain():
    right, wrong = bootstrap_mean([1.0] * 40), bootstrap_mean([0.0] * 40)
    assert right.mean == right.high == 1.0 and wrong.mean == wrong.low == 0.0
    # Jeffreys: the 2.5 % quantile of Beta(40.5, 0.5) is 0.9396
    assert right.low == pytest.approx(0.9396, abs=0.006)
    assert wrong.high == pytest.approx(1 - right.low, abs=0.006)


def test_single_values():
    share = bootstrap_mean([1.0])
    assert share.mean == 1.0 and share.low < 0.3 and share.high == 1.0
    reward = bootstrap_mean([0.37])
    assert reward.mean == 0.37 and not reward.defined and reward.unit == "none"
    empty = bootstrap_mean([])
    assert math.isnan(empty.mean) and not empty.defined


def test_equal_values_other_than_shares_have_no_spread():
    found = bootstrap_mean([0.5] * 12)
    assert (found.low, found.high) == (0.5, 0.5)


def test_task_mean_weighs_tasks_equally():
    tasks = {"a": ([1.0, 0.0], None), "b": ([1.0, 1.0, 1.0, 0.0] * 10, None)}
    found = bootstrap_task_mean(tasks)
    assert found.mean == pytest.approx((0.5 + 0.75) / 2) and found.n == 42
    assert found.low < found.mean < found.high


def test_task_mean_width_is_the_stratified_one():
    rng = np.random.default_rng(3)
    values = {str(i): rng.normal(i, 1 + i, 200) for i in range(3)}
    found = bootstrap_task_mean({t: (v, None) for t, v in values.items()}, samples=8000)
    error = math.sqrt(sum(v.var(ddof=1) / 200 for v in values.values())) / 3
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.06)


def test_task_without_samples_leaves_no_mean_over_tasks():
    assert math.isnan(bootstrap_task_mean({"a": ([1.0, 0.0], None), "b": ([], None)}).mean)


def _paired(changes, tasks=("a", "b")):
    keys = [f"{t}{i}" for t in tasks for i in range(len(changes))]
    before = dict.fromkeys(keys, 0.5)
    after = {k: 0.5 + c for k, c in zip(keys, list(changes) * len(tasks), strict=True)}
    return paired_difference(before, after, {k: k for k in keys}, {k: k[0] for k in keys})


def test_paired_difference_known_answer():
    found = _paired(np.linspace(0.0, 0.4, 21))
    assert found.interval.mean == pytest.approx(0.2)
    assert (found.before, found.after) == pytest.approx((0.5, 0.7))
    assert found.excludes_zero and found.changed == 40 and set(found.tasks) == {"a", "b"}
    down = _paired(-np.linspace(0.0, 0.4, 21))
    assert down.excludes_zero and down.interval.high < 0


def test_pairing_removes_what_prompts_share():
    rng = np.random.default_rng(4)
    base = {f"k{i}": v for i, v in enumerate(rng.normal(0, 10, 60))}
    after = {k: v + rng.normal(0.5, 0.5) for k, v in base.items()}
    clusters, tasks = {k: k for k in base}, dict.fromkeys(base, "t")
    assert paired_difference(base, after, clusters, tasks).excludes_zero


def test_no_change_includes_zero():
    same = _paired([0.0] * 30)
    assert (same.interval.low, same.interval.high) == (0.0, 0.0) and not same.excludes_zero
    assert not _paired([0.2, -0.2] * 15).excludes_zero


def test_a_handful_of_changes_is_no_effect():
    """Four of eighty one-sided changes: the bootstrap excludes zero, a sign test says p = 0.125."""
    few = _paired([0.5] * 2 + [0.0] * 8)
    assert few.changed == 4 < fewest_changes() == 6
    assert not few.excludes_zero
    assert not _paired([0.5]).excludes_zero and not _paired([0.5]).interval.defined


def test_false_alarms_are_about_one_in_twenty():
    rng = np.random.default_rng(5)
    keys = [f"{t}{i}" for t in "ab" for i in range(30)]
    alarms = 0
    for t in range(200):
        before, after = (dict(zip(keys, rng.random(60), strict=True)) for _ in range(2))
        found = paired_difference(
            before, after, {k: k for k in keys}, {k: k[0] for k in keys}, samples=400, seed=t
        )
        alarms += found.excludes_zero
    assert alarms / 200 < 0.11


def test_results_repeat_and_ignore_task_order():
    tasks = {t: (np.random.default_rng(i).random(30), None) for i, t in enumerate("abc")}
    flipped = dict(reversed(tasks.items()))
    assert bootstrap_task_mean(tasks) == bootstrap_task_mean(flipped)
    assert bootstrap_mean([0.1, 0.9, 0.4], seed=1) == bootstrap_mean([0.1, 0.9, 0.4], seed=1)


def test_errors_name_the_problem():
    with pytest.raises(ValueError, match="finite"):
        bootstrap_mean([1.0, math.nan])
    with pytest.raises(ValueError, match="2 clusters for 3 values"):
        bootstrap_mean([1.0, 2.0, 3.0], ["a", "b"])
    with pytest.raises(ValueError, match="level"):
        bootstrap_mean([1.0, 2.0], level=95)
    with pytest.raises(ValueError, match="one side only"):
        paired_difference({"a": 1.0}, {"b": 1.0}, {}, {})
    with pytest.raises(ValueError, match="at least one pair"):
        paired_difference({}, {}, {}, {})


def test_interval_survives_json():
    for found in (bootstrap_mean([0.0, 1.0, 1.0]), bootstrap_mean([0.4])):
        back = Interval.from_json(found.to_json())
        assert repr(back) == repr(found)
