"""MixGRPO's sliding windows."""

from __future__ import annotations

import math

import pytest

from mmalign.config import ConfigError
from trainers import entry
from trainers.config import RolloutConfig
from trainers.data import recorded_steps
from trainers.windows import positions, window_of_step


def sliding(**changes) -> RolloutConfig:
    """A window of 3 among the 9 trainable steps of a grid of 10."""
    fields = {"train": "window", "window": 3, "window_start": (0, 6), "window_every": 2}
    return RolloutConfig(**{**fields, "window_strategy": "progressive", **changes})


def test_a_window_slides_from_noise_to_picture_and_starts_over():
    rollout = sliding(window_stride=2)
    seen = [window_of_step(rollout, 0, step)[0] for step in range(10)]
    assert seen == [0, 0, 2, 2, 4, 4, 6, 6, 0, 0]
    assert window_of_step(rollout, 0, 3) == (2, 3, 4)
    assert window_of_step(rollout, 5, 3) == (2, 3, 4)  # of the seed too


def test_one_cycle_trains_every_step():
    rollout = sliding()
    cycle = sum(stay for _, stay in positions(rollout))
    union = {k for step in range(cycle) for k in window_of_step(rollout, 0, step)}
    assert cycle == 14 and union == set(range(9))


def test_a_decaying_window_hurries_towards_the_picture():
    rollout = sliding(
        window_strategy="decay", window_every=10, window_decay=0.5, window_decay_from=2
    )
    stays = dict(positions(rollout))
    assert stays == {k: math.ceil(10 * math.exp(-0.5 * max(k - 2, 0))) for k in range(7)}
    assert stays[2] == 10 and stays[6] == 2


def test_random_windows_are_those_of_before():
    rollout = sliding(window_strategy="random")
    starts = [window_of_step(rollout, 0, step)[0] for step in range(60)]
    assert set(starts) == set(range(7))
    assert starts == [window_of_step(rollout, 0, step)[0] for step in range(60)]
    assert starts != [window_of_step(rollout, 1, step)[0] for step in range(60)]


def test_the_loop_pays_for_the_window_only(kit, tmp_path):
    config = kit.cheap(
        tmp_path, rollout__train="window", rollout__window=2, rollout__window_start=(0, 1),
        rollout__window_strategy="progressive", rollout__window_every=1, rollout__steps=4,
        advantage__std="group",
    )  # fmt: skip
    trainer = entry.build(config, tmp_path, kit.brightness)
    assert [recorded_steps(config, s)[0] for s in range(3)] == [(0, 1), (1, 2), (0, 1)]
    first, second = trainer.train_step(), trainer.train_step()
    assert first["nfe"] == 8 * (4 + 2)
    assert "by_step/ratio/2" in second and "by_step/ratio/0" not in second


def test_impossible_windows_are_refused():
    with pytest.raises(ConfigError, match=r"window_strategy is 'progressive', but rollout\.train"):
        RolloutConfig(window_strategy="progressive")
    with pytest.raises(ConfigError, match=r"rollout\.window_stride is 0; it must be at least 1"):
        sliding(window_stride=0)
    with pytest.raises(ConfigError, match=r"rollout\.window_decay is -1"):
        sliding(window_decay=-1.0)
