"""Every registered reward at a size for tests, built without the hub.

What ships is loaded by name; what is published elsewhere from small random checkpoints of the real
classes in the published layout; judges ask a small local model where they read probabilities, and
a server on this machine where they read words.  A reward without an entry fails the contract.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from tiny_heads import head_state, nsfw_state
from torch import Tensor

from mmalign.protocols import RewardModel
from mmalign.reward_info import RewardInfo
from mmalign.shapes import caption, render, sample_scene, sample_spec
from mmalign.types import Media, Score
from vision_rewards.cards import CARDS
from vision_rewards.factory import load_reward
from vision_rewards.ocr import recognise

BATCH = 4
Facts = Sequence[Mapping[str, Any]]


def rewards_where(holds: Callable[[RewardInfo], bool] = lambda info: True) -> list[str]:
    """Names of the registered rewards whose declaration passes."""
    return sorted(info.name for _, info in CARDS if holds(info))


@dataclass(frozen=True)
class Subject:
    """A reward with inputs that it can judge.

    Attributes:
        make: loads it (again).
        reward: loaded once.
        pictures: ``(B, 3, H, W)`` in [0, 1], 8-bit.
        prompts: ``B`` prompts, all different in meaning.
        context: what it needs besides, for each picture.
    """

    make: Callable[[], RewardModel]
    reward: RewardModel
    pictures: Tensor
    prompts: tuple[str, ...]
    context: Facts | None = None

    @property
    def info(self) -> RewardInfo:
        """What the reward declares."""
        return self.reward.info

    def rows(self, rows: Sequence[int]) -> Subject:
        """The same reward with some of the inputs."""
        context = self.context and [self.context[i] for i in rows]
        prompts = tuple(self.prompts[i] for i in rows)
        return replace(self, pictures=self.pictures[list(rows)], prompts=prompts, context=context)

    def score(self, pictures: Tensor | None = None, prompts: Sequence[str] | None = None) -> Score:
        """Score the inputs, or others in the place of some of them."""
        media = Media(self.pictures if pictures is None else pictures)
        return self.reward.score(media, self.prompts if prompts is None else prompts, self.context)

    def values(
        self, pictures: Tensor | None = None, prompts: Sequence[str] | None = None
    ) -> Tensor:
        """Values ``(B,)`` without gradient."""
        with torch.no_grad():
            return self.score(pictures, prompts).value


def assert_well_formed(score: Score, subject: Subject) -> None:
    """Shapes, dtypes, NaN and a note where unscored, range and identity."""
    count = len(subject.prompts)
    assert len(score) == count and score.value.shape == (count,)
    assert score.value.dtype == torch.float32 and score.valid.dtype == torch.bool
    assert all(p.shape == (count,) and p.dtype == torch.float32 for p in score.parts.values())
    assert torch.isfinite(score.value).equal(score.valid)
    notes = score.notes or ("",) * count
    assert all(note for note, ok in zip(notes, score.valid.tolist(), strict=True) if not ok)
    value, (low, high) = score.value[score.valid], subject.info.range
    assert low is None or (value >= low).all()
    assert high is None or (value <= high).all()
    assert score.identity == subject.reward.identity


def same(a: Tensor, b: Tensor) -> bool:
    """Equal up to the rounding of another batch size."""
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)


@dataclass
class Workshop:
    """Makes subjects, each once.

    Args:
        folder: ``folder(name)``: where small checkpoints are, or an empty folder for them.
        url: of a chat server that answers as ``scripted_judge`` does.
        open_clip_config: the architecture in ``folder("open_clip")``.
    """

    folder: Callable[[str], Path]
    url: str
    open_clip_config: Mapping[str, Any]
    _made: dict[str, Subject] = field(default_factory=dict)
    _texts: dict[Any, str] = field(default_factory=dict)

    def subject(self, name: str) -> Subject:
        """The reward ``name``; a ``KeyError`` where nobody said how to build it."""
        if name not in self._made:
            self._made[name] = self._subject(name)
        return self._made[name]

    def recognise(self, picture: np.ndarray) -> str:
        """Text of a picture, remembered."""
        key = picture.shape, picture.tobytes()
        if key not in self._texts:
            self._texts[key] = recognise(picture)
        return self._texts[key]

    def _subject(self, name: str) -> Subject:
        build = BUILDS[name]
        options = build(self) if callable(build) else dict(build)
        pictures, prompts = INPUTS.get(name, scenes)()

        def make() -> RewardModel:
            return load_reward({"reward": name, **options})

        reward = make()
        keys = sorted(set(reward.info.needs) - {"prompt"})  # all of them take pictures
        context = [dict.fromkeys(keys, p) for p in pictures.flip(0, -1)] if keys else None
        return Subject(make, reward, pictures, prompts, context)


# --- inputs -------------------------------------------------------------------------------------


def scenes() -> tuple[Tensor, tuple[str, ...]]:
    """Rendered scenes and captions; every second caption is of another scene."""
    rng = random.Random(5)
    specs = [sample_spec(rng, "train") for _ in range(BATCH)]
    pictures = [render(sample_scene(s, rng)) for s in specs]
    asked = [s if k % 2 else sample_spec(rng, "train") for k, s in enumerate(specs)]
    return Media.from_pil(pictures).data, tuple(caption(s) for s in asked)


def words() -> tuple[Tensor, tuple[str, ...]]:
    """Pictures of words and prompts that quote words."""
    pictures = []
    for word in ("STAR", "MOON", "TREE", "LAKE"):
        picture = Image.new("RGB", (96, 48), "white")
        ImageDraw.Draw(picture).text((8, 8), word, fill="black", font_size=28)
        pictures.append(picture)
    asked = ("STAR", "MOON", "STREET", "ICE")
    return Media.from_pil(pictures).data, tuple(f'a sign that says "{w}"' for w in asked)


def clipped() -> tuple[Tensor, tuple[str, ...]]:
    """Scenes of which more and more is black."""
    pictures, prompts = scenes()
    for k, picture in enumerate(pictures):
        picture[:, : 8 * k] = 0
    return pictures, prompts


def noisy() -> tuple[Tensor, tuple[str, ...]]:
    """Scenes with more and more noise."""
    pictures, prompts = scenes()
    noise = torch.rand(pictures.shape, generator=torch.Generator().manual_seed(6)) - 0.5
    share = torch.linspace(0, 0.5, BATCH).view(-1, 1, 1, 1)
    return ((pictures + share * noise).clamp(0, 1) * 255).round() / 255, prompts


def things() -> tuple[Tensor, tuple[str, ...]]:
    """Pictures for a detector of persons, mice and dogs."""
    asked = ("two persons", "a person", "two dogs", "a red dog")
    return scenes()[0], tuple(f"a photo of {w}" for w in asked)


INPUTS: dict[str, Callable[[], tuple[Tensor, tuple[str, ...]]]] = {
    "ocr": words, "ocr_strict": words, "geneval": things, "clipping": clipped,
    "shapes_artifact": noisy,
}  # fmt: skip


# --- builds: options of the constructor ---------------------------------------------------------

Build = Mapping[str, Any] | Callable[[Workshop], dict[str, Any]]
SHIPPED: Mapping[str, Any] = {}


def aesthetic(kind: str, backbone: str, dim: int) -> Build:
    """A head as published on a small backbone."""

    def build(shop: Workshop) -> dict[str, Any]:
        file = shop.folder(f"head-{kind}") / "head.pth"
        torch.save(head_state(kind, (dim, 20, 12, 8, 4, 1)), file)
        return {"checkpoint": file, "backbone": shop.folder(backbone)}

    return build


def nsfw_clip(shop: Workshop) -> dict[str, Any]:
    """LAION's detector on a small CLIP."""
    file = shop.folder("nsfw") / "head.pth"
    torch.save(nsfw_state((24, 8, 12, 6, 1)), file)
    return {"checkpoint": file, "backbone": shop.folder("clip")}


def hps(shop: Workshop) -> dict[str, Any]:
    """The published wrapping of open_clip's weights."""
    from safetensors.torch import load_file

    file = shop.folder("hps") / "HPS.pt"
    state = load_file(shop.folder("open_clip") / "open_clip_model.safetensors")
    torch.save({"state_dict": state}, file)
    return {"checkpoint": file, "architecture": dict(shop.open_clip_config)}


def image_reward(shop: Workshop) -> dict[str, Any]:
    """A small BLIP with its head."""
    from tiny_image_reward import SMALL, write_image_reward

    folder = write_image_reward(shop.folder("image_reward"))
    return {"checkpoint": folder, "size": SMALL, "tokenizer": folder}


def hpsv3(shop: Workshop) -> dict[str, Any]:
    """A small Qwen2-VL with its head."""
    from safetensors.torch import save_file
    from tiny_hpsv3 import SIDE, TEMPLATE, published_state, write_body

    file = shop.folder("hpsv3") / "HPSv3.safetensors"
    save_file(published_state(), file)
    body = write_body(shop.folder("qwen2_vl"))
    size = {"template": TEMPLATE, "max_pixels": SIDE**2, "dtype": "fp32"}
    return {"checkpoint": file, "body": body, **size}


def geneval(shop: Workshop) -> dict[str, Any]:
    """An untrained detector: it finds much, with little confidence."""
    from tiny_vision import write_mask2former

    folder = write_mask2former(shop.folder("mask2former"))
    options = {"threshold": 0.2, "counting_threshold": 0.3, "max_objects": 2, "mode": "partial"}
    return {"checkpoint": folder, "colors": shop.folder("open_clip"), **options}


def small(write: str, **options: Any) -> Build:
    """A model that a function of ``tiny_vision`` writes."""

    def build(shop: Workshop) -> dict[str, Any]:
        import tiny_vision

        return {"checkpoint": getattr(tiny_vision, write)(shop.folder(write)), **options}

    return build


def local_vlm(shop: Workshop) -> dict[str, Any]:
    """A judge in this process."""
    return {"checkpoint": shop.folder("vlm")}


def subject(shop: Workshop) -> dict[str, Any]:
    """Likeness and fidelity by one small CLIP."""
    clip = shop.folder("clip")
    return {
        "image": {"reward": "clip_i", "checkpoint": clip},
        "text": {"reward": "clip_score", "checkpoint": clip},
    }


def server(**options: Any) -> Build:
    """A judge behind a server."""
    return lambda shop: {"url": shop.url, "server": {"retries": 0}, **options}


BUILDS: dict[str, Build] = {
    **dict.fromkeys(("shapes_strict", "shapes_partial"), SHIPPED),
    **dict.fromkeys(("shapes_clip", "shapes_aesthetic", "shapes_artifact"), SHIPPED),
    **dict.fromkeys(("jpeg_compressibility", "jpeg_incompressibility"), SHIPPED),
    **dict.fromkeys(("sharpness", "saturation", "colorfulness", "contrast"), SHIPPED),
    **dict.fromkeys(("grid_energy", "clipping", "ocr", "ocr_strict"), SHIPPED),
    "clip_score": lambda shop: {"checkpoint": shop.folder("clip")},
    "pickscore": lambda shop: {"checkpoint": shop.folder("clip")},
    "hpsv2": hps,
    "hpsv2_1": hps,
    "aesthetic_v1": aesthetic("v1", "clip", 24),
    "aesthetic_v2": aesthetic("linear", "clip", 24),
    "aesthetic_v2_ava": aesthetic("relu", "clip", 24),
    "aesthetic_v2_5": aesthetic("v2_5", "siglip", 32),
    "clip_i": lambda shop: {"checkpoint": shop.folder("clip")},
    "dino_i": small("write_dino"),
    "lambda_harmonic": subject,
    "nsfw": small("write_classifier"),
    "nsfw_clip": nsfw_clip,
    # Margins of random concepts would saturate at the default temperature.
    "nsfw_checker": small("write_checker", temperature=0.5),
    "image_reward": image_reward,
    "hpsv3": hpsv3,
    "geneval": geneval,
    "yes_no_judge": local_vlm,
    "vqascore": local_vlm,
    **dict.fromkeys(("rubric_judge", "pairwise_judge", "critique_judge", "region_judge"), server()),
    **dict.fromkeys(("auto_rubric", "checklist_judge"), server()),
    "edit_score": server(passes=2),
    "video_judge": server(frames=2),
    **dict.fromkeys(("unified_reward", "unified_reward_pair"), server(size=64)),
}
