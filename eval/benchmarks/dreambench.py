"""DreamBench (Ruiz et al. 2022, 2208.12242): the same subject in new places, 25 prompts a subject.

For each picture, with its subject's reference pictures ``r`` and its prompt without the token::

    DINO   mean over r of cos(DINO(picture), DINO(r))
    CLIP-I mean over r of cos(CLIP(picture), CLIP(r))
    CLIP-T cos(CLIP(picture), CLIP(prompt))

and the numbers are means over pictures. A generator knows a subject by a token; it is trained on
one subject, so one run asks for the prompts of one subject. Both modes are the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from eval.benchmarks.base import DataError, Numbers, Prompt, PromptBenchmark, Rows, part_mean
from eval.benchmarks.tables import text_of
from eval.result import Row
from mmalign.protocols import Request, RewardModel
from mmalign.registry import unknown
from mmalign.types import Media, Score
from vision_rewards.similarity import PICTURES

LIVE = ("cat", "dog")  # classes whose subjects are alive, with prompts of their own
REWARDS: dict[str, Any] = {
    "dino": {"reward": "dino_i", "checkpoint": "facebook/dino-vits16"},
    "clip_i": {"reward": "clip_i", "checkpoint": "openai/clip-vit-base-patch32"},
    "clip_t": {"reward": "clip_score", "checkpoint": "openai/clip-vit-base-patch32"},
}


class DreamBench(PromptBenchmark):
    """25 prompts of one subject, four pictures each; ``data`` is the folder ``dataset``.

    Args:
        subject: a name of ``prompts_and_classes.txt``.
        token: the words by which the generator knows the subject.
        rewards: other judges for ``dino``, ``clip_i`` and ``clip_t``, by these names.
        data, mode, samples_per_prompt, device: see :class:`PromptBenchmark`.
    """

    name = "dreambench"
    version = "1"
    files = "the folder with prompts_and_classes.txt and a folder of pictures for each subject"
    samples = 4
    keeps_parts = True

    def __init__(
        self,
        data: str | Path | None = None,
        *,
        subject: str = "",
        token: str = "sks",
        rewards: dict[str, Any] | None = None,
        **common: Any,
    ) -> None:
        for name in rewards or ():
            if name not in REWARDS:
                raise unknown("measure of dreambench", name, REWARDS)
        self.subject, self.token = subject, token
        self._specs = {**REWARDS, **(rewards or {})}
        super().__init__(data, **common)

    def settings(self) -> dict[str, Any]:
        """Subject and token."""
        return {"subject": self.subject, "token": self.token}

    def rows(self) -> Rows:
        """The prompts of the subject's kind."""
        path = self.data / "prompts_and_classes.txt"
        if not path.is_file():
            raise DataError(f"{self.data} has no {path.name}")
        text = text_of(path)
        classes = dict(re.findall(r"^([a-z0-9_]+),([a-z ]+?)\s*$", text, re.MULTILINE))
        classes.pop("subject_name", None)
        if self.subject not in classes:
            raise unknown("subject of dreambench (-o subject=)", self.subject, classes)
        kind = classes[self.subject]
        things, live = text.partition("Live Subject Prompts")[::2]
        templates = re.findall(
            r"^'(.*\{0\}.*\{1\}.*?)'", live if kind in LIVE else things, re.MULTILINE
        )
        for k, template in enumerate(templates):
            yield f"{path.name}, prompt {k}", lambda k=k, t=template: self._prompt(k, t, kind)  # type: ignore[misc]

    def _prompt(self, index: int, template: str, kind: str) -> Prompt:
        bare = " ".join(template.format("", kind).split())
        text = template.format(self.token, kind)
        return Prompt(id=f"{index:02d}", text=text, task=self.subject, facts={"bare": bare})

    @cached_property
    def references(self) -> list[str]:
        """The subject's pictures."""
        folder = self.data / self.subject
        there = folder.iterdir() if folder.is_dir() else ()
        found = sorted(str(p) for p in there if p.suffix.lower() in PICTURES)
        if not found:
            raise DataError(f"{folder} holds no picture of the subject")
        return found

    @cached_property
    def rewards(self) -> dict[str, RewardModel]:
        """The three judges by name."""
        from vision_rewards.factory import load_reward

        return {name: load_reward(spec) for name, spec in self._specs.items()}

    @property
    def identity(self) -> str:
        """All three judges."""
        return ", ".join(r.identity for r in self.rewards.values())

    def judge(self, media: Media, requests: Sequence[Request]) -> Score:
        """DINO as the value, with CLIP-I and CLIP-T as parts."""
        context = [{"reference": self.references}] * len(requests)
        bare = [self.prompt_of(r.key).facts["bare"] for r in requests]
        parts, notes = {}, [""] * len(requests)
        for name, reward in self.rewards.items():
            score = self.scored(reward, media, bare, context)
            parts[name] = torch.where(score.valid, score.value, torch.nan)
            notes = [a or b for a, b in zip(notes, score.notes or notes, strict=True)]
        value = parts["dino"]
        told = tuple(notes) if any(notes) else ()
        return Score(value, value.isfinite(), parts, told, self.identity)

    def numbers(self, rows: Sequence[Row]) -> Numbers:
        """Means of the three measures over the pictures that have them."""
        scored = [r for r in rows if r.valid]
        titles = (("dino", "DINO"), ("clip_i", "CLIP-I"), ("clip_t", "CLIP-T"))
        return {title: part_mean(scored, name) for name, title in titles}
