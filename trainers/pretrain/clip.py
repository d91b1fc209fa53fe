"""Trains the shapes world's text-image model, a stock ``open_clip.CLIP``.

Contrastive (Radford et al., 2103.00020) with near misses: each picture meets, beside the captions
of its batch, captions that are wrong in one fact, and pictures that those would fit.  The scene is
known, so captions that are true by chance are left out of the softmax.  Three helpers are thrown
away afterwards:

* a layout head on the patch tokens (which shape and colour covers each cell), as for the
  generator: binding and counting are learnt from it long before a softmax over captions asks;
* a linear read-out of where each shape lies, from the normalised embedding: without it the model
  stayed at chance on "left of" against "right of" for as long as everything else took to learn;
* a pairwise sigmoid (Zhai et al., 2303.15343) with one scale and bias for all captions, which makes
  the cosine of different prompts comparable.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmalign.policies.build import PROMPT_TOKENS, build_tokenizer
from mmalign.runtime.files import atomic_directory, atomic_write_json
from mmalign.runtime.log import say
from mmalign.shapes import SHAPES
from trainers.muon import Muon
from trainers.pretrain.captions import CaptionTable
from trainers.pretrain.clip_eval import near_miss_accuracy
from trainers.pretrain.pairs import Batch, PairSampler, contrastive_targets
from trainers.pretrain.scenes import load_pool
from trainers.pretrain.steps import Stateful, checked, rate_at, resumable_steps
from vision_rewards.embedding import load_embedder

VISION: dict[str, Any] = {
    "image_size": 64,
    "patch_size": 8,
    "width": 128,
    "layers": 5,
    "head_width": 64,
    "pool_type": "avg",
}
TEXT: dict[str, Any] = {"context_length": PROMPT_TOKENS, "width": 96, "heads": 3, "layers": 3}
EMBED_DIM = 128
MEAN = STD = (0.5, 0.5, 0.5)
MAX_LOGIT_SCALE = 4.6052  # ln 100, as CLIP


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Dials of :func:`train_clip`; docs/small-models.md says how the shipped weights were made."""

    data: str = "shapes-cache"
    out: str = "runs/shapes-clip"
    shards: int = 8
    unnamed: int = 8_000
    decoded_share: float = 0.25
    steps: int = 2900
    batch_size: int = 128
    unnamed_batch: int = 16
    negatives: int = 5
    muon_lr: float = 3e-3
    adam_lr: float = 1.5e-3
    decay_share: float = 0.5
    layout_weight: float = 0.5
    layout_block: int = 3
    pair_weight: float = 0.5
    place_weight: float = 5.0
    held_out: int = 600  # test scenes to report on at the end; 0 reports nothing
    seed: int = 0
    save_every: int = 100


class Helpers(nn.Module):
    """What is trained along and thrown away: layout and place heads, scale and bias of the sigmoid.

    ``places`` reads horizontal and vertical centre of each shape in [-1, 1] from the embedding.
    """

    def __init__(self, model: Any, block: int, labels: int = 13) -> None:
        super().__init__()
        width = model.visual.conv1.out_channels
        self.layout = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, labels))
        self.places = nn.Linear(model.visual.output_dim, 2 * len(SHAPES))
        self.scale = nn.Parameter(torch.tensor(2.3))
        self.bias = nn.Parameter(torch.tensor(-5.0))
        self.tokens: Tensor | None = None
        model.visual.transformer.resblocks[block].register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.tokens = output[:, 1:]

    def layout_loss(self, layouts: Tensor) -> Tensor:
        """Binary cross-entropy against coverage ``(B, cells, cells, labels)`` in [0, 1]."""
        assert self.tokens is not None
        logits = self.layout(self.tokens).float()
        return F.binary_cross_entropy_with_logits(logits, layouts.reshape(logits.shape))

    def place_loss(self, embedding: Tensor, layouts: Tensor) -> Tensor:
        """Squared error of the centres of the shapes that are there.

        ``embedding`` is ``(B, dim)`` of length 1, ``layouts`` ``(B, cells, cells, labels)``.
        """
        mass = layouts[..., : len(SHAPES)].flatten(1, 2)
        at = torch.linspace(-1, 1, 2 * layouts.shape[1] + 1)[1::2]
        grid = torch.cartesian_prod(at, at)
        total = mass.sum(1)
        centres = torch.einsum("bcs,cd->bsd", mass, grid) / total.clamp_min(1e-6).unsqueeze(-1)
        found = self.places(embedding * embedding.shape[1] ** 0.5).view_as(centres)
        return (found - centres).square()[total > 0].mean()

    def pair_loss(self, cosine: Tensor, batch: Batch) -> Tensor:
        """``-log sigmoid(+-(scale * cos + bias))`` over own captions and near misses."""
        logits = self.scale.exp() * cosine + self.bias
        named = (batch.own >= 0).nonzero()[:, 0]
        right = F.softplus(-logits[named, batch.own[named]])
        return right.mean() + F.softplus(logits.gather(1, batch.wrong)).mean()


def build_clip(tokenizer: Any, seed: int = 0, **sizes: Any) -> Any:
    """A random ``open_clip.CLIP`` of the shipped sizes; ``sizes`` changes entries of its config."""
    import open_clip

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return open_clip.CLIP(**architecture(tokenizer, **sizes))


def architecture(tokenizer: Any, **sizes: Any) -> dict[str, Any]:
    """The ``model_cfg`` of the model in open_clip's terms."""
    text = {**TEXT, "vocab_size": len(tokenizer), "hf_tokenizer_name": "shapes"}
    config: dict[str, Any] = {"embed_dim": EMBED_DIM, "vision_cfg": dict(VISION), "text_cfg": text}
    for name, value in sizes.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) else value
    return config


def normalised(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1] as the network wants them, in [-1, 1]."""
    return (pixels - MEAN[0]) / STD[0]


def clip_loss(
    model: Any, helpers: Helpers, batch: Batch, tokens: Tensor, config: ClipConfig
) -> tuple[Tensor, dict[str, float]]:
    """Softmax over captions and over pictures, the helpers' losses, and all their values."""
    # The CPU's fused attention is slow to differentiate at 65 tokens: 0.85 s a step against 0.3 s.
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        image = model.encode_image(normalised(batch.pixels))
        text = model.encode_text(tokens[batch.numbers])
        layout = helpers.layout_loss(batch.layouts)
    image, text = (F.normalize(e.float(), dim=-1) for e in (image, text))
    cosine = image @ text.T
    logits = model.logit_scale.exp() * cosine
    no_caption, no_picture = contrastive_targets(batch)
    named = (batch.own >= 0).nonzero()[:, 0]
    own = batch.own[named]
    by_picture = logits[named].masked_fill(no_caption, -torch.inf)
    by_caption = logits[:, own].T.masked_fill(no_picture, -torch.inf)
    contrast = (F.cross_entropy(by_picture, own) + F.cross_entropy(by_caption, named)) / 2
    pair = helpers.pair_loss(cosine, batch)
    place = helpers.place_loss(image, batch.layouts)
    loss = contrast + config.layout_weight * layout + config.pair_weight * pair
    loss = loss + config.place_weight * place
    best = (by_picture.argmax(1) == own).float().mean()
    found = {"contrast": contrast, "layout": layout, "place": place, "pair": pair, "top1": best}
    return loss, {k: v.item() for k, v in found.items()}


def make_optimizer(model: Any, helpers: Helpers, config: ClipConfig) -> Muon:
    """Muon for the matrices of both transformers' blocks, Adam for everything else."""
    blocks = [p for n, p in model.named_parameters() if "resblocks" in n and p.ndim == 2]
    chosen = {id(p) for p in blocks}
    rest = [p for p in (*model.parameters(), *helpers.parameters()) if id(p) not in chosen]
    groups: list[dict[str, Any]] = [
        {"params": blocks, "weight_decay": 0.01},
        {"params": rest, "adam": True},
    ]
    return Muon(groups, lr=config.muon_lr, adam_lr=config.adam_lr)


def train_clip(config: ClipConfig, **sizes: Any) -> Path:
    """Train (or resume) the text-image model; returns the folder of the finished one."""
    torch.manual_seed(config.seed)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    model = build_clip(tokenizer, config.seed, **sizes)
    helpers = Helpers(model, config.layout_block)
    optimizer = make_optimizer(model, helpers, config)
    table = CaptionTable()
    pool = load_pool(
        Path(config.data), config.shards, config.unnamed, config.decoded_share, out / "decoded.npz"
    )
    sampler = PairSampler(pool, table, config.batch_size, config.negatives, config.unnamed_batch)
    tokens = tokenize(tokenizer, table.captions)
    parts: dict[str, Stateful] = {"model": model, "helpers": helpers, "optimizer": optimizer}
    for step in resumable_steps(out / "state.pt", parts, config.steps, config.save_every):
        for group in optimizer.param_groups:
            group["scale"] = rate_at(step, config.steps, decay_share=config.decay_share)
        batch = sampler.batch(np.random.default_rng((config.seed, step)))
        loss, metrics = clip_loss(model, helpers, batch, tokens, config)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([*model.parameters(), *helpers.parameters()], 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        if (step + 1) % 50 == 0:
            say(f"clip step {step + 1}/{config.steps} {checked(metrics, 'muon_lr or adam_lr')}")
    folder = export(model, tokenizer, out / "clip", **sizes)
    if config.held_out:
        found = near_miss_accuracy(load_embedder(folder), config.held_out)
        say(f"held-out near misses told apart: { {k: str(v) for k, v in found.items()} }")
    return folder


def tokenize(tokenizer: Any, captions: list[str]) -> Tensor:
    """Token ids ``(B, PROMPT_TOKENS)``, padded and cut as open_clip's tokenizer wrapper does."""
    options = {"padding": "max_length", "truncation": True, "max_length": PROMPT_TOKENS}
    return torch.as_tensor(tokenizer(captions, **options).input_ids)


def export(model: Any, tokenizer: Any, folder: Path, **sizes: Any) -> Path:
    """Write the model as open_clip's ``local-dir:`` reads it: configuration, weights, words."""
    from safetensors.torch import save_file

    state = {k: v.detach().half().contiguous() for k, v in model.state_dict().items()}
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "squash"}
    with atomic_directory(folder) as partial:
        tokenizer.save_pretrained(partial)
        save_file(state, partial / "open_clip_model.safetensors")
        config = {"model_cfg": architecture(tokenizer, **sizes), "preprocess_cfg": preprocess}
        atomic_write_json(partial / "open_clip_config.json", json.loads(json.dumps(config)))
    say(f"text-image model written to {folder}")
    return folder
