"""Ctrl-U: the weighting by hand, a ControlNet on a stock pipeline, and a condition learned."""

from __future__ import annotations

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from mmalign.config import ConfigError
from mmalign.policies.control import CONTROL
from mmalign.policies.load import load_policy
from mmalign.protocols import Sampler
from mmalign.runtime.log import read_jsonl
from mmalign.sampling import generate
from mmalign.shapes.grammar import COLORS, parse
from mmalign.shapes.segments import CLASSES, GREY, UNKNOWN, Segments
from mmalign.types import Conditioning, Media
from trainers import checkpoint, entry
from trainers.gradient.ctrl_u import CtrlU, rectified, uncertainty
from trainers.loop import Trainer
from trainers.objective import ForwardBatch
from vision_rewards.guard import GuardedReward

# --- the segmentation ---------------------------------------------------------------------------


def test_rendered_scenes_are_segmented_by_the_colours_of_their_objects():
    import random

    from mmalign.shapes.render import render
    from mmalign.shapes.scene import sample_scene

    spec = parse("a photo of a purple square to the left of a pink star")
    scene = sample_scene(spec, random.Random(0))
    pixels = Media.from_pil([render(scene)]).data
    labels = Segments().labels(pixels)[0]
    names = list(COLORS)
    assert labels[0, 0] == 0 and set(labels.unique().tolist()) <= {
        UNKNOWN, 0, 1 + names.index("purple"), 1 + names.index("pink"),
    }  # fmt: skip
    for placed in scene.objects:
        at = labels[int(placed.y * 64), int(placed.x * 64)]
        assert at == 1 + names.index(placed.color)
    painted = Segments().paint(labels[None])
    assert painted.shape == (1, 3, 64, 64) and painted[0, :, 0, 0].tolist() == [GREY] * 3
    known = labels != UNKNOWN
    assert Segments().labels(painted)[0][known].equal(labels[known])  # it can be read again


# --- the weighting ------------------------------------------------------------------------------


def two_classes(p: float) -> torch.Tensor:
    """Logits ``(1, 2, 1, 1)`` of the probabilities ``p`` and ``1 - p``."""
    return torch.tensor([p, 1 - p]).log().view(1, 2, 1, 1)


def test_uncertainty_is_the_divergence_by_hand():
    p, q = 0.7, 0.4
    wanted = q * torch.tensor(q / p).log() + (1 - q) * torch.tensor((1 - q) / (1 - p)).log()
    found = uncertainty(two_classes(p), two_classes(q), 3.0)
    torch.testing.assert_close(found, 3 * wanted.view(1, 1, 1))
    same = torch.randn(2, 5, 3, 3)
    assert uncertainty(same, same + 1.5).abs().max() < 1e-6  # logits differ by a constant


def test_the_reward_is_weighted_place_by_place_and_unknown_places_are_left_out():
    logits = torch.stack([two_classes(p)[0, :, 0, 0] for p in (0.9, 0.5, 0.2)], 1).view(1, 2, 1, 3)
    labels = torch.tensor([[[0, 1, UNKNOWN]]])
    doubt = torch.tensor([[[0.0, 2.0, 0.0]]])
    wanted = -(torch.tensor(0.9).log() + torch.tensor(0.5).log() * torch.tensor(-2.0).exp()) / 2
    torch.testing.assert_close(rectified(logits, labels, doubt), wanted.view(1))
    assert rectified(logits, torch.full_like(labels, UNKNOWN), doubt) == 0


def test_both_estimates_get_a_gradient_of_their_uncertainty():
    first = two_classes(0.7).clone().requires_grad_(True)
    second = two_classes(0.4).clone().requires_grad_(True)
    uncertainty(first, second).sum().backward()
    # KL(Q || P) by the logits of P is P - Q; by those of Q it is Q (log Q/P - KL).
    assert first.grad is not None and second.grad is not None
    torch.testing.assert_close(first.grad[0, 0, 0, 0], torch.tensor(0.7 - 0.4))
    ratio = torch.tensor(0.4 / 0.7).log()
    kl = 0.4 * ratio + 0.6 * torch.tensor(0.6 / 0.3).log()
    torch.testing.assert_close(second.grad[0, 0, 0, 0], 0.4 * (ratio - kl))


# --- a problem of pixels ------------------------------------------------------------------------


class Mixer(nn.Module):
    """The clean picture as ``gain condition + keep x``; it starts by keeping the noisy one."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.keep = nn.Parameter(torch.tensor(0.0)), nn.Parameter(torch.tensor(1.0))


class Painter:
    """Pictures of 8 x 8 in four coloured quarters, their own latents; a condition is optional."""

    name, family, parameterisation, media = "painter", "painter", "flow", "image"
    sampler = Sampler(steps=2, guidance_scale=1.0, height=8, width=8)
    device, unused_modules = torch.device("cpu"), ()

    def __init__(self) -> None:
        self.denoiser = Mixer()

    def encode(self, prompts):
        rows = []
        for prompt in prompts:
            generator = torch.Generator().manual_seed(len(prompt))
            quarters = torch.randint(CLASSES, (1, 2, 2), generator=generator)
            rows.append(Segments().paint(quarters.repeat_interleave(4, 1).repeat_interleave(4, 2)))
        return Conditioning({"scene": torch.cat(rows) * 2 - 1})

    def controlled(self, conditioning, pictures):
        return Conditioning({**conditioning.positive, CONTROL: pictures.data * 2 - 1})

    def init_noise(self, seeds):
        make = [torch.Generator().manual_seed(s) for s in seeds]
        return torch.stack([torch.randn(3, 8, 8, generator=g) for g in make])

    def sigmas(self, steps):
        return torch.linspace(1, 0, steps + 1)

    def predict(self, latents, sigma, conditioning, guidance_scale):
        given = conditioning.positive
        clean = given["scene"]
        if CONTROL in given:
            clean = self.denoiser.gain * given[CONTROL] + self.denoiser.keep * latents
        return (latents - clean) / sigma.reshape(-1, *([1] * 3 if sigma.ndim else []))

    def pixels(self, latents):
        return latents / 2 + 0.5

    def decode(self, latents):
        return Media(self.pixels(latents).clamp(0, 1))


def batch_at(levels: list[float], version: int = 0) -> tuple[ForwardBatch, Painter]:
    """A batch of pictures under their own conditions, with a probe."""
    from trainers.probe import Probe

    policy, b = Painter(), len(levels)
    clean = policy.encode(["x" * (n + 1) for n in range(b)]).positive["scene"]
    with torch.no_grad():
        policy.denoiser.gain.fill_(0.4), policy.denoiser.keep.fill_(0.6)
    conditioning = policy.controlled(Conditioning({"scene": clean}), policy.decode(clean))
    sigma, noise = torch.tensor(levels), policy.init_noise(range(b))
    level = sigma.view(-1, 1, 1, 1)
    x = (1 - level) * clean + level * noise
    model = SimpleNamespace()
    probe = Probe(policy, model, ("p",) * b, conditioning, lambda: range(b), version=version)
    velocity = policy.predict(x, sigma, conditioning, 1.0)
    maps = Segments().labels(policy.decode(clean).data).unsqueeze(1).float()
    made = ForwardBatch(clean, noise, sigma, x, velocity, torch.ones(b), {}, maps=maps, probe=probe)
    return made, policy


def test_the_loss_by_hand_and_nothing_above_the_highest_level():
    batch, policy = batch_at([0.3, 0.7])
    loss, found = CtrlU(reward_weight=0.5, uncertainty=2.0).loss(batch)
    plain, _ = CtrlU(reward_weight=0.0).loss(batch)
    assert loss[1] == plain[1] and found["rewarded"].tolist() == [1, 0]
    assert batch.probing.nfe == 1  # the second estimate of the one row that is rewarded
    later = batch.sigma[:1] + 1e-3
    x = (1 - later) * batch.clean[:1] + later * batch.noise[:1]
    pair = [policy.denoiser.gain * batch.clean[:1] + policy.denoiser.keep * s
            for s in (batch.noised[:1], x)]  # fmt: skip
    logits = [Segments().logits(policy.decode(s).data) for s in pair]
    labels = Segments().labels(policy.decode(batch.clean[:1]).data)
    p, q = (z.softmax(1) for z in logits)
    doubt = 2 * (q * (q / p).log()).sum(1)
    picked = -p.gather(1, labels[:, None])[:, 0].log()
    wanted = plain[0] + 0.5 * (picked * (-doubt).exp()).mean() + doubt.mean()
    torch.testing.assert_close(loss[0], wanted, rtol=1e-3, atol=1e-5, check_dtype=False)
    batch, _ = batch_at([0.3, 0.7])
    sure, _ = CtrlU(reward_weight=0.5, uncertainty=0.0).loss(batch)
    assert batch.probing.nfe == 0
    torch.testing.assert_close(sure[0], plain[0] + 0.5 * picked.mean(), check_dtype=False)


def test_the_weight_rises_over_its_ramp():
    objective = CtrlU(reward_weight=0.4, uncertainty=0.0, ramp=4)
    plain = CtrlU(reward_weight=0.0).loss(batch_at([0.2])[0])[0]
    added = [objective.loss(batch_at([0.2], version)[0])[0] - plain for version in (0, 1, 3, 9)]
    shares = [float((a / added[-1]).detach()) for a in added]
    assert shares == pytest.approx([0.25, 0.5, 1.0, 1.0], rel=1e-6)


def followed(policy, maps, asked=None):
    """The share of each picture that shows the classes asked for; by default those given."""
    segments = Segments()

    def encode(prompts):
        given = policy.encode(prompts)
        return given if maps is None else policy.controlled(given, Media(segments.paint(maps)))

    media, _ = generate(policy, ["a", "b"], [1, 2], encode=encode)
    right = segments.logits(media.data).argmax(1) == (maps if asked is None else asked)
    return right.float().flatten(1).mean(1)


def test_a_condition_is_learned(kit, tmp_path):
    config = kit.cheap(
        tmp_path, algorithm="ctrl_u", steps=10, optim__lr=0.1, rollout__kernel="ode",
        rollout__steps=2, rollout__guidance_scale=1.0, forward__guidance_scale=1.0,
        forward__levels=(0.2, 0.9), forward__draws=2,
        objective={"t_max": 0.9, "reward_weight": 0.1, "ramp": 3},
    )  # fmt: skip
    policy = Painter()
    reward = GuardedReward(kit.brightness)
    Trainer(config, policy, reward, Accelerator(cpu=True), tmp_path).run()
    log = read_jsonl(tmp_path / "metrics.jsonl")
    own = torch.arange(CLASSES).remainder(3).repeat(2, 8, 1)[:, :, :8]  # no picture of training
    found, blind = followed(policy, own), followed(policy, None, own)
    assert (found > blind + 0.2).all() and (found > 0.5).all()
    assert log[-1]["recovered"] > log[0]["recovered"] + 0.1
    assert log[-1]["denoise"] < 0.5 * log[0]["denoise"]
    assert policy.denoiser.gain.item() > 0.4 and policy.denoiser.keep.item() < 0.6
    # 8 samples of 2 steps without a condition; 16 draws, each with a second estimate.
    assert log[0]["nfe"] == 8 * 2 + 16 * 2


def test_the_gradient_does_not_depend_on_the_micro_batch(kit, tmp_path):
    """Though each part has other rows to reward."""
    found = []
    for size in (64, 3):
        config = kit.cheap(
            tmp_path, algorithm="ctrl_u", rollout__kernel="ode", forward__guidance_scale=1.0,
            forward__draws=3, optim__micro_batch=size, objective={"t_max": 0.3},
        )  # fmt: skip
        reward = GuardedReward(kit.brightness)
        trainer = Trainer(config, Painter(), reward, Accelerator(cpu=True), tmp_path)
        rollout, _ = trainer.rollouts.sample(0)
        trainer.update._accumulate(rollout, torch.ones(8), torch.ones(8) > 0, 8)
        gradient = torch.stack([p.grad for p in trainer.model.parameters()])
        found.append((gradient, trainer.update.nfe))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    assert found[0][1] == found[1][1] and 24 < found[0][1] < 48


# --- a ControlNet on a stock pipeline -----------------------------------------------------------


def controlled(kit, folder, **changes):
    values = {
        "algorithm": "ctrl_u", "steps": 2, "save_every": 1, "keep_checkpoints": 9,
        "prompts_per_step": 1, "images_per_prompt": 2, "optim__lr": 1e-2, "rollout__steps": 2,
        "rollout__kernel": "ode", "forward__guidance_scale": 1.0, "forward__draws": 2,
        "objective": {"t_max": 0.9, "ramp": 3},
    }  # fmt: skip
    return replace(kit.cheap(folder, **(values | changes)), policy="tiny-sd3-control")


def test_a_resumed_run_is_the_one_never_stopped_and_stock_classes_load_it(kit, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    trainer = entry.build(controlled(kit, whole), whole, kit.brightness)
    plain, policy = load_policy("tiny-sd3"), trainer.policy
    x, sigma = policy.init_noise([1, 2]), torch.tensor([0.3, 0.8])
    given = policy.encode(["a red star", "a blue circle"])
    followed = policy.controlled(given, Media(torch.rand(2, 3, 32, 32)))
    with torch.no_grad():
        before = plain.predict(x, sigma, given, 1.0)
        for conditioning in (given, followed):  # its output layers are zero
            torch.testing.assert_close(policy.predict(x, sigma, conditioning, 1.0), before)
    base = {n: p.clone() for n, p in policy.pipeline.transformer.named_parameters()}
    trainer.run()
    # Its zeros gone, every layer learns but those whose output nobody reads.
    assert all(p.grad.abs().max() > 0 for p in trainer.model.parameters())
    assert all(p.equal(base[n]) for n, p in policy.pipeline.transformer.named_parameters())
    shutil.copytree(whole / "checkpoints/step_000001", cut / "checkpoints/step_000001")
    again = entry.build(controlled(kit, cut), cut, kit.brightness)
    assert again.resume() and again.step == 1
    again.run()
    one, two = (
        torch.load(f / "checkpoints/step_000002" / checkpoint.FILE, weights_only=True)
        for f in (whole, cut)
    )
    assert one["nfe"] == two["nfe"] and one["updates"] == two["updates"]
    assert all(w.equal(two["model"]["weights"][n]) for n, w in one["model"]["weights"].items())
    folder = trainer.model.export(tmp_path)
    kept = load_policy(folder)
    assert type(kept.pipeline).__name__ == "StableDiffusion3ControlNetPipeline"
    with torch.no_grad():
        trained = policy.predict(x, sigma, followed, 1.0)
        assert (trained - before).abs().max() > 1e-5  # and without a condition it is as it was
        torch.testing.assert_close(policy.predict(x, sigma, given, 1.0), before)
        torch.testing.assert_close(kept.predict(x, sigma, followed, 1.0), trained)


def test_wrong_combinations_are_refused(kit, tmp_path):
    for changes, words in (
        ({"model__adapter": "lora"}, "adapter: full"),
        ({"forward__guidance_scale": 2.0}, r"forward.guidance_scale to 1.0"),
        ({"objective": {"t_max": 1.0}}, "t_max"),
    ):
        with pytest.raises(ConfigError, match=words):
            entry.build(controlled(kit, tmp_path, **changes), tmp_path, kit.brightness)
    config = replace(controlled(kit, tmp_path), policy="tiny-sd3")
    with pytest.raises(ConfigError, match="shapes-control"):
        entry.build(config, tmp_path, kit.brightness)


def test_the_recipe_makes_a_step_on_the_shipped_generator(tmp_path):
    changes = ["steps=1", "prompts_per_step=1", "images_per_prompt=2", "rollout.steps=2"]
    changes += ["forward.draws=2", "objective.t_max=0.9", "optim.updates_per_rollout=1"]
    config = entry.resolve_recipe("shapes_ctrl_u", [*changes, f"output_dir={tmp_path}"])
    trainer = entry.build(config, tmp_path)
    metrics = trainer.train_step()
    assert metrics["grad_norm"] > 0 and metrics["updates/skipped"] == 0
    assert 0 < metrics["recovered"] <= 1 and metrics["uncertainty"] >= 0


def test_conditions_are_made_once_a_picture_whatever_the_draws(kit, tmp_path, monkeypatch):
    config = kit.cheap(
        tmp_path, algorithm="ctrl_u", rollout__kernel="ode", forward__guidance_scale=1.0,
        forward__draws=3, optim__micro_batch=5, objective={"t_max": 0.3},
    )  # fmt: skip
    policy = Painter()
    trainer = Trainer(
        config, policy, GuardedReward(kit.brightness), Accelerator(cpu=True), tmp_path
    )
    rollout, _ = trainer.rollouts.sample(0)
    shown = []
    controlled = Painter.controlled
    monkeypatch.setattr(
        policy, "controlled",
        lambda given, pictures: shown.append(len(pictures)) or controlled(policy, given, pictures),
        raising=False,
    )  # fmt: skip
    trainer.update._accumulate(rollout, torch.ones(8), torch.ones(8) > 0, 8)
    assert shown == [5, 3]
