"""``mmalign compare``: results of one benchmark against the first of them."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from mmalign.commands.common import CommandError, table


def add_arguments(parser: ArgumentParser) -> None:
    """The command line of ``mmalign compare``."""
    text = "folders of mmalign evaluate (or their result.json); the first is the baseline"
    parser.add_argument("results", nargs="+", metavar="RESULT", help=text)
    parser.add_argument("--out", metavar="FILE.html", help="write a page with pictures")
    parser.add_argument("--json", metavar="FILE.json", help="write the numbers")


def run(args: Namespace) -> int:
    """Print paired differences, wins, ties and losses; write a page and JSON where asked."""
    if len(args.results) < 2:
        raise CommandError("give two results or more to compare")
    from eval.compare import compare_results, read_results
    from eval.compare_page import HEAD, comparison_page, sentence, table_rows, to_json
    from mmalign.runtime.files import atomic_write_json

    found = compare_results(read_results(args.results))
    print(f"{found.baseline.benchmark} {found.baseline.version}, baseline: {found.name}")
    print(table(table_rows(found), HEAD))
    for one in found.others:
        print("\n".join([sentence(one), *(f"note: {said}" for said in one.cautions)]))
    if args.json is not None:
        atomic_write_json(args.json, to_json(found))
    if args.out is not None:
        print(f"written to {comparison_page(found, args.out)}")
    return 0
