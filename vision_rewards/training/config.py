"""The configuration of ``mmalign train-reward``, with its defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mmalign.config import ConfigError

Kind = Literal["pairs", "ratings", "labels", "rankings"]
LossName = Literal[
    "auto", "bradley_terry", "gaussian", "davidson", "rao_kupper", "hinge", "triplet",
    "plackett_luce", "mse", "huber", "bce", "focal", "cross_prompt",
]  # fmt: skip

# Which losses a kind of data can be trained with; the first is what ``auto`` means.
LOSSES: dict[str, tuple[str, ...]] = {
    "pairs": ("bradley_terry", "gaussian", "davidson", "rao_kupper", "hinge", "triplet"),
    "ratings": ("mse", "huber"),
    "labels": ("bce", "focal", "cross_prompt"),
    "rankings": ("plackett_luce",),
}


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The network that looks at the pictures.

    ``kind``: ``embedding`` (CLIP, SigLIP, DINO; see :mod:`vision_rewards.embedding`) or ``vlm``
    (any ``AutoModelForImageTextToText``). ``checkpoint`` is a hub name or a folder.
    ``vision_only`` loads only the image tower (DINO). ``lora_rank`` 0 keeps the network frozen:
    its features are computed once and cached. ``lora_targets`` are module name endings; empty
    takes every plain linear layer. ``template`` is what a VLM is told, with ``{prompt}``;
    ``readout`` is the hidden state of the last token, or the log-odds of yes against no.
    """

    checkpoint: str
    kind: Literal["embedding", "vlm"] = "embedding"
    vision_only: bool = False
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    lora_rank: int = 0
    lora_alpha: int = 16
    lora_targets: tuple[str, ...] = ()
    template: str = 'Does this figure show "{prompt}"? Please answer yes or no.'
    readout: Literal["hidden", "yes_no"] = "hidden"

    def __post_init__(self) -> None:
        _at_least("backbone.lora_rank", self.lora_rank, 0)
        if self.kind == "vlm" and self.vision_only:
            raise ConfigError("backbone.vision_only is for kind 'embedding', got kind 'vlm'")
        if self.kind != "vlm" and self.readout != "hidden":
            raise ConfigError("backbone.readout 'yes_no' needs backbone.kind 'vlm'")


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """From features to a score.

    ``kind``: ``linear``; ``mlp``, two layers with SiLU between (BaseReward); ``cosine`` of image
    and prompt through residual projections that begin as the identity; ``ideal_point`` (PAL), one
    taste for each annotator as a mixture of ``prototypes``, which are ``ideal="fixed"`` (PAL-A) or
    functions of the prompt (PAL-B; with ``distance="dot"``); ``scale``, a line through a yes/no
    read-out. ``auto`` is ``mlp``, or ``scale`` for that read-out. ``features``: the image's alone,
    or ``product``: image, text and their element-wise product. ``hidden`` 0 means as wide as the
    input. ``cold_start`` is the taste of an annotator never seen: ``uniform`` over the prototypes,
    or the ``mean`` of those seen.
    """

    kind: Literal["auto", "linear", "mlp", "cosine", "ideal_point", "scale"] = "auto"
    features: Literal["auto", "image", "product"] = "auto"
    hidden: int = 0
    dropout: float = 0.0
    standardise_inputs: bool = True
    prototypes: int = 4
    dim: int = 32
    distance: Literal["euclidean", "angle", "dot"] = "euclidean"
    ideal: Literal["fixed", "prompt"] = "fixed"
    cold_start: Literal["uniform", "mean"] = "uniform"

    def __post_init__(self) -> None:
        for name, low in (("hidden", 0), ("prototypes", 1), ("dim", 1)):
            _at_least(f"head.{name}", getattr(self, name), low)
        if self.ideal == "prompt" and self.kind != "ideal_point":
            raise ConfigError(f"head.ideal 'prompt' needs kind 'ideal_point', got {self.kind!r}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"head.dropout is {self.dropout}; it must lie in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What is minimised; ``auto`` follows the data, ``margin`` None the paper of the loss.

    ``ties`` is the first value of Davidson's nu (learned) or Rao-Kupper's k (kept). ``centre``
    weighs ``(r_a + r_b)^2``. ``bce`` adds that much binary cross-entropy to ``cross_prompt``.
    """

    name: LossName = "auto"
    margin: float | None = None
    smoothing: float = 0.0
    centre: float = 0.0
    ties: float | None = None
    huber_delta: float = 1.0
    focal_gamma: float = 2.0
    focal_alpha: float | None = None
    win_win: float = 1.0
    bce: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 0.5:
            raise ConfigError(f"loss.smoothing is {self.smoothing}; it must lie in [0, 0.5)")
        if self.name == "rao_kupper" and self.ties is not None and self.ties <= 1:
            raise ConfigError(f"loss.ties is {self.ties}; Rao-Kupper's k must be above 1")
        if self.ties is not None and self.ties <= 0:
            raise ConfigError(f"loss.ties is {self.ties}; it must be positive")


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Optimiser (AdamW, cosine decay to zero) and when to stop.

    Validation follows every epoch; after ``patience`` of them without a better validation loss
    training ends (0: never early). The best epoch's weights are kept.
    """

    lr: float = 1e-3
    backbone_lr: float = 1e-4
    weight_decay: float = 0.01
    epochs: int = 20
    batch_size: int = 64
    warmup: float = 0.05
    grad_clip: float = 1.0
    patience: int = 5
    save_every: int = 200

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "save_every"):
            _at_least(f"fit.{name}", getattr(self, name), 1)
        _at_least("fit.patience", self.patience, 0)
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"fit.warmup is {self.warmup}; it is a share in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class RewardTrainConfig:
    """A training of a reward model.

    ``data`` is a JSONL file (see :mod:`vision_rewards.training.records`); image paths in it are
    relative to ``image_root``, by default its folder. Without files of their own, validation and
    test are split off by prompt in the given shares. ``standardise`` gives the finished reward
    mean 0 and deviation 1 on the training items where the loss leaves zero and unit open.
    ``cache_dir`` holds features of frozen backbones (default: beside the output) and can be
    shared by many trainings.
    """

    data: str
    backbone: BackboneConfig
    validation_data: str | None = None
    test_data: str | None = None
    image_root: str | None = None
    name: str = "trained"
    output_dir: str = "runs/reward"
    cache_dir: str | None = None
    seed: int = 0
    device: str = "auto"
    validation: float = 0.1
    test: float = 0.1
    standardise: bool = True
    embed_batch: int = 64
    head: HeadConfig = field(default_factory=HeadConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    fit: FitConfig = field(default_factory=FitConfig)

    def __post_init__(self) -> None:
        _at_least("embed_batch", self.embed_batch, 1)
        for name in ("validation", "test"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it is a share in [0, 1)")
        if self.validation + self.test >= 1:
            raise ConfigError("validation + test leave nothing to train on; make them smaller")


# Settings that may differ between a run and its continuation.
RESUMABLE_CHANGES = ("output_dir", "cache_dir", "device", "embed_batch")


def resolve_loss(loss: LossConfig, kind: str) -> str:
    """The name of the loss for a kind of data.

    Raises:
        ConfigError: the loss needs another kind of data.
    """
    allowed = LOSSES[kind]
    if loss.name == "auto":
        return allowed[0]
    if loss.name not in allowed:
        raise ConfigError(f"loss.name {loss.name!r} cannot use {kind}; use {', '.join(allowed)}")
    return loss.name


def _at_least(name: str, value: int, low: int) -> None:
    if value < low:
        raise ConfigError(f"{name} is {value}; it must be at least {low}")
