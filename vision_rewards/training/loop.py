"""The training loop: epochs over judgements, validation, early stopping, exact resumption.

Everything random is drawn from (seed, step) or (seed, epoch), so the state on disk needs no
random states and a killed run continues to the same weights as one that was never killed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.config import ConfigError
from mmalign.runtime.files import atomic_path
from mmalign.runtime.log import JsonlLog
from mmalign.runtime.progress import track
from mmalign.runtime.seeds import stable_seed
from vision_rewards.training.config import FitConfig
from vision_rewards.training.evaluation import Model, evaluate
from vision_rewards.training.report import without_nan
from vision_rewards.training.table import Batch

State = dict[str, Tensor]


@dataclass(frozen=True)
class Judged:
    """A data set as tensors with the group (prompt) of each sample, for intervals."""

    data: Batch
    groups: Sequence[str]
    kind: str


@dataclass
class Progress:
    """Where a run is. ``best`` are the weights with the lowest validation loss so far."""

    step: int = 0
    best: State = field(default_factory=dict)
    best_loss: float = math.inf
    best_epoch: int = 0
    waited: int = 0
    finished: bool = False


class Fit:
    """One training of a head (and the LoRA layers of a backbone).

    Args:
        model: what is trained. backbone: trained as well where it has parameters that want
            gradients.
        train, validation: judgements; without validation the last epoch's weights are kept.
        folder: for ``state.pt`` and ``log.jsonl``.
        run: names configuration and data; a state of another run is refused.
    """

    def __init__(
        self,
        model: Model,
        backbone: nn.Module,
        train: Judged,
        validation: Judged,
        config: FitConfig,
        *,
        folder: Path,
        seed: int,
        run: str,
    ) -> None:
        self.model, self.config = model, config
        self.train_data, self.validation = train, validation
        self.folder, self.seed, self.run = folder, seed, run
        self.tuned = {n: p for n, p in backbone.named_parameters() if p.requires_grad}
        self.optimizer = self._optimizer()
        self.per_epoch = math.ceil(len(train.data) / config.batch_size)
        self.total = config.epochs * self.per_epoch
        self.progress = Progress()

    def _optimizer(self) -> torch.optim.Optimizer:
        heads = [*self.model.head.parameters(), *self.model.objective.parameters()]
        groups = [
            {"params": [p for p in heads if p.requires_grad], "lr": self.config.lr},
            {"params": list(self.tuned.values()), "lr": self.config.backbone_lr},
        ]
        used = [{**g, "peak": g["lr"]} for g in groups if g["params"]]
        return torch.optim.AdamW(used, weight_decay=self.config.weight_decay)

    # --- state ---

    def weights(self) -> State:
        """A copy of everything that training changes, on the CPU."""
        parts = {
            "head": self.model.head.state_dict(),
            "objective": self.model.objective.state_dict(),
            "backbone": self.tuned,
        }
        return {
            f"{part}.{name}": value.detach().cpu().clone()
            for part, state in parts.items()
            for name, value in state.items()
        }

    def load_weights(self, state: State) -> None:
        """Undo :meth:`weights`."""

        def part(name: str) -> State:
            start = f"{name}."
            return {k[len(start) :]: v for k, v in state.items() if k.startswith(start)}

        self.model.head.load_state_dict(part("head"))
        self.model.objective.load_state_dict(part("objective"))
        with torch.no_grad():
            for name, value in part("backbone").items():
                self.tuned[name].copy_(value)

    def save(self) -> None:
        """Write ``state.pt`` atomically."""
        state = {
            "run": self.run,
            "weights": self.weights(),
            "optimizer": self.optimizer.state_dict(),
            "progress": dict(vars(self.progress)),
        }
        with atomic_path(self.folder / "state.pt") as partial:
            torch.save(state, partial)

    def resume(self) -> bool:
        """Continue from ``state.pt`` if there is one.

        Raises:
            ConfigError: it belongs to another configuration or other data.
        """
        path = self.folder / "state.pt"
        if not path.is_file():
            return False
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if state["run"] != self.run:
            raise ConfigError(
                f"{path} is of a run with another configuration or other data; choose another "
                "output_dir, or start over with --no-resume"
            )
        self.load_weights(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])
        return True

    # --- training ---

    def fit(self) -> Progress:
        """Train to the end (or from where :meth:`resume` left off) and keep the best weights."""
        done = self.progress
        with JsonlLog(self.folder / "log.jsonl", resume_step=done.step or -1) as log:
            if not done.step:
                self._validate(log)
            with track("train", self.total, done.step, not done.finished) as advance:
                while not done.finished:
                    loss = self._step()
                    if done.step % self.per_epoch == 0:
                        self._validate(log, loss)
                    if done.finished or done.step % self.config.save_every == 0:
                        self.save()
                    advance(1, f"loss {loss:.4f}")
        self.load_weights(done.best)
        return done

    def _step(self) -> float:
        done = self.progress
        torch.manual_seed(stable_seed("dropout", self.seed, done.step))
        rows = self._order(done.step // self.per_epoch)
        at = done.step % self.per_epoch * self.config.batch_size
        batch = self.train_data.data[rows[at : at + self.config.batch_size]]
        self.model.head.train()
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self._schedule(done.step)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model.loss(batch)
        loss.backward()
        self._clip()
        self.optimizer.step()
        done.step += 1
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value} at step {done.step}; lower fit.lr")
        return value

    def _clip(self) -> None:
        if self.config.grad_clip > 0:
            trained = [p for g in self.optimizer.param_groups for p in g["params"]]
            torch.nn.utils.clip_grad_norm_(trained, self.config.grad_clip)

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(stable_seed("order", self.seed, epoch))
        order = torch.randperm(len(self.train_data.data), generator=generator)
        return order.to(self.train_data.data.cells.device)

    def _schedule(self, step: int) -> float:
        """Linear warm-up, then half a cosine to zero; a factor of the learning rate."""
        warm = self.config.warmup * self.total
        if step < warm:
            return (step + 1) / (warm + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(self.total - warm, 1)))

    def _validate(self, log: JsonlLog, train_loss: float | None = None) -> None:
        """Measure, remember the best weights, decide whether to stop."""
        done, held = self.progress, self.validation
        epoch = done.step // self.per_epoch
        found = evaluate(self.model, held.data, held.kind, None, self.config.batch_size)
        main = found.get("main", "")
        record = {"loss": found.get("loss"), main: found[main]["value"]} if main else {}
        log.write(
            {"step": done.step, "epoch": epoch, "train_loss": train_loss, **without_nan(record)}
        )
        loss = found.get("loss", -epoch)  # without validation data the latest is the best
        if not done.best or loss < done.best_loss:
            done.best, done.best_loss = self.weights(), loss
            done.best_epoch, done.waited = epoch, 0
        else:
            done.waited += 1
        patience = self.config.patience
        done.finished = epoch >= self.config.epochs or bool(patience and done.waited >= patience)
