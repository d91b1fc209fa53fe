"""What the forward-process objectives share: draws, rollouts, copies of the weights, learning."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from mmalign.config import ConfigError
from mmalign.runtime.log import read_jsonl
from mmalign.sampling import generate
from trainers import checkpoint, entry
from trainers.config import ForwardConfig, OptimConfig, RolloutConfig, TrainConfig
from trainers.forward import group_means
from trainers.loop import Trainer
from trainers.preflight import preflight, small
from vision_rewards.function import FunctionReward

ALGORITHMS = ("raft", "reward_weighted", "diffusion_nft", "awm", "dgpo", "crd")


def forward(kit, folder, algorithm="diffusion_nft", **changes) -> TrainConfig:
    """The cheap recipe with a deterministic sampler and two draws."""
    values = {"rollout__kernel": "ode", "forward__draws": 2, "algorithm": algorithm}
    return kit.cheap(folder, **{**values, **changes})


def build(kit, folder, *args, **changes) -> Trainer:
    return entry.build(forward(kit, folder, *args, **changes), folder, kit.brightness)


def weights(trainer) -> dict[str, torch.Tensor]:
    """A copy of what is trained."""
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


# --- levels ---------------------------------------------------------------------------------------

QUANTILES = torch.linspace(0.01, 0.99, 25, dtype=torch.float64)


def level(kit, tmp_path, **options) -> torch.Tensor:
    config = replace(forward(kit, tmp_path), forward=ForwardConfig(**options))
    return entry.build(config, tmp_path, kit.brightness).update.forward.level(QUANTILES)


def test_uniform_levels_within_bounds_and_shifted(kit, tmp_path):
    torch.testing.assert_close(level(kit, tmp_path), QUANTILES)
    bounded = level(kit, tmp_path, levels=(0.2, 0.6))
    torch.testing.assert_close(bounded, 0.2 + 0.4 * QUANTILES)
    shifted = level(kit, tmp_path, shift=3.0)
    torch.testing.assert_close(shifted, 3 * QUANTILES / (1 + 2 * QUANTILES))


def test_logit_normal_levels_are_its_quantiles(kit, tmp_path):
    got = level(kit, tmp_path, times="logit_normal", logit_mean=0.4, logit_std=0.8)
    normal = torch.distributions.Normal(torch.tensor(0.4).double(), torch.tensor(0.8).double())
    torch.testing.assert_close(got, torch.sigmoid(normal.icdf(QUANTILES)))
    cut = level(kit, tmp_path, times="logit_normal", levels=(0.3, 0.9))
    standard = torch.distributions.Normal(*torch.tensor([0.0, 1.0]).double())
    low, high = standard.cdf(torch.logit(torch.tensor([0.3, 0.9]).double()))
    wanted = torch.sigmoid(standard.icdf(low + (high - low) * QUANTILES))
    torch.testing.assert_close(cut, wanted)
    assert cut.min() > 0.3 and cut.max() < 0.9


def test_grid_levels_are_the_samplers_own(kit, tmp_path):
    trainer = build(
        kit, tmp_path, rollout__steps=5, forward__times="grid", forward__draws=4,
        forward__levels=(0.0, 0.99),
    )  # fmt: skip
    grid = trainer.policy.sigmas(5)
    rollout, _ = trainer.rollouts.sample(0)
    levels = [trainer.update.forward.draw(rollout, k)[0] for k in range(4)]
    # As many draws as levels: each sample gets each level once; pure noise is out of bounds.
    assert torch.stack(levels, 1).sort(1).values.equal(grid[1:5].flip(0).expand(8, 4))
    with pytest.raises(ConfigError, match="holds no level of the grid"):
        build(kit, tmp_path, forward__times="grid", forward__levels=(0.998, 0.999))


# --- draws ----------------------------------------------------------------------------------------


def test_a_draw_belongs_to_its_sample(kit, tmp_path):
    trainer = build(kit, tmp_path)
    rollout, _ = trainer.rollouts.sample(0)
    noising, order = trainer.update.forward, torch.tensor([6, 1, 3])
    sigma, noise = noising.draw(rollout, 1)
    part = noising.draw(rollout[order], 1)
    assert part[0].equal(sigma[order]) and part[1].equal(noise[order])
    assert sigma.unique().numel() == 8 and (sigma >= 0.5).all()  # the second half of quantiles
    other = noising.draw(rollout, 0)
    assert (other[0] < 0.5).all() and not other[1].eq(noise).any()
    again, _ = build(kit, tmp_path).rollouts.sample(1)  # another step, other draws
    assert not noising.draw(again, 1)[1].eq(noise).any()
    assert abs(float(noise.mean())) < 0.05 and float(noise.std()) == pytest.approx(1, abs=0.05)


def test_groups_share_their_draws_where_they_are_compared(kit, tmp_path):
    trainer = build(kit, tmp_path, "dgpo")
    rollout, _ = trainer.rollouts.sample(0)
    sigma, noise = trainer.update.forward.draw(rollout, 0)
    for rows in (slice(0, 4), slice(4, 8)):
        assert sigma[rows].unique().numel() == 1 and noise[rows].eq(noise[rows][:1]).all()
    assert sigma.unique().numel() == 2 and rollout.final.unique(dim=0).shape[0] == 8
    trainer.train_step()
    later, _ = trainer.rollouts.sample(1)
    assert not trainer.update.forward.draw(later, 0)[0].eq(sigma).any()


def test_group_means_are_of_groups():
    values = torch.tensor([[1.0, 0.0], [3.0, 2.0], [10.0, 4.0]])
    got = group_means(values, torch.tensor([8, 8, 2]), Accelerator(cpu=True))
    assert got.tolist() == [[2.0, 1.0], [2.0, 1.0], [10.0, 4.0]]


# --- rollouts -------------------------------------------------------------------------------------


def test_only_clean_latents_are_kept_whatever_the_sampler(kit, tmp_path):
    trainer = build(kit, tmp_path)
    rollout, nfe = trainer.rollouts.sample(0)
    assert rollout.log_probs.shape == (8, 0) and rollout.latents.shape[:2] == (8, 0)
    assert nfe == 8 * 3
    drawn, _ = generate(
        trainer.policy, rollout.prompts, rollout.seeds, steps=3, guidance_scale=1.0,
        encode=trainer.rollouts.encode,
    )  # fmt: skip
    assert (rollout.media.data - drawn.data).abs().max() < 1e-5
    noisy, _ = build(kit, tmp_path, rollout__kernel="flow_sde").rollouts.sample(0)
    assert noisy.log_probs.shape == (8, 0)
    assert (noisy.final - rollout.final).abs().amax((1, 2, 3)).min() > 1e-2
    shared = build(kit, tmp_path, rollout__kernel="flow_sde", rollout__shared_noise=True)
    assert shared.rollouts.sample(0)[0].final.unique(dim=0).shape[0] == 8


@pytest.mark.parametrize(
    ("algorithm", "changes", "words"),
    [
        ("awm", {"rollout__train": "fraction"}, "rollout.train is 'fraction'"),
        ("awm", {"rollout__fraction": 0.5}, "rollout.fraction is 0.5"),
        ("raft", {"rollout__shared_noise": True}, "all images of a prompt the same"),
        ("diffusion_kto", {"optim__updates_per_rollout": 2}, "compares all samples"),
        ("crd", {"optim__updates_per_rollout": 3}, "exceeds the 2 whole prompts"),
        ("dgpo", {"advantage__keep": 2}, "advantage.keep is 2"),
        ("dgpo", {"advantage__select": "pareto"}, "advantage.select is pareto"),
        ("dgpo", {"advantage__baseline": "tracker"}, "sum to 0 in each group"),
        ("flow_grpo", {"rollout__kernel": "flow_sde"}, "forward.draws is 2, but"),
    ],
)
def test_settings_without_a_meaning_are_refused(kit, tmp_path, algorithm, changes, words):
    with pytest.raises(ConfigError) as caught:
        build(kit, tmp_path, algorithm, **changes)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"draws": 0}, "forward.draws is 0"),
        ({"levels": (0.5, 0.5)}, "two rising levels"),
        ({"levels": (0.0, 1.2)}, "two rising levels"),
        ({"shift": 0.0}, "forward.shift is 0.0"),
        ({"logit_mean": 1.0}, "mean nothing with forward.times 'uniform'"),
        ({"times": "grid", "shift": 3.0}, "shifted already"),
    ],
)
def test_impossible_levels_are_refused(options, words):
    with pytest.raises(ConfigError) as caught:
        ForwardConfig(**options)
    assert words in str(caught.value)


# --- the update -----------------------------------------------------------------------------------

MADE_UP = torch.tensor([1.0, -1, 0.5, -0.5, 2, -2, 0, 0.3])


@pytest.mark.parametrize("algorithm", ["reward_weighted", "dgpo"])
def test_gradient_does_not_depend_on_the_micro_batch(kit, tmp_path, algorithm):
    trainer = build(kit, tmp_path, algorithm, optim__lr=1e-3)
    trainer.train_step()
    rollout, _ = trainer.rollouts.sample(1)
    keep = torch.tensor([True] * 7 + [False])
    got = {}
    for size in (64, 3):
        trainer.update.micro_batch = size
        trainer.optimizer.zero_grad(set_to_none=True)
        trainer.update._accumulate(rollout, MADE_UP, keep, 7)
        got[size] = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    assert (got[3] - got[64]).abs().max() < 1e-5 * got[64].abs().max()


def test_gradient_is_the_mean_over_samples_and_draws(kit, tmp_path):
    """Written out for a line: ``v = slope x + shift`` at every draw."""
    config = forward(kit, tmp_path, "reward_weighted", forward__draws=3)
    trainer = Trainer(config, kit.LinePolicy(), kit.brightness, Accelerator(cpu=True), tmp_path)
    rollout, _ = trainer.rollouts.sample(0)
    trainer.update._accumulate(rollout, MADE_UP, torch.ones(8, dtype=torch.bool), 8)
    wanted = torch.zeros(2)
    for k in range(3):
        sigma, noise = (t.flatten() for t in trainer.update.forward.draw(rollout, k))
        clean = rollout.final.flatten()
        x = (1 - sigma) * clean + sigma * noise
        error = 2 * MADE_UP * (x - (noise - clean)) / 24  # slope 1, shift 0
        wanted += torch.stack([(error * x).sum(), error.sum()])
    got = torch.stack([p.grad for p in trainer.model.parameters()])
    torch.testing.assert_close(got, wanted)


def test_evaluations_count_the_passes_that_were_made(kit, tmp_path):
    draws = 8 * 2  # samples x draws; the rollout costs 8 x 3
    trainer = build(kit, tmp_path, "awm", objective={"kl_beta": 0.1})
    # In the first update old and average policy are the current one, and cost nothing.
    assert trainer.train_step()["nfe"] == 24 + 2 * draws
    assert trainer.train_step()["nfe"] == 2 * 24 + (2 + 3) * draws
    one = build(kit, tmp_path, "raft").train_step()
    assert one["nfe"] == 24 + 2 * 2  # the best of two prompts
    guided = build(kit, tmp_path, "diffusion_nft", rollout__guidance_scale=2.0)
    assert guided.train_step()["nfe"] == 2 * 24 + 2 * (1 + 1) * draws
    plain = build(kit, tmp_path, "raft", rollout__guidance_scale=2.0, forward__guidance_scale=1.0)
    assert plain.train_step()["nfe"] == 2 * 24 + 2 * 2


def test_unscored_samples_are_never_trained_on(kit, tmp_path):
    def spotty(media, prompts):
        value = media.flatten(1).mean(1)
        value[1::4] = torch.nan
        return value

    config = forward(kit, tmp_path, "diffusion_nft", steps=1)
    trainer = entry.build(config, tmp_path, FunctionReward(spotty, takes="tensor"))
    seen = []
    original = trainer.update._accumulate

    def watched(rollout, advantages, keep, count):
        seen.append((int(keep.sum()), count))
        return original(rollout, advantages, keep, count)

    trainer.update._accumulate = watched
    assert trainer.train_step()["reward/valid"] == 0.75
    assert seen == [(6, 6)]


def test_a_reward_without_spread_leaves_raft_where_it_was(kit, tmp_path):
    def flat(media, prompts):
        return torch.full((len(media),), 0.3)

    config = forward(kit, tmp_path, "raft", optim__weight_decay=0.0)
    trainer = entry.build(config, tmp_path, FunctionReward(flat, takes="tensor"))
    before = weights(trainer)
    trainer.run()
    assert all(v.equal(before[n]) for n, v in weights(trainer).items())


def test_metrics_are_sorted_by_noise_level(kit, tmp_path):
    metrics = build(kit, tmp_path, "awm", forward__draws=4).train_step()
    quarters = [f"by_step/error/sigma_{q}" for q in ("0.00", "0.25", "0.50", "0.75")]
    assert [k for k in metrics if k.startswith("by_step/error/")] == quarters
    assert metrics["error"] == pytest.approx(sum(metrics[q] for q in quarters) / 4)
    assert metrics["ratio/max_deviation"] == 0 and metrics["reference_distance"] == 0


# --- copies of the weights ------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_the_old_policy_follows_by_its_decay_and_makes_the_rollouts(kit, tmp_path, adapter):
    decay = {"start": 0.25, "rate": 0.25, "cap": 0.6}
    trainer = build(
        kit, tmp_path, model__adapter=adapter, model__lora_rank=4, optim__lr=0.02,
        objective={"old_decay": decay},
    )  # fmt: skip
    old = weights(trainer)
    for update, d in ((1, 0.5), (2, 0.6), (3, 0.6)):
        trainer.train_step()
        now = weights(trainer)
        old = {n: d * old[n] + (1 - d) * now[n] for n in old}
        held = trainer.model.copies["old"]
        assert trainer.updates == update
        for name, value in old.items():
            torch.testing.assert_close(held[name], value, rtol=1e-5, atol=1e-6)
    current = weights(trainer)
    rollout, _ = trainer.rollouts.sample(3)
    held = {n: v.clone() for n, v in held.items()}
    with pytest.raises(KeyError), trainer.model.version("old"):
        assert all(v.equal(held[n]) for n, v in weights(trainer).items())
        wanted, _ = generate(
            trainer.policy, rollout.prompts, rollout.seeds, steps=3, guidance_scale=1.0,
            encode=trainer.rollouts.encode,
        )  # fmt: skip
        raise KeyError
    assert all(v.equal(current[n]) for n, v in weights(trainer).items())
    assert (rollout.media.data - wanted.data).abs().max() < 1e-5


@pytest.mark.parametrize("algorithm", ["diffusion_nft", "awm", "crd"])
def test_resumed_run_is_the_one_never_stopped(kit, tmp_path, algorithm):
    updates = 2
    changes = {"steps": 4, "save_every": 2, "keep_checkpoints": 9, "optim__lr": 1e-2,
               "optim__updates_per_rollout": updates, "forward__draws": 1}  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    trainer = build(kit, whole, algorithm, **changes)
    trainer.run()
    source = whole / "checkpoints" / "step_000002"
    shutil.copytree(source, cut / "checkpoints" / "step_000002")
    again = build(kit, cut, algorithm, **changes)
    assert again.resume() and again.step == 2
    again.run()
    states = [
        torch.load(f / "checkpoints" / "step_000004" / checkpoint.FILE, weights_only=True)
        for f in (whole, cut)
    ]
    assert states[0]["nfe"] == states[1]["nfe"]
    model, other = (s["model"] for s in states)
    assert model.keys() == other.keys() and "copy/old" in model
    for version, values in model.items():
        assert all(v.equal(other[version][n]) for n, v in values.items())
    bias = "proj_out.bias"
    if algorithm == "diffusion_nft":
        assert not model["copy/old"][bias].equal(model["weights"][bias])


# --- learning -------------------------------------------------------------------------------------

OPTIONS = {
    "raft": {},
    "reward_weighted": {"temperature": 0.5},
    "diffusion_nft": {"strength": 0.2, "kl_beta": 0.0, "advantage_max": 2.0},
    "awm": {"error": "plain", "advantage_max": 1.0, "kl_beta": 0.0, "average_beta": 0.1},
    "dgpo": {"kl_beta": 0.0},
    "crd": {"strength": 0.2, "kl_beta": 0.0, "kl_least": 0.0, "advantage_max": 2.0},
}


def rewards_of_a_run(kit, folder, sign: float, algorithm: str) -> list[float]:
    config = TrainConfig(
        policy="line",
        algorithm=algorithm,
        steps=40,
        prompts_per_step=4,
        images_per_prompt=8,
        save_every=1000,
        objective=OPTIONS[algorithm],
        model=kit.cheap(folder).model,
        rollout=RolloutConfig(steps=4, guidance_scale=1.0, kernel="ode"),
        optim=OptimConfig(lr=0.05, weight_decay=0.0),
    )

    def near_two(media, prompts):
        return -sign * (media.flatten(1).mean(1) - 2).square()

    reward = FunctionReward(near_two, takes="tensor")
    Trainer(config, kit.LinePolicy(), reward, Accelerator(cpu=True), folder).run()
    return [sign * r["reward/mean"] for r in read_jsonl(folder / "metrics.jsonl")]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_reward_rises_on_a_bandit_and_falls_with_its_sign_flipped(kit, tmp_path, algorithm):
    up = rewards_of_a_run(kit, tmp_path / "up", 1.0, algorithm)
    assert sum(up[-5:]) / 5 > sum(up[:5]) / 5 + 1.0
    down = rewards_of_a_run(kit, tmp_path / "down", -1.0, algorithm)
    assert sum(down[-5:]) / 5 < sum(down[:5]) / 5 - 1.0
    assert up[0] == pytest.approx(down[0])  # both start from the same samples


@pytest.mark.parametrize(
    ("algorithm", "adapter", "lr", "options"),
    [
        ("diffusion_nft", "full", 3e-3, {"strength": 0.2, "advantage_max": 2.0}),
        ("awm", "lora", 2e-2, {"error": "plain", "advantage_max": 1.0}),
    ],
)
def test_brightness_rises(kit, tmp_path, algorithm, adapter, lr, options):
    """The same seeds are brighter after training, by far more than chance explains."""
    trainer = build(
        kit, tmp_path, algorithm, model__adapter=adapter, optim__lr=lr, objective=options,
        steps=20, images_per_prompt=8,
    )  # fmt: skip
    prompts = ["a photo of a red star", "a photo of two circles"] * 16

    def brightnesses() -> torch.Tensor:
        media, _ = generate(trainer.policy, prompts, list(range(32)), steps=3, guidance_scale=1.0)
        return media.data.flatten(1).mean(1)

    before = brightnesses()
    trainer.run()
    gain = brightnesses() - before
    assert gain.mean() > 0.1 * before.mean()
    assert gain.mean() > 5 * gain.std() / 32**0.5


def test_preflight_passes_without_a_ratio_to_check(kit, tmp_path):
    config = small(forward(kit, tmp_path))
    report = preflight(entry.build(config, tmp_path, kit.brightness))
    names = [c.name for c in report.checks]
    assert report.ok, report.failures
    assert "replay ratio is 1" not in names and "gradient reaches every parameter" in names
