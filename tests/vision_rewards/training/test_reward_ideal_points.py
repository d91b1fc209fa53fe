"""Ideal points that depend on the prompt, and what names a run: end to end and by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mmalign.config import ConfigError
from mmalign.types import Media, Score
from vision_rewards.training.config import (
    BackboneConfig,
    FitConfig,
    HeadConfig,
    RewardTrainConfig,
)
from vision_rewards.training.features import read_pictures
from vision_rewards.training.heads import Features, build_head, resolve_head
from vision_rewards.training.records import read_records
from vision_rewards.training.train import train_reward
from vision_rewards.training.trained import load_trained
from vision_rewards.training.users import fit_user


def config(data: Path, folder: Path, **changes: Any) -> RewardTrainConfig:
    settings: dict[str, Any] = {
        "data": str(data),
        "backbone": BackboneConfig(checkpoint=str(folder)),
        "output_dir": str(data.parent / "reward"),
        "cache_dir": str(folder / "features"),
        "device": "cpu",
        "test": 0.25,
    }
    return RewardTrainConfig(**{**settings, **changes})


def measures(data: Path) -> dict[str, Any]:
    report = json.loads((data.parent / "reward" / "report.json").read_text())
    found: dict[str, Any] = report["measures"]["test"]
    return found


def scores(reward: Any, world: Any, **context: Any) -> Score:
    pixels = torch.stack(read_pictures([p.path for p in world]))
    prompts = [f"{('day', 'night')[k // 2 % 2]} {k // 2}" for k in range(len(world))]
    with torch.no_grad():
        return reward.score(Media(pixels), prompts, [context] * len(world))


def taste(picture: Any) -> float:
    return picture.warmth


def test_ideal_points_that_depend_on_the_prompt(
    world: Any, write: Any, open_clip_folder: Path
) -> None:
    """PAL-B: what is liked by day is disliked by night, by ann; and the other way round by bob.

    Neither a common taste nor fixed ideal points of pictures could pass one half.
    """
    rows = []
    for number, (a, b) in enumerate(zip(world[::2], world[1::2], strict=True)):
        time = ("day", "night")[number % 2]
        for user in ("ann", "bob"):
            warm = (taste(a) > taste(b)) == ((time == "day") == (user == "ann"))
            images = {"image_a": str(a.path), "image_b": str(b.path), "user": user}
            rows.append({"prompt": f"{time} {number}", **images, "label": "a" if warm else "b"})
    data = write(rows)
    head = HeadConfig(
        kind="ideal_point", ideal="prompt", distance="dot", prototypes=2, dim=8, hidden=16
    )
    reward = train_reward(
        config(data, open_clip_folder, head=head, fit=FitConfig(epochs=60, lr=1e-2))
    )
    assert reward.card.head.features == "image" and reward.info.needs == ("prompt",)
    assert measures(data)["accuracy"]["wilson"][0] > 0.6
    loaded = load_trained(data.parent / "reward")
    value = scores(reward, world, user="bob").value
    assert scores(loaded, world, user="bob").value.allclose(value, atol=1e-5)
    few = [{k: v for k, v in row.items() if k != "user"} for row in rows[1:81:2]]  # bob's
    fit_user(reward, "new", read_records(write(few, "few.jsonl")))
    new = scores(reward, world, user="new").value
    assert torch.corrcoef(torch.stack([new, value]))[0, 1] > 0.7


def test_prompt_ideals_by_hand() -> None:
    """``<f(x), sum_k w_uk g_k(prompt)>``, and equal weights for nobody in particular."""
    torch.manual_seed(0)
    made = HeadConfig(kind="ideal_point", ideal="prompt", distance="dot", features="image", dim=3)
    head = build_head(made, 5, users=2)
    features = Features(torch.randn(4, 5), torch.randn(4, 5))
    x, prototypes = head.net(features.image), head.prompts(features.text).view(4, 4, 3)
    for user, weight in ((1, head.logits[1].softmax(-1)), (-1, torch.full((4,), 0.25))):
        want = [x[b] @ (weight @ prototypes[b]) for b in range(4)]
        got = head(features, torch.full((4,), user)).value
        torch.testing.assert_close(got, torch.stack(want))
    with pytest.raises(ConfigError, match="ideal 'prompt' needs kind 'ideal_point'"):
        HeadConfig(kind="mlp", ideal="prompt")
    with pytest.raises(ConfigError, match="needs text features"):
        resolve_head(made, text=False, readout=False)


def test_every_word_of_a_judgement_names_the_run(
    world: Any, write: Any, open_clip_folder: Path
) -> None:
    """A finished run must not stand for one on edited labels."""
    rows = [
        {"prompt": a.prompt, "image_a": str(a.path), "image_b": str(b.path), "label": "a"}
        for a, b in zip(world[:40:2], world[1:40:2], strict=True)
    ]
    brief = {"fit": FitConfig(epochs=1)}
    data = write(rows)
    train_reward(config(data, open_clip_folder, **brief))
    for edit in ({"margin": 0.5}, {"weight": 2.0}, {"user": "ann"}, {"label": "tie"}):
        write([{**rows[0], **edit}, *rows[1:]])
        with pytest.raises(ConfigError, match="another configuration or other data"):
            train_reward(config(data, open_clip_folder, **brief))
