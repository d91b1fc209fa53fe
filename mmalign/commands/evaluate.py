"""``mmalign evaluate``."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any

from mmalign.commands.common import CommandError, given, table


def add_arguments(parser: ArgumentParser) -> None:
    """The command line of ``mmalign evaluate``."""
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--policy", metavar="NAME_OR_PATH", help="the generator")
    text = "pictures that are there already, in an official folder layout"
    group.add_argument("--images", metavar="DIR", help=text)
    text = "of --images or --export: flat, geneval, ... (the benchmark's own)"
    parser.add_argument("--layout", metavar="NAME", help=text)
    parser.add_argument("--benchmark", default="shapes", help="see: mmalign list benchmarks")
    text = "the benchmark's official file or folder (what mmalign data get has fetched)"
    parser.add_argument("--data", metavar="PATH", help=text)
    text = "option of the benchmark, as mode=fixed or reward=NAME; may be given again"
    parser.add_argument("-o", "--option", action="append", default=[], metavar="k=v", help=text)
    parser.add_argument("--lora", metavar="PATH", help="a LoRA adapter to load into it")
    parser.add_argument("--out", metavar="DIR", help="where results, pictures and report go")
    parser.add_argument("--steps", type=int, help="sampling steps (the policy's own)")
    parser.add_argument("--guidance-scale", type=float, help="guidance (the policy's own)")
    parser.add_argument("--batch-size", type=int, help="pictures generated at once")
    text = "pictures of every network call: equal bits in any batch size (8 on a CPU; 0: off)"
    parser.add_argument("--pin", type=int, metavar="N", help=text)
    text = "generate everything, then judge: for models that do not fit beside each other"
    parser.add_argument("--swap", action="store_true", help=text)
    parser.add_argument("--limit", type=int, help="only so many requests")
    text = "an unscored or missing picture, or anything odd, is an error"
    parser.add_argument("--strict", action="store_true", help=text)
    parser.add_argument("--samples-per-prompt", type=int, help="pictures of each prompt")
    parser.add_argument("--device", help="auto, cpu, cuda or mps")
    parser.add_argument("--dtype", help="autocast precision: auto, fp32, bf16 or fp16")
    parser.add_argument("--label", metavar="TEXT", help="what reports call it")
    text = "a line for each picture: .jsonl, .csv or .parquet"
    parser.add_argument("--table", metavar="FILE", help=text)
    text = "copy the pictures here, in the official layout"
    parser.add_argument("--export", metavar="DIR", help=text)
    parser.add_argument("--no-report", action="store_true", help="write no HTML report")
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")


def run(args: Namespace) -> int:
    """Evaluate a generator or pictures and print accuracy per task with its interval."""
    from mmalign import api

    names = ("out", "lora", "steps", "guidance_scale", "limit", "batch_size", "samples_per_prompt",
             "data", "device", "dtype", "images", "layout", "pin", "label", "table",
             "export")  # fmt: skip
    options: dict[str, Any] = given(**{n: getattr(args, n) for n in names})
    if args.option:
        options["options"] = options_of(args.option)
    flags = {"swap": args.swap, "strict": args.strict}
    options.update({name: True for name, on in flags.items() if on})
    if args.quiet:
        options["progress"] = False
    result = api.evaluate(args.policy, args.benchmark, report=not args.no_report, **options)
    if os.environ.get("RANK", "0") == "0":
        print(summary(result))
    _leave()
    return 0


def _leave() -> None:
    """Part from the other processes, where a launcher started several."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def summary(result: Any) -> str:
    """The result as a table of tasks, the overall mean last."""
    from eval.trust import cautions

    rows = [_row(task, s) for task, s in result.tasks.items()]
    rows.append(_row("mean over tasks", result.overall))
    title = f"{result.benchmark} {result.version}: {result.policy}"
    text = table(rows, ["task", "accuracy", "95 % interval", "pictures", "unscored"])
    own = [[name, value] for name, value in result.numbers.items()]
    if own:
        text += f"\n\n{table(own, ['as the authors report it', 'value'])}"
    cost = f"{result.seconds:.1f} s, {result.nfe:.0f} network evaluations"
    where = f"\nwritten to {result.folder}" if result.folder else ""
    said = "".join(f"\nnote: {line}" for line in cautions(result))
    return f"{title}\n{text}\n{cost}{said}{where}"


def options_of(pairs: Sequence[str]) -> dict[str, Any]:
    """``k=v`` pairs, values as YAML. Raises :class:`CommandError` on another form."""
    import yaml

    split = {name.strip(): value for name, _, value in (p.partition("=") for p in pairs)}
    broken = [p for p in pairs if "=" not in p or not p.partition("=")[0].strip()]
    if broken:
        raise CommandError(f"option {broken[0]!r} must look like name=value")
    return {name: yaml.safe_load(value) for name, value in split.items()}


def _row(task: str, part: Any) -> list[object]:
    interval = part.accuracy
    bounds = f"[{interval.low:.3f}, {interval.high:.3f}]" if interval.defined else "too few"
    return [task, float(interval.mean), bounds, part.n, part.unscored]
