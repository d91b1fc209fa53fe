"""RPO: a subject's pictures against the model's own, the harmonic reward, the kept model."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from noised_pairs import batch, gradient

from mmalign.config import ConfigError
from mmalign.runtime.log import read_jsonl
from mmalign.types import Media
from trainers.config import PromptConfig
from trainers.loop import Trainer
from trainers.matching import matching_error
from trainers.panel_config import PanelConfig
from trainers.preferences.rpo import Rpo
from vision_rewards.function import FunctionReward
from vision_rewards.guard import GuardedReward

OPTIONS = {"beta": 2.0, "similarity": 1.0}


@pytest.fixture(scope="module")
def subject(greys, tmp_path_factory) -> Path:
    """Three bright pictures, whose latents are 1.2 to 1.6."""
    folder = tmp_path_factory.mktemp("subject")
    for n, value in enumerate((0.8, 0.85, 0.9)):
        greys.grey(folder / f"{n}.png", value)
    return folder


def build(greys, reward, config) -> Trainer:
    class Pictures(greys.Policy):
        """Its pictures are those that its latents stand for, in colour."""

        def decode(self, latents: torch.Tensor) -> Media:
            return Media(((latents + 2) / 4).expand(-1, 3, -1, -1))

    return Trainer(
        config, Pictures(), GuardedReward(reward), Accelerator(cpu=True), Path(config.output_dir)
    )


def recipe(greys, folder: Path, subject: Path, **changes):
    config = greys.recipe(folder, None, "rpo", images_per_prompt=2)
    objective = {**OPTIONS, "references": str(subject), **changes.pop("objective", {})}
    return replace(config, objective=objective, **changes)


# --- the loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize("y", [0.0, 0.3, 1.0])
def test_at_the_reference_the_preference_is_log_2(y):
    labels = torch.tensor([2 * y - 1, 1 - 2 * y] * 3)
    b = batch(same=True, advantage=labels)
    loss, metrics = Rpo(beta=3.0, references="x", similarity=0.5).loss(b)
    wanted = torch.full((3,), math.log(2), dtype=torch.float64)
    torch.testing.assert_close(metrics["preference"], wanted, rtol=0, atol=1e-12)
    error = matching_error(b, b.velocity)
    torch.testing.assert_close(loss, 0.5 * error[0::2] + wanted)
    # d/dz of the preference at 0 is 1/2 - y, and z falls with the error of the reference picture.
    slope = 3.0 / 2 * (y - 0.5) * (error[0::2] - error[1::2])
    torch.testing.assert_close(gradient(loss, b), gradient(0.5 * error[0::2] + slope, b))


def test_loss_by_hand():
    b = batch(advantage=torch.tensor([1.0, -1.0, -1.0, 1.0, 0.2, -0.2]))
    e, r = (matching_error(b, v).detach() for v in (b.velocity, b.others["reference"]))
    z = 1.5 * ((r - e)[0::2] - (r - e)[1::2])
    y = torch.tensor([1.0, 0.0, 0.6], dtype=torch.float64)
    wanted = -y * torch.sigmoid(z).log() - (1 - y) * torch.sigmoid(-z).log()
    loss, metrics = Rpo(beta=3.0, references="x", similarity=0.0).loss(b)
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(metrics["margin"], z)
    grown = (e - r)[[0, 3, 4]]  # of whom the label prefers
    torch.testing.assert_close(metrics["winner_error"], grown)
    right = [float(z[0] > 0), float(z[1] < 0), float(z[2] > 0)]
    assert metrics["implicit_accuracy"].tolist() == right


def test_references_are_taught_under_their_own_prompt_alone():
    prompts = ("a photo of sks",) * 2 + ("sks on the beach",) * 4
    probe = SimpleNamespace(prompts=prompts)
    b = batch(same=True, probe=probe)
    named = Rpo(references="x", subject_prompt="a photo of sks", beta=3.0)
    loss, _ = named.loss(b)
    error = matching_error(b, b.velocity)[0::2]
    wanted = math.log(2) + error * torch.tensor([1.0, 0.0, 0.0])
    torch.testing.assert_close(loss, wanted.double(), rtol=1e-6, atol=1e-6)
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match="subject_share must be above 0 and at most 1"):
            Rpo(references="x", subject_share=share)


def test_outcomes_are_drawn_with_their_probability():
    coins = torch.rand(4000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    objective = Rpo(references="x")
    q = objective.probability(torch.tensor([0.9, 0.2]), torch.tensor([0.1, 0.8]))
    torch.testing.assert_close(q, torch.sigmoid(torch.tensor([0.8, -0.6]).double()))
    sharp = Rpo(references="x", sharpness=3.0).probability(torch.tensor(0.9), torch.tensor(0.1))
    assert float(sharp) == pytest.approx(1 / (1 + math.exp(-2.4)))
    for one in q:
        drawn = objective.targets(one.expand(4000), coins)
        assert set(drawn.tolist()) == {0.0, 1.0}
        assert drawn.mean() == pytest.approx(float(one), abs=4 * math.sqrt(0.25 / 4000))
    assert Rpo(references="x", outcomes="expected").targets(q, coins[:2]).equal(q)


# --- pairs ----------------------------------------------------------------------------------------


def test_rows_of_a_step(kit, greys, subject, tmp_path):
    trainer = build(greys, kit.brightness, recipe(greys, tmp_path, subject))
    source = trainer.rollouts
    rollout, nfe = source.sample(0)
    assert len(rollout) == 8 and nfe == 4 * 4  # four pictures drawn in four steps
    assert rollout.groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert rollout.prompts[0::2] == rollout.prompts[1::2]
    shown = rollout.final.flatten()[0::2]
    wanted = 4 * torch.tensor([204, 217, 230, 204]) / 255 - 2  # three references in turn
    torch.testing.assert_close(shown, wanted)
    assert len(set(rollout.final.flatten()[1::2].tolist())) == 4
    assert rollout.media is not None
    torch.testing.assert_close(rollout.media.data.flatten(1).mean(1)[0::2], (wanted + 2) / 4)
    score, _ = source.score(rollout)
    assert score.value[0::2].equal(-score.value[1::2]) and set(score.value.tolist()) == {1.0, -1.0}
    labels = [source.score(source.sample(step)[0])[0].value.tolist() for step in range(6)]
    assert len({tuple(x) for x in labels}) > 1  # drawn anew
    assert source.score(source.sample(0)[0])[0].value.equal(score.value)  # and the same again
    numbers = source.metrics(rollout)
    assert numbers["reward/reference"] == pytest.approx(float((wanted + 2).mean() / 4), abs=1e-5)
    sigma, noise = trainer.update.forward.draw(rollout, 0)
    assert sigma[0::2].equal(sigma[1::2]) and noise[0::2].equal(noise[1::2])


@pytest.mark.parametrize(("share", "own"), [(0.01, 1), (0.5, 2), (1.0, 4)])
def test_a_share_of_the_pairs_has_the_prompt_of_the_subject(
    kit, greys, subject, tmp_path, share, own
):
    wanted = {"subject_prompt": "a photo of sks", "subject_share": share}
    source = build(greys, kit.brightness, recipe(greys, tmp_path, subject)).rollouts
    other = build(
        greys, kit.brightness, recipe(greys, tmp_path, subject, objective=wanted)
    ).rollouts
    plain, mixed = source.sample(0)[0], other.sample(0)[0]
    assert mixed.prompts == ("a photo of sks",) * 2 * own + plain.prompts[2 * own :]
    assert mixed.seeds == plain.seeds and mixed.groups.equal(plain.groups)
    assert other.seen(3) == source.seen(3) | {"a photo of sks"}


def test_what_cannot_be_scored_is_no_pair(greys, subject, tmp_path):
    def half(media, prompts):
        value = media.flatten(1).mean(1)
        return torch.where(torch.arange(len(value)) == 3, torch.nan, value)

    reward = FunctionReward(half, takes="tensor")
    trainer = build(greys, reward, recipe(greys, tmp_path, subject))
    score, groups = trainer.rollouts.score(trainer.rollouts.sample(0)[0])
    assert score.valid.tolist() == [True, True, False, False, True, True, True, True]
    pairs = trainer.update.batches(
        trainer.rollouts.sample(0)[0], score.value, score.valid
    )  # fmt: skip
    assert {int(groups[r]) for part in pairs for r in part.rows} == {0, 2, 3}


# --- learning -------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcomes", ["drawn", "expected"])
def test_pictures_become_like_the_subject(kit, greys, subject, tmp_path, outcomes):
    config = recipe(greys, tmp_path, subject, objective={"outcomes": outcomes}, steps=30)
    trainer = build(greys, kit.brightness, config)
    before = greys.drawn(trainer.policy)
    trainer.run()
    assert greys.drawn(trainer.policy) > before + 0.1
    log = read_jsonl(tmp_path / "metrics.jsonl")
    assert log[0]["preference"] == pytest.approx(math.log(2), abs=1e-9)
    assert log[-1]["similarity"] < log[0]["similarity"]
    assert log[-1]["reward/mean"] > log[0]["reward/mean"] + 0.1


def test_the_preference_alone_teaches_it_too(kit, greys, subject, tmp_path):
    config = recipe(greys, tmp_path, subject, objective={"similarity": 0.0, "sharpness": 50.0})
    trainer = build(greys, kit.brightness, config)
    before = greys.drawn(trainer.policy)
    trainer.run()
    assert greys.drawn(trainer.policy) > before + 0.08


def test_a_resumed_run_ends_alike(kit, greys, subject, tmp_path):
    whole = recipe(greys, tmp_path / "whole", subject, steps=8, save_every=5)
    build(greys, kit.brightness, whole).run()
    part = replace(whole, output_dir=str(tmp_path / "part"), steps=5)
    build(greys, kit.brightness, part).run()
    again = build(greys, kit.brightness, replace(part, steps=8))
    assert again.resume() and again.step == 5
    again.run()

    one, two = (greys.held(tmp_path / name)["weights"] for name in ("whole", "part"))
    assert all(two[n].equal(v) for n, v in one.items())


@pytest.mark.parametrize("panel", [None, PanelConfig(every=5, distance=False, best="reward")])
def test_a_run_that_will_keep_its_last_model_says_so(greys, subject, tmp_path, capsys, panel):
    config = recipe(greys, tmp_path, subject, panel=panel)
    Rpo(**config.objective).check_recipe(config)
    assert ("early stopping is part of RPO" in capsys.readouterr().err) == (panel is None)


# --- what is refused ------------------------------------------------------------------------------


def test_combinations_that_mean_nothing(kit, greys, subject, tmp_path):
    config = recipe(greys, tmp_path, subject)
    wrong = {
        "give objective.references": {"objective": OPTIONS},
        "images_per_prompt is 4": {"images_per_prompt": 4},
        "rollout.overlap": {"rollout": replace(config.rollout, overlap=True, batch_size=2)},
    }
    for words, changes in wrong.items():
        with pytest.raises(ConfigError, match=words):
            build(greys, kit.brightness, replace(config, **changes))
    with pytest.raises(FileNotFoundError, match="holds no picture"):
        empty = tmp_path / "empty"
        empty.mkdir()
        build(greys, kit.brightness, recipe(greys, tmp_path, empty))
    other = FunctionReward(lambda media, prompts: media.flatten(1).mean(1), takes="tensor")
    other.references = [torch.zeros(3, 1, 1)]
    with pytest.raises(ConfigError, match="compares with other pictures"):
        build(greys, other, config)
    named = replace(config, prompts=PromptConfig(source="shapes:striped_star"))
    assert all("a v star" in p for p in build(greys, kit.brightness, named).rollouts.prompts.lines)
