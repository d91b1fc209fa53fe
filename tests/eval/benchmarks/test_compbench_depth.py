"""T2I-CompBench++'s relations in depth: rules on hand-made boxes and maps, a real small network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eval.benchmarks.compbench import CATEGORIES, T2ICompBench
from eval.benchmarks.compbench_depth import (
    DepthEstimator,
    depth_request,
    depth_score,
    nearness,
)
from eval.benchmarks.compbench_rules import (
    PhraseError,
    numeracy_request,
    phrases_of,
    spatial_request,
)
from mmalign.registry import UnknownNameError
from mmalign.types import Media
from trainers.pretrain.detector import build_detector, export
from vision_rewards.geneval_prompts import CLASSES
from vision_rewards.geneval_rules import Detection

NAMES = ("cat", "dog")
LEFT, RIGHT = (0.0, 0.0, 200.0, 100.0), (100.0, 0.0, 300.0, 100.0)  # IoU 100 / 300
INNER, OUTER = (0.0, 0.0, 100.0, 100.0), (0.0, 0.0, 100.0, 150.0)  # IoU 2 / 3


def near_on_the_left() -> torch.Tensor:
    """Nearness of 300 x 300 places, falling from left to right alone."""
    return torch.linspace(1, 0, 300).expand(300, 300)


def found(a, b, first: float = 0.8, second: float = 0.6) -> dict[str, list[Detection]]:
    return {"cat": [Detection(a, first)], "dog": [Detection(b, second)]}


@pytest.mark.parametrize(
    ("relation", "score"),
    [("in front of", (1 / 3) / 0.5), ("behind", 0.0), ("hidden by", 0.0)],
)
def test_position_in_depth(relation: str, score: float) -> None:
    """The cat is nearer, and overlaps the dog by a third."""
    told = depth_score(relation, found(LEFT, RIGHT), NAMES, near_on_the_left(), compat=False)
    assert told == pytest.approx(score)
    # The other way round the other relations hold.
    told = depth_score(relation, found(RIGHT, LEFT), NAMES, near_on_the_left(), compat=False)
    assert told == pytest.approx(2 / 3 - score)


def test_boxes_that_do_not_overlap_stand_in_no_depth() -> None:
    apart = found((0, 0, 50, 50), (200, 0, 250, 50))
    assert depth_score("in front of", apart, NAMES, near_on_the_left(), compat=False) == 0.0
    covered = found(INNER, OUTER)
    tall = torch.linspace(1, 0, 300)[:, None].expand(300, 300)  # nearer at the top
    assert depth_score("in front of", covered, NAMES, tall, compat=False) == 1.0


def test_published_score_mixes_confidences_without_a_cut() -> None:
    near = near_on_the_left().T  # as the published script reads it
    whole = depth_score("in front of", found(LEFT, RIGHT), NAMES, near)
    assert whole == pytest.approx((0.8 + 0.6) / 4 + (2 / 3) / 2)
    assert depth_score("behind", found(LEFT, RIGHT), NAMES, near) == pytest.approx(0.35)
    alone = {"dog": [Detection(RIGHT, 0.6)]}
    assert depth_score("in front of", alone, NAMES, near) == pytest.approx(0.15)
    assert depth_score("in front of", {}, NAMES, near) == 0.0
    assert depth_score("in front of", alone, NAMES, near, compat=False) == 0.0


def test_published_quirks() -> None:
    # x and y of the map are exchanged: what falls from left to right looks level in these boxes.
    exchanged = depth_score("in front of", found(LEFT, RIGHT), NAMES, near_on_the_left())
    assert exchanged == pytest.approx(0.35)
    # An overlap of exactly one half counts for nothing, in the definition for everything.
    half = found((0, 0, 100, 100), (0, 0, 100, 200))
    near = torch.linspace(1, 0, 300).expand(300, 300)
    assert depth_score("in front of", half, NAMES, near) == pytest.approx(0.35)
    tall = near.T
    assert depth_score("in front of", half, NAMES, tall, compat=False) == 1.0
    # Of an object met several times before the other one, the last box counts.
    boxes = {
        "cat": [Detection(LEFT, 0.9), Detection(RIGHT, 0.8), Detection(LEFT, 0.1)],
        "dog": [Detection(LEFT, 0.7), Detection(RIGHT, 0.6)],
    }
    told = depth_score("behind", boxes, NAMES, near.T)
    assert told == pytest.approx((0.8 + 0.7) / 4 + (2 / 3) / 2)
    # A box of no pixel has no nearness.
    empty = found((0.2, 0.2, 0.8, 0.8), LEFT)
    assert depth_score("in front of", empty, NAMES, near) == pytest.approx(0.35)


def test_two_objects_of_one_class() -> None:
    people = {"person": [Detection(RIGHT, 0.9), Detection(LEFT, 0.5)]}
    both = ("person", "person")
    near = near_on_the_left()
    assert depth_score("behind", people, both, near) == pytest.approx(0.45)  # one box twice
    assert depth_score("behind", people, both, near, compat=False) == pytest.approx(2 / 3)


def test_prompts_are_read() -> None:
    assert depth_request("a girl behind a dog", CLASSES) == ("behind", "person", "dog")
    assert depth_request("A cat hidden by the chair.", CLASSES) == ("hidden by", "cat", "chair")
    assert depth_request("a cup in front of a boy", CLASSES)[0] == "in front of"
    with pytest.raises(PhraseError, match="none of the relations in front of, behind, hidden by"):
        depth_request("a cat near a dog", CLASSES)


def test_maps_are_scaled_one_by_one() -> None:
    maps = torch.tensor([[[2.0, 4.0], [6.0, 10.0]], [[3.0, 3.0], [3.0, 3.0]]])
    assert nearness(maps, (2, 2))[0].flatten().tolist() == [0.0, 0.25, 0.5, 1.0]
    assert nearness(maps, (2, 2), "small")[0].flatten().tolist() == [1.0, 0.75, 0.5, 0.0]
    assert (
        nearness(maps, (5, 7), "small")[1].abs().max() == 0 and nearness(maps, (5, 7))[0, 0, 0] == 0
    )


# --- networks -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def depth(tmp_path_factory) -> Path:
    """A random DPT of three layers, without the layer that published files lack."""
    from safetensors.torch import load_file, save_file
    from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessor

    config = DPTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16,
        image_size=32, patch_size=8, backbone_out_indices=[0, 1, 2, 3], fusion_hidden_size=8,
        neck_hidden_sizes=[4, 8, 8, 16], is_hybrid=False,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dpt")
    DPTForDepthEstimation(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    DPTImageProcessor(size=size).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in weights.items() if "layers.0.residual_layer1" not in k}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_depth_of_a_stock_network(depth: Path) -> None:
    pixels = torch.rand(3, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    estimator = DepthEstimator(depth, batch_size=2)
    maps = estimator(pixels)
    with torch.no_grad():
        seen = estimator.processor(images=Media(pixels).to_pil(), return_tensors="pt")
        values = estimator.model(**seen).predicted_depth
    assert maps.shape == (3, 40, 56) and values.std() > 0 and estimator.nearer == "large"
    assert torch.allclose(maps, nearness(values, (40, 56)), atol=1e-5)
    # What published files lack is drawn at random, and must not change the name of the weights.
    torch.manual_seed(9)
    assert DepthEstimator(depth).digest == estimator.digest
    far = DepthEstimator(depth, nearer="small")
    assert far.digest != estimator.digest and torch.allclose(far(pixels), 1 - maps, atol=1e-5)


def test_3d_spatial_through_the_benchmark(depth: Path, tmp_path: Path) -> None:
    detector = export(build_detector(3), tmp_path / "detector")
    data = tmp_path / "data"
    data.mkdir()
    (data / "3d_spatial_val.txt").write_text(
        "a red star behind a circle\na lamp in front of a star\n"
    )
    (data / "spatial_val.txt").write_text("a star near a circle\n")
    options = {"detector": detector, "depth": depth, "threshold": 0.0, "samples_per_prompt": 1}
    benchmark = T2ICompBench(data, device="cpu", **options)
    pictures = Media(torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    requests = sorted(benchmark.requests(), key=lambda r: r.key)
    assert [r.task for r in requests] == ["3d_spatial", "3d_spatial", "spatial"]
    score = benchmark.judge(pictures, requests)
    scaled = torch.nn.functional.interpolate(
        pictures.data, (512, 512), mode="bilinear", align_corners=False, antialias=True
    ).clamp(0, 1)  # fmt: skip
    objects, maps = benchmark.detector(scaled), benchmark.depth(scaled)
    wanted = depth_score("behind", objects[0], ("star", "circle"), maps[0])
    assert wanted > 0 and score.value[0] == pytest.approx(wanted)
    assert score.valid.tolist() == [True, False, True] and "knows nothing" in score.notes[1]
    assert f"depth-{benchmark.depth.digest}" in score.identity
    fixed = T2ICompBench(data, device="cpu", mode="fixed", **options).judge(pictures, requests)
    assert fixed.value[0] == pytest.approx(
        depth_score("behind", objects[0], ("star", "circle"), maps[0], compat=False)
    )
    with pytest.raises(UnknownNameError, match="depth_nearer"):
        T2ICompBench(data, depth_nearer="big", **options)


def test_every_official_category_has_a_scorer(official) -> None:
    folder = official("t2i_compbench")
    files = {p.name.removesuffix("_val.txt") for p in folder.glob("*_val.txt")}
    assert files == set(CATEGORIES)
    readers = {"spatial": spatial_request, "3d_spatial": depth_request}
    for prompt in T2ICompBench(folder).load().prompts:
        words = prompt.text.lower().replace(",", " ").rstrip(". ").split()
        if prompt.task in readers:
            relation, a, b = readers[prompt.task](prompt.text, words)
            assert relation and a and b
        elif prompt.task == "numeracy":
            assert numeracy_request(prompt.text, words)
        elif prompt.task in ("color", "shape", "texture", "complex"):
            assert phrases_of(prompt.text, "split")
