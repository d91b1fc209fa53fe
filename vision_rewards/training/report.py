"""``report.json`` and ``report.md``: what was trained on what, and how good it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmalign.runtime.files import atomic_write_json, atomic_write_text
from vision_rewards.training.figure import reliability_svg


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write both files, and ``calibration.svg`` of the most held-out part that has a curve.

    Args:
        report: with ``name``, ``settings``, ``data``, ``training`` and ``measures`` (by part).
    """
    atomic_write_json(folder / "report.json", without_nan(report))
    picture = ""
    for part in ("test", "validation", "train"):
        calibration = report["measures"].get(part, {}).get("calibration")
        if calibration:
            title = f"{report['name']}, {part}"
            atomic_write_text(folder / "calibration.svg", reliability_svg(calibration, title))
            picture = f"![calibration on {part}](calibration.svg)\n"
            break
    atomic_write_text(folder / "report.md", _markdown(report, picture))


def without_nan(value: Any) -> Any:
    """Plain data with NaN and infinities as ``None``, which every JSON reader takes."""
    if isinstance(value, Mapping):
        return {str(k): without_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _markdown(report: Mapping[str, Any], picture: str) -> str:
    training, settings = report["training"], report["settings"]
    backbone = settings["backbone"]
    how = f"LoRA rank {backbone['lora_rank']}" if backbone["lora_rank"] else "frozen"
    lines = [
        f"# Reward {report['name']}",
        "",
        f"- backbone: `{backbone['checkpoint']}` ({how}), weights {report['backbone_digest']}",
        f"- head: {report['head']['kind']}, features {report['head']['features']}; "
        f"loss: {report['loss']}",
        f"- data: {report['data']['kind']}, seed {settings['seed']}",
        f"- {training['steps']} steps in {training['epochs']} epochs, best after epoch "
        f"{training['best_epoch']}; {training['parameters']:,} trained parameters; "
        f"{training['seconds']:.1f} s, of which features {training['feature_seconds']:.1f} s",
        "",
        "| part | samples | prompt groups | measure | value | by samples | by prompts |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for part in ("train", "validation", "test"):
        lines += _rows(part, report["measures"].get(part, {}), report["data"]["groups"][part])
    lines += ["", "Intervals are 95 %: over samples (Wilson; for correlations Bonett-Wright), and"]
    lines += ["from resampling groups of prompts that share no picture.", "", picture]
    return "\n".join(lines)


def _rows(part: str, measures: Mapping[str, Any], groups: int) -> list[str]:
    count = measures.get("samples", 0)
    rows = []
    for name, found in measures.items():
        if isinstance(found, Mapping) and "value" in found:
            samples = found.get("wilson") or found.get("interval")
            cells = [
                part, str(count), str(groups), name.replace("_", " "), _number(found["value"]),
                _interval(samples), _interval(found.get("bootstrap")),
            ]  # fmt: skip
            rows.append(f"| {' | '.join(cells)} |")
    ece = measures.get("calibration", {}).get("ece")
    if ece is not None:
        rows.append(f"| {part} | {count} | {groups} | calibration error | {_number(ece)} | | |")
    return rows


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.3f}"


def _interval(pair: Any) -> str:
    if not pair or any(p is None or not math.isfinite(p) for p in pair):
        return "-"
    return f"{pair[0]:.3f} - {pair[1]:.3f}"
