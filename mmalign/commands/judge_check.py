"""``mmalign judge-check``."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmalign.commands.common import CommandError, image_files, prompts_of, table


def run(args: Namespace) -> int:
    """Check a judge on pictures and their prompts; print a table, write JSON and Markdown."""
    import yaml

    from mmalign.runtime.files import atomic_write_json, atomic_write_text
    from vision_rewards.factory import load_reward
    from vision_rewards.judge.robustness import HEADER, check_judge

    files = image_files(args.images)
    prompts = prompts_of(args) or []
    if len(prompts) != len(files):
        raise CommandError(f"{len(prompts)} prompts for {len(files)} pictures; give one each")
    options = _options(args.option, yaml.safe_load)
    judge = load_reward({"reward": args.judge, **options} if options else args.judge)
    report = check_judge(judge, _pictures(files, args.size), prompts, repeats=args.repeats)
    print(table(report.rows(), HEADER))
    print(f"{report.judge}; {report.pictures} pictures")
    if args.out:
        out = Path(args.out)
        atomic_write_json(out, report.record())
        atomic_write_text(out.with_suffix(".md"), report.markdown())
    return 0


def _options(pairs: Sequence[str], read: Any) -> Mapping[str, Any]:
    options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise CommandError(f"option {pair!r} must look like name=value")
        options[name.strip()] = read(value)
    return options


def _pictures(files: Sequence[Path], size: int | None) -> Any:
    from PIL import Image

    from mmalign.pictures import read_picture
    from mmalign.types import Media

    images = [read_picture(file) for file in files]
    if size is not None:
        images = [image.resize((size, size), Image.Resampling.BICUBIC) for image in images]
    if len({image.size for image in images}) > 1:
        raise CommandError("the pictures differ in size; --size 512 resizes them to one square")
    return Media.from_pil(images)
