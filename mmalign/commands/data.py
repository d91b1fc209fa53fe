"""``mmalign data``: official files of benchmarks, fetched once, checked, kept in a folder."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from mmalign.commands.common import CommandError, table


def add_arguments(parser: ArgumentParser) -> None:
    """The command line of ``mmalign data``."""
    text = "list: what there is; get: fetch NAME; check: read NAME and name broken rows"
    parser.add_argument("action", choices=["list", "get", "check"], help=text)
    parser.add_argument("name", nargs="?", metavar="NAME", help="a benchmark")
    parser.add_argument("--data", metavar="PATH", help="check: a file or folder of your own")
    text = "get: another folder than ~/.cache/mmalign/data (or $MMALIGN_DATA)"
    parser.add_argument("--cache", metavar="DIR", help=text)
    text = "get: take a file whose digest is not known in advance; may be given again"
    parser.add_argument("--accept-sha256", action="append", default=[], metavar="HEX", help=text)
    text = "get: another server for the same files, in place of https://host"
    parser.add_argument("--mirror", metavar="URL", help=text)
    parser.add_argument(
        "-o", "--option", action="append", default=[], metavar="k=v", help="check: of the benchmark"
    )


def run(args: Namespace) -> int:
    """List, fetch or check official files."""
    if args.action == "list":
        return _list(args)
    if args.name is None:
        raise CommandError(f"give a name: mmalign data {args.action} NAME (see: mmalign data list)")
    return _get(args) if args.action == "get" else _check(args)


def _list(args: Namespace) -> int:
    from eval.benchmarks.sources import SOURCES, cached

    rows = []
    for name, source in sorted(SOURCES.items()):
        here = cached(name, args.cache)
        state = str(here) if here else f"{len(source.files)} to fetch" if source.files else "--data"
        rows.append([name, source.licence, source.checked, state, source.page])
    print(table(rows, ["name", "licence", "digests known", "files", "source"]))
    return 0


def _get(args: Namespace) -> int:
    from eval.benchmarks.sources import get

    print(get(args.name, args.cache, accept=args.accept_sha256, mirror=args.mirror))
    return 0


def _check(args: Namespace) -> int:
    from eval.benchmarks.load import load_benchmark
    from mmalign.commands.evaluate import options_of

    benchmark = load_benchmark(args.name, data=args.data, **options_of(args.option))
    loaded = benchmark.load()
    print(f"{benchmark.name}: {len(loaded.prompts)} prompts in {benchmark.data}")
    counts: dict[str, int] = {}
    for prompt in loaded.prompts:
        counts[prompt.task] = counts.get(prompt.task, 0) + 1
    print(table([[task, n] for task, n in counts.items()], ["task", "prompts"]))
    for problem in loaded.problems:
        print(f"broken: {problem}")
    return 1 if loaded.problems else 0
