"""Distances to a reference set, through the harness, on the shipped embedding model."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.benchmarks.base import DataError
from eval.benchmarks.fid import FidBenchmark
from eval.benchmarks.sources import COMPLETE, SOURCES
from eval.entry import evaluate
from eval.harness import judge_folder, run_benchmark
from eval.metrics.distribution import clip_mmd, frechet_distance, polynomial, squared_mmd
from eval.metrics.features import INCEPTION, PUBLISHED, Embedded, Inception, WeightsError
from mmalign.assets import asset
from mmalign.pictures import read_picture
from mmalign.registry import UnknownNameError
from mmalign.shapes import caption, render, sample_scene, sample_spec
from mmalign.types import Media

COUNT = 24


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """Rendered scenes with their captions."""
    folder = tmp_path_factory.mktemp("reference")
    rng, lines = random.Random(3), []
    for k in range(COUNT):
        spec = sample_spec(rng, "test", "color_attr")
        render(sample_scene(spec, rng)).save(folder / f"{k}.png")
        lines.append(json.dumps({"file_name": f"{k}.png", "text": caption(spec)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def benchmark(folder: Path, **options) -> FidBenchmark:
    clip = asset("shapes-clip")
    return FidBenchmark(folder, **{"features": clip, "clip": clip, "device": "cpu", **options})


@pytest.fixture(scope="module")
def run(studio, reference, tmp_path_factory):
    """A result of a painter of some skill, kept in a folder of its own."""

    def go(skill: float, asked: FidBenchmark | None = None, out: Path | None = None):
        where = out or tmp_path_factory.mktemp("run")
        return run_benchmark(
            studio.Painter(), asked or benchmark(reference), where, progress=False,
            generate=studio.Sketch(skill=skill),
        )  # fmt: skip

    return go


@pytest.fixture(scope="module")
def near(run, network):
    """The result of a painter who draws what the captions say."""
    return run(1.0)


@pytest.fixture(scope="module")
def network() -> Embedded:
    """The shipped embedding model; what is in use is not loaded again."""
    return Embedded(asset("shapes-clip"))


def features(network: Embedded, paths) -> np.ndarray:
    return network(Media.from_pil([read_picture(p) for p in paths]).data).numpy()


def test_numbers_are_those_of_the_two_sets(near, network: Embedded, reference: Path) -> None:
    result = near
    made = features(network, [result.image_path(r) for r in result.rows])
    known = features(network, [reference / f"{k}.png" for k in range(COUNT)])
    numbers = result.numbers
    assert numbers["FID"] == pytest.approx(frechet_distance(made, known), rel=1e-4)
    assert numbers["CMMD"] == pytest.approx(clip_mmd(made, known), rel=1e-4)
    assert numbers["pictures"] == numbers["references"] == COUNT
    # All subsets are the whole set here, so that their mean is the estimate over all pairs.
    exact = squared_mmd(made.astype(np.float64), known.astype(np.float64), polynomial)
    assert numbers["KID"] == pytest.approx(exact, rel=1e-3, abs=1e-6)
    # Values are shares of the distance: their mean is minus the CMMD, with an interval.
    assert result.accuracy.mean == pytest.approx(-numbers["CMMD"], rel=1e-6)
    assert result.unit == "score" and result.accuracy.defined and not result.overall.unscored
    assert any("biased upwards" in p for p in result.problems)


def test_a_painter_of_other_things_is_further_away(run, near) -> None:
    far = run(0.0)
    for name in ("FID", "KID", "CMMD"):
        assert far.numbers[name] > near.numbers[name]


def test_pictures_that_are_there_give_the_same_numbers(
    run, network: Embedded, reference: Path, tmp_path: Path
) -> None:
    result = run(1.0, out=tmp_path / "run")
    again = run(1.0, out=tmp_path / "run")
    assert again.numbers == result.numbers and again.rows == result.rows
    there = judge_folder(tmp_path / "run" / "images", benchmark(reference), progress=False)
    assert there.numbers == result.numbers
    (tmp_path / "run" / "images" / f"{result.rows[0].key}.png").unlink()
    fewer = judge_folder(tmp_path / "run" / "images", benchmark(reference), progress=False)
    assert fewer.numbers["pictures"] == COUNT - 1 and fewer.overall.unscored == 1


def test_kid_over_all_pairs_has_no_draw_in_it(run, near, reference: Path) -> None:
    fixed = run(1.0, benchmark(reference, mode="fixed", measures=["kid"]))
    assert set(fixed.numbers) == {"KID", "CMMD", "pictures", "references"}
    assert fixed.numbers["KID"] == pytest.approx(near.numbers["KID"], rel=1e-3, abs=1e-6)


def test_features_of_the_reference_are_kept(run, near, reference: Path, tmp_path: Path) -> None:
    keep = tmp_path / "features"
    first = run(1.0, benchmark(reference, keep=keep))
    (file,) = keep.iterdir()
    before = file.stat().st_mtime_ns
    assert first.numbers == near.numbers
    assert run(1.0, benchmark(reference, keep=keep)).numbers == near.numbers
    assert file.stat().st_mtime_ns == before and len(list(keep.iterdir())) == 1
    # A damaged file is named.
    with np.load(file) as told:
        assert told["of clip"].shape[0] == COUNT
    file.write_bytes(b"PK")
    with pytest.raises(DataError, match=r"\.npz holds no features .*delete it"):
        _ = benchmark(reference, keep=keep)._reference


# --- what is refused ----------------------------------------------------------------------------


def test_pictures_have_to_be_kept(studio, reference: Path) -> None:
    with pytest.raises(ValueError, match=r"fid measures the pictures as a set.*--out DIR"):
        run_benchmark(studio.Painter(), benchmark(reference), progress=False)
    with pytest.raises(ValueError, match="so they have to be kept"):
        evaluate("shapes-flow", benchmark(reference))


def test_options_that_make_no_sense(reference: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="'cmmd'"):
        benchmark(reference, measures=["cmd"])
    with pytest.raises(ValueError, match="not by a reward"):
        benchmark(reference, reward="shapes_clip")
    with pytest.raises(DataError, match=r"no data was given; give the folder.*\(data=\)\. Off"):
        benchmark(None)
    with pytest.raises(DataError, match="is no folder"):
        benchmark(reference / "0.png")
    with pytest.raises(DataError, match=r"none of metadata\.jsonl, captions\.json"):
        _ = benchmark(tmp_path).loaded


def test_captions_of_coco_and_broken_rows(reference: Path, tmp_path: Path) -> None:
    for k in range(2):
        (tmp_path / f"{k}.png").write_bytes((reference / f"{k}.png").read_bytes())
    told = {
        "images": [{"id": 7, "file_name": "1.png"}, {"id": 5, "file_name": "0.png"},
                   {"id": 6, "file_name": "gone.png"}, {"id": 9, "file_name": "1.png"}],
        "annotations": [{"image_id": 5, "caption": "five"}, {"image_id": 7, "caption": "seven"},
                        {"image_id": 7, "caption": "again"}, {"image_id": 6, "caption": "six"}],
    }  # fmt: skip
    (tmp_path / "captions.json").write_text(json.dumps(told))
    loaded = benchmark(tmp_path).loaded
    assert [(p.text, p.facts["file"]) for p in loaded.prompts] == [
        ("seven", "1.png"), ("five", "0.png")]  # fmt: skip
    assert len(loaded.problems) == 2 and "image 6: there is no picture 'gone.png'" in str(loaded)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}\n{"text": 1}\n[]')
    loaded = benchmark(tmp_path).loaded
    assert [p.text for p in loaded.prompts] == ["a"] and len(loaded.problems) == 2
    assert "metadata.jsonl, line 3: expected a JSON object" in loaded.problems[1]


# --- Inception ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A file with the published keys, and random weights in it."""
    extractor = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

    class Untrained(extractor.FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict, strict=True, assign=False):
            return None

    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "empty.pth")
    torch.manual_seed(0)
    network = Untrained("u", ["2048"], feature_extractor_weights_path=str(folder / "empty.pth"))
    torch.save(network.state_dict(), folder / INCEPTION)
    return folder / INCEPTION


def test_inception_of_a_local_file(
    run, reference: Path, weights: Path, tmp_path, monkeypatch
) -> None:
    few = tmp_path / "few"
    few.mkdir()
    lines = (reference / "metadata.jsonl").read_text().splitlines()[:2]
    (few / "metadata.jsonl").write_text("\n".join(lines))
    for k in range(2):
        (few / f"{k}.png").write_bytes((reference / f"{k}.png").read_bytes())
    # As mmalign data get keeps it.
    cache = tmp_path / "cache" / "inception"
    cache.mkdir(parents=True)
    (cache / INCEPTION).symlink_to(weights)
    (cache / COMPLETE).write_text("{}")
    monkeypatch.setenv("MMALIGN_DATA", str(tmp_path / "cache"))
    result = run(1.0, benchmark(few, features="inception"), tmp_path / "run")
    network = Inception(weights)
    pixels = Media.from_pil([read_picture(result.image_path(r)) for r in result.rows]).data
    known = Media.from_pil([read_picture(few / f"{k}.png") for k in range(2)]).data
    made, against = network(pixels).numpy(), network(known).numpy()
    assert made.shape == (2, 2048) and made.std() > 0
    assert result.numbers["FID"] == pytest.approx(frechet_distance(made, against), rel=1e-3)
    assert network.identity in result.provenance["scorer"] and not network.published
    assert any("not the published" in p for p in result.problems)


def test_inception_weights_that_are_missing_or_something_else(
    reference: Path, tmp_path: Path, monkeypatch
) -> None:
    pytest.importorskip("torch_fidelity")
    monkeypatch.setenv("MMALIGN_DATA", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(WeightsError, match=f"{INCEPTION} with: mmalign data get inception"):
        benchmark(reference, features="inception")
    with pytest.raises(WeightsError, match=r"no Inception weights .*gone\.pth"):
        benchmark(reference, features="inception", weights=tmp_path / "gone.pth")
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match="Conv2d_1a_3x3"):
        benchmark(reference, features="inception", weights=tmp_path / "other.pth")
    (tmp_path / "code.pth").write_bytes(pickle.dumps(Path("x"), protocol=2))
    with pytest.raises(WeightsError, match=r"code\.pth holds no Inception weights"):
        Inception(tmp_path / "code.pth")


def test_the_published_digest_is_the_one_that_is_fetched() -> None:
    file = SOURCES["inception"].files[0]
    assert (file.name, file.sha256) == (INCEPTION, PUBLISHED)
    assert PUBLISHED.startswith(INCEPTION.rpartition("-")[2].removesuffix(".pth"))
