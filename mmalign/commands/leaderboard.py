"""``mmalign leaderboard``: every result below a folder in one page."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace


def add_arguments(parser: ArgumentParser) -> None:
    """The command line of ``mmalign leaderboard``."""
    text = "a folder with results of mmalign evaluate anywhere below it"
    parser.add_argument("folder", metavar="DIR", help=text)
    text = "where leaderboard.html and leaderboard.md go (DIR)"
    parser.add_argument("--out", metavar="DIR", help=text)


def run(args: Namespace) -> int:
    """Write the page and its Markdown, and print the latter."""
    from eval.leaderboard import write_leaderboard

    path, text = write_leaderboard(args.folder, args.out)
    print(f"{text}\nwritten to {path}")
    return 0
