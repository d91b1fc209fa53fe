"""``mmalign prefs``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from mmalign.commands.common import CommandError, given


def add_arguments(parser: ArgumentParser) -> None:
    """The command line of ``mmalign prefs``."""
    text = "check: name every broken row of FILE; make: a set labelled by a reward"
    parser.add_argument("action", choices=["check", "make"], help=text)
    parser.add_argument("file", nargs="?", metavar="FILE_OR_DIR", help="of check: the pairs")
    parser.add_argument("--image-root", metavar="DIR", help="check: where paths start (its own)")
    parser.add_argument(
        "--policy", metavar="NAME_OR_PATH", help="the generator; check: prompts fit"
    )
    parser.add_argument(
        "--drop-broken", action="store_true", help="check: broken rows are no error"
    )
    parser.add_argument("--reward", metavar="NAME", help="make: who prefers (shapes_partial)")
    text = "make, as pairs=2000 noise=0.1 ties=skip margin=0.05 prompts=FILE seed=1 steps=20"
    parser.add_argument("-o", "--option", action="append", default=[], metavar="k=v", help=text)
    parser.add_argument("--pairs", type=int, help="make: lines of the file (2000)")
    parser.add_argument("--noise", type=float, help="make: share of labels to swap (0)")
    parser.add_argument("--ties", help="make: label (written as such) or skip (label)")
    parser.add_argument("--batch-size", type=int, help="make: pairs drawn at once (32)")
    parser.add_argument("--device", default="auto", help="make: auto, cpu, cuda or mps")
    parser.add_argument("--out", metavar="DIR", help="make: where the set goes; is continued")


def run(args: Namespace) -> int:
    """Check a file of pairs, or make a set of them."""
    return check(args) if args.action == "check" else make(args)


def check(args: Namespace) -> int:
    """Print what is in a file and every broken row; 1 where there is one."""
    if args.file is None:
        raise CommandError("give the file or folder of pairs: mmalign prefs check FILE")
    from mmalign.policies.load import load_policy
    from vision_rewards.training.validation import check_pairs

    policy: Any = None if args.policy is None else load_policy(args.policy, device="cpu")
    found = check_pairs(args.file, args.image_root, None if policy is None else policy.fits)
    print("\n".join(found.lines))
    return 1 if found.faults and not args.drop_broken else 0


def make(args: Namespace) -> int:
    """Write a set of pairs that a reward has labelled."""
    if args.out is None or args.file is not None:
        raise CommandError("mmalign prefs make takes --out DIR, and no file")
    from mmalign.config import apply_overrides, from_dict
    from trainers.preferences.make import MakeConfig, make_pairs

    names = ("policy", "reward", "pairs", "noise", "ties")
    values = given(**{name: getattr(args, name) for name in names})
    config = from_dict(MakeConfig, apply_overrides(values, args.option), where="prefs make")
    size = given(batch_size=args.batch_size)
    path = make_pairs(config, Path(args.out), device=args.device, **size)  # type: ignore[arg-type]
    print(path)
    return 0
