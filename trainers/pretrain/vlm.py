"""Trains the shapes world's VLM, a stock ``InternVLForConditionalGeneration``, on questions.

What makes an hour of one CPU core enough:

* **Several questions on one picture.** A row is a picture and a handful of questions; each question
  attends to the picture and to itself only, at the positions it would have alone, so one pass of
  the vision tower and of the picture's tokens serves them all.
* **Seeing first.** For ``vision_steps`` the vision tower alone learns from a layout head, thrown
  away afterwards, as in the generator's pre-training: each patch says which shape and colour
  covers it. Then the tower is frozen, and the decoder meets features that mean something.
* **Muon** on the matrices of both networks.

The loss is the cross-entropy of answer tokens; a long answer weighs as the square root of its
length, so that descriptions do not drown the verdicts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.runtime.files import atomic_path
from mmalign.runtime.log import say
from mmalign.shapes import SHAPES
from trainers.muon import Muon
from trainers.pretrain.vlm_model import (
    VLMSize,
    build_model,
    build_processor,
    build_tokenizer,
    export,
)
from trainers.pretrain.vlm_pictures import generate_pictures
from trainers.pretrain.vlm_questions import Question
from trainers.pretrain.vlm_rows import (
    LABELS,
    Batch,
    RowConfig,
    RowSource,
    collate,
    picture_layouts,
    picture_pixels,
)
from trainers.pretrain.vlm_words import corpus


@dataclass(frozen=True, kw_only=True)
class VLMConfig(RowConfig):
    """Dials of :func:`train_vlm`; how the shipped weights were made is in docs/small-models.md."""

    out: str = "runs/shapes-vlm"
    steps: int = 2400
    vision_steps: int = 700
    decay_share: float = 0.4
    vision_rows: int = 96
    generated: int = 5000
    muon_lr: float = 2e-3
    adam_lr: float = 1e-3
    ema_decay: float = 0.99
    device: str = "cpu"
    save_every: int = 100


# --- loss -----------------------------------------------------------------------------------


class LayoutHead(nn.Module):
    """Reads off every patch which shape and colour covers it, and where in the picture it lies."""

    def __init__(self, tower: Any) -> None:
        super().__init__()
        width = tower.config.hidden_size
        layers = [nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU()]
        self.net = nn.Sequential(*layers, nn.Linear(width, LABELS + 2))

    def loss(self, patches: Tensor, layouts: Tensor) -> Tensor:
        """How badly ``patches (P, cells * cells, width)`` tell ``layouts``, where they are known.

        Binary cross-entropy of the coverage, and over covered cells the cross-entropy of which
        shape and which colour it is: without the second part empty cells and outlines outweigh
        the shapes, which the tower then hardly learns. The squared error of a patch's row and
        column, from -1 to 1: what covers a patch can be told without, so a tower forgets it, and
        a decoder that never hears it cannot tell left from right.
        """
        logits, place = self.net(patches).float().split([LABELS, 2], dim=-1)
        target = layouts.reshape(logits.shape)
        known = torch.isfinite(target)
        target = target.nan_to_num(0.0)
        cover = nn.functional.binary_cross_entropy_with_logits(
            logits, target, weight=known.float(), reduction="sum"
        )
        loss = cover / known.sum().clamp_min(1) + (place - _places(layouts)).square().mean()
        for labels, weight in ((slice(0, len(SHAPES)), 1.0), (slice(len(SHAPES), LABELS), 0.3)):
            share, wanted = logits[..., labels].log_softmax(-1), target[..., labels]
            loss = loss - weight * (share * wanted).sum() / wanted.sum().clamp_min(1)
        return loss


def _places(layouts: Tensor) -> Tensor:
    """Row and column of each cell in [-1, 1], ``(cells * cells, 2)``."""
    ticks = torch.linspace(-1, 1, layouts.shape[1], device=layouts.device)
    return torch.cartesian_prod(ticks, ticks)


def answer_loss(model: Any, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy of the answers, and the share of their tokens got right."""
    with torch.autocast(batch.ids.device.type, torch.bfloat16):
        hidden = model.model(
            input_ids=batch.ids,
            attention_mask=batch.mask,
            position_ids=batch.positions,
            pixel_values=batch.pixels,
            use_cache=False,
        ).last_hidden_state
        target = batch.weights[:, 1:] > 0
        logits = model.lm_head(hidden[:, :-1][target]).float()
    wanted, weights = batch.ids[:, 1:][target], batch.weights[:, 1:][target]
    each = nn.functional.cross_entropy(logits, wanted, reduction="none")
    loss = (each * weights).sum() / weights.sum()
    right = (logits.argmax(-1) == wanted).float().mean()
    return loss, {"answer": loss.item(), "tokens_right": right.item()}


def layout_loss(model: Any, head: LayoutHead, batch: Sequence[Tensor]) -> Tensor:
    """The vision tower alone, on ``(pixels, layouts)``."""
    pixels, layouts = batch
    with torch.autocast(pixels.device.type, torch.bfloat16):
        patches = model.model.vision_tower(pixels).last_hidden_state[:, 1:]
        return head.loss(patches, layouts)


# --- training -------------------------------------------------------------------------------


def train_vlm(config: VLMConfig, size: VLMSize | None = None) -> Path:
    """Pre-train (or resume) the VLM; returns the folder of the finished model and processor."""
    run = _Run(config, size or VLMSize())
    for step in run.steps():
        run.update(step)
    run.trained.load_state_dict(run.ema)
    folder = export(run.model, run.processor, Path(config.out) / "model")
    say(f"VLM written to {folder}")
    return folder


class _Run:
    """Everything that a step of training changes, and how it is saved."""

    def __init__(self, config: VLMConfig, size: VLMSize) -> None:
        torch.manual_seed(config.seed)
        self.config, self.out = config, Path(config.out)
        self.processor = self._processor(size)
        self.model = build_model(size, self.processor.tokenizer, config.seed).to(config.device)
        self.head = LayoutHead(self.model.model.vision_tower).to(config.device)
        self.trained = nn.ModuleDict({"model": self.model, "head": self.head})
        self.ema = {k: v.detach().clone() for k, v in self.trained.state_dict().items()}
        self.optimizer = make_optimizer(self.model, self.head, config)
        store = self.out / "generated.npz"
        own = generate_pictures(store, config.generated) if config.generated else []
        self.source = RowSource(config, own)

    def _processor(self, size: VLMSize) -> Any:
        """Built once and then read back: token ids belong to the weights."""
        from transformers import AutoProcessor

        folder = self.out / "processor"
        if not folder.exists():
            build_processor(build_tokenizer(*corpus()), size).save_pretrained(folder)
        return AutoProcessor.from_pretrained(folder)

    def steps(self) -> Iterator[int]:
        """Step numbers, resuming from and saving to ``state.pt``."""
        config, step = self.config, self._resume()
        first, start = step, time.time()
        while step < config.vision_steps + config.steps:
            yield step
            step += 1
            if step % config.save_every == 0 or step == config.vision_steps + config.steps:
                say(f"saved at step {step}, {(time.time() - start) / (step - first):.2f} s each")
                self._save(step)

    def update(self, step: int) -> None:
        """One step: the vision tower alone at first, then everything on questions."""
        for group in self.optimizer.param_groups:
            group["scale"] = schedule(step, self.config)
        loss, metrics = self._loss(step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained.parameters(), 1.0)
        self.optimizer.step()
        update_ema(self.ema, self.trained, min(self.config.ema_decay, (step + 1) / (step + 10)))
        if (step + 1) % 20 == 0:
            say(f"vlm step {step + 1} {finite(metrics)}")

    def _loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        config = self.config
        seeing = step < config.vision_steps
        # What it has learned to see, held-out pairs of colour and shape among it, stays as it is.
        self.model.model.vision_tower.requires_grad_(seeing)
        if seeing:
            pictures = self.source.vision(step, config.vision_rows)
            tensors = picture_pixels(pictures), picture_layouts(pictures)
            loss = layout_loss(self.model, self.head, [t.to(config.device) for t in tensors])
            return loss, {"layout": loss.item()}
        rows = self.source.rows(step, self._length)
        return answer_loss(self.model, collate(rows, self.processor).to(config.device))

    def _length(self, question: Question) -> int:
        tokens = self.processor.tokenizer([question.text, question.answer]).input_ids
        return 3 + sum(map(len, tokens))

    def _resume(self) -> int:
        path = self.out / "state.pt"
        if not path.exists():
            return 0
        state = torch.load(path, weights_only=True, map_location=self.config.device)
        self.trained.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for key, value in state["ema"].items():
            self.ema[key].copy_(value)
        say(f"resumed at step {state['step']}")
        return int(state["step"])

    def _save(self, step: int) -> None:
        state = {"model": self.trained.state_dict(), "ema": self.ema, "step": step}
        with atomic_path(self.out / "state.pt") as partial:
            torch.save(state | {"optimizer": self.optimizer.state_dict()}, partial)


def make_optimizer(model: Any, head: LayoutHead, config: VLMConfig) -> Muon:
    """Muon for the matrices of the layers and the projector, Adam for everything else."""
    blocks: list[nn.Parameter] = []
    rest: list[nn.Parameter] = list(head.parameters())
    for name, p in model.named_parameters():
        inner = ".layers." in name or ".layer." in name or "projector" in name
        (blocks if inner and p.ndim == 2 else rest).append(p)
    groups: list[dict[str, Any]] = [
        {"params": blocks, "weight_decay": 0.01},
        {"params": rest, "adam": True},
    ]
    return Muon(groups, lr=config.muon_lr, adam_lr=config.adam_lr)


def schedule(step: int, config: VLMConfig) -> float:
    """Warm-up at the start of both phases, constant, then linear decay to zero at the end."""
    total = config.vision_steps + config.steps
    since = step if step < config.vision_steps else step - config.vision_steps
    left = (total - step) / max(1.0, config.decay_share * config.steps)
    return min(1.0, (since + 1) / 60, left)


@torch.no_grad()
def update_ema(ema: dict[str, Tensor], module: nn.Module, decay: float) -> None:
    """Move the average towards the weights in training."""
    for key, value in module.state_dict().items():
        if value.is_floating_point():
            ema[key].lerp_(value, 1 - decay)
        else:
            ema[key].copy_(value)


def finite(metrics: dict[str, float]) -> str:
    """The metrics as text. Raises ``FloatingPointError`` where training has diverged."""
    if not all(math.isfinite(v) for v in metrics.values()):
        raise FloatingPointError(f"pre-training diverged: {metrics}; lower muon_lr or adam_lr")
    return " ".join(f"{k} {v:.4f}" for k, v in metrics.items())
