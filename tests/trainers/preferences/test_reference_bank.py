"""Reference errors from a bank: the same loss and gradient, fewer passes, exact to resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from mmalign.config import ConfigError
from mmalign.policies.load import load_policy
from trainers.config import ForwardConfig
from trainers.loop import Trainer
from trainers.pair_config import PairConfig
from vision_rewards.guard import GuardedReward


def build(kit, config, policy) -> Trainer:
    reward = GuardedReward(kit.brightness)
    return Trainer(config, policy, reward, Accelerator(cpu=True), Path(config.output_dir))


def recipe(greys, folder: Path, data: Path, bank: int = 8, **changes):
    pairs = {k: changes.pop(k) for k in ("validation", "prompt_dropout") if k in changes}
    config = greys.recipe(folder, data, objective={"beta": 2.0}, **changes)
    cache = str(folder.parent / "cache")
    return replace(
        config, pairs=PairConfig(data=str(data), cache=cache, reference_bank=bank, **pairs)
    )


@pytest.fixture(scope="module")
def data(greys, tmp_path_factory) -> Path:
    return greys.write(tmp_path_factory.mktemp("data"), ["a"] * 12)


def gradient(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


def one_update(trainer: Trainer, step: int) -> tuple[dict, torch.Tensor, int]:
    """Sums, gradient and evaluations of the update of a step, without making it."""
    rollout, _ = trainer.rollouts.sample(step)
    score, groups = trainer.rollouts.score(rollout)
    targets, keep = trainer.update.prepare(score.value, score.valid, groups, score.valid)
    count, before = trainer.update.count(rollout, targets, keep, groups), trainer.update.nfe
    trainer.optimizer.zero_grad()
    totals = trainer.update._accumulate(rollout, targets, keep, count)
    return dict(totals.sums), gradient(trainer), trainer.update.nfe - before


@pytest.mark.parametrize("algorithm", ["diffusion_dpo", "ipo", "diffusion_kto"])
def test_loss_and_gradient_are_those_of_the_reference_pass(kit, greys, data, tmp_path, algorithm):
    """Where the model has moved away, on the bank's draws, some without their prompt."""
    paired = algorithm != "diffusion_kto"
    options = {"prompt_dropout": 0.3, "validation": 0.25 if paired else 0.0}
    config = recipe(greys, tmp_path / "run", data, algorithm=algorithm, **options)
    trainer = build(kit, config, greys.Policy())
    if not paired:  # no held-out pairs ask for the model before training: here it is
        trainer.model._frozen = greys.Policy().denoiser
    with torch.no_grad():
        trainer.policy.denoiser.slope.fill_(0.8)
        trainer.policy.denoiser.shift.fill_(0.3)
    sums, found, nfe = one_update(trainer, 2)
    trainer.update.forward.known_errors = lambda rollout, index: {}
    plain, wanted, plain_nfe = one_update(trainer, 2)
    assert sums.keys() == plain.keys() and sums["loss"] == pytest.approx(plain["loss"], rel=1e-9)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)
    assert float(wanted.abs().max()) > 1e-3
    # With a pass for the base, KTO asks the reference once for two passes of the model.
    assert (nfe, plain_nfe) == ((16, 32) if paired else (32, 48))


def test_draws_come_from_the_bank_and_each_from_its_share(kit, greys, data, tmp_path):
    trainer = build(kit, recipe(greys, tmp_path / "run", data), greys.Policy())
    noising, seen = trainer.update.forward, {}
    for step in range(30):
        rollout, _ = trainer.rollouts.sample(step)
        for k in range(2):
            sigma, noise = noising.draw(rollout, k)
            assert sigma[0::2].equal(sigma[1::2]) and noise[0::2].equal(noise[1::2])
            low, high = 0.2 + 0.4 * k, 0.6 + 0.4 * k  # halves of the levels of the recipe
            assert bool(((sigma >= low) & (sigma <= high)).all())
            for prompt, s, e in zip(rollout.prompts, sigma.tolist(), noise.flatten(), strict=True):
                seen.setdefault(prompt, set()).add((s, float(e)))
    assert len(seen) == 12 and all(4 < len(found) <= 8 for found in seen.values())


def test_errors_are_kept_by_what_they_depend_on(kit, greys, data, tmp_path):
    config = recipe(greys, tmp_path / "run", data)
    first = build(kit, config, greys.Policy())
    assert first.rollouts.computed == 24
    assert first.rollouts.sample(0)[1] == 24 * 8 and first.rollouts.sample(1)[1] == 0
    again = build(kit, config, greys.Policy())
    assert again.rollouts.computed == 0 and again.rollouts.sample(0)[1] == 0
    assert build(kit, config, greys.Policy(slope=0.9)).rollouts.computed == 24  # other weights
    other = replace(config, forward=replace(config.forward, levels=(0.3, 1.0)))
    assert build(kit, other, greys.Policy()).rollouts.computed == 24
    more = greys.write(tmp_path / "more", ["a"] * 14)  # two pairs that nobody has seen
    assert build(kit, recipe(greys, tmp_path / "run", more), greys.Policy()).rollouts.computed == 4


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_network_without_a_second_copy(kit, greys, data, tmp_path, adapter):
    """The first loss is log 2: the bank holds the errors of the model before training."""
    config = recipe(
        greys, tmp_path / "run", data, bank=2, prompts_per_step=2,
        forward=ForwardConfig(levels=(0.3, 0.9), draws=2), policy="tiny-sd3",
        model=kit.cheap(tmp_path, model__adapter=adapter, model__lora_rank=2).model,
    )  # fmt: skip
    trainer = build(kit, config, load_policy("tiny-sd3"))
    assert trainer.model._frozen is None
    first, later = trainer.train_step(), trainer.train_step()
    assert first["loss"] == pytest.approx(0.6931472, abs=1e-5) != later["loss"]
    # Two branches where there is guidance, which here there is not.
    assert first["nfe"] == 24 * 2 + 4 * 2 and later["nfe"] - first["nfe"] == 4 * 2


def test_a_resumed_run_ends_alike(kit, greys, data, tmp_path):
    whole = recipe(greys, tmp_path / "whole", data, steps=9, save_every=5)
    build(kit, whole, greys.Policy()).run()
    part = replace(whole, output_dir=str(tmp_path / "part"), steps=5)
    build(kit, part, greys.Policy()).run()
    for file in (tmp_path / "cache").glob("reference-*/*"):  # lost on the way, and made anew
        file.unlink()
    again = build(kit, replace(part, steps=9), greys.Policy())
    assert again.resume() and again.step == 5 and again.rollouts.computed == 24
    again.run()

    one, two = (greys.held(tmp_path / name)["weights"] for name in ("whole", "part"))
    assert all(two[name].equal(value) for name, value in one.items())


def test_what_has_no_fixed_error_is_refused(kit, greys, data, tmp_path):
    wrong = {"mapo": {}, "inpo": {}, "diffusion_dpo": {"reference_every": 5}}
    for algorithm, options in wrong.items():
        config = recipe(greys, tmp_path / algorithm, data, algorithm=algorithm)
        config = replace(config, objective={"beta": 2.0, **options})
        times = "grid" if algorithm == "inpo" else "uniform"
        config = replace(config, forward=replace(config.forward, times=times))
        with pytest.raises(ConfigError, match=r"pairs\.reference_bank is 8, but"):
            build(kit, config, greys.Policy())
    with pytest.raises(ConfigError, match=r"which forward\.draws 2 cannot share evenly"):
        build(kit, recipe(greys, tmp_path / "odd", data, bank=5), greys.Policy())
    with pytest.raises(ConfigError, match="must not be negative"):
        PairConfig(data="x", reference_bank=-1)
