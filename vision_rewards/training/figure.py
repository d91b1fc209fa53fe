"""The calibration curve as an SVG picture, without a plotting library."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

SIDE, LEFT, TOP, BARS = 320, 56, 34, 70


def reliability_svg(calibration: Mapping[str, Any], title: str) -> str:
    """Observed against predicted probability, and below it how many judgements each bin holds.

    Args:
        calibration: of :func:`vision_rewards.training.metrics.reliability`.
    """
    bins = calibration["bins"]
    low = bins[0]["low"]

    def x(p: float) -> float:
        return LEFT + SIDE * (p - low) / (1 - low)

    def y(p: float) -> float:
        return TOP + SIDE * (1 - p)

    parts = [_text(LEFT, 20, f"{title}  ECE {calibration['ece']:.3f}", "start", 14)]
    parts += _grid(x, y, low)
    parts.append(_line(x(low), y(low), x(1), y(1), "#888", 'stroke-dasharray="5 4"'))
    points = [(x(b["predicted"]), y(b["observed"])) for b in bins if b["n"]]
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
    parts.append(f'<polyline points="{path}" fill="none" stroke="#1f6feb" stroke-width="2"/>')
    parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="#1f6feb"/>' for a, b in points]
    most = max(b["n"] for b in bins) or 1
    floor = TOP + SIDE + 36 + BARS
    for b in bins:
        height = BARS * b["n"] / most
        left, width = x(b["low"]) + 1, x(b["high"]) - x(b["low"]) - 2
        parts.append(
            f'<rect x="{left:.1f}" y="{floor - height:.1f}" width="{width:.1f}" '
            f'height="{height:.1f}" fill="#9ec5fe"><title>{b["n"]}</title></rect>'
        )
    parts.append(_text(LEFT + SIDE / 2, floor + 18, f"judgements per bin (most: {most})"))
    width, height = LEFT + SIDE + 20, floor + 28
    style = 'font-family="sans-serif" font-size="11"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" {style}>'
        f'<rect width="{width}" height="{height}" fill="white"/>{"".join(parts)}</svg>\n'
    )


def _grid(x: Any, y: Any, low: float) -> list[str]:
    parts = []
    for k in range(6):
        p, q = low + (1 - low) * k / 5, k / 5
        parts.append(_line(x(p), TOP, x(p), TOP + SIDE, "#eee"))
        parts.append(_line(LEFT, y(q), LEFT + SIDE, y(q), "#eee"))
        parts.append(_text(x(p), TOP + SIDE + 15, f"{p:.1f}"))
        parts.append(_text(LEFT - 6, y(q) + 4, f"{q:.1f}", "end"))
    parts.append(_text(LEFT + SIDE / 2, TOP + SIDE + 30, "predicted probability"))
    middle = TOP + SIDE / 2
    turned = f'transform="rotate(-90 16 {middle})"'
    parts.append(_text(16, middle, "observed share", extra=turned))
    return parts


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, extra: str = "") -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" {extra}/>'


def _text(
    x: float, y: float, text: str, anchor: str = "middle", size: int = 11, extra: str = ""
) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"'
    return f"<text {place} {extra}>{escape(text)}</text>"
