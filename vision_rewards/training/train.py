"""Training a reward model from label files to a folder that ``--reward`` takes."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mmalign
from mmalign.config import config_hash, dump_yaml, to_dict
from mmalign.runtime.device import pick_device
from mmalign.runtime.files import atomic_write_text, make_directory
from mmalign.runtime.log import say
from mmalign.runtime.seeds import stable_seed
from mmalign.runtime.versions import environment
from vision_rewards.training.backbones import Backbone, load_backbone
from vision_rewards.training.config import RESUMABLE_CHANGES, RewardTrainConfig, resolve_loss
from vision_rewards.training.evaluation import Model, evaluate
from vision_rewards.training.features import (
    CachedFeatures,
    FeatureSource,
    LiveFeatures,
    picture_digests,
)
from vision_rewards.training.heads import (
    CosineHead,
    Features,
    ScaleHead,
    build_head,
    resolve_head,
    uses_text,
)
from vision_rewards.training.loop import Fit, Judged, Progress
from vision_rewards.training.objective import OPEN_SCALE, Objective
from vision_rewards.training.records import Dataset, Sample, read_records
from vision_rewards.training.report import without_nan, write_report
from vision_rewards.training.split import Split, SplitError, groups_of, refuse_overlap, split
from vision_rewards.training.table import CellIndex, tabulate, users_of
from vision_rewards.training.trained import (
    CARD,
    Card,
    TrainedReward,
    load_trained,
    read_card,
)

PARTS = ("train", "validation", "test")
MOST_STATISTICS = 4096  # cells whose features give the statistics of a tuned backbone's inputs


@dataclass(frozen=True)
class Prepared:
    """Data read, checked and split."""

    split: Split
    digests: Mapping[Path, str]
    loss: str

    @property
    def kind(self) -> str:
        """Kind of the judgements."""
        return self.split.train.kind

    def part(self, name: str) -> Dataset:
        """``train``, ``validation`` or ``test``."""
        found: Dataset = getattr(self.split, name)
        return found

    @property
    def fingerprint(self) -> str:
        """Names all judgements and the content of all pictures."""
        rows = [
            (part, [self.digests[i] for i in s.images], s.prompt, *_said(s))
            for part in PARTS
            for s in self.part(part).samples
        ]
        return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]


def _said(sample: Sample) -> tuple[Any, ...]:
    """Everything in a judgement that training reads, besides pictures and prompt."""
    return sample.target, sample.user, sample.weight, sample.margin


def prepare(config: RewardTrainConfig) -> Prepared:
    """Read the label files, hash the pictures and split by prompt.

    Raises:
        RecordError: unusable data. SplitError: overlapping or empty parts.
        ConfigError: a loss for another kind of data.
    """
    data = read_records(config.data, config.image_root)
    loss = resolve_loss(config.loss, data.kind)
    own: dict[str, Dataset] = {}
    for part, path in (("validation", config.validation_data), ("test", config.test_data)):
        if path is not None:
            own[part] = read_records(path, config.image_root)
            if own[part].kind != data.kind:
                raise SplitError(f"{path} holds {own[part].kind}, the training data {data.kind}")
    digests = picture_digests([data, *own.values()])
    for held_out in own.values():
        refuse_overlap(data, held_out, digests)
    shares = {p: 0.0 if p in own else getattr(config, p) for p in ("validation", "test")}
    parts = split(data, digests, seed=config.seed, **shares)
    return Prepared(replace(parts, **own), digests, loss)  # type: ignore[arg-type]


def train_reward(config: RewardTrainConfig, *, resume: bool = True) -> TrainedReward:
    """Train as configured and write the reward to ``config.output_dir``.

    Args:
        resume: continue an interrupted run of the same configuration and data, and return the
            finished one at once; otherwise start over.

    Raises:
        RecordError, SplitError, ConfigError: unusable data or settings.
        OSError: the backbone or a picture is not there.
    """
    started = time.monotonic()
    folder = make_directory(config.output_dir)
    with torch.random.fork_rng(devices=[]):
        prepared = prepare(config)
        run = _run_name(config, prepared)
        if not resume:
            _start_over(folder)
        if _finished(folder) == run:
            return load_trained(folder)
        torch.manual_seed(stable_seed("init", config.seed))
        backbone = load_backbone(config.backbone)
        backbone.network.to(pick_device(config.device))
        training = _Training(config, prepared, backbone, folder)
        training.fit(run, resume)
        reward = training.export(run)
        training.report(reward, time.monotonic() - started)
        return reward


def _run_name(config: RewardTrainConfig, prepared: Prepared) -> str:
    settings = {k: v for k, v in to_dict(config).items() if k not in RESUMABLE_CHANGES}
    for name in ("data", "validation_data", "test_data", "image_root"):
        settings.pop(name)  # where the data lie does not matter, what they are does
    return f"{config_hash(settings)}-{prepared.fingerprint}"


def _start_over(folder: Path) -> None:
    for name in (CARD, "report.json", "state.pt", "log.jsonl"):
        (folder / name).unlink(missing_ok=True)


def _finished(folder: Path) -> str | None:
    """The run whose reward and report are in the folder, if they are."""
    whole = all((folder / name).is_file() for name in (CARD, "report.json"))
    return str(read_card(folder).made.get("run")) if whole else None


class _Training:
    """What one training works with; built the same way at every start."""

    def __init__(
        self, config: RewardTrainConfig, prepared: Prepared, backbone: Backbone, folder: Path
    ) -> None:
        self.config, self.prepared, self.backbone = config, prepared, backbone
        self.folder = folder
        # Before training: LoRA begins at zero, so this names the weights it is added to.
        self.digest = backbone.digest
        readout = config.backbone.readout == "yes_no"
        self.head_config = resolve_head(config.head, text=backbone.has_text, readout=readout)
        self.users = users_of(prepared.part("train"))
        self.device = pick_device(config.device)
        self.index = CellIndex(*(prepared.part(p) for p in PARTS))
        self.judged = {p: self._judged(p) for p in PARTS}
        before = time.monotonic()
        self.source = self._source()
        self.feature_seconds = time.monotonic() - before
        self.model = self._model()

    def _judged(self, part: str) -> Judged:
        dataset = self.prepared.part(part)
        data = tabulate(dataset, self.index, self.users).to(self.device)
        return Judged(data, groups_of(dataset, self.prepared.digests), dataset.kind)

    def _source(self) -> FeatureSource:
        cells, text = self.index.cells, uses_text(self.head_config)
        if self.config.backbone.lora_rank:
            return LiveFeatures(self.backbone, cells, text)
        cache = Path(self.config.cache_dir or self.folder / "features")
        size = self.config.embed_batch
        return CachedFeatures(self.backbone, cells, self.prepared.digests, cache, size, text)

    def _model(self) -> Model:
        loss = self.prepared.loss
        head = build_head(
            self.head_config, self.backbone.width, users=len(self.users),
            gaussian=loss == "gaussian", scaled=loss != "triplet",
        )  # fmt: skip
        if self.head_config.standardise_inputs and not isinstance(head, (CosineHead, ScaleHead)):
            with torch.no_grad():
                head.inputs.fit(self._features(self._train_cells()))  # type: ignore[union-attr,operator]
        objective = Objective(loss, self.config.loss)
        return Model(head.to(self.device), objective.to(self.device), self.source)

    def _train_cells(self) -> Tensor:
        data = self.judged["train"].data
        cells = data.cells[data.present].unique()
        if self.config.backbone.lora_rank and len(cells) > MOST_STATISTICS:
            cells = cells[:: -(-len(cells) // MOST_STATISTICS)]
        return cells

    def _features(self, cells: Tensor) -> Features:
        parts = [self.source(c) for c in cells.split(self.config.embed_batch)]
        texts = [p.text for p in parts if p.text is not None]
        image = torch.cat([p.image for p in parts])
        return Features(image.cpu(), torch.cat(texts).cpu() if texts else None)

    def fit(self, run: str, resume: bool) -> None:
        """Train, or continue, or find it done."""
        config = self.config
        self.fitting = Fit(
            self.model, self.backbone.network, self.judged["train"], self.judged["validation"],
            config.fit, folder=self.folder, seed=config.seed, run=run,
        )  # fmt: skip
        if resume and self.fitting.resume():
            say(f"continuing {self.folder} at step {self.fitting.progress.step}")
        atomic_write_text(self.folder / "config.yaml", dump_yaml(config))
        before = time.monotonic()
        self.done: Progress = self.fitting.fit()
        self.fit_seconds = time.monotonic() - before

    def export(self, run: str) -> TrainedReward:
        """Write the reward to the folder; ``reward.json`` comes last."""
        config, loss = self.config, self.prepared.loss
        offset, scale = self._scale() if config.standardise and loss in OPEN_SCALE else (0.0, 1.0)
        card = Card(
            name=config.name,
            backbone=config.backbone,
            backbone_digest=self.digest,
            width=self.backbone.width,
            head=self.head_config,
            loss=loss,
            gaussian=loss == "gaussian",
            output="probability" if loss in ("bce", "focal") else "raw",
            offset=offset,
            scale=scale,
            made={"run": run, "mmalign": mmalign.__version__, "measures": self._measures()},
        )
        reward = TrainedReward(card, self.backbone, self.model.head, self.users)
        reward.save(self.folder)
        return reward

    def _scale(self) -> tuple[float, float]:
        """Mean and deviation of the scores of the training cells, for nobody in particular."""
        cells = self._train_cells()
        with torch.no_grad():
            self.model.head.eval()
            parts = cells.split(self.config.embed_batch)
            value = torch.cat([self.model.head(self.source(c)).value for c in parts])
        std = float(value.std(unbiased=False))
        return float(value.mean()), std if std > 1e-8 else 1.0

    def _measures(self) -> dict[str, Any]:
        if not hasattr(self, "_measured"):
            size = self.config.fit.batch_size
            self._measured = {
                part: without_nan(evaluate(self.model, j.data, j.kind, j.groups, size))
                for part, j in self.judged.items()
            }
        return self._measured

    def report(self, reward: TrainedReward, seconds: float) -> None:
        """Write the report."""
        done, trained = self.done, self.fitting.optimizer.param_groups
        counts = {p: len(self.prepared.part(p)) for p in PARTS}
        groups = {p: len(set(j.groups)) for p, j in self.judged.items()}
        write_report(
            self.folder,
            {
                "name": self.config.name,
                "identity": reward.identity,
                "loss": self.prepared.loss,
                "head": to_dict(self.head_config),
                "backbone_digest": self.digest,
                "settings": to_dict(self.config),
                "data": {
                    "kind": self.prepared.kind, "samples": counts, "groups": groups,
                    "annotators": len(self.users), "fingerprint": self.prepared.fingerprint,
                },
                "training": {
                    "steps": done.step,
                    "epochs": done.step // self.fitting.per_epoch,
                    "best_epoch": done.best_epoch,
                    "best_validation_loss": done.best_loss,
                    "parameters": sum(p.numel() for g in trained for p in g["params"]),
                    "seconds": seconds,
                    "feature_seconds": self.feature_seconds,
                },
                "measures": self._measures(),
                "environment": environment(),
            },
        )  # fmt: skip


def summary(folder: str | Path) -> str:
    """One line on the finished training in ``folder``, for the terminal."""
    report = json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))
    said = []
    for part in ("validation", "test"):
        measures = report["measures"].get(part, {})
        main = measures.get("main")
        if main and measures[main]["value"] is not None:
            found = measures[main]
            low, high = found.get("wilson") or found.get("interval") or found["bootstrap"]
            between = "" if low is None else f" [{low:.3f}, {high:.3f}]"
            said.append(f"{part} {main} {found['value']:.3f}{between}")
    return f"{folder}: {'; '.join(said) or 'no held-out data'}"
