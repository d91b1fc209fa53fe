"""Scores to advantages, against numbers worked out by hand or by numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trainers.advantages import (
    PromptTracker,
    combined_advantage,
    group_advantage,
    group_statistics,
    keep_extremes,
    non_dominated,
    zero_spread_share,
)

VALUES = torch.tensor([1.0, 3.0, 5.0, 2.0, 2.0, 8.0])
GROUPS = torch.tensor([7, 7, 7, 3, 3, 3])  # ids need not be dense or sorted
ALL = torch.ones(6, dtype=torch.bool)
CENTRED = torch.tensor([-2.0, 0.0, 2.0, -2.0, -2.0, 4.0])


def test_statistics_are_numpys_per_group():
    mean, std = group_statistics(VALUES, ALL, GROUPS)
    expected = [np.std([1, 3, 5])] * 3 + [np.std([2, 2, 8])] * 3
    torch.testing.assert_close(mean, torch.tensor([3.0] * 3 + [4.0] * 3))
    torch.testing.assert_close(std, torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("eps", [1e-4, 0.5])
def test_closed_forms_of_the_three_deviations(eps):
    spread = torch.tensor([np.std([1, 3, 5])] * 3 + [np.std([2, 2, 8])] * 3).float()
    whole = float(np.std(VALUES.numpy()))
    expected = {
        "none": CENTRED,
        "group": CENTRED / (spread + eps),
        "global": CENTRED / (whole + eps),
    }
    for std, value in expected.items():
        torch.testing.assert_close(group_advantage(VALUES, ALL, GROUPS, std, eps), value)


@pytest.mark.parametrize("std", ["none", "group", "global"])
def test_unscored_samples_count_for_nothing(std):
    valid = torch.tensor([True, True, True, False, True, True])
    for filler in (torch.nan, torch.inf, 1e6):
        values = VALUES.clone()
        values[3] = filler
        got = group_advantage(values, valid, GROUPS, std)
        assert got[3] == 0
        rest = group_advantage(values[valid], ALL[valid], GROUPS[valid], std)
        torch.testing.assert_close(got[valid], rest)


@pytest.mark.parametrize("std", ["none", "group", "global"])
def test_a_group_without_spread_gets_zero(std):
    values = torch.tensor([0.1, 0.1, 0.1, 2.0, 2.0, 8.0])
    got = group_advantage(values, ALL, GROUPS, std)
    assert got[:3].abs().max() < 1e-6 and got[3:].abs().min() > 0.1
    assert not group_advantage(values, ~ALL, GROUPS, std).any()
    assert not group_advantage(torch.full((6,), 0.3), ALL, GROUPS, std).any()


def test_rounding_is_not_spread():
    values = torch.tensor([0.3, 0.3 + 3e-8, 0.3])
    assert not group_advantage(values, ALL[:3], torch.zeros(3), "group", eps=0.0).any()


@pytest.mark.parametrize("std", ["none", "group", "global"])
def test_order_of_the_samples_does_not_matter(std):
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    got = group_advantage(VALUES[order], ALL, GROUPS[order], std)
    torch.testing.assert_close(got, group_advantage(VALUES, ALL, GROUPS, std)[order])


def test_global_deviation_keeps_the_proportions_between_groups():
    """With the group's own deviation a nearly flat group counts as much as a lively one."""
    values = torch.tensor([0.50, 0.51, 0.0, 1.0])
    groups, valid = torch.tensor([0, 0, 1, 1]), ALL[:4]
    own = group_advantage(values, valid, groups, "group", 1e-8)
    whole = group_advantage(values, valid, groups, "global", 1e-8)
    torch.testing.assert_close(own, torch.tensor([-1.0, 1, -1, 1]), atol=1e-4, rtol=0)
    torch.testing.assert_close(whole[2] / whole[0], torch.tensor(100.0), rtol=1e-3, atol=0)


# --- the per-prompt tracker -----------------------------------------------------------------------


def test_tracker_uses_the_batch_until_it_has_seen_enough():
    tracker = PromptTracker(size=4, min_count=4, eps=0.0)
    values = torch.tensor([1.0, 3.0, 10.0, 20.0])
    first = tracker(values, ALL[:4], ["a", "a", "b", "b"])
    expected = (values - values.mean()) / values.std(unbiased=False)
    torch.testing.assert_close(first, expected)
    second = tracker(torch.tensor([5.0, 7.0, 30.0]), ALL[:3], ["a", "a", "c"])
    past = np.array([1, 3, 5, 7])  # "a" has its four now; "c" still takes the batch's
    batch = np.array([5, 7, 30])
    wanted = [*((np.array([5, 7]) - past.mean()) / past.std()), (30 - batch.mean()) / batch.std()]
    torch.testing.assert_close(second, torch.tensor(wanted, dtype=torch.float32))


def test_tracker_forgets_the_oldest_and_ignores_the_unscored():
    tracker = PromptTracker(size=3, min_count=2)
    valid = torch.tensor([True, False, True, True, True])
    values = torch.tensor([1.0, torch.nan, 2.0, 3.0, 4.0])
    got = tracker(values, valid, ["a"] * 5)
    assert got[1] == 0 and torch.isfinite(got).all()
    assert tracker.state_dict() == {"a": [2.0, 3.0, 4.0]}
    assert not tracker(values, torch.zeros(5, dtype=torch.bool), ["a"] * 5).any()


def test_tracker_state_survives_a_round_trip():
    tracker, copy = PromptTracker(4, 2), PromptTracker(4, 2)
    tracker(VALUES, ALL, ["a", "b", "a", "b", "c", "c"])
    copy(torch.zeros(1), ALL[:1], ["forgotten"])
    copy.load_state_dict(tracker.state_dict())
    assert copy.state_dict() == tracker.state_dict()
    new = torch.tensor([0.5, 9.0]), ALL[:2], ["a", "c"]
    assert tracker(*new).equal(copy(*new))


# --- several rewards ------------------------------------------------------------------------------


def test_combining_advantages_is_blind_to_a_rewards_scale():
    parts = {"a": VALUES, "b": torch.tensor([4.0, 1.0, 0.0, 5.0, 1.0, 3.0])}
    scaled = {"a": 1000 * VALUES, "b": parts["b"]}
    weights = {"a": 1.0, "b": 3.0}
    for std in ("group", "global"):
        one = combined_advantage(parts, weights, ALL, GROUPS, std, 1e-8)
        two = combined_advantage(scaled, weights, ALL, GROUPS, std, 1e-8)
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
        summed = [
            group_advantage(sum(w * p[n] for n, w in weights.items()), ALL, GROUPS, std, 1e-8)
            for p in (parts, scaled)
        ]
        assert (summed[0] - summed[1]).abs().max() > 0.5


def test_combined_advantage_is_the_weighted_mean():
    parts = {"a": VALUES, "b": -VALUES}
    alone = group_advantage(VALUES, ALL, GROUPS)
    got = combined_advantage(parts, {"a": 3.0, "b": 1.0}, ALL, GROUPS)
    torch.testing.assert_close(got, 0.5 * alone)
    flipped = combined_advantage(parts, {"a": 1.0, "b": -1.0}, ALL, GROUPS)
    torch.testing.assert_close(flipped, alone)


def test_a_missing_part_does_not_spoil_the_others():
    broken = VALUES.clone()
    broken[0] = torch.nan
    got = combined_advantage({"a": broken, "b": VALUES}, {"a": 1.0, "b": 1.0}, ALL, GROUPS)
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got[0], 0.5 * group_advantage(VALUES, ALL, GROUPS)[0])


# --- choosing samples -----------------------------------------------------------------------------


def test_extremes_are_the_best_and_worst_of_each_group():
    advantage = torch.tensor([0.1, -2.0, 3.0, 0.5, 9.0, 7.0, -1.0, 8.0])
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    every = torch.ones(8, dtype=torch.bool)
    mask = keep_extremes(advantage, every, groups, 2)
    assert mask.tolist() == [False, True, True, False, True, False, True, False]
    assert keep_extremes(advantage, every, groups, 4).all()
    assert keep_extremes(advantage, every, groups, 10).all()  # more than there are
    for keep in (0, 3, -2):
        with pytest.raises(ValueError, match="even number"):
            keep_extremes(advantage, every, groups, keep)


def test_extremes_are_chosen_among_scored_samples():
    """An unscored one has advantage 0, which is often among the worst."""
    values = torch.tensor([0.0, 1.0, 1.0, 1.0, 1.05, torch.nan])
    valid, groups = torch.isfinite(values), torch.zeros(6, dtype=torch.int64)
    advantage = group_advantage(values, valid, groups)
    mask = keep_extremes(advantage, valid, groups, 4)
    assert mask.tolist() == [True, True, False, True, True, False]
    lone = keep_extremes(advantage, valid & (values < 1), groups, 4)
    assert lone.tolist() == [True] + [False] * 5


def test_share_of_groups_without_spread():
    groups = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    values = torch.tensor([1.0, 1.0, 1.0, 2.0, 5.0, 9.0, 4.0, 4.0])
    valid = torch.ones(8, dtype=torch.bool)
    assert zero_spread_share(values, valid, groups) == 0.5
    valid[5] = False  # group 2 has one score left
    assert zero_spread_share(values, valid, groups) == 0.75


def test_non_dominated_samples_by_hand():
    parts = {
        "a": torch.tensor([3.0, 2.0, 1.0, 2.0, 3.0, 9.0]),
        "b": torch.tensor([1.0, 2.0, 3.0, 1.0, float("nan"), 9.0]),
    }
    groups, valid = torch.tensor([0, 0, 0, 0, 0, 1]), torch.ones(6, dtype=torch.bool)
    mask = non_dominated(parts, {"a": 1.0, "b": 1.0}, valid, groups)
    # The fourth is as good as the second in a and worse in b; the fifth lacks b; the last is alone.
    assert mask.tolist() == [True, True, True, False, False, True]
    # Any rising function of a reward leaves the set as it is; a negative weight turns it around.
    bent = {"a": parts["a"].exp(), "b": parts["b"]}
    assert torch.equal(non_dominated(bent, {"a": 5.0, "b": 0.1}, valid, groups), mask)
    turned = non_dominated(parts, {"a": -1.0, "b": 1.0}, valid, groups)
    assert turned.tolist() == [False, False, True, False, False, True]
    # With one reward only the best are left; a sample that was not scored dominates nobody.
    valid[0] = False
    one = non_dominated({"a": parts["a"]}, {"a": 1.0}, valid, groups)
    assert one.tolist() == [False, False, False, False, True, True]
