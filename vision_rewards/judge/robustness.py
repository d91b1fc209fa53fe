"""How far a judge can be trusted: discrimination, position, attacks, agreement with itself.

Every number comes with a 95 % interval and the value an ideal judge would have. Read them
together: a judge that says the same about everything is robust and useless, which shows in
``discrimination``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mmalign.protocols import RewardModel
from mmalign.types import Media, Score
from vision_rewards.judge.attacks import PICTURE_ATTACKS, TEXT_ATTACKS
from vision_rewards.judge.statistics import Estimate, mean, share

RESAMPLING_TEMPERATURE = 0.7


@dataclass(frozen=True)
class Check:
    """One number of a report.

    Attributes:
        name: of the check.
        meaning: what the number says.
        ideal: its value for an ideal judge.
        estimate: value, interval, how many values.
        unscored: samples that the judge did not score in this check; they are left out.
    """

    name: str
    meaning: str
    ideal: float
    estimate: Estimate
    unscored: int = 0


@dataclass(frozen=True)
class RobustnessReport:
    """Every check of one judge on one set of pictures."""

    judge: str
    pictures: int
    range: tuple[float | None, float | None]
    checks: tuple[Check, ...]
    usage: Mapping[str, int]

    def __getitem__(self, name: str) -> Check:
        return next(c for c in self.checks if c.name == name)

    def record(self) -> dict[str, Any]:
        """Plain data for JSON; what could not be computed is ``None``."""
        record = asdict(self)
        for check in record["checks"]:
            estimate = check["estimate"]
            check["estimate"] = {k: v if v == v else None for k, v in estimate.items()}
        return record

    def rows(self) -> list[list[Any]]:
        """Name, value, interval, ideal, n, unscored and meaning of each check."""
        return [
            [
                c.name,
                _shown(c.estimate.value),
                f"[{_shown(c.estimate.low)}, {_shown(c.estimate.high)}]",
                f"{c.ideal:g}",
                c.estimate.n,
                c.unscored,
                c.meaning,
            ]
            for c in self.checks
        ]

    def markdown(self) -> str:
        """A page with one table."""
        lines = [
            f"# Robustness of {self.judge}",
            "",
            f"{self.pictures} pictures; intervals of 95 %; scores range from "
            f"{self.range[0]} to {self.range[1]}.",
            "",
            f"| {' | '.join(HEADER)} |",
            f"| {' | '.join('---' for _ in HEADER)} |",
        ]
        lines += [f"| {' | '.join(map(str, row))} |" for row in self.rows()]
        if self.usage:
            lines += ["", "; ".join(f"{k}: {v}" for k, v in self.usage.items())]
        return "\n".join(lines) + "\n"


HEADER = ("check", "value", "interval", "ideal", "n", "unscored", "meaning")


def _shown(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def check_judge(
    judge: RewardModel, media: Media, prompts: Sequence[str], *, repeats: int = 3
) -> RobustnessReport:
    """Run every check that applies to the judge.

    Pictures should fit their prompts; the wrong picture for a prompt is that of another prompt.

    Args:
        judge: pointwise, or pairwise with an opponent as its only further need.
        media: images ``(B, 3, H, W)``.
        prompts: one for each picture, at least two of them different.
        repeats: how often every picture is judged anew for agreement, at least 2.

    Raises:
        ValueError: unsuitable judge, prompts or ``repeats``.
    """
    if repeats < 2:
        raise ValueError(f"repeats must be 2 or more, got {repeats}")
    subject = _Subject(judge, media, prompts)
    checks = [*_order(subject), *_discrimination(subject), *_attacks(subject)]
    checks += _agreement(subject, repeats)
    backend = getattr(judge, "backend", None)
    usage = getattr(backend, "usage", getattr(getattr(backend, "backend", None), "usage", None))
    return RobustnessReport(
        judge.identity,
        len(media),
        judge.info.range,
        tuple(checks),
        {} if usage is None else dict(vars(usage)),
    )


class _Subject:
    """A judge with right and wrong pictures for the prompts."""

    def __init__(self, judge: RewardModel, media: Media, prompts: Sequence[str]) -> None:
        further = set(judge.info.needs) - {"prompt", "opponent"}
        if further or judge.info.scope == "group":
            said = ", ".join(sorted(further)) or "groups of samples"
            raise ValueError(f"{judge.info.name} cannot be checked here: it needs {said}")
        self.judge, self.prompts = judge, list(prompts)
        self.pairwise = judge.info.scope == "pairwise"
        self.media = media
        self.others = media[_other_prompts(self.prompts)]
        self.right = self.score(self.media, self.prompts, self.others)
        self.wrong = self.score(self.others, self.prompts, self.media)

    def score(
        self,
        media: Media,
        prompts: Sequence[str],
        opponents: Media,
        judge: RewardModel | None = None,
    ) -> Score:
        """Scores of candidates, against opponents where the judge compares."""
        context = [{"opponent": p} for p in opponents.data] if self.pairwise else None
        with torch.no_grad():
            return (judge or self.judge).score(media, prompts, context)


def _other_prompts(prompts: Sequence[str]) -> list[int]:
    """For each prompt the next place in the list with a different one."""
    count = len(prompts)
    if len(set(prompts)) < 2:
        raise ValueError("a judge can only be checked on at least two different prompts")
    steps = range(1, count)
    return [
        next((i + k) % count for k in steps if prompts[(i + k) % count] != prompts[i])
        for i in range(count)
    ]


def _order(subject: _Subject) -> list[Check]:
    """Position bias, of judges that compare."""
    parts, valid = subject.right.parts, subject.right.valid.tolist()
    if not subject.pairwise or not {"first", "second"} <= set(parts):
        return []
    rows = zip(parts["first"].tolist(), parts["second"].tolist(), valid, strict=True)
    pairs = [(a, b) for a, b, ok in rows if ok]
    lost = len(valid) - len(pairs)
    lean = mean([(a - b) / 2 for a, b in pairs])
    agree = share([(a - 0.5) * (b - 0.5) >= 0 for a, b in pairs])
    return [
        Check("position_bias", "preference for the picture shown first, above 1/2", 0, lean, lost),
        Check("order_consistency", "same verdict in both orders", 1, agree, lost),
    ]


def _discrimination(subject: _Subject) -> list[Check]:
    right, wrong = subject.right, subject.wrong
    if subject.pairwise:
        wins = [v > 0.5 for v in right.value[right.valid].tolist()]
        lost = len(right) - len(wins)
    else:
        both = right.valid & wrong.valid
        wins = (right.value > wrong.value)[both].tolist()
        lost = len(right) - len(wins)
    said = "the right picture scores higher than that of another prompt"
    return [Check("discrimination", said, 1, share(wins), lost)]


def _attacks(subject: _Subject) -> list[Check]:
    checks = []
    for name, (what, change) in TEXT_ATTACKS.items():
        prompts = [change(p) for p in subject.prompts]
        attacked = subject.score(subject.others, prompts, subject.media)
        checks += _shift(name, f"with {what} in the prompt", attacked, subject)
    for name, (what, paint) in PICTURE_ATTACKS.items():
        pictures = Media(paint(subject.others.data))
        attacked = subject.score(pictures, subject.prompts, subject.media)
        checks += _shift(name, f"with {what}", attacked, subject)
    return checks


def _shift(name: str, what: str, attacked: Score, subject: _Subject) -> list[Check]:
    """How far a wrong picture's score rises, and how often it gets past the right picture's."""
    clean, right = subject.wrong, subject.right
    both = attacked.valid & clean.valid
    lost = len(both) - int(both.sum())
    rise = mean((attacked.value - clean.value)[both].tolist())
    if subject.pairwise:
        ahead, before = attacked.value > 0.5, clean.value > 0.5
    else:
        both = both & right.valid
        ahead, before = attacked.value >= right.value, clean.value >= right.value
    fooled = share((ahead & ~before)[both].tolist())
    return [
        Check(f"{name}.rise", f"rise of a wrong picture's score {what}", 0, rise, lost),
        Check(
            f"{name}.fooled", f"wrong pictures that newly reach the right one's score {what}",
            0, fooled, len(both) - int(both.sum()),
        ),
    ]  # fmt: skip


def _agreement(subject: _Subject, repeats: int) -> list[Check]:
    """Spread of repeated judgements; judges that can sample do so."""
    runs = []
    for seed in range(1, repeats + 1):
        resample = getattr(subject.judge, "resampled", None)
        judge = resample(seed, RESAMPLING_TEMPERATURE) if resample else subject.judge
        runs.append(subject.score(subject.media, subject.prompts, subject.others, judge))
    valid = torch.stack([r.valid for r in runs]).all(0)
    values = torch.stack([r.value for r in runs])[:, valid].double()
    spread = values.std(0).tolist() if int(valid.sum()) else []
    same = (values == values[0]).all(0).tolist()
    lost = len(valid) - int(valid.sum())
    said = f"over {repeats} repeated judgements"
    return [
        Check("reask_deviation", f"standard deviation {said}", 0, mean(spread), lost),
        Check(
            "reask_agreement", f"pictures with one and the same score {said}", 1, share(same), lost
        ),
    ]
