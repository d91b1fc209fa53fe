"""The family tree of a steered picture: who descends from whom, drawn from a method's own record.

Time runs from left to right. A dot is a state that the reward judged, the stronger the higher its
value; a line leads to what was made of it. The way to the chosen picture is drawn heavy, branches
that ended are drawn thin.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from eval.charts import number
from eval.html import Markup, el

WIDTH, LEFT, RIGHT, TOP = 1000, 46, 92, 30
THUMB = 40  # side of the pictures of the finished samples
CROWD = 16  # rows beyond which lines are close and pictures left out

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Node:
    """One judged state: its column and place in it, its value, the node it was made of, and the
    number of the finished sample that it is."""

    column: int
    place: int
    value: float | None
    parent: int | None = None
    sample: int | None = None


@dataclass
class Tree:
    """Nodes in the order of time; ``chosen`` is the number of the one that was chosen."""

    nodes: list[Node] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    chosen: int | None = None

    def column(
        self, label: str, values: Sequence[float | None], parents: Sequence[int | None],
        samples: bool = False,
    ) -> list[int]:  # fmt: skip
        """Add a column of nodes and return their numbers."""
        first, column = len(self.nodes), len(self.labels)
        self.labels.append(label)
        for place, (value, parent) in enumerate(zip(values, parents, strict=True)):
            self.nodes.append(Node(column, place, value, parent, place if samples else None))
        return list(range(first, len(self.nodes)))

    def lineage(self) -> set[int]:
        """The chosen node and all it descends from."""
        found: set[int] = set()
        at = self.chosen
        while at is not None and at not in found:
            found.add(at)
            at = self.nodes[at].parent
        return found

    def alive(self) -> set[int]:
        """Nodes that something was made of, and finished samples."""
        return {n.parent for n in self.nodes if n.parent is not None} | {
            i for i, n in enumerate(self.nodes) if n.sample is not None
        }


def family_tree(record: Record) -> Tree | None:
    """The tree of one prompt's record; ``None`` where its method has none.

    Args:
        record: with ``trace``, ``candidates`` and ``chosen``, as ``mmalign steer`` writes it.
    """
    events = [line.get("event") for line in record["trace"]]
    for names, build in _BUILDERS.items():
        if any(event in names for event in events):
            tree = build(record, [ln for ln in record["trace"] if ln.get("event") in names])
            return tree if len(tree.labels) > 1 else None
    return None


def _particles(record: Record, trace: Sequence[Record]) -> Tree:
    """Particles that are weighed and resampled: place ``i`` goes on from ``ancestors[i]``."""
    tree = Tree()
    carry: list[int | None] | None = None
    for line in trace:
        if line["event"] == "hurry":  # one particle is left
            carry = None if carry is None else [carry[line["kept"]]]
            continue
        values = line["values"]
        last = line["event"] == "last"
        label = "picture" if last else f"step {line['step']}"
        if "effective_size" in line and not last:
            label += f", ESS {line['effective_size']:.1f}"
        ids = tree.column(label, values, carry or [None] * len(values), samples=last)
        carry = [ids[a] for a in line.get("ancestors", range(len(ids)))]
        if last:
            tree.chosen = ids[record["chosen"]]
    return tree


def _forks(record: Record, trace: Sequence[Record]) -> Tree:
    """A beam: every survivor has children, the best of all go on."""
    tree = Tree()
    survivors: list[int] = []
    for line in trace:
        parents = [survivors[p] if survivors else None for p in line["parents"]]
        ids = tree.column(f"step {line['step']}", line["values"], parents)
        survivors = [ids[i] for i in line["kept"]]
    return _finished(tree, record, survivors)


def _picks(record: Record, trace: Sequence[Record]) -> Tree:
    """Each sample for itself: of its children one is picked."""
    tree = Tree()
    survivors: list[int] = []
    for line in trace:
        each = len(line["values"][0])
        parents = [survivors[row] if survivors else None for row in range(len(line["values"]))]
        flat = [value for row in line["values"] for value in row]
        ids = tree.column(f"step {line['step']}", flat, [p for p in parents for _ in range(each)])
        survivors = [ids[row * each + place] for row, place in enumerate(line["picked"])]
    return _finished(tree, record, survivors)


def _walk(record: Record, trace: Sequence[Record]) -> Tree:
    """A walk over noises: every candidate is a finished sample, made of an earlier one."""
    tree = Tree()
    places: dict[int, int] = {}
    for i, candidate in enumerate(record["candidates"]):
        column = candidate["iteration"]
        if column == len(tree.labels):
            tree.labels.append("start" if column == 0 else f"look {column}")
        place = places[column] = places.get(column, -1) + 1
        tree.nodes.append(Node(column, place, candidate["score"], candidate["parent"], i))
    tree.chosen = record["chosen"]
    return tree


def _finished(tree: Tree, record: Record, survivors: Sequence[int]) -> Tree:
    values = [c["score"] for c in record["candidates"]]
    ids = tree.column("picture", values, list(survivors[: len(values)]), samples=True)
    tree.chosen = ids[record["chosen"]]
    return tree


_BUILDERS: dict[tuple[str, ...], Callable[[Record, Sequence[Record]], Tree]] = {
    ("visit", "last", "hurry"): _particles,
    ("fork",): _forks,
    ("pick",): _picks,
    ("look",): _walk,
}


# --- drawing ----------------------------------------------------------------------------------

STYLE = """
svg .edge{fill:none;stroke:var(--before);stroke-width:1.4;opacity:.75}
svg .edge.dead{opacity:.6;stroke-width:1;stroke-dasharray:3 3}
svg .edge.on{stroke:var(--good);stroke-width:3;opacity:1}
svg .dot{fill:var(--after);stroke:var(--after);stroke-width:1}
svg .dot.none{fill:none;stroke:var(--bad);stroke-dasharray:2 2}
svg .ring{fill:none;stroke:var(--faint);stroke-width:1.5}
svg .ring.on{stroke:var(--good);stroke-width:3.5}
svg image{image-rendering:pixelated}
"""


def draw(tree: Tree, pictures: Sequence[str | None] = ()) -> Markup:
    """The tree as SVG.

    Args:
        pictures: addresses of the finished samples' pictures, by their number.
    """
    canvas = _Canvas(tree, pictures)
    parts = [*canvas.heads(), *canvas.edges(), *canvas.dots()]
    said = f"family tree over {len(tree.labels)} columns, {len(tree.nodes)} judged states"
    box = f"0 0 {WIDTH} {canvas.height:.0f}"
    return el("svg", *parts, viewBox=box, role="img", aria_label=said, class_="wide tree")


class _Canvas:
    """Places of nodes on the page, and their marks."""

    def __init__(self, tree: Tree, pictures: Sequence[str | None]) -> None:
        self.tree, self.pictures = tree, pictures
        self.on, self.alive = tree.lineage(), tree.alive()
        rows = [max((n.place for n in tree.nodes if n.column == c), default=0) + 1
                for c in range(len(tree.labels))]  # fmt: skip
        self.rows, most = rows, max(rows)
        last = [n for n in tree.nodes if n.sample is not None]
        self.thumbs = (
            bool(pictures) and max(rows[n.column] for n in last) <= CROWD if last else False
        )
        crowded = max((rows[n.column] for n in last), default=0) if self.thumbs else 0
        self.height = TOP + max((THUMB + 6) * crowded, (20 if most <= CROWD else 9) * most) + 10
        values = [n.value for n in tree.nodes if n.value is not None]
        self.low, self.high = (min(values), max(values)) if values else (0.0, 0.0)

    def at(self, node: Node) -> tuple[float, float]:
        columns, rows = max(len(self.tree.labels) - 1, 1), self.rows[node.column]
        x = LEFT + node.column / columns * (WIDTH - LEFT - RIGHT)
        room = self.height - TOP - 4
        return x, TOP + room * (node.place + 0.5) / rows

    def heads(self) -> list[Markup]:
        """What each column is; some are left out where there are many."""
        every = -(-len(self.tree.labels) // 12)
        shown = [c for c in range(len(self.tree.labels)) if c % every == 0]
        return [
            el("text", self.tree.labels[c], x=f"{self.at(Node(c, 0, None))[0]:.1f}", y=14,
               text_anchor="middle")
            for c in shown
        ]  # fmt: skip

    def edges(self) -> list[Markup]:
        parts = []
        for i, node in enumerate(self.tree.nodes):
            if node.parent is None:
                continue
            (x1, y1), (x2, y2) = self.at(self.tree.nodes[node.parent]), self.at(node)
            tone = " on" if i in self.on else "" if i in self.alive else " dead"
            middle = (x1 + x2) / 2
            path = (
                f"M{x1:.1f} {y1:.1f}C{middle:.1f} {y1:.1f} {middle:.1f} {y2:.1f} {x2:.1f} {y2:.1f}"
            )
            parts.append((tone == " on", el("path", d=path, class_=f"edge{tone}")))
        return [mark for _, mark in sorted(parts, key=lambda p: p[0])]  # the heavy ones on top

    def dots(self) -> list[Markup]:
        parts: list[Markup] = []
        for i, node in enumerate(self.tree.nodes):
            x, y = self.at(node)
            said = "unscored" if node.value is None else number(node.value)
            title = el("title", f"{self.tree.labels[node.column]}, {node.place + 1}: {said}")
            address = self._picture(node)
            mark = self._dot(i, node, x, y) if address is None else self._thumb(i, x, y, address)
            parts.append(el("g", title, *mark))
            if node.sample is not None and node.column == len(self.tree.labels) - 1:
                right = x + (THUMB / 2 if address else 5) + 8
                parts.append(el("text", said, x=f"{right:.1f}", y=f"{y + 4:.1f}", class_="value"))
        return parts

    def _picture(self, node: Node) -> str | None:
        if not self.thumbs or node.sample is None or node.sample >= len(self.pictures):
            return None
        return self.pictures[node.sample]

    def _dot(self, i: int, node: Node, x: float, y: float) -> list[Markup]:
        radius = 5.5 if i in self.on else 4
        where = {"cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": radius}
        if node.value is None:
            return [el("circle", class_="dot none", **where)]
        span = (self.high - self.low) or 1.0
        strong = 0.12 + 0.88 * (node.value - self.low) / span
        return [el("circle", class_="dot", fill_opacity=f"{strong:.2f}", **where)]

    def _thumb(self, i: int, x: float, y: float, address: str) -> list[Markup]:
        half = THUMB / 2
        where = {"x": f"{x - half:.1f}", "y": f"{y - half:.1f}", "width": THUMB, "height": THUMB}
        ring = "ring on" if i in self.on else "ring"
        return [el("image", href=address, **where), el("rect", class_=ring, rx=3, **where)]


__all__ = ["STYLE", "Node", "Tree", "draw", "family_tree"]
