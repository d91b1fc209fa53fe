"""Rollouts out of a file: pictures that were labelled before, as latents, in the loop's own terms.

A step takes ``prompts_per_step`` pairs. Each is a group of two rows, the winner first, whose scores
are ``2 q - 1`` and its opposite for the probability ``q`` that the winner is better; they are the
advantages, as they are. Pictures with labels of their own make rows that share a group by chance
alone. The order is a function of the seed and the step, reshuffled when all pairs have been seen.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.config import ConfigError
from mmalign.runtime.log import say
from mmalign.runtime.seeds import stable_seed
from mmalign.sampling import Plan
from mmalign.types import Rollout, Score
from trainers.config import TrainConfig
from trainers.credit import everywhere
from trainers.data import share
from trainers.forward import Noising
from trainers.objective import process_of
from trainers.pair_config import PairConfig
from trainers.pairing import unit_of
from trainers.preferences.held_out import held_out_metrics
from trainers.preferences.latents import Latents
from trainers.rollouts import Rollouts
from vision_rewards.prefetch import Prefetch
from vision_rewards.training.features import picture_digests
from vision_rewards.training.records import (
    Dataset,
    Sample,
    kind_of,
    located_rows,
    read_records,
)
from vision_rewards.training.split import split
from vision_rewards.training.validation import oriented, usable_pairs

PAIR = 2  # rows of a group


@dataclass(frozen=True)
class Labelled:
    """One labelled picture: its file, its prompt, and from 1, good, to -1, bad."""

    file: Path
    prompt: str
    label: float


def check_pair_recipe(config: TrainConfig, objective: Any) -> None:
    """Refuse what means nothing for labelled pictures, or cannot be done without them.

    Raises:
        ConfigError: names the setting and what to do.
    """
    name = f"algorithm {config.algorithm!r}"
    if config.pairs is None:
        if getattr(objective, "needs_data", False):
            raise ConfigError(f"{name} starts from labelled pairs; give pairs.data")
        if getattr(objective, "labels", "hard") == "soft":
            raise ConfigError(
                "objective.labels is 'soft', but pairs made online have no probabilities; use "
                "labels: hard, or give pairs.data"
            )
        return
    if process_of(objective) == "reverse":
        raise ConfigError(
            f"pairs.data has pictures without the steps that led to them, which {name} trains on; "
            "use an objective of the forward process, as diffusion_dpo"
        )
    if config.images_per_prompt != PAIR:
        raise ConfigError(
            f"images_per_prompt is {config.images_per_prompt}, but a pair of pairs.data has two "
            "pictures; set it to 2 (prompts_per_step is the number of pairs of a step)"
        )
    if config.rollout.overlap or config.rollout.shared_noise:
        raise ConfigError(
            "rollout.overlap and rollout.shared_noise sample pictures, which pairs.data has "
            "already; remove them"
        )
    if getattr(objective, "pairing", "extremes") != "extremes":
        raise ConfigError(
            f"objective.pairing is {objective.pairing!r}, but pairs.data says who is compared with "
            "whom; remove it"
        )


class PairSource(Rollouts):
    """Labelled pictures in the place of rollouts; see the module.

    Attributes:
        labelled: scores are labels, which are advantages as they are.
        pairs: pairs to train on, winner first; ``held_out`` those of validation.

    Raises:
        RecordError: broken rows, or no pair left. SplitError: nothing left for a part.
        ConfigError: pictures with single labels for an objective that compares pairs.
    """

    labelled = True

    def __init__(self, config: TrainConfig, *arguments: Any) -> None:
        super().__init__(config, *arguments)
        assert config.pairs is not None
        cache = Path(config.pairs.cache or Path(config.output_dir) / "latents")
        with self.accelerator.main_process_first():
            data, digests = _read(config.pairs, getattr(self.policy, "fits", None), cache)
        held_out = Dataset(data.kind, ())
        if config.pairs.validation:
            parts = split(data, digests, validation=config.pairs.validation, test=0.0)
            data, held_out = parts.train, parts.validation
        self.pairs = self._pairs(data)
        self.held_out = self._pairs(held_out) if len(held_out) else []
        with self.accelerator.main_process_first():
            self.latents = Latents(self.policy, cache, digests)
        self._order: tuple[int, list[int]] = (-1, [])  # epoch and its order
        self._step = 0
        self._held_out = self._held_out_rows()
        self.noising = Noising(
            config.forward, self.policy, self.model, self.objective, config.rollout.steps,
            config.seed, self.dtype,
        )  # fmt: skip

    def _pairs(self, data: Dataset) -> list[tuple[Labelled, Labelled]]:
        paired = getattr(self.objective, "paired", False)
        if data.kind == "labels":
            if paired:
                raise ConfigError(
                    f"algorithm {self.config.algorithm!r} compares pictures, but pairs.data has "
                    "labels of single ones; use diffusion_kto, or a file of pairs"
                )
            return _singles(data.samples, self.config.seed)
        ties = not paired or getattr(self.objective, "keep_ties", False)
        found = [_rows(sample) for sample in data.samples]
        kept = [pair for pair in found if ties or pair[0].label > 0]
        if len(kept) < len(found):
            say(f"{len(found) - len(kept)} of {len(found)} pairs are ties and are left out")
        if not kept:
            raise ConfigError(f"pairs.data: all {len(found)} pairs are ties; use labels: soft")
        return kept

    def seen(self, steps: int) -> set[str]:
        """The prompts of the pairs of the first ``steps`` steps."""
        if steps * self.config.prompts_per_step >= len(self.pairs):
            return {row.prompt for pair in self.pairs for row in pair}
        return {row.prompt for s in range(steps) for pair in self.chosen(s) for row in pair}

    def chosen(self, step: int) -> list[tuple[Labelled, Labelled]]:
        """The pairs of a step, over all processes."""
        count = self.config.prompts_per_step
        return [self.pair(step * count + g) for g in range(count)]

    def pair(self, position: int) -> tuple[Labelled, Labelled]:
        """A pair by its position in an endless, seeded stream."""
        epoch, index = divmod(position, len(self.pairs))
        if self._order[0] != epoch:
            order = list(range(len(self.pairs)))
            random.Random(stable_seed("pairs", self.config.seed, epoch)).shuffle(order)
            self._order = (epoch, order)
        return self.pairs[self._order[1][index]]

    def sample(
        self, step: int, scorer: Prefetch | None = None, plan: Plan | None = None
    ) -> tuple[Rollout, int]:
        """This process's share of the pairs of ``step``; nothing is sampled."""
        return self.share_of(step, plan or self.plan(step)), 0

    def share_of(self, step: int, plan: Plan) -> Rollout:
        """This process's share of the pairs of a step, as the loop knows samples."""
        rows = [(g, row) for g, pair in enumerate(self.chosen(step)) for row in pair]
        unit = unit_of(self.objective, self.config)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        low, high = share(len(rows), rank, world, unit)
        own = rows[low:high]
        self._labels = torch.tensor([row.label for _, row in own])
        self._step = step
        prompts = [self._shown(row.prompt, step, g) for g, row in own]
        seeds = [stable_seed("pair", self.config.seed, step, n) for n in range(low, high)]
        return self._rollout(own, prompts, seeds, plan)

    def _rollout(
        self, rows: list[tuple[int, Labelled]], prompts: list[str], seeds: list[int], plan: Plan
    ) -> Rollout:
        final = self.latents([row.file for _, row in rows])
        empty = final.unsqueeze(1)[:, :0]
        return Rollout(
            prompts=tuple(prompts),
            groups=torch.tensor([g for g, _ in rows]),
            seeds=tuple(seeds),
            sigmas=self.policy.sigmas(plan.steps),
            steps=(),
            latents=empty,
            next_latents=empty,
            log_probs=final.new_empty(len(rows), 0),
            final=final,
            media=None,
            conditioning=self.encode(prompts),
            guidance_scale=self._guidance(),
            policy_version=self.version,
        )

    def metrics(self, rollout: Rollout) -> dict[str, float]:
        """What the objective comes to on held-out pairs, after the steps on which it is due."""
        assert self.config.pairs is not None
        found = super().metrics(rollout)
        if self._held_out is None or (self._step + 1) % self.config.pairs.validate_every:
            return found
        size = self.config.rollout.batch_size
        return found | held_out_metrics(self.noising, *self._held_out, size)

    def _held_out_rows(self) -> tuple[Rollout, Tensor] | None:
        """Held-out pairs as a rollout of their own, with labels; alike on all processes."""
        if not self.held_out or not getattr(self.objective, "paired", False):
            return None
        rows = [(g, row) for g, pair in enumerate(self.held_out) for row in pair]
        seeds = [stable_seed("held out", self.config.seed, n) for n in range(len(rows))]
        found = self._rollout(rows, [row.prompt for _, row in rows], seeds, self.plan(0))
        return found, torch.tensor([row.label for _, row in rows])

    def _shown(self, prompt: str, step: int, group: int) -> str:
        """The prompt, or none where dropout falls on the pair."""
        assert self.config.pairs is not None
        coin = random.Random(stable_seed("dropout", self.config.seed, step, group)).random()
        return "" if coin < self.config.pairs.prompt_dropout else prompt

    def _guidance(self) -> float:
        """Pictures of others were not made with this model's guidance: by default there is none."""
        scale = self.config.rollout.guidance_scale
        return 1.0 if scale is None else scale

    @torch.no_grad()
    def score(self, rollout: Rollout, scorer: Prefetch | None = None) -> tuple[Score, Tensor]:
        """Labels and groups of all samples of the step, over all processes in row order."""
        shares = everywhere(self.accelerator, lambda: (self._labels, rollout.groups.cpu()))
        labels = torch.cat([s for s, _ in shares]).to(self.policy.device)
        return Score.of(labels, "labels"), torch.cat([g for _, g in shares])


def build_rollouts(config: TrainConfig, *arguments: Any) -> Rollouts:
    """Where the samples of a run come from: the policy, or the recipe's ``pairs``."""
    if config.algorithm == "rpo":
        from trainers.preferences.subject_pairs import SubjectPairs

        return SubjectPairs(config, *arguments)
    if config.pairs is None:
        return Rollouts(config, *arguments)
    if config.algorithm == "sail":
        from trainers.preferences.own_pairs import OwnPairs

        return OwnPairs(config, *arguments)
    return PairSource(config, *arguments)


def _read(config: PairConfig, fits: Any, cache: Path) -> tuple[Dataset, dict[Path, str]]:
    """Pairs that were checked row by row, or labelled pictures; with digests of the pictures."""
    place, row = located_rows(Path(config.data))[0]
    if kind_of(row, place) == "labels":
        data = read_records(config.data, config.image_root)
        return data, picture_digests([data])
    found = usable_pairs(
        config.data,
        config.image_root,
        drop_broken=config.drop_broken,
        fits=fits,
        known=cache / "pictures.json",
    )
    return Dataset("pairs", found.samples), dict(found.digests)


def _rows(sample: Sample) -> tuple[Labelled, Labelled]:
    sample, lead = oriented(sample)
    winner, loser = sample.images
    return Labelled(winner, sample.prompt, lead), Labelled(loser, sample.prompt, -lead)


def _singles(samples: tuple[Sample, ...], seed: int) -> list[tuple[Labelled, Labelled]]:
    """Pictures with labels of their own, two and two by chance; the last of an odd number twice."""
    rows = [Labelled(s.images[0], s.prompt, 2 * s.target[0] - 1) for s in samples]
    random.Random(stable_seed("singles", seed)).shuffle(rows)
    rows += rows[:1] * (len(rows) % PAIR)
    return list(zip(rows[::2], rows[1::2], strict=True))


__all__ = ["Labelled", "PairSource", "build_rollouts", "check_pair_recipe"]
