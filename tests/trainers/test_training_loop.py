"""The real loop on a tiny stock pipeline: it learns, it accounts, it exports what it trained."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmalign.config import ConfigError
from mmalign.policies.build import tiny_pipeline
from mmalign.registry import UnknownNameError
from mmalign.runtime.log import read_jsonl
from mmalign.runtime.training_record import TrainingRecord, prompt_hash
from mmalign.sampling import generate
from trainers import entry
from trainers.data import PromptSource, minibatches, rows_of_step

PROMPTS = ["a photo of a red star", "a photo of two circles"]
SEEDS = [5, 6]


def pictures(policy) -> torch.Tensor:
    """What a policy draws for two prompts."""
    return generate(policy, PROMPTS, SEEDS, steps=3, guidance_scale=2.0)[0].data


def stock_pictures(pipeline) -> torch.Tensor:
    """What a stock pipeline draws for the same prompts, called as its users call it."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        PROMPTS,
        num_inference_steps=3,
        guidance_scale=2.0,
        generator=[torch.Generator().manual_seed(s) for s in SEEDS],
        output_type="pt",
    ).images


def weights(trainer) -> dict[str, torch.Tensor]:
    """A copy of what is trained."""
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


def gradients(trainer, *update) -> dict[str, torch.Tensor]:
    """The gradient of one update, which is not taken."""
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer.update._accumulate(*update)
    return {n: p.grad.clone() for n, p in trainer.model.named_parameters()}


def assert_same_direction(got, wanted):
    """Equal up to rounding, which is relative to the largest entry of all."""
    scale = max(v.abs().max() for v in wanted.values())
    assert scale > 0
    for name, value in wanted.items():
        assert (got[name] - value).abs().max() < 1e-5 * scale, name


@pytest.fixture(scope="module", params=["lora", "full"])
def trained(request, kit, tmp_path_factory) -> SimpleNamespace:
    """A finished run with a KL, and what its policy drew before and after."""
    torch.set_num_threads(1)
    changes = {
        "model__adapter": request.param,
        "model__lora_rank": 4,
        "model__lora_alpha": 12,
        "optim__lr": 0.03 if request.param == "lora" else 3e-3,
        "objective": {"kl_beta": 0.01, "clip_range": 1e-3},
        "optim__updates_per_rollout": 2,
    }
    config = kit.cheap(tmp_path_factory.mktemp(request.param), **changes)
    drawn: dict[str, torch.Tensor] = {}

    def evaluate(policy, config, folder, label):
        drawn[label] = pictures(policy)

    folder = entry.train(config, reward=kit.brightness, evaluate=evaluate)
    return SimpleNamespace(
        folder=folder, drawn=drawn, adapter=request.param, log=read_jsonl(folder / "metrics.jsonl")
    )


# --- learning -------------------------------------------------------------------------------------


def many_brightnesses(policy) -> torch.Tensor:
    """Brightness of 32 pictures for fixed prompts and seeds, ``(32,)``."""
    media, _ = generate(policy, PROMPTS * 16, list(range(32)), steps=3, guidance_scale=1.0)
    return media.data.flatten(1).mean(1)


@pytest.mark.parametrize(("adapter", "lr"), [("full", 3e-3), ("lora", 2e-2)])
def test_brightness_rises(kit, tmp_path, adapter, lr):
    """The same seeds are brighter after training, by far more than chance explains."""
    config = kit.cheap(
        tmp_path, model__adapter=adapter, optim__lr=lr, steps=20, images_per_prompt=8
    )
    trainer = entry.build(config, tmp_path, kit.brightness)
    before = many_brightnesses(trainer.policy)
    trainer.run()
    gain = many_brightnesses(trainer.policy) - before
    assert gain.mean() > 0.1 * before.mean()
    assert gain.mean() > 5 * gain.std() / 32**0.5


def test_a_registered_reward_trains_by_name(kit, tmp_path):
    folder = entry.train(kit.cheap(tmp_path, reward="jpeg_compressibility", steps=1))
    (record,) = read_jsonl(folder / "metrics.jsonl")
    assert record["reward/valid"] == 1 and record["reward/mean"] < 0 and record["grad_norm"] > 0


# --- the start: nothing has moved -----------------------------------------------------------------


def test_ratio_and_kl_start_at_their_fixed_points(kit, tmp_path):
    """In the first update old, current and reference policy are one."""
    config = kit.cheap(tmp_path, steps=2, objective={"kl_beta": 0.1}, optim__micro_batch=3)
    trainer = entry.build(config, tmp_path, kit.brightness)
    first, second = trainer.train_step(), trainer.train_step()
    assert first["ratio/max_deviation"] < 1e-6
    assert first["clip_fraction"] == 0 and first["kl"] < 1e-12
    assert second["ratio/max_deviation"] < 1e-6  # a fresh rollout is on-policy again
    assert second["kl"] > 1e-9


def test_second_update_of_a_rollout_is_off_policy(trained):
    assert all(r["ratio/max_deviation"] > 1e-6 for r in trained.log)


# --- accounting -----------------------------------------------------------------------------------


@pytest.fixture
def sampled(kit, tmp_path):
    """A trainer that has moved once, with a fresh rollout and made-up advantages."""
    config = kit.cheap(tmp_path, objective={"kl_beta": 0.1}, optim__lr=1e-3)
    trainer = entry.build(config, tmp_path, kit.brightness)
    trainer.train_step()
    rollout, _ = trainer.rollouts.sample(1)
    advantage = torch.tensor([1.0, -1, 0.5, -0.5, 2, -2, 0, 0.3])
    keep = torch.tensor([True] * 7 + [False])
    return trainer, rollout, advantage, keep


def test_gradient_does_not_depend_on_the_micro_batch(sampled):
    trainer, *update = sampled
    got = {}
    for size in (1, 3, 64):
        trainer.update.micro_batch = size
        got[size] = gradients(trainer, *update, 7)
    assert_same_direction(got[1], got[64])
    assert_same_direction(got[3], got[64])


def test_updates_share_out_the_gradient_of_the_rollout(sampled):
    trainer, rollout, advantage, keep = sampled
    whole = gradients(trainer, rollout, advantage, keep, 8)
    parts = [torch.tensor([0, 5, 2]), torch.tensor([7, 1]), torch.tensor([3, 4, 6])]
    total = {n: torch.zeros_like(v) for n, v in whole.items()}
    for rows in parts:
        part = gradients(trainer, rollout[rows], advantage[rows], keep[rows], len(rows))
        for name, value in part.items():
            total[name] += value * len(rows) / 8
    assert_same_direction(total, whole)


def test_every_sample_is_in_exactly_one_update(kit, tmp_path):
    config = kit.cheap(tmp_path, optim__updates_per_rollout=3)
    parts = minibatches(config, 4)
    assert sorted(map(len, parts)) == [2, 3, 3]
    assert sorted(torch.cat(parts).tolist()) == list(range(8))
    assert not torch.cat(parts).equal(torch.cat(minibatches(config, 5)))
    trainer = entry.build(config, tmp_path, kit.brightness)
    trainer.train_step()
    assert trainer.updates == 3


def test_evaluations_are_counted_with_guidance_and_reference(kit, tmp_path):
    config = kit.cheap(tmp_path, rollout__guidance_scale=2.0, advantage__std="group")
    trainer = entry.build(config, tmp_path, kit.brightness)
    metrics = trainer.train_step()
    # 8 images x 2 branches: 3 steps of rollout, 2 recorded ones replayed.
    assert metrics["nfe"] == 8 * 2 * (3 + 2) and metrics["images"] == 8


def test_a_step_is_a_function_of_the_seed(kit, tmp_path):
    config = kit.cheap(tmp_path, rollout__shared_noise=True)
    source = entry.build(config, tmp_path, kit.brightness).rollouts.prompts
    one, again = rows_of_step(config, source, 3), rows_of_step(config, source, 3)
    assert one.prompts == again.prompts and one.seeds == again.seeds
    assert len(set(one.seeds)) == 8 and len(set(one.init_seeds)) == 2
    assert not set(one.seeds) & set(rows_of_step(config, source, 4).seeds)


def test_a_window_records_and_trains_only_itself(kit, tmp_path):
    config = kit.cheap(
        tmp_path, rollout__train="window", rollout__window=1, rollout__window_start=(0, 1), steps=6
    )
    trainer = entry.build(config, tmp_path, kit.brightness)
    rollouts = [trainer.rollouts.sample(step)[0] for step in range(6)]
    assert {r.steps for r in rollouts} == {(0,), (1,)}
    assert all(r.latents.shape[1] == r.log_probs.shape[1] == 1 for r in rollouts)
    (k,) = rollouts[0].steps
    metrics = trainer.train_step()
    assert [n for n in metrics if n.startswith("by_step/ratio")] == [f"by_step/ratio/{k}"]
    assert metrics["nfe"] == 8 * (3 + 1)


def test_only_the_kept_extremes_are_trained_on(kit, tmp_path):
    config = kit.cheap(tmp_path, advantage__keep=2, advantage__std="group")
    trainer = entry.build(config, tmp_path, kit.brightness)
    assert trainer.train_step()["nfe"] == 8 * 3 + 4 * 2  # best and worst of two prompts, 2 steps


# --- moving average -------------------------------------------------------------------------------


def test_average_of_the_weights_is_evaluated_and_exported(kit, tmp_path):
    config = kit.cheap(
        tmp_path, model__ema_decay=0.5, optim__lr=1e-2, evaluation__every=2, optim__weight_decay=0.0
    )
    bias = "proj_out.bias"
    wanted = tiny_pipeline().transformer.state_dict()[bias]
    seen, current = {}, {}

    def evaluate(policy, config, folder, label):
        seen[label] = policy.denoiser.state_dict()[bias].clone()

    original = entry.Trainer.train_step

    class Watched(entry.Trainer):
        def train_step(self):
            metrics = original(self)
            current[self.step] = weights(self)[bias]
            return metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entry, "Trainer", Watched)
        folder = entry.train(config, reward=kit.brightness, evaluate=evaluate)
    averages = {0: wanted}
    for step in (1, 2, 3):
        averages[step] = 0.5 * averages[step - 1] + 0.5 * current[step]
    assert (averages[3] - current[3]).abs().max() > 1e-3
    for label, step in (("before", 0), ("step_000002", 2), ("after", 3)):
        torch.testing.assert_close(seen[label], averages[step], rtol=1e-6, atol=1e-7)
    assert not seen["step_000002"].equal(current[2])
    saved = load_full(folder).transformer.state_dict()[bias]
    assert saved.equal(seen["after"])


# --- export ---------------------------------------------------------------------------------------


def load_full(folder: Path):
    from diffusers import StableDiffusion3Pipeline

    absent = {"text_encoder_3": None, "tokenizer_3": None}
    return StableDiffusion3Pipeline.from_pretrained(folder / "pipeline", **absent)


def test_stock_diffusers_draws_what_the_trained_policy_draws(trained):
    if trained.adapter == "lora":
        pipeline = tiny_pipeline()
        pipeline.load_lora_weights(str(trained.folder / "lora"))
    else:
        pipeline = load_full(trained.folder)
    got = stock_pictures(pipeline)
    assert (got - trained.drawn["after"]).abs().max() < 1e-5
    assert (got - trained.drawn["before"]).abs().max() > 1e-3
    if trained.adapter == "lora":
        pipeline.unload_lora_weights()
        assert (stock_pictures(pipeline) - trained.drawn["before"]).abs().max() < 1e-5


def test_run_folder_says_what_was_done(trained):
    names = {p.name for p in trained.folder.iterdir()}
    export = "lora" if trained.adapter == "lora" else "pipeline"
    assert {"config.yaml", "run.json", "metrics.jsonl", "checkpoints", export} <= names
    held = entry.from_dict(entry.TrainConfig, entry.load_yaml(trained.folder / "config.yaml"))
    assert held.model.adapter == trained.adapter and held.steps == 3
    assert [r["step"] for r in trained.log] == [1, 2, 3]
    assert all(r["kl"] >= 0 and 0 <= r["clip_fraction"] <= 1 for r in trained.log)
    # What it was trained on goes with the weights.
    record = TrainingRecord.read(trained.folder / export / "training.json")
    assert record == TrainingRecord.near(trained.folder)
    source = PromptSource(held.prompts, held.seed)
    used = {p for step in range(3) for p in rows_of_step(held, source, step).prompts}
    assert record.prompts == {prompt_hash(p) for p in used} and record.rewards == ("brightness",)


# --- reference ------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_reference_is_the_model_before_training(kit, tmp_path, adapter):
    config = kit.cheap(
        tmp_path, model__adapter=adapter, optim__lr=0.01, objective={"kl_beta": 0.01}, steps=2
    )
    trainer = entry.build(config, tmp_path, kit.brightness)
    policy = trainer.policy
    before = stock_pictures(tiny_pipeline())
    trainer.run()
    trained = weights(trainer)
    with trainer.model.reference():
        assert (pictures(policy) - before).abs().max() < 1e-5
    assert (pictures(policy) - before).abs().max() > 1e-4
    after = pictures(policy)
    with pytest.raises(KeyError), trainer.model.reference():
        raise KeyError
    assert pictures(policy).equal(after)
    assert all(v.equal(trained[n]) for n, v in weights(trainer).items())


def test_unused_layers_are_not_trained(kit, tmp_path):
    for adapter in ("lora", "full"):
        config = kit.cheap(tmp_path, model__adapter=adapter)
        trainer = entry.build(config, tmp_path, kit.brightness)
        names = [n for n, _ in trainer.model.named_parameters()]
        unused = trainer.policy.unused_modules
        assert names and unused and not any(n.startswith(tuple(unused)) for n in names)
        if adapter == "lora":
            assert all("lora_" in n for n in names)


# --- trackers -------------------------------------------------------------------------------------


def test_a_tracker_gets_every_metric_of_every_step(kit, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = kit.cheap(tmp_path, steps=2, trackers=("tensorboard",))
    folder = entry.train(config, reward=kit.brightness)
    log = read_jsonl(folder / "metrics.jsonl")
    events = EventAccumulator(str(folder / "mmalign")).Reload()
    tracked = [event.value for event in events.Scalars("reward/mean")]
    assert tracked == pytest.approx([record["reward/mean"] for record in log])
    assert set(log[0]) - {"step"} <= set(events.Tags()["scalars"])


def test_trackers_that_would_stay_silent_are_refused(kit, tmp_path, monkeypatch):
    with pytest.raises(UnknownNameError, match="Did you mean 'tensorboard'"):
        entry.train(kit.cheap(tmp_path, trackers=("tensorbord",)), reward=kit.brightness)
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.raises(ConfigError, match="pip install wandb"):
        entry.train(kit.cheap(tmp_path, trackers=("wandb",)), reward=kit.brightness)


# --- several rewards ------------------------------------------------------------------------------


def test_the_dial_and_the_composition_take_advantages_per_reward(kit, tmp_path):
    def run(name, reward, **changes):
        folder = entry.train(kit.cheap(tmp_path / name, steps=1, **changes), reward=reward)
        return read_jsonl(folder / "metrics.jsonl")[0]["grad_norm"]

    parts = {"a": (kit.brightness, 1.0), "b": ("jpeg_compressibility", 1.0)}
    dial = run("dial", parts, advantage__combine="advantages")
    assert run("separate", {"compose": "separate", "parts": parts}) == dial
    assert run("summed", parts) != pytest.approx(dial, rel=1e-3)


def test_only_sums_can_be_taken_apart(kit, tmp_path):
    parts = {"compose": "minimum", "parts": {"a": (kit.brightness, 1.0)}}
    config = kit.cheap(tmp_path, advantage__combine="advantages")
    with pytest.raises(ConfigError, match="needs a weighted sum"):
        entry.train(config, reward=parts)
