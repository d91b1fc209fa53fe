"""``mmalign score``."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmalign.commands.common import CommandError, image_files, prompts_of, table


def run(args: Namespace) -> int:
    """Score pictures, print a table, write JSON lines with ``--out``."""
    files = image_files(args.images)
    prompts = _one_each(prompts_of(args), files)
    from mmalign import api

    score = api.score(files, prompts(args.reward))
    records = _records(files, prompts, score)
    print(_table(records))
    unscored = sum(not r["valid"] for r in records)
    values = [r["value"] for r in records if r["valid"]]
    mean = f"mean {sum(values) / len(values):.4f} over {len(values)}" if values else "no score"
    print(f"{mean} of {len(records)} pictures; {unscored} unscored; {score.identity}")
    if args.out:
        from mmalign.runtime.files import atomic_write_text

        atomic_write_text(args.out, "".join(json.dumps(r) + "\n" for r in records))
    return 0


def _one_each(prompts: list[str] | None, files: Sequence[Path]) -> list[str] | None:
    if prompts is None or len(prompts) == len(files):
        return prompts
    if len(prompts) == 1:
        return prompts * len(files)
    raise CommandError(f"{len(prompts)} prompts for {len(files)} pictures; give one, or one each")


def _records(files: Sequence[Path], prompts: list[str] | None, score: Any) -> list[dict[str, Any]]:
    parts = {name: part.tolist() for name, part in score.parts.items()}
    records = []
    for i, (file, value, valid) in enumerate(
        zip(files, score.value.tolist(), score.valid.tolist(), strict=True)
    ):
        record = {
            "image": str(file),
            "prompt": prompts[i] if prompts else None,
            "value": value if valid else None,
            "valid": valid,
            # A sub-score can be missing where the whole is not; NaN is not JSON.
            "parts": {n: p[i] if p[i] == p[i] else None for n, p in parts.items()},
            "note": score.notes[i] if score.notes else "",
            "reward": score.identity,
        }
        records.append(record)
    return records


def _table(records: Sequence[dict[str, Any]]) -> str:
    names = list(records[0]["parts"])
    rows = [
        [
            Path(r["image"]).name,
            r["value"] if r["valid"] else "unscored",
            *(r["parts"][n] for n in names),
            r["prompt"] or "",
            r["note"],
        ]
        for r in records
    ]
    return table(rows, ["image", "score", *names, "prompt", "note"])
