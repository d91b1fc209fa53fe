"""Heads: from the features of a picture and its prompt to a score."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmalign.config import ConfigError
from vision_rewards.training.config import HeadConfig


class Features(NamedTuple):
    """Image features ``(B, d)`` and text features ``(B, e)`` (``None`` where there are none)."""

    image: Tensor
    text: Tensor | None = None


class Prediction(NamedTuple):
    """Scores ``(B,)`` and, from a Gaussian head, their standard deviations ``(B,)``."""

    value: Tensor
    std: Tensor | None = None


class FeatureVector(nn.Module):
    """The input of a head: image features, or image, text and their product side by side, with
    mean 0 and deviation 1 in each dimension by statistics of the training cells."""

    mean: Tensor
    std: Tensor

    def __init__(self, width: int, product: bool) -> None:
        super().__init__()
        self.product = product
        self.width = 3 * width if product else width
        self.register_buffer("mean", torch.zeros(self.width))
        self.register_buffer("std", torch.ones(self.width))

    def raw(self, features: Features) -> Tensor:
        """The vector ``(B, width)`` before it is standardised."""
        if not self.product:
            return features.image
        assert features.text is not None
        return torch.cat([features.image, features.text, features.image * features.text], -1)

    def fit(self, features: Features) -> None:
        """Take the statistics of these features; constant dimensions keep their scale."""
        rows = self.raw(features)
        std = rows.std(0, unbiased=False)
        self.mean.copy_(rows.mean(0))
        self.std.copy_(torch.where(std > 1e-6, std, torch.ones_like(std)))

    def forward(self, features: Features) -> Tensor:
        return (self.raw(features) - self.mean) / self.std


def _two_layers(width: int, outputs: int, config: HeadConfig) -> nn.Sequential:
    hidden = config.hidden or width
    dropout = nn.Dropout(config.dropout)
    return nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), dropout, nn.Linear(hidden, outputs))


class VectorHead(nn.Module):
    """``linear`` or ``mlp`` on a feature vector; with two outputs the second is a deviation.

    The two-layer form is ``Linear(d, h) - SiLU - Linear(h, 1)``, which BaseReward (Zhang et al.
    2025, arXiv:2509.16127) chose for rewards on vision-language models. A deviation is
    ``softplus``, hence positive.
    """

    def __init__(self, config: HeadConfig, width: int, product: bool, gaussian: bool) -> None:
        super().__init__()
        self.inputs = FeatureVector(width, product)
        outputs = 2 if gaussian else 1
        if config.kind == "linear":
            linear = nn.Linear(self.inputs.width, outputs)
            self.net = nn.Sequential(nn.Dropout(config.dropout), linear)
        else:
            self.net = _two_layers(self.inputs.width, outputs, config)

    def forward(self, features: Features, user: Tensor | None = None) -> Prediction:
        out = self.net(self.inputs(features))
        return Prediction(out[:, 0], F.softplus(out[:, 1]) if out.shape[1] == 2 else None)


class CosineHead(nn.Module):
    """Cosine of image and prompt, each through ``x + A x`` with ``A`` zero at first.

    Before training it is the backbone's own CLIP score; with a LoRA backbone and Social Reward's
    triplet loss it is that method. A learned scale multiplies the cosine where the loss is
    logistic; the triplet loss keeps it at 1.
    """

    def __init__(self, width: int, scaled: bool = True) -> None:
        super().__init__()
        self.image = nn.Linear(width, width, bias=False)
        self.text = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.image.weight)
        nn.init.zeros_(self.text.weight)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0) if scaled else 0.0))
        self.log_scale.requires_grad_(scaled)

    def forward(self, features: Features, user: Tensor | None = None) -> Prediction:
        assert features.text is not None
        image = F.normalize(features.image + self.image(features.image), dim=-1)
        text = F.normalize(features.text + self.text(features.text), dim=-1)
        return Prediction(self.log_scale.exp().clamp(max=100.0) * (image * text).sum(-1))


class IdealPointHead(nn.Module):
    """PAL (Chen et al. 2024, arXiv:2406.08469): everybody likes what is near their ideal point.

    ``f`` is a two-layer projector of the feature vector to ``dim``, ``P`` are K prototypes in the
    space of the feature vector and ``w_u = softmax(logits_u)`` mixes them for annotator ``u``:
    ``a_u = sum_k w_uk f(P_k)`` (PAL-A). With ``ideal="prompt"`` they depend on the prompt:
    ``a_u = sum_k w_uk g_k(prompt)``, all ``g_k`` from one network of two layers (PAL-B). The
    score is ``-|f(x) - a_u|``; with ``distance="angle"`` the cosine of the two times a learned
    scale of at most 100; with ``distance="dot"``, which PAL-B uses, ``<f(x), a_u>``.

    Attributes:
        logits: ``(U, K)``, one row for each annotator of training.
    """

    def __init__(self, config: HeadConfig, width: int, product: bool, users: int) -> None:
        super().__init__()
        self.config = config
        self.inputs = FeatureVector(width, product)
        self.net = _two_layers(self.inputs.width, config.dim, config)
        self.prompts: nn.Module | None = None
        if config.ideal == "prompt":
            self.prompts = _two_layers(width, config.prototypes * config.dim, config)
        else:
            self.prototypes = nn.Parameter(torch.randn(config.prototypes, self.inputs.width))
        # Equal rows would get equal gradients from prototypes that have not yet parted.
        self.logits = nn.Parameter(0.1 * torch.randn(users, config.prototypes))
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.log_scale.requires_grad_(config.distance == "angle")

    def weights(self, user: Tensor) -> Tensor:
        """Mixture weights ``(B, K)`` of annotators ``(B,)``; -1 is one never seen."""
        known = self.logits.softmax(-1)
        if self.config.cold_start == "mean" and len(known):
            unseen = known.mean(0, keepdim=True)
        else:
            count = self.config.prototypes
            unseen = self.logits.new_full((1, count), 1 / count)
        return torch.cat([unseen, known])[user + 1]

    def forward(self, features: Features, user: Tensor | None = None) -> Prediction:
        if user is None:
            image = features.image
            user = torch.full((len(image),), -1, dtype=torch.int64, device=image.device)
        return self.score_with(features, self.weights(user))

    def score_with(self, features: Features, weights: Tensor) -> Prediction:
        """Scores by mixture weights ``(B, K)``, or ``(1, K)`` for all."""
        x = self.net(self.inputs(features))
        ideal = self._ideal(features, weights)
        if self.config.distance == "dot":
            return Prediction((x * ideal).sum(-1))
        if self.config.distance == "angle":
            scale = self.log_scale.exp().clamp(max=100.0)
            return Prediction(scale * F.cosine_similarity(x, ideal, dim=-1))
        # The distance has no gradient at 0; a tiny floor keeps it finite.
        return Prediction(-torch.sqrt(((x - ideal) ** 2).sum(-1) + 1e-12))

    def _ideal(self, features: Features, weights: Tensor) -> Tensor:
        """Ideal points ``(B, dim)``, or ``(1, dim)`` where one holds for all."""
        if self.prompts is None:
            return weights @ self.net(self.prototypes)
        assert features.text is not None
        of_prompt = self.prompts(features.text).unflatten(-1, (self.config.prototypes, -1))
        return (weights[..., None] * of_prompt).sum(-2)


class ScaleHead(nn.Module):
    """A line through a scalar read-out: ``exp(s) x + b`` (Platt scaling when trained with BCE)."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, features: Features, user: Tensor | None = None) -> Prediction:
        return Prediction(self.log_scale.exp() * features.image[:, 0] + self.bias)


def resolve_head(config: HeadConfig, *, text: bool, readout: bool) -> HeadConfig:
    """The configuration with every ``auto`` decided.

    Args:
        text: the backbone has a text tower of its own.
        readout: the backbone gives one number, not a vector.

    Raises:
        ConfigError: a head that the backbone cannot feed.
    """
    kind = config.kind
    if kind == "auto":
        kind = "scale" if readout else "mlp"
    if (kind == "scale") != readout:
        raise ConfigError(f"head.kind {kind!r} does not fit: 'scale' goes with a yes_no read-out")
    features = config.features
    if features == "auto":
        features = "product" if text and config.ideal != "prompt" else "image"
    resolved = replace(config, kind=kind, features=features)
    if not text and uses_text(resolved):
        raise ConfigError(
            f"head {kind!r} with features {features!r} and ideal {config.ideal!r} needs text "
            "features of their own, which this backbone does not give; use features 'image' "
            "and ideal 'fixed'"
        )
    return resolved


def uses_text(head: HeadConfig) -> bool:
    """Whether a head reads text features."""
    return head.features == "product" or head.kind == "cosine" or head.ideal == "prompt"


def build_head(
    config: HeadConfig, width: int, *, users: int = 0, gaussian: bool = False, scaled: bool = True
) -> nn.Module:
    """The head of a resolved configuration.

    Args:
        width: of image features (text features have the same).
        users: annotators of an ideal-point head.
        gaussian: predict a deviation as well. scaled: the cosine's scale is learned.

    Raises:
        ConfigError: a Gaussian head that is neither linear nor mlp.
    """
    if gaussian and config.kind not in ("linear", "mlp"):
        raise ConfigError(f"loss 'gaussian' needs head.kind linear or mlp, got {config.kind!r}")
    product = config.features == "product"
    if config.kind == "cosine":
        return CosineHead(width, scaled)
    if config.kind == "ideal_point":
        return IdealPointHead(config, width, product, users)
    if config.kind == "scale":
        return ScaleHead()
    return VectorHead(config, width, product, gaussian)
