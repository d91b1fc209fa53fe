"""``mmalign evaluate-reward``: a command of its own, because no generator takes part in it."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from mmalign.commands.common import CommandError, given, table

SETS = ("quick", "judges", "offline")


def run(args: Namespace) -> int:
    """Rank rewards and judges by a benchmark of human preferences; print the tables."""
    import torch

    from eval.reward_benchmarks.page import by_part, ranking
    from eval.reward_benchmarks.run import evaluate_rewards
    from eval.reward_benchmarks.scoring import Settings
    from mmalign.registry import REWARD_BENCHMARKS
    from mmalign.runtime.device import pick_device

    options = _options(args.option)
    common = given(data=args.data, mode=args.mode)
    benchmark = _built(REWARD_BENCHMARKS.load(args.benchmark), args.benchmark, common, options)
    device = torch.device("cpu") if args.device is None else pick_device(args.device)
    dials = given(batch_size=args.batch_size, frames=args.frames)
    settings = Settings(**dials, device=device, progress="" if args.quiet else "on")  # type: ignore[arg-type]
    report = evaluate_rewards(
        benchmark, rewards_of(args.reward), args.out, limit=args.limit, settings=settings,
        overwrite=args.overwrite,
    )  # fmt: skip
    head, rows = ranking(report)
    print(f"{report.benchmark} {report.version} ({report.mode})\n{table(rows, head)}")
    for kind in ("categories", "dimensions"):
        head, rows = by_part(report, kind)
        if rows:
            print(f"\n{report.headline} by part\n{table(rows, head)}")
    for problem in report.problems:
        print(f"left out: {problem}")
    if report.folder is not None:
        print(f"written to {report.folder}")
    return 0


def rewards_of(specs: Sequence[str]) -> dict[str, Any]:
    """Label to specification of every reward that was asked for.

    Each is a name or composition as everywhere, a mapping in YAML (``{reward: vqascore,
    checkpoint: ...}``, with ``label`` for a name of one's own), or one of :data:`SETS`.

    Raises:
        CommandError: unreadable, or given twice.
    """
    import yaml

    found: dict[str, Any] = {}
    for spec in specs:
        own = _set(spec) if spec in SETS else {}
        if not own and spec.lstrip().startswith("{"):
            data = yaml.safe_load(spec)
            if not isinstance(data, Mapping):
                raise CommandError(f"reward {spec!r} is no mapping, as {{reward: name}}")
            own = {str(data.get("label", spec)): {k: v for k, v in data.items() if k != "label"}}
        own = own or {spec: spec}
        twice = [label for label in own if label in found]
        if twice:
            raise CommandError(f"reward {twice[0]!r} is given twice")
        found |= own
    return found


def _set(name: str) -> dict[str, Any]:
    from eval.reward_benchmarks import offline

    return {"quick": offline.quick_rewards, "judges": offline.judges,
            "offline": offline.offline_rewards}[name]()  # fmt: skip


def _options(pairs: Sequence[str]) -> dict[str, Any]:
    import yaml

    options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise CommandError(f"option {pair!r} must look like name=value")
        options[name.strip()] = yaml.safe_load(value)
    return options


def _built(cls: Any, name: str, common: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """The benchmark; an unknown option stops with the nearest name."""
    import inspect

    from mmalign.registry import unknown

    known = [p for p in inspect.signature(cls).parameters if p not in ("data", "mode")]
    for option in options:
        if option not in known:
            raise unknown(f"option of benchmark {name!r}", option, known)
    return cls(**common, **options)
