"""The panel's statistics against closed forms, and its false-alarm rate against its design."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from mmalign.config import ConfigError, from_dict
from mmalign.registry import UnknownNameError
from trainers.panel_config import PanelConfig
from trainers.panel_flags import (
    Look,
    change,
    correlation_change,
    decide,
    deviation,
    diversity_share,
    gap,
    mean_of,
    share_of_look,
    spearman,
)

PROMPTS, SAMPLES = 24, 4


def values(rng, shift=0.0, spread=1.0):
    """``(P, K)`` scores; prompts differ more than the samples of one."""
    prompt = rng.normal(size=(PROMPTS, 1))
    return prompt + shift + spread * rng.normal(size=(PROMPTS, SAMPLES))


def moved(rng, start, by=0.0, noise=0.5):
    """Scores of the same prompts and seeds later: changed by ``by`` and a prompt's own whim."""
    whim = noise * rng.normal(size=(PROMPTS, 1))
    return start + by + whim + noise * rng.normal(size=start.shape)


# --- estimates ------------------------------------------------------------------------------------


def test_p_values_and_intervals_are_those_of_the_t_test():
    start = values(rng := np.random.default_rng(0))
    now = moved(rng, start, by=-0.2)
    found = change(now, start)
    per_prompt = (now - start).mean(1)
    assert found.mean == pytest.approx(per_prompt.mean())
    for bound in (-0.5, 0.0, 0.3):
        less = stats.ttest_1samp(per_prompt, bound, alternative="less").pvalue
        assert found.p_below(bound) == pytest.approx(less, rel=1e-9)
        assert found.p_above(bound) == pytest.approx(1 - less, rel=1e-6)
    low, high = found.interval(0.005)
    wanted = stats.t.interval(0.99, PROMPTS - 1, per_prompt.mean(), stats.sem(per_prompt))
    assert (low, high) == pytest.approx(wanted)
    # The test and the interval are one decision.
    assert found.p_below(high) == pytest.approx(0.005)


def test_unscored_pictures_take_no_part():
    start = np.array([[1.0, 2.0], [3.0, np.nan], [np.nan, np.nan], [0.0, 0.0], [5.0, 5.0]])
    now = np.array([[2.0, np.nan], [4.0, 9.0], [7.0, 7.0], [1.0, 3.0], [6.0, 6.0]])
    found = change(now, start)
    # Prompt 0: +1 by its first picture; 1: +1; 2 has no pair; 3: (1 + 3) / 2; 4: +1.
    assert found.n == 4 and found.mean == pytest.approx((1 + 1 + 2 + 1) / 4)
    assert deviation(start) == pytest.approx(np.std([1, 2, 3, 0, 0, 5, 5]))
    look = Look(reward=now, judges={"j": start})
    assert spearman(look.reward, start) == pytest.approx(
        stats.spearmanr([2, 4, 1, 3, 6, 6], [1, 3, 0, 0, 5, 5]).statistic
    )


@pytest.mark.parametrize("few", [np.array([-1.0, -1.1, -0.9]), np.array([np.nan] * 8)])
def test_too_little_to_go_by_decides_nothing(few):
    assert mean_of(few).p_below(0.0) == 1.0 and mean_of(few).interval(0.01) == (-np.inf, np.inf)


def test_equal_changes_are_certain_without_spread():
    same = mean_of(np.full(8, -0.25))
    assert same.p_below(-0.2) == 0.0 and same.p_below(-0.25) == 1.0 and same.p_above(0.0) == 1.0


def test_rank_correlation_is_that_of_scipy_with_ties():
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 5, 60).astype(float), rng.normal(size=60)
    assert spearman(a, b + a) == pytest.approx(stats.spearmanr(a, b + a).statistic)
    assert np.isnan(spearman(np.ones(9), np.arange(9.0)))


def test_jackknife_error_is_near_the_spread_over_repetitions():
    rng, found, errors = np.random.default_rng(2), [], []
    for _ in range(60):
        a = rng.normal(size=(PROMPTS, 2))
        look = Look(reward=a, judges={"j": a + rng.normal(size=a.shape)})
        estimate, fall = correlation_change(look, look, "j")
        found.append(estimate.mean)
        errors.append(estimate.error)
        assert fall.mean == 0 and fall.error == 0
    assert np.mean(errors) == pytest.approx(np.std(found), rel=0.3)


def test_gap_is_in_deviations_of_the_start():
    start = Look(reward=np.array([[0.0, 2.0]] * 4), judges={"j": np.array([[10.0, 30.0]] * 4)})
    now = Look(reward=start.reward + 3, judges={"j": start.judges["j"] - 5})
    assert gap(now, start, "j") == pytest.approx(3 / 1 - (-5 / 10))
    flat = Look(reward=start.reward, judges={"j": np.ones((4, 2))})
    assert np.isnan(gap(flat, flat, "j"))


# --- rules ----------------------------------------------------------------------------------------


def scene(rng, reward=0.0, judge=0.0, probe=0.0, diversity=1.0, kl=0.0):
    """A start and a later look with these changes."""
    first = {n: values(rng) for n in ("reward", "judge", "probe")}
    alike = rng.uniform(0.3, 0.5, PROMPTS)
    start = Look(
        reward=first["reward"], judges={"j": first["judge"] + first["reward"]},
        probes={"p": first["probe"]}, diversity=alike, kl=np.zeros(PROMPTS),
    )  # fmt: skip
    now = Look(
        reward=moved(rng, start.reward, reward), judges={"j": moved(rng, start.judges["j"], judge)},
        probes={"p": moved(rng, start.probes["p"], probe)},
        diversity=diversity * alike + 0.01 * rng.normal(size=PROMPTS),
        kl=kl * rng.uniform(0.8, 1.2, PROMPTS),
    )  # fmt: skip
    return start, now


ALL = {"hacking": 0.1, "judge_drop": 0.1, "diversity": 0.7, "probe": 0.5, "kl": 0.5}


@pytest.mark.parametrize(
    ("changes", "raised"),
    [
        ({}, set()),
        ({"reward": 2.0}, set()),
        ({"reward": 2.0, "judge": 2.0}, set()),
        ({"reward": 2.0, "judge": -2.0}, {"hacking", "judge_drop"}),
        ({"judge": -2.0}, {"judge_drop"}),
        ({"reward": -2.0, "judge": -2.0}, {"judge_drop"}),
        ({"probe": 2.0}, {"probe"}),
        ({"probe": -2.0}, {"probe"}),
        ({"diversity": 0.5}, {"diversity"}),
        ({"diversity": 0.9}, set()),
        ({"kl": 0.7}, {"kl"}),
        ({"kl": 0.3}, set()),
    ],
)
def test_each_rule_sees_what_it_is_for(changes, raised):
    start, now = scene(np.random.default_rng(3), **changes)
    found = decide(ALL.items(), now, start, {"p": "both"}, 0.01)
    assert {f.rule for f in found if f.raised} == raised
    assert len(found) == 5 and all(f.subject in f.words for f in found)


@pytest.mark.parametrize(("side", "raised"), [("low", False), ("high", True), ("both", True)])
def test_a_probe_is_a_concern_on_its_side_only(side, raised):
    start, now = scene(np.random.default_rng(4), probe=2.0)
    (found,) = decide([("probe", 0.5)], now, start, {"p": side}, 0.01)
    assert found.raised is raised


def test_a_judge_that_turns_against_the_reward_loses_its_correlation():
    rng = np.random.default_rng(5)
    start, now = scene(rng)
    (silent,) = decide([("correlation", 0.0)], now, start, {}, 0.01)
    turned = Look(reward=now.reward, judges={"j": -now.reward + 0.3 * values(rng)})
    (found,) = decide([("correlation", 0.0)], turned, start, {}, 0.01)
    assert found.raised and not silent.raised and found.estimate < 0 < silent.estimate
    # What was never in agreement has not been lost.
    (same,) = decide([("correlation", 0.0)], turned, turned, {}, 0.01)
    assert not same.raised


def test_a_margin_is_in_deviations_of_the_start():
    start, now = scene(np.random.default_rng(6), reward=2.0, judge=-0.8)
    one, two = (decide([("hacking", m)], now, start, {}, 0.01)[0] for m in (0.1, 1.0))
    assert one.raised and not two.raised
    assert two.bound == pytest.approx(-deviation(start.judges["j"]))


def test_what_was_not_measured_is_not_tested():
    bare = Look(reward=values(np.random.default_rng(7)))
    assert decide({**ALL, "correlation": 0.0, "velocity": 1.0}.items(), bare, bare, {}, 0.05) == []
    assert np.isnan(diversity_share(bare, bare))


# --- the false-alarm rate -------------------------------------------------------------------------


def test_looks_never_spend_more_than_alpha():
    spent = []
    for left in range(6, 0, -1):
        spent.append(share_of_look(0.05, sum(spent), left))
    assert spent == pytest.approx([0.05 / 7] * 6)  # equal parts, and one is left
    for left in range(40, 0, -1):  # the run is extended
        spent.append(share_of_look(0.05, sum(spent), left))
    assert sum(spent) < 0.05 and min(spent) > 0
    assert share_of_look(0.01, 0.02, 3) == 0.0


def alarms(runs: int, looks: int, corrected: bool, alpha: float = 0.05) -> float:
    """Share of runs in which nothing is wrong, looked at again and again, that raise a flag.

    Margins are 0, so every null hypothesis holds with equality, the worst case; the reward rises,
    so that hacking is decided by the judge alone, which is unrelated to it. Judge and probe take
    few distinct values.
    """
    rng, count = np.random.default_rng(8), 0
    rules = {"hacking": 0.0, "probe": 0.0, "diversity": 1.0, "correlation": 0.0}
    for _ in range(runs):
        start = Look(
            reward=values(rng), judges={"j": np.round(values(rng))},
            probes={"p": np.round(values(rng))}, diversity=rng.uniform(0.3, 0.5, PROMPTS),
        )  # fmt: skip
        raised = False
        for left in range(looks, 0, -1):
            now = Look(
                reward=moved(rng, start.reward, by=1.0),
                judges={"j": np.round(moved(rng, start.judges["j"]))},
                probes={"p": np.round(moved(rng, start.probes["p"]))},
                diversity=start.diversity + 0.05 * rng.normal(size=PROMPTS),
            )
            level = share_of_look(alpha, alpha * (looks - left) / (looks + 1), left)
            found = decide(rules.items(), now, start, {"p": "both"}, level if corrected else 1.0)
            limit = level / len(found) if corrected else alpha
            raised |= any(f.p < limit for f in found)
        count += raised
    return count / runs


def test_false_alarms_stay_below_their_rate_over_repeated_looks():
    """And without the correction they would not: one look in twenty errs, in every test."""
    rate = alarms(runs=300, looks=6, corrected=True)
    assert rate <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 300)
    assert alarms(runs=50, looks=6, corrected=False) > 0.3


# --- configuration --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "error", "words"),
    [
        ({"flags": {"hackin": 0.1}}, UnknownNameError, "Did you mean 'hacking'"),
        ({"flags": {"diversity": 1.5}}, ConfigError, r"flags.diversity is 1.5; it must lie in"),
        ({"flags": {"probe": -1}}, ConfigError, "flags.probe is -1"),
        ({"stop_when": ["kl"]}, ConfigError, r"write it as stop_when: \{kl: <bound>\}"),
        ({"stop_when": ["hacking"]}, ConfigError, "panel.judges is empty"),
        ({"probes": {"saturation": "up"}}, ConfigError, "one of 'low', 'high', 'both'"),
        ({"samples": 1}, ConfigError, "panel.samples is 1; it must be at least 2"),
        ({"alpha": 0.7}, ConfigError, "panel.alpha is 0.7"),
        ({"judges": "shapes_clip"}, ConfigError, "expected a list"),
    ],
)
def test_unusable_sections_are_refused(section, error, words):
    with pytest.raises((error, ConfigError), match=words):
        from_dict(PanelConfig, section, "panel")


def test_stopping_is_off_by_default_and_takes_names_or_bounds():
    assert PanelConfig().stopping == {}
    panel = from_dict(PanelConfig, {"stop_when": ["diversity"], "flags": {"diversity": 0.6}}, "p")
    assert panel.stopping == {"diversity": 0.6}
    assert from_dict(PanelConfig, {"stop_when": {"kl": 0.5}}, "p").stopping == {"kl": 0.5}


@pytest.mark.parametrize(("every", "steps", "looks"), [(10, 58, 6), (10, 60, 6), (0, 58, 1)])
def test_planned_looks(every, steps, looks):
    panel = PanelConfig(every=every)
    assert panel.planned_looks(steps) == looks and panel.planned_looks(0) == 0
