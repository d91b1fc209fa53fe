"""What bears on how far a result can be trusted: training data, the training's reward, gaps."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from eval.result import EvalResult, Row
from mmalign.protocols import Benchmark, Request
from mmalign.runtime.training_record import TrainingRecord, prompt_hash

SHOWN = 3  # names that a message gives as examples


class GapError(ValueError):
    """A result with gaps where none were allowed; what there is has been kept."""


def repeated(requests: Sequence[Request]) -> list[str]:
    """Pictures that are asked for twice: the same prompt with the same noise."""
    first: dict[tuple[str, int], str] = {}
    said = []
    for r in requests:
        before = first.setdefault((r.prompt, r.seed), r.key)
        if before != r.key:
            said.append(
                f"{before!r} and {r.key!r} ask for one picture: {r.prompt!r}, the same seed"
            )
    return said


def training_facts(
    record: TrainingRecord | None, benchmark: Benchmark, rows: Sequence[Row]
) -> dict[str, Any]:
    """How a model's training overlaps with a benchmark: prompts it has seen, and its reward.

    Returns:
        Empty without a record. Else ``prompts`` (of the benchmark), ``seen`` (of these),
        ``training_prompts``, ``accuracy_seen`` and ``accuracy_unseen`` (means over their tasks),
        the training's ``rewards`` and ``judged_by`` (those of them that judge here).
    """
    if record is None:
        return {}
    prompts = {r.prompt for r in rows}
    seen = {p for p in prompts if prompt_hash(p) in record.prompts}
    return {
        "prompts": len(prompts),
        "seen": len(seen),
        "training_prompts": len(record.prompts),
        "accuracy_seen": _mean([r for r in rows if r.prompt in seen]),
        "accuracy_unseen": _mean([r for r in rows if r.prompt not in seen]),
        "rewards": list(record.rewards),
        "judged_by": [name for name in record.rewards if _judges(name, benchmark)],
    }


def cautions(result: EvalResult) -> list[str]:
    """What a reader of the result must know, in sentences."""
    said = cautions_of_training(result)
    if result.limited:
        said.append(f"Only {len(result.rows)} of the benchmark's {result.available} pictures.")
    unscored = [r for r in result.rows if not r.valid]
    if unscored:
        said.append(f"{len(unscored)} pictures are unscored, such as {unscored[0].key}: "
                    f"{unscored[0].note or 'no reason given'}.")  # fmt: skip
    return [*said, *(f"{_sentence(p)}." for p in result.problems)]


def refuse_gaps(result: EvalResult) -> None:
    """Raise for anything unscored, missing, repeated or strange.

    Raises:
        GapError: with counts and the first of each.
    """
    unscored = [r for r in result.rows if not r.valid]
    said = list(result.problems)
    if unscored:
        shown = "; ".join(f"{r.key}: {r.note or 'unscored'}" for r in unscored[:SHOWN])
        said.insert(0, f"{len(unscored)} of {len(result.rows)} pictures are unscored ({shown})")
    if said:
        where = f"; what there is lies in {result.folder}" if result.folder else ""
        raise GapError(f"{result.benchmark}: {'; '.join(said)}{where}")


def cautions_of_training(result: EvalResult) -> list[str]:
    """Of these, what the model was trained on."""
    facts, unit = result.training, result.unit
    said = []
    if facts.get("judged_by"):
        names = ", ".join(facts["judged_by"])
        said.append(f"The training's own reward judges here ({names}): a gain may be a reward "
                    "hacked, look for one that a held-out judge sees too.")  # fmt: skip
    if facts.get("seen"):
        known, new = facts["accuracy_seen"], facts["accuracy_unseen"]
        scale = 100.0 if unit == "share" else 1.0
        both = " and ".join(
            f"{scale * v:.1f}{' %' if unit == 'share' else ''} on {which}"
            for v, which in ((known, "seen"), (new, "unseen prompts"))
            if v is not None
        )
        said.append(f"Contamination: {facts['seen']} of {facts['prompts']} prompts were trained on "
                    f"({both}).")  # fmt: skip
    return said


def _sentence(text: str) -> str:
    """With a capital, where the first word is one: the name of a file stays what it is."""
    return text[0].upper() + text[1:] if re.match(r"[a-z]+ ", text) else text


def _judges(name: str, benchmark: Benchmark) -> bool:
    scorers = getattr(benchmark, "scorers", None)
    if scorers is not None:
        return name in scorers
    identity = getattr(benchmark, "identity", None) or ""
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", str(identity)) is not None


def _mean(rows: Sequence[Row]) -> float | None:
    """Mean over tasks of the scored rows; ``None`` where there are none."""
    tasks: dict[str, list[float]] = {}
    for row in rows:
        if row.valid and row.value is not None:
            tasks.setdefault(row.task, []).append(row.value)
    return fmean(map(fmean, tasks.values())) if tasks else None
