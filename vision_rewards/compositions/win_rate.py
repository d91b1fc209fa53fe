"""A comparison of two pictures becomes a score for each sample of a group: its win rate.

Pref-GRPO (2508.20751): advantages of win rates instead of absolute scores, whose tiny differences
within a group are amplified by normalisation and invite reward hacking.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from mmalign.registry import unknown
from mmalign.reward_info import Range, Scope, groups_of
from mmalign.types import Media, Score
from vision_rewards.compositions.base import Components, Composition
from vision_rewards.compositions.matches import (
    Match,
    circulant,
    generator,
    round_robin,
    swiss_round,
    swiss_rounds,
)

Pairing = Literal["round_robin", "random", "swiss", "reference"]
PAIRINGS = ("round_robin", "random", "swiss", "reference")


class WinRate(Composition):
    """Share of its matches that a sample wins against other samples of its prompt.

    The part is a pairwise reward (the preference for a sample over ``context["opponent"]``, in
    [0, 1]; each match is asked once and counts for both sides), or a pointwise one, whose higher
    value wins. ``matches`` is the number of judged matches of each sample. A sample without a
    judged match is unscored.

    Args:
        pairing: ``round_robin`` (``n(n-1)/2`` matches), ``random`` (each meets ``opponents``
            others, O(n)), ``swiss`` (``rounds`` rounds among equals, O(n log n)), or
            ``reference`` (each meets up to ``opponents`` pictures of ``pool``, O(n)).
        opponents: see above.
        rounds: of ``swiss``; ``ceil(log2 n)`` by default.
        pool: JSON lines ``{"prompt": ..., "image": path}`` of reference pictures; paths are
            relative to the file.
        seed: of the draw; a prompt's draw depends on the seed and the prompt.

    Raises:
        ValueError: several parts, ``pairing="reference"`` without a pool, a part of group scope.
    """

    kind = "win_rate"

    def __init__(
        self,
        components: Components,
        *,
        pairing: Pairing = "round_robin",
        opponents: int = 2,
        rounds: int | None = None,
        pool: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        if pairing not in PAIRINGS:
            raise unknown("pairing", pairing, PAIRINGS)
        if len(components) != 1:
            raise ValueError(f"win_rate compares by one reward, got {len(components)}")
        if (pairing == "reference") != (pool is not None):
            raise ValueError("a pool belongs to pairing='reference', which needs one")
        if opponents < 1 or (rounds is not None and rounds < 1):
            raise ValueError(f"opponents and rounds must be 1 or more, got {opponents}, {rounds}")
        self.pairing, self.opponents, self.rounds, self.seed = pairing, opponents, rounds, seed
        self.pool = {} if pool is None else read_pool(pool)
        self.reward = next(iter(components.values()))[0]
        super().__init__(components)

    def options(self) -> Mapping[str, Any]:
        """Pairing, seed and pool."""
        return {
            "pairing": self.pairing, "opponents": self.opponents, "rounds": self.rounds,
            "seed": self.seed, "pool": sorted((p, map(str, f)) for p, f in self.pool.items()),
        }  # fmt: skip

    def scope(self, scopes: Mapping[str, Scope]) -> Scope:
        """``group``."""
        if "group" in scopes.values():
            raise ValueError("win_rate needs a pairwise or pointwise reward, got one of a group")
        return "group"

    def range(self) -> Range:
        """0 to 1."""
        return 0.0, 1.0

    def needs(self, needs: tuple[str, ...]) -> tuple[str, ...]:
        """The opponents are the composition's own matter."""
        return tuple(n for n in needs if n != "opponent")

    def keeps_gradients(self) -> bool:
        """Win rates have none."""
        return False

    @torch.no_grad()
    def score(
        self,
        media: Media,
        prompts: Sequence[str],
        context: Sequence[Mapping[str, Any]] | None = None,
    ) -> Score:
        """Let the samples of each group meet and count."""
        batch = _Batch(self.reward, media, list(prompts), list(context or [{}] * len(media)))
        groups = groups_of(batch.prompts, batch.context)
        if self.pairing == "reference":
            batch.meet_pictures(self._from_pool(batch.prompts))
        elif self.pairing == "swiss":
            self._swiss(batch, groups)
        else:
            batch.meet([(g[a], g[b]) for g in groups for a, b in self._draw(g, batch.prompts)])
        return batch.result(self.identity)

    def _draw(self, group: list[int], prompts: list[str]) -> list[Match]:
        if self.pairing == "round_robin":
            return round_robin(len(group))
        return circulant(len(group), self.opponents, generator(self.seed, prompts[group[0]]))

    def _swiss(self, batch: _Batch, groups: list[list[int]]) -> None:
        """All groups play a round at once, so that the judge gets large batches."""
        draws = [generator(self.seed, batch.prompts[g[0]]) for g in groups]
        met: list[set[frozenset[int]]] = [set() for _ in groups]
        rounds = [self.rounds or swiss_rounds(len(g)) for g in groups]
        for number in range(max(rounds, default=0)):
            matches = []
            for g, draw, known, count in zip(groups, draws, met, rounds, strict=True):
                if number < count:
                    points = [float(batch.points[row]) for row in g]
                    matches += [(g[a], g[b]) for a, b in swiss_round(points, known, draw)]
            batch.meet(matches)

    def _from_pool(self, prompts: Sequence[str]) -> list[tuple[int, Path]]:
        found = []
        for row, prompt in enumerate(prompts):
            pictures = self.pool.get(prompt, [])
            if len(pictures) > self.opponents:
                pictures = generator(self.seed, prompt).sample(pictures, self.opponents)
            found += [(row, picture) for picture in pictures]
        return found


class _Batch:
    """Points and judged matches of the samples of one call."""

    def __init__(
        self, reward: Any, media: Media, prompts: list[str], context: list[Mapping[str, Any]]
    ) -> None:
        self.reward, self.media, self.prompts, self.context = reward, media, prompts, context
        self.points = torch.zeros(len(media))
        self.matches = torch.zeros(len(media))
        self.notes = [""] * len(media)
        self._own: Score | None = None

    def meet(self, matches: list[Match]) -> None:
        """Judge matches between samples; both sides are credited."""
        if not matches:
            return
        first, second = [a for a, _ in matches], [b for _, b in matches]
        if self.reward.info.scope == "pairwise":
            opponents = Media(self.media.data[second]).to_pil()
            won = self._asked(first, opponents)
        else:
            won = self._compared(first, second)
        for a, b, preference in zip(first, second, won, strict=True):
            if preference is not None:
                self._credit(a, preference)
                self._credit(b, 1.0 - preference)

    def meet_pictures(self, matches: list[tuple[int, Path]]) -> None:
        """Judge matches of samples against given pictures."""
        rows = [row for row, _ in matches]
        if self.reward.info.scope == "pairwise":
            won = self._asked(rows, [picture for _, picture in matches])
        else:
            won = self._against(rows, [picture for _, picture in matches])
        for row, preference in zip(rows, won, strict=True):
            if preference is not None:
                self._credit(row, preference)

    def _credit(self, row: int, preference: float) -> None:
        self.points[row] += preference
        self.matches[row] += 1

    def _asked(self, rows: list[int], opponents: Sequence[Any]) -> list[float | None]:
        if not rows:
            return []
        facts = [{**self.context[r], "opponent": o} for r, o in zip(rows, opponents, strict=True)]
        score = self.reward.score(self.media[rows], [self.prompts[r] for r in rows], facts)
        for row, note, ok in zip(rows, score.notes or [""] * len(rows), score.valid, strict=True):
            if not ok and note:
                self.notes[row] = note
        return _values(score)

    def _compared(self, first: list[int], second: list[int]) -> list[float | None]:
        if self._own is None:
            self._own = self.reward.score(self.media, self.prompts, self.context)
        own = _values(self._own)
        return [_wins(own[a], own[b]) for a, b in zip(first, second, strict=True)]

    def _against(self, rows: list[int], pictures: Sequence[Path]) -> list[float | None]:
        from mmalign.pictures import PictureError, read_picture

        if self._own is None:
            self._own = self.reward.score(self.media, self.prompts, self.context)
        own = _values(self._own)
        found: list[float | None] = []
        for row, path in zip(rows, pictures, strict=True):
            try:
                other = Media.from_pil([read_picture(path)])
            except PictureError as error:  # one damaged opponent is one match less
                self.notes[row] = str(error)
                found.append(None)
                continue
            other = Media(other.data.to(self.media.data.device))
            score = self.reward.score(other, [self.prompts[row]], [self.context[row]])
            found.append(_wins(own[row], _values(score)[0]))
        return found

    def result(self, identity: str) -> Score:
        """Points by matches."""
        device = self.media.data.device
        valid = self.matches > 0
        value = torch.where(valid, self.points / self.matches.clamp_min(1), torch.nan)
        notes = tuple(
            "" if ok else said or "no judged match: it is alone in its group"
            for ok, said in zip(valid.tolist(), self.notes, strict=True)
        )
        parts = {"matches": self.matches}
        score = Score(value, valid, parts, notes if any(notes) else (), identity)
        return score.to(device)


def _values(score: Score) -> list[float | None]:
    rows = zip(score.value.tolist(), score.valid.tolist(), strict=True)
    return [value if ok else None for value, ok in rows]


def _wins(a: float | None, b: float | None) -> float | None:
    if a is None or b is None:
        return None
    return 0.5 if a == b else float(a > b)


def read_pool(path: str | Path) -> dict[str, list[Path]]:
    """Reference pictures by prompt, from JSON lines ``{"prompt": ..., "image": path}``.

    Raises:
        ValueError: a line without these, or none. FileNotFoundError: the file or a picture.
    """
    path = Path(path)
    pool: dict[str, list[Path]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt, picture = str(row["prompt"]), path.parent / str(row["image"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path}:{number}: expected {{"prompt": ..., "image": path}}, got {line[:80]!r}'
            ) from error
        if not picture.is_file():
            raise FileNotFoundError(f"{path}:{number}: no picture {picture}")
        pool.setdefault(prompt, []).append(picture)
    if not pool:
        raise ValueError(f"{path} holds no reference picture")
    return pool
