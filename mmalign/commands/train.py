"""``mmalign train``."""

from __future__ import annotations

from argparse import Namespace


def run(args: Namespace) -> int:
    """Train as the recipe says, or print the resolved recipe with ``--show``."""
    if args.show:
        return show(args)
    from mmalign import api

    api.train(
        args.recipe,
        args.overrides,
        output_dir=args.output_dir,
        preflight=not args.no_preflight,
        resume=not args.no_resume,
        report=not args.no_report,
    )
    return 0


def show(args: Namespace) -> int:
    """Print the recipe as it would run, and its hash."""
    from mmalign import api
    from mmalign.config import config_hash, dump_yaml

    config = api.resolve_recipe(args.recipe, args.overrides)
    print(f"# config hash {config_hash(config)}")
    print(dump_yaml(config), end="")
    return 0
