"""``mmalign score``."""

from __future__ import annotations

import math
import statistics
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.commands.common import CommandError, given, image_files, short_names, table

if TYPE_CHECKING:
    from mmalign.captions import Caption
    from mmalign.types import Score

WHOLE_TABLE = 50  # pictures; of more only the ends are printed
ENDS = 5
Record = dict[str, Any]


def run(args: Namespace) -> int:
    """Score pictures, print a table or a summary, write a table file with ``--out``."""
    paths = [*args.pictures, *args.images]
    if not paths:
        raise CommandError("give pictures or folders to score")
    files = image_files(paths)
    out = _output(args)
    texts = _captions(args, files)
    from mmalign import api

    prompts = None if texts is None else [prompt for prompt, _ in texts]
    options: dict[str, Any] = given(
        batch_size=args.batch_size, max_pixels=args.max_pixels, device=args.device
    )
    if texts is not None and any(facts for _, facts in texts):
        options["context"] = [facts for _, facts in texts]
    if out is not None:
        options.update(journal=journal_of(out), overwrite=args.overwrite)
    try:
        score = api.score(files, prompts, args.reward, progress=not args.quiet, **options)
    except KeyboardInterrupt:
        if out is not None:
            from mmalign.runtime.log import say

            say(f"finished scores are in {journal_of(out)}; the same command continues")
        raise
    records = _records(files, prompts, score)
    names = zip(map(str, files), short_names(files, paths), strict=True)
    print(_summary(records, score.identity, dict(names)))
    if out is not None:
        _write(out, records, score)
    return 0


def journal_of(out: Path) -> Path:
    """Where the finished scores of an unfinished ``--out`` are kept."""
    return out.with_name(f"{out.name}.journal")


def _output(args: Namespace) -> Path | None:
    """The file to write, refused before anything is computed where it could not be."""
    if args.out is None:
        return None
    from mmalign.runtime.tables import check_table_path

    out = Path(args.out)
    check_table_path(out)
    if out.exists() and not args.overwrite:
        raise CommandError(f"{out} exists; give --overwrite to replace it, or another --out")
    return out


def _captions(args: Namespace, files: Sequence[Path]) -> list[Caption] | None:
    if args.prompts is None:
        return None if args.prompt is None else [(args.prompt, {})] * len(files)
    from mmalign.captions import captions

    return captions(files, args.prompts)


def _write(out: Path, records: Sequence[Record], score: Score) -> None:
    """The table file; only then is the journal of the run no longer needed."""
    from mmalign.runtime.log import say
    from mmalign.runtime.tables import write_table

    columns: dict[str, type] = {"image": str, "prompt": str, "value": float, "valid": bool}
    # A part must not hide a column of the same name.
    named = {part: f"part_{part}" if part in {*columns, "note", "reward"} else part
             for part in score.parts}  # fmt: skip
    columns.update(note=str, **dict.fromkeys(named.values(), float), reward=str)
    flat = [{**r, **{named[p]: v for p, v in r["parts"].items()}} for r in records]
    rows = flat if out.suffix.lower() in (".csv", ".parquet") else records
    write_table(out, rows, columns, {"reward": score.identity})
    journal_of(out).unlink(missing_ok=True)
    say(f"{len(records)} scores written to {out}")


def _records(files: Sequence[Path], prompts: list[str] | None, score: Score) -> list[Record]:
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
            # A sub-score can be missing where the whole is not; NaN and infinity are not JSON.
            "parts": {n: p[i] if math.isfinite(p[i]) else None for n, p in parts.items()},
            "note": score.notes[i] if score.notes else "",
            "reward": score.identity,
        }
        records.append(record)
    return records


def _summary(records: Sequence[Record], identity: str, names: Mapping[str, str]) -> str:
    values = [r["value"] for r in records if r["valid"]]
    mean = f"mean {statistics.fmean(values):.4f} over {len(values)}" if values else "no score"
    last = f"{mean} of {len(records)} pictures; {len(records) - len(values)} unscored; {identity}"
    if len(records) <= WHOLE_TABLE:
        return f"{_table(records, names)}\n{last}"
    ranked = sorted((r for r in records if r["valid"]), key=lambda r: -r["value"])
    unscored = [r for r in records if not r["valid"]]
    blocks = [("highest", ranked[:ENDS]), ("lowest", ranked[ENDS:][-ENDS:])]
    blocks.append(("unscored", unscored[:ENDS]))
    shown = [f"{title}\n{_table(rows, names)}" for title, rows in blocks if rows]
    return "\n\n".join([*shown, *([_spread(records)] if values else []), last])


def _spread(records: Sequence[Record]) -> str:
    """Mean, deviation, extremes and quartiles of the value and of each part."""
    columns = {"score": [r["value"] for r in records if r["valid"]]}
    for name in records[0]["parts"]:
        columns[name] = [r["parts"][name] for r in records if r["parts"][name] is not None]
    rows = []
    for name, values in columns.items():
        if not values:
            continue
        quartiles = statistics.quantiles(values, n=4, method="inclusive") if values[1:] else values
        low, middle, high = quartiles * (1 if values[1:] else 3)
        spread = statistics.pstdev(values)
        rows.append([name, len(values), statistics.fmean(values), spread,
                     min(values), low, middle, high, max(values)])  # fmt: skip
    header = ["", "scored", "mean", "std", "min", "25 %", "median", "75 %", "max"]
    return table(rows, header)


def _table(records: Sequence[Record], names: Mapping[str, str]) -> str:
    parts = list(records[0]["parts"])
    rows = [
        [
            names[r["image"]],
            r["value"] if r["valid"] else "unscored",
            *(r["parts"][n] for n in parts),
            r["prompt"] or "",
            r["note"],
        ]
        for r in records
    ]
    return table(rows, ["image", "score", *parts, "prompt", "note"])
