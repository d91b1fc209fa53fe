"""A trained reward as a folder, and as a reward model.

``reward.json`` says what it is, ``head.safetensors`` holds the head (and, in its metadata, the
names of the annotators), ``adapter/`` the LoRA layers of the backbone where it has some.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmalign.config import from_dict, to_dict
from mmalign.reward_info import RewardInfo
from mmalign.runtime.files import atomic_path, atomic_write_json
from vision_rewards.base import Context, PixelReward, Reading
from vision_rewards.training.backbones import (
    ADAPTER,
    Backbone,
    adapter_digest,
    load_backbone,
    save_adapter,
)
from vision_rewards.training.config import BackboneConfig, HeadConfig
from vision_rewards.training.heads import Features, IdealPointHead, build_head, uses_text
from vision_rewards.weights import load_exactly

FORMAT = 1
CARD, HEAD = "reward.json", "head.safetensors"


class TrainedRewardError(ValueError):
    """A folder that is no usable trained reward; the message names it and the fix."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """What ``reward.json`` holds.

    Attributes:
        head: with every ``auto`` decided. width: of the backbone's features.
        backbone_digest: of the weights it was trained on.
        gaussian: the head predicts a deviation. output: what the score is, the head's own value or
            the probability it is the log-odds of.
        offset, scale: the score is ``(value - offset) / scale``; for losses that model
            preferences ``P(a beats b) = sigmoid(scale * (score_a - score_b))``.
        checkpoint_near: the checkpoint's folder relative to this one, where it is a folder.
        loss: it was trained with. made: versions, data and measures, for people.
    """

    format: int = FORMAT
    name: str
    backbone: BackboneConfig
    backbone_digest: str
    width: int
    head: HeadConfig
    loss: str
    gaussian: bool = False
    output: Literal["raw", "probability"] = "raw"
    offset: float = 0.0
    scale: float = 1.0
    checkpoint_near: str = ""
    made: Mapping[str, Any]


class TrainedReward(PixelReward):
    """A head on a backbone, trained with ``mmalign train-reward``.

    ``context["user"]`` chooses the annotator of an ideal-point head; somebody unknown, or nobody,
    gets the head's cold start. A Gaussian head adds the part ``std``.

    Args:
        card: its description. backbone, head: its networks.
        users: names of the annotators. device: ``None`` follows the media.
    """

    def __init__(
        self,
        card: Card,
        backbone: Backbone,
        head: nn.Module,
        users: Sequence[str] = (),
        *,
        device: str | None = None,
    ) -> None:
        super().__init__(device)
        self.card, self.backbone = card, backbone
        self.head = head.eval().requires_grad_(False)
        self.users = tuple(users)
        self.info = _info(card, backbone)

    @property
    def identity(self) -> str:
        """Name, a digest of head, annotators and scale, and the backbone's digest."""
        card = self.card
        text = repr((self.users, card.offset, card.scale, card.output)).encode()
        return f"{card.name}@{_digest(self.head, text)}-{self.backbone.digest}"

    def networks(self) -> Sequence[nn.Module]:
        """Head and backbone."""
        return (self.head, *self.backbone.modules())

    def features(self, pictures: Sequence[Tensor], prompts: Sequence[str]) -> Features:
        """Features of pictures ``(3, H, W)`` with their prompts."""
        image = self.backbone.image(pictures, prompts)
        return Features(image, self.backbone.text(prompts) if uses_text(self.card.head) else None)

    def read(self, pixels: Tensor, prompts: Sequence[str], context: Context) -> Reading:
        """Score finite pixels ``(B, 3, H, W)``."""
        image = self.backbone.image_batch(pixels, prompts)
        text = self.backbone.text(prompts) if uses_text(self.card.head) else None
        user = self.user_rows([str(c.get("user", "")) for c in context]).to(image.device)
        prediction = self.head(Features(image, text), user)
        value = prediction.value
        if self.card.output == "probability":
            value = value.sigmoid()
        value = (value - self.card.offset) / self.card.scale
        std = prediction.std
        return Reading(value, {} if std is None else {"std": std / self.card.scale})

    def user_rows(self, names: Sequence[str]) -> Tensor:
        """Rows ``(B,)`` of annotators in the head; -1 for who is not known."""
        known = {name: row for row, name in enumerate(self.users)}
        return torch.tensor([known.get(n, -1) for n in names], dtype=torch.int64)

    def add_user(self, name: str, logits: Tensor) -> None:
        """Add (or replace) an annotator by their logits ``(K,)`` over the prototypes.

        Raises:
            TypeError: the head knows no annotators. ValueError: another number of logits.
        """
        head = self.head
        if not isinstance(head, IdealPointHead):
            raise TypeError(f"{self.card.name} has no annotators; train it with head ideal_point")
        if logits.shape != head.logits.shape[1:]:
            have, want = tuple(logits.shape), tuple(head.logits.shape[1:])
            raise ValueError(f"logits of {name!r} have shape {have}, expected {want}")
        rows = {n: head.logits[k].detach() for k, n in enumerate(self.users)}
        rows[name] = logits.detach().to(head.logits)
        self.users = tuple(rows)
        head.logits = nn.Parameter(torch.stack(list(rows.values())), requires_grad=False)

    def save(self, folder: str | Path) -> Path:
        """Write the reward; ``reward.json`` last, so that a folder that has it is whole."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_head(self.head, self.users, folder / HEAD)
        if self.card.backbone.lora_rank:
            save_adapter(self.backbone.network, folder / ADAPTER)
            base = self.backbone.digest.partition("+")[0]
            self.backbone.digest = f"{base}+{adapter_digest(folder / ADAPTER)}"
        card = replace(self.card, checkpoint_near=_near(self.card.backbone.checkpoint, folder))
        atomic_write_json(folder / CARD, to_dict(card))
        return folder


def _info(card: Card, backbone: Backbone) -> RewardInfo:
    needs = ("prompt",) if backbone.joint or uses_text(card.head) else ()
    return RewardInfo(
        name=card.name,
        differentiable=backbone.differentiable,
        needs=needs,
        range=(0.0, 1.0) if card.output == "probability" else (None, None),
        summary=f"{card.head.kind} head on {card.backbone.checkpoint}, trained with {card.loss}",
        source="trained with mmalign train-reward",
        licence="the user's own, and that of the backbone",
        checkpoint=card.backbone.checkpoint,
        parameters=sum(p.numel() for m in backbone.modules() for p in m.parameters()) / 1e6,
    )


def _digest(head: nn.Module, text: bytes) -> str:
    total = hashlib.sha256(text)
    for name, tensor in sorted(head.state_dict().items()):
        total.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
    return total.hexdigest()[:10]


def _near(checkpoint: str, folder: Path) -> str:
    path = Path(checkpoint).expanduser()
    return os.path.relpath(path.resolve(), folder.resolve()) if path.is_dir() else ""


def save_head(head: nn.Module, users: Sequence[str], path: Path) -> None:
    """Write a head atomically, with the names of its annotators."""
    from safetensors.torch import save_file

    state = {k: v.detach().cpu().contiguous() for k, v in head.state_dict().items()}
    with atomic_path(path) as partial:
        save_file(state, partial, {"users": json.dumps(list(users))})


def load_trained(
    path: str | Path, checkpoint: str | None = None, *, device: str | None = None
) -> TrainedReward:
    """Load the reward in a folder.

    Args:
        path: the folder with ``reward.json``.
        checkpoint: where the backbone is now, if not where it was at training.
        device: where the networks live; ``None`` follows the media.

    Raises:
        TrainedRewardError: no such folder, another format, or a backbone with other weights than
            the head was trained on.
        OSError: the backbone is not there. ValueError: weights that do not fit.
    """
    folder = Path(path)
    card = read_card(folder)
    backbone = _backbone(card, folder, checkpoint)
    users, state = _head_file(folder / HEAD)
    head = build_head(
        card.head, card.width, users=len(users), gaussian=card.gaussian,
        scaled=card.loss != "triplet",
    )  # fmt: skip
    load_exactly(head, state, folder / HEAD)
    return TrainedReward(card, backbone, head, users, device=device)


def read_card(folder: Path) -> Card:
    """Read ``reward.json``.

    Raises:
        TrainedRewardError: not there, not JSON, or of another format.
    """
    path = folder / CARD
    if not path.is_file():
        raise TrainedRewardError(f"{folder} holds no {CARD}: it is no finished trained reward")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TrainedRewardError(f"{path} is not JSON: {error}") from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        said = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
        raise TrainedRewardError(f"{path} has format {said!r}; this version reads {FORMAT}")
    return from_dict(Card, raw, str(path))


def _backbone(card: Card, folder: Path, checkpoint: str | None) -> Backbone:
    near = folder / card.checkpoint_near
    chosen = checkpoint or card.backbone.checkpoint
    if not checkpoint and card.checkpoint_near and not Path(chosen).exists() and near.is_dir():
        chosen = str(near)
    config = replace(card.backbone, checkpoint=chosen)
    adapter = folder / ADAPTER if config.lora_rank else None
    backbone = load_backbone(config, adapter)
    base = backbone.digest.partition("+")[0]
    if base != card.backbone_digest:
        raise TrainedRewardError(
            f"{folder} was trained on weights {card.backbone_digest}, but {chosen!r} holds {base}; "
            "give the checkpoint it was trained on"
        )
    return backbone


def _head_file(path: Path) -> tuple[list[str], dict[str, Tensor]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata: dict[str, str] = file.metadata() or {}
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return list(json.loads(metadata.get("users", "[]"))), state
