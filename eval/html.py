"""HTML that escapes itself, and the shell of a report page.

Strings given to :func:`el` are escaped; only :class:`Markup`, which :func:`el` returns, is not.
A page is one file: no script, no request to anywhere, light and dark by the reader's preference.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_VOID = {"img", "meta", "br", "line", "rect", "path", "circle", "polyline"}


class Markup(str):
    """Text that is HTML already."""


Child = str | Markup | None | Iterable[Any]


def el(tag: str, *children: Child, **attributes: object) -> Markup:
    """An element. Attribute ``class_`` is ``class``, ``stroke_width`` is ``stroke-width``; ``None``
    and ``False`` leave an attribute out, ``True`` writes it bare."""
    said = "".join(_attribute(k, v) for k, v in attributes.items())
    if tag in _VOID and not children:
        return Markup(f"<{tag}{said}>" if tag in ("img", "meta", "br") else f"<{tag}{said}/>")
    return Markup(f"<{tag}{said}>{''.join(_text(c) for c in children)}</{tag}>")


def table(
    head: Sequence[Child], rows: Iterable[Sequence[Child]], class_: str = "numbers"
) -> Markup:
    """A table; the first column is a row header."""
    body = [el("tr", el("th", r[0], scope="row"), [el("td", c) for c in r[1:]]) for r in rows]
    top = el("thead", el("tr", [el("th", h, scope="col") for h in head])) if head else ""
    return el("div", el("table", top, el("tbody", body), class_=class_), class_="scroll")


def facts(data: Mapping[str, Any]) -> Markup:
    """A two-column table of nested settings, keys joined by dots."""
    return table((), [(k, v) for k, v in _flat(data)], class_="facts")


def section(title: str, *children: Child, note: Child = None, id_: str | None = None) -> Markup:
    """A titled part of the page with an optional line of explanation under the title."""
    under = el("p", note, class_="note") if note else None
    return el("section", el("h2", title), under, *children, id=id_)


def page(title: str, *body: Child) -> str:
    """The whole document."""
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", title),
        el("style", Markup(CSS)),
    )
    return f"<!doctype html>\n{el('html', head, el('body', el('main', *body)), lang='en')}\n"


def percent(value: float | None, digits: int = 1) -> str:
    """A share in per cent, or a dash where it is undefined."""
    return "–" if value is None or value != value else f"{100 * value:.{digits}f} %"


def points(value: float, digits: int = 1, sign: bool = True) -> str:
    """A difference of shares in percentage points, with a true minus sign."""
    if value != value:
        return "–"
    rounded = round(100 * value, digits) + 0.0  # no "-0.0"
    plus = "+" if sign and rounded > 0 else ""
    return f"{plus}{rounded:.{digits}f}".replace("-", "−")


def duration(seconds: float) -> str:
    """Such as ``1 h 12 min`` or ``8.4 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def _attribute(name: str, value: object) -> str:
    if value is None or value is False:
        return ""
    key = name.rstrip("_").replace("_", "-") if name != "viewBox" else name
    return f" {key}" if value is True else f' {key}="{html.escape(str(value))}"'


def _text(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Markup):
        return child
    return html.escape(child) if isinstance(child, str) else "".join(_text(c) for c in child)


def _flat(data: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in data.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")
        elif isinstance(value, (list, tuple)):
            yield name, ", ".join(map(str, value))
        else:
            yield name, "–" if value is None else str(value)


CSS = """
:root{--ground:#fbfbfa;--card:#fff;--ink:#1b1d22;--soft:#5f6672;--faint:#8b919c;--rule:#e4e5e8;
--track:#eff0f2;--before:#a9b0bd;--after:#3f5bd8;--band:#3f5bd81f;--good:#1f8f55;--bad:#d0433b;
--unsure:#b98512;--goodwash:#1f8f5512;--badwash:#d0433b12;--surewash:#b9851214}
@media (prefers-color-scheme:dark){:root{--ground:#131519;--card:#1b1e24;--ink:#eceef2;
--soft:#a3aab6;--faint:#7b828e;--rule:#2d313a;--track:#262a32;--before:#6b7382;--after:#8ba0ff;
--band:#8ba0ff2b;--good:#4cc488;--bad:#f0746b;--unsure:#dfb04d;--goodwash:#4cc4881a;
--badwash:#f0746b1a;--surewash:#dfb04d1a}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);-webkit-font-smoothing:antialiased;
font:16px/1.55 ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,
sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1080px;margin:0 auto;padding:56px 28px 88px}
header .kicker{color:var(--soft);font-size:13px;letter-spacing:.06em;text-transform:uppercase;
margin:0 0 6px}
h1{font-size:32px;line-height:1.2;letter-spacing:-.02em;margin:0 0 22px;overflow-wrap:anywhere}
h2{font-size:20px;letter-spacing:-.01em;margin:0 0 4px}
h3{font-size:14px;font-weight:600;margin:26px 0 10px}
section{margin-top:56px}
.note{color:var(--soft);font-size:14px;margin:0 0 18px;max-width:88ch}
.verdict{border-left:4px solid var(--faint);background:var(--track);padding:18px 22px;
border-radius:0 10px 10px 0;font-size:19px;line-height:1.45;margin:0}
.verdict small{display:block;font-size:14px;color:var(--soft);margin-top:6px}
.verdict.gain{border-color:var(--good);background:var(--goodwash)}
.verdict.loss{border-color:var(--bad);background:var(--badwash)}
.verdict.unclear{border-color:var(--unsure);background:var(--surewash)}
.tiles{display:flex;flex-wrap:wrap;gap:14px 40px;margin:26px 0 0;padding:0}
.tiles div{display:flex;flex-direction:column}
.tiles dt{order:2;color:var(--soft);font-size:13px}
.tiles dd{margin:0;font-size:22px;font-weight:600;letter-spacing:-.01em}
.card{background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:18px 20px;
overflow-x:auto}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14px}
.numbers{margin-top:18px}
th,td{padding:7px 12px 7px 0;border-bottom:1px solid var(--rule);text-align:left;
vertical-align:top}
th{font-weight:500}
thead th{color:var(--soft);font-size:13px;border-bottom-color:var(--faint)}
.numbers td,.numbers thead th:not(:first-child){text-align:right;white-space:nowrap}
.numbers td:last-child,.numbers th:last-child{padding-right:0}
.numbers tbody tr:first-child>*{font-weight:600}
.facts th{color:var(--soft);width:30%;font-weight:400}
.facts td{overflow-wrap:anywhere}
.up{color:var(--good)}.down{color:var(--bad)}.flat{color:var(--soft)}
svg{display:block;width:100%;height:auto;overflow:visible}
svg.wide{min-width:640px}
h2+.small,h2+.card,h2+.empty,h2+details{margin-top:16px}
.small svg .l0{stroke-width:1.5}
svg text{font-family:inherit;fill:var(--soft);font-size:12px}
svg .label{fill:var(--ink);font-size:13px}
svg .strong{font-weight:600}
svg .value{fill:var(--ink);font-size:12px}
svg .grid{stroke:var(--rule);stroke-width:1}
svg .axis{stroke:var(--faint);stroke-width:1}
svg .track{fill:var(--track)}
svg .s0{fill:var(--before)}svg .s1{fill:var(--after)}
svg .whisker{stroke:var(--ink);stroke-width:1.3}
svg .halo{stroke:var(--card);stroke-width:3.6;opacity:.8}
svg .l0{fill:none;stroke:var(--after);stroke-width:2;stroke-linejoin:round}
svg .l1{fill:none;stroke:var(--before);stroke-width:2;stroke-linejoin:round}
svg .faint{stroke-width:1;opacity:.35}
svg .band{fill:var(--band);stroke:none}
svg .dot0{fill:var(--after)}svg .dot1{fill:var(--before)}
.legend{display:flex;gap:18px;flex-wrap:wrap;color:var(--soft);font-size:13px;margin:0 0 12px}
.legend i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:7px;
vertical-align:-1px}
.legend .s0{background:var(--before)}.legend .s1{background:var(--after)}
.legend .ok{border:2px solid var(--good)}.legend .no{border:2px solid var(--bad)}
.legend .na{border:2px dashed var(--faint)}
.legend .band{background:var(--band)}
.small{display:grid;grid-template-columns:repeat(auto-fill,minmax(290px,1fr));gap:18px}
.small figure{margin:0}
figcaption{font-size:14px;font-weight:600;margin-bottom:2px}
figcaption span{display:block;font-weight:400;color:var(--soft);font-size:12.5px;
margin-bottom:10px;min-height:1.5em}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(226px,1fr));gap:18px 20px}
.grid.single{grid-template-columns:repeat(auto-fill,minmax(108px,1fr));gap:18px 16px}
.shot{margin:0}
.pair{display:flex;gap:8px}
.shot .pic{flex:1;position:relative;min-width:0}
.shot img,.shot .missing{display:block;width:100%;aspect-ratio:1;border-radius:8px;
border:3px solid var(--faint);background:var(--track)}
.shot img{image-rendering:pixelated}
.shot img.large{image-rendering:auto}
.shot .ok img,.shot .ok .missing{border-color:var(--good)}
.shot .no img,.shot .no .missing{border-color:var(--bad)}
.shot .na img,.shot .na .missing{border-style:dashed}
.shot .missing{display:flex;align-items:center;justify-content:center;color:var(--faint);
font-size:12px}
.shot b{position:absolute;right:-5px;bottom:-5px;box-shadow:0 0 0 2px var(--ground);
width:20px;height:20px;border-radius:50%;
font-size:12px;line-height:20px;text-align:center;color:#fff;background:#8b919c}
.shot .ok b{background:#1f8f55}.shot .no b{background:#d0433b}
.shot figcaption{font-weight:400;font-size:13px;line-height:1.4;margin:7px 0 0}
.shot figcaption span{min-height:0;margin:0;font-size:12px}
details{border-top:1px solid var(--rule);padding:12px 0}
details:last-of-type{border-bottom:1px solid var(--rule)}
summary{cursor:pointer;font-weight:500}
pre{overflow-x:auto;font:12.5px/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;
background:var(--track);padding:14px 16px;border-radius:8px}
ul.notes{padding-left:20px;margin:14px 0 0;color:var(--soft);font-size:14px}
.empty{color:var(--soft);font-size:14px;border:1px dashed var(--rule);border-radius:12px;
padding:18px 20px;margin:0}
footer{margin-top:64px;color:var(--faint);font-size:13px}
@media print{main{padding:0}section{break-inside:avoid}}
"""
