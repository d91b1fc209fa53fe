"""Training on pairs: files as rollouts, online pairs, what is refused, resuming, stopping."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from mmalign.config import ConfigError
from mmalign.runtime.log import read_jsonl
from trainers.config import ForwardConfig, OptimConfig, RolloutConfig
from trainers.loop import Trainer
from trainers.pair_config import PairConfig
from vision_rewards.guard import GuardedReward
from vision_rewards.training.records import RecordError

# The options under which the line moves within 20 steps.
OFFLINE = {
    "diffusion_dpo": {"beta": 2.0},
    "ipo": {"beta": 2.0, "tau": 0.05},
    "diffusion_kto": {"beta": 2.0},
    "mapo": {"beta": 1.0, "temperature": 2.0},
    "inpo": {"beta": 2.0},
    "sail": {"beta": 2.0, "round_steps": 8, "self_share": 0.5, "candidates": 4},
}


def build(kit, greys, config) -> Trainer:
    reward = GuardedReward(kit.brightness)
    return Trainer(config, greys.Policy(), reward, Accelerator(cpu=True), Path(config.output_dir))


def recipe(greys, folder: Path, data: Path | None, algorithm: str, **changes):
    config = greys.recipe(folder, data, algorithm, objective=OFFLINE[algorithm], **changes)
    if algorithm == "inpo":
        config = replace(config, forward=replace(config.forward, times="grid"))
    return config


@pytest.fixture(scope="module")
def data(greys, tmp_path_factory) -> Path:
    return greys.write(tmp_path_factory.mktemp("data"), ["a"] * 12)


# --- a file as rollouts ---------------------------------------------------------------------------


def test_rows_of_a_step(kit, greys, data, tmp_path):
    trainer = build(kit, greys, greys.recipe(tmp_path, data))
    source = trainer.rollouts
    rollout, nfe = source.sample(0)
    assert nfe == 0 and len(rollout) == 8 and rollout.steps == ()
    assert rollout.groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    values = rollout.final.flatten()
    assert bool((values[0::2] > 0.7).all() and (values[1::2] < -0.7).all())  # bright, dark
    assert rollout.prompts[0::2] == rollout.prompts[1::2]
    score, groups = source.score(rollout)
    assert score.value.tolist() == [1, -1] * 4 and groups.tolist() == rollout.groups.tolist()
    seen = {p for step in range(3) for p in source.sample(step)[0].prompts}
    assert seen == {f"p{n}" for n in range(12)}  # an epoch shows all of them
    assert source.seen(1) == set(rollout.prompts) and source.seen(3) == source.seen(99) == seen
    later = [p for step in range(3, 6) for p in source.sample(step)[0].prompts[::2]]
    assert set(later) == seen and later != [
        p for step in range(3) for p in source.sample(step)[0].prompts[::2]
    ]
    assert source.sample(1)[0].final.equal(source.sample(1)[0].final)


def test_level_and_noise_are_shared_in_a_pair_and_new_in_every_epoch(kit, greys, data, tmp_path):
    trainer = build(kit, greys, greys.recipe(tmp_path, data))
    draw = trainer.update.forward.draw
    first, _ = trainer.rollouts.sample(0)
    sigma, noise = draw(first, 0)
    assert sigma[0::2].equal(sigma[1::2]) and noise[0::2].equal(noise[1::2])
    assert len(set(sigma.tolist())) == 4
    again = replace(first, policy_version=3)
    assert not draw(again, 0)[0].equal(sigma)


def test_labels(kit, greys, tmp_path):
    folder = greys.write(tmp_path / "data", ["a", "b", 0.9, "tie"])
    hard = build(kit, greys, greys.recipe(tmp_path / "hard", folder, prompts_per_step=3))
    labels = {p[0].prompt: (p[0].file.name, p[0].label) for p in hard.rollouts.pairs}
    assert labels == {
        "p0": ("0_a.png", 1.0), "p1": ("1_b.png", 1.0), "p2": ("2_a.png", pytest.approx(0.8))
    }  # fmt: skip
    soft = greys.recipe(tmp_path / "soft", folder, objective={"labels": "soft", "beta": 2.0})
    trainer = build(kit, greys, soft)
    assert sorted(p[0].label for p in trainer.rollouts.pairs) == [0, pytest.approx(0.8), 1, 1]
    metrics = trainer.train_step()  # the tie counts too
    assert metrics["loss"] == pytest.approx(0.6931, abs=1e-3)


def test_prompts_are_dropped_for_whole_pairs(kit, greys, data, tmp_path):
    config = greys.recipe(tmp_path, data)
    config = replace(config, pairs=replace(config.pairs, prompt_dropout=0.5))
    source = build(kit, greys, config).rollouts
    shown = [source.sample(step)[0].prompts for step in range(6)]
    assert all(row[0::2] == row[1::2] for row in shown)
    empty = sum(p == "" for row in shown for p in row[::2])
    assert 3 < empty < 21


def test_a_share_is_held_out_by_prompt(kit, greys, data, tmp_path):
    config = greys.recipe(tmp_path, data)
    config = replace(config, pairs=replace(config.pairs, validation=0.25))
    source = build(kit, greys, config).rollouts
    train, held = ({a.prompt for a, _ in part} for part in (source.pairs, source.held_out))
    assert len(held) == 3 and len(train) == 9 and not train & held


def test_held_out_pairs_are_measured(kit, greys, data, tmp_path):
    """Brighter is better there too, which is learned from other pairs."""
    config = recipe(greys, tmp_path / "run", data, "diffusion_dpo")
    pairs = replace(config.pairs, validation=0.25, validate_every=5)
    trainer = build(kit, greys, replace(config, pairs=pairs))
    before = trainer.rollouts.metrics
    trainer.run()
    log = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in log if "held_out/loss" in r] == [5, 10, 15, 20]
    assert log[4]["held_out/loss"] > log[19]["held_out/loss"] < 0.6
    assert log[19]["held_out/implicit_accuracy"] == 1.0
    rollout, _ = trainer.rollouts.sample(19)
    assert before(rollout) == before(rollout)  # the same draws again
    plain = build(kit, greys, replace(config, output_dir=str(tmp_path / "plain")))
    assert plain.rollouts.metrics(plain.rollouts.sample(19)[0]) == {}


# --- learning -------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", sorted(OFFLINE))
def test_pictures_become_like_the_preferred_ones(kit, greys, data, tmp_path, algorithm):
    trainer = build(kit, greys, recipe(greys, tmp_path / "up", data, algorithm))
    before = greys.drawn(trainer.policy)
    trainer.run()
    up = greys.drawn(trainer.policy)
    dark = greys.write(tmp_path / "dark", ["b"] * 12)
    other = build(kit, greys, recipe(greys, tmp_path / "down", dark, algorithm))
    other.run()
    assert greys.drawn(other.policy) + 0.3 < before < up - 0.3
    log = read_jsonl(tmp_path / "up" / "metrics.jsonl")
    assert len(log) == 20 and "reward/mean" not in log[0]
    if algorithm in ("diffusion_dpo", "ipo", "inpo"):
        assert log[0]["implicit_accuracy"] == 0.5 and log[-1]["implicit_accuracy"] > 0.8
    start = {"diffusion_dpo": 0.6931472, "inpo": 0.6931472, "ipo": 100.0, "diffusion_kto": 0.5}
    if algorithm in start:
        assert log[0]["loss"] == pytest.approx(start[algorithm], abs=1e-6)


@pytest.mark.parametrize("algorithm", ["diffusion_dpo", "diffusion_kto", "mapo"])
def test_pairs_made_online(kit, greys, tmp_path, algorithm):
    options = {**OFFLINE[algorithm], **({} if algorithm == "mapo" else {"reference_every": 5})}
    config = greys.recipe(tmp_path, None, algorithm, objective=options)
    trainer = build(kit, greys, config)
    before = greys.drawn(trainer.policy)
    trainer.run()
    log = read_jsonl(tmp_path / "metrics.jsonl")
    assert greys.drawn(trainer.policy) > before + 0.5
    assert log[-1]["reward/mean"] > log[0]["reward/mean"] + 0.5
    if algorithm == "diffusion_dpo":  # right after a refresh nothing is preferred yet
        fresh = [r["step"] for r in log if abs(r["loss"] - 0.6931472) < 1e-6]
        assert fresh == [1, 6, 11, 16]


# --- resuming and stopping ------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["diffusion_dpo", "sail", "diffusion_kto"])
def test_a_resumed_run_ends_alike(kit, greys, data, tmp_path, algorithm):
    options = {"steps": 12, "save_every": 9}
    whole = recipe(greys, tmp_path / "whole", data, algorithm, **options)
    build(kit, greys, whole).run()
    part = recipe(greys, tmp_path / "part", data, algorithm, **{**options, "steps": 9})
    build(kit, greys, part).run()
    again = build(kit, greys, replace(part, steps=12))
    assert again.resume() and again.step == 9
    assert again.rollouts.latents.computed == 0
    again.run()

    one, two = greys.held(tmp_path / "whole"), greys.held(tmp_path / "part")
    assert one.keys() == two.keys()
    for version, values in one.items():
        assert all(two[version][n].equal(v) for n, v in values.items()), version


def test_the_error_of_winners_stops_the_run(kit, greys, data, tmp_path):
    options = {**OFFLINE["diffusion_dpo"], "max_winner_error": 1e-9}
    config = greys.recipe(tmp_path, data, objective=options, optim=OptimConfig(lr=2.0))
    trainer = build(kit, greys, config)
    trainer.run()
    assert 1 < trainer.step < 20 and "max_winner_error" in trainer.stopped
    again = build(kit, greys, config)
    assert again.resume() and again.finished and again.stopped == trainer.stopped


# --- own pairs ------------------------------------------------------------------------------------


def test_rounds_of_own_pairs(kit, greys, data, tmp_path):
    config = recipe(greys, tmp_path, data, "sail")
    trainer = build(kit, greys, config)
    source, objective = trainer.rollouts, trainer.update.objective
    assert source.sample(0)[1] == 0 and objective.own_pairs(0, 4) == 0
    with pytest.raises(ValueError, match="implicit rewards are 0"):
        source.sample(8)
    for _ in range(8):
        trainer.train_step()
    rollout, nfe = source.sample(8)
    assert objective.own_pairs(8, 4) == 2 and rollout.groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    # 2 prompts x 4 candidates: 4 steps to draw them, 10 draws under two versions to rank them
    assert nfe == 8 * 4 + 8 * 10 * 2
    own, labelled = rollout.prompts[:4], rollout.prompts[4:]
    assert all(p.startswith("p") and p[1:].isdigit() for p in labelled)
    assert not any(p[1:].isdigit() for p in own)
    rewards, _ = source.implicit_rewards(rollout[:4])
    assert bool((rewards[0::2] > rewards[1::2]).all())
    # Trained towards bright pictures, the model prefers its brighter ones.
    assert bool((rollout.final[0:4:2] > rollout.final[1:4:2]).all())
    assert source.score(rollout)[0].value.tolist() == [1, -1] * 4
    gap = rewards[0::2] - rewards[1::2]
    sure = source.metrics(rollout)["own/confidence"]
    assert sure == pytest.approx(float(torch.sigmoid(gap).mean()), abs=1e-6)
    assert source.seen(8) < source.seen(9) and source.seen(9) >= set(own)
    assert set(source.sample(8)[0].prompts[:4]).isdisjoint(source.sample(9)[0].prompts[:4])


def test_without_own_pairs_sail_is_dpo_whose_reference_is_renewed(kit, greys, data, tmp_path):
    sail = {"beta": 2.0, "round_steps": 5, "self_share": 0.0}
    runs = {"sail": sail, "diffusion_dpo": {"beta": 2.0, "reference_every": 5}}
    ends = []
    for algorithm, options in runs.items():
        config = greys.recipe(tmp_path / algorithm, data, algorithm, objective=options, steps=12)
        trainer = build(kit, greys, config)
        trainer.run()
        ends.append([p.detach().clone() for p in trainer.model.parameters()])
    assert all(a.equal(b) for a, b in zip(*ends, strict=True))


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"images_per_prompt": 4}, "images_per_prompt is 4.*set it to 2"),
        (
            {"algorithm": "flow_grpo", "rollout": RolloutConfig(), "forward": ForwardConfig()},
            "without the steps",
        ),
        ({"objective": {"pairing": "nested"}}, "says who is compared with whom"),
        ({"algorithm": "inpo"}, "use times: grid"),
        ({"pairs": None, "objective": {"labels": "soft"}}, "no probabilities"),
        ({"algorithm": "diffusion_kto", "objective": {"threshold": 0.5}}, "threshold is 0.5"),
        (
            {
                "pairs": PairConfig(data="x", validation=0.1),
                "algorithm": "diffusion_kto",
                "objective": {},
            },
            r"validation is 0\.1, but held-out pairs are measured by",
        ),
        ({"pairs": None, "algorithm": "sail"}, "starts from labelled pairs"),
        (
            {"objective": {"reference_every": 3}, "optim": OptimConfig(updates_per_rollout=2)},
            "reference_every is 3",
        ),
    ],
)
def test_combinations_that_mean_nothing(kit, greys, data, tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        build(kit, greys, replace(greys.recipe(tmp_path, data), **changes))


def test_data_that_cannot_be_used(kit, greys, tmp_path):
    ties = greys.write(tmp_path / "ties", ["tie"] * 3)
    with pytest.raises(ConfigError, match="all 3 pairs are ties"):
        build(kit, greys, greys.recipe(tmp_path / "a", ties))
    broken = greys.write(tmp_path / "broken", ["a"] * 3)
    (broken / "1_b.png").unlink()
    config = greys.recipe(tmp_path / "b", broken)
    with pytest.raises(RecordError, match=r"1 rows are broken[\s\S]*1_b\.png"):
        build(kit, greys, config)
    dropped = replace(config, pairs=replace(config.pairs, drop_broken=True))
    assert len(build(kit, greys, dropped).rollouts.pairs) == 2
    with pytest.raises(ConfigError, match=r"pairs\.validation is 1"):
        PairConfig(data="x", validation=1.0)
    with pytest.raises(ConfigError, match=r"pairs\.validation_pairs is -1"):
        PairConfig(data="x", validation_pairs=-1)
    with pytest.raises(ValueError, match="cannot encode pictures"):
        Trainer(
            greys.recipe(tmp_path / "c", ties, objective={"labels": "soft"}), kit.LinePolicy(),
            GuardedReward(kit.brightness), Accelerator(cpu=True), tmp_path,
        )  # fmt: skip
