"""What a user can get wrong: each is named, and nothing already computed is lost."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mmalign.config import ConfigError
from mmalign.prompts import PromptFileError
from mmalign.registry import UnknownNameError
from mmalign.runtime.files import StorageError
from mmalign.runtime.log import read_jsonl
from trainers import checkpoint, entry
from trainers.config import AdvantageConfig
from trainers.loop import TrainingError
from trainers.preflight import preflight, small
from vision_rewards.factory import load_reward
from vision_rewards.function import FunctionReward
from vision_rewards.guard import RewardFailedError

# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lrr=1", "unknown key 'optim.lrr'. Did you mean 'optim.lr'?"),
        ("promts_per_step=2", "Did you mean 'prompts_per_step'?"),
        ("model.precision=bf61", "Did you mean 'bf16'?"),
        ("model.adapter=lorra", "Did you mean 'lora'?"),
        ("steps=many", "'steps' is 'many' (str), expected int"),
        ("images_per_prompt=1", "at least 2 images"),
        ("rollout.steps=0", "rollout.steps is 0"),
        ("rollout.fraction=0.0", "must lie in (0, 1]"),
        ("optim.updates_per_rollout=99", "exceeds the 8 images"),
        ("rollout={train: window, window: 0, window_start: [0, 1]}", "rollout.window is 0"),
        ("rollout={train: window, window: -1, window_start: [0, 1]}", "rollout.window is -1"),
        ("advantage.keep=3", "advantage.keep is 3; it must be even"),
        ("advantage.keep=-2", "advantage.keep is -2; it must be even"),
        ("advantage.keep=4", "a prompt has only 4 images"),
        ("advantage={keep: 2, select: pareto}", "both say whom to train on"),
        ("advantage.clip=0.0", "advantage.clip is 0.0; it must be positive"),
        ("advantage.clip=-1.0", "advantage.clip is -1.0; it must be positive"),
        ("advantage.eps=-1.0", "advantage.eps is -1.0; it must be positive"),
    ],
)
def test_unusable_recipes_are_refused(override, words):
    base = {"policy": "tiny-sd3", "prompts_per_step": 2, "images_per_prompt": 4}
    with pytest.raises(ConfigError) as caught:
        entry.resolve_recipe(base, [override])
    assert words in str(caught.value)


def test_a_window_must_fit_the_grid():
    base = {"policy": "tiny-sd3", "rollout": {"steps": 3, "train": "window", "window": 2}}
    with pytest.raises(ConfigError, match=r"starts must lie in 0\.\.0"):
        entry.resolve_recipe(base)


@pytest.mark.parametrize(
    ("changes", "near"),
    [
        ({"policy": "shapes-flw"}, "'shapes-flow'"),
        ({"policy": "tiny_sd3"}, "'tiny-sd3'"),
        ({"reward": "shapes_partal"}, "'shapes_partial'"),
        ({"reward": {"jpeg_compressability": 1.0}}, "'jpeg_compressibility'"),
        ({"algorithm": "flow_grop"}, "'flow_grpo'"),
        ({"rollout__kernel": "flowsde"}, "'flow_sde'"),
        ({"rollout__kernel_options": {"noise_levl": 0.5}}, "'noise_level'"),
        ({"prompts__tasks": ("countin",)}, "'counting'"),
        ({"device": "cpuu"}, "'cpu'"),
    ],
)
def test_unknown_names_get_their_nearest_match(kit, tmp_path, changes, near):
    with pytest.raises(UnknownNameError) as caught:
        entry.train(kit.cheap(tmp_path / "run", **changes))
    assert f"Did you mean {near}" in str(caught.value)
    assert not list((tmp_path / "run").iterdir())  # the corrected recipe can start here


def test_unknown_objective_option(kit, tmp_path):
    config = kit.cheap(tmp_path, objective={"clip_rnge": 0.1})
    with pytest.raises(ConfigError, match=r"Did you mean 'objective\.clip_range'"):
        entry.train(config, reward=kit.brightness)


def test_a_kernel_without_density_cannot_train(kit, tmp_path):
    with pytest.raises(ValueError, match="need a stochastic kernel: flow_sde"):
        entry.train(kit.cheap(tmp_path, rollout__kernel="ode"), reward=kit.brightness)


def test_rollouts_have_more_than_one_step(kit, tmp_path):
    with pytest.raises(ConfigError, match=r"rollout\.steps is 1, but the rollouts of .*at least 2"):
        entry.train(kit.cheap(tmp_path, rollout__steps=1), reward=kit.brightness)


@pytest.mark.parametrize("target", ["attn.to_z", "o_q", "ttn.to_q"])
def test_lora_targets_that_match_nothing(kit, tmp_path, target):
    config = kit.cheap(tmp_path, model__adapter="lora", model__lora_targets=(target,))
    with pytest.raises(ConfigError, match=r"match no module of SD3Transformer2DModel.*attn\.to_q"):
        entry.train(config, reward=kit.brightness)


def test_more_processes_than_images(kit, tmp_path):
    crowd = SimpleNamespace(num_processes=9)
    with pytest.raises(ConfigError, match="8 images a step cannot be shared by 9 processes"):
        entry.Trainer(kit.cheap(tmp_path), None, kit.brightness, crowd, tmp_path)


# --- prompt files ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (None, PromptFileError, "does not exist"),
        (b"\n  \n", PromptFileError, "holds no prompt"),
        (b"a star\n\xff\xfe\n", PromptFileError, r"is not UTF-8: byte 7 \(line 2\)"),
        (b"a photo of a " + b"red " * 20 + b"star\n", ValueError, r"Shorten it by \d+ tokens"),
    ],
)
def test_prompt_files(kit, tmp_path, content, error, words):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(error, match=words):
        entry.train(kit.cheap(tmp_path / "run", prompts__source=str(file)), reward=kit.brightness)


# --- rewards --------------------------------------------------------------------------------------


def every(n: int, value: float):
    """A reward that gives ``value`` to every ``n``-th picture and brightness to the others."""

    def partly(media, prompts):
        scores = media.flatten(1).mean(1)
        scores[::n] = value
        return scores

    return FunctionReward(partly, takes="tensor")


def test_some_unscored_samples_are_left_out_and_named(kit, tmp_path):
    config = kit.cheap(tmp_path, steps=2, advantage__std="group")
    trainer = entry.build(config, tmp_path, every(4, math.nan))
    trainer.run()
    for record in read_jsonl(tmp_path / "metrics.jsonl"):
        assert record["reward/valid"] == 0.75
        assert math.isfinite(record["reward/mean"]) and record["grad_norm"] > 0
    # 8 images x 3 steps sampled; 6 scored images x 2 recorded steps replayed.
    assert trainer.nfe == 2 * (8 * 3 + 6 * 2)


def broken(media, prompts):
    raise OSError("judge unreachable")


def silent(media, prompts):
    return [None] * len(prompts)


@pytest.mark.parametrize(
    ("reward", "reason"),
    [
        (every(1, math.nan), "no finite number"),
        (every(1, math.inf), "no finite number"),
        (FunctionReward(broken), "OSError: judge unreachable"),
        (FunctionReward(silent), "no finite number"),
    ],
)
def test_a_failing_reward_stops_the_run_past_its_share(kit, tmp_path, reward, reason):
    """64 samples are the guard's patience: 8 steps of 8; what was trained until then is kept."""
    trainer = entry.build(kit.cheap(tmp_path, steps=20, save_every=1), tmp_path, reward)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with pytest.raises(RewardFailedError, match=reason):
        trainer.run()
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 7
    assert checkpoint.existing(tmp_path / "checkpoints")[-1].name == "step_000007"
    # Nothing was judged, so nothing was learnt; weight decay is all that may act.
    pairs = zip(before, trainer.model.parameters(), strict=True)
    assert all((a - b).abs().max() < 1e-5 for a, b in pairs)


def test_the_accepted_share_is_the_recipes(kit, tmp_path):
    config = kit.cheap(tmp_path, steps=9, max_failed_share=0.2)
    with pytest.raises(RewardFailedError, match="25%; at most 20% are accepted"):
        entry.build(config, tmp_path, every(4, math.nan)).run()


def test_a_tracker_refuses_what_shapes_groups(kit, tmp_path):
    two = {"a": (kit.brightness, 1.0), "b": ("contrast", 1.0)}
    for changes, words in (
        ({"combine": "advantages"}, "keeps one reward for each picture"),
        ({"std": "none"}, "advantage.std is 'none'"),
        ({"eps": 0.5}, "advantage.eps is 0.5"),
    ):
        advantage = AdvantageConfig(baseline="tracker", **changes)
        with pytest.raises(ConfigError, match=words):
            entry.build(kit.cheap(tmp_path, advantage=advantage), tmp_path, load_reward(two))
    plain = kit.cheap(tmp_path, advantage=AdvantageConfig(baseline="tracker"))
    entry.build(plain, tmp_path, load_reward(two))


def test_pareto_selection_needs_rewards_one_by_one(kit, tmp_path):
    two = {"a": (kit.brightness, 1.0), "b": ("contrast", 1.0)}
    sure = AdvantageConfig(select="pareto", combine="advantages")
    entry.build(kit.cheap(tmp_path, advantage=sure), tmp_path, load_reward(two))
    for advantage, reward in ((AdvantageConfig(select="pareto"), two), (sure, kit.brightness)):
        with pytest.raises(ConfigError, match=r"compares samples reward by reward; use advantage"):
            entry.build(kit.cheap(tmp_path, advantage=advantage), tmp_path, load_reward(reward))


# --- numbers that are not -------------------------------------------------------------------------


def poison(trainer, step: int = 2) -> None:
    """Overwrite one trained weight with NaN after ``step``."""
    if trainer.step == step:
        with torch.no_grad():
            trainer.model.parameters()[0].view(-1)[0] = math.nan


def test_broken_weights_end_the_run_but_not_its_checkpoint(kit, tmp_path):
    config = kit.cheap(tmp_path, steps=5, save_every=2)
    trainer = entry.build(config, tmp_path, kit.brightness)
    with pytest.raises(TrainingError, match="the rollout holds NaN"):
        trainer.run(lambda t, step: poison(t))
    fresh = entry.build(config, tmp_path, kit.brightness)
    assert fresh.resume() and fresh.step == 2
    assert all(torch.isfinite(p).all() for p in fresh.model.parameters())
    fresh.run()
    assert [r["step"] for r in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_a_loss_that_is_not_finite_changes_no_weight(kit, tmp_path):
    trainer = entry.build(kit.cheap(tmp_path), tmp_path, kit.brightness)
    rollout, _ = trainer.rollouts.sample(0)
    log_probs = rollout.log_probs.clone()
    log_probs[3, 1] = math.nan
    before = [p.detach().clone() for p in trainer.model.parameters()]
    advantage, keep = torch.ones(8), torch.ones(8, dtype=torch.bool)
    with pytest.raises(TrainingError, match="the loss is nan at denoising step 1; no weight"):
        trainer.update(replace(rollout, log_probs=log_probs), advantage, keep, 8)
    assert all(a.equal(b) for a, b in zip(before, trainer.model.parameters(), strict=True))


# --- storage --------------------------------------------------------------------------------------


@pytest.fixture
def full_disk():
    """Files of this process may not grow beyond 20 kB: a write fails in the kernel, half-way."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(on: bool) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if on else soft, hard))

    yield limit
    limit(False)


def test_a_full_disk_leaves_the_earlier_checkpoint(kit, tmp_path, full_disk):
    config = kit.cheap(tmp_path, steps=3, save_every=1, keep_checkpoints=1)
    trainer = entry.build(config, tmp_path, kit.brightness)
    with pytest.raises(StorageError, match=r"cannot write .*step_000002.*MB free"):
        trainer.run(lambda t, step: full_disk(True))
    full_disk(False)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_000001"]  # whole, and no half-written neighbour
    again = entry.build(config, tmp_path, kit.brightness)
    assert again.resume() and again.step == 1
    again.run()
    assert [r["step"] for r in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_full_disk_at_export_leaves_the_earlier_export(kit, tmp_path, full_disk):
    trainer = entry.build(kit.cheap(tmp_path), tmp_path, kit.brightness)
    target = trainer.model.export(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in target.rglob("*")}
    full_disk(True)
    with pytest.raises(StorageError, match="cannot write"):
        trainer.model.export(tmp_path)
    full_disk(False)
    assert {p: p.stat().st_mtime_ns for p in target.rglob("*")} == before


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(kit, tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StorageError, match="permission denied"):
            entry.train(kit.cheap(tmp_path / "run"), reward=kit.brightness)
    finally:
        tmp_path.chmod(0o700)


def test_a_file_where_the_folder_should_be(kit, tmp_path):
    (tmp_path / "run").write_text("in the way")
    with pytest.raises(StorageError, match="a file is in the way"):
        entry.train(kit.cheap(tmp_path / "run"), reward=kit.brightness)
    assert (tmp_path / "run").read_text() == "in the way"


# --- preflight ------------------------------------------------------------------------------------


def failed(trainer) -> dict[str, str]:
    """Failed checks and what they say."""
    return {c.name: c.detail for c in preflight(trainer).checks if not c.ok}


def constant(media, prompts):
    return [0.25] * len(prompts)


def length(media, prompts):
    return [len(p) + 0.0 for p in prompts]


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_sound_recipe_passes_and_is_left_as_it_was(kit, tmp_path, adapter):
    config = small(kit.cheap(tmp_path, model__adapter=adapter, objective={"kl_beta": 0.1}))
    trainer = entry.build(config, tmp_path, kit.brightness)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    report = preflight(trainer)
    assert report.ok and len(report.checks) == 8, report.failures
    assert all(a.equal(b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fn", "checks"),
    [
        (constant, {"reward is not constant", "reward spreads within groups"}),
        (length, {"reward spreads within groups"}),
        (
            silent,
            {"reward scores samples", "reward is not constant", "reward spreads within groups"},
        ),
        (
            broken,
            {"reward scores samples", "reward is not constant", "reward spreads within groups"},
        ),
    ],
)
def test_rewards_that_teach_nothing(kit, tmp_path, fn, checks):
    trainer = entry.build(small(kit.cheap(tmp_path)), tmp_path, FunctionReward(fn))
    found = failed(trainer)
    assert found.keys() == checks and all(";" in detail for detail in found.values())


def test_a_network_that_is_random_at_replay(kit, tmp_path):
    """As dropout that ignores ``eval()`` would be."""
    trainer = entry.build(small(kit.cheap(tmp_path)), tmp_path, kit.brightness)
    hook = trainer.policy.denoiser.proj_out.register_forward_hook(
        lambda module, args, out: torch.nn.functional.dropout(out, 0.1)
    )
    assert failed(trainer).keys() == {"replay ratio is 1"}
    hook.remove()
    assert not failed(trainer)


def test_weights_that_change_between_rollout_and_replay(kit, tmp_path):
    held: list = []

    def meddling(media, prompts):
        with torch.no_grad():
            held[0].policy.denoiser.proj_out.bias.add_(0.01)
        return media.flatten(1).mean(1)

    reward = FunctionReward(meddling, takes="tensor")
    trainer = entry.build(small(kit.cheap(tmp_path)), tmp_path, reward)
    held.append(trainer)
    found = failed(trainer)
    assert found.keys() == {"replay ratio is 1"}
    assert "rollout and replay disagree" in found["replay ratio is 1"]


def test_broken_weights_are_seen_before_training(kit, tmp_path):
    trainer = entry.build(small(kit.cheap(tmp_path)), tmp_path, kit.brightness)
    poison(trainer, step=0)
    assert {"rollout is finite", "replay ratio is 1"} <= failed(trainer).keys()


def test_layers_that_no_gradient_reaches(kit, tmp_path):
    """What a wrong LoRA target or a layer outside the graph looks like."""
    trainer = entry.build(small(kit.cheap(tmp_path)), tmp_path, kit.brightness)
    trainer.policy.denoiser.register_parameter("spare", torch.nn.Parameter(torch.ones(2)))
    found = failed(trainer)
    assert found.keys() == {"gradient reaches every parameter"}
    assert "no gradient reaches spare" in found["gradient reaches every parameter"]


def test_a_bf16_ratio_is_judged_by_the_clip_range(kit, tmp_path):
    dials = {"model__precision": "bf16", "rollout__batch_size": 3}
    wide = kit.cheap(tmp_path, objective={"clip_range": 0.5}, **dials)
    assert "replay ratio is 1" not in failed(entry.build(small(wide), tmp_path, kit.brightness))
