"""Inline SVG charts for reports: grouped bars with intervals, and lines with a band.

Colours come from the page's CSS, so charts follow light and dark.  Every mark carries a
``<title>``, which browsers show on hover and screen readers read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from eval.html import Markup, el, percent
from eval.statistics import Interval

ROW = 44  # height of one group of bars
LABEL_WIDTH, VALUE_WIDTH = 150, 150


@dataclass(frozen=True)
class Bars:
    """One row of a bar chart: a name and one interval for each series, over so many ``of``."""

    name: str
    values: Sequence[Interval | None]
    strong: bool = False
    of: str = "pictures"


@dataclass(frozen=True)
class Line:
    """One series; ``low`` and ``high`` draw a band around it. All have one length.

    A ``faint`` series is drawn thin and without its last value, as background to a smoothed one.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    faint: bool = False


def bar_chart(
    rows: Sequence[Bars], series: Sequence[str], width: int = 1000, shares: bool = True
) -> Markup:
    """Horizontal bars of shares in [0, 1] with their intervals, values written beside them.

    Without ``shares`` values are on a scale of their own; it starts at zero where they allow it.
    """
    left, right = LABEL_WIDTH, width - VALUE_WIDTH
    bottom = ROW * len(rows) + 8
    marks = [0.0, 0.25, 0.5, 0.75, 1.0] if shares else _score_ticks(rows)
    axis = _Axis(left, right, marks[0], marks[-1], shares)
    parts: list[Markup] = []
    for tick in marks:
        x = axis.x(tick)
        parts.append(el("line", x1=_n(x), x2=_n(x), y1=0, y2=bottom, class_="grid"))
        label = f"{100 * tick:.0f} %" if shares else number(tick)
        parts.append(el("text", label, x=_n(x), y=bottom + 18, text_anchor="middle"))
    for i, row in enumerate(rows):
        parts += _bar_row(row, series, i * ROW + 8, axis)
    names = " and ".join(series)
    return _svg(width, bottom + 26, parts, f"Bars with 95 % intervals: {names}")


def line_chart(
    lines: Sequence[Line],
    width: int = 1000,
    height: int = 280,
    zero: bool = False,
    label: str = "",
    cover: Sequence[float] = (),
) -> Markup:
    """Lines over steps with light grid and the last value written at the end.

    ``zero`` makes the y axis include zero, ``cover`` further values, which gives several charts
    one scale.  Non-finite values break the line.
    """
    xs = [x for ln in lines for x in ln.x]
    ys = _finite([v for ln in lines for v in (*ln.y, *(ln.low or ()), *(ln.high or ()))])
    ys += _finite(cover) if ys else []
    if not xs or not ys:
        return el("p", "No values yet.", class_="empty")
    y_ticks = ticks(min(ys), max(ys), zero=zero)
    step = y_ticks[1] - y_ticks[0]
    digits = max(len(spaced(v, step)) for v in y_ticks)
    margins = (16 + 7 * digits, 22 + 7 * digits)
    frame = _Frame(width, height, min(xs), max(xs), y_ticks[0], y_ticks[-1], step, *margins)
    parts = [*frame.grid(y_ticks)]
    tones = {name: min(i, 1) for i, name in enumerate(dict.fromkeys(ln.name for ln in lines))}
    for line in reversed(lines):
        parts += _one_line(line, frame, str(tones[line.name]))
    return _svg(width, height, parts, label or ", ".join(ln.name for ln in lines))


def ticks(low: float, high: float, count: int = 4, zero: bool = False) -> list[float]:
    """Round tick positions that cover ``[low, high]``; a flat series gets room around it."""
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low < 1e-12 * max(1.0, abs(high)):
        pad = abs(high) * 0.1 or 1.0
        low, high = (low, high + pad) if zero and low >= 0 else (low - pad, high + pad)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [k * step for k in range(first, last + 1)]


def number(value: float) -> str:
    """Short decimal: about three significant digits, a true minus sign."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "–"
    text = f"{value:.3g}"
    if "e" in text and abs(value) >= 1:
        text = f"{value:,.0f}"
    return text.replace("-", "−")


def spaced(value: float, step: float) -> str:
    """``value`` with the digits that tell it from its neighbours ``step`` away."""
    if abs(value) < step * 1e-6:
        return "0"
    if abs(value) < 100 * step or abs(value) >= 1e5:
        return number(value)
    digits = max(0, math.ceil(-math.log10(step)))
    return f"{value:.{digits}f}".replace("-", "−")


@dataclass(frozen=True)
class _Frame:
    """Maps data to pixels inside the margins."""

    width: int
    height: int
    x0: float
    x1: float
    y0: float
    y1: float
    step: float
    left: int
    right: int
    top: int = 8
    bottom: int = 24

    def x(self, value: float) -> float:
        span = (self.x1 - self.x0) or 1.0
        return self.left + (value - self.x0) / span * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        span = (self.y1 - self.y0) or 1.0
        room = self.height - self.top - self.bottom
        return self.top + (self.y1 - value) / span * room

    def grid(self, y_ticks: Sequence[float]) -> list[Markup]:
        """Horizontal rules with numbers, and the first and last step."""
        parts: list[Markup] = []
        edge = self.width - self.right
        for tick in y_ticks:
            y = _n(self.y(tick))
            parts.append(el("line", x1=self.left, x2=edge, y1=y, y2=y, class_="grid"))
            label = spaced(tick, self.step)
            parts.append(el("text", label, x=self.left - 8, y=_n(self.y(tick) + 4),
                            text_anchor="end"))  # fmt: skip
        for tick in self._x_ticks():
            x = _n(self.x(tick))
            parts.append(el("text", number(tick), x=x, y=self.height - 4, text_anchor="middle"))
        return parts

    def _x_ticks(self) -> list[float]:
        if self.x1 <= self.x0:
            return [self.x0]
        found = ticks(self.x0, self.x1, count=max(3, self.width // 160))
        return [t for t in found if self.x0 <= t <= self.x1]


@dataclass(frozen=True)
class _Axis:
    """Maps values to pixels along a bar."""

    left: float
    right: float
    low: float
    high: float
    shares: bool

    def x(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.left + max(0.0, min(1.0, share)) * (self.right - self.left)


def _score_ticks(rows: Sequence[Bars]) -> list[float]:
    given = [v for row in rows for v in row.values if v is not None]
    ends = _finite([x for v in given for x in (v.mean, v.low, v.high)]) or [0.0, 1.0]
    return ticks(min(ends), max(ends), zero=True)


def _bar_row(row: Bars, series: Sequence[str], top: float, axis: _Axis) -> list[Markup]:
    left, right = axis.left, axis.right
    room = ROW - 14
    thick = room / len(row.values)
    strong = " strong" if row.strong else ""
    middle = top + room / 2 + 4
    parts = [
        el("text", row.name, x=left - 14, y=_n(middle), text_anchor="end", class_="label" + strong)
    ]
    for i, value in enumerate(row.values):
        y = top + i * thick
        tone = f"s{i if len(row.values) > 1 else 1}"
        parts.append(el("rect", x=left, y=_n(y), width=_n(right - left), height=_n(thick - 1.5),
                        rx=2, class_="track"))  # fmt: skip
        if value is None or value.mean != value.mean:
            parts.append(el("text", "not scored", x=right + 12, y=_n(y + thick / 2 + 4)))
            continue
        said = f"{row.name}, {series[i]}: {spelled(value, row.of, axis.shares)}"
        parts.append(el("g", el("title", said), _bar(value, tone, y, thick, axis), class_="bar"))
        parts.append(el("text", short(value, axis.shares), x=right + 12, y=_n(y + thick / 2 + 4),
                        class_="value" + strong))  # fmt: skip
    return parts


def _bar(value: Interval, tone: str, y: float, thick: float, axis: _Axis) -> list[Markup]:
    foot, tip = sorted((axis.x(0.0), axis.x(value.mean)))
    parts = [
        el("rect", x=_n(foot), y=_n(y), width=_n(tip - foot), height=_n(thick - 1.5), rx=2,
           class_=tone)
    ]  # fmt: skip
    if value.defined:
        low, high = axis.x(value.low), axis.x(value.high)
        m = y + (thick - 1.5) / 2
        ends = ((low, m, high, m), (low, m - 3, low, m + 3), (high, m - 3, high, m + 3))
        for tone in ("halo", "whisker"):  # the halo keeps the whisker readable on a dark bar
            parts += [
                el("line", x1=_n(x1), y1=_n(y1), x2=_n(x2), y2=_n(y2), class_=tone)
                for x1, y1, x2, y2 in ends
            ]
    return parts


def short(value: Interval, shares: bool = True) -> str:
    """Such as ``46.2 % [41.0, 51.3]``; of scores ``21.4 [21.2, 21.6]``."""
    if not shares:
        ends = f" [{value.low:.4g}, {value.high:.4g}]" if value.defined else ""
        return f"{value.mean:.4g}{ends}".replace("-", "−")
    if not value.defined:
        return percent(value.mean)
    return f"{percent(value.mean)} [{100 * value.low:.1f}, {100 * value.high:.1f}]"


def spelled(value: Interval, of: str = "pictures", shares: bool = True) -> str:
    """:func:`short` with the sample size and what was resampled."""
    how = "no interval" if not value.defined else f"{value.level:.0%} interval by {value.unit}"
    return f"{short(value, shares)}, {value.n} {of} of {value.clusters} prompts, {how}"


def _one_line(line: Line, frame: _Frame, tone: str) -> list[Markup]:
    parts: list[Markup] = []
    if line.low is not None and line.high is not None:
        ring = [*zip(line.x, line.high, strict=True)]
        ring += reversed([*zip(line.x, line.low, strict=True)])
        shown = [(x, y) for x, y in ring if math.isfinite(y)]
        parts.append(el("path", d=_path(shown, frame) + "Z", class_="band"))
    raw = [*zip(line.x, line.y, strict=True)]
    look = f"l{tone} faint" if line.faint else f"l{tone}"
    parts.append(el("path", el("title", line.name), d=_path(raw, frame), class_=look))
    kept = [(x, y) for x, y in raw if math.isfinite(y)]
    if kept and not line.faint:
        x, y = kept[-1]
        spot = (_n(frame.x(x)), _n(frame.y(y)))
        parts.append(el("circle", cx=spot[0], cy=spot[1], r=3, class_=f"dot{tone}"))
        parts.append(el("text", spaced(y, frame.step / 10), x=_n(frame.x(x) + 7),
                        y=_n(frame.y(y) + 4), class_="value"))  # fmt: skip
    return parts


def _path(points: Sequence[tuple[float, float]], frame: _Frame) -> str:
    """SVG path; a non-finite value lifts the pen."""
    out, down = [], False
    for x, y in points:
        if not math.isfinite(y):
            down = False
            continue
        out.append(f"{'L' if down else 'M'}{_n(frame.x(x))} {_n(frame.y(y))}")
        down = True
    return "".join(out)


def _svg(width: int, height: float, parts: Sequence[Markup], label: str) -> Markup:
    box = f"0 0 {width} {_n(height)}"
    wide = "wide" if width > 640 else None
    return el("svg", *parts, viewBox=box, role="img", aria_label=label, class_=wide)


def _finite(values: Sequence[float]) -> list[float]:
    return [v for v in values if math.isfinite(v)]


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
