"""The page of a steering run: steered and unsteered side by side, scores, cost, family trees."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.charts import Line, line_chart, number
from eval.family_tree import STYLE as TREE_STYLE
from eval.family_tree import draw, family_tree
from eval.gallery import data_uri, fair_sample, grid
from eval.html import Child, Markup, duration, el, facts, page, section, table
from eval.statistics import Difference, paired_difference
from mmalign.runtime.files import atomic_write_bytes
from mmalign.runtime.log import read_jsonl

PAIRS, DETAILS = 60, 24  # prompts shown side by side, and in detail
Record = Mapping[str, Any]
TREE_NOTE = (
    "In a tree time runs from left to right; dots are states that the reward judged, stronger "
    "where it liked them more; ESS is the effective number of particles. "
    "The heavy line leads to the chosen picture; dashed ends went no further."
)
STYLE = """
.pair .pic span{display:block;font-size:12px;color:var(--soft);margin-top:2px}
.pair .pic strong{color:var(--ink);font-weight:600}
.strip{display:flex;flex-wrap:wrap;gap:10px;margin:14px 0 0}
.strip figure{margin:0;width:76px}.strip figcaption{font-weight:400;font-size:12px;margin:2px 0 0}
.strip img{width:76px;aspect-ratio:1;border-radius:6px;border:3px solid transparent}
.strip .best img{border-color:var(--good)}
.strip img,.words img{image-rendering:pixelated;background:var(--track)}
.words td,.words thead th:not(:first-child){text-align:left;white-space:normal}
.words tbody tr:first-child>*{font-weight:400}.words img{width:64px;border-radius:6px}
"""


def steering_report(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of the run in ``folder`` and return it; ``report.html`` there by default.

    Raises:
        FileNotFoundError: ``folder`` holds no steering run.
    """
    folder = Path(folder)
    path = folder / "report.html" if out is None else Path(out)
    summary = json.loads((folder / "steer.json").read_text(encoding="utf-8"))
    records = sorted(read_jsonl(folder / "prompts.jsonl"), key=lambda r: r["index"])
    body: list[Child] = [
        el("style", Markup(STYLE + TREE_STYLE)),
        _header(summary, records),
        _rewards(summary, records),
        _pictures(folder, records),
        _details(folder, records),
        _settings(summary),
        el("footer", "Written by mmalign steer. One file, no script, nothing fetched."),
    ]
    title = f"{summary['method']} on {Path(summary['policy']).name}"
    atomic_write_bytes(path, page(title, *body).encode())
    return path


# --- numbers ----------------------------------------------------------------------------------


def differences(records: Sequence[Record]) -> dict[str, Difference | None]:
    """Steered minus unsteered by reward, the steering reward under its key ``""`` first.

    ``None`` where no prompt could be scored both ways.
    """
    names = sorted({name for r in records for name in r["held_out"]})
    return {name: _difference(records, name) for name in ("", *names)}


def _difference(records: Sequence[Record], name: str) -> Difference | None:
    pairs = {}
    for record in records:
        pair = pair_of(record, name)
        if None not in pair:
            pairs[str(record["index"])] = pair
    if not pairs:
        return None
    prompts = {str(r["index"]): r["prompt"] for r in records if str(r["index"]) in pairs}
    before, after = ({k: float(p[i]) for k, p in pairs.items()} for i in (1, 0))  # type: ignore[arg-type]
    return paired_difference(before, after, prompts, dict.fromkeys(pairs, "all"))


def pair_of(record: Record, name: str) -> tuple[float | None, float | None]:
    """The steered and the unsteered score of a prompt; ``name`` is empty for the steering
    reward."""
    if not name:
        return record["score"], record["unsteered_score"]
    return record["held_out"][name]["steered"], record["held_out"][name]["unsteered"]


def _header(summary: Record, records: Sequence[Record]) -> Markup:
    found = differences(records)
    held = {name: d for name, d in found.items() if name and d is not None}
    tone, said = _verdict(found[""], held)
    bare = _bare_cost(summary, records)
    each = max(len(records), 1)
    tiles = [
        (str(len(records)), "prompts"),
        (number(summary["nfe"] / each), "network evaluations a prompt" + bare),
        (number(summary["reward_calls"] / each), "pictures scored a prompt"),
        (duration(summary["seconds"] / each), "a prompt"),
    ]
    small = el("small", "The steering reward is a maximum over everything that was tried, so it is "
               "biased upwards; a held-out reward had no part in choosing.")  # fmt: skip
    return el(
        "header",
        el("p", "mmalign steer", class_="kicker"),
        el("h1", f"{summary['method']} on {Path(summary['policy']).name}"),
        el("p", said, small, class_=f"verdict {tone}"),
        el("dl", [el("div", el("dt", what), el("dd", value)) for value, what in tiles],
           class_="tiles"),
    )  # fmt: skip


def _verdict(own: Difference | None, held: Mapping[str, Difference]) -> tuple[str, str]:
    said = "Nothing could be scored." if own is None else (
        f"Steering reward {number(own.before)} unsteered, {number(own.after)} steered."
    )  # fmt: skip
    if not held:
        return "unclear", f"{said} No held-out reward was given: --held-out NAME."
    sure = [d for d in held.values() if d.excludes_zero]
    tone = "unclear"
    if sure and len({d.interval.mean > 0 for d in sure}) == 1:
        tone = "gain" if sure[0].interval.mean > 0 else "loss"
    words = "; ".join(f"{n} {number(d.before)} to {number(d.after)}" for n, d in held.items())
    return tone, f"{said} Held out: {words}."


def _bare_cost(summary: Record, records: Sequence[Record]) -> str:
    plain = summary.get("bare_nfe")
    if not plain or not records:
        return ""
    return f" ({summary['nfe'] / len(records) / plain:.3g} × one plain picture)"


def _rewards(summary: Record, records: Sequence[Record]) -> Markup:
    rows = []
    for name, found in differences(records).items():
        title = name or f"steering: {summary['reward'].split('@')[0]}"
        if found is None:
            rows.append([title, "–", "–", "not scored", "–"])
            continue
        pairs = [pair_of(r, name) for r in records]
        both = [(a, b) for a, b in pairs if a is not None and b is not None]
        better, worse = sum(a > b for a, b in both), sum(a < b for a, b in both)
        rows.append([
            title, number(found.before), number(found.after), _interval(found),
            f"{better} / {len(both) - better - worse} / {worse}",
        ])  # fmt: skip
    head = ["reward", "unsteered", "steered", "difference, 95 % interval",
            "better / equal / worse"]  # fmt: skip
    note = (
        "Means over prompts. Unsteered pictures are made of the first noise of each prompt by the "
        "plain sampler. The interval resamples prompts."
    )
    return section("Rewards", table(head, rows), note=note)


def _interval(found: Difference) -> Markup | str:
    i = found.interval
    if not i.defined:
        return number(i.mean)
    tone = ("up" if i.mean > 0 else "down") if found.excludes_zero else "flat"
    return el("span", f"{number(i.mean)} [{number(i.low)}, {number(i.high)}]", class_=tone)


# --- pictures ---------------------------------------------------------------------------------


def _pictures(folder: Path, records: Sequence[Record]) -> Markup:
    shown = fair_sample(records, PAIRS)
    note = "Left: unsteered, of the first noise that the method drew. Right: steered."
    if len(shown) < len(records):
        note += f" {len(shown)} of {len(records)} prompts, drawn without looking at scores."
    cards = [
        el("figure",
           el("div", _half(folder, r, "unsteered"), _half(folder, r, "steered"), class_="pair"),
           el("figcaption", r["prompt"], el("span", _held_words(r))), class_="shot")
        for r in shown
    ]  # fmt: skip
    return section("Steered and unsteered", grid(cards), note=note)


def _half(folder: Path, record: Record, kind: str) -> Markup:
    steered = kind == "steered"
    name = record["file"] if steered else record["unsteered_file"]
    score = record["score"] if steered else record["unsteered_score"]
    better = None not in (record["score"], record["unsteered_score"]) and (
        record["score"] > record["unsteered_score"]
    )
    said = el("span", f"{kind} ", el("strong", _score(score)))
    image = _image(folder / name, f"{record['prompt']} ({kind})")
    return el("div", image, said, class_="pic ok" if steered and better else "pic")


def _held_words(record: Record) -> str:
    return "; ".join(
        f"{name}: {_score(pair['unsteered'])} → {_score(pair['steered'])}"
        for name, pair in record["held_out"].items()
    )


def _image(path: Path, said: str) -> Markup:
    address = _address(path)
    if address is None:
        return el("div", "not kept", class_="missing")
    return el("img", src=address[0], alt=said, class_=None if address[1] else "large")


def _address(path: Path) -> tuple[str, bool] | None:
    try:
        return data_uri(path.read_bytes())
    except (OSError, ValueError):
        return None


def _details(folder: Path, records: Sequence[Record]) -> Markup:
    parts = []
    for place, record in enumerate(fair_sample(records, DETAILS)):
        cost = f"{number(record['nfe'])} network evaluations, {duration(record['seconds'])}"
        title = el("summary", record["prompt"], el("span", f"  {_score(record['score'])}, {cost}",
                   class_="flat"))  # fmt: skip
        parts.append(el("details", title, _story(folder, record), open=place == 0))
    drawn = any(family_tree(record) is not None for record in records)
    return section("How they came about", parts, note=TREE_NOTE if drawn else None)


def _story(folder: Path, record: Record) -> list[Markup]:
    found = [_address(folder / name) for name in record["shown"]]
    pictures = [address and address[0] for address in found]
    tree = family_tree(record)
    if tree is not None:
        return [el("div", draw(tree, pictures), class_="card")]
    if any("text" in c for c in record["candidates"]):
        return [_wordings(record, pictures)]
    curve = _curve(record)
    return [*([curve] if curve is not None else []), _strip(record, pictures)]


def _wordings(record: Record, pictures: Sequence[str | None]) -> Markup:
    """Rounds of a refinement: what was asked for, what came of it, what the critic said."""
    rows = []
    for i, (candidate, line) in enumerate(
        zip(record["candidates"], [*record["trace"]], strict=False)
    ):
        shown = pictures[i] if i < len(pictures) else None
        image = el("img", src=shown, alt=candidate["text"]) if shown else ""
        chosen = " (chosen)" if i == record["chosen"] else ""
        said = "; ".join(s for s in (line.get("critique", ""), line.get("note", "")) if s)
        rows.append([f"{i}{chosen}", image, candidate["text"], _score(candidate["score"]), said])
    head = ["round", "picture", "made of", "score", "said about it"]
    return table(head, rows, class_="numbers words")


def _curve(record: Record) -> Markup | None:
    """The best value over the iterations of an optimisation."""
    lines = [ln for ln in record["trace"] if "iteration" in ln and ln.get("value") is not None]
    if len(lines) < 2:
        return None
    x = [float(ln["iteration"]) for ln in lines]
    values = [float(ln["value"]) for ln in lines]
    best = [max(values[: i + 1]) for i in range(len(values))]
    return line_chart([Line("best", x, best), Line("value", x, values)], height=200,
                      label="reward over iterations")  # fmt: skip


def _strip(record: Record, pictures: Sequence[str | None]) -> Markup:
    """Candidates in the order they were made, the chosen one framed."""
    figures = [
        el("figure", el("img", src=address, alt=f"candidate {i}") if address else "",
           el("figcaption", _score(record["candidates"][i]["score"])),
           class_="best" if i == record["chosen"] else None)
        for i, address in enumerate(pictures)
    ]  # fmt: skip
    left = len(record["candidates"]) - len(figures)
    return el("div", el("div", *figures, class_="strip"),
              el("p", f"and {left} more", class_="note") if left else None)  # fmt: skip


def _settings(summary: Record) -> Markup:
    names = ("policy", "weights", "lora", "method", "options", "seed", "budget", "reward",
             "held_out", "nfe", "reward_calls", "decodes", "seconds", "environment")  # fmt: skip
    kept = {name: summary[name] for name in names if summary.get(name) not in (None, {}, [])}
    return section("Settings and cost", facts(kept))


def _score(value: float | None) -> str:
    return "unscored" if value is None else number(value)


__all__ = ["differences", "steering_report"]
