"""Distribution matching: the difference of scores, the fake score, learning, exact resume."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from gaussian_flow import MEAN, SCALE, GaussianFlow, GaussianFlowPolicy

from mmalign.config import ConfigError
from mmalign.sampling import generate
from mmalign.sampling.process import coefficients, noised, split
from trainers.config import ModelConfig, TrainConfig
from trainers.few_step.dmd import direction
from trainers.loop import Trainer

TRAINED = ("mean", "scale", "spread")


def recipe(kit, folder, **changes) -> TrainConfig:
    values = {
        "algorithm": "dmd", "rollout__kernel": "consistency", "rollout__steps": 2,
        "forward__draws": 2, "forward__guidance_scale": 1.0, "forward__times": "grid",
        "objective": {"guidance": [1.0, 1.0]},
    }  # fmt: skip
    return kit.cheap(folder, **{**values, **changes})


def gaussian(kit, folder, spread: float = 0.15, **changes) -> Trainer:
    """Draws from pure noise alone: a generator of one step."""
    changes = {
        "model": ModelConfig(adapter="full", trainable=TRAINED), "forward__levels": (0.9, 1.0),
        **changes,
    }  # fmt: skip
    policy = GaussianFlowPolicy(spread=spread)
    return Trainer(
        recipe(kit, folder, **changes), policy, kit.brightness, Accelerator(cpu=True), folder
    )


# --- closed forms ---------------------------------------------------------------------------------


def gaussian_score(x, tau, mean, scale):
    """Of N((1 - tau) mean, (1 - tau)^2 scale^2 + tau^2)."""
    return -(x - (1 - tau) * mean) / ((1 - tau).square() * scale**2 + tau.square())


def estimate(x, tau, mean, scale):
    """The posterior mean of the clean picture."""
    network = GaussianFlow()
    network.mean.data.fill_(mean)
    network.scale.data.fill_(scale)
    with torch.no_grad():
        return split("flow", x, tau, network(x, tau, torch.ones(len(x), 1)))[0]


def test_the_direction_is_the_difference_of_scores():
    x0, noise = torch.randn(2, 50, 1, 1, 1)
    tau = torch.linspace(0.05, 0.95, 50)
    x_tau = noised("flow", x0, noise, tau)
    real, fake = estimate(x_tau, tau, MEAN, SCALE), estimate(x_tau, tau, -0.2, 0.9)
    t = tau.view(-1, 1, 1, 1)
    a, b = coefficients("flow", t)
    wanted = gaussian_score(x_tau, t, -0.2, 0.9) - gaussian_score(x_tau, t, MEAN, SCALE)
    got = direction(x0, real, fake) * (x0 - real).abs()
    torch.testing.assert_close(a / b.square() * got, wanted, rtol=1e-3, atol=1e-3)


def test_the_gradient_by_the_picture_is_the_direction(kit, tmp_path):
    trainer = gaussian(kit, tmp_path)
    with torch.no_grad():
        trainer.model.copies["fake"]["mean"].fill_(0.1)
        trainer.model.copies["fake"]["scale"].fill_(0.7)
    rollout, _ = trainer.rollouts.sample(0)
    batch, _ = trainer.update.forward.batch(rollout, torch.ones(8), 0)
    assert batch.sigma.eq(1).all()
    loss, _ = trainer.update.objective.loss(batch)
    got = torch.autograd.grad(loss.sum(), batch.velocity)[0]
    # The picture is x - v at pure noise: one number, so that its D is 1.
    probe, x = batch.probe, batch.estimate(batch.velocity).detach()
    tau = (0.02 + 0.96 * probe.uniform("time")).float()
    x_tau = noised("flow", x, probe.normal("score", x), tau)
    real, fake = estimate(x_tau, tau, MEAN, SCALE), estimate(x_tau, tau, 0.1, 0.7)
    wanted = -(fake - real) / (x - real).abs()
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_student_as_likely_as_the_teacher_stays(kit, tmp_path):
    trainer = gaussian(kit, tmp_path, spread=SCALE)
    rollout, _ = trainer.rollouts.sample(0)
    batch, _ = trainer.update.forward.batch(rollout, torch.ones(8), 0)
    loss, metrics = trainer.update.objective.loss(batch)  # the fake score starts as the teacher
    assert metrics["direction"].eq(0).all() and loss.detach().eq(0).all()


# --- the run --------------------------------------------------------------------------------------


def test_the_fake_score_learns_beside_the_student(kit, tmp_path):
    """The student's weights move by its own update alone, the fake score's by its own."""
    trainer = gaussian(kit, tmp_path, optim__lr=0.0, objective={"fake": {"lr": 0.02}})
    held = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    errors = [trainer.train_step()["fake/error"] for _ in range(12)]
    assert all(p.equal(held[n]) for n, p in trainer.model.named_parameters())
    fake = trainer.model.copies["fake"]
    # The student's pictures are N(MEAN, 0.15^2): narrower than the teacher's.
    assert float(fake["scale"]) < SCALE - 0.15 and errors[-1] < errors[0]
    frozen = dict(trainer.model._frozen.named_parameters())
    assert float(frozen["scale"]) == pytest.approx(SCALE)


def test_one_step_takes_on_the_teachers_spread(kit, tmp_path):
    trainer = gaussian(
        kit, tmp_path, steps=60, optim__lr=0.01, forward__draws=4,
        objective={"guidance": [1.0, 1.0], "fake": {"lr": 0.03, "updates": 5}},
    )  # fmt: skip

    def spread() -> float:
        pictures, _ = generate(trainer.policy, [""] * 400, range(400), steps=1, guidance_scale=1.0)
        return float(pictures.data.std())

    assert spread() == pytest.approx(0.15, rel=0.1)
    trainer.run()
    assert spread() == pytest.approx(SCALE, rel=0.25)


def test_evaluations_are_counted(kit, tmp_path):
    options = {"guidance": [2.0, 2.0], "fake": {"updates": 3}}
    trainer = gaussian(kit, tmp_path, objective=options)
    # A draw: student, teacher twice, fake score; then three steps of the latter.
    assert trainer.train_step()["nfe"] == 8 * 2 + 16 * 4 + 3 * 16


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"forward__times": "uniform"}, "use times: grid and kernel: consistency"),
        ({"rollout__kernel": "ode"}, "use times: grid and kernel: consistency"),
        ({"objective": {"times": [0.5, 1.5]}}, "times must be two rising numbers"),
        ({"objective": {"fake": {"updates": 0}}}, "updates must be positive"),
    ],
)
def test_settings_without_a_meaning_are_refused(kit, tmp_path, changes, words):
    with pytest.raises(ConfigError) as caught:
        gaussian(kit, tmp_path, **changes)
    assert words in str(caught.value)
