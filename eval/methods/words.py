"""What a comparison calls things: columns, curves and notes, of training and of steering."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from eval.charts import number
from eval.html import duration, percent, points
from eval.methods.summary import Line, Summary
from eval.statistics import Interval


@dataclass(frozen=True)
class Curve:
    """A measure, times ``scale``, against ``nfe`` over ``unit`` or against ``seconds``.

    Without a ``measure`` it is what each row was trained on, in units of its own.
    """

    title: str
    note: str
    against: str
    measure: str | None = "accuracy"
    scale: float = 100.0
    unit: float = 1.0


@dataclass(frozen=True)
class Words:
    """Of one kind of comparison.

    Attributes:
        start: what the first evaluation is called.
        head, cells: the table of methods; ``verdict`` is the column of "gains over the base".
        methods: the note above that table.
    """

    title: str
    command: str
    start: str
    head: tuple[str, ...]
    verdict: int
    cells: Callable[[Line], tuple[str, ...]]
    basis: Callable[[Summary], str]
    curves: Callable[[Summary], list[Curve]]
    methods: str
    how: tuple[str, ...]


def words_of(summary: Summary) -> Words:
    """The words of a comparison."""
    return STEERING if summary.comparison.steering else TRAINING


def ranged(interval: Interval, show: Callable[[float], str] = percent) -> str:
    """Such as ``52.1 % [48.0, 56.2]``."""
    if not interval.defined:
        return show(interval.mean)
    low, high = (points(v, sign=False) for v in (interval.low, interval.high))
    return f"{show(interval.mean)} [{low}, {high}]"


def _basis_of_training(summary: Summary) -> str:
    c = summary.comparison
    return (
        f"{len(c.methods)} rows, {_seeds(summary)}, {c.table['nfe']:,} network evaluations a run, "
        f"{_judged(summary)}"
    )


def _basis_of_steering(summary: Summary) -> str:
    c = summary.comparison
    return (
        f"{len(c.methods)} rows, {_seeds(summary)}, steered by {c.table['reward']}, "
        f"{_judged(summary)}"
    )


def _seeds(summary: Summary) -> str:
    return "seeds " + ", ".join(map(str, summary.comparison.table["seeds"]))


def _judged(summary: Summary) -> str:
    c = summary.comparison
    return (
        f"{c.table['threads']} thread(s) a run; accuracy is {accuracy_is(summary)} on "
        f"{len(c.pictures.tasks)} held-out pictures, mean over tasks, with 95 % intervals over "
        f"{'prompts' if c.steering else 'seeds and prompts'}."
    )


def accuracy_is(summary: Summary) -> str:
    """What the value of a picture is, by the benchmark that the runs were judged on."""
    runs = next(iter(summary.comparison.methods.values())).runs
    return VALUES.get(runs[0].results[0].benchmark, "the benchmark's value")


def _training_cells(line: Line) -> tuple[str, ...]:
    runs = line.runs
    above = "–" if line.improvement is None else ranged(line.improvement)
    gone = sum(bool(run.diverged) for run in runs.runs)
    return (
        f"{runs.title} ({gone} of {len(runs.runs)} diverged)" if gone else runs.title,
        ranged(line.accuracy),
        ranged(line.gain, points),
        f"{line.word} ({line.lacks})" if line.lacks else line.word,
        above,
        f"{runs.mean('updates'):.0f}",
        f"{runs.mean('nfe'):,.0f}",
        duration(runs.mean("seconds")),
        _moves(line),
    )


def _steering_cells(line: Line) -> tuple[str, ...]:
    runs = line.runs
    ahead = [line.ahead.get(unit) for unit in ("nfe", "seconds")]
    return (
        runs.title,
        ranged(line.accuracy),
        ranged(line.gain, points),
        line.word,
        *("–" if found is None else ranged(found, points) for found in ahead),
        f"{runs.mean('nfe'):,.0f}",
        f"{runs.mean('reward_calls'):,.0f}",
        f"{runs.mean('seconds'):.2f} s",
        "–" if line.overhead is None else percent(line.overhead),
    )


def _moves(line: Line) -> str:
    return "; ".join(f"{m} {number(a)} → {number(b)}" for m, a, b in line.proxies)


def judged(summary: Summary) -> tuple[tuple[str, ...], list[tuple[str, ...]]] | None:
    """Header and rows of what judges say of steered pictures; training has it in its own table."""
    if not summary.comparison.steering:
        return None
    names = list(dict.fromkeys(name for line in summary.lines for name, _, _ in line.proxies))
    rows = []
    for line in summary.lines:
        moved = {name: f"{number(a)} → {number(b)}" for name, a, b in line.proxies}
        rows.append((line.runs.title, *(moved.get(name, "–") for name in names)))
    return ("bare → steered", *names), rows


def _training_curves(summary: Summary) -> list[Curve]:
    beside = f" In grey: {_title(summary)}." if summary.reference else ""
    said = "Held-out accuracy in per cent over {}, mean over seeds, with 95 % bands." + beside
    rewarded = (
        "What stands for each row's trained reward, named beside it, on the same held-out pictures "
        "over thousand network evaluations of training. Its rise says that training works; only "
        "beside accuracy does it say that what it raises is wanted." + beside
    )
    return [
        Curve("Accuracy against network evaluations",
              said.format("thousand network evaluations of training"), "nfe", unit=1000.0),
        Curve("Accuracy against seconds", said.format("seconds of training"), "seconds"),
        Curve("Trained reward against network evaluations", rewarded, "nfe", None, 1.0, 1000.0),
    ]  # fmt: skip


def _steering_curves(summary: Summary) -> list[Curve]:
    reward = str(summary.comparison.table["reward"])
    said = "{} over {} of a prompt, mean over seeds, with 95 % bands. In grey: best of N."
    units = {"nfe": "network evaluations", "seconds": "seconds"}
    found = [
        Curve(f"Accuracy against {unit}", said.format("Held-out accuracy in per cent", unit), name)
        for name, unit in units.items()
    ]
    for name, unit in units.items():
        note = said.format(f"{reward}, which steers,", unit)
        found.append(Curve(f"Steering reward against {unit}", note, name, reward, 1.0))
    return found


def _title(summary: Summary) -> str:
    return summary.comparison.methods[str(summary.reference)].title


VALUES = {
    "shapes": "the strict verdict",
    "shapes_subject": "the verdict on subject and composition",
    "shapes_control": "the share of the objects' pixels that show their map",
}
_INTERVALS = (
    "Intervals: seeds are drawn anew within each method, prompts within each task and the same "
    "for all methods; the seeds' part is widened for their small number."
)
_UNSCORED = "Accuracy counts pictures that could not be judged as wrong."

TRAINING = Words(
    title="Training methods at equal compute",
    command="mmalign bench methods",
    start="before training",
    head=(
        "method", "accuracy", "gain, points", "gains over the base", "above the reference",
        "updates", "NFE", "time", "trained reward, held out",
    ),
    verdict=3,
    cells=_training_cells,
    basis=_basis_of_training,
    curves=_training_curves,
    methods=(
        "Accuracy on held-out prompts at the end of the budget, best first, counterparts of claims "
        "last. Above the reference: the probability, mean over tasks, that a run of the method "
        "ends above one of the reference."
    ),
    how=(
        "Every run starts from the same model and ends at the step whose end is nearest to the "
        "budget; evaluations do not count as compute.",
        "A run in which training broke down counts with the model that it broke down with, to the "
        "end of the budget. There is no verdict on a method before all of its seeds have ended.",
        _UNSCORED,
        _INTERVALS,
        "Curves are read at equal parts of the budget, interpolated between evaluations.",
        "Settings are those of the shipped recipes, which were not tuned for each method alike. A "
        "verdict is about these recipes on this small problem at this budget, not about a paper.",
    ),
)  # fmt: skip
STEERING = Words(
    title="Steering methods against compute",
    command="mmalign bench steering",
    start="bare pipeline",
    head=(
        "method", "accuracy", "gain, points", "gains", "equal NFE", "equal time", "NFE", "scored",
        "time", "overhead",
    ),
    verdict=3,
    cells=_steering_cells,
    basis=_basis_of_steering,
    curves=_steering_curves,
    methods=(
        "Accuracy at the largest budget of each row, best first, counterparts of claims last; "
        "budgets differ, so the columns equal NFE and equal time say how many points a row is "
        "ahead of best of N on the same model, at the most that both reach. NFE, pictures scored "
        "and time are those of a prompt. Of the judges below, the reward that steers comes first."
    ),
    how=(
        "The first point of every curve is the bare pipeline's picture of a prompt's first noise, "
        "from which every method starts: rows of one model are paired.",
        "The strict verdict and the judges took no part in steering. Where the reward that steers "
        "is partial credit of the same verifier, its strict verdict is not independent of it.",
        "Between two budgets curves are interpolated. NFE counts both branches of guidance but no "
        "backward pass; seconds count all of it, and are those of a process that ran alone.",
        "Own overhead: seconds beyond network, decoder, reward and gradients, over the seconds of "
        "those. Scheduler steps and drawing noise count as overhead, which a bare pipeline has "
        "too.",
        _UNSCORED,
        "Intervals: prompts are drawn anew within each task with the pictures of all seeds, and "
        "the same for all methods.",
        "Settings were not tuned on these prompts or noises. A verdict is about these settings on "
        "this small problem, not about a paper.",
    ),
)  # fmt: skip
