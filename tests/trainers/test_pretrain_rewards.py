"""The jobs that make the shapes world's small reward models, on a few steps of tiny data."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mmalign.policies.build import build_tokenizer
from mmalign.policies.load import load_policy
from mmalign.shapes import (
    TASKS,
    ObjectSpec,
    Placed,
    PromptSpec,
    Scene,
    caption,
    render,
    sample_scene,
    sample_spec,
)
from mmalign.shapes.scene import random_spec
from trainers.pretrain import data
from trainers.pretrain.aesthetic import AestheticConfig, train_aesthetic
from trainers.pretrain.artifact import HELD_OUT, ArtifactConfig, rendered, train_artifact
from trainers.pretrain.captions import KINDS, CaptionTable, all_specs, near_misses, true_specs
from trainers.pretrain.clip import ClipConfig, tokenize, train_clip
from trainers.pretrain.clip_eval import near_miss_accuracy
from trainers.pretrain.corruption import CORRUPTIONS
from trainers.pretrain.failures import SETTINGS, damaged, generated, labelled, verdict_of
from trainers.pretrain.measures import auroc, proportion, spearman
from trainers.pretrain.pairs import PairSampler, contrastive_targets
from trainers.pretrain.scenes import Pool, load_pool, to_pixels, unnamed_scene
from trainers.pretrain.taste import balance, draw, harmony, prefers
from vision_rewards.embedding import load_embedder
from vision_rewards.shapes_models import ShapesAesthetic, ShapesArtifact
from vision_rewards.shapes_vision import look

SMALL = {
    "embed_dim": 64,
    "vision_cfg": {"width": 64, "layers": 2, "head_width": 32},
    "text_cfg": {"width": 32, "heads": 1, "layers": 1},
}


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "SHARD_SIZE", 120)


def scene_of(*objects: tuple[str, str, float, float]) -> Scene:
    """Objects as (shape, colour, x, y) on grey."""
    from mmalign.shapes import COLORS

    placed = tuple(Placed(s, c, x, y, 0.15, 0.0, COLORS[c]) for s, c, x, y in objects)
    return Scene(placed, ((90, 90, 90), (90, 90, 90)))


# --- captions -----------------------------------------------------------------------------------


def test_true_captions_are_exactly_those_the_scene_satisfies() -> None:
    rng, every = random.Random(0), all_specs()
    for task in TASKS * 3:
        scene = sample_scene(random_spec(task, rng), rng)
        true, unsure = true_specs(scene)
        truth = {s for s in every if scene.satisfies(s)}
        assert set(true) <= truth
        assert truth - set(true) <= set(unsure)


def test_near_misses_differ_in_one_fact_and_every_kind_occurs() -> None:
    spec = PromptSpec((ObjectSpec("star", "red"), ObjectSpec("circle", "blue")), "left")
    found: dict[str, set[str]] = {}
    for kind, miss in near_misses(spec):
        found.setdefault(kind, set()).add(caption(miss))
    assert "a photo of a blue star to the left of a red circle" in found["swap"]
    assert "a photo of a red star to the right of a blue circle" in found["relation"]
    assert "a photo of a blue circle to the left of a red star" in found["relation"]
    assert "a photo of a red star" in found["object"]
    counted = dict(near_misses(PromptSpec((ObjectSpec("cross", None, 2),))))
    assert {*found, *counted} == set(KINDS)


def test_the_table_holds_every_caption_once_and_trains_on_no_held_out_one() -> None:
    table = CaptionTable()
    assert len(set(table.captions)) == len(table) == 7000
    rng = random.Random(1)
    for _ in range(50):
        number = table.number(sample_spec(rng, "train"))
        groups = table.negatives(number)
        assert all(table.in_training[m] for group in groups.values() for m in group)
        assert number not in {m for group in groups.values() for m in group}
    assert not table.in_training[table.number(sample_spec(rng, "test", "position"))]


# --- batches ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    folder = tmp_path_factory.mktemp("pool")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SHARD_SIZE", 120)
        return load_pool(folder, 2, 20, 0.1, folder / "decoded.npz")


def test_a_pool_knows_the_scenes_of_its_pictures(pool: Pool) -> None:
    assert len(pool.images) == len(pool.scenes) == len(pool.specs) == 260
    same = [
        np.array_equal(np.asarray(render(s)), i)
        for s, i in zip(pool.scenes, pool.images, strict=True)
    ]
    assert 0.85 < np.mean(same) < 0.95  # one in ten went through the autoencoder
    for spec, scene in zip(pool.specs, pool.scenes, strict=True):
        assert scene.satisfies(spec) if spec else true_specs(scene) == ([], [])


def test_scenes_without_a_caption_are_mixed() -> None:
    rng = random.Random(2)
    for _ in range(20):
        scene = unnamed_scene(rng)
        assert len(scene.objects) >= 3 and len({o.shape for o in scene.objects}) == 2


def test_wrong_captions_are_wrong_and_own_captions_are_true(pool: Pool) -> None:
    table = CaptionTable()
    batch = PairSampler(pool, table, 40, 4, 8).batch(np.random.default_rng(0))
    named = batch.own >= 0
    assert int((~named).sum()) == 8
    assert batch.true[named].gather(1, batch.own[named, None]).all()
    assert not (batch.true | batch.unsure).gather(1, batch.wrong).any()
    assert all(table.in_training[n] for n in batch.numbers.tolist())
    captions, pictures = contrastive_targets(batch)
    rows = torch.arange(int(named.sum()))
    assert not captions[rows, batch.own[named]].any()
    assert not pictures[rows, named.nonzero()[:, 0]].any()
    assert captions.sum() == batch.true[named].sum() + batch.unsure[named].sum() - len(rows)


# --- the text-image model -----------------------------------------------------------------------


def clip_config(folder: Path, out: str, **options: object) -> ClipConfig:
    settings = {"shards": 2, "unnamed": 16, "decoded_share": 0.0, "batch_size": 24, "negatives": 4}
    settings |= {"steps": 4, "save_every": 2, "unnamed_batch": 4, "layout_block": 1, "held_out": 0}
    settings |= options
    return ClipConfig(data=str(folder / "data"), out=str(folder / out), **settings)


def test_a_short_training_tells_wrong_captions_from_right_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "SHARD_SIZE", 400)
    monkeypatch.setattr(data, "TASK_WEIGHTS", {"colors": 0.8, "counting": 0.2})
    folder = train_clip(clip_config(tmp_path, "clip", steps=120, save_every=120), **SMALL)
    found = near_miss_accuracy(load_embedder(folder), 300, "train")
    assert found["color"].low > 0.6  # chance is 0.5


def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_clip(clip_config(tmp_path, "whole"), **SMALL)
    original = PairSampler.batch
    calls = []

    def dies(self: PairSampler, rng: np.random.Generator) -> object:
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return original(self, rng)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PairSampler, "batch", dies)
        train_clip(clip_config(tmp_path, "stopped"), **SMALL)
    resumed = train_clip(clip_config(tmp_path, "stopped"), **SMALL)
    name = "open_clip_model.safetensors"
    assert (whole / name).read_bytes() == (resumed / name).read_bytes()


def test_training_tokens_are_those_the_stored_tokenizer_gives(tmp_path: Path) -> None:
    import open_clip

    folder = train_clip(clip_config(tmp_path, "clip", steps=1), **SMALL)
    table = CaptionTable()
    stored = open_clip.get_tokenizer(f"local-dir:{folder}")(table.captions)
    assert torch.equal(stored, tokenize(build_tokenizer(), table.captions))


# --- taste --------------------------------------------------------------------------------------


def test_the_terms_of_taste() -> None:
    opposite = scene_of(("star", "red", 0.3, 0.5), ("circle", "cyan", 0.7, 0.5))
    quarter = scene_of(("star", "red", 0.1, 0.5), ("circle", "yellow", 0.5, 0.5))
    assert harmony(opposite) > 0.95 > 0.75 > harmony(quarter)
    assert balance(opposite) == pytest.approx(1.0)
    assert balance(quarter) == pytest.approx(np.exp(-((0.2 / 0.12) ** 2)))
    rng = random.Random(0)
    edges = [draw(opposite, rng) for _ in range(60)]
    clean = np.asarray(render(opposite)).astype(float)
    off = [np.abs(e.picture - clean).mean() for e in edges]
    assert spearman(np.asarray(off), np.asarray([e.terms[2] for e in edges])).value < -0.8
    assert all(o == 0 for o, e in zip(off, edges, strict=True) if e.terms[2] == 1)
    share = np.mean([prefers(0.6, 0.45, rng) for _ in range(4000)])
    assert share == pytest.approx(1 / (1 + np.exp(-1)), abs=0.03)


def test_a_short_training_learns_the_taste(tmp_path: Path) -> None:
    config = AestheticConfig(
        out=str(tmp_path), pictures=500, steps=400, save_every=200, held_out=20, batch_size=64
    )
    reward = ShapesAesthetic(train_aesthetic(config))
    rng = random.Random(3)
    pictures = [
        draw(sample_scene(sample_spec(rng, "test", "color_attr"), rng), rng) for _ in range(150)
    ]
    scores = score(reward, np.stack([p.picture for p in pictures]))
    assert spearman(scores, np.asarray([p.utility for p in pictures])).low > 0.3


def score(reward: ShapesAesthetic | ShapesArtifact, images: np.ndarray) -> np.ndarray:
    """Scores ``(N,)`` of pictures ``(N, H, W, 3)`` uint8."""
    from mmalign.types import Media

    with torch.no_grad():
        return reward.score(Media(to_pixels(images)), [""] * len(images)).value.numpy()


# --- artefacts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_are_visible_repeatable_and_leave_their_input_alone(name: str) -> None:
    pixels = to_pixels(rendered(12, "train", 0))
    before = pixels.clone()
    spoilt = corrupt(name, pixels)
    assert torch.equal(pixels, before) and torch.equal(spoilt, corrupt(name, pixels))
    assert spoilt.min() >= 0 and spoilt.max() <= 1
    # Every picture has places that are off by more than 8-bit rounding ever is.
    assert ((spoilt - pixels).abs().amax((1, 2, 3)) > 0.05).all()


def corrupt(name: str, pixels: Tensor) -> Tensor:
    """One corruption with a fixed seed."""
    return CORRUPTIONS[name](pixels, torch.Generator().manual_seed(1))


def test_labels_come_from_what_can_be_recognised() -> None:
    clean = rendered(60, "test", 1) / np.float32(255)
    warped = corrupt("warp", to_pixels(rendered(60, "test", 1))).permute(0, 2, 3, 1).numpy()
    assert np.mean([v is True for v in map(verdict_of, look(clean))]) > 0.9
    assert np.mean([v is False for v in map(verdict_of, look(warped))]) > 0.5
    empty = labelled(np.full((2, 64, 64, 3), 0.5, np.float32), "base")
    assert len(empty.clean) == 0 and empty.images.shape == (0, 64, 64, 3)


def test_good_settings_make_clean_pictures_and_bad_ones_broken() -> None:
    settings = {s.kind: s for s in SETTINGS}
    policy = load_policy("shapes-flow")
    good = generated(policy, settings["base"], "train", 16, seed=0)
    again = generated(policy, settings["base"], "train", 16, seed=0)
    assert np.array_equal(good.images, again.images) and set(good.kinds) == {"base"}
    bad = generated(damaged(policy, 0.8), settings["damaged"], "train", 16, seed=0)
    assert good.clean.mean() > 0.7 > 0.4 > bad.clean.mean()


def write_sets(folder: Path, count: int = 40) -> None:
    """What an earlier call would have left: labelled pictures of every setting."""
    for split, seed in (("train", 5), ("test", 6)):
        for setting in SETTINGS:
            images = rendered(count, split, seed)
            bad = corrupt("warp", to_pixels(images[::2])).permute(0, 2, 3, 1).numpy()
            images[::2] = np.round(bad * 255)
            clean = np.arange(count) % 2 == 1
            folder.mkdir(parents=True, exist_ok=True)
            np.savez(folder / f"{setting.kind}-{split}.npz", images=images, clean=clean)


def test_a_short_training_finds_artefacts_on_fresh_pictures(tmp_path: Path) -> None:
    write_sets(tmp_path)
    config = ArtifactConfig(
        out=str(tmp_path), renders=100, steps=80, batch_size=32, width=8, save_every=40, lr=5e-3
    )
    reward = ShapesArtifact(train_artifact(config))
    clean = rendered(60, "test", 9)
    noisy = corrupt("noise", to_pixels(clean)).permute(0, 2, 3, 1).mul(255).round().byte().numpy()
    scores = score(reward, np.concatenate([clean, noisy]))
    assert auroc(scores, np.arange(120) < 60).low > 0.8
    assert HELD_OUT in {s.kind for s in SETTINGS}
    assert ShapesArtifact(train_artifact(config)).identity == reward.identity  # nothing left to do


# --- measures -----------------------------------------------------------------------------------


def test_auroc_is_the_share_of_pairs_in_order() -> None:
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 6, 60).astype(float), rng.random(60) < 0.4
    a, b = scores[positive][:, None], scores[~positive][None]
    found = auroc(scores, positive)
    assert found.value == pytest.approx(((a > b) + 0.5 * (a == b)).mean())
    assert found.low < found.value < found.high
    with pytest.raises(ValueError, match="both classes, got 0 positive"):
        auroc(scores, np.zeros(60))


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    inside = []
    for _ in range(200):
        hits = rng.random(50) < 0.9
        p = proportion(hits)
        inside.append(p.low <= 0.9 <= p.high)
    assert 0.88 < np.mean(inside) <= 1.0
    assert spearman(np.arange(30), np.arange(30) ** 3).value == pytest.approx(1.0)
